"""Fixes thresholds and score scales on validation scans, before any test scan."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from uad_jax import evaluation, export
from uad_jax.config import ThresholdRule
from uad_jax.data.sources import Store, VolumeInfo
from uad_jax.evaluation import Context, Scales
from uad_jax.measuring import Scale, VolumeResult
from uad_jax.metrics import calibration
from uad_jax.metrics.calibration import Calibration
from uad_jax.metrics.voxel import VoxelScores
from uad_jax.scoring import Scorer, Stage

Calibrations = Mapping[tuple[str, Stage], Calibration]
Known = dict[tuple, Calibrations]
Parts = list[tuple[Store, list[VolumeInfo]]]

_HEALTHY = ThresholdRule.HEALTHY_FPR.value
_VALIDATED = ThresholdRule.VALIDATED.value


def healthy(infos: Sequence[VolumeInfo]) -> list[VolumeInfo]:
    """The healthy volumes."""
    return [info for info in infos if info.label == "healthy"]


def calibrate(
    context: Context,
    scorers: Sequence[Scorer],
    stages: Sequence[Stage] = (Stage.PROCESSED,),
    *,
    exported: bool = False,
    known: Known | None = None,
    others: Calibrations | None = None,
) -> Calibrations:
    """Calibrates scorers, and writes the files of thresholds.

    Healthy scans come from the training store, annotated lesions from the set's.

    Args:
      context: The evaluation.
      scorers: What to calibrate; the first is what is evaluated.
      stages: Which maps.
      exported: Whether maps of the validation scans are written too, if the config
        asks for maps.
      known: Calibrations of sets before this one; the same scans are scored once.
      others: Calibrations of further scorers by the same scans, to be added.

    Returns:
      (scorer, stage) -> calibration; empty, with one line that says so, if there are
      neither healthy validation scans nor annotated lesions. With one kind only there
      are its thresholds.
    """
    if not context.validation:
        return {}
    parts = _parts(context)
    (_, normal), (_, lesions) = parts
    if not normal and not lesions:
        logging.warning("No healthy and no annotated validation scans: no thresholds.")
        return {}
    known = {} if known is None else known
    first = scorers[0] if exported and context.settings.export_maps else None
    key = (tuple(one.name for one in scorers), *stages, *origin(context).values())
    entries: dict[tuple[str, Stage], Calibration] = {}
    if first is None and key in known:
        entries |= known[key]
    else:
        for group in _groups(context, scorers, stages, parts):
            entries |= _calibrate(context, group, stages, parts, first)
        known[key] = entries
    entries = {**entries, **(others or {})} if entries else {}
    for stage in stages if entries else ():
        path = context.calibration_path(stage)
        chosen = {name: one for (name, at), one in entries.items() if at is stage}
        if len(chosen) > 1 or not is_current(context, stage):
            calibration.save(path, chosen, origin(context))
    return entries


def origin(context: Context) -> dict[str, str]:
    """What thresholds are made of: the checkpoint and the validation scans."""
    return {
        "checkpoint": context.checkpoint,
        "validation": context.fingerprint(volumes(context)),
        "rate": repr(context.settings.healthy_fpr),
    }


def is_current(context: Context, stage: Stage) -> bool:
    """Whether the stored thresholds are of this checkpoint and these scans."""
    try:
        return calibration.load_origin(context.calibration_path(stage)) == origin(
            context
        )
    except (FileNotFoundError, calibration.CalibrationError):
        return False


def volumes(context: Context) -> list[VolumeInfo]:
    """The validation scans that thresholds are made from."""
    return [info for _, infos in _parts(context) for info in infos]


def _parts(context: Context) -> Parts:
    """The healthy scans and the annotated lesions, each with its store."""
    normal = healthy(context.select(context.training_store, "val"))
    lesions = [
        info
        for info in context.select(context.store, "val")
        if info.label == "abnormal" and info.annotated
    ]
    return [(context.training_store, normal), (context.store, lesions)]


def _groups(
    context: Context, scorers: Sequence[Scorer], stages: Sequence[Stage], parts: Parts
) -> list[list[Scorer]]:
    """All scorers at a time, or one by one where their voxels would not fit."""
    brain = sum(sum(info.brain_voxels) for _, infos in parts for info in infos)
    if brain * len(scorers) * len(stages) <= context.settings.exact_voxels:
        return [list(scorers)]
    return [[one] for one in scorers]


def _calibrate(
    context: Context,
    scorers: Sequence[Scorer],
    stages: Sequence[Stage],
    parts: Parts,
    exported: Scorer | None,
) -> dict[tuple[str, Stage], Calibration]:
    found: dict[tuple[str, Stage], list[VolumeResult]] = {
        (one.name, stage): [] for one in scorers for stage in stages
    }
    for store, infos in parts:
        for one in evaluation.score(
            context,
            scorers,
            store,
            infos,
            {},
            "Calibrating",
            stages=stages,
            voxels=True,
        ):
            for stage, result in one.results.items():
                found[one.scorer.name, stage].append(result)
            if one.scorer is exported:
                info = one.results[Stage.PROCESSED].info
                export.write_scores(context, info, one.arrays)
    rates = sorted({*calibration.HEALTHY_RATES, context.settings.healthy_fpr})
    entries = {}
    for key, results in found.items():
        normal = [result for result in results if result.healthy]
        voxels = [result.voxels for result in normal if result.voxels is not None]
        lesions = [
            one.voxels for one in results if one.abnormal and one.voxels is not None
        ]
        if not calibration.can_calibrate(voxels, lesions):
            logging.warning(
                "The validation scans have no healthy voxel inside the eroded brain, "
                "and no lesion: no thresholds."
            )
            return {}
        entries[key] = calibration.calibrate(
            voxels, lesions, [result.volume_score for result in normal], rates=rates
        )
    return entries


def scales(context: Context, calibrations: Calibrations, first: str) -> Scales:
    """Thresholds and histogram edges of every scorer and stage.

    The scorer that is evaluated is measured at every rate on its processed maps, all
    others at the operating rate and at the validated threshold.
    """
    found = {
        (name, stage): Scale(
            _thresholds(context, one, name == first and stage is Stage.PROCESSED),
            np.asarray(one.score_edges, np.float32),
        )
        for (name, stage), one in calibrations.items()
    }
    note = operating(context, found, first).get("note")
    if note:
        logging.warning("Set %s: %s", context.name, note)
    return found


def _thresholds(
    context: Context, calibrated: Calibration, every_rate: bool
) -> dict[str, float]:
    """Rule -> threshold, of the rules that validation scans allow.

    On the validation scans themselves a threshold of best Dice would be tuned on
    what it is measured on, so there is none.
    """
    thresholds = {}
    if calibrated.healthy_fpr:
        rate = context.settings.healthy_fpr
        thresholds[_HEALTHY] = calibrated.healthy_threshold(rate)
        for one in calibration.HEALTHY_RATES if every_rate else ():
            name = f"{_HEALTHY}_{100 * one:g}"
            thresholds[name] = calibrated.healthy_threshold(one)
    if calibrated.validated is not None and not _tuned_on_it(context):
        thresholds[_VALIDATED] = calibrated.validated
    return thresholds


def _tuned_on_it(context: Context) -> bool:
    return context.evaluation_set.split == "val"


def edges_only(
    context: Context,
    scorers: Sequence[Scorer],
    infos: Sequence[VolumeInfo],
    stages: Sequence[Stage],
) -> Scales:
    """Histogram edges from a few volumes, where nothing was calibrated; no labels."""
    found: dict[tuple[str, Stage], list[VoxelScores]] = {}
    for one in evaluation.score(
        context,
        scorers,
        context.store,
        infos[:4],
        {},
        "Scaling",
        stages=stages,
        voxels=True,
    ):
        for stage, result in one.results.items():
            if result.voxels is not None:
                found.setdefault((one.scorer.name, stage), []).append(result.voxels)
    return {
        key: Scale({}, np.asarray(calibration.score_edges(voxels), np.float32))
        for key, voxels in found.items()
    }


def operating(context: Context, scales: Scales, name: str) -> dict[str, Any]:
    """The rule and the threshold that findings are shown at.

    Args:
      context: The evaluation.
      scales: From `scales`.
      name: Of the scorer.

    Returns:
      "rule" and "threshold", None without any. "healthy_fpr" is the rate of that rule,
      if healthy scans gave thresholds. "note" says why the rule is not the one that was
      asked for, if so.
    """
    scale = scales.get((name, Stage.PROCESSED))
    if scale is None or not scale.thresholds:
        return {"rule": None, "threshold": None}
    asked = context.evaluation_set.threshold_from.value
    rule = asked
    if asked not in scale.thresholds:
        rule = _VALIDATED if asked == _HEALTHY else _HEALTHY
    found: dict[str, Any] = {"rule": rule, "threshold": scale.thresholds[rule]}
    if _HEALTHY in scale.thresholds:
        found["healthy_fpr"] = context.settings.healthy_fpr
    if rule != asked:
        found["note"] = _why_another_rule(context, rule)
    return found


def _why_another_rule(context: Context, rule: str) -> str:
    if rule == _VALIDATED:
        return (
            "There are no healthy validation scans, so findings are shown at the "
            "validated threshold, of the best Dice on annotated validation scans, and "
            "not at that of a healthy false-positive rate."
        )
    why = "There are no annotated abnormal validation scans"
    if _tuned_on_it(context):
        why = "A validated threshold would be tuned on the scans of this set"
    return (
        f"{why}, so findings are shown at the threshold of "
        f"{100 * context.settings.healthy_fpr:g} % false positives on healthy "
        "validation scans, and not at the validated one."
    )
