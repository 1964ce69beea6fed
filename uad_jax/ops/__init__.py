"""Pure jnp functions without parameters (floor 1)."""
