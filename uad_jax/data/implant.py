"""Real lesion masks implanted into real healthy T1 scans: place, blend, texture.

The shape is real, the background is real, and the truth is known exactly; only the
intensity is modelled. Two generators differ in blending and in how the intensity is
drawn: what a method may learn or set thresholds on never has the look of the test
set. A sham is the same implant with the intensity of the tissue itself: the same mask,
blending and texture, so that whoever finds it found the seam.

Everything is a function of its arguments. T1 is relative to the median of white matter;
how the numbers were measured stands in docs/implants.md.
"""

import dataclasses
import enum
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from uad_jax.data import geometry, nifti

SOLID = (2, 3, 4, 5, 6, 7)  # tissue classes a lesion may lie in: no ventricle, no CSF
VENTRICLE, CORTEX, WHITE = 1, 2, 3
RATIOS = (0.78, 0.84)  # T1 of MS lesions over white matter, median of the mask
SHAM_RATIO = 1.0

_MAX_DEPTH = 0.4  # of the tissue's intensity, at any voxel
_MAX_GAIN = 3.0  # of the weights of thin lesions
_FEATHER_VOXELS = 0.75  # of the train generator
_RAMP_VOXELS = (1.0, 2.2)  # of the test generator: edge to full depth
_BLUR_VOXELS = 0.5  # of the test generator: no scanner draws an edge within a voxel
_FAINTEST = 0.05  # smaller weights are cut to 0
_JITTER = 0.1  # of the contrast between the lesions of one test implant
_FLATTENING = 1.5  # how a test implant's contrast flattens grey against white matter
_NEIGHBOURHOOD = 3.0  # voxels; what counts as the local tissue
_FINE = 1.0  # voxels; texture is what a Gaussian of this width takes away
_EDGE = 1.5  # sd of white matter's texture; more is an edge of the anatomy, and stays
_GRAIN = 0.85  # voxels; gives new texture the spectrum of the scans'


class Frame(NamedTuple):
    """Where a brain lies in a space of masks, in mm of that space.

    Attributes:
      low: Left and posterior face of the brain's box.
      high: Right, anterior and superior face.
    """

    low: tuple[float, float]
    high: tuple[float, float, float]


# The lower end is left out: it only says where the brain stem was cut off.
FRAMES = {
    # Rigid MNI alignment, so brains keep their size: patient26's T1 at 1 mm, the one
    # scan of this space at hand (brain = values above 0).
    "mslub": Frame((-64.5, -97.5), (63.5, 66.5, 71.5)),
    # Warped into the MNI template: ICBM 2009a, `anatomy.template().depth > 0`.
    "soop": Frame((-72.0, -107.0), (72.0, 73.0, 83.0)),
}


class Generator(enum.Enum):
    """How an implant looks.

    Attributes:
      TRAIN: Scales the tissue by one ratio per scan; Gaussian feather, also a little
        beyond the mask. For training and validation.
      TEST: Moves the tissue towards a lesion level, deeper away from the edge, each
        lesion of a scan with a contrast of its own; stays inside the mask.
    """

    TRAIN = "train"
    TEST = "test"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Background:
    """A healthy scan.

    Attributes:
      image: T1, white matter about 1000, 0 outside the brain, [X, Y, Z] int16.
      tissue: Tissue classes of `SOLID`, 0 outside the brain, [X, Y, Z] uint8.
      affine: Canonical voxel index to world RAS mm, [4, 4].
    """

    image: np.ndarray
    tissue: np.ndarray
    affine: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placed:
    """A mask on a subject's grid.

    Attributes:
      fraction: Share of each voxel that the mapped mask covers, solid tissue only,
        [X, Y, Z] float64.
      mask: Where that is at least one half, [X, Y, Z] bool.
      lost: Share of the mapped mask's voxels outside solid tissue.
    """

    fraction: np.ndarray
    mask: np.ndarray
    lost: float


