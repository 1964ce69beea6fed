"""`run.py prepare` and `run.py check-data`: from scans to a store of slices."""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import tqdm

from uad_jax.data import (
    builder,
    check,
    datasets,
    examine,
    manifest,
    nifti,
    preprocess,
    recipes,
    sources,
    splits,
)
from uad_jax.data.manifest import SubjectFiles
from uad_jax.ops import intensity

_SERIAL_SECONDS = 6.0  # shorter work is done before the processes have started


def prepare(
    source: str,
    store: Path,
    recipe_name: str = "grid2mm",
    *,
    modality: str = "",
    workers: int | None = None,
    ignore_affine: bool = False,
    nan_to_zero: bool = False,
    assume_orientation: str = "",
    reference: bool = False,
) -> dict[str, Any]:
    """Checks all scans, prepares them and writes the store; prints what it does.

    Done again on the same scans it does nothing. Nothing is written if any file is
    bad: then all bad files are listed.

    Args:
      source: A folder, a manifest.csv, or `<row of DATASETS>:<root>`.
      store: Directory to write.
      recipe_name: Key in `preprocess.RECIPES`.
      modality: Modalities to take, comma-separated; "" = all. See `datasets.load`.
      workers: Processes; None = all cores, 0 = this process.
      ignore_affine: Accepts masks of the image's shape whose affine differs.
      nan_to_zero: Makes NaN and Inf voxels 0.
      assume_orientation: Axis codes ("RAS") for files without an orientation.
      reference: Keeps the repeated rows and leaks of published split lists.

    Returns:
      Numbers about the store: volumes, slices, bytes, seconds, splits, and whether
      it was there before.

    Raises:
      ValueError: Lists every problem that prevents the preparation.
    """
    begin = time.monotonic()
    if recipe_name not in preprocess.RECIPES:
        raise ValueError(
            f"There is no recipe {recipe_name!r}."
            f"{manifest.nearest(recipe_name, preprocess.RECIPES)} "
            f"Known: {', '.join(preprocess.RECIPES)}."
        )
    recipe = preprocess.RECIPES[recipe_name]
    reading = examine.Reading(
        ignore_affine=ignore_affine,
        nan_to_zero=nan_to_zero,
        assume_orientation=assume_orientation,
    )
    subjects = datasets.load(source, modality=modality, reference=reference)
    key = {
        "recipe_hash": preprocess.recipe_hash(recipe),
        "source_hash": source_hash(subjects, reading),
    }
    there = _is_current(store, key)
    if not there:
        _check(subjects, reading, workers)
        workers = _announce(subjects, recipe, reading, workers)
    scans = [_source(subject, recipe, reading) for subject in subjects]
    with _Progress("prepare") as progress:
        builder.build_from(
            scans,
            store,
            recipe=recipes.to_json(recipe),
            **key,
            workers=workers,
            progress=progress.show,
        )
    summary = _summary(store, time.monotonic() - begin, there)
    print(_text(summary, store))
    return summary


def check_data(
    source: str,
    *,
    modality: str = "",
    workers: int | None = None,
    ignore_affine: bool = False,
    nan_to_zero: bool = False,
    assume_orientation: str = "",
    reference: bool = False,
) -> int:
    """Prints the data doctor's table.

    Args:
      source: As all others, see `prepare`.
      modality: See `prepare`.
      workers: See `prepare`.
      ignore_affine: See `prepare`.
      nan_to_zero: See `prepare`.
      assume_orientation: See `prepare`.
      reference: See `prepare`.

    Returns:
      Exit status: 1 if there are errors, else 0.

    Raises:
      ValueError: The list of subjects itself is wrong.
    """
    reading = examine.Reading(
        ignore_affine=ignore_affine,
        nan_to_zero=nan_to_zero,
        assume_orientation=assume_orientation,
    )
    subjects = datasets.load(source, modality=modality, reference=reference)
    with _Progress("check") as progress:
        problems = check.check(
            subjects, reading=reading, workers=workers, progress=progress.show
        )
    print(check.render(problems, subjects))
    return int(check.has_errors(problems))


