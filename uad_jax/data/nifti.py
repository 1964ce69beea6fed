"""Strict reading and writing of NIfTI files.

The whole file is read to its end and hashed; sizes claimed by the header are checked
before anything is allocated; whatever could silently become wrong numbers is an
error that names the file, what was expected, what was found, and a remedy.
"""

import dataclasses
import os
from pathlib import Path

import nibabel as nib
import numpy as np
from absl import logging

from uad_jax.data import geometry, nifti_parse
from uad_jax.types import Geometry

MAX_VOXELS = 512**3


NiftiError = nifti_parse.NiftiError
DamagedFile = nifti_parse.DamagedFile
BadHeader = nifti_parse.BadHeader
BadAffine = nifti_parse.BadAffine
BadVoxels = nifti_parse.BadVoxels
GridMismatch = nifti_parse.GridMismatch
EmptyBrain = nifti_parse.EmptyBrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scan:
    """One image or mask, in canonical storage.

    Attributes:
      path: The file.
      data: [X, Y, Z] float32 (images) or bool (masks); axes grow to R, A, S.
      affine: Canonical voxel index to world RAS mm, [4, 4] float64.
      native_shape: Voxels as stored in the file.
      native_affine: Stored voxel index to world RAS mm, [4, 4] float64.
      native_to_canonical: Stored voxel index to canonical voxel index, [4, 4].
      codes: The sform and qform codes of the file.
      sha256: Hash of the file's bytes.
      notes: What a user should know about the file, one sentence each.
    """

    path: Path
    data: np.ndarray
    affine: np.ndarray
    native_shape: tuple[int, int, int]
    native_affine: np.ndarray
    native_to_canonical: np.ndarray
    codes: tuple[int, int]
    sha256: str
    notes: tuple[str, ...] = ()


def read_image(
    path: str | os.PathLike[str],
    nan_to_zero: bool = False,
    *,
    frame: int | None = None,
    assume_orientation: str = "",
    max_voxels: int = MAX_VOXELS,
) -> Scan:
    """Reads a 3-D image.

    Args:
      path: A .nii or .nii.gz file.
      nan_to_zero: Whether NaN and Inf become 0 (and are counted in a note).
      frame: Which frame of a 4-D file to take; None accepts a single frame only.
      assume_orientation: Axis codes such as "RAS" or "LPS", for files that do not
        say how they are oriented.
      max_voxels: Larger images are refused before they are read.

    Returns:
      The scan, float32, canonical.

    Raises:
      NiftiError: The file cannot be used; subclasses say why.
    """
    path = Path(path)
    image, sha256 = nifti_parse.load(path, max_voxels)
    affine, notes = _affine(path, image, assume_orientation)
    data = _voxels(path, image, frame)
    bad = int(data.size - np.count_nonzero(np.isfinite(data)))
    if bad and not nan_to_zero:
        raise BadVoxels(
            f"{path}: {bad} of {data.size} voxels are NaN or infinite; expected "
            "finite numbers. Repair the file, or make them 0 with --nan=zero."
        )
    if bad:
        data = np.nan_to_num(data, nan=0.0, posinf=0.0, neginf=0.0)
        notes.append(f"{bad} NaN or infinite voxels were set to 0.")
    return _scan(path, image, data, affine, sha256, notes)


def read_mask(
    path: str | os.PathLike[str],
    *,
    assume_orientation: str = "",
    max_voxels: int = MAX_VOXELS,
) -> Scan:
    """Reads a brain or lesion mask.

    Whole-numbered labels: every label above 0 is inside. Fractions (an interpolated
    mask): one half and more is inside if the maximum is at most 10, else half of the
    maximum and more. The labels found are in the notes.

    Args:
      path: A .nii or .nii.gz file.
      assume_orientation: As in `read_image`.
      max_voxels: As in `read_image`.

    Returns:
      The scan, bool, canonical.

    Raises:
      NiftiError: The file cannot be used; subclasses say why.
    """
    path = Path(path)
    scan = read_image(
        path, assume_orientation=assume_orientation, max_voxels=max_voxels
    )
    mask, note = binarise(scan.data, path)
    return dataclasses.replace(scan, data=mask, notes=(*scan.notes, note))


def binarise(values: np.ndarray, path: Path) -> tuple[np.ndarray, str]:
    """Makes a mask of label values by the rule of `read_mask`.

    Args:
      values: Finite float32 of any shape.
      path: The file, for the message.

    Returns:
      The mask, and a sentence with the rule and the labels found.

    Raises:
      BadVoxels: There are negative values.
    """
    low, high = float(values.min()), float(values.max())
    if low < -1e-3:
        raise BadVoxels(
            f"{path}: the smallest value is {low:g}; a mask has labels from 0 up. "
            "Was an image given as a mask?"
        )
    rounded = np.rint(values)
    if np.abs(values - rounded).max(initial=0.0) < 1e-3:
        labels = np.unique(rounded).astype(int)
        shown = ", ".join(map(str, labels[:12])) + (" ..." if len(labels) > 12 else "")
        return rounded > 0, f"Mask: labels {{{shown}}}; inside is every label above 0."
    level = 0.5 if high <= 10 else high / 2
    note = f"Mask: fractions in [{low:g}, {high:g}]; inside is {level:g} and above."
    return values >= level, note


