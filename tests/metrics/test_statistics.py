import itertools

import numpy as np
import pytest
import scipy.stats

from tests import fresh
from uad_jax.metrics import accumulators, statistics, voxel


def _values(count: int, seed: int = 0, shift: float = 0.0) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    return {f"s{n:02d}": float(v) for n, v in enumerate(rng.normal(shift, 1, count))}


def _mean(values: dict[str, float], **options: int) -> statistics.Interval:
    """Every volume is a patient of its own."""
    units = {name: name for name in values}
    return statistics.bootstrap_volumes(values, units, **options)


def _histograms(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 9, (count, 2, 12)), rng.integers(0, 5, (count, 2))


def test_summarize_by_hand() -> None:
    found = statistics.summarize([1.0, float("nan"), 3.0])
    assert found == (2.0, pytest.approx(np.sqrt(2)), 2, 3)


def test_fault_D1_subjects_without_a_value_are_left_out_and_counted() -> None:
    nothing = statistics.summarize([float("nan")])
    assert np.isnan(nothing.mean)
    assert (nothing.num_valid, nothing.num_total) == (0, 1)
    values = {**_values(5), "missing": float("nan")}
    assert _mean(values) == _mean(_values(5))


def test_bootstrap_interval_is_near_that_of_the_normal_theory() -> None:
    values = _values(60)
    found = _mean(values, num_samples=4000)
    array = np.array(list(values.values()))
    half = 1.96 * array.std(ddof=0) / np.sqrt(60)
    assert found.estimate == pytest.approx(array.mean())
    assert found.low == pytest.approx(array.mean() - half, abs=0.03)
    assert found.high == pytest.approx(array.mean() + half, abs=0.03)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(200):
        values = _values(30, seed, shift=2.0)
        found = _mean(values, num_samples=300, seed=seed)
        covered += found.low <= 2.0 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_seed_fixes_the_interval_and_the_order_of_subjects_does_not_matter() -> (
    None
):
    values = _values(12)
    reverse = dict(reversed(list(values.items())))
    first = _mean(values, seed=3)
    assert first == _mean(reverse, seed=3)
    assert first != _mean(values, seed=4)


def test_fewer_than_two_subjects_have_no_interval() -> None:
    found = _mean({"a": 0.5})
    assert found.estimate == 0.5
    assert np.isnan([found.low, found.high]).all()
    assert np.isnan(_mean({}).estimate)
    bins, outside = _histograms(1)
    metric = accumulators.average_precision
    assert np.isnan(statistics.bootstrap_histograms(metric, bins, outside).low)


@pytest.mark.parametrize("name", list(statistics.POOLED))
def test_pooled_bootstrap_equals_pooling_the_resampled_subjects(name: str) -> None:
    metric = statistics.POOLED[name]
    bins, outside = _histograms(6)
    found = statistics.bootstrap_histograms(metric, bins, outside, num_samples=150)
    slow = []
    for row in statistics.bootstrap_weights(6, 150, seed=0):
        chosen = np.repeat(np.arange(6), row)
        slow.append(metric(bins[chosen].sum(axis=0), outside[chosen].sum(axis=0)))
    assert found.estimate == pytest.approx(metric(bins.sum(0), outside.sum(0)))
    assert (found.low, found.high) == pytest.approx(np.percentile(slow, [2.5, 97.5]))


def test_pairing_is_much_sharper_than_two_separate_intervals() -> None:
    first = _values(40)
    second = {name: value - 0.1 for name, value in first.items()}
    found = statistics.paired_bootstrap(first, second)
    assert found.low == pytest.approx(0.1)
    assert found.high == pytest.approx(0.1)


def test_permutation_by_hand_and_by_enumeration() -> None:
    zero = dict.fromkeys("abc", 0.0)
    assert statistics.paired_permutation(dict.fromkeys("abc", 1.0), zero) == 2 / 8
    values = _values(7, seed=5, shift=0.5)
    array = np.array(list(values.values()))
    patterns = itertools.product([-1, 1], repeat=7)
    extreme = sum(abs(np.dot(p, array)) >= abs(array.sum()) - 1e-12 for p in patterns)
    zero = dict.fromkeys(values, 0.0)
    assert statistics.paired_permutation(values, zero) == extreme / 2**7


