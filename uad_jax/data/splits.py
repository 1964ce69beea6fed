"""Which volume trains, validates and tests: by patient, and checked disjoint.

In order of precedence: `split_fold<k>` columns (published folds that no single fold
number can express), then `fold` and `split`, then shares drawn by a hash of the
patient.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

from uad_jax.data import manifest

# Shares of the patients when the manifest gives neither split nor fold.
HEALTHY_TEST = 0.15  # the other healthy patients form the folds: train and val
ABNORMAL_VAL = 0.2  # the other abnormal patients are the test set

FOLD_COLUMN = "split_fold"  # split_fold0, split_fold1, ...: "" = not in this fold
LEAK_COLUMN = "leak"  # "kept": a published leak that was asked for (--reference)


class Splittable(Protocol):
    """What a split depends on; SubjectFiles and VolumeInfo have it."""

    @property
    def subject(self) -> str:
        """Unique name."""

    @property
    def patient(self) -> str:
        """The person."""

    @property
    def label(self) -> str:
        """One of `manifest.LABELS`."""

    @property
    def split(self) -> str | None:
        """Given split, if any."""

    @property
    def fold(self) -> int | None:
        """Given validation fold, if any."""

    @property
    def extra(self) -> dict[str, str]:
        """Columns carried through."""


def assign(
    volumes: Sequence[Splittable],
    fold: int = 0,
    *,
    num_folds: int = 5,
    seed: int = 0,
    abnormal_in_train: bool = False,
) -> dict[str, str]:
    """Assigns every volume to train, val or test.

    `split=test` is always test. Of the rest, a volume with a `fold` is in val when it
    is this fold, else in train (if it is not healthy: in test); without a `fold`, its
    `split` counts. If no volume has either, healthy patients go to test (15 %), val
    (one of `num_folds` folds of the rest) and train, abnormal ones to val (20 %) and
    test, those with shams alone to test.

    Args:
      volumes: The volumes.
      fold: Validation fold.
      num_folds: Folds made when the volumes give none.
      seed: Seeds the hash that orders the patients.
      abnormal_in_train: Accepts abnormal volumes in train where `split` says so.

    Returns:
      Subject -> "train" | "val" | "test". A subject that `split_fold<k>` leaves out
      of this fold is absent.

    Raises:
      ValueError: A patient in two splits, an abnormal volume or a sham in train, a
        volume without a split among volumes with one, or a fold that does not exist.
    """
    column = f"{FOLD_COLUMN}{fold}"
    if any(name.startswith(FOLD_COLUMN) for v in volumes for name in v.extra):
        if not any(column in volume.extra for volume in volumes):
            raise ValueError(f"fold is {fold}, but there is no column {column!r}.")
        roles = {v.subject: v.extra.get(column, "") for v in volumes}
    elif any(v.split is not None or v.fold is not None for v in volumes):
        _check_fold(volumes, fold)
        roles = {volume.subject: _given(volume, fold) for volume in volumes}
        _check_complete(roles)
    else:
        roles = _draw(volumes, fold, num_folds, seed)
    roles = {subject: role for subject, role in roles.items() if role}
    _check(volumes, roles, abnormal_in_train)
    return roles


def folds(volumes: Sequence[Splittable], num_folds: int = 5) -> list[int]:
    """Lists the folds that `assign` knows for these volumes ([0] for plain splits)."""
    names = {name for v in volumes for name in v.extra if name.startswith(FOLD_COLUMN)}
    if names:
        return sorted(int(name.removeprefix(FOLD_COLUMN)) for name in names)
    given = {volume.fold for volume in volumes if volume.fold is not None}
    if given:
        return sorted(given)
    if any(volume.split is not None for volume in volumes):
        return [0]
    return list(range(max(1, min(num_folds, len(_healthy_rest(volumes, seed=0))))))


def duplicates(
    volumes: Sequence[Splittable], hashes: Mapping[str, str], **options: int
) -> tuple[list[str], list[str]]:
    """Finds images that occur under two subject names.

    Args:
      volumes: The volumes.
      hashes: Subject -> hash of the image's content.
      **options: `num_folds` and `seed` of `assign`.

    Returns:
      Errors (the same image in two splits of some fold under two patients, so that
      splitting by patient cannot keep it together) and warnings (the other pairs).
    """
    groups: dict[str, list[Splittable]] = {}
    for volume in volumes:
        if volume.subject in hashes:
            groups.setdefault(hashes[volume.subject], []).append(volume)
    groups = {key: group for key, group in groups.items() if len(group) > 1}
    if not groups:
        return [], []
    assigned = [
        assign(volumes, fold, abnormal_in_train=True, **options)
        for fold in folds(volumes, options.get("num_folds", 5))
    ]
    errors, warnings = [], []
    for group in groups.values():
        names = [volume.subject for volume in group]
        pairs = {
            " and ".join(sorted({roles[name] for name in names if name in roles}))
            for roles in assigned
        }
        leaks = sorted(pair for pair in pairs if " and " in pair)
        kept = len({volume.patient for volume in group}) == 1
        text = f"the same image is given for {', '.join(names)}"
        if leaks and not kept:
            errors.append(
                f"{text}, in {'; '.join(leaks)}. Remove all but one, or give them "
                "the same `patient`."
            )
        else:
            warnings.append(f"{text}; it counts {len(names)} times.")
    return errors, warnings


def check_duplicates(
    volumes: Sequence[Splittable], hashes: Mapping[str, str], **options: int
) -> None:
    """Raises ValueError if one image is in two splits (see `duplicates`)."""
    errors, _ = duplicates(volumes, hashes, **options)
    manifest.fail("the subjects", errors)


def _given(volume: Splittable, fold: int) -> str:
    if volume.split == "test" or volume.fold is None:
        return volume.split or ""
    if volume.fold == fold:
        return "val"
    return "train" if volume.label == "healthy" else "test"


def _draw(
    volumes: Sequence[Splittable], fold: int, num_folds: int, seed: int
) -> dict[str, str]:
    """Draws the splits by a hash of the patient, with exact shares."""
    rest = _healthy_rest(volumes, seed)
    count = max(1, min(num_folds, len(rest)))
    if rest and not 0 <= fold < count:  # without healthy patients there are no folds
        raise ValueError(
            f"fold is {fold}, but {len(rest)} healthy patients make {count} fold(s)."
        )
    abnormal = _ordered({v.patient for v in volumes if v.label == "abnormal"}, seed)
    validating = max(1, round(ABNORMAL_VAL * len(abnormal))) if abnormal[1:] else 0
    role_of = dict.fromkeys((volume.patient for volume in volumes), "test")
    for rank, patient in enumerate(rest):
        held_out = len(rest) > 1 and rank % count == fold
        role_of[patient] = "val" if held_out else "train"
    role_of.update(dict.fromkeys(abnormal[:validating], "val"))
    return {volume.subject: role_of[volume.patient] for volume in volumes}


def _healthy_rest(volumes: Sequence[Splittable], seed: int) -> list[str]:
    """Healthy patients that are not drawn for test, in hash order."""
    others = {v.patient for v in volumes if v.label != "healthy"}
    healthy = _ordered({v.patient for v in volumes} - others, seed)
    testing = max(1, round(HEALTHY_TEST * len(healthy))) if healthy[2:] else 0
    return healthy[testing:]


def _ordered(patients: set[str], seed: int) -> list[str]:
    def rank(patient: str) -> str:
        return hashlib.sha256(f"{seed}:{patient}".encode()).hexdigest()

    return sorted(patients, key=rank)


def _check_fold(volumes: Sequence[Splittable], fold: int) -> None:
    given = sorted({volume.fold for volume in volumes if volume.fold is not None})
    if given and fold not in given:
        raise ValueError(f"fold is {fold}, but the folds given are {given}.")


def _check_complete(roles: Mapping[str, str]) -> None:
    open_roles = [subject for subject, role in roles.items() if not role]
    if open_roles:
        raise ValueError(
            f"{len(open_roles)} of {len(roles)} subjects have neither split nor fold "
            f"({_some(open_roles)}), the others have. Give all of them one, or none."
        )


def _check(
    volumes: Sequence[Splittable], roles: Mapping[str, str], abnormal_in_train: bool
) -> None:
    problems = []
    unknown = sorted(set(roles.values()) - set(manifest.SPLITS))
    if unknown:
        problems.append(f"splits {unknown}; expected {', '.join(manifest.SPLITS)}.")
    seen: dict[str, set[str]] = {}
    for volume in volumes:
        kept = volume.extra.get(LEAK_COLUMN) == "kept"
        if volume.subject in roles and not kept:
            seen.setdefault(volume.patient, set()).add(roles[volume.subject])
    problems += [
        f"patient {patient!r} is in {' and '.join(sorted(splits))}. All scans of a "
        "patient belong to one split."
        for patient, splits in seen.items()
        if len(splits) > 1
    ]
    sick = [
        v.subject
        for v in volumes
        if v.label == "abnormal" and roles.get(v.subject) == "train"
    ]
    if sick and not abnormal_in_train:
        problems.append(
            f"{len(sick)} abnormal subject(s) in train ({_some(sick)}): training is on "
            "healthy subjects. Use split val or test."
        )
    shams = [
        v.subject
        for v in volumes
        if v.label == "sham" and roles.get(v.subject) == "train"
    ]
    if shams:
        problems.append(
            f"{len(shams)} sham(s) in train ({_some(shams)}): they never train. Use "
            "split val or test."
        )
    manifest.fail("the splits", problems)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
