"""The shape of one synthetic subject: a pull-back warp from its space to the base."""

import dataclasses

import numpy as np

from uad_jax.data import anatomy, fields, lesions

_CENTRE = np.array([0.0, -18.0, 8.0])  # world mm about which heads turn and scale
_SMOOTH = ((30.0, 2.6), (14.0, 1.5), (7.0, 0.7))  # correlation length, sd, both mm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Warp:
    """Where a subject's voxels lie in base space; kept near the brain only.

    Attributes:
      near: Voxels of the subject that may show brain, [X, Y, Z] bool with N true.
      position: Their base-space world position in mm, [3, N] float32.
    """

    near: np.ndarray
    position: np.ndarray

    def pull(self, base: anatomy.Template, image: np.ndarray) -> np.ndarray:
        """Brings a base-space image [X, Y, Z] to the subject; 0 away from the brain."""
        pulled = np.zeros(base.shape, np.float32)
        pulled[self.near] = _sample(base, image, self.position)
        return pulled


def draw(base: anatomy.Template, rng: np.random.Generator) -> Warp:
    """Draws a subject's shape: pose, size, smooth deformation, ventricle size.

    Args:
      base: The average brain.
      rng: The subject's geometry stream.

    Returns:
      The warp from the subject's grid to base space.
    """
    matrix = _affine(rng)
    shift = rng.normal(0, 1.0, 3)
    offset = (_CENTRE - matrix @ (_CENTRE + shift)).reshape(3, 1, 1, 1)
    position = np.tensordot(matrix, base.world, 1) + offset
    near = _reachable(base, position)
    position = position[:, near].astype(np.float32)

    inward = np.clip(_sample(base, base.depth, position) / 10, 0, 1)
    for axis in range(3):
        for length, deviation in _SMOOTH:
            field = fields.smooth_field(rng, base.shape, anatomy.SPACING_MM, length)
            moved = np.float32(deviation) * field[near]
            position[axis] += moved if length > 20 else moved * inward

    amount = np.clip(rng.gamma(2.0, 1.0) - 1.2, -1.2, 4.0)
    moved = np.stack([_sample(base, part, position) for part in base.vent_growth])
    return Warp(near=near, position=position - np.float32(amount) * moved)


def push_away(base: anatomy.Template, warp: Warp, push: lesions.Push) -> Warp:
    """Adds a tumour's mass effect to a warp; zero at the skull.

    Args:
      base: The average brain.
      warp: Result of `draw`.
      push: Centre, radius and amplitude in base space.

    Returns:
      The warp with the mass effect.
    """
    offset = warp.position - push.centre.reshape(3, 1).astype(np.float32)
    distance = np.sqrt((offset**2).sum(0))
    beyond = np.maximum(distance - push.radius, 0)
    size = push.amplitude * np.exp(-beyond / (1.1 * push.radius))
    size *= np.minimum(distance / push.radius, 1)
    size *= np.clip(_sample(base, base.depth, warp.position) / 12, 0, 1)
    moved = offset * (size / np.maximum(distance, 1e-3))
    return Warp(near=warp.near, position=(warp.position - moved).astype(np.float32))


def _reachable(base: anatomy.Template, position: np.ndarray) -> np.ndarray:
    """Voxels whose position before the deformation is within 14 mm of the brain."""
    origin = base.affine[:3, 3].reshape(3, 1, 1, 1)
    index = np.rint((position - origin) / anatomy.SPACING_MM).astype(np.intp)
    for axis, size in enumerate(base.shape):
        np.clip(index[axis], 0, size - 1, out=index[axis])
    x, y, z = index
    return base.vicinity[x, y, z]


def _sample(
    base: anatomy.Template, image: np.ndarray, position: np.ndarray
) -> np.ndarray:
    """Reads a base-space image at world positions [3, N], linearly; 0 outside."""
    origin = base.affine[:3, 3].astype(np.float32).reshape(3, 1)
    return fields.pull(image, (position - origin) / anatomy.SPACING_MM)


def _affine(rng: np.random.Generator) -> np.ndarray:
    """Rotation, scale, shear and perhaps a left-right flip, [3, 3]."""
    angles = np.deg2rad(rng.normal(0, 2.0, 3))
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = [a for a in range(3) if a != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    scale = 1 + rng.normal(0, (0.035, 0.04, 0.035))
    # The template is larger than most heads (ICBM152 is 10 to 15 % too long).
    matrix = matrix @ np.diag(1.09 / scale)
    matrix[np.triu_indices(3, 1)] += rng.normal(0, 0.012, 3)
    if rng.uniform() < 0.5:
        matrix[0] = -matrix[0]
    return matrix
