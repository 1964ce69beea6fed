"""Noise for diffusion, made on the device and keyed per sample."""

import enum
import math

import jax
import jax.numpy as jnp

from uad_jax.ops import diffusion, simplex
from uad_jax.types import Array, Key

_OCTAVES = simplex.Octaves()


class Noise(enum.Enum):
    """Kinds of noise."""

    GAUSSIAN = "gaussian"  # independent pixels
    SIMPLEX = "simplex"  # 2-D octaves (pDDPM and its relatives)
    SIMPLEX_3D = "simplex_3d"  # slice at depth t of a 3-D field (AnoDDPM)


def make(
    kind: Noise,
    shape: tuple[int, int, int],
    *,
    unit_variance: bool = True,
    octaves: simplex.Octaves = _OCTAVES,
) -> diffusion.NoiseFn:
    """Builds a noise function for images of one shape.

    The function takes `keys` and the diffusion steps `t` [N] (only SIMPLEX_3D looks at
    them) and returns [N, H, W, C] float32. Keys are [N], one per sample: the noise of
    a sample then depends on its key alone, not on its place in the batch. Or `keys` is
    one [] key: all samples share its field, as in the reference code, which draws one
    field per call. Channels are independent.

    Args:
      kind: The kind of noise.
      shape: (H, W, C) of an image.
      unit_variance: Divides simplex noise by its standard deviation, 0.59 (2-D) or
        0.50 (3-D); False leaves it as in the reference.
      octaves: Octaves of simplex noise.

    Returns:
      `(keys, t) -> noise`.

    Raises:
      ValueError: For an unknown kind of noise, or octaves that cannot work.
    """
    if not isinstance(kind, Noise):
        known = ", ".join(noise.value for noise in Noise)
        raise ValueError(f"Unknown noise {kind!r}. Known kinds: {known}.")
    octaves.validate()
    *grid, channels = shape
    size = (grid[0], grid[1])

    def plane(keys: Key, t: Array) -> Array:
        """One channel of noise for M keys, [M, H, W]."""
        if kind is Noise.GAUSSIAN:
            return jax.vmap(lambda key: jax.random.normal(key, size))(keys)
        permutation = simplex.permutations(keys)
        if kind is Noise.SIMPLEX:
            field = simplex.field2(simplex.plan(size, octaves), permutation)
        else:
            field = simplex.field3(size, octaves, permutation, t)
        axes = 2 if kind is Noise.SIMPLEX else 3
        return field / math.sqrt(octaves.variance(axes)) if unit_variance else field

    def noise(keys: Key, t: Array) -> Array:
        count = t.shape[0]
        if keys.shape not in ((), (count,)):
            raise ValueError(
                f"Found keys of shape {keys.shape} for {count} samples. Pass one key "
                f"or {count}."
            )
        if keys.ndim == 0:
            # A slice at its own depth for each sample needs the key of each.
            same = count if kind is Noise.SIMPLEX_3D else 1
            keys, t = jnp.broadcast_to(keys, (same,)), t[:same]
        planes = [plane(_channel(keys, channel), t) for channel in range(channels)]
        field = jnp.stack(planes, -1)
        return jnp.broadcast_to(field, (count, *shape))

    return noise


def _channel(keys: Key, channel: int) -> Key:
    return jax.vmap(lambda key: jax.random.fold_in(key, channel))(keys)
