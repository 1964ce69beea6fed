"""Results of single volumes, made into the figures of a table.

Pooled figures and means over volumes are different things and never share a name.
Detection figures are over annotated abnormal volumes; slice- and volume-level ones
also over the healthy volumes. Slices of abnormal volumes without annotation count
nowhere: which of them hold lesion is not known.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from uad_jax import figures
from uad_jax.config import ExperimentConfig
from uad_jax.metrics import statistics, voxel
from uad_jax.scoring import VolumeResult

MIN_SUBJECTS_TO_BEAT = 20  # fewer: "above" or "below", no more
MIN_SUBJECTS_TO_RANK = 5  # fewer: no interval, no ranking


def summarize(
    found: Mapping[str, Sequence[VolumeResult]], *, group_by: str, num_samples: int
) -> dict[str, Any]:
    """Makes the tables of one evaluation.

    Args:
      found: Scorer -> results; the model comes first, then the baselines.
      group_by: Extra column of the manifest that splits the table.
      num_samples: Bootstrap resamplings of the subjects.

    Returns:
      "scorers", "groups", "cases", "comparison", "verdict",
      "healthy_reconstruction" and "counts" of the results file.
    """
    model = next(iter(found.values()))
    groups = sorted({_group(result, group_by) for result in model if result.abnormal})
    comparison = _compare(found, num_samples)
    return {
        "scorers": {
            name: metrics(results, num_samples) for name, results in found.items()
        },
        "groups": {
            group: {
                name: metrics(
                    [
                        result
                        for result in results
                        if not result.abnormal or _group(result, group_by) == group
                    ],
                    num_samples,
                )
                for name, results in found.items()
            }
            for group in groups
            if len(groups) > 1
        },
        "cases": _cases(found),
        "comparison": comparison,
        "verdict": _verdict(comparison),
        "healthy_reconstruction": _healthy_reconstruction(model),
        "counts": _counts(model),
    }


def _cases(
    found: Mapping[str, Sequence[VolumeResult]],
) -> dict[str, dict[str, float]]:
    """Subject -> scorer -> AP, where there are too few subjects for a mean."""
    cases: dict[str, dict[str, float]] = {}
    for name, results in found.items():
        lesions = _with_lesion(results)
        if len(lesions) < MIN_SUBJECTS_TO_RANK:
            for one in lesions:
                precision = voxel.average_precision(voxel.rank(one.voxels))
                cases.setdefault(one.info.subject, {})[name] = precision
    return cases


def metrics(results: Sequence[VolumeResult], num_samples: int) -> dict[str, Any]:
    """The figures of one row; NaN where the data do not define one."""
    lesions = _with_lesion(results)
    row: dict[str, Any] = {"num_volumes": len(results), "num_lesion": len(lesions)}
    row |= _voxel_metrics(lesions, num_samples)
    row |= _threshold_metrics(results, lesions)
    known = [result for result in results if result.annotated]
    nothing = np.zeros(0, np.float32)  # concatenate needs an array
    row["slice_auroc"] = voxel.label_auroc(
        np.concatenate([nothing, *(result.slice_score for result in known)]),
        np.concatenate([nothing, *(result.slice_lesion for result in known)]),
    )
    row["volume_auroc"] = voxel.label_auroc(
        np.array([result.volume_score for result in results]),
        np.array([result.abnormal for result in results]),
    )
    return row


def _voxel_metrics(lesions: Sequence[VolumeResult], num_samples: int) -> dict[str, Any]:
    if not lesions:
        return {}
    rankings = [voxel.rank(result.voxels) for result in lesions]
    pooled = voxel.rank(voxel.pool([result.voxels for result in lesions]))
    ceiling, threshold = voxel.best_dice(pooled)
    precisions = [voxel.average_precision(ranking) for ranking in rankings]
    row: dict[str, Any] = {
        "ap_pooled": voxel.average_precision(pooled),
        "ap_volume_mean": float(np.mean(precisions)),
        "auroc_pooled": voxel.auroc(pooled),
        "auroc_volume_mean": float(np.mean([voxel.auroc(one) for one in rankings])),
        "dice_ceiling_pooled": ceiling,
        "dice_ceiling_threshold": threshold,
        "dice_ceiling_volume_mean": float(
            np.mean([voxel.best_dice(one)[0] for one in rankings])
        ),
        "prevalence_pooled": pooled.num_lesion
        / (pooled.num_lesion + pooled.num_normal),
    }
    if len(lesions) >= MIN_SUBJECTS_TO_RANK:
        named = zip((one.info.subject for one in lesions), precisions, strict=True)
        interval = statistics.bootstrap_mean(dict(named), num_samples=num_samples)
        row["ap_volume_mean_interval"] = [interval.low, interval.high]
    return row


def _threshold_metrics(
    results: Sequence[VolumeResult], lesions: Sequence[VolumeResult]
) -> dict[str, float]:
    row = {}
    for rule in results[0].dice:
        values = [result.dice[rule] for result in lesions]
        row[f"dice_{rule}_volume_mean"] = float(np.mean(values)) if values else np.nan
        healthy = [one.found_voxels[rule] for one in results if not one.abnormal]
        if healthy:
            row[f"false_positive_voxels_{rule}_healthy_mean"] = float(np.mean(healthy))
    return row


def _compare(
    found: Mapping[str, Sequence[VolumeResult]], num_samples: int
) -> dict[str, Any]:
    """The model's AP per volume against the best baseline's, paired by subject."""
    precisions = {
        name: {
            one.info.subject: voxel.average_precision(voxel.rank(one.voxels))
            for one in _with_lesion(results)
        }
        for name, results in found.items()
    }
    (model, values), *others = precisions.items()
    if not others or len(values) < MIN_SUBJECTS_TO_RANK:
        return {"num_subjects": len(values)}
    best, baseline = max(others, key=lambda item: np.mean(list(item[1].values())))
    difference = statistics.paired_bootstrap(values, baseline, num_samples=num_samples)
    return {
        "num_subjects": len(values),
        "model": model,
        "best_baseline": best,
        "ap_volume_mean_difference": difference.estimate,
        "interval": [difference.low, difference.high],
    }


def _verdict(comparison: Mapping[str, Any]) -> str:
    count = comparison["num_subjects"]
    if not count:
        return "No annotated lesions: there are no voxel figures."
    if "interval" not in comparison:
        return f"{count} annotated lesion volumes: single cases, no ranking."
    low, high = comparison["interval"]
    difference = comparison["ap_volume_mean_difference"]
    text = (
        f"AP (volume mean) minus that of the best baseline, "
        f"{comparison['best_baseline']}: {difference:+.3f}, 95 % interval "
        f"[{low:+.3f}, {high:+.3f}] over {count} subjects. "
    )
    if count < MIN_SUBJECTS_TO_BEAT:
        side = "above" if difference > 0 else "below"
        return (
            f"{text}The model is {side} this baseline; fewer than "
            f"{MIN_SUBJECTS_TO_BEAT} subjects allow no stronger statement."
        )
    if low > 0:
        return text + "In this run the model beats the baselines (one seed)."
    if high < 0:
        return text + "The model is worse than this baseline."
    return text + "The model does not beat the baselines."


def _healthy_reconstruction(results: Sequence[VolumeResult]) -> dict[str, float]:
    healthy = [one.reconstruction for one in results if not one.abnormal]
    if not healthy or not healthy[0]:
        return {}
    return {
        name: float(np.mean([errors[name] for errors in healthy]))
        for name in healthy[0]
    }


def _counts(results: Sequence[VolumeResult]) -> dict[str, int]:
    abnormal = [result for result in results if result.abnormal]
    return {
        "volumes without annotation": sum(not one.annotated for one in results),
        "abnormal volumes with an empty mask": sum(
            one.annotated and not _has_lesion(one) for one in abnormal
        ),
        "volumes with neither lesion nor finding (no Dice)": sum(
            one.annotated and bool(np.isnan(one.dice.get("healthy_fpr", 0.0)))
            for one in results
        ),
        "lesion voxels outside the eroded brain": sum(
            one.voxels.outside_lesion for one in abnormal
        ),
        "lesion voxels": sum(
            int(one.voxels.lesion.sum()) + one.voxels.outside_lesion for one in abnormal
        ),
    }


def training_state(
    config: ExperimentConfig, step: int, lines: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """What must stand beside every result: how far the model was trained.

    Args:
      config: The run's config.
      step: The checkpoint.
      lines: The run's `metrics.jsonl`.

    Returns:
      Slices seen, per cent of the paper's budget (None if unknown), relative slope of
      the validation loss over the last fifth of the run up to `step` and at least
      its last two values (negative = still falling; None with fewer than two),
      training seconds, and whether the run counts as undertrained: less than a
      quarter of the budget and not known to have stopped falling.
    """
    losses, seconds = [], None
    for line in lines:
        if line["step"] > step:
            break
        seconds = line.get("perf/train_seconds", seconds)
        if "validation/loss" in line:
            losses.append((line["step"], line["validation/loss"]))
    slices = step * config.batch_size
    share = None
    if config.reference_slices:
        share = 100.0 * slices / config.reference_slices
    last_fifth = sum(point[0] >= 0.8 * step for point in losses)
    slope = _relative_slope(losses[-max(last_fifth, 2) :])
    falling = slope is None or slope < 0
    return {
        "slices_seen": slices,
        "percent_of_reference": share,
        "validation_slope": slope,
        "train_seconds": seconds,
        "undertrained": share is not None and share < 25.0 and falling,
    }


def _relative_slope(points: Sequence[tuple[int, float]]) -> float | None:
    """Change of the fitted line over the points, as a share of their mean."""
    if len(points) < 2:
        return None
    steps, losses = np.array(points, np.float64).T
    slope = np.polyfit(steps, losses, 1)[0]
    return float(slope * (steps[-1] - steps[0]) / losses.mean())


def shown_subjects(results: Sequence[VolumeResult]) -> dict[str, VolumeResult]:
    """The subjects to show: caption -> result.

    The best, the median and the worst by AP; without annotated lesions those with
    the highest, the median and the lowest volume score.
    """
    chosen = _with_lesion(results)
    if chosen:
        words = ("best", "median", "worst")
        values = [voxel.average_precision(voxel.rank(one.voxels)) for one in chosen]
        captions = [f"AP {value:.2f}" for value in values]
    else:
        chosen, words = list(results), ("highest", "median", "lowest")
        values = [one.volume_score for one in chosen]
        captions = [f"score {value:.3g}" for value in values]
    order = [int(place) for place in np.argsort(values)[::-1]]
    places = {0: words[0], len(order) // 2: words[1], len(order) - 1: words[2]}
    if len(order) == 2:  # one of two is no median
        places = {0: words[0], 1: words[2]}
    elif len(order) == 1:
        places = {0: "only"}
    shown = {}
    for place, word in places.items():
        result, caption = chosen[order[place]], captions[order[place]]
        shown[f"{word}: {result.info.subject}\n{caption}"] = result
    return shown


def subject_row(result: VolumeResult) -> dict[str, Any]:
    """One line of the per-subject table."""
    row: dict[str, Any] = {
        "subject": result.info.subject,
        "patient": result.info.patient,
        "label": result.info.label,
        "kind": result.info.extra.get("kind", ""),
        "annotated": int(result.annotated),
        "volume_score": result.volume_score,
        "lesion_voxels": int(result.voxels.lesion.sum()) + result.voxels.outside_lesion,
        "lesion_voxels_outside_brain": result.voxels.outside_lesion,
        "ap": "",
        "auroc": "",
        "dice_ceiling": "",
    }
    if result.annotated and _has_lesion(result):
        ranking = voxel.rank(result.voxels)
        row["ap"] = voxel.average_precision(ranking)
        row["auroc"] = voxel.auroc(ranking)
        row["dice_ceiling"] = voxel.best_dice(ranking)[0]
    for rule, value in result.dice.items():
        unknown = np.isnan(value) or not result.annotated
        row[f"dice_{rule}"] = "" if unknown else value
        row[f"found_voxels_{rule}"] = result.found_voxels[rule]
    for name in ("l1_brain", "l1_box", "ssim"):
        row[name] = result.reconstruction.get(name, "")
    return row


def draw_curves(
    found: Mapping[str, Sequence[VolumeResult]], lines: Iterable[Mapping[str, Any]]
) -> dict[str, bytes]:
    """Draws training, ROC, precision-recall and Dice curves, pooled over volumes."""
    drawn = {}
    series = {}
    for name in ("train/loss", "validation/loss"):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            steps, values = np.array(points).T
            series[name] = (steps, values)
    if series:
        drawn["training"] = figures.curves(
            series, title="Training", x_label="step", y_label="loss"
        )
    traced = {}
    for name, results in found.items():
        lesions = _with_lesion(results)
        if lesions and name != "prevalence":
            pooled = voxel.rank(voxel.pool([result.voxels for result in lesions]))
            traced[name] = voxel.curves(pooled)
    if not traced:
        return drawn
    for figure, x, y, title in (
        ("roc", "fpr", "recall", "ROC, pooled voxels"),
        ("precision_recall", "recall", "precision", "Precision and recall, pooled"),
        ("dice", "fpr", "dice", "Dice over the operating point, pooled"),
    ):
        drawn[figure] = figures.curves(
            {name: (curve[x], curve[y]) for name, curve in traced.items()},
            title=title,
            x_label={"fpr": "false-positive rate"}.get(x, x),
            y_label=y,
            log_x=figure == "dice",
        )
    return drawn


def _has_lesion(result: VolumeResult) -> bool:
    return bool(result.voxels.lesion.any()) or result.voxels.outside_lesion > 0


def _with_lesion(results: Sequence[VolumeResult]) -> list[VolumeResult]:
    return [
        one for one in results if one.abnormal and one.annotated and _has_lesion(one)
    ]


def _group(result: VolumeResult, group_by: str) -> str:
    return result.info.extra.get(group_by, "")
