"""Slabs of consecutive slices: where they lie in volumes, cut out and put together."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from uad_jax.types import Array


class Places(NamedTuple):
    """Where the slabs of volumes lie.

    Attributes:
      start: First slice of each, [B, K] int32.
      used: False where a volume needs fewer slabs than others, [B, K] bool.
    """

    start: Array
    used: Array


def places(valid: Array, num_slices: int, overlap: int) -> Places:
    """Spreads slabs over volumes.

    Slabs start every `num_slices - overlap` slices; the last one is moved back so that
    it ends with the volume's last valid slice. A volume thinner than a slab has one.

    Args:
      valid: False on padding, which lies at the end, [B, D] bool.
      num_slices: Length S of a slab.
      overlap: Slices that neighbours share, in [0, S).
    """
    stride = num_slices - overlap
    longest = max(valid.shape[1], num_slices)
    index = jnp.arange(1 + -(-(longest - num_slices) // stride))[None]
    depth = valid.sum(axis=1)[:, None]
    start = jnp.clip(index * stride, 0, jnp.maximum(depth - num_slices, 0))
    before = (index - 1) * stride + num_slices
    return Places(start, (index == 0) | (before < depth))


def padded(x: Array, num_slices: int) -> Array:
    """Appends zeros to volumes [B, D, ...] that are thinner than a slab."""
    missing = max(num_slices - x.shape[1], 0)
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))


def cut(x: Array, start: Array, num_slices: int) -> Array:
    """Cuts slabs out of volumes.

    Args:
      x: [B, D, ...] with D of at least `num_slices` (`padded`).
      start: First slices, [B, K] int32.
      num_slices: Length S of a slab.

    Returns:
      [B, K, S, ...].
    """

    def one(x: Array, start: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, start, num_slices)

    return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(x, start)


def merged(x: Array, where: Places, depth: int) -> Array:
    """Puts slabs together; where they overlap, their mean counts.

    Args:
      x: [B, K, S, ...] float.
      where: Where they lie in the volumes.
      depth: Slices D of the volumes.

    Returns:
      [B, D, ...], 0 where there is no slab.
    """
    size = x.shape[2]
    index = where.start[..., None] + jnp.arange(size)[None, None]

    def one(x: Array, index: Array, used: Array) -> Array:
        share = jnp.broadcast_to(used[:, None], index.shape).astype(x.dtype)
        spread = (1,) * (x.ndim - 2)
        total = jnp.zeros((max(depth, size), *x.shape[2:]), x.dtype)
        total = total.at[index].add(x * share.reshape(*share.shape, *spread))
        count = jnp.zeros(len(total), x.dtype).at[index].add(share)
        return (total / jnp.maximum(count, 1).reshape(-1, *spread))[:depth]

    return jax.vmap(one)(x, index, where.used)
