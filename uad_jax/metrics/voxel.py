"""Exact voxel metrics on the host: the reference of every other form.

One record (`VoxelScores`) holds the scored voxels of a volume, or of many pooled
(`pool`). Voxels outside the eroded brain are only counted: they rank below every
scored voxel, tied among themselves, and are never predicted. Lesion voxels among
them stay in the reference, so that a mask which misses a lesion costs recall.

`*_pooled` is a metric of all voxels of all volumes together; `*_volume_mean` is the
mean of the metric over volumes. The two differ and are never called by one name.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class VoxelScores(NamedTuple):
    """Scored voxels.

    Attributes:
      scores: [n] float32 or float64, finite, higher = more abnormal.
      lesion: [n] bool.
      outside_lesion: Lesion voxels that are not scored; they rank lowest.
      outside_normal: Other voxels that are not scored; they rank lowest.
    """

    scores: np.ndarray
    lesion: np.ndarray
    outside_lesion: int = 0
    outside_normal: int = 0


class Confusion(NamedTuple):
    """Voxel counts of a prediction."""

    tp: int
    fp: int
    tn: int
    fn: int


class Ranking(NamedTuple):
    """Scores sorted once; what all metrics are read from.

    Attributes:
      normal: Sorted scores of normal voxels, [n].
      levels: Distinct scores of lesion voxels, descending, [m].
      tp: Lesion voxels scored at or above each level, [m] int64.
      fp: Normal voxels scored at or above each level, [m] int64.
      outside_lesion: See `VoxelScores`.
      outside_normal: See `VoxelScores`.
    """

    normal: np.ndarray
    levels: np.ndarray
    tp: np.ndarray
    fp: np.ndarray
    outside_lesion: int
    outside_normal: int

    @property
    def num_lesion(self) -> int:
        """Lesion voxels, scored or not."""
        scored = int(self.tp[-1]) if len(self.tp) else 0
        return scored + self.outside_lesion

    @property
    def num_normal(self) -> int:
        """Normal voxels, scored or not."""
        return len(self.normal) + self.outside_normal


def from_map(
    anomaly_map: np.ndarray,
    eroded: np.ndarray,
    lesion: np.ndarray,
    brain: np.ndarray | None = None,
) -> VoxelScores:
    """Collects the voxels of one post-processed volume.

    Args:
      anomaly_map: [D, H, W] float32.
      eroded: Voxels that are scored, [D, H, W] bool.
      lesion: [D, H, W] bool.
      brain: Voxels that count at all, [D, H, W] bool; None = the whole box. Lesion
        voxels always count.

    Returns:
      The scored voxels and the counts of the others.
    """
    outside = ~eroded if brain is None else brain & ~eroded
    return VoxelScores(
        scores=anomaly_map[eroded],
        lesion=lesion[eroded],
        outside_lesion=int(np.count_nonzero(lesion & ~eroded)),
        outside_normal=int(np.count_nonzero(outside & ~lesion)),
    )


def pool(volumes: Sequence[VoxelScores]) -> VoxelScores:
    """Joins the voxels of several volumes."""
    return VoxelScores(
        scores=np.concatenate([volume.scores for volume in volumes]),
        lesion=np.concatenate([volume.lesion for volume in volumes]),
        outside_lesion=sum(volume.outside_lesion for volume in volumes),
        outside_normal=sum(volume.outside_normal for volume in volumes),
    )


def rank(voxels: VoxelScores) -> Ranking:
    """Sorts the scores.

    Raises:
      TypeError: If the scores are not float32 or float64; half precision would tie
        scores that differ.
      ValueError: If a score is NaN or infinite, or the shapes differ.
    """
    scores, lesion = np.asarray(voxels.scores), np.asarray(voxels.lesion)
    if scores.dtype not in (np.float32, np.float64):
        raise TypeError(
            f"Expected float32 or float64 scores, found {scores.dtype}. Convert the "
            "map where it is made, before values are lost."
        )
    if scores.ndim != 1 or scores.shape != lesion.shape or lesion.dtype != bool:
        raise ValueError(
            f"Expected flat scores and flat bool labels of one length, found "
            f"{scores.shape} and {lesion.shape} {lesion.dtype}."
        )
    normal = scores[~lesion]
    normal.sort()
    abnormal, counts = np.unique(scores[lesion], return_counts=True)
    for part in (normal, abnormal):
        # NaN sorts last, so the ends tell about all of it.
        if len(part) and not np.isfinite(part[[0, -1]]).all():
            raise ValueError(
                "The scores hold NaN or infinity. A metric of them would be wrong "
                "without a sign; mend the anomaly map."
            )
    levels = abnormal[::-1]
    return Ranking(
        normal=normal,
        levels=levels,
        tp=np.cumsum(counts[::-1], dtype=np.int64),
        fp=len(normal) - np.searchsorted(normal, levels, side="left"),
        outside_lesion=voxels.outside_lesion,
        outside_normal=voxels.outside_normal,
    )


def average_precision(ranking: Ranking) -> float:
    """Sums precision over steps of recall; tied scores are one step.

    Returns:
      sum_i (R_i - R_{i-1}) P_i in (0, 1]; NaN without lesion voxels. The prevalence
      for a constant map. Not the trapezoid, which overstates (0.525 for a constant
      map at 5 % prevalence).
    """
    total = ranking.num_lesion
    if not total:
        return float("nan")
    steps = np.diff(ranking.tp, prepend=0)
    area = float(np.sum(steps * (ranking.tp / (ranking.tp + ranking.fp))))
    area += ranking.outside_lesion * total / (total + ranking.num_normal)
    return area / total


def auroc(ranking: Ranking) -> float:
    """Probability that a lesion voxel scores above a normal one; a tie counts half.

    Returns:
      Value in [0, 1]; NaN if either kind is absent.
    """
    total, normal = ranking.num_lesion, ranking.num_normal
    if not total or not normal:
        return float("nan")
    steps = np.diff(ranking.tp, prepend=0).astype(np.float64)
    above = len(ranking.normal) - np.searchsorted(
        ranking.normal, ranking.levels, side="right"
    )
    won = np.sum(steps * (normal - 0.5 * (above + ranking.fp)))
    won += 0.5 * ranking.outside_lesion * ranking.outside_normal
    return float(won / (float(total) * float(normal)))


def best_dice(ranking: Ranking) -> tuple[float, float]:
    """Finds the largest Dice over all thresholds.

    Returns:
      The Dice and the threshold, to be used as `score > threshold`; (NaN, NaN)
      without lesion voxels. The threshold is the largest score below the chosen
      block of scores, and of equal Dice the highest.
    """
    total = ranking.num_lesion
    if not total:
        return float("nan"), float("nan")
    if not len(ranking.levels):
        highest = ranking.normal[-1] if len(ranking.normal) else 0.0
        return 0.0, float(highest)
    values = 2.0 * ranking.tp / (total + ranking.tp + ranking.fp)
    best = int(np.argmax(values))
    level = ranking.levels[best]
    lower = [ranking.levels[best + 1]] if best + 1 < len(ranking.levels) else []
    place = len(ranking.normal) - int(ranking.fp[best])
    if place:
        lower.append(ranking.normal[place - 1])
    below = max(lower) if lower else np.nextafter(level, level.dtype.type(-np.inf))
    return float(values[best]), float(below)


def label_auroc(scores: np.ndarray, abnormal: np.ndarray) -> float:
    """AUROC of one score per slice or per volume.

    Args:
      scores: [n] float32 or float64.
      abnormal: [n] bool.

    Returns:
      Value in [0, 1]; NaN if either kind is absent.
    """
    return auroc(rank(VoxelScores(np.asarray(scores), np.asarray(abnormal, bool))))


def prevalence(voxels: VoxelScores) -> float:
    """Share of lesion among all voxels that count, scored or not; NaN without any."""
    lesion = int(np.count_nonzero(voxels.lesion)) + voxels.outside_lesion
    normal = int(np.count_nonzero(~voxels.lesion)) + voxels.outside_normal
    return _ratio(lesion, lesion + normal)


def lost_lesion(voxels: VoxelScores) -> float:
    """Share of lesion outside the eroded brain: what no threshold can find.

    Returns:
      Value in [0, 1]; NaN without lesion. Recall is at most 1 minus this.
    """
    lesion = int(np.count_nonzero(voxels.lesion)) + voxels.outside_lesion
    return _ratio(voxels.outside_lesion, lesion)


def confusion_at(ranking: Ranking, threshold: float) -> Confusion:
    """Counts voxels for the prediction `score > threshold`."""
    # In the dtype of the scores, as every other comparison is.
    limit = ranking.normal.dtype.type(threshold)
    kept = int(np.searchsorted(-ranking.levels, -limit, side="left"))
    tp = int(ranking.tp[kept - 1]) if kept else 0
    fp = len(ranking.normal) - int(np.searchsorted(ranking.normal, limit, side="right"))
    return Confusion(tp, fp, ranking.num_normal - fp, ranking.num_lesion - tp)


def confusion_of_masks(prediction: np.ndarray, lesion: np.ndarray) -> Confusion:
    """Counts voxels of a segmentation against the reference, both bool."""
    tp = int(np.count_nonzero(prediction & lesion))
    fp = int(np.count_nonzero(prediction)) - tp
    fn = int(np.count_nonzero(lesion)) - tp
    return Confusion(tp, fp, lesion.size - tp - fp - fn, fn)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")


def dice(counts: Confusion) -> float:
    """2 TP / (2 TP + FP + FN); NaN if reference and prediction are both empty."""
    return _ratio(2 * counts.tp, 2 * counts.tp + counts.fp + counts.fn)


def precision(counts: Confusion) -> float:
    """TP / (TP + FP); NaN for an empty prediction."""
    return _ratio(counts.tp, counts.tp + counts.fp)


def recall(counts: Confusion) -> float:
    """TP / (TP + FN); NaN without lesion voxels."""
    return _ratio(counts.tp, counts.tp + counts.fn)


def false_positive_rate(counts: Confusion) -> float:
    """FP / (FP + TN); NaN without normal voxels. Not FP / (FP + TP)."""
    return _ratio(counts.fp, counts.fp + counts.tn)


def false_discovery_rate(counts: Confusion) -> float:
    """FP / (FP + TP), which some published code calls the false positive rate."""
    return _ratio(counts.fp, counts.fp + counts.tp)


def psnr(
    image: np.ndarray,
    reconstruction: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    data_range: float = 1.0,
) -> float:
    """Peak signal-to-noise ratio of a reconstruction.

    Args:
      image: Any shape, in the units of `data_range`.
      reconstruction: Of the same shape.
      mask: Voxels that count, bool, of the image's shape or broadcast to it (a brain
        mask [D, H, W, 1] over channels); None = all.
      data_range: Largest minus smallest possible intensity, > 0.

    Returns:
      10 log10(data_range^2 / mean squared error) in dB, summed in float64; infinity
      for equal images, NaN where no voxel counts.

    Raises:
      ValueError: If the shapes differ or `data_range` is not above 0.
    """
    if image.shape != reconstruction.shape or not data_range > 0:
        raise ValueError(
            "Expected two images of one shape and a data_range above 0, found "
            f"{image.shape}, {reconstruction.shape} and {data_range}."
        )
    squared = (np.asarray(image, np.float64) - reconstruction) ** 2
    if mask is not None:
        squared = squared[np.broadcast_to(mask, squared.shape)]
    if not squared.size:
        return float("nan")
    error = float(squared.mean())
    return float(10 * np.log10(data_range**2 / error)) if error else float("inf")


def curves(ranking: Ranking, num_points: int = 512) -> dict[str, np.ndarray]:
    """Traces the curves for a figure, every point exact.

    Args:
      ranking: Sorted scores.
      num_points: At most twice as many points, spread evenly over the ranks of the
        lesion voxels and of the normal ones.

    Returns:
      "threshold" (descending), "recall", "precision" (NaN where nothing is
      predicted), "fpr" and "dice" of `score > threshold`, [points] float64 each.
    """
    points = [_spread(ranking.normal, num_points), _spread(ranking.levels, num_points)]
    limits = np.unique(np.concatenate(points))[::-1]
    rows = [confusion_at(ranking, limit) for limit in limits]
    return {
        "threshold": limits.astype(np.float64),
        "recall": np.array([recall(row) for row in rows]),
        "precision": np.array([precision(row) for row in rows]),
        "fpr": np.array([false_positive_rate(row) for row in rows]),
        "dice": np.array([dice(row) for row in rows]),
    }


def _spread(values: np.ndarray, num_points: int) -> np.ndarray:
    if not len(values):
        return values
    picks = np.linspace(0, len(values) - 1, min(num_points, len(values)))
    return values[np.rint(picks).astype(np.int64)]
