"""Smooth random fields on a regular grid, and pulling images through a warp."""

import functools

import numpy as np
from scipy import ndimage


def smooth_field(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    spacing: float,
    length: float,
) -> np.ndarray:
    """Draws a stationary Gaussian field of unit variance.

    The field is white noise on knots times separable Gaussian bumps, each row of
    weights normalised, so that the variance is one at every voxel, borders included.

    Args:
      rng: Source of the noise.
      shape: Voxels, (X, Y, Z).
      spacing: Voxel size in mm.
      length: Correlation length in mm: the covariance is about
        exp(-r^2 / (2 length^2)).

    Returns:
      [X, Y, Z] float32, mean 0, standard deviation 1.
    """
    bases = [_basis(size, spacing, length) for size in shape]
    noise = rng.standard_normal([b.shape[1] for b in bases], dtype=np.float32)
    for basis in bases:  # each pass contracts the first axis and appends the new one
        rest = noise.shape[1:]
        noise = (noise.reshape(len(noise), -1).T @ basis.T).reshape(*rest, -1)
    return noise


@functools.lru_cache(maxsize=64)
def _basis(size: int, spacing: float, length: float) -> np.ndarray:
    """Unit-norm Gaussian weights of the knots for every voxel, [size, knots]."""
    sigma = length / np.sqrt(2)  # the covariance is the bump convolved with itself
    pitch = max(sigma, spacing)
    knots = np.arange(-3 * sigma, (size - 1) * spacing + 3 * sigma + pitch, pitch)
    offset = np.arange(size)[:, None] * spacing - knots
    weights = np.exp(-0.5 * (offset / sigma) ** 2)
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    weights[weights < 1e-6] = 0  # subnormal numbers would slow the products tenfold
    return weights.astype(np.float32)


def pull(image: np.ndarray, coordinates: np.ndarray) -> np.ndarray:
    """Samples an image linearly at voxel coordinates; 0 outside.

    Linear, because its reach is one voxel: a lesion changes nothing elsewhere.

    Args:
      image: [X, Y, Z] float32.
      coordinates: Voxel indices to read at, [3, ...].

    Returns:
      Values of the shape of `coordinates[0]`, float32.
    """
    return ndimage.map_coordinates(
        image, coordinates, output=np.float32, order=1, mode="constant"
    )


def step(distance: np.ndarray, width: float) -> np.ndarray:
    """A linear edge of the given width in mm: 1 inside (distance > 0), 0 outside."""
    return np.clip(0.5 + distance / width, 0, 1)
