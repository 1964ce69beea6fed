"""The shape of one synthetic subject: a pull-back warp from its space to the base."""

import numpy as np
from scipy import ndimage

from uad_jax.data import anatomy, fields, lesions

_CENTRE = np.array([0.0, -18.0, 8.0])  # world mm about which heads turn and scale
_SMOOTH = ((30.0, 2.6), (14.0, 1.5), (7.0, 0.7))  # correlation length, sd, both mm


def draw(base: anatomy.Template, rng: np.random.Generator) -> np.ndarray:
    """Draws a subject's shape: pose, size, smooth deformation, ventricle size.

    Args:
      base: The average brain.
      rng: The subject's geometry stream.

    Returns:
      Base-space world position in mm of every voxel of the subject, [3, X, Y, Z]
      float32.
    """
    matrix = _affine(rng)
    centre = _CENTRE.reshape(3, 1, 1, 1)
    shift = rng.normal(0, 1.0, 3).reshape(3, 1, 1, 1)
    position = np.tensordot(matrix, base.world - centre - shift, 1) + centre
    position = position.astype(np.float32)

    inward = np.clip(sample(base, base.depth, position) / 10, 0, 1)
    for axis in range(3):
        for length, deviation in _SMOOTH:
            offset = deviation * fields.smooth_field(
                rng, base.shape, anatomy.SPACING_MM, length
            )
            position[axis] += offset if length > 20 else offset * inward

    amount = np.clip(rng.gamma(2.0, 1.0) - 1.2, -1.2, 4.0)
    pull = base.vent_normal * np.exp(-np.abs(base.vent_distance) / 14)
    moved = np.stack([sample(base, pull[axis], position) for axis in range(3)])
    return position - np.float32(amount) * moved


def push_away(
    base: anatomy.Template, position: np.ndarray, push: lesions.Push
) -> np.ndarray:
    """Adds a tumour's mass effect to a warp; zero at the skull.

    Args:
      base: The average brain.
      position: Result of `draw`, [3, X, Y, Z].
      push: Centre, radius and amplitude in base space.

    Returns:
      The warp with the mass effect, [3, X, Y, Z] float32.
    """
    offset = position - push.centre.reshape(3, 1, 1, 1)
    distance = np.sqrt((offset**2).sum(0))
    beyond = np.maximum(distance - push.radius, 0)
    size = np.exp(-beyond / (1.1 * push.radius))
    size *= np.minimum(distance / push.radius, 1)
    size *= np.clip(sample(base, base.depth, position) / 12, 0, 1)
    size = ndimage.gaussian_filter(size, 1.0)
    moved = push.amplitude * size * offset / np.maximum(distance, 1e-3)
    return (position - moved).astype(np.float32)


def sample(
    base: anatomy.Template, image: np.ndarray, position: np.ndarray
) -> np.ndarray:
    """Reads a base-space image at world positions, linearly; 0 outside.

    Args:
      base: The average brain.
      image: [X, Y, Z].
      position: World mm in base space, [3, X, Y, Z].

    Returns:
      [X, Y, Z] float32.
    """
    origin = base.affine[:3, 3].astype(np.float32).reshape(3, 1, 1, 1)
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
    matrix = matrix @ np.diag(1.06 / scale)
    matrix[np.triu_indices(3, 1)] += rng.normal(0, 0.012, 3)
    if rng.uniform() < 0.5:
        matrix[0] = -matrix[0]
    return matrix
