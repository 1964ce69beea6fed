"""Spatial erasing: cuboids of a slab are set to 0, to be filled in by the model.

Source: the idea of Bengs et al. 2021, "Three-dimensional deep learning with spatial
erasing for unsupervised anomaly segmentation in brain MRI". Number, size and place of
the cuboids are our choice.
"""

import dataclasses

import jax
import jax.numpy as jnp

from uad_jax.types import Array, Key


@dataclasses.dataclass
class EraseConfig:
    """How often and how much of a slab is erased.

    Attributes:
      probability: Share of the slabs that lose something; 0 = none.
      num_cuboids: Cuboids of such a slab; they may overlap.
      min_share: Shortest edge as a share of the brain's extent along that axis.
      max_share: Longest edge.
    """

    probability: float = 0.0
    num_cuboids: int = 1
    min_share: float = 0.1
    max_share: float = 0.4

    def validate(self) -> None:
        """Raises ValueError for settings that cannot work."""
        if not 0 <= self.probability <= 1:
            raise ValueError(
                f"erase.probability is {self.probability}; it must lie in [0, 1]."
            )
        if self.num_cuboids < 1:
            raise ValueError(
                f"erase.num_cuboids is {self.num_cuboids}; use 1 or more, or "
                "erase.probability = 0."
            )
        if not 0 < self.min_share <= self.max_share <= 1:
            raise ValueError(
                f"erase.min_share is {self.min_share} and erase.max_share "
                f"{self.max_share}; use 0 < min_share <= max_share <= 1."
            )


def erase(config: EraseConfig, keys: Key, image: Array, mask: Array) -> Array:
    """Erases cuboids of slabs at random.

    Args:
      config: How often and how much.
      keys: One key per slab, [B].
      image: [B, S, H, W, C] float.
      mask: The brain, [B, S, H, W, 1] bool; False on padding.

    Returns:
      The image with zeros in the cuboids. They lie within the box around the brain; a
      slab without brain stays as it is.
    """
    if isinstance(config.probability, float | int) and config.probability == 0:
        return image
    erased = jax.vmap(lambda key, brain: _cuboids(config, key, brain))(
        keys, mask[..., 0]
    )
    return jnp.where(erased[..., None], jnp.zeros((), image.dtype), image)


def _cuboids(config: EraseConfig, key: Key, brain: Array) -> Array:
    """Draws the erased voxels of one slab [S, H, W] bool."""
    gate_key, size_key, place_key = jax.random.split(key, 3)
    shape = (config.num_cuboids, brain.ndim)
    share = jax.random.uniform(size_key, shape)
    share = config.min_share + (config.max_share - config.min_share) * share
    place = jax.random.uniform(place_key, shape)
    inside = jnp.ones((config.num_cuboids, *brain.shape), bool)
    for axis, extent in enumerate(brain.shape):
        others = tuple(i for i in range(brain.ndim) if i != axis)
        occupied = brain.any(axis=others)
        first = jnp.argmax(occupied)
        length = extent - jnp.argmax(occupied[::-1]) - first
        edge = jnp.clip(jnp.round(share[:, axis] * length), 1, length)
        low = first + jnp.floor(place[:, axis] * (length - edge + 1))
        index = jnp.arange(extent)[None]
        within = (index >= low[:, None]) & (index < (low + edge)[:, None])
        new = [config.num_cuboids, *(1,) * brain.ndim]
        new[axis + 1] = extent
        inside &= within.reshape(new)
    hit = jax.random.uniform(gate_key) < config.probability
    return inside.any(axis=0) & hit & brain.any()
