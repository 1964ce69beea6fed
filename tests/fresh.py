"""Random inputs that are new in every run, and can be had again when a test fails."""

import numpy as np


def rng(seed: int | None = None) -> np.random.Generator:
    """Makes a generator with a new seed and says the seed.

    Pytest shows what a failing test printed: the line in it, put in the place of the
    call, fails again.

    Args:
      seed: None = a new one.
    """
    if seed is None:
        seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"fresh.rng({seed})")
    return np.random.default_rng(seed)
