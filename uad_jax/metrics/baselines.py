"""Detectors that learn nothing, or only an atlas: every table shows them.

Each maps one channel of a volume and its brain mask to an anomaly map, [D, H, W]
float32 each, which then goes through the same post-processing as any method's map.
"""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
import scipy.ndimage

_BINS = 256
ATLAS_VOLUMES = 2  # healthy volumes that an atlas needs


def constant(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Scores every voxel alike: the floor of every table.

    Unprocessed, its average precision is the prevalence and its AUROC 0.5. Where the
    protocol erodes the brain, the rim ranks lowest, as it does for every scorer; as
    lesions are rare there, both are then higher.
    """
    del mask
    return np.zeros(image.shape, np.float32)


def raw(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Scores bright voxels: the intensity itself, 0 outside the brain."""
    return np.where(mask, image, 0).astype(np.float32)


def inverted(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Scores dark voxels: the brain's largest intensity minus the intensity."""
    if not mask.any():
        return np.zeros(image.shape, np.float32)
    return np.where(mask, image[mask].max() - image, 0).astype(np.float32)


def thresh(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Scores bright voxels after histogram equalisation within the brain.

    256 bins between the brain's extremes, the cumulated share interpolated linearly
    between bin centres. The published code rounds intensities to integers first;
    here they are real numbers of about [0, 1], so that step is left out.

    Returns:
      [D, H, W] float32 in [0, 1], 0 outside the brain.

    Source: Meissen et al. 2021.
    """
    result = np.zeros(image.shape, np.float32)
    values = image[mask]
    if not values.size:
        return result
    counts, edges = np.histogram(values, bins=_BINS)
    share = np.cumsum(counts) / values.size
    result[mask] = np.interp(values, 0.5 * (edges[:-1] + edges[1:]), share)
    return result


@dataclasses.dataclass(frozen=True)
class Atlas:
    """Voxelwise intensity of healthy brains.

    Attributes:
      mean: [D, H, W] float32.
      sd: [D, H, W] float32, > 0.
      num_volumes: Volumes it was made of.
    """

    mean: np.ndarray
    sd: np.ndarray
    num_volumes: int


def fit_atlas(
    volumes: Iterable[tuple[np.ndarray, np.ndarray]], *, sigma: float = 1.0
) -> Atlas:
    """Fits mean and standard deviation of healthy volumes, one volume at a time.

    Only brain voxels count. Both are smoothed lightly, with the brain count of a
    voxel as its weight; voxels of fewer than two brains take the values of their
    neighbours, or else of the whole brain. The deviation is kept above a tenth of
    its median, so that a few equal values cannot make a voxel infinitely strange.

    Args:
      volumes: Pairs of one channel and brain mask, [D, H, W] each, on one grid.
      sigma: Width of the smoothing in voxels.

    Returns:
      The atlas.

    Raises:
      ValueError: If there are fewer than two volumes.
    """
    count = mean = square = np.zeros(())
    number = 0
    for image, mask in volumes:
        if not number:
            count, mean, square = (np.zeros(image.shape) for _ in range(3))
        number += 1
        # Welford's update where this volume has brain.
        count += mask
        delta = np.where(mask, image - mean, 0.0)
        mean += delta / np.maximum(count, 1)
        square += delta * np.where(mask, image - mean, 0.0)
    if number < ATLAS_VOLUMES:
        raise ValueError(
            f"An atlas needs at least {ATLAS_VOLUMES} healthy volumes, found "
            f"{number}. Give the training split more."
        )
    known = count >= 2
    variance = np.where(known, square / np.maximum(count - 1, 1), 0.0)
    weight = np.where(known, count, 0.0)
    mean = _smooth(mean, weight, sigma)
    sd = np.sqrt(_smooth(variance, weight, sigma))
    typical = float(np.median(sd[known])) if known.any() else 1.0
    sd = np.maximum(sd, max(0.1 * typical, 1e-6))
    return Atlas(mean.astype(np.float32), sd.astype(np.float32), number)


def _smooth(values: np.ndarray, weight: np.ndarray, sigma: float) -> np.ndarray:
    total = scipy.ndimage.gaussian_filter(weight, sigma)
    blurred = scipy.ndimage.gaussian_filter(values * weight, sigma)
    whole = float((values * weight).sum() / max(weight.sum(), 1.0))
    near = total > 1e-3
    return np.where(near, blurred / np.where(near, total, 1.0), whole)


def atlas_z(atlas: Atlas, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Scores |image - mean| / sd of the healthy atlas, 0 outside the brain.

    Raises:
      ValueError: If the image is not on the atlas' grid.
    """
    if image.shape != atlas.mean.shape:
        raise ValueError(
            f"The image is {image.shape}, the atlas {atlas.mean.shape}. Prepare both "
            "with one recipe."
        )
    z = np.abs(image - atlas.mean) / atlas.sd
    return np.where(mask, z, 0).astype(np.float32)


# Those that need no fit, by their names in the tables and in this order.
UNFITTED: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "constant map": constant,
    "raw intensity": raw,
    "inverted intensity": inverted,
    "thresh (equalised)": thresh,
}