def test_random_permutation_is_near_scipy() -> None:
    values = _values(30, shift=0.35)
    zero = dict.fromkeys(values, 0.0)
    found = statistics.paired_permutation(values, zero)
    expected = scipy.stats.permutation_test(
        (np.array(list(values.values())), np.zeros(30)),
        lambda a, b: np.mean(a - b),
        permutation_type="samples",
        n_resamples=10_000,
        rng=np.random.default_rng(0),
    ).pvalue
    assert found == pytest.approx(expected, abs=0.02)
    assert found == statistics.paired_permutation(values, zero)


def test_values_of_a_unit_are_averaged_by_hand() -> None:
    nan = float("nan")
    values = {"b1": 4.0, "a1": 1.0, "a2": 2.0, "c1": nan, "b2": nan, "a3": 6.0}
    units = {"a1": "A", "a2": "A", "a3": "A", "b1": "B", "b2": "B", "c1": "C", "z": "Z"}
    found = statistics.by_unit(values, units)
    assert list(found) == ["A", "B", "C"]
    assert (found["A"], found["B"]) == (3.0, 4.0)
    assert np.isnan(found["C"])
    assert statistics.by_unit({}, units) == {}
    with pytest.raises(ValueError, match="1 volumes have no unit: b1"):
        statistics.by_unit(
            values, {name: u for name, u in units.items() if name != "b1"}
        )


def test_where_every_volume_is_its_own_unit_nothing_changes() -> None:
    values = _values(9)
    assert statistics.by_unit(values, {name: name for name in values}) == values
    bins, outside = _histograms(9)
    found = statistics.sum_by_unit(bins, outside, sorted(values))
    np.testing.assert_array_equal(found[0], bins)
    np.testing.assert_array_equal(found[1], outside)


def test_copies_of_a_patient_do_not_narrow_the_interval() -> None:
    values = _values(12)
    copies = {f"{name}-{n}": v for name, v in values.items() for n in range(5)}
    units = {name: name.split("-")[0] for name in copies}
    honest = statistics.bootstrap_volumes(copies, units)
    assert honest == pytest.approx(_mean(values))
    naive = _mean(copies)
    assert naive.high - naive.low < 0.6 * (honest.high - honest.low)


def test_histograms_of_a_unit_are_summed_by_hand() -> None:
    bins = np.arange(12).reshape(3, 2, 2)
    outside = np.array([[1, 10], [2, 20], [4, 40]], np.int32)
    found, found_outside = statistics.sum_by_unit(bins, outside, ["q", "p", "q"])
    assert found.tolist() == [[[4, 5], [6, 7]], [[8, 10], [12, 14]]]
    assert found_outside.tolist() == [[2, 20], [5, 50]]
    with pytest.raises(ValueError, match=r"3 histograms, 3 outside counts and 2 units"):
        statistics.sum_by_unit(bins, outside, ["q", "p"])


@pytest.mark.parametrize("seed", range(3))
def test_summed_histograms_equal_a_loop(seed: int) -> None:
    bins, outside = _histograms(20, seed)
    units = [f"p{n}" for n in np.random.default_rng(seed).integers(0, 12, 20)]
    found, found_outside = statistics.sum_by_unit(bins, outside, units)
    for row, unit in enumerate(sorted(set(units))):
        chosen = [n for n in range(20) if units[n] == unit]
        np.testing.assert_array_equal(found[row], sum(bins[n] for n in chosen))
        np.testing.assert_array_equal(
            found_outside[row], sum(outside[n] for n in chosen)
        )