def source_hash(subjects: Sequence[SubjectFiles], reading: examine.Reading) -> str:
    """Identifies what a store is made from: the files' bytes, labels and splits.

    Names of folders do not count, so a data set may move.

    Args:
      subjects: The subjects.
      reading: How the files are read.

    Returns:
      64 hex digits.
    """
    files = sorted({path for subject in subjects for path in subject.files()})
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        digests = tqdm.tqdm(
            pool.map(sources.sha256, files),
            total=len(files),
            desc="hash",
            unit="file",
            delay=2,
            disable=None,
        )
        hashes = dict(zip(files, digests, strict=True))
    rows = [
        {
            **dataclasses.asdict(subject),
            "images": {name: hashes[path] for name, path in subject.images.items()},
            "brain_mask": hashes.get(subject.brain_mask) if subject.brain_mask else "",
            "lesion_mask": (
                hashes.get(subject.lesion_mask) if subject.lesion_mask else ""
            ),
        }
        for subject in sorted(subjects, key=lambda subject: subject.subject)
    ]
    text = json.dumps([rows, dataclasses.asdict(reading)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def load(
    subject: SubjectFiles, recipe: preprocess.Recipe, reading: examine.Reading
) -> preprocess.Prepared:
    """Reads the files of one subject and prepares them.

    Args:
      subject: The subject.
      recipe: The recipe.
      reading: How the files are read.

    Returns:
      The subject on the model grid, one channel per modality in the order of
      `subject.images`.

    Raises:
      nifti.NiftiError: A file cannot be used.
    """
    orientation = reading.assume_orientation
    with examine.quiet():
        images = {
            name: nifti.read_image(
                path, reading.nan_to_zero, assume_orientation=orientation
            )
            for name, path in subject.images.items()
        }
        brain, lesion = (
            nifti.read_mask(path, assume_orientation=orientation) if path else None
            for path in (subject.brain_mask, subject.lesion_mask)
        )
        return preprocess.apply(
            recipe, images, brain, lesion, ignore_affine=reading.ignore_affine
        )


def _source(
    subject: SubjectFiles, recipe: preprocess.Recipe, reading: examine.Reading
) -> builder.Source:
    return builder.Source(
        subject=subject.subject,
        load=functools.partial(load, subject, recipe, reading),
        modalities=tuple(subject.images),
        patient=subject.patient,
        label=subject.label,
        annotated=subject.lesion_mask is not None or subject.label == "healthy",
        split=subject.split,
        fold=subject.fold,
        licence=subject.licence,
        extra=subject.extra,
    )


def _is_current(store: Path, key: dict[str, str]) -> bool:
    try:
        meta = sources.read_meta(store)
    except sources.StoreError:
        return False
    return all(meta.get(name) == value for name, value in key.items())


def _check(
    subjects: Sequence[SubjectFiles], reading: examine.Reading, workers: int | None
) -> None:
    """Runs the doctor; prints its table, or raises it if it holds errors."""
    with _Progress("check") as progress:
        problems = check.check(
            subjects, reading=reading, workers=workers, progress=progress.show
        )
    text = check.render(problems, subjects, notes=False)
    if check.has_errors(problems):
        raise ValueError(f"Nothing was written. {text}")
    print(text, flush=True)


def _announce(
    subjects: Sequence[SubjectFiles],
    recipe: preprocess.Recipe,
    reading: examine.Reading,
    workers: int | None,
) -> int:
    """Times one subject, prints what is to come, and chooses the processes."""
    begin = time.monotonic()
    first = load(subjects[0], recipe, reading)
    seconds = (time.monotonic() - begin) * len(subjects)
    codes, _ = intensity.encode(first.image)
    size = len(zlib.compress(codes.tobytes(), level=1)) * len(subjects)
    cores = os.cpu_count() or 1 if workers is None else workers
    cores = cores if seconds > _SERIAL_SECONDS else 0
    depth, height, width, channels = first.image.shape
    processes = max(1, min(cores, len(subjects)))
    print(
        f"Recipe {recipe.name}: {len(subjects)} scans to {depth} slices of "
        f"{height} x {width} x {channels} each; about "
        f"{_duration(seconds / processes)} with {processes} process(es), about "
        f"{_size(size)}.",
        flush=True,
    )
    return cores


def _summary(store: Path, seconds: float, there: bool) -> dict[str, Any]:
    opened = sources.Store.open(store)
    fold = splits.folds(opened.volumes)[0]
    roles = collections.Counter(splits.assign(opened.volumes, fold).values())
    files = [path for path in store.rglob("*") if path.is_file()]
    return {
        "volumes": len(opened.volumes),
        "slices": sum(volume.depth for volume in opened.volumes),
        "modalities": list(opened.modalities),
        "bytes": sum(path.stat().st_size for path in files),
        "seconds": seconds,
        "fold": fold,
        "splits": {name: roles[name] for name in manifest.SPLITS},
        "there": there,
    }


def _text(summary: dict[str, Any], store: Path) -> str:
    found = ", ".join(f"{n} {name}" for name, n in summary["splits"].items())
    verb = "was there already; nothing to do" if summary["there"] else "is ready"
    lines = [
        f"{store} {verb}: {summary['volumes']} volumes ({found}; fold "
        f"{summary['fold']}), {summary['slices']} slices of "
        f"{', '.join(summary['modalities'])}, {_size(summary['bytes'])}, "
        f"{_duration(summary['seconds'])}.",
    ]
    if summary["splits"]["train"]:
        word = ",cpu" if jax.default_backend() == "cpu" else ""
        fold = f" --config.data.fold={summary['fold']}" if summary["fold"] else ""
        lines.append(
            "Train on it: python run.py train "
            f"--config=configs/autoencoder.py:variant=vae{word} "
            f"--config.data.store={store}{fold} --workdir=runs/vae"
        )
    else:
        lines.append(
            "It holds nothing to train on. Evaluate a trained run on it: "
            f"python run.py evaluate --store={store} --workdir=runs/vae"
        )
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _size(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


class _Progress:
    """A bar over scans with ETA and throughput, on a terminal only."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._bar: tqdm.tqdm | None = None

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, done: int, total: int, subject: str) -> None:
        """Moves the bar; it appears with the first scan."""
        if self._bar is None:
            self._bar = tqdm.tqdm(
                total=total, desc=self._name, unit="scan", disable=None
            )
        self._bar.set_postfix_str(subject, refresh=False)
        self._bar.update(done - self._bar.n)