def place(mask: nifti.Scan, frame: Frame, background: Background) -> Placed:
    """Maps a lesion mask onto a subject by the boxes of the two brains.

    Left and right, back and front of the boxes meet; so do the tops, with the mean of
    the two scales below them. Voxels take the area average of the mask.

    Args:
      mask: The mask in its own space, canonical storage.
      frame: The brain of that space.
      background: The subject.

    Raises:
      ValueError: An affine is rotated, or there is no tissue.
    """
    tissue, affine = background.tissue, background.affine
    for given in (mask.affine, affine):
        if np.abs(given[:3, :3] - np.diag(np.diag(given)[:3])).max() > 1e-6:
            raise ValueError(
                f"{mask.path}: the affine {given[:3].tolist()} is rotated; expected "
                "axes parallel to the world's, for the mask and for the scan."
            )
    start, stop = geometry.bounding_box(tissue > 0)
    step = np.diag(affine)[:3]
    low = affine[:3, 3] + (np.array(start) - 0.5) * step
    high = affine[:3, 3] + (np.array(stop) - 0.5) * step
    scale = np.ones(3)
    scale[:2] = (high - low)[:2] / (np.array(frame.high[:2]) - frame.low)
    scale[2] = scale[:2].mean()
    fraction = mask.data.astype(np.float64)
    for axis in range(3):
        edges = np.arange(tissue.shape[axis] + 1) - 0.5
        world = affine[axis, 3] + edges * step[axis]
        world = frame.high[axis] + (world - high[axis]) / scale[axis]
        edges = (world - mask.affine[axis, 3]) / mask.affine[axis, axis]
        weights = _overlaps(edges, fraction.shape[0])
        fraction = np.tensordot(fraction, weights, axes=(0, 1))  # moves the axis last
    mapped = fraction >= 0.5
    solid = solid_tissue(background)
    kept = mapped & solid
    lost = 1 - kept.sum() / mapped.sum() if mapped.any() else 1.0
    return Placed(fraction=fraction * solid, mask=kept, lost=float(lost))


def solid_tissue(background: Background) -> np.ndarray:
    """Where a lesion may lie, [X, Y, Z] bool: no ventricle, no CSF.

    Tissue maps call the fluid in the sulci of an old brain cortex. Voxels darker than
    half way between the scan's own fluid and cortex are left out, too.
    """
    image, tissue = background.image, background.tissue
    solid = np.isin(tissue, SOLID)
    if not (tissue == VENTRICLE).any() or not (tissue == CORTEX).any():
        return solid
    fluid = np.quantile(image[tissue == VENTRICLE], 0.1)  # the rest is partial volume
    return solid & (image >= (fluid + np.median(image[tissue == CORTEX])) / 2)


def _overlaps(edges: np.ndarray, size: int) -> np.ndarray:
    """Shares of N intervals between edges that each of `size` unit cells covers."""
    cells = np.arange(size)
    first = np.maximum(edges[:-1, None], cells - 0.5)
    last = np.minimum(edges[1:, None], cells + 0.5)
    return np.maximum(last - first, 0) / np.diff(edges)[:, None]


def draw_ratio(generator: Generator, seed: int) -> float:
    """Draws how bright a lesion is relative to its tissue, mean over the mask.

    Args:
      generator: TRAIN draws evenly from `RATIOS`, TEST from a bell in its middle.
      seed: Of the implant.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    low, high = RATIOS
    if generator is Generator.TRAIN:
        return round(float(rng.uniform(low, high)), 4)
    middle, width = (low + high) / 2, (high - low) / 6
    return round(float(np.clip(rng.normal(middle, width), low, high)), 4)


def implant(
    background: Background,
    placed: Placed,
    generator: Generator,
    ratio: float,
    seed: int,
) -> np.ndarray:
    """Implants a lesion; with `SHAM_RATIO` its sham.

    Args:
      background: The healthy scan.
      placed: The mask on it.
      generator: How it is done.
      ratio: Brightness relative to the tissue, mean over the mask, in (0, 1].
      seed: Of the texture and of all that is drawn but the ratio.

    Returns:
      [X, Y, Z] int16, equal to the scan outside the feathered mask, 1 and more in the
      brain.

    Raises:
      ValueError: The mask is empty, or the ratio is out of range.
    """
    if not placed.mask.any() or not 0 < ratio <= 1:
        raise ValueError(
            f"Expected a mask with voxels and a ratio in (0, 1], found "
            f"{int(placed.mask.sum())} voxels and {ratio}. Choose another mask."
        )
    streams = np.random.SeedSequence(seed).spawn(2)
    look, grain = (np.random.Generator(np.random.Philox(s)) for s in streams)
    solid = solid_tissue(background)
    scan = background.image.astype(np.float64)
    coarse = _local_mean(scan, solid, _FINE)
    if generator is Generator.TRAIN:
        weight = _feather(placed, solid)
        lesion = coarse * (1 - _depth(weight, placed.mask, ratio))
        renewed = 0.6
    else:
        ramp = _ramp(placed.mask, look)
        weight = _blur(ramp, _BLUR_VOXELS) * solid
        each = ramp * _each_lesion(placed.mask, look)
        each = _blur(each, _BLUR_VOXELS) * solid
        depth = _depth(each, placed.mask, ratio)
        around = _local_mean(scan, solid, _NEIGHBOURHOOD)
        flat = 1 - _FLATTENING * depth
        lesion = around * (1 - depth) + (coarse - around) * flat
        renewed = 0.9
    limit = _EDGE * _noise(scan - coarse, background.tissue)
    detail = _renew(scan - coarse, weight * renewed, solid, limit, grain)
    touched = (weight > 0) & solid
    result = np.where(touched, np.maximum(lesion + detail, 1), scan)
    return np.rint(result).astype(np.int16)


def _feather(placed: Placed, solid: np.ndarray) -> np.ndarray:
    """Weights that fall off smoothly across the mask's edge, [X, Y, Z] in [0, 1]."""
    return _blur(placed.fraction, _FEATHER_VOXELS) * solid


