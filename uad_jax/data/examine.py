"""What is wrong with the files of one subject: read each, compare them, list it all."""

import contextlib
import dataclasses
import enum
import functools
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from absl import logging
from scipy import ndimage

from uad_jax.data import geometry, nifti, profile
from uad_jax.data.manifest import SubjectFiles

_STRIPPED = 0.95  # a skull-stripped image has more background than 1 - this
_BRAIN_ML = (300.0, 3000.0)  # a human brain; children included
_EROSION_MM = 6.0  # the behrendt protocol: 3 voxels of 2 mm in the axial plane
_FEW_VALUES = 20  # an image has more, a map of labels has not


class Severity(enum.Enum):
    """How bad a problem is."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One row of the doctor's table.

    Attributes:
      severity: How bad it is.
      message: What was expected, what was found, what to do.
      subject: The subject, or "" for the whole set.
      path: The file, or None.
    """

    severity: Severity
    message: str
    subject: str = ""
    path: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How files are read; see `nifti.read_image` and `nifti.check_same_grid`."""

    ignore_affine: bool = False
    nan_to_zero: bool = False
    assume_orientation: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """What one subject's files are like.

    Attributes:
      problems: All problems of the subject.
      hashes: Modality -> SHA-256 of its voxels.
      fingerprints: Modality -> shape of the intensities in the brain, [8] float.
    """

    problems: tuple[Problem, ...]
    hashes: Mapping[str, str]
    fingerprints: Mapping[str, np.ndarray]


def examine(subject: SubjectFiles, reading: Reading) -> Findings:
    """Reads the files of one subject; never raises for what is in them."""
    sheet = _Sheet(subject, reading)
    found = {name: sheet.read_image(path) for name, path in subject.images.items()}
    scans = {name: scan for name, scan in found.items() if scan is not None}
    brain = sheet.read_mask(subject.brain_mask)
    lesion = sheet.read_mask(subject.lesion_mask)
    files = subject.files()
    for path in sorted({path for path in files if files.count(path) > 1}):
        sheet.error("the file is given twice for this subject.", path)
    if not scans:
        return sheet.findings({}, None)
    reference = next(iter(scans.values()))
    matched = {name: sheet.match(reference, scan) for name, scan in scans.items()}
    arrays = {name: data for name, data in matched.items() if data is not None}
    brain_data = sheet.match(reference, brain)
    if subject.brain_mask is None:
        brain_data = functools.reduce(np.logical_or, (a != 0 for a in arrays.values()))
        if brain_data.mean() > _STRIPPED:
            sheet.error(
                f"{brain_data.mean():.0%} of the voxels differ from 0, so the image is "
                "not skull-stripped. Give a brain_mask, or strip it first.",
                reference.path,
            )
    edges = geometry.spacing(reference.affine)
    if brain_data is not None:
        _check_brain(sheet, brain_data, edges)
        for name, data in arrays.items():
            _check_image(sheet, data[brain_data], subject.images[name])
    lesion_data = sheet.match(reference, lesion)
    if lesion_data is not None:
        _check_lesion(sheet, lesion_data, brain_data, edges)
    return sheet.findings(arrays, brain_data)


class _Sheet:
    """Collects what is found out about one subject."""

    def __init__(self, subject: SubjectFiles, reading: Reading) -> None:
        self.subject = subject
        self._reading = reading
        self._problems: list[Problem] = []

    def error(self, message: str, path: Path | None) -> None:
        """Adds an error."""
        self._add(Severity.ERROR, message, path)

    def warning(self, message: str, path: Path | None) -> None:
        """Adds a warning."""
        self._add(Severity.WARNING, message, path)

    def note(self, message: str, path: Path | None) -> None:
        """Adds a note."""
        self._add(Severity.NOTE, message, path)

    def _add(self, severity: Severity, message: str, path: Path | None) -> None:
        self._problems.append(
            Problem(
                severity=severity,
                message=message.removeprefix(f"{path}: "),
                subject=self.subject.subject,
                path=path,
            )
        )

    def read_image(self, path: Path) -> nifti.Scan | None:
        """Reads an image, or adds the reason why not."""
        return self._read(
            path,
            functools.partial(nifti.read_image, nan_to_zero=self._reading.nan_to_zero),
        )

    def read_mask(self, path: Path | None) -> nifti.Scan | None:
        """Reads a mask, or adds the reason why not; None stays None."""
        return None if path is None else self._read(path, nifti.read_mask)

    def _read(self, path: Path, reader: Callable[..., nifti.Scan]) -> nifti.Scan | None:
        try:
            with quiet():
                scan = reader(path, assume_orientation=self._reading.assume_orientation)
        except (nifti.NiftiError, OSError) as error:
            self.error(str(error), path)
            return None
        except Exception as error:  # whatever it is, the other files are read too
            self.error(f"{type(error).__name__}: {error}", path)
            return None
        for note in scan.notes:
            stated = note.startswith("Mask:")
            (self.note if stated else self.warning)(note, path)
        return scan

    def match(
        self, reference: nifti.Scan, scan: nifti.Scan | None
    ) -> np.ndarray | None:
        """Returns a scan's voxels in the reference's order, or adds the mismatch."""
        if scan is None or scan is reference:
            return None if scan is None else scan.data
        try:
            nifti.check_same_grid(reference, scan, self._reading.ignore_affine)
        except nifti.GridMismatch as error:
            self.error(str(error), scan.path)
            return None
        if self._reading.ignore_affine:
            return nifti.on_grid_of(reference, scan).data
        return scan.data

    def findings(
        self, arrays: Mapping[str, np.ndarray], brain: np.ndarray | None
    ) -> Findings:
        """Closes the sheet."""
        return Findings(
            problems=tuple(self._problems),
            hashes={
                name: hashlib.sha256(np.ascontiguousarray(data).data).hexdigest()
                for name, data in arrays.items()
            },
            fingerprints=_fingerprints(arrays, brain),
        )


def _check_brain(sheet: _Sheet, brain: np.ndarray, edges: geometry.Triple) -> None:
    path = sheet.subject.brain_mask or next(iter(sheet.subject.images.values()))
    volume = float(brain.sum()) * float(np.prod(edges)) / 1000
    if not brain.any():
        sheet.error("no voxel is brain. Replace the file.", path)
    elif not _BRAIN_ML[0] <= volume <= _BRAIN_ML[1]:
        sheet.warning(
            f"the brain has {volume:.3g} ml; expected {_BRAIN_ML[0]:.0f} to "
            f"{_BRAIN_ML[1]:.0f}. Check the mask and the voxel size.",
            path,
        )


def _check_image(sheet: _Sheet, values: np.ndarray, path: Path) -> None:
    """Looks at the values of an image inside the brain."""
    if values.size and not values.any():
        sheet.error("every voxel of the brain is 0. Replace the file.", path)
    elif values.size and values.min() == values.max():
        sheet.warning(f"constant ({values[0]:g}) inside the brain; it becomes 0.", path)
    elif values.size > _FEW_VALUES**2:
        distinct = len(np.unique(values[:: max(1, values.size // 200_000)]))
        if distinct <= _FEW_VALUES:
            sheet.warning(
                f"only {distinct} different values inside the brain. Is it a mask or "
                "a map of labels?",
                path,
            )


def _check_lesion(
    sheet: _Sheet, lesion: np.ndarray, brain: np.ndarray | None, edges: geometry.Triple
) -> None:
    """Compares the lesion mask with the label and with the brain mask."""
    path, label = sheet.subject.lesion_mask, sheet.subject.label
    voxels = int(lesion.sum())
    if label == "sham" and not voxels:
        sheet.error("the mask of the sham is empty. Give that of its implant.", path)
    if label == "abnormal" and not voxels:
        sheet.warning(
            "the lesion mask is empty, but the subject is labelled abnormal; its "
            "Dice and AP are not defined.",
            path,
        )
    if label == "healthy" and voxels:
        sheet.error(
            f"{voxels} lesion voxels, but the subject is labelled healthy. Correct "
            "the label or the mask.",
            path,
        )
    if not voxels or brain is None or label == "sham":
        return  # nobody has to find a sham: no Dice is lost with its voxels
    outside = 1 - float((lesion & brain).sum()) / voxels
    if outside > 0:
        ceiling = 2 * (1 - outside) / (2 - outside)
        (sheet.warning if outside >= 0.01 else sheet.note)(
            f"{outside:.1%} of the lesion lies outside the brain mask and cannot be "
            f"found: the Dice of this subject is at most {ceiling:.3f}.",
            path,
        )
    edge = 1 - outside - float((lesion & _eroded(brain, lesion, edges)).sum()) / voxels
    if edge >= 0.01:
        sheet.note(
            f"{edge:.1%} of the lesion lies within {_EROSION_MM:g} mm of the edge of "
            "the brain mask, which protocols with erosion leave out.",
            path,
        )


def _eroded(
    brain: np.ndarray, lesion: np.ndarray, edges: geometry.Triple
) -> np.ndarray:
    """Erodes axial slices as the protocol does, near the lesion only."""
    steps = max(1, round(_EROSION_MM / ((edges[0] * edges[1]) ** 0.5)))
    (found,) = ndimage.find_objects(lesion.astype(np.uint8))
    near = tuple(slice(max(0, part.start - steps), part.stop + steps) for part in found)
    cross = ndimage.generate_binary_structure(2, 1)[..., None]
    result = np.zeros_like(brain)
    result[near] = ndimage.binary_erosion(brain[near], cross, iterations=steps)
    return result


def _fingerprints(
    arrays: Mapping[str, np.ndarray], brain: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Modality -> fingerprint of the brain; images without one are left out."""
    found = {
        name: profile.fingerprint(data[data != 0 if brain is None else brain])
        for name, data in arrays.items()
    }
    return {name: value for name, value in found.items() if value is not None}


class _Quiet:
    """Who is quiet now, over all threads; the last one restores the level."""

    lock = threading.Lock()
    count = 0
    before = logging.INFO


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the reader's warnings, which end up in the table, out of the log."""
    with _Quiet.lock:
        if not _Quiet.count:
            _Quiet.before = logging.get_verbosity()
            logging.set_verbosity(logging.ERROR)
        _Quiet.count += 1
    try:
        yield
    finally:
        with _Quiet.lock:
            _Quiet.count -= 1
            if not _Quiet.count:
                logging.set_verbosity(_Quiet.before)
