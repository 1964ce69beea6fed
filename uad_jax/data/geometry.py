"""Where voxels are: canonical storage, sampling onto the model grid, and back.

A canonical array [X, Y, Z] grows towards Right, Anterior, Superior. A model grid is
a box of axis-parallel samples of it; its arrays are stored [D, H, W] = [z, x, y].
As every grid is parallel to the voxel axes, sampling is one small matrix per axis.
"""

import nibabel as nib
import numpy as np
from scipy import ndimage

from uad_jax.types import Geometry

_EPS = 1e-4  # voxels; closer than this counts as equal
Triple = tuple[float, float, float]
Shape = tuple[int, int, int]


def native_to_canonical(shape: Shape, affine: np.ndarray) -> np.ndarray:
    """Finds the axis permutation and flips that make an image closest to RAS.

    Args:
      shape: Voxels of the stored image.
      affine: Stored voxel index to world RAS mm, [4, 4].

    Returns:
      Stored voxel index to canonical voxel index, [4, 4] float64.
    """
    orientation = nib.orientations.io_orientation(affine)
    canonical_to_native = nib.orientations.inv_ornt_aff(orientation, shape)
    return np.rint(np.linalg.inv(canonical_to_native))


def reorder(data: np.ndarray, transform: np.ndarray) -> np.ndarray:
    """Moves voxels as a signed permutation of the axes says.

    Args:
      data: [X, Y, Z].
      transform: Index of `data` to index of the result, [4, 4].

    Returns:
      A contiguous copy with axes permuted and flipped.
    """
    axes = [int(np.flatnonzero(transform[row, :3])[0]) for row in range(3)]
    flips = [slice(None, None, int(transform[row, axes[row]])) for row in range(3)]
    return np.ascontiguousarray(data.transpose(axes)[tuple(flips)])


def spacing(affine: np.ndarray) -> Triple:
    """Voxel edge lengths in mm."""
    x, y, z = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    return float(x), float(y), float(z)


def voxel_ml(geometry: Geometry) -> float:
    """Volume of one voxel of the model grid in millilitres."""
    edges = (geometry.native_affine @ geometry.grid_to_native)[:3, :3]
    return float(abs(np.linalg.det(edges))) / 1000.0


def box_transform(start: Triple, step: Triple) -> np.ndarray:
    """Grid index to source index for samples at start + step * index, [4, 4]."""
    transform = np.diag([*step, 1.0])
    transform[:3, 3] = start
    return transform


def axis_weights(
    size: int, positions: np.ndarray, order: int, width: float = 1.0
) -> np.ndarray:
    """Interpolation along one axis as a matrix.

    Args:
      size: Samples of the source.
      positions: Where to read, in source indices, [N]. Up to half a sample outside
        counts as the border; further out reads 0.
      order: 0 nearest (halves round up), 1 linear, 3 cubic B-spline with mirrored
        ends (the convention of ITK).
      width: Half-width of the linear kernel in source samples; a value above 1
        averages, which avoids aliasing when the result is coarser.

    Returns:
      [N, size] float32; rows sum to 1, or to 0 outside.
    """
    inside = (positions > -0.5 - _EPS) & (positions < size - 0.5 + _EPS)
    clamped = np.clip(positions, 0.0, size - 1.0)
    if order == 0:
        nearest = np.minimum(np.floor(clamped + 0.5 + _EPS), size - 1)
        weights = (nearest[:, None] == np.arange(size)[None]).astype(np.float64)
    elif order == 1:
        distance = np.abs(clamped[:, None] - np.arange(size)[None])
        weights = np.maximum(1.0 - distance / max(width, 1.0), 0.0)
        weights /= weights.sum(axis=1, keepdims=True)
    elif order == 3:
        weights = _cubic_weights(size, clamped)
    else:
        raise ValueError(f"order is {order}; use 0, 1 or 3.")
    return (weights * inside[:, None]).astype(np.float32)


