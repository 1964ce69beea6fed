"""Corruptions for training: hidden squares and coarse noise, keyed per sample.

Sources: Zimmerer et al. 2018, "Context-encoding variational autoencoder for
unsupervised anomaly detection", as re-implemented by Baur et al. 2021 (squares);
Kascenas et al. 2022, "Denoising autoencoders for unsupervised anomaly detection in
brain MRI" (coarse noise).
"""

import jax
import jax.numpy as jnp
import numpy as np

from uad_jax.types import Array, Key

_SIDE = 20  # pixels of a square's side, of an image of _IMAGE
_IMAGE = 128


def square_side(height: int, width: int, side: int = 0) -> int:
    """Side of the hidden squares of an image.

    Args:
      height: Image height in pixels.
      width: Image width in pixels.
      side: Wanted side in pixels; 0 = the published 20 of 128 pixels, scaled with the
        shorter side of the image (15 at 96).

    Returns:
      The side in pixels, at least 1.

    Raises:
      ValueError: If a square does not fit into the image.
    """
    shorter = min(height, width)
    chosen = side or max(1, int(_SIDE * shorter / _IMAGE + 0.5))
    if not 1 <= chosen <= shorter:
        raise ValueError(
            f"The hidden squares have sides of {chosen} pixels, but the image is "
            f"{height}x{width}. Use a side from 1 to {shorter}, or 0 to scale it with "
            "the image."
        )
    return chosen


def hidden_squares(keys: Key, brain: Array, side: int, max_squares: int = 3) -> Array:
    """Draws squares inside the bounding box of the brain, for each sample its own.

    Args:
      keys: One key per sample, [N].
      brain: Brain mask, [N, H, W, 1] bool.
      side: Side of a square in pixels, at most that of the image. Where the bounding
        box is smaller, the square is cut to it.
      max_squares: There are 1 to `max_squares` squares, all numbers alike likely.
        They may overlap.

    Returns:
      [N, H, W, 1] bool, True where a square lies. Without brain there are none.

    Raises:
      ValueError: If a square does not fit into the image.
    """
    _, height, width, _ = brain.shape
    side = square_side(height, width, side)

    def along(span: Array, numbers: Array) -> Array:
        """Intervals inside a span of True entries: [size] and [K] to [K, size]."""
        size = span.shape[0]
        first = jnp.argmax(span)
        last = size - 1 - jnp.argmax(span[::-1])
        room = jnp.maximum(last + 1 - first - side, 0) + 1
        start = first + jnp.floor(numbers * room).astype(jnp.int32)
        place = jnp.arange(size)[None]
        inside = (place >= start[:, None]) & (place < start[:, None] + side)
        return inside & (place <= last)

    def one(key: Key, brain: Array) -> Array:
        numbers = jax.random.uniform(key, (1 + 2 * max_squares,))
        drawn = jnp.arange(max_squares) < jnp.ceil(numbers[0] * max_squares)
        drawn = drawn.at[0].set(True)  # a number of exactly 0
        rows = along(brain.any(axis=1), numbers[1 : 1 + max_squares])
        columns = along(brain.any(axis=0), numbers[1 + max_squares :])
        squares = rows[:, :, None] & columns[:, None, :] & drawn[:, None, None]
        return squares.any(axis=0) & brain.any()

    return jax.vmap(one)(keys, brain[..., 0])[..., None]


def align_corners(size: int, cells: int) -> np.ndarray:
    """Matrix of linear interpolation whose end points are those of the input.

    (`jax.image.resize` aligns the borders of the pixels, not their centres.)

    Args:
      size: Points of the output.
      cells: Points of the input.

    Returns:
      [size, cells] float32; rows sum to 1. Equal to PyTorch's `align_corners=True`.
    """
    place = np.arange(size) * ((cells - 1) / max(size - 1, 1))
    left = np.minimum(np.floor(place).astype(int), max(cells - 2, 0))
    share = place - left
    matrix = np.zeros((size, cells), np.float32)
    matrix[np.arange(size), left] = 1.0 - share
    if cells > 1:
        matrix[np.arange(size), left + 1] += share
    return matrix


def coarse_noise(
    keys: Key,
    shape: tuple[int, int, int],
    *,
    cells: int = 16,
    deviation: float | Array = 0.2,
    shift_key: Key | None = None,
) -> Array:
    """Draws Gaussian noise on a coarse grid, enlarges it and shifts it circularly.

    Args:
      keys: One key per sample, [N].
      shape: (H, W, C) of an image; channels are independent, but shifted alike.
      cells: Points of the coarse grid along either side.
      deviation: Standard deviation on the coarse grid. Interpolation lowers it: with
        16 cells and 128 pixels from 0.2 to 0.134 on average, between 0.1 amid four
        points and 0.2 on a point.
      shift_key: None: each sample is shifted by its own number of pixels. A key []:
        all are shifted alike, as in the released code.

    Returns:
      [N, H, W, C] float32.
    """
    height, width, channels = shape
    limits = jnp.array([height, width])

    def draw_shift(key: Key) -> Array:
        return jnp.floor(jax.random.uniform(key, (2,)) * limits).astype(jnp.int32)

    def enlarge(size: int, shift: Array) -> Array:
        """Interpolates to `size` points and moves them: [size, cells]."""
        matrix = jnp.asarray(align_corners(size, cells))
        return matrix[(jnp.arange(size) - shift) % size]

    def one(key: Key) -> Array:
        field_key, own_key = jax.random.split(key)
        grid = jax.random.normal(field_key, (cells, cells, channels))
        shift = draw_shift(own_key if shift_key is None else shift_key)
        rows, columns = enlarge(height, shift[0]), enlarge(width, shift[1])
        grid = jnp.einsum("hi,ijc->hjc", rows, grid, precision="highest")
        return jnp.einsum("wj,hjc->hwc", columns, grid, precision="highest")

    return deviation * jax.vmap(one)(keys)
