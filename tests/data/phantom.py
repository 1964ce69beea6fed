"""A folder of small heads and masks in the layout that the implants are made from."""

import pathlib

import nibabel as nib
import numpy as np
from scipy import ndimage

from uad_jax.data.implant import Background

SPACING = 4.0
SHAPE = (36, 46, 36)
AFFINE = np.diag([SPACING, SPACING, SPACING, 1.0])
AFFINE[:3, 3] = (-70.0, -106.0, -58.0)
CENTRE = np.array([-0.5, -15.5, 11.5])
RADII = np.array([64.0, 82.0, 60.0])
SUBJECTS = {"A": "train", "B": "val", "C": "test", "D": "test", "E": "test"}
LEVELS = (0, 300, 700, 970, 940, 1000, 770, 990, 350)  # by tissue class
# Masks cover the whole frame of either space at 4 mm, stored from left to right.
MASK_SHAPE = (40, 50, 42)
MASK_AFFINE = np.diag([-4.0, 4.0, 4.0, 1.0])
MASK_AFFINE[:3, 3] = (78.0, -112.0, -76.0)


def world(shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    """World position of every voxel, [*shape, 3] mm."""
    index = np.moveaxis(np.indices(shape), 0, -1)
    return nib.affines.apply_affine(affine, index)


def background(seed: int = 0) -> Background:
    """An egg of white matter with a ventricle, in a shell of cortex and one of CSF."""
    place = world(SHAPE, AFFINE) - CENTRE
    depth = np.sqrt(((place / RADII) ** 2).sum(-1))
    tissue = np.zeros(SHAPE, np.uint8)
    for limit, name in ((1.0, 8), (0.97, 2), (0.85, 3)):
        tissue[depth < limit] = name
    tissue[np.abs(place / (8, 24, 12)).max(-1) < 1] = 1
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal(SHAPE), 0.8)
    image = np.array(LEVELS)[tissue] + 16 * noise / noise.std()
    image = np.where(tissue > 0, np.maximum(image, 1), 0)
    return Background(
        image=np.rint(image).astype(np.int16), tissue=tissue, affine=AFFINE
    )


def ball(centre: tuple[float, float, float], radius: float) -> np.ndarray:
    """A mask in mask space, radius in mm."""
    place = world(MASK_SHAPE, MASK_AFFINE) - centre
    return (place**2).sum(-1) < radius**2


def save(path: pathlib.Path, data: np.ndarray, affine: np.ndarray) -> pathlib.Path:
    """Writes a NIfTI file with its orientation set."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    nib.save(image, path)
    return path


def write(root: pathlib.Path) -> pathlib.Path:
    """Writes backgrounds, 16 MS masks (one excluded) and 16 stroke masks."""
    for seed, name in enumerate(SUBJECTS):
        head = background(seed)
        save(root / f"ixi_t1/{name}_T1.nii.gz", head.image, AFFINE)
        save(root / f"ixi_t1/{name}_tissue.nii.gz", head.tissue, AFFINE)
    rng = np.random.default_rng(7)
    for number in range(16):
        side = rng.choice([-30.0, 30.0])
        mask = ball((side, rng.uniform(-40, 10), 20.0), 8 + number).astype(np.uint8)
        name = 26 if number == 15 else number
        masks = root / "lesion_masks"
        save(masks / f"mslub/patient{name:02d}_gold_MNI.nii.gz", mask, MASK_AFFINE)
        save(masks / f"soop/bwsrsub-{name}_lesion.nii.gz", mask, MASK_AFFINE)
    return root
