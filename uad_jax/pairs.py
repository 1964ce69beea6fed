"""Which of two runs is better, and how sure that is.

A difference is the mean over volumes, as in a report; the patient is the unit that is
drawn or has its sign flipped, with all its volumes. Runs that differ only in seed or
fold are the members of one group; a group's value of a volume is the mean over its
members.
"""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from uad_jax import tables, verdict
from uad_jax.entries import (
    IMPORTED,
    CompareError,
    Entry,
    healthy_values,
    lesion_values,
)
from uad_jax.metrics import statistics

ALPHA = 0.05
MIN_RUNS_TO_BEAT = 3  # fewer seeds: no claim about a method
_SAME_SLICES = 1.01  # numbers of slices seen that count as equal


class Metric(NamedTuple):
    """A figure that is tested.

    Attributes:
      heading: Its name.
      column: Of the per-subject table; "{rule}" stands for the operating rule.
      healthy: Whether it is an error of the reconstruction of healthy volumes, not a
        figure of those with a lesion.
      lower_is_better: Whether less is better.
    """

    heading: str
    column: str
    healthy: bool = False
    lower_is_better: bool = False


METRICS = {
    "ap": Metric("AP", "ap"),
    "dice": Metric("Dice at the operating threshold", "dice_{rule}"),
    "l1": Metric("Healthy L1", "l1_brain", healthy=True, lower_is_better=True),
    "ssim": Metric("Healthy SSIM", "ssim", healthy=True),
}
# What may differ between the members of a group, beside seed and fold.
_FREE = ("name", "source", "evaluation")
_FREE_TRAIN = ("log_every", "keep_checkpoints", "keep_every", "evaluate_every")
_FREE_DATA = ("store", "placement", "device_budget_gib", "num_workers", "read_threads")


