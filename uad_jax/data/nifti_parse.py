"""From the bytes of a file to a checked nibabel image; `nifti` builds on it."""

import gzip
import hashlib
import io
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np

_CHUNK = 1 << 22
_MAX_GZIP_RATIO = 1040  # deflate cannot do better than 1032:1
_MAX_OFFSET = 1 << 26  # bytes of header extensions
PARSE_ERRORS = (
    nib.spatialimages.HeaderDataError,
    nib.filebasedimages.ImageFileError,
    ValueError,
    KeyError,
    TypeError,
    OverflowError,
    OSError,
)


class NiftiError(ValueError):
    """A file that cannot be used."""


class DamagedFile(NiftiError):
    """The file is missing, truncated, corrupt, or no NIfTI at all."""


class BadHeader(NiftiError):
    """The header is impossible, or claims more than the file holds."""


class BadAffine(NiftiError):
    """The file does not say where its voxels are."""


class BadVoxels(NiftiError):
    """The voxels have a type or values that cannot be used."""


class GridMismatch(NiftiError):
    """Two files of a subject do not lie on the same voxels."""


class EmptyBrain(NiftiError):
    """There is no brain in the image or mask."""


def load(path: Path, max_voxels: int) -> tuple[nib.Nifti1Image, str]:
    """Reads all bytes of a file and parses them; no voxel is decoded yet.

    Args:
      path: A .nii or .nii.gz file.
      max_voxels: Larger images are refused.

    Returns:
      The image and the SHA-256 of the file's bytes.

    Raises:
      NiftiError: The file is missing, damaged, or of an unusable kind.
    """
    if not path.name.endswith((".nii", ".nii.gz")):
        raise DamagedFile(
            f"{path}: expected a name ending in .nii or .nii.gz. "
            "Convert other formats to NIfTI first."
        )
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DamagedFile(f"{path}: cannot be read ({error.strerror}).") from error
    sha256 = hashlib.sha256(raw).hexdigest()
    if path.name.endswith(".gz"):
        content = _decompress(path, raw, max_voxels)
    else:
        content = raw
        if raw[:2] == b"\x1f\x8b":
            raise DamagedFile(f"{path}: is gzip. Rename it to {path.name}.gz.")
    header = _header(path, content[:540], raw, max_voxels)
    needed = _bytes_needed(header)
    if len(content) < needed:
        raise DamagedFile(
            f"{path}: truncated: {len(content)} bytes, but shape "
            f"{header.get_data_shape()} as {header.get_data_dtype()} needs {needed}. "
            "Copy or download it again."
        )
    two = isinstance(header, nib.Nifti2Header)
    kind = nib.Nifti2Image if two else nib.Nifti1Image
    try:
        return kind.from_bytes(content), sha256
    except PARSE_ERRORS as error:
        raise BadHeader(f"{path}: the header is invalid ({error}).") from error


def _decompress(path: Path, raw: bytes, max_voxels: int) -> bytes:
    """Decompresses to the end, which checks length and CRC, within the size cap."""
    if raw[:2] != b"\x1f\x8b":
        raise DamagedFile(f"{path}: not gzip; {_guess(raw)}.")
    parts = []
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as stream:
            start = stream.read(540)
            header = _header(path, start, raw, max_voxels)
            needed = _bytes_needed(header)
            parts.append(start)
            parts.append(stream.read(max(needed - len(start), 0)))
            extra = 0
            while chunk := stream.read(_CHUNK):
                extra += len(chunk)
                if extra > needed:
                    raise BadHeader(
                        f"{path}: holds more than twice the {needed} bytes that its "
                        "header asks for. It is damaged, or made to fill memory."
                    )
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DamagedFile(
            f"{path}: the compressed data are damaged or truncated ({error}). "
            "Copy or download it again."
        ) from error
    return b"".join(parts)


def _guess(raw: bytes) -> str:
    """Says what a file that should be NIfTI looks like."""
    start = raw[:512].lstrip().lower()
    if not raw:
        return "the file is empty; copy or download it again"
    if not raw.strip(b"\0"):
        return "the file is all zeros (an unfinished copy?); copy it again"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return (
            "looks like HTML (a login or error page saved instead of the data?); "
            "download it again"
        )
    if raw[:2] == b"\x1f\x8b":
        return "looks like gzip"
    if len(raw) >= 348 and raw[344:347] in (b"n+1", b"ni1"):
        return "looks like an uncompressed NIfTI: rename it to .nii"
    return f"it begins with {raw[:8]!r}"


def _header(path: Path, start: bytes, raw: bytes, max_voxels: int) -> nib.Nifti1Header:
    """Parses the header and checks its claims before any voxel is read."""
    sizes = {start[:4], start[:4][::-1]}
    kinds = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
    kind = next((k for n, k in kinds.items() if n.to_bytes(4, "little") in sizes), None)
    if kind is None or len(start) < kind.sizeof_hdr:
        raise DamagedFile(f"{path}: not NIfTI; {_guess(start)}.")
    magic = start[344:348] if kind is nib.Nifti1Header else start[4:8]
    if magic[:3] not in (b"n+1", b"n+2"):
        raise DamagedFile(
            f"{path}: the magic is {magic!r}, expected b'n+1'. Only single-file NIfTI "
            "is read; convert Analyze or .hdr/.img pairs first."
        )
    try:
        header = kind(start[: kind.sizeof_hdr])
        dtype = header.get_data_dtype()
    except PARSE_ERRORS as error:
        raise BadHeader(f"{path}: the header is invalid ({error}).") from error
    rank = int(header["dim"][0])
    shape = tuple(int(size) for size in header["dim"][1 : max(rank, 0) + 1])
    if not 1 <= rank <= 7 or min(shape) < 1:
        raise BadHeader(
            f"{path}: the header's dimensions are {header['dim'].tolist()}; expected "
            "three sizes of 1 or more. The file is damaged."
        )
    offset = float(header["vox_offset"])
    if not kind.sizeof_hdr <= offset <= _MAX_OFFSET:
        raise BadHeader(
            f"{path}: the header puts the voxels at byte {offset:g}; expected "
            f"{kind.sizeof_hdr} to {_MAX_OFFSET}. The file is damaged."
        )
    if dtype.kind not in "iuf":
        raise BadVoxels(
            f"{path}: voxels are {dtype}; expected one real number each. "
            "Convert colour or complex images first."
        )
    voxels = int(np.prod(shape, dtype=object))
    if voxels > max_voxels:
        raise BadHeader(
            f"{path}: the header claims shape {shape}, {voxels} voxels; the limit is "
            f"{max_voxels}. Raise max_voxels if the image is really that large."
        )
    if _bytes_needed(header) > len(raw) * _MAX_GZIP_RATIO:
        raise BadHeader(
            f"{path}: the header claims shape {shape} as {dtype}, more than "
            f"{len(raw)} bytes can hold. The file is damaged."
        )
    return header


def _bytes_needed(header: nib.Nifti1Header) -> int:
    rank = int(header["dim"][0])
    voxels = int(np.prod(header["dim"][1 : rank + 1].tolist(), dtype=object))
    return int(header["vox_offset"]) + voxels * header.get_data_dtype().itemsize
