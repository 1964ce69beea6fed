"""Filters of volumes and images: median, erosion, Gaussian blur, SSIM.

Each gives what its well-known counterpart in scipy.ndimage or scikit-image gives,
so that published post-processing can be followed to the bit.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_RADIUS = 2  # of the 5 voxels of a median
_SIGN = np.uint32(1 << 31)


def float_to_key(values: jax.Array) -> jax.Array:
    """Maps float32 to uint32 so that integer order is float order.

    -0.0 is made +0.0 first: the two compare equal as floats. Only integer arithmetic,
    since floating-point units may flush subnormal numbers to zero.
    """
    bits = lax.bitcast_convert_type(values, jnp.uint32)
    bits = jnp.where(bits == _SIGN, jnp.uint32(0), bits)
    return jnp.where(bits & _SIGN != 0, ~bits, bits | _SIGN)


def key_to_float(keys: jax.Array) -> jax.Array:
    """Inverts `float_to_key`."""
    bits = jnp.where(keys & _SIGN != 0, keys ^ _SIGN, ~keys)
    return lax.bitcast_convert_type(bits, jnp.float32)


def reflect_index(size: int, valid: jax.Array | int, radius: int) -> jax.Array:
    """Source index of each position of an axis padded by scipy's "reflect" rule.

    Args:
      size: Length of the axis.
      valid: How many of its first entries count; the rest is overwritten by the
        reflection, as if the axis ended there. 0 is treated as 1.
      radius: Entries to add at either end.

    Returns:
      Indices into the axis, [size + 2 * radius] int32: d c b a | a b c d | d c b a.
    """
    length = jnp.maximum(jnp.asarray(valid, jnp.int32), 1)
    position = jnp.mod(jnp.arange(-radius, size + radius, dtype=jnp.int32), 2 * length)
    return jnp.minimum(position, 2 * length - 1 - position)


def mirror_index(size: int, radius: int) -> np.ndarray:
    """Source index of each position of an axis padded without repeating the edge.

    Args:
      size: Length of the axis.
      radius: Entries to add at either end.

    Returns:
      Indices into the axis, [size + 2 * radius] int32: d c b | a b c d | c b a. An
      axis of one entry repeats it.
    """
    period = max(2 * (size - 1), 1)
    position = np.arange(-radius, size + radius, dtype=np.int32) % period
    return np.minimum(position, 2 * (size - 1) - position)


def median5(volume: jax.Array, num_valid: jax.Array | None = None) -> jax.Array:
    """Takes the exact 5 x 5 x 5 median.

    The median's bits are found from the highest to the lowest: 32 rounds of "how
    many of the 125 neighbours lie below". There is no sort, hence little memory,
    and any finite float will do, negative ones included.

    Args:
      volume: [D, H, W] float32, finite.
      num_valid: [] int32, the first slices that belong to the volume; the filter
        sees the volume as if it ended there. None = all.

    Returns:
      [D, H, W] float32, equal to `scipy.ndimage.median_filter(volume, size=5)`.
    """
    depth, height, width = volume.shape
    keys = float_to_key(volume.astype(jnp.float32))
    valid = depth if num_valid is None else num_valid
    keys = jnp.take(keys, reflect_index(depth, valid, _RADIUS), axis=0)
    keys = jnp.take(keys, reflect_index(height, height, _RADIUS), axis=1)
    keys = jnp.take(keys, reflect_index(width, width, _RADIUS), axis=2)
    return _window_median(keys, volume.shape)


def median5_slices(volume: jax.Array) -> jax.Array:
    """Takes the exact 5 x 5 median of each axial slice.

    Args:
      volume: [D, H, W] float32, finite.

    Returns:
      [D, H, W] float32, equal to `scipy.ndimage.median_filter(volume, size=(1, 5, 5),
      mode="mirror")`: the border is mirrored and its edge not repeated, as "reflect"
      has it in PyTorch and NumPy.
    """
    _, height, width = volume.shape
    keys = float_to_key(volume.astype(jnp.float32))
    keys = jnp.take(keys, mirror_index(height, _RADIUS), axis=1)
    keys = jnp.take(keys, mirror_index(width, _RADIUS), axis=2)
    return _window_median(keys, volume.shape)


def _window_median(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The median key of each window that fits into padded keys, as floats."""
    windows = [
        padded - size + 1 for padded, size in zip(keys.shape, shape, strict=True)
    ]
    starts = list(itertools.product(*map(range, windows)))
    rank = len(starts) // 2

    def round_(index: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | _bit(index)
        below = jnp.zeros(shape, jnp.int32)
        for start in starts:
            stop = [first + size for first, size in zip(start, shape, strict=True)]
            below += (lax.slice(keys, start, stop) < candidate).astype(jnp.int32)
        return jnp.where(below <= rank, candidate, found)

    # Inside shard_map or vmap the carry must vary as the keys do: derive it from them.
    start = jnp.zeros_like(lax.slice(keys, (0,) * len(shape), shape))
    return key_to_float(lax.fori_loop(0, 32, round_, start))


def _bit(index: jax.Array) -> jax.Array:
    """The bits of a key from the highest to the lowest."""
    return jnp.uint32(1) << (jnp.uint32(31) - index.astype(jnp.uint32))


def order_statistic(values: jax.Array, rank: jax.Array, keep: jax.Array) -> jax.Array:
    """Finds the value that would stand at one place of the sorted values.

    Args:
      values: Any shape, float32, no NaN.
      rank: [] int32, zero-based, below the number of kept values.
      keep: Which values count, bool, of the shape of `values`.

    Returns:
      [] float32, exact; found bit by bit, without a sort.
    """
    keys = jnp.where(keep, float_to_key(values), jnp.uint32(0xFFFFFFFF))

    def round_(index: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | _bit(index)
        below = jnp.sum(keys < candidate, dtype=jnp.int32)
        return jnp.where(below <= rank, candidate, found)

    start = jnp.zeros_like(jnp.min(keys))
    return key_to_float(lax.fori_loop(0, 32, round_, start))


def erode_slices(mask: jax.Array, iterations: int) -> jax.Array:
    """Erodes each axial slice by the cross of 4 neighbours.

    Args:
      mask: [..., H, W] bool.
      iterations: How often; 0 returns the mask as it is.

    Returns:
      [..., H, W] bool, equal to `scipy.ndimage.binary_erosion` slice by slice: what
      lies outside the picture is background.
    """

    def once(_: int, current: jax.Array) -> jax.Array:
        rows = jnp.pad(current, [(0, 0)] * (mask.ndim - 2) + [(1, 1), (0, 0)])
        columns = jnp.pad(current, [(0, 0)] * (mask.ndim - 2) + [(0, 0), (1, 1)])
        vertical = rows[..., :-2, :] & rows[..., 2:, :]
        horizontal = columns[..., :-2] & columns[..., 2:]
        return current & vertical & horizontal

    return lax.fori_loop(0, iterations, once, mask)


def erode_slices_by_share(mask: jax.Array, radius: int, share: float) -> jax.Array:
    """Keeps the pixels whose square holds more than a share of the mask.

    Args:
      mask: [..., H, W] bool.
      radius: Of the square of 2 * radius + 1 pixels; 0 returns the mask as it is.
      share: In [0, 1).

    Returns:
      [..., H, W] bool, pixels of the mask only; what lies outside the picture is
      background.
    """
    if not radius:
        return mask
    side = 2 * radius + 1
    window = (1,) * (mask.ndim - 2) + (side, side)
    count = lax.reduce_window(
        mask.astype(jnp.int32), jnp.int32(0), lax.add, window, (1,) * mask.ndim, "SAME"
    )
    return mask & (count > math.floor(share * side**2))


def gaussian_kernel(sigma: float, truncate: float = 4.0) -> np.ndarray:
    """Makes the normalised 1-D Gaussian of scipy, [2 r + 1], r = round(truncate s)."""
    radius = int(truncate * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    return (weights / weights.sum()).astype(np.float32)


def gaussian(
    image: jax.Array,
    sigma: float,
    *,
    num_axes: int = 2,
    truncate: float = 4.0,
    num_valid: jax.Array | None = None,
) -> jax.Array:
    """Blurs the last axes by a Gaussian.

    Args:
      image: [..., spatial axes] float32, finite.
      sigma: Standard deviation in voxels, > 0.
      num_axes: How many of the last axes to blur.
      truncate: Radius of the kernel in standard deviations.
      num_valid: [] int32, where the first of these axes ends, as in `median5`.

    Returns:
      Array of the same shape, equal to `scipy.ndimage.gaussian_filter` with its
      "reflect" border to float32 rounding.
    """
    kernel = gaussian_kernel(sigma, truncate)
    first = image.ndim - num_axes
    for axis in range(first, image.ndim):
        valid: jax.Array | int = image.shape[axis]
        if axis == first and num_valid is not None:
            valid = num_valid
        image = _correlate(image, kernel, axis, valid)
    return image


def _correlate(
    image: jax.Array, kernel: np.ndarray, axis: int, valid: jax.Array | int
) -> jax.Array:
    """Correlates one axis with a kernel, as a product with a banded matrix.

    Sums of shifted slices are fused into one another by XLA:CPU and computed many
    times over: the SSIM of a volume took 20 times as long.
    """
    size, radius = image.shape[axis], len(kernel) // 2
    band = np.zeros((size + 2 * radius, size), np.float32)
    for start in range(size):
        band[start : start + len(kernel), start] = kernel
    source = reflect_index(size, valid, radius)
    places = jnp.arange(size, dtype=source.dtype)
    matrix = jnp.matmul(
        (places[:, None] == source[None]).astype(jnp.float32),
        band,
        precision=lax.Precision.HIGHEST,
    )
    rows = jnp.moveaxis(image, axis, -1)
    # What lies behind the end has no weight, but might be NaN.
    inside = places < jnp.maximum(valid, 1)
    rows = jnp.where(jnp.expand_dims(inside, range(image.ndim - 1)), rows, 0)
    product = jnp.matmul(rows, matrix, precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(product, -1, axis)


def ssim(
    x: jax.Array,
    y: jax.Array,
    *,
    data_range: float | jax.Array,
    num_axes: int = 2,
    sigma: float = 1.5,
    truncate: float = 3.5,
    return_map: bool = False,
    num_valid: jax.Array | None = None,
) -> jax.Array:
    """Structural similarity with Gaussian weights.

    The defaults give the 11 x 11 window of sigma 1.5 of the paper. As in
    scikit-image the mean leaves out a border of the window's radius.

    Args:
      x: Images [..., H, W] or volumes [..., D, H, W], float32.
      y: Like `x`.
      data_range: Largest minus smallest possible value; a number, or an array of
        the shape of the leading axes.
      num_axes: 2 for images, 3 for volumes: the last axes compared.
      sigma: Standard deviation of the window in voxels.
      truncate: Radius of the window in standard deviations.
      return_map: Return the map of local similarity, not its mean.
      num_valid: [] int32, where the first of the compared axes ends, as in `median5`;
        for maps only.

    Returns:
      Mean similarity of each image, shape of the leading axes; or the map, shape
      of `x`. Equal to `skimage.metrics.structural_similarity(gaussian_weights=True,
      use_sample_covariance=False)`.

    Raises:
      ValueError: If the shapes differ, or if a mean is wanted of images smaller than
        the window.

    Source: Wang et al. 2004.
    """
    radius = int(truncate * sigma + 0.5)
    spatial = x.shape[x.ndim - num_axes :]
    if x.shape != y.shape:
        raise ValueError(
            f"Expected two images of one shape, found {x.shape}, {y.shape}."
        )
    if not return_map and min(spatial) < 2 * radius + 1:
        raise ValueError(
            f"The images are {spatial}, but the window spans {2 * radius + 1} voxels. "
            "Use larger images or a smaller sigma."
        )
    scale = jnp.asarray(data_range, jnp.float32)
    scale = scale.reshape(scale.shape + (1,) * (x.ndim - scale.ndim))
    c1, c2 = (0.01 * scale) ** 2, (0.03 * scale) ** 2

    def blur(image: jax.Array) -> jax.Array:
        return gaussian(
            image, sigma, num_axes=num_axes, truncate=truncate, num_valid=num_valid
        )

    # Variances do not change when both images are shifted, and float32 cancels less
    # near zero mean; the luminance term below uses the true means.
    if num_valid is not None:  # what lies behind the end must not count
        places = jnp.arange(spatial[0]) < jnp.maximum(num_valid, 1)
        before = range(x.ndim - num_axes)
        behind = range(x.ndim - num_axes + 1, x.ndim)
        inside = jnp.expand_dims(places, (*before, *behind))
        x, y = jnp.where(inside, x, 0), jnp.where(inside, y, 0)
    centre = jnp.mean(0.5 * (x + y), axis=_last(x, num_axes), keepdims=True)
    if num_valid is not None:
        centre = centre * spatial[0] / jnp.maximum(num_valid, 1)
    dx, dy = x - centre, y - centre
    mean_x, mean_y = blur(dx), blur(dy)
    var_x = blur(dx * dx) - mean_x * mean_x
    var_y = blur(dy * dy) - mean_y * mean_y
    covariance = blur(dx * dy) - mean_x * mean_y
    mean_x, mean_y = mean_x + centre, mean_y + centre
    similarity = (
        (2 * mean_x * mean_y + c1)
        * (2 * covariance + c2)
        / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    )
    if return_map:
        return similarity
    inner = (..., *[slice(radius, size - radius) for size in spatial])
    return jnp.mean(similarity[inner], axis=_last(x, num_axes))


def _last(x: jax.Array, num_axes: int) -> tuple[int, ...]:
    return tuple(range(x.ndim - num_axes, x.ndim))