def groups(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Puts runs together that differ only in seed, its pretraining, or fold.

    Returns:
      Label -> members; every entry is in one group, maps each in their own.
    """
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        key = _identity(entry)
        place = 0
        while _has_twin(entry, found.get(f"{key}#{place}", [])):
            place += 1  # the same seed and fold again is no further sample
        found.setdefault(f"{key}#{place}", []).append(entry)
    labelled: dict[str, list[Entry]] = {}
    for members in found.values():
        label = members[0].name
        if len(members) > 1:
            label = f"{members[0].scorer} ({len(members)} runs)"
            if label in labelled:
                label = f"{', '.join(member.name for member in members)}"
        labelled[label] = members
    return labelled


class Values(NamedTuple):
    """A figure of every volume with an annotated lesion, or of every healthy one.

    Attributes:
      volumes: Volume -> value; NaN where there is none.
      patients: Volume -> patient.
    """

    volumes: dict[str, float]
    patients: dict[str, str]

    @property
    def num_patients(self) -> int:
        """Patients with a value."""
        valid = (name for name, value in self.volumes.items() if not math.isnan(value))
        return len({self.patients[name] for name in valid})


def volume_values(members: Sequence[Entry], metric: str, scorer: str = "") -> Values:
    """Values per volume, averaged over members.

    Args:
      members: Runs; one, or those of a group.
      metric: Of `METRICS`; Dice is at each member's own operating threshold.
      scorer: Whose values; "" = the run's own.

    Returns:
      The values; none where no volume has one.

    Raises:
      CompareError: If a volume has a value in some members only.
    """
    chosen = METRICS[metric]
    read = healthy_values if chosen.healthy else lesion_values
    totals: dict[str, list[float]] = {}
    patients: dict[str, str] = {}
    for member in members:
        rule, threshold = member.operating
        if metric == "dice" and (not rule or threshold is None):
            return Values({}, {})
        rows = member.rows[scorer or member.scorer]
        values, patients = read(rows, chosen.column.format(rule=rule))
        for subject, number in values.items():
            totals.setdefault(subject, []).append(number)
    torn = [name for name, found in totals.items() if len(found) != len(members)]
    if torn and chosen.healthy:
        return Values({}, {})  # a reconstruction that is not finite has no error
    if torn:
        raise CompareError(
            f"{', '.join(sorted(torn)[:5])}: only some of "
            f"{', '.join(member.name for member in members)} have a value. Evaluate "
            "them again, all on one store."
        )
    means = {name: math.fsum(found) / len(found) for name, found in totals.items()}
    return Values(means, patients)


def compare_all(
    sides: Mapping[str, Sequence[Entry]], *, num_samples: int, num_rounds: int
) -> list[dict[str, Any]]:
    """Tests every two of some runs, or of some groups, for each metric.

    Args:
      sides: Name -> the run alone, or the members of a group.
      num_samples: Bootstrap resamplings of the patients.
      num_rounds: Sign patterns of the permutation test.

    Returns:
      One row per pair and metric: means, their difference with 95 % interval, p,
      Holm's p over all pairs of the metric, a verdict, and notes.
    """
    found = []
    for metric in METRICS:
        tests = [
            _test(metric, one, other, num_samples, num_rounds)
            for one, other in itertools.combinations(sides.items(), 2)
        ]
        tests = [test for test in tests if test["num_patients"]]
        named = {i: t["p"] for i, t in enumerate(tests) if t["p"] is not None}
        adjusted = statistics.holm(named)
        for i, test in enumerate(tests):
            test["p_holm"] = adjusted.get(i)
            test["verdict"] = _verdict(test)
        found += tests
    return found


def cases(entries: Sequence[Entry]) -> dict[str, dict[str, dict[str, float]]]:
    """Metric -> patient -> run -> value, where patients are too few to rank by."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for metric, chosen in METRICS.items():
        for entry in () if chosen.healthy else entries:
            values = volume_values([entry], metric)
            if 0 < values.num_patients < verdict.MIN_PATIENTS_TO_RANK:
                means = statistics.by_unit(values.volumes, values.patients)
                for patient, number in means.items():
                    row = found.setdefault(metric, {}).setdefault(patient, {})
                    row[entry.name] = number
    return found


def against_baselines(
    members: Sequence[Entry],
    baselines: Mapping[str, Mapping[str, float]],
    num_samples: int,
) -> dict[str, Any]:
    """The AP of a run or a group minus that of the best baseline.

    Args:
      members: The run, or the members of a group.
      baselines: Baseline -> volume -> AP.
      num_samples: Bootstrap resamplings of the patients.

    Returns:
      "baseline", "num_patients", "difference", "interval"; empty without baselines
      or with too few patients.
    """
    values = volume_values(members, "ap")
    if values.num_patients < verdict.MIN_PATIENTS_TO_RANK or not baselines:
        return {}
    best = max(
        baselines,
        key=lambda name: statistics.summarize(list(baselines[name].values())).mean,
    )
    difference = statistics.paired_bootstrap(
        values.volumes, baselines[best], values.patients, num_samples=num_samples
    )
    return {
        "baseline": best,
        "num_patients": difference.num_subjects,
        "difference": difference.estimate,
        "interval": [difference.low, difference.high],
    }


def claim(
    members: Sequence[Entry],
    above: Sequence[Mapping[str, Any]],
    missing: Mapping[str, str] | None = None,
) -> str:
    """What a group of runs shows about its method against the baselines.

    Args:
      members: The runs.
      above: `against_baselines` of each.
      missing: Baseline -> why there is none to compare with.
    """
    if not all(above):
        return "no comparison with the baselines"
    return verdict.with_missing(_claim(members, above), missing or {})


def _claim(members: Sequence[Entry], above: Sequence[Mapping[str, Any]]) -> str:
    beating = sum(one["interval"][0] > 0 for one in above)
    text = f"{beating} of {len(members)} runs above the best baseline (interval > 0)"
    count = above[0]["num_patients"]
    if count < verdict.MIN_PATIENTS_TO_BEAT:
        return f"{text}; {count} patients are too few for a claim"
    if any(member.imported for member in members):
        return f"{text}; {IMPORTED}: no claim about the method"
    if any(member.training.get("undertrained") for member in members):
        return f"{text}; undertrained: no claim about the method"
    if len(members) < MIN_RUNS_TO_BEAT:
        return f"{text}; fewer than {MIN_RUNS_TO_BEAT} seeds: no claim"
    beats = 3 * beating >= 2 * len(members)
    return f"{text}: {'beats' if beats else 'does not beat'} the baselines"


def same_slices(counts: Sequence[int]) -> bool:
    """Whether numbers of slices seen are equal to 1 %."""
    return not counts or max(counts) <= _SAME_SLICES * min(counts)


def _test(
    metric: str,
    one: tuple[str, Sequence[Entry]],
    other: tuple[str, Sequence[Entry]],
    num_samples: int,
    num_rounds: int,
) -> dict[str, Any]:
    first, second = (volume_values(side[1], metric) for side in (one, other))
    row: dict[str, Any] = {
        "metric": metric,
        "heading": METRICS[metric].heading,
        "first": one[0],
        "second": other[0],
        "num_patients": min(first.num_patients, second.num_patients),
        "difference": None,
        "interval": None,
        "p": None,
        "notes": _notes(metric, one[1], other[1]),
    }
    if row["num_patients"] < verdict.MIN_PATIENTS_TO_RANK:
        return row
    if METRICS[metric].healthy and not _same_images(first, second, one[1], other[1]):
        return {**row, "num_patients": 0}
    pair = (first.volumes, second.volumes, first.patients)
    interval = statistics.paired_bootstrap(*pair, num_samples=num_samples)
    row["first_mean"] = statistics.summarize(list(first.volumes.values())).mean
    row["second_mean"] = statistics.summarize(list(second.volumes.values())).mean
    row["difference"] = interval.estimate
    row["interval"] = [interval.low, interval.high]
    row["p"] = statistics.paired_permutation(*pair, num_rounds=num_rounds)
    return row


def _same_images(
    first: Values, second: Values, one: Sequence[Entry], other: Sequence[Entry]
) -> bool:
    """Whether reconstructions can be compared: same scans, made by the same score.

    A restoration begins with the image itself, and is near to it for that reason.
    """
    kinds = {
        (entry.results["run"]["config"] or {})
        .get("method", {})
        .get("score", {})
        .get("kind", "residual")
        for entry in (*one, *other)
    }
    return set(first.volumes) == set(second.volumes) and len(kinds) == 1


def _verdict(test: Mapping[str, Any]) -> str:
    if test["difference"] is None:
        return "single cases, no ranking"
    difference, (low, high) = test["difference"], test["interval"]
    if difference == 0:
        return "equal"
    chosen = METRICS[test["metric"]]
    better = (difference > 0) != chosen.lower_is_better
    if test["num_patients"] < verdict.MIN_PATIENTS_TO_BEAT:
        if chosen.healthy:
            return "better than" if better else "worse than"
        return "above" if better else "below"
    if (low > 0 or high < 0) and test["p_holm"] < ALPHA:
        return "beats" if better else "is beaten by"
    return "no difference shown"


def _notes(metric: str, one: Sequence[Entry], other: Sequence[Entry]) -> list[str]:
    notes = []
    members = [*one, *other]
    if len({_identity(member) for member in members}) == 1:
        notes.append("only the seed or the fold differs")
    if len({member.operating[0] for member in members}) > 1 and metric == "dice":
        notes.append("operating rules differ")
    elif metric == "dice" and members[0].operating[0] == "healthy_fpr":
        rates = {tables.healthy_rate(member.results) for member in members} - {None}
        if len(rates) > 1:
            notes.append("operating rates on healthy scans differ")
    seen = [member.training.get("slices_seen") for member in members]
    known = [count for count in seen if count]
    if not same_slices(known):
        notes.append(f"slices seen differ ({min(known)} to {max(known)})")
    if any(member.training.get("undertrained") for member in members):
        notes.append("undertrained: no claim about the method")
    return notes


def _identity(entry: Entry) -> str:
    """Text that the members of a group share."""
    run = entry.results["run"]
    config = run.get("config")
    if not config:
        return json.dumps(["alone", entry.name])
    kept = {k: v for k, v in config.items() if k not in (*_FREE, "seed")}
    kept["train"] = _without(config.get("train"), _FREE_TRAIN)
    kept["train"]["warm_start"] = _origins(config)
    kept["data"] = _without(config.get("data"), (*_FREE_DATA, "fold"))
    # Weights of another program are a method of their own.
    weights = (run.get("imported") or {}).get("sha256")
    return json.dumps([kept, run.get("data_fingerprint"), weights], sort_keys=True)


def _origins(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where a run starts from; a name that ends in the run's own seed stands for all.

    So runs that start from the pretraining of their seed, runs/spark-0, runs/spark-1,
    are still one group.
    """
    own = re.compile(rf"(?<!\d){config.get('seed')}$")
    origins = (config.get("train") or {}).get("warm_start") or []
    return [
        {**entry, "workdir": own.sub("SEED", entry["workdir"].rstrip("/"))}
        for entry in origins
    ]


def _without(part: Mapping[str, Any] | None, names: Sequence[str]) -> dict[str, Any]:
    return {key: item for key, item in (part or {}).items() if key not in names}


def _has_twin(entry: Entry, members: Sequence[Entry]) -> bool:
    return any(_seed_and_fold(entry) == _seed_and_fold(one) for one in members)


def _seed_and_fold(entry: Entry) -> tuple[Any, Any]:
    config = entry.results["run"]["config"] or {}
    return config.get("seed"), (config.get("data") or {}).get("fold")
