"""PyTorch's default initialisation, for networks that were published in it."""

import math
from collections.abc import Sequence
from typing import Any

import jax


def uniform(fan_in: int) -> dict[str, Any]:
    """Kernel and bias uniform within 1 / sqrt(fan_in), as arguments of a Flax layer."""
    bound = 1.0 / math.sqrt(fan_in)

    def draw(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return {"kernel_init": draw, "bias_init": draw}