def _cubic_weights(size: int, positions: np.ndarray) -> np.ndarray:
    """Cubic B-spline interpolation, prefilter included, mirrored ends."""
    if size == 1:
        return np.ones((len(positions), 1))
    basis = np.zeros((len(positions), size))
    first = np.floor(positions).astype(int) - 1
    for tap in range(4):
        index = first + tap
        distance = np.abs(positions - index)
        near = 2 / 3 - distance**2 + distance**3 / 2
        far = np.maximum(2 - distance, 0.0) ** 3 / 6
        value = np.where(distance < 1, near, far)
        mirrored = np.abs(index) % (2 * size - 2)
        mirrored = np.where(mirrored >= size, 2 * size - 2 - mirrored, mirrored)
        np.add.at(basis, (np.arange(len(positions)), mirrored), value)
    prefilter = ndimage.spline_filter1d(np.eye(size), order=3, axis=0, mode="mirror")
    return basis @ prefilter


def sample(
    volume: np.ndarray,
    start: Triple,
    step: Triple,
    shape: Shape,
    order: int,
    smooth: bool = True,
) -> np.ndarray:
    """Reads a box of equally spaced samples; outside the volume is 0.

    An axis of step 1 that starts on a voxel is copied, never interpolated.

    Args:
      volume: [X, Y, Z] float32.
      start: Source index of the first sample, per axis.
      step: Source voxels between samples, per axis.
      shape: Samples per axis.
      order: 0 nearest, 1 linear, 3 cubic B-spline.
      smooth: Whether linear interpolation averages where the step exceeds 1.

    Returns:
      `shape` float32.
    """
    for axis in range(3):
        positions = start[axis] + step[axis] * np.arange(shape[axis])
        whole = round(start[axis])
        if abs(step[axis] - 1) * shape[axis] + abs(start[axis] - whole) < _EPS:
            volume = np.moveaxis(_copy_first(volume, whole, shape[axis]), 0, 2)
            continue
        width = step[axis] if smooth else 1.0
        weights = axis_weights(volume.shape[0], positions, order, width)
        volume = _weigh_first(volume, weights)
    return np.ascontiguousarray(volume)


