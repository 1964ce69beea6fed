import itertools
import math

import numpy as np
import pytest
import scipy.ndimage

from uad_jax.metrics import lesionwise
from uad_jax.metrics.lesionwise import LOAD_STRATA, SIZE_STRATA, LesionCounts, count

_SHAPE = (6, 7, 8)


def _blank() -> np.ndarray:
    return np.zeros(_SHAPE, bool)


def _random(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    shape = tuple(rng.integers(1, 9, size=3))
    lesion = rng.random(shape) < rng.uniform(0, 0.15)
    prediction = (lesion & (rng.random(shape) < 0.4)) | (
        rng.random(shape) < rng.uniform(0, 0.1)
    )
    return prediction, lesion


def _slow_components(binary: np.ndarray) -> list[set[tuple[int, ...]]]:
    labels, number = scipy.ndimage.label(binary, np.ones((3, 3, 3)))
    return [
        {tuple(place) for place in np.argwhere(labels == label).tolist()}
        for label in range(1, number + 1)
    ]


def _slow_count(
    prediction: np.ndarray, lesion: np.ndarray, voxel_ml: float, min_overlap: float
) -> tuple[list[tuple[float, bool]], int, int]:
    """Sizes and hits of lesions, false findings, findings; by sets of voxels."""
    lesions, findings = _slow_components(lesion), _slow_components(prediction)
    predicted = set().union(*findings)
    rows = []
    for one in lesions:
        share = len(one & predicted) / len(one)
        rows.append((len(one) * voxel_ml, share > 0 and share >= min_overlap))
    reference = set().union(*lesions)
    false = sum(not (finding & reference) for finding in findings)
    return rows, false, len(findings)


def _rows(counts: LesionCounts) -> list[tuple[float, bool]]:
    pairs = zip(counts.sizes_ml, counts.found, strict=True)
    return [(float(size), bool(hit)) for size, hit in pairs]


@pytest.mark.parametrize("min_overlap", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(8))
def test_counts_equal_a_slow_reference(seed: int, min_overlap: float) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(10):
        prediction, lesion = _random(rng)
        voxel_ml = float(rng.uniform(0.001, 0.1))
        found = count(prediction, lesion, voxel_ml, min_overlap=min_overlap)
        rows, false, number = _slow_count(prediction, lesion, voxel_ml, min_overlap)
        assert sorted(_rows(found)) == sorted(rows)
        assert (found.false_components, found.num_components) == (false, number)


@pytest.mark.parametrize("seed", range(5))
def test_pooling_equals_a_slow_reference(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    pairs = [_random(rng) for _ in range(rng.integers(1, 6))]
    voxel_ml = float(rng.uniform(0.01, 5))
    found = lesionwise.pool([count(*pair, voxel_ml) for pair in pairs])
    slow = [_slow_count(*pair, voxel_ml, 0.0) for pair in pairs]
    rows = [row for one in slow for row in one[0]]
    false, number = sum(one[1] for one in slow), sum(one[2] for one in slow)
    assert (found["num_lesions"], found["num_components"]) == (len(rows), number)
    recall = sum(hit for _, hit in rows) / len(rows) if rows else math.nan
    precision = (number - false) / number if number else math.nan
    assert found["lesion_recall"] == pytest.approx(recall, nan_ok=True)
    assert found["lesion_precision"] == pytest.approx(precision, nan_ok=True)
    if recall > 0 and precision > 0:
        assert found["lesion_f1"] == pytest.approx(2 / (1 / recall + 1 / precision))
    bounds = [0.0, *SIZE_STRATA, math.inf]
    names = lesionwise.stratum_names(SIZE_STRATA)
    expected = {}
    for name, (low, high) in zip(names, itertools.pairwise(bounds), strict=True):
        hits = [hit for size, hit in rows if low <= size < high]
        if hits:
            expected[name] = {
                "num_lesions": len(hits),
                "recall": pytest.approx(np.mean(hits)),
            }
    assert found["by_size"] == expected


def test_hand_values() -> None:
    lesion, prediction = _blank(), _blank()
    lesion[0, 0, :4] = lesion[3, 3, 3] = lesion[5, 6, :2] = True
    prediction[0, 0, 3:6] = prediction[3, 5, 5] = prediction[5, 0, 7] = True
    found = count(prediction, lesion, 0.5)
    assert sorted(_rows(found)) == [(0.5, False), (1.0, False), (2.0, True)]
    assert (found.false_components, found.num_components) == (2, 3)
    pooled = lesionwise.pool([found, found])
    assert pooled == {
        "num_lesions": 6,
        "num_components": 6,
        "lesion_recall": pytest.approx(1 / 3),
        "lesion_precision": pytest.approx(1 / 3),
        "lesion_f1": pytest.approx(1 / 3),
        "by_size": {
            "0.1-1 ml": {"num_lesions": 2, "recall": 0.0},
            "1-10 ml": {"num_lesions": 4, "recall": 0.5},
        },
    }


def test_one_finding_over_two_lesions_finds_both_and_counts_once() -> None:
    lesion, prediction = _blank(), _blank()
    lesion[2, 2, 0] = lesion[2, 2, 4] = True
    prediction[2, 2, :5] = True
    found = count(prediction, lesion, 1.0)
    assert found.found.tolist() == [True, True]
    assert (found.false_components, found.num_components) == (0, 1)


def test_two_findings_in_one_lesion_are_both_true_and_find_it_once() -> None:
    lesion, prediction = _blank(), _blank()
    lesion[2, 2, :5] = True
    prediction[2, 2, 0] = prediction[2, 2, 4] = True
    found = count(prediction, lesion, 1.0)
    assert found.found.tolist() == [True]
    assert (found.false_components, found.num_components) == (0, 2)
    assert lesionwise.pool([found])["lesion_f1"] == 1.0


def test_fault_D12_lesions_join_over_corners_like_findings() -> None:
    lesion = _blank()
    lesion[0, 0, 0] = lesion[1, 1, 1] = True
    assert count(lesion, lesion, 1.0).sizes_ml.tolist() == [2.0]
    assert count(lesion, lesion, 1.0).num_components == 1
    # Touching is not overlapping.
    beside = _blank()
    beside[2, 2, 2] = True
    found = count(beside, lesion, 1.0)
    assert found.found.tolist() == [False]
    assert found.false_components == 1


def test_min_overlap_is_a_share_of_the_lesion_and_inclusive() -> None:
    lesion, prediction = _blank(), _blank()
    lesion[0, 0:2, 0:5], prediction[0, 0, 0:3] = True, True
    for share, expected in [(0.0, True), (0.3, True), (0.31, False)]:
        found = count(prediction, lesion, 1.0, min_overlap=share)
        assert found.found.tolist() == [expected]
        assert found.false_components == 0
    assert not count(_blank(), lesion, 1.0).found.any()


def test_empty_volumes_have_no_lesions_and_undefined_figures_are_nan() -> None:
    full = ~_blank()
    nothing = count(_blank(), _blank(), 1.0)
    assert nothing.sizes_ml.shape == nothing.found.shape == (0,)
    assert (nothing.false_components, nothing.num_components) == (0, 0)
    for counts in ([], [nothing]):
        pooled = lesionwise.pool(counts)
        names = ("lesion_recall", "lesion_precision", "lesion_f1")
        assert np.isnan([pooled[name] for name in names]).all()
        assert pooled["by_size"] == {}
    missed = lesionwise.pool([count(_blank(), full, 1.0)])
    assert (missed["lesion_recall"], missed["lesion_f1"]) == (0.0, 0.0)
    assert np.isnan(missed["lesion_precision"])
    false = lesionwise.pool([count(full, _blank(), 1.0)])
    assert (false["lesion_precision"], false["lesion_f1"]) == (0.0, 0.0)
    assert np.isnan(false["lesion_recall"])


def test_strata_hold_their_lower_bound() -> None:
    names = lesionwise.stratum_names(SIZE_STRATA)
    assert names == ("<0.1 ml", "0.1-1 ml", "1-10 ml", ">=10 ml")
    assert lesionwise.stratum_names(LOAD_STRATA) == ("<1 ml", "1-10 ml", ">=10 ml")
    cases = {0: 0, 0.0999: 0, 0.1: 1, 0.999: 1, 1.0: 2, 9.99: 2, 10.0: 3, 1e9: 3}
    for ml, place in cases.items():
        assert lesionwise.stratum(ml, SIZE_STRATA) == names[place]
    assert lesionwise.stratum(10.0, LOAD_STRATA) == ">=10 ml"


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="one grid"):
        count(_blank(), _blank()[1:], 1.0)
    with pytest.raises(ValueError, match="voxel_ml above 0"):
        count(_blank(), _blank(), 0.0)
    with pytest.raises(ValueError, match="min_overlap"):
        count(_blank(), _blank(), 1.0, min_overlap=1.5)
    with pytest.raises(ValueError, match=r"\[D, H, W\]"):
        count(_blank()[0], _blank()[0], 1.0)
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="0 ml or more"):
            lesionwise.stratum(bad, SIZE_STRATA)
