"""Binary segmentations of many volumes in one small file.

The file is an ordinary `.npz`: a member per volume with its voxels packed eight to a
byte, and the member `index`, JSON as bytes, with subjects, shapes and facts. It is
written and read one volume at a time, so memory does not grow with the set.
"""

import contextlib
import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

_INDEX = "index"
_VERSION = 1
_WRITTEN = (1980, 1, 1, 0, 0, 0)  # the same masks give the same bytes
_DAMAGES = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    EOFError,
    RuntimeError,  # zipfile: an unknown method of compression, or encrypted
    zlib.error,
    zipfile.BadZipFile,
)


class SegmentationsError(ValueError):
    """A file of segmentations is missing, damaged, or lacks a volume."""


class Writer:
    """What `create` yields: takes one volume at a time."""

    def __init__(self, path: pathlib.Path, archive: zipfile.ZipFile) -> None:
        self._path = path
        self._archive = archive
        self._shapes: dict[str, tuple[int, ...]] = {}

    def add(self, subject: str, mask: np.ndarray) -> None:
        """Appends one volume.

        Args:
          subject: Its name, unique in the file.
          mask: [D, H, W] bool.

        Raises:
          ValueError: If the subject is there already, or the mask is not bool or not
            of three axes.
        """
        if subject in self._shapes:
            raise ValueError(
                f"{self._path}: the subject {subject!r} comes twice. Give every volume "
                "its own name."
            )
        if mask.dtype != np.bool_ or mask.ndim != 3:
            raise ValueError(
                f"{self._path}: the segmentation of {subject!r} is {mask.dtype} of "
                f"shape {mask.shape}, expected bool [D, H, W]. Threshold the map first."
            )
        _write(self._archive, _member(len(self._shapes)), np.packbits(mask))
        self._shapes[subject] = mask.shape

    def finish(self, facts: Mapping[str, str]) -> None:
        """Writes the index; `create` calls it."""
        volumes = [
            {"subject": subject, "shape": list(shape)}
            for subject, shape in self._shapes.items()
        ]
        index = {"version": _VERSION, "facts": dict(facts), "volumes": volumes}
        text = json.dumps(index).encode()
        _write(self._archive, _INDEX, np.frombuffer(text, np.uint8))


@contextlib.contextmanager
def create(path: pathlib.Path, facts: Mapping[str, str]) -> Iterator[Writer]:
    """Writes a file; it appears when the block ends without an error, or not at all.

    Args:
      path: The `.npz` file; its folder is made.
      facts: What a reader must know, such as the store, the rule, the threshold.

    Example:
      with create(path, {"rule": "healthy_fpr"}) as writer:
          writer.add("patient-1", mask)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                writer = Writer(path, archive)
                yield writer
                writer.finish(facts)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class Segmentations(Mapping[str, np.ndarray]):
    """Subject -> segmentation, [D, H, W] bool, in the order of writing.

    A volume is read when it is asked for.

    Attributes:
      path: The file.
      shapes: Subject -> (D, H, W).
    """

    def __init__(
        self, path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self.path = path
        self.shapes = dict(shapes)
        self._members = {name: _member(i) for i, name in enumerate(self.shapes)}

    def __getitem__(self, subject: str) -> np.ndarray:
        name, shape = self._members[subject], self.shapes[subject]
        try:
            with np.load(self.path, allow_pickle=False) as file:
                return _unpack(file[name], shape)
        except _DAMAGES as error:
            raise _damaged(self.path, error) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)


def save(
    path: pathlib.Path, masks: Mapping[str, np.ndarray], facts: Mapping[str, str]
) -> None:
    """Writes segmentations that are all at hand; see `create` for one at a time.

    Args:
      path: The `.npz` file.
      masks: Subject -> [D, H, W] bool.
      facts: What a reader must know, such as the store, the rule, the threshold.

    Raises:
      ValueError: If a mask is not bool or not of three axes.
    """
    with create(path, facts) as writer:
        for subject, mask in masks.items():
            writer.add(subject, mask)


def load(path: pathlib.Path) -> tuple[Segmentations, dict[str, str]]:
    """Opens a file of segmentations and checks all of it.

    Args:
      path: What `save` or `create` wrote.

    Returns:
      The segmentations, each read when it is asked for, and the facts.

    Raises:
      SegmentationsError: If the file is missing or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            present = set(archive.namelist())
        if broken:
            raise ValueError(f"the checksum of {broken} does not match")
        with np.load(path, allow_pickle=False) as file:
            index = json.loads(file[_INDEX].tobytes())
        facts, shapes = _read_index(index, present)
    except FileNotFoundError as error:
        raise SegmentationsError(
            f"{path} is missing. Evaluate the run again to make it."
        ) from error
    except _DAMAGES as error:
        raise _damaged(path, error) from error
    return Segmentations(path, shapes), facts


def _read_index(
    index: Any, present: set[str]
) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    if index["version"] != _VERSION:
        raise ValueError(f"it is of version {index['version']}, expected {_VERSION}")
    shapes = {row["subject"]: tuple(row["shape"]) for row in index["volumes"]}
    absent = {f"{_member(i)}.npy" for i in range(len(index["volumes"]))} - present
    if absent:
        raise ValueError(f"{', '.join(sorted(absent))} is not in it")
    return dict(index["facts"]), shapes


def _write(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    member = zipfile.ZipInfo(f"{name}.npy", _WRITTEN)
    member.compress_type = zipfile.ZIP_DEFLATED
    with archive.open(member, "w", force_zip64=True) as file:
        np.lib.format.write_array(file, array, allow_pickle=False)


def _member(number: int) -> str:
    return f"{number:06d}"  # subjects need not be names of files


def _unpack(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    voxels = np.unpackbits(packed, count=int(np.prod(shape)))
    return voxels.reshape(shape).astype(bool)


def _damaged(path: pathlib.Path, error: Exception) -> SegmentationsError:
    return SegmentationsError(
        f"{path} is damaged: {error}. Evaluate the run again to make it anew."
    )
