"""What a comparison reads: the results of runs, or of maps made by another tool."""

import csv
import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from uad_jax import segmentations, writer
from uad_jax import workdir as workdir_lib

IMPORTED = "imported weights, training unknown"  # a remark in tables
_SHOWN = 5  # names listed in an error
_NEEDED = ("scorer", "subject", "patient", "label", "ap")  # columns

Row = Mapping[str, str]


class CompareError(ValueError):
    """Results cannot be read, or must not be compared."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One run, or one folder of scored maps, on one set.

    Attributes:
      name: Short name, unique in the comparison.
      folder: Its workdir.
      results: `results/<set>.json`.
      rows: Scorer -> subject -> line of `results/<set>_subjects.csv`.
      by_step: Lines of `results/by_step.csv` for this set and these data.
      lines: The run's `metrics.jsonl`; none for maps.
      device: What it was trained on, "" if unknown.
      found: Its segmentations, or None.
      store: Where the images of the set are, "" if unknown.
      notes: What a reader must know, one sentence each.
    """

    name: str
    folder: pathlib.Path
    results: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Row]]
    by_step: Sequence[Row]
    lines: Sequence[Mapping[str, Any]]
    device: str
    found: segmentations.Segmentations | None
    store: str
    notes: tuple[str, ...]

    @property
    def scorer(self) -> str:
        """Name of the model, or of the maps, among the scorers."""
        return self.results["run"]["name"]

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The figures of the model or the maps."""
        return self.results["scorers"][self.scorer]

    @property
    def subjects(self) -> Mapping[str, Row]:
        """Subject -> its line, of the model or the maps."""
        return self.rows[self.scorer]

    @property
    def operating(self) -> tuple[str, float | None]:
        """Rule and operating threshold; "" without a rule."""
        found = self.results.get("operating") or {}
        return found.get("rule") or "", found.get("threshold")

    @property
    def imported(self) -> Mapping[str, Any]:
        """What is known of weights that another program trained; else empty."""
        return self.results["run"].get("imported") or {}

    @property
    def training(self) -> Mapping[str, Any]:
        """How far it was trained; empty for maps."""
        return self.results["run"].get("training") or {}


def read(folders: Sequence[pathlib.Path], set_name: str = "") -> list[Entry]:
    """Reads what is compared, and refuses what must not be.

    A set is known by its fingerprint (scans, labels, protocol): maps call theirs
    `test`, and a run names another store's after the folder.

    Args:
      folders: Workdirs.
      set_name: What at least one of them calls the set; "" = the one set that all have
        results of. Of several, the one with the same name in all.

    Returns:
      One entry per folder, in the order given.

    Raises:
      CompareError: If there are fewer than two, one comes twice, results are missing
        or damaged, or they are not of the same volumes and protocol.
      workdir.WorkdirError: If a JSON file is damaged.
    """
    if len(folders) < 2:
        raise CompareError(
            f"A comparison needs at least two runs or folders of maps, and "
            f"{len(folders)} is given. Name their workdirs: run.py compare A B."
        )
    resolved = [folder.resolve() for folder in folders]
    twice = sorted({str(one) for one in resolved if resolved.count(one) > 1})
    if twice:
        raise CompareError(f"{', '.join(twice)} is given twice. Name each run once.")
    chosen = _shared_sets(folders, set_name)
    names = short_names(resolved)
    entries = [
        _read_entry(name, folder, own, chosen[0])
        for name, folder, own in zip(names, folders, chosen, strict=True)
    ]
    _refuse_different_sets(entries)
    return entries


def short_names(folders: Sequence[pathlib.Path]) -> list[str]:
    """Names of folders, with as many parents as it takes to tell them apart.

    Args:
      folders: Absolute paths, each once.
    """
    lengths = [1] * len(folders)
    while True:
        names = [
            "/".join(folder.parts[-length:])
            for folder, length in zip(folders, lengths, strict=True)
        ]
        equal = [names.count(name) > 1 for name in names]
        if not any(equal):
            return names
        lengths = [n + same for n, same in zip(lengths, equal, strict=True)]


def value(row: Row, column: str) -> float:
    """A number of a line; NaN where there is none."""
    text = row.get(column) or ""
    try:
        return float(text)
    except ValueError:
        return math.nan


def lesion_values(
    rows: Mapping[str, Row], column: str
) -> tuple[dict[str, float], dict[str, str]]:
    """A column for the volumes with an annotated lesion.

    Returns:
      Subject -> value, and subject -> patient.
    """
    lesions = {
        subject: row
        for subject, row in rows.items()
        if row["label"] == "abnormal" and not math.isnan(value(row, "ap"))
    }
    return _column(lesions, column)


def healthy_values(
    rows: Mapping[str, Row], column: str
) -> tuple[dict[str, float], dict[str, str]]:
    """A column for the healthy volumes that have it.

    Returns:
      Subject -> value, and subject -> patient.
    """
    return _column(
        {
            subject: row
            for subject, row in rows.items()
            if row["label"] == "healthy" and not math.isnan(value(row, column))
        },
        column,
    )


def _column(
    rows: Mapping[str, Row], column: str
) -> tuple[dict[str, float], dict[str, str]]:
    values = {subject: value(row, column) for subject, row in rows.items()}
    return values, {subject: row["patient"] for subject, row in rows.items()}


def _fingerprints(folder: pathlib.Path) -> dict[str, str]:
    """Set -> fingerprint of its results; "" where the file does not say."""
    found = {}
    for path in sorted((folder / "results").glob("*.json")):
        if not path.with_name(f"{path.stem}_subjects.csv").exists():
            continue
        try:
            found[path.stem] = str(workdir_lib.read_json(path)["set"]["fingerprint"])
        except (workdir_lib.WorkdirError, LookupError, TypeError):
            found[path.stem] = ""  # refused when this set is the one to be read
    return found


def _shared_sets(folders: Sequence[pathlib.Path], set_name: str) -> tuple[str, ...]:
    """What each folder calls the one set that all have results of."""
    found = [_fingerprints(folder) for folder in folders]
    matches = _matches(found, set_name)
    if not matches:  # what has one name is read: the error then says what differs
        shared = set.intersection(*(set(names) for names in found))
        matches = [
            (name,) * len(folders) for name in sorted(shared) if set_name in ("", name)
        ]
    matches = [names for names in matches if len({*names}) == 1] or matches
    if len(matches) == 1:
        return matches[0]
    lines = [
        f"  {folder}: {', '.join(names) or 'none'}"
        for folder, names in zip(folders, found, strict=True)
    ]
    called = f" called {set_name!r}" if set_name else ""
    if matches:
        choice = {name for names in matches for name in names} - {set_name}
        trouble = f"Several sets{called} were evaluated in all of them:"
        remedy = f"Choose one with --set: {', '.join(sorted(choice))}."
    else:
        trouble = f"There is no set{called} that all of them were evaluated on:"
        remedy = _remedy(folders)
    raise CompareError("\n".join([trouble, *lines, remedy]))


def _matches(
    found: Sequence[Mapping[str, str]], set_name: str
) -> list[tuple[str, ...]]:
    """What each folder calls a set, for sets with one fingerprint in all of them.

    Args:
      found: Of each folder, set -> fingerprint.
      set_name: What at least one of them calls it; "" = any.
    """
    matches: list[tuple[str, ...]] = []
    for mark in sorted(set.intersection(*({*one.values()} for one in found)) - {""}):
        same = [[name for name, own in one.items() if own == mark] for one in found]
        for call in sorted({name for names in same for name in names}):
            names = [[call] if call in own else own for own in same]
            if set_name in ("", call) and all(len(own) == 1 for own in names):
                matches.append(tuple(own[0] for own in names))
    return sorted(set(matches))


def _remedy(folders: Sequence[pathlib.Path]) -> str:
    """The commands that give all of them results of one set."""
    commands = {
        "maps": "run.py evaluate --workdir=DIR --maps=MAPS --store=STORE",
        "checkpoint": "run.py evaluate --workdir=DIR --data=STORE",
    }
    needed = sorted({_source(folder) for folder in folders})
    listed = "; ".join(
        f"{'maps' if source == 'maps' else 'a run'}: {commands[source]}"
        for source in needed
    )
    return f"Evaluate all of them on one store with one --protocol ({listed})."


def _source(folder: pathlib.Path) -> str:
    for path in sorted((folder / "results").glob("*.json")):
        try:
            if workdir_lib.read_json(path)["run"]["source"] == "maps":
                return "maps"
        except (workdir_lib.WorkdirError, LookupError, TypeError):
            continue
    return "checkpoint"


def _read_entry(
    name: str, folder: pathlib.Path, set_name: str, first_name: str
) -> Entry:
    path = folder / "results" / f"{set_name}.json"
    results = workdir_lib.read_json(path)
    _check_results(path, results)
    rows = _read_rows(path.with_name(f"{set_name}_subjects.csv"))
    scorer, fingerprint = results["run"]["name"], results["set"]["fingerprint"]
    if scorer not in rows:
        raise CompareError(
            f"{path.with_name(f'{set_name}_subjects.csv')} has no line of {scorer!r}. "
            "Evaluate the run again."
        )
    by_step, notes = _read_by_step(path.parent, set_name, fingerprint)
    found, store, more = _read_found(path.parent, set_name, fingerprint)
    if set_name != first_name:
        notes.append(f"These scans are its set {set_name!r}.")
    return Entry(
        name=name,
        folder=folder,
        results=results,
        rows=rows,
        by_step=by_step,
        lines=writer.read_metrics(folder),
        device="" if results["run"].get("imported") else _device(folder),
        found=found,
        store=store,
        notes=(*notes, *more),
    )


def _check_results(path: pathlib.Path, results: Any) -> None:
    try:
        complete = (
            results["set"]["fingerprint"]
            and results["set"]["protocol"]
            and results["scorers"][results["run"]["name"]]
        )
    except (KeyError, TypeError):
        complete = False
    if not complete:
        raise CompareError(
            f"{path} does not say on which volumes it was made (set fingerprint, "
            "protocol, scorers): an older version wrote it. Evaluate the run again."
        )


def _read_table(path: pathlib.Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError as error:
        raise CompareError(f"{path} is missing. Evaluate the run again.") from error
    except (OSError, ValueError, csv.Error) as error:
        raise CompareError(
            f"{path} is damaged: {error}. Evaluate the run again."
        ) from error


def _read_rows(path: pathlib.Path) -> dict[str, dict[str, Row]]:
    rows: dict[str, dict[str, Row]] = {}
    for number, row in enumerate(_read_table(path), start=2):
        absent = [name for name in _NEEDED if row.get(name) is None]
        if absent:
            raise CompareError(
                f"{path} is damaged: line {number} has no {', '.join(absent)}. "
                "Evaluate the run again."
            )
        rows.setdefault(row["scorer"], {})[row["subject"]] = row
    return rows


def _read_by_step(
    folder: pathlib.Path, set_name: str, fingerprint: str
) -> tuple[list[Row], list[str]]:
    path = folder / "by_step.csv"
    if not path.exists():
        return [], []
    mine = [row for row in _read_table(path) if row.get("set") == set_name]
    fresh = [row for row in mine if row.get("fingerprint") == fingerprint]
    notes = []
    if len(fresh) < len(mine):
        notes.append(
            f"{len(mine) - len(fresh)} lines of by_step.csv are of other volumes or "
            "another protocol; they are left out of the curves."
        )
    return sorted(fresh, key=lambda row: value(row, "step")), notes


def _read_found(
    folder: pathlib.Path, set_name: str, fingerprint: str
) -> tuple[segmentations.Segmentations | None, str, list[str]]:
    path = folder / f"{set_name}_found.npz"
    if not path.exists():
        return None, "", ["There are no stored segmentations, so no pictures of it."]
    try:
        found, facts = segmentations.load(path)
    except segmentations.SegmentationsError as error:
        logging.warning("%s", error)  # the page names no folders
        note = "The stored segmentations are damaged, so no pictures of it."
        return None, "", [f"{note} Evaluate the run again."]
    if facts.get("fingerprint") != fingerprint:
        note = "The stored segmentations are of other volumes: no pictures of it."
        return None, "", [note]
    return found, facts.get("store", ""), []


def _device(folder: pathlib.Path) -> str:
    try:
        text = (folder / workdir_lib.ENVIRONMENT).read_text(encoding="utf-8")
        facts = json.loads(text)
        return f"{facts['num_devices']} x {facts['device_kind']}"
    except (OSError, ValueError, LookupError, TypeError):
        return ""  # maps, or a run whose env.json is gone: only a note is lost


def _refuse_different_sets(entries: Sequence[Entry]) -> None:
    """Raises one error with all that differs from the first entry."""
    first, *others = entries
    problems = []
    for other in others:
        problems += _differences(first, other)
    if problems:
        raise CompareError(
            "These cannot stand in one table:\n  "
            + "\n  ".join(problems)
            + f"\n{_remedy([entry.folder for entry in entries])}"
        )


def _differences(first: Entry, other: Entry) -> list[str]:
    problems = []
    protocols = [entry.results["set"]["protocol"] for entry in (first, other)]
    if protocols[0] != protocols[1]:
        problems.append(
            f"protocol: {protocols[0]} in {first.name}, {protocols[1]} in {other.name}"
        )
    ours, theirs = set(first.subjects), set(other.subjects)
    for entry, alone in ((first, ours - theirs), (other, theirs - ours)):
        if alone:
            problems.append(
                f"{len(alone)} subjects are only in {entry.name}: {_listed(alone)}"
            )
    prints = [entry.results["set"]["fingerprint"] for entry in (first, other)]
    if prints[0] != prints[1] and not problems:
        problems.append(
            f"the subjects of {first.name} and {other.name} have the same names but "
            f"other voxels or masks (fingerprints {prints[0][:12]}, {prints[1][:12]})"
        )
    return problems


def _listed(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN])
    more = len(names) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
