import numpy as np
import pytest
import skimage.metrics
import sklearn.metrics

from uad_jax.metrics import voxel
from uad_jax.metrics.voxel import VoxelScores


def _ranking(
    scores: list[float] | np.ndarray,
    lesion: list[int] | np.ndarray,
    outside_lesion: int = 0,
    outside_normal: int = 0,
) -> voxel.Ranking:
    return voxel.rank(
        VoxelScores(
            np.asarray(scores, np.float32),
            np.asarray(lesion, bool),
            outside_lesion,
            outside_normal,
        )
    )


def _random(seed: int, decimals: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    lesion = rng.random(500) < 0.1
    scores = np.round(rng.normal(size=500) + lesion, decimals).astype(np.float32)
    return scores, lesion


def test_hand_values() -> None:
    # Ranked: 0.9 lesion, 0.8 normal, 0.7 lesion, 0.1 normal.
    ranking = _ranking([0.1, 0.9, 0.8, 0.7], [0, 1, 0, 1])
    assert voxel.average_precision(ranking) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert voxel.auroc(ranking) == pytest.approx(3 / 4)
    value, threshold = voxel.best_dice(ranking)
    assert value == pytest.approx(2 * 2 / (2 + 3))
    assert threshold == pytest.approx(0.1)


def test_voxels_outside_the_brain_rank_lowest_by_hand() -> None:
    # One lesion voxel above one normal one; outside one lesion and two normal voxels.
    ranking = _ranking([2.0, 1.0], [1, 0], outside_lesion=1, outside_normal=2)
    assert voxel.average_precision(ranking) == pytest.approx(0.5 * 1 + 0.5 * 2 / 5)
    # Pairs: inside lesion wins 3; outside lesion: loses 1, ties 2.
    assert voxel.auroc(ranking) == pytest.approx((3 + 0 + 1) / 6)
    assert voxel.best_dice(ranking) == (pytest.approx(2 / 3), 1.0)
    counts = voxel.confusion_at(ranking, 1.0)
    assert counts == voxel.Confusion(tp=1, fp=0, tn=3, fn=1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("decimals", [0, 1, 6])
def test_ap_and_auroc_equal_scikit_learn_with_and_without_ties(
    seed: int, decimals: int
) -> None:
    scores, lesion = _random(seed, decimals)
    for outside_lesion, outside_normal in [(0, 0), (7, 40)]:
        ranking = _ranking(scores, lesion, outside_lesion, outside_normal)
        added = outside_lesion + outside_normal
        every = np.concatenate([scores, np.full(added, -100, np.float32)])
        truth = np.concatenate([lesion, np.arange(added) < outside_lesion])
        assert voxel.average_precision(ranking) == pytest.approx(
            sklearn.metrics.average_precision_score(truth, every), abs=1e-12
        )
        assert voxel.auroc(ranking) == pytest.approx(
            sklearn.metrics.roc_auc_score(truth, every), abs=1e-12
        )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("decimals", [0, 1, 6])
def test_best_dice_equals_brute_force_and_its_threshold_attains_it(
    seed: int, decimals: int
) -> None:
    scores, lesion = _random(seed, decimals)
    brute = max(
        2
        * (lesion & (scores >= level)).sum()
        / (lesion.sum() + (scores >= level).sum())
        for level in np.unique(scores)
    )
    ranking = _ranking(scores, lesion)
    value, threshold = voxel.best_dice(ranking)
    assert value == pytest.approx(brute, abs=1e-12)
    predicted = scores > np.float32(threshold)
    counts = voxel.confusion_of_masks(predicted, lesion)
    assert voxel.dice(counts) == pytest.approx(value, abs=1e-12)
    assert voxel.confusion_at(ranking, threshold) == counts


def _slow(
    scores: np.ndarray, lesion: np.ndarray, outside_lesion: int, outside_normal: int
) -> tuple[float, float, float]:
    """AP, AUROC and best Dice from their definitions, voxel by voxel."""
    lowest = float("-inf")
    rows = [(float(s), bool(t)) for s, t in zip(scores, lesion, strict=True)]
    rows += [(lowest, True)] * outside_lesion + [(lowest, False)] * outside_normal
    positive = [score for score, truth in rows if truth]
    negative = [score for score, truth in rows if not truth]
    precision = best = before = 0.0
    for level in sorted({score for score, _ in rows}, reverse=True):
        tp = sum(score >= level for score in positive)
        fp = sum(score >= level for score in negative)
        precision += (tp - before) / len(positive) * tp / (tp + fp)
        if level > lowest:  # the rest is never predicted
            best = max(best, 2 * tp / (tp + fp + len(positive)))
        before = tp
    won = sum((a > b) + 0.5 * (a == b) for a in positive for b in negative)
    return precision, won / (len(positive) * len(negative)), best


@pytest.mark.parametrize("decimals", [0, 1, 6])
@pytest.mark.parametrize("seed", range(5))
def test_ap_auroc_and_best_dice_equal_python_loops(seed: int, decimals: int) -> None:
    rng = np.random.default_rng(50 + seed)
    size = int(rng.integers(5, 80))
    lesion = rng.random(size) < rng.uniform(0.05, 0.9)
    lesion[:2] = False, True
    scores = np.round(rng.normal(size=size) + lesion * rng.normal(), decimals)
    outside = [int(n) for n in rng.integers(0, 6, size=2)]
    ranking = _ranking(scores, lesion, *outside)
    precision, area, best = _slow(scores.astype(np.float32), lesion, *outside)
    assert voxel.average_precision(ranking) == pytest.approx(precision, abs=1e-12)
    assert voxel.auroc(ranking) == pytest.approx(area, abs=1e-12)
    assert voxel.best_dice(ranking)[0] == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_best_dice_and_ratios_equal_scikit_learn(seed: int) -> None:
    scores, lesion = _random(seed, 1)
    ranking = _ranking(scores, lesion)
    value, threshold = voxel.best_dice(ranking)
    precision, recall, _ = sklearn.metrics.precision_recall_curve(lesion, scores)
    total = np.maximum(precision + recall, 1e-12)
    assert value == pytest.approx((2 * precision * recall / total).max(), abs=1e-12)
    predicted = scores > np.float32(threshold)
    counts = voxel.confusion_at(ranking, threshold)
    for ours, theirs in [
        (voxel.dice, sklearn.metrics.f1_score),
        (voxel.precision, sklearn.metrics.precision_score),
        (voxel.recall, sklearn.metrics.recall_score),
    ]:
        assert ours(counts) == pytest.approx(theirs(lesion, predicted), abs=1e-12)
    false = int((predicted & ~lesion).sum())
    assert voxel.false_positive_rate(counts) == false / int((~lesion).sum())
    assert voxel.false_discovery_rate(counts) == false / int(predicted.sum())


def test_confusion_at_is_strict_at_every_score_and_between() -> None:
    scores, lesion = _random(5, 1)
    ranking = _ranking(scores, lesion)
    for threshold in [*np.unique(scores), -99.0, 99.0, 0.05]:
        expected = voxel.confusion_of_masks(scores > np.float32(threshold), lesion)
        assert voxel.confusion_at(ranking, threshold) == expected


def test_ratios_by_hand() -> None:
    counts = voxel.Confusion(tp=3, fp=1, tn=94, fn=2)
    assert voxel.dice(counts) == pytest.approx(6 / 9)
    assert voxel.precision(counts) == pytest.approx(3 / 4)
    assert voxel.recall(counts) == pytest.approx(3 / 5)
    assert voxel.false_positive_rate(counts) == pytest.approx(1 / 95)
    assert voxel.false_discovery_rate(counts) == pytest.approx(1 / 4)


def test_the_order_of_voxels_and_pooling_in_parts_change_nothing() -> None:
    scores, lesion = _random(1, 1)
    whole = VoxelScores(scores, lesion, 3, 8)
    parts = voxel.pool(
        [
            VoxelScores(scores[300:], lesion[300:], 1, 8),
            VoxelScores(scores[:300], lesion[:300], 2, 0),
        ]
    )
    a, b = voxel.rank(whole), voxel.rank(parts)
    assert voxel.average_precision(a) == voxel.average_precision(b)
    assert voxel.auroc(a) == voxel.auroc(b)
    assert voxel.best_dice(a) == voxel.best_dice(b)


def test_curves_are_exact_at_every_point_and_contain_the_best_dice() -> None:
    scores, lesion = _random(2, 6)
    ranking = _ranking(scores, lesion, 2, 5)
    traced = voxel.curves(ranking, 10_000)
    assert traced["dice"].max() == pytest.approx(voxel.best_dice(ranking)[0])
    assert (np.diff(traced["threshold"]) < 0).all()
    assert (np.diff(traced["recall"]) >= 0).all()
    few = voxel.curves(ranking, 16)
    assert len(few["threshold"]) <= 32
    assert set(few["threshold"]) <= set(traced["threshold"])
    assert few["recall"][-1] < 1  # outside the brain nothing is predicted


def test_from_map_counts_what_is_not_scored() -> None:
    shape = (2, 3, 4)
    scores = np.arange(24, dtype=np.float32).reshape(shape)
    eroded, brain, lesion = (np.zeros(shape, bool) for _ in range(3))
    eroded[0], brain[:, :2] = True, True
    lesion[0, 0, 0] = lesion[1, 0, 0] = lesion[1, 2, 3] = True
    box = voxel.from_map(scores, eroded, lesion)
    assert (len(box.scores), box.outside_lesion, box.outside_normal) == (12, 2, 10)
    inner = voxel.from_map(scores, eroded, lesion, brain)
    assert (inner.outside_lesion, inner.outside_normal) == (2, 7)


def test_label_auroc_and_prevalence_by_hand() -> None:
    labels = np.array([True, False, False])
    scores, lesion = _random(8, 1)
    expected = sklearn.metrics.roc_auc_score(lesion, scores)
    assert voxel.label_auroc(scores, lesion) == pytest.approx(expected, abs=1e-12)
    assert voxel.label_auroc(np.array([0.5, 0.2, 0.9]), labels) == 0.5
    one = VoxelScores(np.float32([1, 2, 3]), labels, 2, 5)
    assert voxel.prevalence(one) == pytest.approx(3 / 10)


@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_psnr_equals_scikit_image(data_range: float) -> None:
    rng = np.random.default_rng(3)
    image = (rng.random((4, 6, 5, 2)) * data_range).astype(np.float32)
    other = image + rng.normal(0, 0.05 * data_range, image.shape).astype(np.float32)
    expected = skimage.metrics.peak_signal_noise_ratio(
        image, other, data_range=data_range
    )
    assert voxel.psnr(image, other, data_range=data_range) == pytest.approx(expected)
    mask = rng.random((4, 6, 5, 1)) < 0.4
    inside = np.broadcast_to(mask, image.shape)
    expected = skimage.metrics.peak_signal_noise_ratio(
        image[inside], other[inside], data_range=data_range
    )
    found = voxel.psnr(image, other, mask, data_range=data_range)
    assert found == pytest.approx(expected)


def test_psnr_by_hand_and_at_its_ends() -> None:
    zeros, tenth = np.zeros((2, 3)), np.full((2, 3), 0.1)
    assert voxel.psnr(zeros, tenth) == pytest.approx(20.0)
    assert voxel.psnr(zeros, tenth, data_range=10.0) == pytest.approx(40.0)
    assert voxel.psnr(tenth, tenth) == float("inf")
    assert np.isnan(voxel.psnr(zeros, tenth, np.zeros((2, 3), bool)))
    with pytest.raises(ValueError, match="one shape"):
        voxel.psnr(zeros, tenth[:1])
    with pytest.raises(ValueError, match="data_range above 0"):
        voxel.psnr(zeros, tenth, data_range=0.0)


def test_fault_B33_lesion_outside_the_mask_is_counted_and_costs_recall() -> None:
    lesion = np.array([True, False, True])
    one = VoxelScores(np.float32([3, 1, 2]), lesion, outside_lesion=2)
    assert voxel.lost_lesion(one) == pytest.approx(2 / 4)
    value, threshold = voxel.best_dice(voxel.rank(one))
    assert value == pytest.approx(2 * 2 / (2 * 2 + 2))
    assert voxel.recall(voxel.confusion_at(voxel.rank(one), threshold)) == 0.5


def test_fault_D1_without_lesion_voxels_the_metrics_are_nan() -> None:
    ranking = _ranking([0.1, 0.2], [0, 0])
    assert np.isnan(voxel.average_precision(ranking))
    assert np.isnan(voxel.auroc(ranking))
    assert np.isnan(voxel.best_dice(ranking)).all()
    assert np.isnan(voxel.auroc(_ranking([0.1], [1])))


@pytest.mark.parametrize("value", [-3.0, 0.0, 1e6])
def test_fault_D2_a_constant_map_has_the_prevalence_as_ap(value: float) -> None:
    ranking = _ranking(np.full(100, value), np.arange(100) < 5)
    assert voxel.average_precision(ranking) == pytest.approx(0.05)
    assert voxel.auroc(ranking) == 0.5
    best, threshold = voxel.best_dice(ranking)
    assert best == pytest.approx(2 * 5 / 105)
    assert voxel.confusion_at(ranking, threshold).tp == 5


@pytest.mark.parametrize("factor", [20.0, 2000.0, 2e30])
def test_fault_D3_one_hot_voxel_leaves_the_best_dice(factor: float) -> None:
    scores, lesion = _random(4, 6)
    value, threshold = voxel.best_dice(_ranking(scores, lesion))
    hot = scores.copy()
    normal = np.flatnonzero(~lesion & (scores > threshold))[0]
    hot[normal] = scores.max() * factor
    assert voxel.best_dice(_ranking(hot, lesion))[0] == value


def test_fault_D4_unbounded_and_negative_scores_rank_like_any() -> None:
    scores, lesion = _random(6, 6)
    plain = _ranking(scores, lesion)
    far = voxel.rank(VoxelScores(-1e30 * np.exp(-scores.astype(float)), lesion))
    assert voxel.average_precision(far) == voxel.average_precision(plain)
    assert voxel.auroc(far) == voxel.auroc(plain)
    assert voxel.best_dice(far)[0] == voxel.best_dice(plain)[0]


@pytest.mark.parametrize("lesion", [0, 1])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_fault_D5_nan_scores_are_an_error(bad: float, lesion: int) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        _ranking([0.1, bad, 0.3, 0.2], [0, lesion, 1, 0])


def test_fault_D7_ties_are_blocks_whatever_the_order() -> None:
    forward = _ranking([1, 1, 0], [1, 0, 0])
    backward = _ranking([1, 1, 0], [0, 1, 0])
    for ranking in (forward, backward):
        assert voxel.average_precision(ranking) == pytest.approx(0.5)
        assert voxel.auroc(ranking) == pytest.approx(0.75)
        assert voxel.best_dice(ranking) == (pytest.approx(2 / 3), 0.0)


def test_fault_D11_dice_of_two_empty_masks_is_nan() -> None:
    empty = np.zeros((3, 3, 3), bool)
    assert np.isnan(voxel.dice(voxel.confusion_of_masks(empty, empty)))
    full = ~empty
    assert voxel.dice(voxel.confusion_of_masks(full, empty)) == 0.0


def test_half_precision_scores_are_refused() -> None:
    with pytest.raises(TypeError, match="float16"):
        voxel.rank(VoxelScores(np.zeros(3, np.float16), np.zeros(3, bool)))
    with pytest.raises(ValueError, match="one length"):
        voxel.rank(VoxelScores(np.zeros(3, np.float32), np.zeros(2, bool)))
