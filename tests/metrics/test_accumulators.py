import numpy as np
import pytest

from tests import fresh
from uad_jax.metrics import accumulators, calibration, voxel
from uad_jax.metrics.voxel import VoxelScores


def _volume(seed: int, decimals: int = 6) -> VoxelScores:
    rng = np.random.default_rng(seed)
    lesion = rng.random(3000) < 0.05
    scores = np.round(rng.normal(size=3000) * 3 + 4 * lesion, decimals)
    return VoxelScores(scores.astype(np.float32), lesion, 5, 200)


def _summed(
    volumes: list[VoxelScores], edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Histogram of several volumes: bins [2, K + 1], outside [2]."""
    parts = [accumulators.histogram(one, edges) for one in volumes]
    return sum(bins for bins, _ in parts), sum(outside for _, outside in parts)


def test_bins_by_hand() -> None:
    scores = np.float32([-5.0, -1.0, -0.5, 0.0, 1.0, 2.0, 2.1])
    lesion = np.array([0, 1, 0, 1, 1, 0, 0], bool)
    edges = np.float32([-1.0, 0.0, 2.0])
    bins, outside = accumulators.histogram(VoxelScores(scores, lesion, 3, 4), edges)
    assert bins.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert outside.tolist() == [4, 3]


@pytest.mark.parametrize("decimals", [0, 1, 6])
@pytest.mark.parametrize("seed", range(3))
def test_with_a_bin_per_distinct_score_all_is_exact(seed: int, decimals: int) -> None:
    volumes = [_volume(3 * seed + n, decimals) for n in range(3)]
    edges = np.unique(np.concatenate([one.scores for one in volumes]))
    found = _summed(volumes, edges)
    ranking = voxel.rank(voxel.pool(volumes))
    precision, area = voxel.average_precision(ranking), voxel.auroc(ranking)
    assert accumulators.average_precision(*found) == pytest.approx(precision, abs=1e-12)
    assert accumulators.auroc(*found) == pytest.approx(area, abs=1e-12)
    value, place = accumulators.best_dice(*found)
    assert (value, edges[place]) == voxel.best_dice(ranking)


@pytest.mark.parametrize("constant", [True, False])
def test_the_whole_brain_may_be_the_best_prediction(constant: bool) -> None:
    rng = np.random.default_rng(7)
    scores = np.full(50, 2.5) if constant else np.round(rng.normal(size=50), 1)
    lesion = rng.random(50) < 0.6
    lesion[scores.argmin()] = True
    one = VoxelScores(scores.astype(np.float32), lesion, 1, 2)
    found = accumulators.histogram(one, np.unique(one.scores))
    value, place = accumulators.best_dice(*found)
    assert value == voxel.best_dice(voxel.rank(one))[0]
    assert place == -1


def test_with_quantile_edges_all_is_close_and_ap_is_not_high() -> None:
    volumes = [_volume(seed) for seed in range(6)]
    edges = np.array(calibration.score_edges(volumes[:3], 2048), np.float32)
    found, ranking = _summed(volumes, edges), voxel.rank(voxel.pool(volumes))
    exact = voxel.average_precision(ranking)
    assert exact - 2e-3 < accumulators.average_precision(*found) <= exact + 1e-4
    assert accumulators.auroc(*found) == pytest.approx(voxel.auroc(ranking), abs=1e-4)
    value, place = accumulators.best_dice(*found)
    assert value == pytest.approx(voxel.best_dice(ranking)[0], abs=5e-3)
    counts = voxel.confusion_at(ranking, edges[place])
    assert voxel.dice(counts) == pytest.approx(value)


def test_fault_D4_scores_beyond_the_edges_fall_into_the_overflow_bins() -> None:
    one = _volume(0)
    far = one._replace(scores=one.scores * np.float32(1e20))
    bins, outside = accumulators.histogram(far, np.float32([-1, 0, 1]))
    assert bins.sum() == 3000
    assert bins[:, [0, -1]].sum() > 2900
    assert 0 < accumulators.average_precision(bins, outside) < 1


def test_metrics_take_many_histograms_at_once() -> None:
    edges = np.linspace(-8, 12, 50).astype(np.float32)
    parts = [accumulators.histogram(_volume(seed), edges) for seed in range(3)]
    bins, outside = (np.stack(arrays) for arrays in zip(*parts, strict=True))
    for metric in (accumulators.average_precision, accumulators.auroc):
        np.testing.assert_allclose(metric(bins, outside), [metric(*p) for p in parts])


def test_fault_D1_without_lesions_there_is_no_ap() -> None:
    bins, outside = np.array([[3, 4, 5], [0, 0, 0]]), np.array([7, 0])
    assert np.isnan(accumulators.average_precision(bins, outside))
    assert np.isnan(accumulators.auroc(bins, outside))
    assert np.isnan(accumulators.best_dice(bins, outside)[0])


def test_curves_are_the_exact_ones_at_every_edge() -> None:
    one = _volume(int(fresh.rng().integers(2**31)), decimals=1)
    edges = np.unique(one.scores)[5:-5]
    bins, outside = accumulators.histogram(one, edges)
    found = accumulators.curves(bins, outside)
    ranking = voxel.rank(one)
    for place, edge in enumerate(edges[::-1]):
        counts = voxel.confusion_at(ranking, edge)
        assert found["recall"][place] == pytest.approx(voxel.recall(counts))
        assert found["precision"][place] == pytest.approx(voxel.precision(counts))
        assert found["fpr"][place] == pytest.approx(voxel.false_positive_rate(counts))
        assert found["dice"][place] == pytest.approx(voxel.dice(counts))
