"""Makes the brain map of the synthetic cohort, `anatomy.npz`, from ICBM152 2009a.

The template (symmetric T1, grey and white matter averages, 1 mm) ships inside the
nilearn wheel, so nothing but the package index is needed:

    python -m venv venv_nilearn && . venv_nilearn/bin/activate
    pip install nilearn==0.14.1
    python uad_jax/data/assets/make_anatomy.py

The licence of the template is in `LICENSE_ICBM152.txt` and travels with the map.
"""

import pathlib

import nibabel as nib
import nilearn
import numpy as np
from scipy import ndimage

CLASSES = (
    *("csf", "vent", "gm", "wm", "striatum", "thal"),
    *("pall", "bstem", "cbgm", "cbwm", "hippo"),
)
SHAPE = (96, 96, 80)
SPACING_MM = 2.0
ORIGIN_MM = (-95.0, -112.0, -74.0)  # world RAS of voxel (0, 0, 0)
LEVELS = 15  # the soft maps are stored in steps of 1/15: small, and no visible edge

# Position priors: centre and covariance in mm of (|x|, y, z) in MNI space. A solid
# ellipsoid of covariance C ends at the Mahalanobis distance sqrt(5) = 2.24.
ELLIPSOIDS = {
    "putamen": (
        (26.7, -1.0, 3.2),
        ((13.7, -19.5, -7.0), (-19.5, 108.5, -7.3), (-7.0, -7.3, 54.9)),
    ),
    "caudate": (
        (13.5, 9.0, 6.5),
        ((14.6, -4.1, 10.7), (-4.1, 86.4, -48.9), (10.7, -48.9, 97.7)),
    ),
    "thal": (
        (11.8, -19.3, 6.8),
        ((31.8, -21.4, 1.8), (-21.4, 72.8, 6.6), (1.8, 6.6, 28.4)),
    ),
    "pall": (
        (19.5, -4.1, 0.0),
        ((15.1, -13.0, 1.5), (-13.0, 38.0, 0.4), (1.5, 0.4, 14.0)),
    ),
    "hippo": (
        (24.6, -17.1, -14.8),
        ((30.3, -11.6, -0.9), (-11.6, 157.1, -71.1), (-0.9, -71.1, 51.8)),
    ),
    "bstem": (
        (0.0, -27.5, -26.0),
        ((70.0, 0.0, 0.0), (0.0, 111.0, 105.0), (0.0, 105.0, 285.0)),
    ),
}


