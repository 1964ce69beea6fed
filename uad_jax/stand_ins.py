"""Slices and volumes made up in a given shape, to measure speed without data.

All are cuts of one textured ellipsoid with one bright ball in it: no result about
detection can be had from them.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from uad_jax.data import placement, sources
from uad_jax.ops import intensity
from uad_jax.types import Batch, Volumes

Shape = tuple[int, int, int, int]  # D, H, W, C


def volume(shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Makes one volume.

    Args:
      shape: D, H, W, C.

    Returns:
      The image [D, H, W, C] float32 in about [0, 1], brain and lesion [D, H, W] bool.
      About 40 % of the voxels are brain, and 2 % of those are lesion.
    """
    z, x, y = np.meshgrid(
        *(np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape[:3]),
        indexing="ij",
    )
    brain = z**2 + (x / 0.85) ** 2 + (y / 0.9) ** 2 < 1
    lesion = z**2 + (x - 0.3) ** 2 + (y - 0.2) ** 2 < 0.06
    texture = np.random.default_rng(0).normal(0.5, 0.1, shape)
    image = np.where(brain[..., None], texture + 0.3 * lesion[..., None], 0.0)
    return image.astype(np.float32), brain, lesion


def batch(
    shape: Shape,
    rows: int,
    mesh: Mesh,
    *,
    num_slices: int | None = None,
    needs_lesion: bool = False,
    stack: int | None = None,
) -> Batch:
    """Makes a training batch on the mesh, of the dtypes that a store gives.

    Args:
      shape: D, H, W, C of the volumes that it is cut from.
      rows: Rows of the global batch.
      mesh: The data mesh.
      num_slices: None for slices; S for slabs of S consecutive slices.
      needs_lesion: Whether `lesion` and `lesion_known` are filled.
      stack: K: K equal batches, [K, B, ...]; None: one batch, [B, ...].

    Raises:
      ValueError: If a slab is deeper than the volume.
    """
    size = num_slices or 1
    if size > shape[0]:
        raise ValueError(
            f"A slab of {size} slices is deeper than the volume of {shape[0]}. Use "
            f"num_slices <= {shape[0]}, or another recipe."
        )
    image, brain, lesion = volume(shape)
    codes, _ = intensity.encode(image)
    plane = brain * np.uint8(sources.BRAIN_BIT) | lesion * np.uint8(sources.LESION_BIT)
    last = shape[0] - size
    first = np.linspace(last // 4, last - last // 4, rows).astype(np.int32)
    slab = np.arange(size, dtype=np.int32)
    index = first if num_slices is None else first[:, None] + slab
    made = placement.assemble(
        codes[index],
        plane[index],
        np.arange(rows, dtype=np.int32),
        index,
        lesion_known=np.ones(rows, bool) if needs_lesion else None,
    )
    if stack is not None:
        made = jax.tree.map(lambda leaf: np.stack([leaf] * stack), made)
    return placement.to_mesh(made, mesh, stacked=stack is not None)


def volumes(shape: Shape, count: int, mesh: Mesh) -> Volumes:
    """Makes decoded volumes on the mesh.

    Args:
      shape: D, H, W, C.
      count: Volumes, a multiple of the devices.
      mesh: The data mesh.
    """
    image, brain, _ = volume(shape)
    arrays: dict[str, Any] = {
        "image": np.stack([image] * count),
        "mask": np.stack([brain[..., None]] * count),
        "valid": np.ones((count, shape[0]), bool),
        "uid": np.arange(count, dtype=np.int32),
    }
    made = Volumes(**arrays)
    return placement.to_mesh(made, mesh)
