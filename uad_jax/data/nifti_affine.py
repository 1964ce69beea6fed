"""Where a NIfTI file says that its voxels are; `nifti` builds on it."""

from pathlib import Path

import nibabel as nib
import numpy as np

from uad_jax.data import geometry
from uad_jax.data.nifti_parse import BadAffine


def find(
    path: Path, image: nib.Nifti1Image, assume: str
) -> tuple[np.ndarray, list[str]]:
    """Finds the affine (sform before qform) and says what is odd about it.

    Args:
      path: The file, for messages.
      image: The file's content.
      assume: Axis codes for a file without an orientation, or "".

    Returns:
      Stored voxel index to world RAS mm, [4, 4] float64, and one sentence for
      everything that a user should know.

    Raises:
      BadAffine: The file does not say where its voxels are.
    """
    header = image.header
    codes = int(header["sform_code"]), int(header["qform_code"])
    notes = []
    if codes == (0, 0):
        if not assume:
            raise BadAffine(
                f"{path}: neither sform nor qform is set, so left and right are "
                "unknown. Set the orientation in the file, or, if you know it, pass "
                "for example --assume_orientation=RAS."
            )
        affine = _assumed_affine(path, image, assume)
        notes.append(f"The orientation {assume} was assumed.")
    else:
        try:
            affine = header.get_best_affine().astype(np.float64)
        except (ValueError, nib.spatialimages.HeaderDataError) as error:
            raise BadAffine(f"{path}: the qform is invalid ({error}).") from error
    if not _usable(affine):
        raise BadAffine(
            f"{path}: the affine {affine[:3].tolist()} is not finite, not invertible "
            "or has absurd voxel sizes. Repair the header (sform or qform)."
        )
    if min(codes) > 0:
        difference = float(np.abs(header.get_sform() - header.get_qform()).max())
        if not difference <= 1e-3:
            notes.append(
                f"sform and qform differ by {difference:.3g}; the sform was used."
            )
    cosines = affine[:3, :3] / np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    if np.abs(cosines.T @ cosines - np.eye(3)).max() > 1e-3:
        notes.append("The affine is sheared; voxels are treated as a box.")
    edges = geometry.spacing(affine)
    if min(edges) < 0.1 or max(edges) > 10:
        shown = " x ".join(f"{edge:.3g}" for edge in edges)
        notes.append(f"Voxels of {shown} mm are unusual; check the units.")
    return affine, notes


def _usable(affine: np.ndarray) -> bool:
    """Whether an affine is finite, invertible and about the size of a head."""
    if not np.isfinite(affine).all() or np.abs(affine).max() > 1e9:
        return False
    edges = np.array(geometry.spacing(affine))
    if edges.min() < 1e-4 or edges.max() > 1e5:
        return False
    return abs(np.linalg.det(affine[:3, :3] / edges)) > 1e-3


def _assumed_affine(path: Path, image: nib.Nifti1Image, assume: str) -> np.ndarray:
    """Builds an affine from axis codes and voxel sizes, centred on the volume."""
    try:
        orientation = nib.orientations.axcodes2ornt(assume.upper())
        flip = nib.orientations.inv_ornt_aff(orientation, (1, 1, 1))
    except (ValueError, nib.orientations.OrientationError) as error:
        raise BadAffine(
            f"{path}: {assume!r} is no orientation; use three axis codes "
            "such as 'RAS' or 'LPS'."
        ) from error
    affine = np.linalg.inv(flip)
    affine[:3, :3] *= np.asarray(image.header["pixdim"][1:4], np.float64)
    centre = (np.array(image.shape[:3], float) - 1) / 2
    affine[:3, 3] = -affine[:3, :3] @ centre
    return affine
