"""Whether an array with an affine lies on given voxels, and how to turn it to them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

TOLERANCE = 1e-3  # voxels; fault B30


class Voxels(NamedTuple):
    """Where an array lies.

    Attributes:
      name: For messages, such as "scan".
      shape: (X, Y, Z).
      affine: Index to world RAS mm, [4, 4].
    """

    name: str
    shape: tuple[int, ...]
    affine: np.ndarray

    def __str__(self) -> str:
        rows = np.round(self.affine[:3], 4).tolist()
        return f"shape {self.shape}, affine {rows}"


def fit(found: Voxels, wanted: Voxels) -> tuple[np.ndarray, float]:
    """Finds the order of axes and the flips that take one array to another's voxels.

    Args:
      found: The array at hand.
      wanted: Where it should lie.

    Returns:
      Index of `found` to index of `wanted` if they agreed, a signed permutation,
      [4, 4]; and by how many voxels the farthest corner is off, infinite if axes or
      shape do not fit.
    """
    # Files hold float32, so only what float32 can tell apart is another place.
    source, target = (
        voxels.affine.astype(np.float32).astype(np.float64)
        for voxels in (found, wanted)
    )
    transform = np.linalg.inv(target) @ source
    turn = np.eye(4)
    turn[:3, :3] = np.rint(transform[:3, :3])
    linear = np.abs(turn[:3, :3])
    if not ((linear.sum(axis=0) == 1).all() and (linear.sum(axis=1) == 1).all()):
        return turn, math.inf
    axes = linear.argmax(axis=1)  # axis of `wanted` -> axis of `found`
    if tuple(found.shape[axis] for axis in axes) != wanted.shape:
        return turn, math.inf
    backwards = turn[:3, :3].sum(axis=1) < 0
    turn[:3, 3] = np.where(backwards, np.array(wanted.shape) - 1, 0)
    corners = np.ones((4, 8))
    corners[:3] = np.array(list(np.ndindex(2, 2, 2))).T
    corners[:3] *= np.array(found.shape)[:, None] - 1.0
    return turn, float(np.abs((transform - turn) @ corners).max())


def mismatch(found: Voxels, allowed: Sequence[Voxels]) -> str:
    """One sentence on an array that lies on none of the voxels, with the remedy."""
    text = f"{found.name}: {found}; expected "
    text += " or ".join(f"{voxels} (the {voxels.name})" for voxels in allowed)
    for voxels in allowed:
        distance = fit(found, voxels)[1]
        if math.isfinite(distance):
            text += f"; it is {distance:.3g} voxels off the {voxels.name}"
    text += ". Resample it onto the scan that it was made from"
    if any(found.shape == voxels.shape for voxels in allowed):
        text += (
            ", or, if you know that the arrays match, write that affine into it or "
            "pass --ignore_affine"
        )
    return f"{text}."
