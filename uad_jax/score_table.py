"""`scores.json`: the slice and volume scores that a tool gave beside its maps.

Content: {subject: {"volume_score": number, "slice_score": [number per slice of the
model grid]}}; both are optional.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from uad_jax import workdir as workdir_lib
from uad_jax.data import manifest
from uad_jax.data.sources import Store, VolumeInfo

NAME = "scores.json"
_FIELDS = ("volume_score", "slice_score")


class Given(NamedTuple):
    """What the tool itself says of one volume.

    Attributes:
      volume_score: [] float32, or None.
      slice_score: [d] float32, or None.
    """

    volume_score: np.ndarray | None
    slice_score: np.ndarray | None


def read(
    folder: pathlib.Path, infos: Sequence[VolumeInfo], store: Store
) -> dict[str, Given]:
    """Reads and checks the table of a folder; without one nothing is given.

    Args:
      folder: The maps.
      infos: The volumes that will be scored.
      store: Their store; names that it does not know are listed in a warning.

    Returns:
      Subject of `infos` -> its scores.

    Raises:
      ValueError: Lists everything wrong in the file.
    """
    path = folder / NAME
    entries = _entries(path)
    strangers = sorted(entries.keys() - {info.subject for info in store.volumes})
    if strangers:
        logging.warning(
            "%s: %d names are no subjects of %s and are not read: %s",
            path,
            len(strangers),
            store.path,
            ", ".join(strangers),
        )
    problems: list[str] = []
    given = {
        info.subject: _given(entries.get(info.subject, {}), info, problems)
        for info in infos
    }
    for field in _FIELDS:
        without = [name for name, one in given.items() if getattr(one, field) is None]
        if 0 < len(without) < len(infos) and not problems:
            problems.append(
                f"{field} is given for some of the {len(infos)} subjects, but not for "
                f"{', '.join(without)}. Give it for all, or for none: the mean of the "
                "map in its place would be on another scale."
            )
    manifest.fail(path, problems)
    return given


def add(
    folder: pathlib.Path, subject: str, volume_score: float, slice_score: np.ndarray
) -> None:
    """Writes the scores of one subject into the table; float32 comes back exactly.

    Args:
      folder: The maps.
      subject: Its entry is replaced if it is there.
      volume_score: Of the whole volume.
      slice_score: [d] float32.

    Raises:
      ValueError: The table is there and damaged.
    """
    entries = _entries(folder / NAME)
    entries[subject] = {
        "volume_score": float(volume_score),
        "slice_score": np.asarray(slice_score, np.float64).tolist(),
    }
    workdir_lib.write_json(folder / NAME, entries)


def _entries(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Repair or delete it.") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}; expected "
            '{"SUBJECT": {"volume_score": 1.0}}.'
        )
    return content


def _given(entry: Any, info: VolumeInfo, problems: list[str]) -> Given:
    """Checks the entry of one volume; appends what is wrong to `problems`."""
    if not isinstance(entry, dict) or not entry.keys() <= set(_FIELDS):
        shown = ", ".join(entry) if isinstance(entry, dict) else repr(entry)
        problems.append(
            f"{info.subject}: found {shown}; expected {' and '.join(_FIELDS)} only."
        )
        return Given(None, None)
    found: dict[str, np.ndarray | None] = {}
    for field, shape in (("volume_score", ()), ("slice_score", (info.depth,))):
        values = entry.get(field)
        wanted = f"{info.depth} numbers, one per model slice" if shape else "one number"
        wrong = "" if values is None else _problem(values, shape, wanted)
        if wrong:
            problems.append(f"{info.subject}: {field} {wrong}")
        sound = values is not None and not wrong
        found[field] = np.array(values, np.float32) if sound else None
    return Given(**found)


def _problem(values: Any, shape: tuple[int, ...], wanted: str) -> str:
    """What is wrong with values from JSON that should be finite numbers, or ""."""
    try:
        with np.errstate(over="ignore"):
            numbers = np.array(values).astype(np.float32, casting="same_kind")
    except (TypeError, ValueError):
        return f"is not {wanted}."
    if numbers.shape != shape:
        return f"has shape {numbers.shape}; expected {wanted}."
    bad = int(np.sum(~np.isfinite(numbers)))
    return f"holds {bad} NaN or infinite values; expected finite ones." if bad else ""