def check_same_grid(image: Scan, mask: Scan, ignore_affine: bool = False) -> None:
    """Checks that two scans of a subject lie on the same voxels.

    Args:
      image: The reference.
      mask: Another modality, a brain mask or a lesion mask.
      ignore_affine: Whether only the shapes must agree.

    Raises:
      GridMismatch: Names both files and the difference.
    """
    shapes = (image.native_shape, mask.native_shape)
    if not ignore_affine:
        shapes = (image.data.shape, mask.data.shape)
    if shapes[0] != shapes[1]:
        raise GridMismatch(
            f"{mask.path}: shape {shapes[1]}, but {image.path} has {shapes[0]}. "
            "Resample one onto the other's voxels."
        )
    if ignore_affine:
        return
    corners = np.array(
        [[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float
    ).T
    corners[:3] *= np.array(image.data.shape)[:, None] - 1.0
    distance = np.abs((image.affine - mask.affine) @ corners).max()
    tolerance = 1e-3 * max(geometry.spacing(image.affine))
    if distance > tolerance:
        raise GridMismatch(
            f"{mask.path}: its voxels lie up to {distance:.3g} mm from those of "
            f"{image.path} (allowed: {tolerance:.3g} mm). Resample one onto the "
            "other, or pass --ignore_affine if you know that the arrays match."
        )


def on_grid_of(image: Scan, mask: Scan) -> Scan:
    """Gives a scan the affine of another one with the same stored shape.

    Args:
      image: The scan whose affine is trusted.
      mask: The scan whose affine is ignored; stored arrays match voxel by voxel.

    Returns:
      `mask` with its voxels in the canonical order of `image`.
    """
    stored = geometry.reorder(mask.data, np.linalg.inv(mask.native_to_canonical))
    return dataclasses.replace(
        mask,
        data=geometry.reorder(stored, image.native_to_canonical),
        affine=image.affine,
        native_affine=image.native_affine,
        native_to_canonical=image.native_to_canonical,
    )


def write_map(
    path: str | os.PathLike[str],
    data: np.ndarray,
    like: Geometry | Scan,
    *,
    codes: tuple[int, int] = (1, 1),
) -> None:
    """Writes a map or mask on the voxels of the scan it belongs to.

    The header is new (no scaling of the source survives). The file appears under
    its name only when it is complete.

    Args:
      path: A .nii or .nii.gz file.
      data: [X, Y, Z] in the file's own storage order (`geometry.to_native`); bool
        and uint8 are stored as uint8, everything else as float32.
      like: Gives shape and affine; a `Scan` also gives the codes.
      codes: sform and qform codes for a `Geometry`.

    Raises:
      NiftiError: Wrong shape, non-finite values, or the place cannot be written.
    """
    path = Path(path)
    if isinstance(like, Scan):
        codes = like.codes
    values = np.asarray(data)
    if values.shape != tuple(like.native_shape):
        raise GridMismatch(
            f"{path}: the map has shape {values.shape}, the scan it belongs to "
            f"{tuple(like.native_shape)}. Use geometry.to_native first."
        )
    is_mask = values.dtype in (np.bool_, np.uint8)
    values = values.astype(np.uint8 if is_mask else np.float32)
    if not is_mask and not np.isfinite(values).all():
        raise BadVoxels(
            f"{path}: the map has NaN or infinite values; expected finite numbers. "
            "Find out why the model produced them."
        )
    name = path.name
    if not name.endswith((".nii", ".nii.gz")):
        raise NiftiError(f"{path}: expected a name ending in .nii or .nii.gz.")
    image = nib.Nifti1Image(values, like.native_affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(like.native_affine, code=codes[0] or codes[1] or 1)
    image.set_qform(like.native_affine, code=codes[1] or codes[0] or 1)
    if not np.allclose(image.get_qform(), like.native_affine, atol=1e-3):
        image.header["qform_code"] = 0  # a sheared affine fits the sform only
    temporary = path.with_name(f".{os.getpid()}-{name}")
    try:
        nib.save(image, temporary)
        temporary.replace(path)
    except OSError as error:
        raise NiftiError(f"{path}: cannot be written ({error.strerror}).") from error
    finally:
        temporary.unlink(missing_ok=True)


def _affine(
    path: Path, image: nib.Nifti1Image, assume: str
) -> tuple[np.ndarray, list[str]]:
    """Finds the affine (sform before qform) and says what is odd about it."""
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


def _voxels(path: Path, image: nib.Nifti1Image, frame: int | None) -> np.ndarray:
    """Decodes the voxels as one 3-D float32 array in storage order."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            data = np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged"))
    except nifti_parse.PARSE_ERRORS as error:
        raise DamagedFile(f"{path}: the voxels cannot be read ({error}).") from error
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim == 4 and frame is not None:
        if not 0 <= frame < data.shape[3]:
            raise BadVoxels(
                f"{path}: frame {frame} was asked for, but there are {data.shape[3]}."
            )
        data = data[..., frame]
    if data.ndim != 3:
        raise BadVoxels(
            f"{path}: shape {image.shape}; expected one 3-D volume. "
            "Choose a frame, or split the file."
        )
    return data


def _scan(
    path: Path,
    image: nib.Nifti1Image,
    data: np.ndarray,
    affine: np.ndarray,
    sha256: str,
    notes: list[str],
) -> Scan:
    for note in notes:
        logging.warning("%s: %s", path, note)
    transform = geometry.native_to_canonical(data.shape, affine)
    canonical = geometry.reorder(data, transform).astype(np.float32, copy=False)
    return Scan(
        path=path,
        data=canonical,
        affine=affine @ np.linalg.inv(transform),
        native_shape=data.shape,
        native_affine=affine,
        native_to_canonical=transform,
        codes=(int(image.header["sform_code"]), int(image.header["qform_code"])),
        sha256=sha256,
        notes=tuple(notes),
    )
