"""How the synthetic cohort's scanners turn tissue into images."""

import dataclasses

import numpy as np
from scipy import ndimage

from uad_jax.data import anatomy, fields, lesions

SPACING_MM = anatomy.SPACING_MM
WHITE_MATTER = 1000.0  # intensity of white matter at gain 1
MODALITIES = ("t1", "t2", "flair")

# Intensities relative to white matter, in the order of anatomy.CLASSES.
CONTRAST = {
    "t1": (0.28, 0.22, 0.72, 1.0, 0.86, 0.93, 0.98, 0.98, 0.74, 1.0, 0.74),
    "t2": (2.7, 3.1, 1.34, 1.0, 1.14, 1.14, 0.86, 1.08, 1.34, 1.0, 1.38),
    "flair": (0.38, 0.24, 1.17, 1.0, 1.09, 1.08, 0.96, 1.05, 1.15, 1.0, 1.22),
}
TEXTURE = ((1.6, 0.018), (5.0, 0.022), (18.0, 0.012))  # length mm, sd
_SCANNER_JITTER, _SUBJECT_JITTER, _GAIN_JITTER = 0.035, 0.018, 0.15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scanner:
    """One site.

    Attributes:
      name: "A", "B", "C" (training and matched tests) or "D" (never trained on).
      noise: Rician sigma relative to white matter.
      bias: Standard deviation of the log bias field.
      blur_mm: Point spread, full width at half maximum along x, y, z.
      slice_mm: Distance of the acquired axial slices; 0: as the grid.
      seed: Fixes the site's own contrast.
    """

    name: str
    noise: float
    bias: float
    blur_mm: tuple[float, float, float]
    slice_mm: float
    seed: int


SCANNERS = {
    s.name: s
    for s in (
        Scanner(
            name="A",
            noise=0.022,
            bias=0.045,
            blur_mm=(1.0, 1.0, 1.2),
            slice_mm=0.0,
            seed=101,
        ),
        Scanner(
            name="B",
            noise=0.030,
            bias=0.07,
            blur_mm=(1.2, 1.2, 2.5),
            slice_mm=0.0,
            seed=102,
        ),
        Scanner(
            name="C",
            noise=0.026,
            bias=0.06,
            blur_mm=(1.0, 1.0, 1.2),
            slice_mm=3.2,
            seed=103,
        ),
        Scanner(
            name="D",
            noise=0.045,
            bias=0.12,
            blur_mm=(1.4, 1.4, 1.4),
            slice_mm=0.0,
            seed=104,
        ),
    )
}


def tissue_image(
    maps: np.ndarray,
    layers: list[lesions.Layer],
    modality: str,
    scanner: Scanner,
    rng: np.random.Generator,
) -> np.ndarray:
    """Paints one modality in base space: tissue, texture, layers, point spread.

    Args:
      maps: Soft tissue maps, [11, X, Y, Z].
      layers: Painted in order.
      modality: "t1", "t2" or "flair".
      scanner: Site.
      rng: The subject's contrast stream of this modality.

    Returns:
      Intensities relative to white matter, [X, Y, Z] float32.
    """
    site = np.random.Generator(
        np.random.Philox([scanner.seed, MODALITIES.index(modality)])
    )
    count = len(anatomy.CLASSES)
    jitter = 1 + _SCANNER_JITTER * site.standard_normal(count)
    jitter += _SUBJECT_JITTER * rng.standard_normal(count)
    jitter[anatomy.INDEX["wm"]] = 1.0
    values = (np.array(CONTRAST[modality]) * jitter).astype(np.float32)
    image = np.tensordot(values, maps, 1)

    texture = np.zeros(image.shape, np.float32)
    for length, deviation in TEXTURE:
        texture += deviation * fields.smooth_field(rng, image.shape, SPACING_MM, length)
    fluid = maps[anatomy.INDEX["csf"]] + maps[anatomy.INDEX["vent"]]
    for layer in layers:
        image += layer.alpha * (np.float32(layer.paint[modality]) - image)
    image *= 1 + texture * (1 - fluid)
    sigma = [width / 2.355 / SPACING_MM for width in scanner.blur_mm]
    return ndimage.gaussian_filter(image, sigma, truncate=3.0)


def acquire(
    image: np.ndarray, brain: np.ndarray, scanner: Scanner, rng: np.random.Generator
) -> np.ndarray:
    """Adds what the scanner does after the anatomy: slices, bias, noise, gain.

    Args:
      image: Warped intensities relative to white matter, [X, Y, Z] float32.
      brain: Brain mask; outside the image is 0, [X, Y, Z] bool.
      scanner: Site.
      rng: The subject's noise stream of this modality.

    Returns:
      [X, Y, Z] int16, white matter about 1000 times the scan's gain.
    """
    if scanner.slice_mm:
        mix = _slice_matrix(image.shape[2], scanner.slice_mm)
        image = (image.reshape(-1, len(mix)) @ mix.T).reshape(image.shape)
    bias = fields.smooth_field(rng, image.shape, SPACING_MM, 42.0)
    bias = bias + fields.smooth_field(rng, image.shape, SPACING_MM, 25.0)
    image = image * np.exp(np.float32(scanner.bias / np.sqrt(2)) * bias)
    noise = scanner.noise * rng.standard_normal((2, *image.shape), dtype=np.float32)
    image = np.sqrt((image + noise[0]) ** 2 + noise[1] ** 2)
    gain = WHITE_MATTER * np.exp(_GAIN_JITTER * rng.standard_normal())
    image = np.where(brain, np.rint(image * gain), 0)
    return np.clip(image, 0, np.iinfo(np.int16).max).astype(np.int16)


def _slice_matrix(count: int, thickness: float) -> np.ndarray:
    """Averages over thick slices and interpolates back, [count, count] float32."""
    centres = np.arange(0, (count - 1) * SPACING_MM + thickness, thickness)
    position = np.arange(count) * SPACING_MM
    distance = np.abs(centres[:, None] - position)
    overlap = np.clip((thickness + SPACING_MM) / 2 - distance, 0, SPACING_MM)
    overlap /= overlap.sum(1, keepdims=True)
    back = np.clip(1 - np.abs(position[:, None] - centres) / thickness, 0, 1)
    back /= back.sum(1, keepdims=True)
    return (back @ overlap).astype(np.float32)
