"""Evaluates a checkpoint: scores, thresholds, metrics, baselines, maps, report."""

import functools
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging

from uad_jax import evaluation, figures, scoring, summary
from uad_jax import results as results_lib
from uad_jax.config import ExperimentConfig
from uad_jax.data.sources import VolumeInfo
from uad_jax.evaluation import GROUP_BY, Context
from uad_jax.metrics import baselines, calibration, postprocess
from uad_jax.scoring import Scorer, VolumeResult


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
        `results/<set>.json`, `results/<set>_subjects.csv`, `report.html` (of sets
        other than "test": `report_<set>.html`) and, if asked for, `maps/<set>/`.
      step: Checkpoint; None = the best, or the latest of a run without validation.
      mesh: Devices; None = all.
      progress: Whether to show a progress bar.

    Returns:
      Set name -> results, as in the JSON file (where NaN is null).

    Raises:
      ValueError: If a set is empty, its store does not fit the model, or it holds
        scans that the model was trained on.
      workdir.WorkdirError: If config or recipe are not those of the training.
    """
    results = {}
    for context, scorer in evaluation.opened(config, workdir, step, mesh, progress):
        logging.info("Evaluating step %d on %s.", context.step, context.name)
        results[context.name] = _evaluate_set(context, scorer)
    return results


def figures_of_step(
    config: ExperimentConfig, workdir: pathlib.Path, step: int
) -> dict[str, float]:
    """Evaluates a checkpoint while training goes on.

    Returns:
      The model's own figures, "SET/METRIC" -> value, those that are defined.
    """
    results = evaluate(config, workdir, step=step, progress=False)
    return {
        f"{name}/{metric}": float(value)
        for name, result in results.items()
        for metric, value in result["scorers"][config.name].items()
        if isinstance(value, float) and math.isfinite(value)
    }


def calibrate(
    config: ExperimentConfig, workdir: pathlib.Path, *, progress: bool = True
) -> bool:
    """Fixes the thresholds of the best checkpoint, at the end of training.

    Returns:
      False, with one line that says why, if the method is a pretraining stage, there
      are no healthy validation scans, or several processes share the devices.
    """
    if jax.process_count() > 1:
        if jax.process_index() == 0:
            logging.warning(
                "Several processes train, one evaluates: no thresholds yet. `run.py "
                "evaluate --workdir=%s` in one process makes them.",
                workdir,
            )
        return False
    try:
        for context, scorer in evaluation.opened(config, workdir, None, None, progress):
            if context.calibration_path.exists():
                continue  # of this very step: fixed before, perhaps with baselines
            if not _healthy(context.select(context.training_store, "val")):
                logging.warning("No healthy validation scans: no thresholds yet.")
                return False
            _calibrate(context, [scorer])
    except scoring.PretrainingStage:
        logging.info("A pretraining stage scores nothing: there are no thresholds.")
        return False
    return True


def _evaluate_set(context: Context, scorer: Scorer) -> dict[str, Any]:
    start = time.monotonic()
    test = context.select(context.store, context.evaluation_set.split)
    if not test:
        raise ValueError(
            f"Set {context.name!r}: the store has no {context.evaluation_set.split} "
            "volumes. Give the manifest a `split` column, or choose another split."
        )
    _check_unseen(context, test)
    scorers = [scorer, *_baselines(context)]
    calibrations = _calibrate(context, scorers)
    thresholds = {
        name: _thresholds(context, calibrated)
        for name, calibrated in calibrations.items()
    }
    found: dict[str, list[VolumeResult]] = {one.name: [] for one in scorers}
    for one, result, arrays in evaluation.score(
        context, scorers, context.store, test, thresholds, "Testing"
    ):
        found[one.name].append(result)
        if one is scorer and context.config.evaluation.export_maps:
            results_lib.write_map(context, result.info, arrays)
    results = {
        "run": results_lib.run_facts(context),
        "set": results_lib.set_facts(context, found[scorer.name]),
        "thresholds": results_lib.threshold_rows(context, calibrations[scorer.name]),
        **summary.summarize(
            found,
            group_by=GROUP_BY,
            num_samples=context.config.evaluation.bootstrap_samples,
        ),
    }
    results["run"]["evaluation_seconds"] = round(time.monotonic() - start, 1)
    cases = _shown_cases(context, scorer, found[scorer.name], thresholds)
    results_lib.write(context, results, found, cases)
    return results


def _check_unseen(context: Context, test: Sequence[VolumeInfo]) -> None:
    """Within one store prepare has checked this; a set's own store is new here."""
    if not context.evaluation_set.store or context.evaluation_set.split == "train":
        return
    trained = {info.content for info in context.select(context.training_store, "train")}
    seen = [info.subject for info in test if info.content in trained]
    if seen:
        raise ValueError(
            f"Set {context.name!r}: {len(seen)} of {len(test)} scans are among those "
            f"that the model was trained on ({', '.join(seen[:5])}). Take them out of "
            "the manifest and prepare the store again."
        )


