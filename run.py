"""Command line of uad_jax: flags and dispatch only."""
