"""How sure a result is: resampling of patients, and tests between detectors.

The unit is the patient: voxels, slices and scans of one patient are not independent.
What is called a subject below is one such unit. Where a patient has several volumes,
the estimate is the mean over volumes, and whole patients are drawn, or have their sign
flipped, with all that they have: their sums, or histograms (`sum_by_unit`).
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from uad_jax.metrics import accumulators

_CHUNK = 64  # resamplings of histograms held at a time

_Test = TypeVar("_Test", bound=Hashable)


class Interval(NamedTuple):
    """An estimate and its percentile bootstrap interval.

    Attributes:
      estimate: Value on the subjects themselves.
      low: Lower bound; NaN with fewer than 2 subjects, as is `high`.
      high: Upper bound.
      num_subjects: Subjects with a value; those with NaN are left out.
    """

    estimate: float
    low: float
    high: float
    num_subjects: int


class Summary(NamedTuple):
    """Mean and spread of values, NaN left out and counted.

    Attributes:
      mean: NaN if no value is valid.
      sd: Sample standard deviation; NaN with fewer than 2 valid values.
      num_valid: Values that are not NaN.
      num_total: All values.
    """

    mean: float
    sd: float
    num_valid: int
    num_total: int


def summarize(values: Sequence[float] | np.ndarray) -> Summary:
    """Averages values over volumes, or over folds, and says how many there were."""
    every = np.asarray(values, np.float64)
    valid = every[~np.isnan(every)]
    mean = float(valid.mean()) if len(valid) else float("nan")
    sd = float(valid.std(ddof=1)) if len(valid) > 1 else float("nan")
    return Summary(mean, sd, len(valid), len(every))


def by_unit(values: Mapping[str, float], units: Mapping[str, str]) -> dict[str, float]:
    """Averages the volumes of each unit, usually the patient.

    Args:
      values: Volume -> value; NaN where the metric does not exist.
      units: Volume -> its unit; may name more volumes.

    Returns:
      Unit -> mean over its volumes that are not NaN, NaN if all are; units ascending.

    Raises:
      ValueError: If a volume has no unit.
    """
    lacking = sorted(values.keys() - units.keys())
    if lacking:
        raise ValueError(
            f"{len(lacking)} volumes have no unit: {', '.join(lacking[:5])}. Name the "
            "patient of every volume."
        )
    gathered: dict[str, list[float]] = {units[name]: [] for name in values}
    for name, value in values.items():
        gathered[units[name]].append(value)
    return {unit: summarize(gathered[unit]).mean for unit in sorted(gathered)}


def sum_by_unit(
    bins: np.ndarray, outside: np.ndarray, units: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Adds the histograms of the volumes of each unit, usually the patient.

    Args:
      bins: [V, 2, K + 1] counts of each volume.
      outside: [V, 2] voxels of each volume that are not scored.
      units: Unit of each volume, V of them.

    Returns:
      Bins [U, 2, K + 1] and outside [U, 2], a row per unit, units ascending
      (`sorted(set(units))`), so that two detectors have the same rows.

    Raises:
      ValueError: If the numbers of volumes differ.
    """
    if not len(bins) == len(outside) == len(units):
        raise ValueError(
            f"Expected one unit per volume, found {len(bins)} histograms, "
            f"{len(outside)} outside counts and {len(units)} units."
        )
    names, rows = np.unique(np.asarray(units, str), return_inverse=True)
    summed = np.zeros((len(names), *bins.shape[1:]), bins.dtype)
    summed_outside = np.zeros((len(names), *outside.shape[1:]), outside.dtype)
    np.add.at(summed, rows, bins)
    np.add.at(summed_outside, rows, outside)
    return summed, summed_outside


def bootstrap_weights(num_subjects: int, num_samples: int, seed: int) -> np.ndarray:
    """Draws how often each subject is in each resampling.

    Returns:
      [num_samples, num_subjects] int64; every row sums to `num_subjects`.
    """
    share = np.full(num_subjects, 1 / num_subjects)
    generator = np.random.default_rng(seed)
    return generator.multinomial(num_subjects, share, size=num_samples)


