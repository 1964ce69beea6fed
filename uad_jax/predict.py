"""`run.py predict`: maps of new scans, on their own voxels, by a trained run alone.

What is unfit is refused before anything is written: files that cannot be used, and
scans of another modality than the model's.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

import uad_jax
from uad_jax import (
    environment,
    prediction,
    predictor,
    prepare,
    scoring,
    summary,
)
from uad_jax import mesh as mesh_lib
from uad_jax import workdir as workdir_lib
from uad_jax.config import ExperimentConfig
from uad_jax.data import (
    check,
    encode,
    geometry,
    inputs,
    placement,
    profile,
    reading,
    recipes,
    sources,
)
from uad_jax.data.encode import Encoded
from uad_jax.data.examine import Problem, Reading, Severity
from uad_jax.data.inputs import Input
from uad_jax.metrics import postprocess
from uad_jax.prediction import Prediction
from uad_jax.predictor import Predictor
from uad_jax.types import Labels, Volumes

# Distances to a profile of 32 IXI T1 scans: T1 of three other scanners 1.2 to 2.1,
# FLAIR 1.4 to 2.8 (a histogram hardly tells it from T1), T2 8 and more.
_FAR = 3.0
_LESION = 2  # quantiles that a lesion may move
_POOL = 8  # scans that are worth starting processes for


def predict(
    config: ExperimentConfig,
    workdir: pathlib.Path,
    source: str,
    output: pathlib.Path,
    *,
    step: int | None = None,
    modality: str = "",
    force: bool = False,
    nan_to_zero: bool = False,
    assume_orientation: str = "",
    ignore_affine: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> list[Prediction]:
    """Predicts on scans and writes the maps beside each other into one folder.

    Every file is read and prepared before the first prediction, and if one of them
    is unfit, nothing is written. The prepared scans stay in memory, about 2 MB each
    with the recipe `grid2mm`.

    Args:
      config: The run's config.
      workdir: The run; it is not changed, and its store is not needed.
      source: A NIfTI file, a folder, a manifest.csv or `<row of DATASETS>:<root>`.
        Labels and lesion masks are not used.
      output: Folder to write to, made if need be. Per subject:
        `<subject>_desc-anomaly_map.nii.gz`, `<subject>_desc-anomaly_mask.nii.gz`,
        `<subject>_desc-reconstruction_<modality>.nii.gz`,
        `<subject>_prediction.json`.
      step: Checkpoint; None = the best, or the latest of a run without validation.
      modality: What files are whose names do not say, and which of a folder to take.
      force: Predicts on another modality than the model's, with a warning.
      nan_to_zero: Makes NaN and Inf voxels 0.
      assume_orientation: Axis codes ("RAS") for files without an orientation.
      ignore_affine: Accepts masks of the image's shape whose affine differs.
      mesh: Devices; None = all.
      progress: Whether to show progress bars.

    Returns:
      What was written, in the order of the subjects; `prediction.render` prints it.

    Raises:
      ValueError: The scans do not fit the model, or files are unfit (all of them are
        listed), or the run has no threshold.
      workdir.WorkdirError: This is not the workdir of a run, or not of this config.
      checkpoint.CheckpointError: The checkpoint is missing or damaged.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"Prediction runs in one process, and this job has {jax.process_count()}. "
            "Start run.py predict without --distributed."
        )
    mesh = mesh_lib.make_mesh() if mesh is None else mesh
    run = predictor.restore(config, workdir, step, mesh, modality)
    scans = inputs.find(source, run.modalities, modality=modality, force=force)
    _refuse_output_in_input(source, output)
    settings = Reading(
        ignore_affine=ignore_affine,
        nan_to_zero=nan_to_zero,
        assume_orientation=assume_orientation,
    )
    problems = _checked(scans, settings, progress)
    prepared = _prepared(run, scans, settings, progress)
    workdir_lib.make_writable(output)
    predictions = []
    with _bar("Predicting", len(scans), progress) as bar:
        for scan, encoded, arrays in _scored(run, scans, prepared):
            warnings = [*scan.warnings, *_strange(run, encoded)]
            found = postprocess.predict(
                arrays.anomaly_map,
                arrays.eroded,
                run.threshold.value,
                run.scorer.protocol,
            )
            predictions.append(
                prediction.write(
                    output,
                    scan.files.subject,
                    arrays,
                    found,
                    encoded.geometry,
                    run.modalities,
                    next(iter(scan.files.images.values())),
                    _facts(run, scan, encoded, problems, arrays.volume_score),
                    warnings,
                )
            )
            bar.update(1)
    return predictions


def _refuse_output_in_input(source: str, output: pathlib.Path) -> None:
    """Maps among the scans would be read as scans the next time."""
    folder = pathlib.Path(source).resolve()
    if folder.is_dir() and output.resolve().is_relative_to(folder):
        raise ValueError(
            f"The output {output} lies in the input {source}: its maps would be taken "
            "for scans the next time. Choose another folder."
        )


def _checked(
    scans: Sequence[Input], settings: Reading, progress: bool
) -> dict[str, list[Problem]]:
    """Asks the data doctor; returns its warnings by subject, or raises its table."""
    subjects = [scan.files for scan in scans]
    with _bar("Checking", len(subjects), progress) as bar:
        problems = check.check(
            subjects,
            reading=settings,
            workers=None if len(subjects) >= _POOL else 0,
            progress=lambda *_: bar.update(1),
        )
    if check.has_errors(problems):
        text = check.render(problems, subjects, notes=False)
        raise ValueError(f"Nothing was predicted. {text}")
    found: dict[str, list[Problem]] = {}
    for problem in problems:
        if problem.subject and problem.severity is Severity.WARNING:
            found.setdefault(problem.subject, []).append(problem)
    return found


