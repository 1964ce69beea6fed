"""Evaluates a checkpoint: scores, thresholds, metrics, baselines, maps, report."""

import csv
import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging

from uad_jax import config as config_lib
from uad_jax import environment, figures, report, scoring, summary, train, writer
from uad_jax import mesh as mesh_lib
from uad_jax import workdir as workdir_lib
from uad_jax.config import EvaluationSet, ExperimentConfig
from uad_jax.data import geometry, nifti, pipeline
from uad_jax.data.sources import Store, VolumeInfo
from uad_jax.metrics import baselines, calibration, postprocess
from uad_jax.scoring import Scorer, VolumeArrays, VolumeResult

GROUP_BY = "kind"  # manifest column that splits the table, where the store has it


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Context:
    """What the steps of one evaluation share."""

    config: ExperimentConfig
    evaluation_set: EvaluationSet
    name: str
    workdir: pathlib.Path
    step: int
    store: Store
    mesh: jax.sharding.Mesh
    progress: bool

    def volumes(self, split: str) -> list[VolumeInfo]:
        return pipeline.select(self.store, self.config.data, split)


def evaluate(
    config: ExperimentConfig,
    workdir: pathlib.Path,
    *,
    step: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Evaluates one checkpoint on every configured set; the run is not changed.

    Args:
      config: The run's config.
      workdir: The run. Gets `calibration/<step>/<protocol>.json`,
        `results/<set>.json`, `results/<set>_subjects.csv`, `report.html` and, if
        asked for, `maps/<set>/`.
      step: Checkpoint; None = the best, or the latest of a run without validation.
      mesh: Devices; None = all.
      progress: Whether to show a progress bar.

    Returns:
      Set name -> results, as in the JSON file.

    Raises:
      ValueError: If a set is empty, or its store does not fit the model.
    """
    config_lib.validate(config)
    mesh = mesh_lib.make_mesh() if mesh is None else mesh
    method, model, step = train.load_model(config, workdir, step, mesh)
    logging.info("Evaluating step %d of %s.", step, workdir.name)
    key = jax.random.key(config.seed)
    results = {}
    for name, evaluation_set in _sets(config).items():
        context = _Context(
            config=config,
            evaluation_set=evaluation_set,
            name=name,
            workdir=workdir,
            step=step,
            store=_open_store(config, evaluation_set),
            mesh=mesh,
            progress=progress,
        )
        scorer = scoring.method_scorer(
            config.name, method, model, key, evaluation_set.protocol, mesh
        )
        results[name] = _evaluate_set(context, scorer)
    return results


def _sets(config: ExperimentConfig) -> dict[str, EvaluationSet]:
    return config.evaluation.sets or {"test": EvaluationSet()}


def _open_store(config: ExperimentConfig, evaluation_set: EvaluationSet) -> Store:
    own = Store.open(pathlib.Path(config.data.store))
    if not evaluation_set.store:
        return own
    other = Store.open(pathlib.Path(evaluation_set.store))
    for what, expected, found in (
        ("recipe", own.recipe, other.recipe),
        ("modalities", own.modalities, other.modalities),
    ):
        if expected != found:
            raise ValueError(
                f"{evaluation_set.store}: the {what} is {found}, but the model was "
                f"trained with {expected}. Prepare it with the training recipe."
            )
    return other


def _evaluate_set(context: _Context, scorer: Scorer) -> dict[str, Any]:
    start = time.monotonic()
    test = context.volumes(context.evaluation_set.split)
    if not test:
        raise ValueError(
            f"Set {context.name!r}: the store has no {context.evaluation_set.split} "
            "volumes. Give the manifest a `split` column, or choose another split."
        )
    scorers = [scorer, *_baselines(context)]
    calibrations = _calibrate(context, scorers)
    thresholds = {
        name: _thresholds(context, calibrated)
        for name, calibrated in calibrations.items()
    }
    found: dict[str, list[VolumeResult]] = {one.name: [] for one in scorers}
    for one, result, arrays in _score(context, scorers, test, thresholds, "Testing"):
        found[one.name].append(result)
        if one is scorer and context.config.evaluation.export_maps:
            _write_map(context, result.info, arrays)
    results = {
        "run": _run_facts(context),
        "set": _set_facts(context, found[scorer.name]),
        "thresholds": _threshold_rows(context, calibrations[scorer.name]),
        **summary.summarize(
            found,
            group_by=GROUP_BY,
            num_samples=context.config.evaluation.bootstrap_samples,
        ),
    }
    results["run"]["evaluation_seconds"] = round(time.monotonic() - start, 1)
    cases = _shown_cases(context, scorer, found[scorer.name], thresholds)
    _write(context, results, found, cases)
    return results


def _baselines(context: _Context) -> list[Scorer]:
    """The five baselines of every table; the atlas sees healthy training scans."""
    protocol = context.evaluation_set.protocol
    healthy = _healthy(context.volumes("train"))
    functions: dict[str, scoring.Baseline] = {
        "prevalence": baselines.prevalence,
        "raw intensity": baselines.raw,
        "inverted intensity": baselines.inverted,
        "thresh (equalised)": baselines.thresh,
    }
    atlas = baselines.fit_atlas(_images(context, healthy))
    functions["atlas-z"] = functools.partial(baselines.atlas_z, atlas)
    return [
        scoring.baseline_scorer(name, function, protocol)
        for name, function in functions.items()
    ]


def _healthy(infos: Sequence[VolumeInfo]) -> list[VolumeInfo]:
    return [info for info in infos if info.label == "healthy"]


def _batches(context: _Context, infos: Sequence[VolumeInfo]) -> Iterator[tuple]:
    size = -(-context.config.evaluation.batch_size // context.mesh.size)
    for volumes, labels, rows in pipeline.volume_batches(
        context.store,
        infos,
        modalities=context.config.data.modalities,
        batch_size=size * context.mesh.size,
        mesh=context.mesh,
    ):
        yield scoring.decode(volumes), labels, rows


def _images(
    context: _Context, infos: Sequence[VolumeInfo]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for volumes, _, rows in _batches(context, infos):
        images, masks = np.asarray(volumes.image), np.asarray(volumes.mask)
        for row in range(len(rows)):
            yield images[row, ..., 0], masks[row, ..., 0]


def _score(
    context: _Context,
    scorers: Sequence[Scorer],
    infos: Sequence[VolumeInfo],
    thresholds: dict[str, dict[str, float]],
    title: str,
) -> Iterator[tuple[Scorer, VolumeResult, VolumeArrays]]:
    bar = tqdm.tqdm(
        total=len(infos), desc=title, unit="volume", disable=not context.progress
    )
    with bar:
        for volumes, labels, rows in _batches(context, infos):
            for scorer in scorers:
                for result, arrays in scoring.score_volumes(
                    scorer, volumes, labels, rows, thresholds[scorer.name]
                ):
                    yield scorer, result, arrays
            bar.update(len(rows))


def _calibrate(
    context: _Context, scorers: Sequence[Scorer]
) -> dict[str, calibration.Calibration]:
    """Fixes thresholds on validation scans, before any test scan is scored."""
    infos = [
        info
        for info in context.volumes("val")
        if info.label == "healthy" or info.annotated
    ]
    nothing: dict[str, dict[str, float]] = {one.name: {} for one in scorers}
    found: dict[str, list[VolumeResult]] = {one.name: [] for one in scorers}
    for one, result, _ in _score(context, scorers, infos, nothing, "Calibrating"):
        found[one.name].append(result)
    rate = context.config.evaluation.healthy_fpr
    entries = {}
    for name, results in found.items():
        healthy = [result for result in results if not result.abnormal]
        entries[name] = calibration.calibrate(
            [result.voxels for result in healthy],
            [result.voxels for result in results if result.abnormal],
            [result.volume_score for result in healthy],
            rates=sorted({*calibration.HEALTHY_RATES, rate}),
        )
    protocol = context.evaluation_set.protocol.value
    folder = context.workdir / "calibration" / str(context.step)
    calibration.save(folder / f"{protocol}.json", entries)
    return entries


def _thresholds(
    context: _Context, calibrated: calibration.Calibration
) -> dict[str, float]:
    """Name -> threshold of every rule that validation scans allow."""
    rate = context.config.evaluation.healthy_fpr
    thresholds = {"healthy_fpr": calibrated.healthy_threshold(rate)}
    if calibrated.validated is not None:
        thresholds["validated"] = calibrated.validated
    return thresholds


def _threshold_rows(
    context: _Context, calibrated: calibration.Calibration
) -> list[dict[str, Any]]:
    rows = [
        {
            "rule": f"healthy false-positive rate {100 * rate:g} %",
            "value": value,
            "source": f"{calibrated.num_healthy} healthy validation volumes, no labels",
        }
        for rate, value in sorted(calibrated.healthy_fpr.items())
    ]
    value, source = calibrated.validated_or_healthy(
        context.config.evaluation.healthy_fpr
    )
    rows.append({"rule": "validated", "value": value, "source": source})
    return rows


def _run_facts(context: _Context) -> dict[str, Any]:
    config = context.config
    lines = writer.read_metrics(context.workdir)
    return {
        "name": config.name,
        "method": type(config.method).__name__,
        "step": context.step,
        "seed": config.seed,
        "environment": environment.describe(),
        "data_fingerprint": context.store.fingerprint,
        "config": config_lib.to_dict(config),
        "training": summary.training_state(config, context.step, lines),
    }


def _set_facts(context: _Context, found: Sequence[VolumeResult]) -> dict[str, Any]:
    abnormal = [result for result in found if result.abnormal]
    chosen = context.config.data.modalities
    return {
        "name": context.name,
        "split": context.evaluation_set.split,
        "protocol": context.evaluation_set.protocol.value,
        "group_by": GROUP_BY,
        "recipe": context.store.recipe.get("name", ""),
        "modalities": chosen.split(",") if chosen else list(context.store.modalities),
        "licences": sorted({result.info.licence for result in found} - {""}),
        "num_volumes": len(found),
        "num_abnormal": len(abnormal),
        "num_healthy": len(found) - len(abnormal),
        "num_annotated_abnormal": sum(result.annotated for result in abnormal),
    }


def _shown_cases(
    context: _Context,
    scorer: Scorer,
    found: Sequence[VolumeResult],
    thresholds: dict[str, dict[str, float]],
) -> list[figures.Case]:
    """Scores the best, the median and the worst subject once more, to show them."""
    chosen = summary.best_median_worst(found)
    infos = [result.info for result, _ in chosen.values()]
    arrays = {
        result.info.uid: shown
        for _, result, shown in _score(context, [scorer], infos, thresholds, "Drawing")
    }
    cases = []
    for place, (result, value) in chosen.items():
        shown = arrays[result.info.uid]
        threshold = thresholds[scorer.name]["healthy_fpr"]
        kind = result.info.extra.get(GROUP_BY, result.info.label)
        reconstruction = shown.reconstruction
        cases.append(
            figures.Case(
                title=f"{place}: {result.info.subject}\n{kind}, AP {value:.2f}",
                image=shown.image[..., 0],
                reconstruction=None
                if reconstruction is None
                else reconstruction[..., 0],
                anomaly_map=np.where(shown.eroded, shown.anomaly_map, 0.0),
                found=postprocess.predict(shown.anomaly_map, shown.eroded, threshold),
                lesion=shown.lesion if result.annotated else None,
                brain=shown.brain,
            )
        )
    return cases


def _write_map(context: _Context, info: VolumeInfo, arrays: VolumeArrays) -> None:
    """Writes one anomaly map on the grid of the scan it was made from."""
    folder = context.workdir / "maps" / context.name
    folder.mkdir(parents=True, exist_ok=True)
    inside = np.where(arrays.eroded, arrays.anomaly_map, 0.0).astype(np.float32)
    native = geometry.to_native(inside, info.geometry)
    nifti.write_map(
        folder / f"{info.subject}_desc-anomaly_map.nii.gz", native, info.geometry
    )


def _write(
    context: _Context,
    results: dict[str, Any],
    found: dict[str, list[VolumeResult]],
    cases: Sequence[figures.Case],
) -> None:
    folder = context.workdir / "results"
    workdir_lib.write_json(folder / f"{context.name}.json", results)
    _write_subjects(folder / f"{context.name}_subjects.csv", found)
    drawn = summary.draw_curves(found, writer.read_metrics(context.workdir))
    if cases:
        limit = max(float(np.quantile(case.anomaly_map, 0.998)) for case in cases)
        drawn["cases"] = figures.case_panels(cases, limit)
    names = list(_sets(context.config))
    page = "report.html" if len(names) == 1 else f"report_{context.name}.html"
    report.write(context.workdir / page, results, drawn)
    logging.info("Report: %s", context.workdir / page)


def _write_subjects(path: pathlib.Path, found: dict[str, list[VolumeResult]]) -> None:
    """One row per subject and scorer."""
    rows = [
        {"scorer": name, **summary.subject_row(result)}
        for name, results in found.items()
        for result in results
    ]
    temporary = path.with_suffix(".csv.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    temporary.replace(path)