def _healthy(infos: Sequence[VolumeInfo]) -> list[VolumeInfo]:
    return [info for info in infos if info.label == "healthy"]


def _annotated_abnormal(infos: Sequence[VolumeInfo]) -> list[VolumeInfo]:
    return [info for info in infos if info.label == "abnormal" and info.annotated]


def _baselines(context: Context) -> list[Scorer]:
    """The five baselines of every table; the atlas sees healthy training scans."""
    protocol = context.evaluation_set.protocol
    store = context.training_store
    healthy = _healthy(context.select(store, "train"))
    functions: dict[str, scoring.Baseline] = dict(baselines.UNFITTED)
    atlas = baselines.fit_atlas(evaluation.images(context, store, healthy))
    functions["atlas-z"] = functools.partial(baselines.atlas_z, atlas)
    return [
        scoring.baseline_scorer(name, function, protocol)
        for name, function in functions.items()
    ]


def _calibrate(
    context: Context, scorers: Sequence[Scorer]
) -> dict[str, calibration.Calibration]:
    """Fixes thresholds on validation scans, before any test scan is scored.

    Healthy scans come from the training store, annotated lesions from the set's.
    """
    parts = (
        (context.training_store, _healthy),
        (context.store, _annotated_abnormal),
    )
    nothing: dict[str, dict[str, float]] = {one.name: {} for one in scorers}
    found: dict[str, list[VolumeResult]] = {one.name: [] for one in scorers}
    for store, chosen in parts:
        infos = chosen(context.select(store, "val"))
        for one, result, _ in evaluation.score(
            context, scorers, store, infos, nothing, "Calibrating"
        ):
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
    calibration.save(context.calibration_path, entries)
    return entries


def _thresholds(
    context: Context, calibrated: calibration.Calibration
) -> dict[str, float]:
    """Name -> threshold of every rule that validation scans allow.

    On the validation scans themselves a threshold of best Dice would be tuned on
    what it is measured on, so there is none.
    """
    rate = context.config.evaluation.healthy_fpr
    thresholds = {"healthy_fpr": calibrated.healthy_threshold(rate)}
    tuned_on_it = context.evaluation_set.split == "val"
    if calibrated.validated is not None and not tuned_on_it:
        thresholds["validated"] = calibrated.validated
    return thresholds


def _shown_cases(
    context: Context,
    scorer: Scorer,
    found: Sequence[VolumeResult],
    thresholds: dict[str, dict[str, float]],
) -> list[figures.Case]:
    """Scores the subjects to show once more, this time keeping their pictures."""
    chosen = summary.shown_subjects(found)
    infos = [result.info for result in chosen.values()]
    arrays = {
        result.info.uid: shown
        for _, result, shown in evaluation.score(
            context, [scorer], context.store, infos, thresholds, "Drawing"
        )
    }
    rules = thresholds[scorer.name]
    threshold = rules.get(
        context.evaluation_set.threshold_from.value, rules["healthy_fpr"]
    )
    cases = []
    for caption, result in chosen.items():
        shown = arrays[result.info.uid]
        kind = result.info.extra.get(GROUP_BY, result.info.label)
        reconstruction = shown.reconstruction
        cases.append(
            figures.Case(
                title=f"{caption}, {kind}",
                image=shown.image[..., 0],
                reconstruction=None
                if reconstruction is None
                else reconstruction[..., 0],
                anomaly_map=results_lib.map_to_show(shown),
                found=postprocess.predict(
                    shown.anomaly_map, shown.eroded, threshold, scorer.protocol
                ),
                lesion=shown.lesion if result.annotated else None,
                brain=shown.brain,
            )
        )
    return cases
