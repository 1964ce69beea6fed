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

from uad_jax.data import geometry, nifti_affine, nifti_parse
from uad_jax.types import Geometry

MAX_VOXELS = 512**3
# What a header says of the place of its voxels; `pixdim` too.
PLACE = (
    *("sform_code", "srow_x", "srow_y", "srow_z"),
    *("qform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "xyzt_units"),
)


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
    affine, notes = nifti_affine.find(path, image, assume_orientation)
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


def read_header(
    path: str | os.PathLike[str], *, max_voxels: int = MAX_VOXELS
) -> tuple[nib.Nifti1Header, str]:
    """Reads the header of a file as it is stored, for `write_map`.

    Args:
      path: A .nii or .nii.gz file.
      max_voxels: As in `read_image`.

    Returns:
      The header, and the SHA-256 of the file's bytes.

    Raises:
      NiftiError: The file cannot be used; subclasses say why.
    """
    image, sha256 = nifti_parse.load(Path(path), max_voxels)
    return image.header, sha256


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
    header: nib.Nifti1Header | None = None,
    description: str = "",
) -> None:
    """Writes a map or mask on the voxels of the scan it belongs to.

    The header is new (no scaling of the source survives), but for what `header` says
    of the place. The file appears under its name only when it is complete.

    Args:
      path: A .nii or .nii.gz file.
      data: [X, Y, Z] in the file's own storage order (`geometry.to_native`); bool
        and uint8 are stored as uint8, everything else as float32.
      like: Gives shape and affine; a `Scan` also gives the codes.
      codes: sform and qform codes for a `Geometry`.
      header: Of the scan (`read_header`): sform, qform and their codes are then the
        file's own to the last bit, whatever `like` says, and so is the kind of NIfTI.
      description: For the header, at most 79 ASCII characters.

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
    if header is None:
        image = _placed(values, like.native_affine, codes)
    else:
        image = _placed_as(values, header)
    image.header["descrip"] = description.encode("ascii")
    temporary = path.with_name(f".{os.getpid()}-{name}")
    try:
        nib.save(image, temporary)
        temporary.replace(path)
    except OSError as error:
        raise NiftiError(f"{path}: cannot be written ({error.strerror}).") from error
    finally:
        temporary.unlink(missing_ok=True)


def _placed(
    values: np.ndarray, affine: np.ndarray, codes: tuple[int, int]
) -> nib.Nifti1Image:
    """An image whose sform and qform are this affine."""
    image = nib.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=codes[0] or codes[1] or 1)
    image.set_qform(affine, code=codes[1] or codes[0] or 1)
    if not np.allclose(image.get_qform(), affine, atol=1e-3):
        image.header["qform_code"] = 0  # a sheared affine fits the sform only
    return image


def _placed_as(values: np.ndarray, header: nib.Nifti1Header) -> nib.Nifti1Image:
    """An image whose voxels are where another header says."""
    two = isinstance(header, nib.Nifti2Header)
    image = (nib.Nifti2Image if two else nib.Nifti1Image)(values, None)
    for name in PLACE:
        image.header[name] = header[name]
    image.header["pixdim"][:4] = header["pixdim"][:4]  # the first belongs to the qform
    return image


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
