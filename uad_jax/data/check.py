"""The data doctor: reads every file of a data set and lists all that is wrong.

Nothing stops at the first problem. An error means that the subject cannot be prepared
or would give wrong results; a warning means that somebody should look; a note only
states what was done. `examine` looks at one subject; here they are compared.
"""

import collections
import concurrent.futures
import functools
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from uad_jax.data import examine, profile, splits
from uad_jax.data.examine import Findings, Problem, Reading, Severity
from uad_jax.data.manifest import SubjectFiles

Progress = Callable[[int, int, str], None]  # subjects done, in all, name of the last

_SERIAL_SECONDS = 3.0  # longer work is worth starting processes for
_MIN_PEERS = 8  # fewer images of a modality say nothing about an outlier
_OUTLIER = 5.0  # robust standard deviations; T1 of other scanners stays below 3
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.]*\w)")


def check(
    subjects: Sequence[SubjectFiles],
    *,
    reading: Reading | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Problem]:
    """Reads all files and collects all problems.

    Args:
      subjects: The subjects.
      reading: How files are read; None = strictly.
      workers: Processes; None = all cores, 0 = this process.
      progress: Called after every subject.

    Returns:
      The problems, errors first, in the order of the subjects.
    """
    examine_one = functools.partial(examine.examine, reading=reading or Reading())
    findings: dict[str, Findings] = {}
    for subject, found in zip(
        subjects, _map(examine_one, subjects, workers), strict=True
    ):
        findings[subject.subject] = found
        if progress is not None:
            progress(len(findings), len(subjects), subject.subject)
    problems = [problem for found in findings.values() for problem in found.problems]
    problems += _split_problems(subjects, findings)
    problems += _outliers(subjects, findings)
    problems += _missing_modalities(subjects)
    order = list(Severity)
    return sorted(problems, key=lambda problem: order.index(problem.severity))


def _split_problems(
    subjects: Sequence[SubjectFiles], findings: Mapping[str, Findings]
) -> Iterator[Problem]:
    """Leaks by patient, and the same image under two names."""
    try:
        for fold in splits.folds(subjects):
            splits.assign(subjects, fold)
    except ValueError as error:
        yield Problem(severity=Severity.ERROR, message=str(error))
        return
    seen = set()
    for modality in sorted({name for subject in subjects for name in subject.images}):
        hashes = {
            name: found.hashes[modality]
            for name, found in findings.items()
            if modality in found.hashes
        }
        errors, warnings = splits.duplicates(subjects, hashes)
        for severity, texts in ((Severity.ERROR, errors), (Severity.WARNING, warnings)):
            for text in texts:
                if text not in seen:
                    yield Problem(severity=severity, message=text)
                seen.add(text)


def _outliers(
    subjects: Sequence[SubjectFiles], findings: Mapping[str, Findings]
) -> Iterator[Problem]:
    """Images whose intensities are unlike the others of their modality."""
    paths = {subject.subject: subject.images for subject in subjects}
    for modality in sorted({name for subject in subjects for name in subject.images}):
        prints = {
            name: found.fingerprints[modality]
            for name, found in findings.items()
            if modality in found.fingerprints
        }
        if len(prints) < _MIN_PEERS:
            continue
        usual = profile.of(list(prints.values()))
        for name, found in prints.items():
            score = usual.distance(found)
            if score > _OUTLIER:
                yield Problem(
                    severity=Severity.WARNING,
                    message=(
                        f"its intensities are unlike those of the other {modality} "
                        f"images (distance {score:.0f}, usual below {_OUTLIER:.0f}). "
                        "Is it another modality, or not skull-stripped?"
                    ),
                    subject=name,
                    path=paths[name][modality],
                )


def _missing_modalities(subjects: Sequence[SubjectFiles]) -> Iterator[Problem]:
    counts = collections.Counter(name for s in subjects for name in s.images)
    for modality, count in sorted(counts.items()):
        if count < len(subjects):
            lacking = [s.subject for s in subjects if modality not in s.images]
            yield Problem(
                severity=Severity.NOTE,
                message=(
                    f"{len(lacking)} of {len(subjects)} subjects have no {modality} "
                    f"({_some(lacking)}); runs that use it leave them out."
                ),
            )


def _map(
    function: Callable[[SubjectFiles], Findings],
    subjects: Sequence[SubjectFiles],
    workers: int | None,
) -> Iterator[Findings]:
    """Maps in order; a short job stays in this process."""
    workers = os.cpu_count() or 1 if workers is None else workers
    begin = time.monotonic()
    position = 0
    while position < len(subjects) and (
        workers < 2 or time.monotonic() - begin < _SERIAL_SECONDS
    ):
        yield function(subjects[position])
        position += 1
    if position == len(subjects):
        return
    # Spawned, because forking a process that runs JAX's threads can deadlock.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        try:
            yield from pool.map(function, subjects[position:])
        finally:
            pool.shutdown(cancel_futures=True)


def has_errors(problems: Sequence[Problem]) -> bool:
    """Whether any problem is an error."""
    return any(problem.severity is Severity.ERROR for problem in problems)


def render(
    problems: Sequence[Problem],
    subjects: Sequence[SubjectFiles],
    *,
    notes: bool = True,
) -> str:
    """Renders the table for people; warnings and notes of one kind share a line.

    Args:
      problems: From `check`.
      subjects: What was checked.
      notes: Whether notes are listed, not only counted.

    Returns:
      Text of several lines, the summary first.
    """
    counts = collections.Counter(problem.severity for problem in problems)
    files = sum(len(subject.files()) for subject in subjects)
    summary = ", ".join(
        f"{counts[severity]} {severity.value}{'' if counts[severity] == 1 else 's'}"
        for severity in Severity
    )
    lines = [f"Checked {len(subjects)} subjects, {files} files: {summary}."]
    groups: dict[tuple[Severity, str], list[Problem]] = {}
    for problem in problems:
        labels = problem.message.startswith("Mask:")
        exact = labels or problem.severity is Severity.ERROR
        kind = problem.message if exact else _NUMBER.sub("#", problem.message)
        groups.setdefault((problem.severity, kind), []).append(problem)
    for (severity, _), group in groups.items():
        if severity is Severity.NOTE and not notes:
            continue
        lines.append(f"{severity.value.upper():7} {_merged(group)}")
        named = [
            f"{problem.subject} ({problem.path})" if problem.path else problem.subject
            for problem in group
            if problem.subject
        ]
        if severity is Severity.ERROR:
            lines += [f"        {name}" for name in named]
        elif named:
            lines.append(f"        {_some(named)}")
    if counts[Severity.NOTE] and not notes:
        lines.append("`run.py check-data` lists the notes.")
    return "\n".join(lines)


def _merged(group: Sequence[Problem]) -> str:
    """One message for several that differ in numbers only: "2 to 7 voxels"."""
    messages = sorted({problem.message for problem in group})
    columns = zip(*(_NUMBER.findall(message) for message in messages), strict=True)
    ranges = []
    for column in columns:
        low, high = min(column, key=float), max(column, key=float)
        ranges.append(low if low == high else f"{low} to {high}")
    found = iter(ranges)
    return _NUMBER.sub(lambda _: next(found), messages[0])


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
