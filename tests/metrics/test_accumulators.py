import numpy as np
import pytest

from uad_jax.metrics import accumulators, calibration, voxel
from uad_jax.metrics.accumulators import VoxelCounts
from uad_jax.metrics.voxel import VoxelScores
from uad_jax.ops import histogram


def _volume(seed: int, decimals: int = 6) -> VoxelScores:
    rng = np.random.default_rng(seed)
    lesion = rng.random(3000) < 0.05
    scores = np.round(rng.normal(size=3000) * 3 + 4 * lesion, decimals)
    return VoxelScores(scores.astype(np.float32), lesion, 5, 200)


def _counts(volumes: list[VoxelScores], edges: np.ndarray) -> VoxelCounts:
    found = VoxelCounts.empty(edges)
    for one in volumes:
        counted = np.ones((1, len(one.scores)), bool)
        bins = histogram.counts(one.scores[None], one.lesion[None], counted, edges)
        outside = np.array([[one.outside_normal, one.outside_lesion]])
        found.add(np.asarray(bins), outside)
    return found


@pytest.mark.parametrize("decimals", [0, 1, 6])
@pytest.mark.parametrize("seed", range(3))
def test_with_a_bin_per_distinct_score_all_is_exact(seed: int, decimals: int) -> None:
    volumes = [_volume(3 * seed + n, decimals) for n in range(3)]
    edges = np.unique(np.concatenate([one.scores for one in volumes]))
    found = _counts(volumes, edges)
    ranking = voxel.rank(voxel.pool(volumes))
    precision, area = voxel.average_precision(ranking), voxel.auroc(ranking)
    assert found.average_precision() == pytest.approx(precision, abs=1e-12)
    assert found.auroc() == pytest.approx(area, abs=1e-12)
    assert found.best_dice() == voxel.best_dice(ranking)
    assert found.num_volumes == 3


@pytest.mark.parametrize("constant", [True, False])
def test_the_whole_brain_may_be_the_best_prediction(constant: bool) -> None:
    rng = np.random.default_rng(7)
    scores = np.full(50, 2.5) if constant else np.round(rng.normal(size=50), 1)
    lesion = rng.random(50) < 0.6
    lesion[scores.argmin()] = True
    one = VoxelScores(scores.astype(np.float32), lesion, 1, 2)
    ranking = voxel.rank(one)
    value, threshold = _counts([one], np.unique(one.scores)).best_dice()
    assert value == voxel.best_dice(ranking)[0]
    assert voxel.confusion_at(ranking, threshold) == voxel.confusion_at(ranking, -99)


def test_with_quantile_edges_all_is_close_and_ap_is_not_high() -> None:
    volumes = [_volume(seed) for seed in range(6)]
    edges = np.array(calibration.score_edges(volumes[:3], 2048), np.float32)
    found, ranking = _counts(volumes, edges), voxel.rank(voxel.pool(volumes))
    exact = voxel.average_precision(ranking)
    assert exact - 2e-3 < found.average_precision() <= exact + 1e-4
    assert found.auroc() == pytest.approx(voxel.auroc(ranking), abs=1e-4)
    value, threshold = found.best_dice()
    assert value == pytest.approx(voxel.best_dice(ranking)[0], abs=5e-3)
    assert voxel.dice(voxel.confusion_at(ranking, threshold)) == pytest.approx(value)


def test_fault_D4_scores_beyond_the_edges_fall_into_the_overflow_bins() -> None:
    one = _volume(0)
    far = one._replace(scores=one.scores * np.float32(1e20))
    found = _counts([far], np.float32([-1, 0, 1]))
    assert found.bins.sum() == 3000
    assert found.bins[:, [0, -1]].sum() > 2900
    assert 0 < found.average_precision() < 1


def test_merging_parts_gives_the_whole() -> None:
    volumes = [_volume(seed) for seed in range(4)]
    edges = np.linspace(-8, 12, 100).astype(np.float32)
    whole = _counts(volumes, edges)
    merged = _counts(volumes[:1], edges).merge(_counts(volumes[1:], edges))
    np.testing.assert_array_equal(merged.bins, whole.bins)
    np.testing.assert_array_equal(merged.outside, whole.outside)
    assert merged.num_volumes == whole.num_volumes
    with pytest.raises(ValueError, match="one calibration"):
        merged.merge(VoxelCounts.empty(edges[:-1]))


def test_metrics_take_many_histograms_at_once() -> None:
    edges = np.linspace(-8, 12, 50).astype(np.float32)
    parts = [_counts([_volume(seed)], edges) for seed in range(3)]
    bins = np.stack([part.bins for part in parts])
    outside = np.stack([part.outside for part in parts])
    aps = accumulators.average_precision(bins, outside)
    np.testing.assert_allclose(aps, [part.average_precision() for part in parts])
    areas = accumulators.auroc(bins, outside)
    np.testing.assert_allclose(areas, [part.auroc() for part in parts])


def test_host_histogram_equals_that_of_the_device() -> None:
    one = _volume(0, decimals=1)
    edges = np.unique(np.append(one.scores[:30], np.float32([-8, 12])))
    bins, outside = accumulators.histogram(one, edges)
    expected = _counts([one], edges)
    np.testing.assert_array_equal(bins, expected.bins)
    np.testing.assert_array_equal(outside, expected.outside)


def test_counts_beyond_int32_do_not_overflow() -> None:
    found = VoxelCounts.empty(np.float32([0.0]))
    counts = np.full((3, 2, 2), 2**30, np.int32)
    found.add(counts, np.zeros((3, 2), np.int32))
    assert (found.bins == 3 * 2**30).all()


def test_fault_D1_without_lesions_there_is_no_ap() -> None:
    found = VoxelCounts.empty(np.float32([0.0, 1.0]))
    found.add(np.array([[[3, 4, 5], [0, 0, 0]]]), np.array([[7, 0]]))
    assert np.isnan(found.average_precision())
    assert np.isnan(found.auroc())
    assert np.isnan(found.best_dice()).all()


def test_wrong_shapes_and_edges_are_refused() -> None:
    with pytest.raises(ValueError, match="ascending"):
        VoxelCounts.empty(np.float32([1.0, 1.0]))
    with pytest.raises(ValueError, match="Expected counts"):
        VoxelCounts.empty(np.float32([1.0])).add(np.zeros((2, 3)), np.zeros((2, 2)))


def test_curves_are_the_exact_ones_at_every_edge() -> None:
    one = _volume(int(np.random.default_rng().integers(2**31)), decimals=1)
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