def test_holm_by_hand() -> None:
    # 4 x 0.01, 3 x 0.02, 2 x 0.04; 0.05 may not fall below the 0.08 before it.
    found = statistics.holm({"d": 0.05, "b": 0.02, "a": 0.01, "c": 0.04})
    assert list(found) == ["d", "b", "a", "c"]
    expected = {"a": 0.04, "b": 0.06, "c": 0.08, "d": 0.08}
    assert found == pytest.approx(expected)
    assert statistics.holm({"a": 0.3, "b": 0.6}) == pytest.approx({"a": 0.6, "b": 0.6})
    assert statistics.holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert statistics.holm({}) == {}


def test_holm_leaves_nan_out_of_the_count() -> None:
    found = statistics.holm({"a": 0.02, "b": float("nan"), "c": 0.5})
    assert (found["a"], found["c"]) == (0.04, 0.5)
    assert np.isnan(found["b"])
    with pytest.raises(ValueError, match=r"in \[0, 1\], found .*1\.5"):
        statistics.holm({"a": 1.5})


@pytest.mark.parametrize("seed", range(4))
def test_holm_is_the_closed_test_of_bonferroni(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p_values = {n: float(p) for n, p in enumerate(rng.random(6).round(2) ** 3)}
    found = statistics.holm(p_values)
    for key in p_values:
        # A hypothesis falls when every set of hypotheses that holds it falls.
        sets = [
            chosen
            for size in range(1, 7)
            for chosen in itertools.combinations(p_values, size)
            if key in chosen
        ]
        worst = max(len(one) * min(p_values[n] for n in one) for one in sets)
        assert found[key] == pytest.approx(min(worst, 1.0))


def test_fault_D9_folds_are_mean_and_sd_with_their_number() -> None:
    folds = [0.30, 0.32, 0.28, 0.31, 0.29]
    found = statistics.summarize(folds)
    assert found.mean == pytest.approx(0.30)
    assert found.sd == pytest.approx(np.std(folds, ddof=1))
    assert found.num_valid == 5


def test_fault_D9_an_interval_says_how_many_subjects_it_rests_on() -> None:
    values = {**_values(7), "missing": float("nan")}
    assert _mean(values).num_subjects == 7
    paired = statistics.paired_bootstrap(values, values)
    assert paired.num_subjects == 7
    metric = accumulators.average_precision
    found = statistics.bootstrap_histograms(metric, *_histograms(6))
    assert found.num_subjects == 6


@pytest.mark.parametrize(
    "compare", [statistics.paired_bootstrap, statistics.paired_permutation]
)
def test_fault_D10_unequal_subject_sets_are_an_error(compare: object) -> None:
    assert callable(compare)
    with pytest.raises(ValueError, match="one side only: s04"):
        compare(_values(4), _values(5))
    torn = {**_values(4), "s01": float("nan")}
    with pytest.raises(ValueError, match="value on one side only: s01"):
        compare(_values(4), torn)


def test_resampling_units_equals_a_loop_over_their_volumes() -> None:
    rng = fresh.rng()
    names = [f"v{n}" for n in range(17)]
    units = {name: f"p{rng.integers(5)}" for name in names}
    values = {name: float(rng.random()) for name in names}
    found = statistics.bootstrap_volumes(values, units, num_samples=50, seed=3)
    order = sorted(set(units.values()))
    means = []
    for weights in statistics.bootstrap_weights(len(order), 50, 3):
        drawn = [
            values[name]
            for unit, times in zip(order, weights, strict=True)
            for name in names
            if units[name] == unit
            for _ in range(times)
        ]
        means.append(np.mean(drawn))
    assert found.estimate == pytest.approx(np.mean(list(values.values())))
    assert found.low == pytest.approx(np.percentile(means, 2.5))
    assert found.high == pytest.approx(np.percentile(means, 97.5))
    assert found.num_subjects == len(order)


def test_with_one_volume_each_units_are_subjects() -> None:
    values = {f"v{n}": float(n**2) for n in range(9)} | {"gone": float("nan")}
    array = np.array([float(n**2) for n in range(9)])
    means = statistics.bootstrap_weights(9, 1000, 0) @ array / 9
    found = _mean(values)
    assert found.estimate == pytest.approx(array.mean())
    assert (found.low, found.high) == pytest.approx(np.percentile(means, [2.5, 97.5]))


def _unequal() -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """One patient has 15 of 20 volumes; there the first is better, elsewhere worse."""
    units = {f"v{n:02d}": "big" if n < 15 else f"p{n}" for n in range(20)}
    rng = np.random.default_rng(0)
    second = {name: float(rng.uniform(0.2, 0.4)) for name in units}
    first = {
        name: second[name] + (0.1 if unit == "big" else -0.1) + 0.01 * rng.normal()
        for name, unit in units.items()
    }
    return first, second, units


def test_a_paired_interval_is_of_the_mean_over_volumes() -> None:
    first, second, units = _unequal()
    found = statistics.paired_bootstrap(first, second, units)
    gaps = {name: first[name] - second[name] for name in units}
    assert found == statistics.bootstrap_volumes(gaps, units)
    assert found.estimate == pytest.approx(np.mean(list(gaps.values())))
    assert found.low <= found.estimate <= found.high
    assert found.estimate > 0.04  # over patients it would be below 0
    assert np.mean(list(statistics.by_unit(gaps, units).values())) < 0
    assert found.num_subjects == 6


def test_the_permutation_test_flips_all_volumes_of_a_patient_together() -> None:
    first, second, units = _unequal()
    sums: dict[str, float] = {}
    for name, unit in units.items():
        sums[unit] = sums.get(unit, 0.0) + first[name] - second[name]
    array = np.array(list(sums.values()))
    patterns = itertools.product([-1, 1], repeat=6)
    extreme = sum(abs(np.dot(p, array)) >= abs(array.sum()) - 1e-12 for p in patterns)
    assert statistics.paired_permutation(first, second, units) == extreme / 2**6


def _drawn(units: list[str], num_samples: int, seed: int) -> list[list[int]]:
    """Places of the volumes in each resampling of the patients."""
    order = sorted(set(units))
    return [
        [
            place
            for unit, times in zip(order, weights, strict=True)
            for place in np.repeat([n for n, u in enumerate(units) if u == unit], times)
        ]
        for weights in statistics.bootstrap_weights(len(order), num_samples, seed)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_resampled_auroc_equals_a_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 9, 30).astype(np.float32)  # with ties
    abnormal = rng.random(30) < 0.4
    units = [f"p{n}" for n in rng.integers(0, 7, 30)]
    found = statistics.bootstrap_auroc(
        scores, abnormal, units, num_samples=80, seed=seed
    )
    slow = [
        voxel.label_auroc(scores[drawn], abnormal[drawn])
        for drawn in _drawn(units, 80, seed)
    ]
    assert found.estimate == pytest.approx(voxel.label_auroc(scores, abnormal))
    expected = np.nanpercentile(slow, [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx(tuple(expected))
    assert found.num_subjects == len(set(units))


def test_auroc_of_one_kind_has_neither_value_nor_interval() -> None:
    found = statistics.bootstrap_auroc(
        np.arange(4.0), np.ones(4, bool), ["a", "b", "c", "d"], num_samples=20
    )
    assert np.isnan(found[:3]).all()


def test_resampled_ratio_equals_a_loop() -> None:
    parts = np.array([1, 0, 2, 0, 3])
    wholes = np.array([2, 1, 2, 0, 9])
    units = ["a", "a", "b", "c", "d"]
    found = statistics.bootstrap_ratio(parts, wholes, units, num_samples=60, seed=1)
    slow = [
        parts[drawn].sum() / wholes[drawn].sum()
        for drawn in _drawn(units, 60, 1)
        if wholes[drawn].sum()
    ]
    assert found.estimate == pytest.approx(6 / 14)
    assert (found.low, found.high) == pytest.approx(np.percentile(slow, [2.5, 97.5]))
