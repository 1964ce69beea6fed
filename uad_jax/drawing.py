"""Chooses what a report shows, and draws it."""

from collections.abc import Mapping, Sequence

import numpy as np

from uad_jax import charts, export, figures, summary, writer
from uad_jax.evaluation import GROUP_BY, Context, Scored
from uad_jax.figures import Case
from uad_jax.measuring import VolumeResult
from uad_jax.metrics import accumulators, voxel
from uad_jax.metrics.calibration import Calibration
from uad_jax.scoring import Stage

_GALLERY = 12  # volumes of a gallery


def chosen(results: Sequence[VolumeResult]) -> dict[str, VolumeResult]:
    """The subjects to show: caption -> result.

    The best, the median and the worst by AP; without annotated lesions those with
    the highest volume scores, in order.
    """
    lesions = [one for one in results if one.has_lesion]
    if not lesions:
        ranked = sorted(results, key=lambda one: -one.volume_score)[:_GALLERY]
        return {f"{n + 1}. {one.info.subject}": one for n, one in enumerate(ranked)}
    order = np.argsort([one.ap for one in lesions])[::-1].tolist()
    words = {0: "best", len(order) // 2: "median", len(order) - 1: "worst"}
    if len(order) == 2:  # one of two is no median
        words = {0: "best", 1: "worst"}
    elif len(order) == 1:
        words = {0: "only"}
    shown = {}
    for place, word in words.items():
        one = lesions[order[place]]
        shown[f"{word}: {one.info.subject}\nAP {one.ap:.2f}"] = one
    return shown


def case(
    caption: str,
    result: VolumeResult,
    scored: Scored,
    rule: str | None,
    calibrated: Calibration | None,
) -> Case:
    """Gathers what is shown of one subject.

    Args:
      caption: From `chosen`.
      result: The volume.
      scored: Its arrays, pictures included.
      rule: Of the operating threshold.
      calibrated: Calibration of the scorer, for the percentile of the volume score.
    """
    arrays = scored.arrays
    assert arrays.image is not None, "scored without pictures"
    words = [caption, result.info.extra.get(GROUP_BY, "") or result.info.label]
    if not result.has_lesion and calibrated is not None:
        share = summary.percentile(
            result.volume_score, calibrated.healthy_volume_scores
        )
        words.append(f"above {share:.0f} % of healthy")
    nothing = np.zeros(arrays.brain.shape, bool)
    reconstruction = arrays.reconstruction
    return Case(
        title=", ".join(words),
        image=arrays.image[..., 0],
        reconstruction=None if reconstruction is None else reconstruction[..., 0],
        anomaly_map=export.shown(arrays),
        found=nothing if rule is None else scored.segmentations[rule],
        lesion=arrays.lesion if result.annotated and not result.sham else None,
        brain=arrays.brain,
        geometry=result.info.geometry,
    )


def draw(
    context: Context,
    found: Mapping[Stage, summary.Results],
    cases: Sequence[Case],
    threshold: float | None,
) -> dict[str, bytes]:
    """Draws all figures of a report, name -> PNG; marks the operating threshold."""
    processed = found[Stage.PROCESSED]
    results = processed[context.scorer]
    drawn = _training(context) | _curves(processed)
    healthy = np.array([one.volume_score for one in results if one.healthy])
    abnormal = np.array([one.volume_score for one in results if one.abnormal])
    if len(healthy) and len(abnormal):
        groups = {"healthy": healthy, "abnormal": abnormal}
        drawn["volume_scores"] = charts.volume_scores(groups)
    if cases:
        limit = max(float(np.quantile(case.anomaly_map, 0.998)) for case in cases)
        if any(one.has_lesion for one in results):
            drawn["cases"] = figures.case_panels(cases, limit, threshold=threshold)
        else:
            drawn["gallery"] = figures.gallery(cases, limit, threshold=threshold)
    return drawn


def _training(context: Context) -> dict[str, bytes]:
    """Losses over steps, of a run."""
    if context.config is None:
        return {}
    lines = writer.read_metrics(context.workdir)
    series = {}
    for name in ("train/loss", "validation/loss"):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            steps, values = np.array(points).T
            series[name] = (steps, values)
    if not series:
        return {}
    figure = charts.curves(series, title="Training", x_label="step", y_label="loss")
    return {"training": figure}


def _curves(found: summary.Results) -> dict[str, bytes]:
    """ROC, precision-recall and Dice, pooled over volumes."""
    traced = {
        name: curve
        for name, results in found.items()
        if name != "constant map" and (curve := _trace(results)) is not None
    }
    if not traced:
        return {}
    drawn = {}
    for figure, x, y, title in (
        ("roc", "fpr", "recall", "ROC, pooled voxels"),
        ("precision_recall", "recall", "precision", "Precision and recall, pooled"),
        ("dice", "fpr", "dice", "Dice over the operating point, pooled"),
    ):
        drawn[figure] = charts.curves(
            {name: (curve[x], curve[y]) for name, curve in traced.items()},
            title=title,
            x_label={"fpr": "false-positive rate"}.get(x, x),
            y_label=y,
            log_x=figure == "dice",
        )
    return drawn


def _trace(results: Sequence[VolumeResult]) -> dict[str, np.ndarray] | None:
    """Curves of one scorer, from histograms where there are any."""
    lesions = [one for one in results if one.has_lesion]
    if not lesions:
        return None
    if all(one.bins is not None for one in lesions):
        return accumulators.curves(*summary.summed_histograms(lesions))
    voxels = [one.voxels for one in lesions if one.voxels is not None]
    return voxel.curves(voxel.rank(voxel.pool(voxels)))