def main() -> None:
    """Writes `anatomy.npz` beside this file."""
    t1, gm, wm = (_load(name) for name in ("t1", "gm", "wm"))
    maps = classify(t1, gm, wm)
    half = np.rint(maps[:, SHAPE[0] // 2 :] * LEVELS).astype(np.uint8)
    path = pathlib.Path(__file__).with_name("anatomy.npz")
    np.savez_compressed(
        path,
        right_half=half,
        levels=LEVELS,
        classes=np.array(CLASSES),
        origin_mm=np.array(ORIGIN_MM),
        spacing_mm=SPACING_MM,
    )
    print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


def classify(t1: np.ndarray, gm: np.ndarray, wm: np.ndarray) -> np.ndarray:
    """Turns the group averages into soft maps of eleven tissues.

    Args:
      t1: T1 average, 0 outside the brain, [96, 96, 80] in [0, 1].
      gm: Grey matter probability, same shape.
      wm: White matter probability, same shape.

    Returns:
      Soft maps in the order of `CLASSES`, [11, 96, 96, 80] float32; their sum is the
      soft brain mask.
    """
    position = _positions()
    brain = _logistic(ndimage.gaussian_filter((t1 > 0.1).astype(np.float32), 0.5))
    grey, white = _logistic(gm), _logistic(wm)
    total = np.maximum(grey + white, 1.0)
    grey, white = grey / total, white / total
    fluid = 1 - grey - white

    inside = {name: _ellipsoid(name, position) for name in ELLIPSOIDS}
    stem = inside["bstem"] * _ramp(position[2], -5.0, 4.0)
    cerebellum = _cerebellum(position) * (1 - stem)
    vent = _ventricles(fluid, position)
    maps = {"vent": fluid * vent}

    solid = 1 - maps["vent"]
    maps["bstem"] = solid * stem * _logistic(gm + wm)
    deep = solid - maps["bstem"]
    maps["thal"] = deep * inside["thal"]
    deep = deep - maps["thal"]
    maps["pall"] = deep * inside["pall"]
    deep = deep - maps["pall"]
    striatum = np.maximum(inside["putamen"], inside["caudate"])
    maps["striatum"] = deep * striatum * grey
    deep = deep - maps["striatum"]
    maps["hippo"] = deep * inside["hippo"] * grey

    rest = deep - maps["hippo"]
    maps["cbgm"] = rest * grey * cerebellum
    maps["cbwm"] = rest * white * cerebellum
    maps["gm"] = rest * grey * (1 - cerebellum)
    maps["wm"] = rest * white * (1 - cerebellum)
    maps["csf"] = rest * fluid
    stack = np.stack([maps[name] for name in CLASSES])
    stack = stack / np.maximum(stack.sum(0), 1e-6) * brain
    return stack.astype(np.float32)


def _load(name: str) -> np.ndarray:
    """Reads one template map of the wheel onto the 2 mm grid, in [0, 1]."""
    folder = pathlib.Path(nilearn.__file__).parent / "datasets" / "data"
    path = folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz"
    image = nib.nifti1.load(path)
    data = ndimage.gaussian_filter(np.asarray(image.dataobj, np.float32) / 255, 0.55)
    grid = np.diag([SPACING_MM] * 3 + [1.0])
    grid[:3, 3] = ORIGIN_MM
    matrix = np.linalg.inv(image.affine) @ grid
    return ndimage.affine_transform(data, matrix[:3, :3], matrix[:3, 3], SHAPE, order=1)


def _positions() -> list[np.ndarray]:
    """World |x|, y, z in mm of every voxel."""
    axes = [
        o + SPACING_MM * np.arange(n) for o, n in zip(ORIGIN_MM, SHAPE, strict=True)
    ]
    side, front, height = np.meshgrid(*axes, indexing="ij")
    return [np.abs(side), front, height]


def _logistic(probability: np.ndarray, slope: float = 9.0) -> np.ndarray:
    """Sharpens a blurred probability around one half, keeping 0 and 1."""
    low, high = (1 / (1 + np.exp(-slope * (p - 0.5))) for p in (0.0, 1.0))
    value = 1 / (1 + np.exp(-slope * (probability - 0.5)))
    return np.clip((value - low) / (high - low), 0, 1)


def _ramp(value: np.ndarray, edge: float, width: float) -> np.ndarray:
    """1 below the edge, 0 above, with a soft step of the given width."""
    return 1 / (1 + np.exp(np.clip((value - edge) / (width / 4), -30, 30)))


def _ellipsoid(name: str, position: list[np.ndarray]) -> np.ndarray:
    centre, covariance = ELLIPSOIDS[name]
    offset = np.stack([p - c for p, c in zip(position, centre, strict=True)], -1)
    precision = np.linalg.inv(np.array(covariance))
    distance = np.sqrt(np.einsum("...i,ij,...j->...", offset, precision, offset))
    return _ramp(distance, 2.24, 0.5)


def _cerebellum(position: list[np.ndarray]) -> np.ndarray:
    """The space below the tentorium: a quadratic surface, softened over the seam."""
    side, front, height = position
    surface = (
        -33.3
        - 3.742 * side
        + 0.945 * side**2 / 100
        - 2.153 * front
        - 2.585 * front**2 / 100
        - 0.875 * height
        + 2.922 * height**2 / 100
        - 3.185 * side * front / 100
        - 0.882 * side * height / 100
        + 1.009 * front * height / 100
    )
    gradient = np.sqrt(sum(g**2 for g in np.gradient(surface, SPACING_MM)))
    below = _ramp(-surface / np.maximum(gradient, 1e-3), 0.0, 4.0)
    # Far above the tentorium the quadratic turns round and means nothing.
    return below * _ramp(height, 8.0, 3.0) * _ramp(front, -20.0, 6.0)


def _ventricles(fluid: np.ndarray, position: list[np.ndarray]) -> np.ndarray:
    """Marks the fluid that is connected with the lateral ventricles."""
    side, front, height = position
    body = (side < 26) & (front > -50) & (front < 36) & (height > -2) & (height < 32)
    body &= ~((side < 11) & (front < -27) & (height < 18))  # cistern, not ventricle
    body &= ~((side < 4) & (front < -34))
    horn = (side < 36) & (side > 10) & (front > -84) & (front < -30)
    horn &= (height > -8) & (height < 26)
    temporal = (side > 24) & (side < 40) & (front > -42) & (front < -6)
    temporal &= (height > -26) & (height < 0)
    allowed = (fluid > 0.25) & (body | horn | temporal)
    labels, _ = ndimage.label(allowed)
    seed = allowed & (side < 16) & (front > -10) & (front < 20) & (height > 8)
    keep = np.isin(labels, np.unique(labels[seed & (labels > 0)]))
    return ndimage.gaussian_filter(
        ndimage.binary_dilation(keep).astype(np.float32), 0.6
    )


if __name__ == "__main__":
    main()