def _prepared(
    run: Predictor, scans: Sequence[Input], settings: Reading, progress: bool
) -> list[Encoded]:
    """Prepares and encodes all scans as a store would keep them."""
    wanted = [
        encode.Source(
            subject=scan.files.subject,
            load=functools.partial(prepare.load, scan.files, run.recipe, settings),
            modalities=tuple(scan.files.images),
        )
        for scan in scans
    ]
    workers = None if len(scans) >= _POOL else 0
    found: list[Encoded] = []
    failed: list[str] = []
    with _bar("Preparing", len(scans), progress) as bar:
        for scan, one in zip(
            scans, encode.encode_all(wanted, run.modalities, workers), strict=True
        ):
            if isinstance(one, str):
                failed.append(f"\n  {scan.files.subject}: {one}")
            else:
                found.append(one)
            bar.update(1)
    if failed:
        raise ValueError(
            f"Nothing was predicted. {len(failed)} of {len(scans)} scans cannot be "
            f"prepared:{''.join(failed)}"
        )
    return found


def _scored(
    run: Predictor, scans: Sequence[Input], prepared: Sequence[Encoded]
) -> Iterator[tuple[Input, Encoded, scoring.VolumeArrays]]:
    """Scores in the batches of an evaluation: one program, and the same bits."""
    per_device = -(-run.config.evaluation.batch_size // run.mesh.size)
    size = per_device * run.mesh.size
    for first in range(0, len(scans), size):
        batch = prepared[first : first + size]
        volumes, labels = _batch(batch, size)
        decoded = scoring.decode(placement.to_mesh(volumes, run.mesh))
        found = scoring.score_volumes(run.scorer, decoded, labels, len(batch))
        yield from zip(scans[first : first + size], batch, found, strict=True)


def _batch(prepared: Sequence[Encoded], size: int) -> tuple[Volumes, Labels]:
    """Stacks scans, padded to `size`; noise is keyed by their content."""
    depth, *_ = shape = prepared[0].plane.shape
    image = np.zeros((size, *prepared[0].codes.shape), prepared[0].codes.dtype)
    plane = np.zeros((size, *shape), np.uint8)
    for row, one in enumerate(prepared):
        image[row], plane[row] = one.codes, one.plane
    rows = [(int(one.content[:7], 16), depth) for one in prepared]
    unknown = Labels(
        lesion=np.zeros(plane.shape, bool),
        annotated=np.zeros(size, bool),
        abnormal=np.zeros(size, bool),
    )
    return reading.assemble_volumes(image, plane, rows), unknown


def _strange(run: Predictor, encoded: Encoded) -> list[str]:
    """Warns of scans that the model knows, and of intensities that it does not."""
    brain = (encoded.plane & sources.BRAIN_BIT) != 0
    warnings = []
    if encoded.content in run.seen:
        warnings.append(
            "the model was trained on this very scan: its scores say nothing of new "
            "scans."
        )
    known = "scans of the run's store" if run.imported else "training scans"
    for channel, modality in enumerate(run.modalities):
        usual = run.profiles.get(modality)
        values = profile.fingerprint(encoded.codes[..., channel][brain])
        if usual is None:
            continue
        distance = np.inf if values is None else usual.distance(values, ignore=_LESION)
        if distance > _FAR:
            warnings.append(
                f"the intensities of the {modality} image are unlike those of the "
                f"{usual.count} {known} (distance {distance:.1f}, "
                f"usual below {_FAR:g}). Is it another modality or contrast, or not "
                "skull-stripped? The scores may mean nothing."
            )
    return warnings


def _facts(
    run: Predictor,
    scan: Input,
    encoded: Encoded,
    problems: dict[str, list[Problem]],
    volume_score: float,
) -> dict[str, Any]:
    """What the JSON file says beside the findings; no folder of this machine."""
    files = scan.files
    notes = [*encoded.notes]
    for problem in problems.get(files.subject, []):
        if not any(note.endswith(problem.message) for note in notes):
            notes.append(problem.message)
    healthy = run.calibrated.healthy_volume_scores
    return {
        "run": {
            "name": run.config.name,
            "method": type(run.config.method).__name__,
            "step": run.step,
            "seed": run.config.seed,
            "commit": run.commit,
            "training_data_licences": list(run.licences),
            "imported": run.imported,
        },
        "software": {"uad_jax": uad_jax.__version__, "commit": environment.commit()},
        "input": {
            "images": {name: _file(path) for name, path in files.images.items()},
            "brain_mask": _file(files.brain_mask) if files.brain_mask else None,
            "modalities": list(run.modalities),
            "shape": [int(size) for size in encoded.geometry.native_shape],
            "voxel_mm": [
                round(edge, 4)
                for edge in geometry.spacing(encoded.geometry.native_affine)
            ],
            "notes": [_without_folders(note, files.files()) for note in notes],
        },
        "recipe": recipes.to_json(run.recipe),
        "protocol": run.scorer.protocol.value,
        "score": {
            "volume_score": volume_score,
            "healthy_percentile": summary.percentile(volume_score, healthy),
            "num_healthy_validation_scans": len(healthy),
        },
        "threshold": dataclasses.asdict(run.threshold),
    }


def _file(path: pathlib.Path) -> dict[str, str]:
    return {"name": path.name, "sha256": sources.sha256(path)}


def _without_folders(text: str, paths: Sequence[pathlib.Path]) -> str:
    for path in paths:
        text = text.replace(str(path), path.name)
    return text


def _bar(title: str, total: int, progress: bool) -> tqdm.tqdm:
    shown = None if progress else True  # None: on a terminal only
    return tqdm.tqdm(total=total, desc=title, unit="scan", disable=shown)
