"""Voxel metrics from histograms, for sets too large to hold or to sort.

Edges are quantiles of validation scores (`calibration.score_edges`), so that any
scale of scores will do. Scores that fall into one bin count as tied: AP comes out
slightly low, AUROC slightly towards 0.5; Dice is exact at every edge. With one bin
per distinct score all equal `metrics.voxel` exactly.
"""

import numpy as np

from uad_jax.metrics.voxel import VoxelScores


def histogram(voxels: VoxelScores, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts the voxels of one volume.

    Bin i holds edges[i - 1] < score <= edges[i]; bin 0 everything up to the first
    edge, the last bin everything above the last one. So `score > edges[i]` is exactly
    "in a bin above i".

    Args:
      voxels: Of one volume.
      edges: Ascending, [K].

    Returns:
      Bins [2, K + 1] int64 (normal, lesion), and the voxels that are not scored and
      rank lowest, [2] int64 (normal, lesion).
    """
    edges = np.asarray(edges, voxels.scores.dtype)
    place = np.searchsorted(edges, voxels.scores, side="left")
    place += (len(edges) + 1) * voxels.lesion
    bins = np.bincount(place, minlength=2 * (len(edges) + 1))
    outside = np.array([voxels.outside_normal, voxels.outside_lesion], np.int64)
    return bins.reshape(2, -1).astype(np.int64), outside


def average_precision(bins: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Average precision of histograms; the scores of a bin are tied.

    Args:
      bins: [..., 2, K + 1]: normal, lesion; counts or non-negative weights.
      outside: [..., 2] voxels that rank lowest.

    Returns:
      [...] float64; NaN without lesion voxels.
    """
    steps, tp, fp = _descending(bins, outside)
    with np.errstate(invalid="ignore"):
        at = np.where(tp + fp > 0, tp / (tp + fp), 0.0)
        return np.sum(steps * at, axis=-1) / tp[..., -1]


def auroc(bins: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """AUROC of histograms; arguments as of `average_precision`."""
    steps, tp, fp = _descending(bins, outside)
    total = fp[..., -1:]
    before = np.concatenate([np.zeros_like(total), fp[..., :-1]], axis=-1)
    won = np.sum(steps * (total - 0.5 * (before + fp)), axis=-1)
    with np.errstate(invalid="ignore"):
        return won / (tp[..., -1] * fp[..., -1])


def best_dice(bins: np.ndarray, outside: np.ndarray) -> tuple[float, int]:
    """Largest Dice over the edges, and over the prediction of all scored voxels.

    Args:
      bins: [2, K + 1]: normal, lesion.
      outside: [2] voxels that rank lowest.

    Returns:
      Dice and the place of its edge, of equal Dice the highest; place -1 is the
      prediction of everything. (NaN, -1) without lesion voxels.
    """
    total = bins[1].sum() + outside[1]
    if not total:
        return float("nan"), -1
    fp, tp = np.cumsum(bins[:, ::-1], axis=1)  # above edges K - 1 to 0, then all
    values = 2 * tp / (total + tp + fp)
    best = int(np.argmax(values))
    return float(values[best]), len(values) - 2 - best


def curves(bins: np.ndarray, outside: np.ndarray) -> dict[str, np.ndarray]:
    """Traces the curves for a figure, a point per edge, thresholds descending.

    Args:
      bins: [2, K + 1]: normal, lesion; both kinds must be there.
      outside: [2] voxels that rank lowest.

    Returns:
      "recall", "precision" (NaN where nothing is predicted), "fpr" and "dice" of
      `score > edge`, [K] float64 each.
    """
    fp, tp = _above(bins)[:, ::-1]
    normal, lesion = bins.sum(axis=1) + outside
    with np.errstate(invalid="ignore"):
        return {
            "recall": tp / lesion,
            "precision": tp / (tp + fp),
            "fpr": fp / normal,
            "dice": 2 * tp / (lesion + tp + fp),
        }


def _above(bins: np.ndarray) -> np.ndarray:
    """Voxels above each edge, [2, K]: above edge i lie the bins after i."""
    return np.cumsum(bins[:, ::-1], axis=1)[:, -2::-1]


def _descending(
    bins: np.ndarray, outside: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    every = np.concatenate([np.asarray(outside)[..., None], bins], axis=-1)
    every = every[..., ::-1].astype(np.float64)  # exact below 2**53 voxels
    summed = np.cumsum(every, axis=-1)
    return every[..., 1, :], summed[..., 1, :], summed[..., 0, :]