def bootstrap_volumes(
    values: Mapping[str, float],
    units: Mapping[str, str],
    *,
    num_samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of the mean over volumes when units, usually patients, are resampled.

    Args:
      values: Volume -> value; NaN where the metric does not exist.
      units: Volume -> its unit.
      num_samples: Resamplings.
      confidence: Coverage of the interval.
      seed: Same seed, same interval.

    Returns:
      The interval; `num_subjects` counts units with a value.
    """
    known = sorted(name for name, value in values.items() if not np.isnan(value))
    return bootstrap_ratio(
        [values[name] for name in known],
        np.ones(len(known)),
        [units[name] for name in known],
        num_samples=num_samples,
        confidence=confidence,
        seed=seed,
    )


def bootstrap_ratio(
    parts: Sequence[float] | np.ndarray,
    wholes: Sequence[float] | np.ndarray,
    units: Sequence[str],
    *,
    num_samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of a ratio of sums, such as found lesions of all lesions.

    Args:
      parts: Of each volume, [V].
      wholes: Of each volume, [V], >= 0.
      units: Unit of each volume, V of them; units are resampled.
      num_samples: Resamplings; those without any whole are left out.
      confidence: Coverage of the interval.
      seed: Same seed, same interval.

    Returns:
      The interval of sum(parts) / sum(wholes); `num_subjects` counts units.
    """
    names, rows = np.unique(np.asarray(units, str), return_inverse=True)
    above = np.bincount(rows, weights=np.asarray(parts, np.float64))
    below = np.bincount(rows, weights=np.asarray(wholes, np.float64))
    estimate = _divide(above.sum(), below.sum())
    if len(names) < 2:
        return Interval(float(estimate), float("nan"), float("nan"), len(names))
    weights = bootstrap_weights(len(names), num_samples, seed)
    samples = _divide(weights @ above, weights @ below)
    return _interval(float(estimate), samples, confidence, len(names))


def bootstrap_auroc(
    scores: np.ndarray,
    abnormal: np.ndarray,
    units: Sequence[str],
    *,
    num_samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of the AUROC of one score per slice or per volume.

    Args:
      scores: [n] float32 or float64.
      abnormal: [n] bool.
      units: Unit of each score, n of them; units are resampled.
      num_samples: Resamplings; those without both kinds are left out.
      confidence: Coverage of the interval.
      seed: Same seed, same interval.

    Returns:
      The interval of `voxel.label_auroc`; NaN throughout if either kind is absent.
    """
    names, rows = np.unique(np.asarray(units, str), return_inverse=True)
    high, owners = scores[abnormal], rows[abnormal]
    # wins[u, v]: pairs of u's abnormal and v's normal scores in the right order.
    wins = np.zeros((len(names), len(names)))
    for unit in range(len(names)):
        low = np.sort(scores[~abnormal & (rows == unit)])
        below = np.searchsorted(low, high) + np.searchsorted(low, high, "right")
        wins[:, unit] = np.bincount(owners, below / 2, len(names))
    first = np.bincount(owners, minlength=len(names))
    second = np.bincount(rows[~abnormal], minlength=len(names))
    estimate = float(_divide(wins.sum(), first.sum() * second.sum()))
    if len(names) < 2:
        return Interval(estimate, float("nan"), float("nan"), len(names))
    weights = bootstrap_weights(len(names), num_samples, seed)
    pairs = (weights @ first) * (weights @ second)
    samples = _divide(((weights @ wins) * weights).sum(axis=1), pairs)
    return _interval(estimate, samples, confidence, len(names))


def bootstrap_histograms(
    metric: Callable[[np.ndarray, np.ndarray], np.ndarray],
    bins: np.ndarray,
    outside: np.ndarray,
    *,
    num_samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of a pooled metric, from one histogram per subject.

    Args:
      metric: `accumulators.average_precision` or `accumulators.auroc`.
      bins: [S, 2, K + 1] counts of each subject (`accumulators.histogram`).
      outside: [S, 2] voxels of each subject that are not scored.
      num_samples: Resamplings.
      confidence: Coverage of the interval.
      seed: Same seed, same interval.
    """
    num_subjects = len(bins)
    estimate = float(metric(bins.sum(axis=0), outside.sum(axis=0)))
    if num_subjects < 2:
        return Interval(estimate, float("nan"), float("nan"), num_subjects)
    samples = _resample(
        metric, bins, outside, bootstrap_weights(num_subjects, num_samples, seed)
    )
    return _interval(estimate, samples, confidence, num_subjects)


def paired_bootstrap(
    first: Mapping[str, float],
    second: Mapping[str, float],
    units: Mapping[str, str] | None = None,
    *,
    num_samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of the mean difference of two detectors on the same volumes.

    Args:
      first: Volume -> value of one detector.
      second: Volume -> value of the other.
      units: Volume -> its unit, usually the patient; None = each is its own.
      num_samples: Resamplings.
      confidence: Coverage of the interval.
      seed: Same seed, same interval.

    Returns:
      The interval of the mean over volumes of first minus second; `num_subjects`
      counts units with a value.

    Raises:
      ValueError: If the volumes differ, or a value is missing on one side only.
    """
    differences = _differences(first, second)
    return bootstrap_volumes(
        differences,
        units or {name: name for name in differences},
        num_samples=num_samples,
        confidence=confidence,
        seed=seed,
    )


def paired_permutation(
    first: Mapping[str, float],
    second: Mapping[str, float],
    units: Mapping[str, str] | None = None,
    *,
    num_rounds: int = 10_000,
    seed: int = 0,
) -> float:
    """Tests by sign flips whether two detectors differ on the same volumes.

    A unit's volumes change sign together, so the statistic is the sum of all
    differences: the mean over volumes that `paired_bootstrap` estimates.

    Args:
      first: Volume -> value of one detector.
      second: Volume -> value of the other.
      units: Volume -> its unit, usually the patient; None = each is its own.
      num_rounds: Random sign patterns; where there are no more patterns than this in
        all, every one is taken once.
      seed: Same seed, same value.

    Returns:
      Two-sided p value of the mean difference; NaN without values.

    Raises:
      ValueError: If the volumes differ, or a value is missing on one side only.
    """
    differences = _differences(first, second)
    sums: dict[str, float] = {}
    for name, value in differences.items():
        if not np.isnan(value):
            unit = units[name] if units else name
            sums[unit] = sums.get(unit, 0.0) + value
    array = np.array(list(sums.values()))
    if not len(array):
        return float("nan")
    if 2 ** min(len(array), 40) <= num_rounds:
        patterns = np.arange(2 ** len(array))[:, None] >> np.arange(len(array)) & 1
        signs, counted_itself = 1 - 2 * patterns, 0
    else:
        generator = np.random.default_rng(seed)
        signs = generator.choice(np.array([-1, 1]), size=(num_rounds, len(array)))
        counted_itself = 1
    sums = np.abs(signs @ array)
    # Rounding must not make a pattern differ from the observed one it equals.
    tolerance = 1e-12 * np.abs(array).sum()
    extreme = int(np.count_nonzero(sums >= abs(array.sum()) - tolerance))
    return (extreme + counted_itself) / (len(signs) + counted_itself)


def holm(p_values: Mapping[_Test, float]) -> dict[_Test, float]:
    """Adjusts the p values of several tests by Holm's step-down method.

    Rejecting where the adjusted value is at most alpha keeps the chance of any false
    rejection at alpha, whatever the dependence between the tests.

    Args:
      p_values: Test -> p value in [0, 1]; NaN where there was no test.

    Returns:
      Test -> adjusted p value, in the order given. NaN stays NaN and is not counted
      as a test.

    Raises:
      ValueError: If a p value is outside [0, 1].

    Source: Holm 1979.
    """
    wrong = {key: p for key, p in p_values.items() if p < 0 or p > 1}
    if wrong:
        raise ValueError(f"Expected p values in [0, 1], found {wrong}.")
    tests = [key for key, p in p_values.items() if not np.isnan(p)]
    adjusted = dict(p_values)
    largest = 0.0
    for place, key in enumerate(sorted(tests, key=lambda one: p_values[one])):
        largest = max(largest, (len(tests) - place) * p_values[key])
        adjusted[key] = min(largest, 1.0)
    return adjusted


def _differences(
    first: Mapping[str, float], second: Mapping[str, float]
) -> dict[str, float]:
    if first.keys() != second.keys():
        alone = sorted(first.keys() ^ second.keys())
        raise ValueError(
            "A paired comparison needs the same subjects on both sides; "
            f"{len(alone)} are on one side only: {', '.join(alone[:5])}. "
            "Evaluate both detectors on one set."
        )
    torn = [
        name
        for name in sorted(first)
        if np.isnan(first[name]) != np.isnan(second[name])
    ]
    if torn:
        raise ValueError(
            f"{len(torn)} subjects have a value on one side only: "
            f"{', '.join(torn[:5])}. Compare a metric that exists for both."
        )
    return {name: first[name] - second[name] for name in sorted(first)}


def _divide(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    """Ratios; NaN where the whole is 0."""
    missing = np.full(np.shape(wholes), np.nan)
    return np.divide(parts, wholes, out=missing, where=np.asarray(wholes) > 0)


def _resample(
    metric: Callable[[np.ndarray, np.ndarray], np.ndarray],
    bins: np.ndarray,
    outside: np.ndarray,
    weights: np.ndarray,
) -> np.ndarray:
    flat = bins.reshape(len(bins), -1).astype(np.float64)
    samples = []
    for start in range(0, len(weights), _CHUNK):
        part = weights[start : start + _CHUNK].astype(np.float64)
        pooled = (part @ flat).reshape(len(part), *bins.shape[1:])
        samples.append(metric(pooled, part @ outside))
    return np.concatenate(samples)


def _interval(
    estimate: float, samples: np.ndarray, confidence: float, num_subjects: int
) -> Interval:
    tail = 50 * (1 - confidence)
    valid = samples[~np.isnan(samples)]  # a pooled resampling may hold no lesion
    if not len(valid):
        return Interval(estimate, float("nan"), float("nan"), num_subjects)
    low, high = np.percentile(valid, [tail, 100 - tail])
    return Interval(estimate, float(low), float(high), num_subjects)


POOLED = {
    "ap_pooled": accumulators.average_precision,
    "auroc_pooled": accumulators.auroc,
}
