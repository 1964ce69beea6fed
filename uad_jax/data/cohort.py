"""The embedded synthetic cohort: brains with known lesions, from a seed alone.

Not patients and not a benchmark: it shows that a pipeline works, and it measures
methods against a truth that is exact. Order of operations per subject: soft tissue
maps, folds, bright spots of the healthy, lesion, intensities, point spread, one warp
shared by all images and masks, slices, bias, noise.

Four Philox streams per subject (geometry, contrast, lesion, noise) make the same seed
without its lesion the subject's healthy twin: equal wherever the lesion does not
reach (one or two voxels beyond it). A tumour's mass effect moves the tissue around
it, so its twin differs there too.
"""

import concurrent.futures
import contextlib
import csv
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
from collections.abc import Iterator

import nibabel as nib
import numpy as np
import tqdm

from uad_jax.data import anatomy, lesions, scanner, warp

VERSION = 1  # raised with every change of what a seed gives; results name it
LICENCE = "synthetic; anatomy derived from ICBM152 2009a (McGill notice)"
_TRAINED_SCANNERS = ("A", "B", "C")
_STREAMS = ("geometry", "contrast", "lesion", "noise")
_DONE = "cohort.json"


@dataclasses.dataclass
class CohortConfig:
    """How many subjects of which kind, and the images written of each.

    Attributes:
      seed: Seed of the whole cohort.
      modalities: Comma-separated, of "t1", "t2", "flair".
      kinds: Diseases, comma-separated, of "ms", "tumour", "stroke".
      train: Healthy training subjects.
      val_healthy: Healthy validation subjects.
      val_per_kind: Validation subjects with each disease.
      test_healthy: Healthy test subjects.
      test_per_kind: Test subjects with each disease.
      unseen_healthy: Further healthy test subjects on scanner D.
      unseen_per_kind: Further test subjects with each disease on scanner D.
      twins: Also write the healthy twin of every test subject with a disease
        (split "test", label healthy, column twin_of).
    """

    seed: int = 0
    modalities: str = "t1,t2,flair"
    kinds: str = "ms,tumour,stroke"
    train: int = 60
    val_healthy: int = 8
    val_per_kind: int = 4
    test_healthy: int = 12
    test_per_kind: int = 8
    unseen_healthy: int = 0
    unseen_per_kind: int = 0
    twins: bool = False

    def validate(self) -> None:
        """Raises ValueError that lists every unusable field."""
        problems = []
        for name, allowed in (
            ("modalities", scanner.MODALITIES),
            ("kinds", _disease_names()),
        ):
            words = _words(getattr(self, name))
            if not words or len(set(words)) < len(words) or set(words) - set(allowed):
                problems.append(
                    f"{name}={getattr(self, name)!r}: expected some of "
                    f"{', '.join(allowed)}, each once, separated by commas"
                )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 0:
                problems.append(f"{field.name}={value}: expected 0 or more")
        if not problems and not plan(self):
            problems.append("no subjects: set at least one count above 0")
        if problems:
            raise ValueError("Cohort: " + "; ".join(problems) + ".")

    def key(self) -> str:
        """Hash of the parameters and the version, 16 hexadecimal digits."""
        text = json.dumps([VERSION, dataclasses.asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """One generated subject.

    Attributes:
      images: Modality to [X, Y, Z] int16, 0 outside the brain.
      brain: [X, Y, Z] bool.
      lesion: [X, Y, Z] bool, empty for a healthy subject.
      affine: Voxel index to world RAS mm, [4, 4] float64.
      scanner: Name of the scanner.
    """

    images: dict[str, np.ndarray]
    brain: np.ndarray
    lesion: np.ndarray
    affine: np.ndarray
    scanner: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the plan: who is generated, and for which split."""

    subject: str
    patient: str
    seed: int
    kind: lesions.Kind
    split: str
    scanner: str | None
    twin_of: str = ""


def make_subject(
    seed: int,
    kind: lesions.Kind = lesions.Kind.HEALTHY,
    modalities: tuple[str, ...] = scanner.MODALITIES,
    scanner_name: str | None = None,
) -> Subject:
    """Generates one subject; the same arguments give the same arrays.

    Args:
      seed: Everything about the subject. With another `kind` it is the same head.
      kind: Disease.
      modalities: Images to make; one does not change the others.
      scanner_name: "A" to "D"; None draws A, B or C from the seed.

    Returns:
      The subject on the 2 mm grid of 96 x 96 x 80 voxels, RAS.
    """
    streams = dict(
        zip(_STREAMS, np.random.SeedSequence(seed).spawn(len(_STREAMS)), strict=True)
    )
    geometry = _generator(streams["geometry"])
    if scanner_name is None:
        scanner_name = str(geometry.choice(_TRAINED_SCANNERS))
    else:
        geometry.choice(_TRAINED_SCANNERS)  # the head is the same on every scanner
    site = scanner.SCANNERS[scanner_name]
    base = anatomy.template()
    maps = anatomy.refold(base, geometry)
    shape = warp.draw(base, geometry)
    layers = lesions.harmless(base, maps, geometry)
    lesion = lesions.draw(kind, base, maps, _generator(streams["lesion"]))
    extent = np.zeros(base.shape, np.float32)
    if lesion is not None:
        layers += lesion.layers
        extent = lesion.extent
        if lesion.push is not None:
            shape = warp.push_away(base, shape, lesion.push)

    brain = anatomy.strip_skull(shape.pull(base, maps.sum(0)), geometry)
    images = {}
    contrasts = streams["contrast"].spawn(len(scanner.MODALITIES))
    noises = streams["noise"].spawn(len(scanner.MODALITIES))
    for modality in modalities:
        number = scanner.MODALITIES.index(modality)
        image = scanner.tissue_image(
            maps, layers, modality, site, _generator(contrasts[number])
        )
        image = shape.pull(base, image)
        images[modality] = scanner.acquire(
            image, brain, site, _generator(noises[number])
        )
    mask = (shape.pull(base, extent) > 0.5) & brain
    return Subject(
        images=images,
        brain=brain,
        lesion=mask,
        affine=base.affine,
        scanner=scanner_name,
    )


def plan(config: CohortConfig) -> list[Entry]:
    """Lists the subjects of a cohort, in the order of the manifest."""
    diseases = [lesions.Kind(word) for word in _words(config.kinds)]
    groups: list[tuple[str, str | None, lesions.Kind, int]]
    groups = [("train", None, lesions.Kind.HEALTHY, config.train)]
    for split, name, healthy, sick in (
        ("val", None, config.val_healthy, config.val_per_kind),
        ("test", None, config.test_healthy, config.test_per_kind),
        ("test", "D", config.unseen_healthy, config.unseen_per_kind),
    ):
        groups.append((split, name, lesions.Kind.HEALTHY, healthy))
        groups += [(split, name, kind, sick) for kind in diseases]
    entries = []
    for group, (split, name, kind, count) in enumerate(groups):
        for number in range(count):
            # One more subject in a group changes no other subject.
            state = np.random.SeedSequence([config.seed, group, number])
            subject = f"{split}{name or ''}_{kind.value}_{number:03d}"
            entry = Entry(
                subject=subject,
                patient=subject,
                seed=int(state.generate_state(1, np.uint64)[0]),
                kind=kind,
                split=split,
                scanner=name,
            )
            entries.append(entry)
            if config.twins and split == "test" and kind is not lesions.Kind.HEALTHY:
                twin = dataclasses.replace(
                    entry,
                    subject=f"{subject}_twin",
                    kind=lesions.Kind.HEALTHY,
                    twin_of=subject,
                )
                entries.append(twin)
    return entries


def write_cohort(
    config: CohortConfig,
    directory: pathlib.Path,
    workers: int | None = None,
    progress: bool = True,
) -> pathlib.Path:
    """Writes a cohort as NIfTI files and a manifest; a second call does nothing.

    The folder appears under its name only when it is complete.

    Args:
      config: What to generate.
      directory: Folder of the cohort; made here.
      workers: Processes; None: one per available core. The result does not depend
        on it.
      progress: Whether to show a progress bar.

    Returns:
      Path of `manifest.csv` in the folder.

    Raises:
      ValueError: The config is unusable, or the folder holds something else.
    """
    config.validate()
    directory = pathlib.Path(directory)
    manifest = directory / "manifest.csv"
    if directory.exists():
        found = _stored_key(directory)
        if found != config.key():
            raise ValueError(
                f"{directory}: expected the cohort {config.key()}, found "
                f"{found or 'a folder that is no cohort'}. Choose another folder or "
                "delete this one."
            )
        return manifest
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f"{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        rows = _generate(config, partial, workers, progress)
        _write_manifest(partial / manifest.name, rows)
        record = {
            "key": config.key(),
            "version": VERSION,
            "config": dataclasses.asdict(config),
        }
        (partial / _DONE).write_text(json.dumps(record, indent=2) + "\n")
        if _stored_key(directory) != config.key():  # else another process was faster
            partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _generate(
    config: CohortConfig, directory: pathlib.Path, workers: int | None, progress: bool
) -> list[dict[str, str]]:
    """Writes all subjects and returns their manifest rows in the plan's order."""
    entries = plan(config)
    modalities = tuple(_words(config.modalities))
    if workers is None:
        workers = _available_cores()
    workers = min(workers, len(entries))
    bar = tqdm.tqdm(
        total=len(entries),
        desc="cohort",
        unit="subject",
        disable=None if progress else True,  # None: on a terminal only
    )
    with bar:
        if workers <= 1:
            rows = []
            for entry in entries:
                rows.append(_write_subject(entry, modalities, directory))
                bar.update()
            return rows
        # Spawned, not forked: the parent may already run threads of JAX.
        context = multiprocessing.get_context("spawn")
        with (
            _one_thread_each(),
            concurrent.futures.ProcessPoolExecutor(workers, context) as pool,
        ):
            futures = [
                pool.submit(_write_subject, entry, modalities, directory)
                for entry in entries
            ]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [future.result() for future in futures]


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Lets new processes start with one BLAS thread; many would fight for the cores."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _write_subject(
    entry: Entry, modalities: tuple[str, ...], directory: pathlib.Path
) -> dict[str, str]:
    """Generates one subject, writes its files and returns its manifest row."""
    subject = make_subject(entry.seed, entry.kind, modalities, entry.scanner)
    healthy = entry.kind is lesions.Kind.HEALTHY
    row = {"subject": entry.subject, "patient": entry.patient}
    for modality in modalities:
        row[f"image_{modality}"] = f"{entry.subject}_{modality}.nii.gz"
        _save(subject.images[modality], subject, directory / row[f"image_{modality}"])
    row["brain_mask"] = f"{entry.subject}_brain_mask.nii.gz"
    _save(subject.brain, subject, directory / row["brain_mask"])
    row["lesion_mask"] = "" if healthy else f"{entry.subject}_lesion_mask.nii.gz"
    if not healthy:
        _save(subject.lesion, subject, directory / row["lesion_mask"])
    return row | {
        "label": "healthy" if healthy else "abnormal",
        "split": entry.split,
        "licence": LICENCE,
        "kind": entry.kind.value,
        "scanner": subject.scanner,
        "seed": str(entry.seed),
        "twin_of": entry.twin_of,
        "data": "synthetic",
    }


def _save(data: np.ndarray, subject: Subject, path: pathlib.Path) -> None:
    dtype = np.uint8 if data.dtype == bool else data.dtype
    image = nib.Nifti1Image(data.astype(dtype), subject.affine)
    image.set_sform(subject.affine, code="mni")
    image.set_qform(subject.affine, code="mni")
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def _write_manifest(path: pathlib.Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _stored_key(directory: pathlib.Path) -> str:
    """Key of the cohort in a folder; empty if there is none."""
    try:
        return str(json.loads((directory / _DONE).read_text())["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _generator(stream: np.random.SeedSequence) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(stream))


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _disease_names() -> tuple[str, ...]:
    return tuple(k.value for k in lesions.Kind if k is not lesions.Kind.HEALTHY)
