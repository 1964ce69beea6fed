"""One file per method family; each a NamedTuple of pure functions (floor 3)."""
