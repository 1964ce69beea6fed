"""The data that travels between the floors. No logic lives here.

Axes: B batch, S slab, D depth, H height, W width, C channels.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

Array = jax.Array
Key = jax.Array  # a typed PRNG key, or an array of them
Tree = Any  # a pytree of arrays
Scalars = dict[str, Array]  # means over the global batch, each []


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One training batch of slices [B, H, W, C] or slabs [B, S, H, W, C].

    Attributes:
      image: Images; uint16 or uint8 codes until decoded inside jit
        (`ops.intensity.decode`), float32 of about [0, 1] after.
      mask: Brain mask, [B, (S,) H, W, 1] bool.
      valid: False on padding, [B, (S,)] bool.
      uid: Volume id, [B] int32.
      slice_index: Axial index in the volume, [B, (S,)] int32.
      lesion: Lesion mask like `mask`; None unless the method asks for it.
      lesion_known: Whether `lesion` is an annotation, [B] bool; None like `lesion`.
      features: Cached features that replace the images, [B, ...], or None.
    """

    image: Array
    mask: Array
    valid: Array
    uid: Array
    slice_index: Array
    lesion: Array | None = None
    lesion_known: Array | None = None
    features: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Volumes:
    """Whole volumes to score. There is no lesion field: a method cannot see it.

    Attributes:
      image: [B, D, H, W, C]; codes until decoded, float32 of about [0, 1] after.
      mask: Brain mask, [B, D, H, W, 1] bool.
      valid: False on padded slices and padded volumes, [B, D] bool.
      uid: [B] int32, keys the noise of a volume; -1 for a padded volume.
    """

    image: Array
    mask: Array
    valid: Array
    uid: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labels:
    """Ground truth of a batch of volumes, on the host, seen by metrics only.

    Attributes:
      lesion: [B, D, H, W] bool.
      annotated: Whether `lesion` is an annotation (a healthy volume counts as
        annotated with an empty lesion), [B] bool.
      abnormal: Volume-level label, [B] bool.
    """

    lesion: np.ndarray
    annotated: np.ndarray
    abnormal: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelState:
    """Parameters and mutable collections, one entry per network.

    Attributes:
      params: {"encoder": ..., "critic": ...}.
      collections: {"encoder": {"batch_stats": ...}}; networks without any are absent.
    """

    params: dict[str, Tree]
    collections: dict[str, Tree]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that training changes.

    Attributes:
      step: Finished optimiser steps, [] int32.
      model: The live model.
      opt_state: One entry per optimiser; frozen networks have none.
      ema: Averaged parameters of the trainable networks, or None.
    """

    step: Array
    model: ModelState
    opt_state: dict[str, Tree]
    ema: dict[str, Tree] | None = None

    def for_eval(self) -> ModelState:
        """Merges EMA, live frozen parameters and the latest batch statistics."""
        if self.ema is None:
            return self.model
        return ModelState(
            params={**self.model.params, **self.ema},
            collections=self.model.collections,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """What a method says about a batch of volumes.

    Attributes:
      anomaly_map: [B, D, H, W] float32, any finite values, higher = more abnormal.
        The evaluator ranks voxels outside the brain lowest.
      slice_score: [B, D] float32.
      volume_score: [B] float32.
      reconstruction: [B, D, H, W, C] float32, or None.
    """

    anomaly_map: Array
    slice_score: Array
    volume_score: Array
    reconstruction: Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """How the model grid sits in the scan it was made from. Host only.

    Attributes:
      native_shape: Voxels of the native image, (X, Y, Z).
      native_affine: Native voxel index to world RAS mm, [4, 4] float64.
      grid_to_native: Model-grid index (x, y, z) to native voxel index, [4, 4] float64.
    """

    native_shape: tuple[int, int, int]
    native_affine: np.ndarray
    grid_to_native: np.ndarray
