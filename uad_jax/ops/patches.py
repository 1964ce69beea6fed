"""Square boxes of images: where they lie, what is in them, how they join again.

Sources: Behrendt et al. 2023, "Patched diffusion models for unsupervised anomaly
detection in brain MRI", and the authors' code.

Deviations: boxes never leave the image unless asked (`random_boxes(cut=True)`).
Averages divide once by the number of boxes; the code divides after every box. Where
boxes overlap, `CUT` goes halfway; the code's cut is `FIRST` for two boxes a side, and
for more takes pixels that were never noised.
"""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uad_jax.types import Array, Key


class Overlap(enum.Enum):
    """Which box a pixel comes from where boxes overlap."""

    CUT = "cut"  # the overlap is cut in the middle
    FIRST = "first"  # the upper or left box keeps it
    AVERAGE = "average"  # the mean of all boxes


class Grid(NamedTuple):
    """Boxes that cover an image, K = len(rows) * len(columns), row by row.

    Attributes:
      shape: (H, W) of the image.
      patch: Side of a box in pixels.
      rows: First row of the boxes, rising from 0.
      columns: First column of the boxes, rising from 0.
    """

    shape: tuple[int, int]
    patch: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def corners(self) -> list[tuple[int, int]]:
        """First (row, column) of each of the K boxes."""
        return [(row, column) for row in self.rows for column in self.columns]


def grid(shape: tuple[int, int], patch: int, stride: int = 0) -> Grid:
    """Lays boxes over an image.

    Args:
      shape: (H, W) of the image.
      patch: Side of a box in pixels.
      stride: Pixels from box to box. 0 = as few boxes as cover the image, spread
        evenly: side by side if the patch divides the image, else overlapping.

    Returns:
      The grid; 4 boxes for a patch of 48 on 96 x 96.

    Raises:
      ValueError: If the patch does not fit or pixels are left uncovered.
    """
    check_patch(shape, patch)
    if stride < 0:
        raise ValueError(f"The stride of the boxes is {stride}; use 0 or more.")
    rows, columns = (_starts(size, patch, stride) for size in shape)
    return Grid(shape, patch, rows, columns)


def check_patch(shape: tuple[int, int], patch: int) -> None:
    """Raises ValueError if a box does not fit into an image (H, W)."""
    height, width = shape
    if not 1 <= patch <= min(shape):
        raise ValueError(
            f"The patch is {patch} x {patch} pixels, but the image is {height} x "
            f"{width}. Use a patch from 1 to {min(shape)}."
        )


def _starts(size: int, patch: int, stride: int) -> tuple[int, ...]:
    if not stride:
        count = -(-size // patch)
        return tuple(i * (size - patch) // max(count - 1, 1) for i in range(count))
    starts = range(0, size - patch + 1, stride)
    covered = len(starts) * patch if stride > patch else starts[-1] + patch
    if covered < size:
        raise ValueError(
            f"Boxes of {patch} pixels at a stride of {stride} leave {size - covered} "
            f"of {size} pixels uncovered. Use a stride of at most {patch} that "
            f"divides {size} - {patch} = {size - patch}, or 0 to spread the boxes."
        )
    return tuple(starts)


def masks(boxes: Grid) -> np.ndarray:
    """True inside each box, [K, H, W, 1] bool."""
    found = np.zeros((len(boxes.corners), *boxes.shape, 1), bool)
    for inside, (row, column) in zip(found, boxes.corners, strict=True):
        inside[row : row + boxes.patch, column : column + boxes.patch] = True
    return found


def weights(boxes: Grid, overlap: Overlap) -> np.ndarray:
    """Shares of each box in each pixel.

    Returns:
      [K, H, W, 1] float32; 0 outside a box, and every pixel's shares add up to 1.
    """
    if overlap is Overlap.AVERAGE:
        inside = masks(boxes).astype(np.float32)
        return inside / inside.sum(0)
    height, width = boxes.shape
    row = _cells(boxes.rows, height, boxes.patch, overlap)
    column = _cells(boxes.columns, width, boxes.patch, overlap)
    cells = row[:, None, :, None] & column[None, :, None, :]
    return cells.reshape(-1, height, width, 1).astype(np.float32)


def _cells(
    starts: tuple[int, ...], size: int, patch: int, overlap: Overlap
) -> np.ndarray:
    """Which of a side's pixels each box keeps, [boxes, size] bool."""
    first = np.array(starts)
    last = first[:-1] + patch
    middle = last if overlap is Overlap.FIRST else (first[1:] + last) // 2
    owner = np.searchsorted(middle, np.arange(size), side="right")
    return owner == np.arange(len(first))[:, None]


def random_masks(keys: Key, boxes: Grid) -> Array:
    """Picks one box of a grid per sample, all alike likely.

    Args:
      keys: [N] keys.
      boxes: The grid.

    Returns:
      True inside the box, [N, H, W, 1] bool.
    """
    every = jnp.asarray(masks(boxes))
    pick = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(every)))(keys)
    return every[pick]


def random_boxes(
    keys: Key, shape: tuple[int, int], patch: int, cut: bool = False
) -> Array:
    """Puts one box anywhere per sample.

    Args:
      keys: [N] keys.
      shape: (H, W) of the image.
      patch: Side of a box in pixels.
      cut: The reference's form: the first corner is any pixel, and what leaves the
        image is cut off. By default the whole box lies inside.

    Returns:
      True inside the box, [N, H, W, 1] bool.

    Raises:
      ValueError: If the patch does not fit.
    """
    check_patch(shape, patch)
    choices = np.array(shape) if cut else np.array(shape) - patch + 1

    def one(key: Key) -> Array:
        corner = jax.random.randint(key, (2,), 0, choices)
        row, column = (
            (start <= axis) & (axis < start + patch)
            for start, axis in zip(corner, map(jnp.arange, shape), strict=True)
        )
        return row[:, None, None] & column[None, :, None]

    return jax.vmap(one)(keys)


def extract(images: Array, boxes: Grid) -> Array:
    """Takes the boxes out of images, [N, H, W, C] to [N, K, patch, patch, C]."""
    side = boxes.patch
    return jnp.stack(
        [
            images[:, row : row + side, column : column + side]
            for row, column in boxes.corners
        ],
        axis=1,
    )


def stitch(patches: Array, boxes: Grid, overlap: Overlap) -> Array:
    """Puts boxes back into images; inverts `extract`.

    Args:
      patches: [N, K, patch, patch, C] float.
      boxes: The grid.
      overlap: What happens where boxes overlap.

    Returns:
      [N, H, W, C].
    """
    side, share = boxes.patch, weights(boxes, overlap)
    count, _, _, _, channels = patches.shape
    image = jnp.zeros((count, *boxes.shape, channels), patches.dtype)
    for k, (row, column) in enumerate(boxes.corners):
        window = slice(row, row + side), slice(column, column + side)
        part = patches[:, k] * share[k][window][None].astype(patches.dtype)
        image = image.at[:, window[0], window[1]].add(part)
    return image


def blend(images: Array, boxes: Grid, overlap: Overlap) -> Array:
    """Joins whole images of which only the box counts.

    Args:
      images: One image per box, [N, K, H, W, C] float; outside its box anything, even
        NaN.
      boxes: The grid.
      overlap: What happens where boxes overlap.

    Returns:
      [N, H, W, C].
    """
    share = weights(boxes, overlap)[None]
    return jnp.where(share > 0, images * share.astype(images.dtype), 0).sum(1)