def _blur(weight: np.ndarray, width: float) -> np.ndarray:
    """Gaussian blur, cut to 0 where it is too faint to matter."""
    soft = np.minimum(ndimage.gaussian_filter(weight, width), 1)
    return np.where(soft >= _FAINTEST, soft, 0.0)


def _ramp(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Weights that grow with the distance to the edge, 0 outside the mask."""
    inside = ndimage.distance_transform_edt(mask)  # 1 at the edge
    return np.minimum(inside / rng.uniform(*_RAMP_VOXELS), 1)


def _each_lesion(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Relative contrast of every lesion of a scan, 1 on average, 0 outside."""
    labels, count = ndimage.label(mask, np.ones((3, 3, 3)))
    factors = np.clip(1 + _JITTER * rng.standard_normal(count), 0.7, 1.3)
    return np.concatenate([[0.0], factors])[labels]


def _depth(weight: np.ndarray, mask: np.ndarray, ratio: float) -> np.ndarray:
    """Relative darkening per voxel; its mean over the mask is 1 - ratio.

    Thin lesions are all edge. They stay a little fainter: no weight is raised more
    than `_MAX_GAIN` times, no voxel is darkened more than `_MAX_DEPTH`.
    """
    gain = min(1 / weight[mask].mean(), _MAX_GAIN)
    return np.minimum(weight * gain * (1 - ratio), _MAX_DEPTH)


def _noise(texture: np.ndarray, tissue: np.ndarray) -> float:
    """Standard deviation of the texture inside white matter, its border left out."""
    white = tissue == WHITE
    inner = ndimage.binary_erosion(white)
    return float(texture[inner if inner.any() else white].std())


def _renew(
    texture: np.ndarray,
    share: np.ndarray,
    solid: np.ndarray,
    limit: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Replaces a share of the fine texture by new one of the same strength.

    Edges of the anatomy stay, and so does the variance: the shares of old and new
    are sine and cosine. The noise of a scan is correlated by its resampling; so is
    the new texture.

    Args:
      texture: Scan minus its local mean, [X, Y, Z].
      share: Share that is new, [X, Y, Z] in [0, 1].
      solid: Solid tissue, [X, Y, Z] bool.
      limit: Texture beyond it counts as an edge.
      rng: Source of the texture.
    """
    fine = np.clip(texture, -limit, limit)
    plain = solid & (np.abs(texture) < limit)
    strength = np.sqrt(_local_mean(fine**2, plain, _NEIGHBOURHOOD))
    noise = ndimage.gaussian_filter(rng.standard_normal(texture.shape), _GRAIN)
    noise -= ndimage.gaussian_filter(noise, _FINE)
    new = noise / noise.std() * strength
    return texture - fine + np.sqrt(1 - share**2) * fine + share * new


def _local_mean(values: np.ndarray, where: np.ndarray, width: float) -> np.ndarray:
    """Gaussian mean over the voxels of `where` only; 0 far from them."""
    weights = ndimage.gaussian_filter(where.astype(np.float64), width)
    mean = ndimage.gaussian_filter(np.where(where, values, 0.0), width)
    return mean / np.maximum(weights, 1e-6)
