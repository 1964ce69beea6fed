"""Small head-sized NIfTI files for tests: 8 mm voxels, a brain of about one litre."""

import dataclasses
import pathlib

import nibabel as nib
import numpy as np

from uad_jax.data.manifest import SubjectFiles

SHAPE = (22, 24, 20)
AFFINE = np.array([[8, 0, 0, -88], [0, 8, 0, -96], [0, 0, 8, -80], [0, 0, 0, 1.0]])


def brain() -> np.ndarray:
    """A ball, SHAPE bool."""
    offset = np.indices(SHAPE) - (np.array(SHAPE)[:, None, None, None] - 1) / 2
    return (offset**2).sum(axis=0) < 8.0**2


def image(seed: int, gamma: float = 1.0) -> np.ndarray:
    """Positive noise in the brain whose histogram is bent by `gamma`, float32."""
    values = np.random.default_rng(seed).uniform(0.1, 1, SHAPE) ** gamma
    return np.where(brain(), values, 0).astype(np.float32)


def save(
    path: pathlib.Path, data: np.ndarray, affine: np.ndarray = AFFINE
) -> pathlib.Path:
    """Writes an image with both orientation codes set."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = nib.Nifti1Image(data, affine)
    picture.set_sform(affine, 1)
    picture.set_qform(affine, 1)
    nib.save(picture, path)
    return path


def subject(
    root: pathlib.Path, name: str, seed: int, gamma: float = 1.0, **fields: object
) -> SubjectFiles:
    """Writes one subject of modality T1 with its brain mask."""
    files = SubjectFiles(
        subject=name,
        patient=name,
        images={"t1": save(root / f"{name}.nii.gz", image(seed, gamma))},
        brain_mask=save(root / f"{name}_mask.nii.gz", brain().astype(np.uint8)),
    )
    return dataclasses.replace(files, **fields)


def with_lesion(
    root: pathlib.Path, files: SubjectFiles, lesion: np.ndarray
) -> SubjectFiles:
    """Adds a lesion mask and the label abnormal."""
    path = save(root / f"{files.subject}_lesion.nii.gz", lesion.astype(np.uint8))
    return dataclasses.replace(files, lesion_mask=path, label="abnormal")