def _weigh_first(volume: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Interpolates along axis 0 and moves it last; three calls restore the order.

    One matrix product per axis: many small ones wait for each other's threads.
    """
    flat = volume.reshape(volume.shape[0], -1)
    return (flat.T @ weights.T).reshape(*volume.shape[1:], weights.shape[0])


def _copy_first(volume: np.ndarray, start: int, size: int) -> np.ndarray:
    """Takes [start, start + size) along axis 0, with zeros outside."""
    low, high = max(start, 0), min(start + size, volume.shape[0])
    if (low, high) == (start, start + size):
        return volume[low:high]
    result = np.zeros((size, *volume.shape[1:]), volume.dtype)
    if high > low:
        result[low - start : high - start] = volume[low:high]
    return result


def sample_mask(
    mask: np.ndarray, start: Triple, step: Triple, shape: Shape, order: int
) -> np.ndarray:
    """Samples a mask; with order 1 a voxel is set where more than half is.

    Exact halves, common when 1 mm becomes 2 mm, follow the upper neighbours, so that
    masks neither grow nor shrink on average.

    Args:
      mask: [X, Y, Z] bool.
      start: Source index of the first sample, per axis.
      step: Source voxels between samples, per axis.
      shape: Samples per axis.
      order: 0 nearest, 1 linear.

    Returns:
      `shape` bool.
    """
    if order == 1:
        nudge = [0.0 if step[k] == 1 else 1e-3 * 2**k for k in range(3)]
        start = (start[0] + nudge[0], start[1] + nudge[1], start[2] + nudge[2])
    values = sample(mask.astype(np.float32), start, step, shape, order, smooth=False)
    return values >= 0.5


def crop_or_pad_start(size: int, target: int) -> int:
    """First source index of a centred crop, or minus the leading pad.

    The odd voxel of the difference goes to the start, for crop and pad alike
    (the rule of torchio's CropOrPad).
    """
    half = (abs(size - target) + 1) // 2
    return half if size >= target else -half


def bounding_box(mask: np.ndarray) -> tuple[Shape, Shape]:
    """First and one-past-last index per axis of the largest connected component.

    Stray voxels far from the brain therefore move nothing.

    Raises:
      ValueError: The mask is empty.
    """
    if not mask.any():
        raise ValueError("The mask is empty: it has no bounding box.")
    labels, count = ndimage.label(mask)
    largest = 1
    if count > 1:
        sizes = np.bincount(labels[mask], minlength=count + 1)
        largest = int(sizes.argmax())
    x, y, z = ndimage.find_objects(labels, largest)[largest - 1]
    return (x.start, y.start, z.start), (x.stop, y.stop, z.stop)


def to_grid(
    data: np.ndarray, geometry: Geometry, grid: Shape, order: int = 1
) -> np.ndarray:
    """Samples an image in the file's storage order onto the model grid.

    Args:
      data: [X, Y, Z] of the native shape; float or bool.
      geometry: Where the grid lies.
      grid: Samples (x, y, z).
      order: 0 nearest, 1 linear, 3 cubic B-spline; bool data always 0.

    Returns:
      [D, H, W] = [z, x, y], float32, or bool for bool data.

    Raises:
      ValueError: The shape is not the native one.
    """
    if data.shape != tuple(geometry.native_shape):
        raise ValueError(
            f"The image has shape {data.shape}, its geometry expects "
            f"{tuple(geometry.native_shape)}. Pass the scan in its storage order."
        )
    result = _resample(data, geometry.grid_to_native, grid, order)
    return np.ascontiguousarray(result.transpose(2, 0, 1))


def to_native(
    volume_on_grid: np.ndarray, geometry: Geometry, order: int = 1
) -> np.ndarray:
    """Puts a volume on the model grid back onto the scan's own voxels.

    Args:
      volume_on_grid: [D, H, W] = [z, x, y]; float or bool.
      geometry: Where the grid lies.
      order: 0 nearest, 1 linear, 3 cubic B-spline; bool data always 0.

    Returns:
      [X, Y, Z] of the native shape in the file's storage order, float32 or bool;
      0 outside the grid.
    """
    volume = np.asarray(volume_on_grid).transpose(1, 2, 0)
    native_to_grid = np.linalg.inv(geometry.grid_to_native)
    return _resample(volume, native_to_grid, geometry.native_shape, order)


def _resample(
    volume: np.ndarray, target_to_source: np.ndarray, shape: Shape, order: int
) -> np.ndarray:
    """Samples along permuted, scaled and shifted axes (no rotation, no shear)."""
    is_mask = volume.dtype == bool
    linear = target_to_source[:3, :3]
    largest = np.abs(linear).max(axis=1)
    used = np.abs(linear) > 1e-6 * largest[:, None]
    if not ((used.sum(axis=0) == 1).all() and (used.sum(axis=1) == 1).all()):
        raise ValueError(
            "The grid is rotated or sheared against the scan's voxels; expected "
            "axes that are permuted, flipped and scaled only."
        )
    result = volume.astype(np.float32)
    targets = used.argmax(axis=1)  # source axis -> target axis
    for axis in range(3):
        step = linear[axis, targets[axis]]
        size = shape[targets[axis]]
        positions = target_to_source[axis, 3] + step * np.arange(size)
        weights = axis_weights(
            volume.shape[axis], positions, 0 if is_mask else order, abs(step)
        )
        result = _weigh_first(result, weights)
    result = np.ascontiguousarray(result.transpose(np.argsort(targets)))
    return result > 0.5 if is_mask else result
