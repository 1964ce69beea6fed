"""Tables of a report: what was measured, as text cells under headings.

A figure that does not exist is a dash, never 0, and a column or a row without any
figure is left out: data without lesion masks have no voxel figures, not empty ones.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

Metrics = Mapping[str, Any]
Scorers = Mapping[str, Metrics]
Item = TypeVar("Item")

# (key of the metrics dict, heading, what it means)
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("ap_pooled", "AP pooled", "average precision over all voxels of all volumes"),
    ("ap_volume_mean", "AP volume mean", "mean of each annotated lesion volume's AP"),
    ("auroc_pooled", "AUROC pooled", "over all voxels of all volumes"),
    (
        "dice_healthy_fpr_volume_mean",
        "Dice, healthy threshold",
        "mean over volumes; the threshold gives the stated share of false-positive "
        "voxels on healthy validation scans; no label is used",
    ),
    (
        "dice_validated_volume_mean",
        "Dice, validated",
        "mean over volumes; threshold of the best pooled Dice on validation lesions",
    ),
    (
        "dice_ceiling_pooled",
        "Dice ceiling, pooled",
        "best pooled Dice over all thresholds, chosen on the test set itself: an upper "
        "bound, not a result",
    ),
    (
        "lesion_contrast_volume_mean",
        "Lesion contrast",
        "mean score in the lesion over that in the rest of the eroded brain, mean over "
        "volumes",
    ),
    ("slice_auroc", "Slice AUROC", "slices with against slices without lesion"),
    ("volume_auroc", "Volume AUROC", "abnormal against healthy volumes"),
)
_RATES = (1, 5, 10)  # per cent of healthy voxels
_CEILING = "ceiling"


class Table(NamedTuple):
    """One table.

    Attributes:
      caption: What it shows.
      head: Heading and meaning of each column.
      rows: Text of each cell; what follows a line break is smaller.
      marked: Row that stands out.
      weak: Rows that are no result.
      words: Further columns of words, like the first, not of figures.
      groups: Headings over several columns, and how many; none if empty.
    """

    caption: str
    head: list[tuple[str, str]]
    rows: list[list[str]]
    marked: int | None = None
    weak: tuple[int, ...] = ()
    words: tuple[int, ...] = ()
    groups: tuple[tuple[str, int], ...] = ()


class Figure(NamedTuple):
    """A column of figures: where a row holds it and how it is written."""

    key: str  # "{rule}" stands for the rule of the row
    heading: str
    meaning: str
    group: str = ""
    digits: int = 3


_AT_THRESHOLD = (
    Figure(
        "dice_{rule}_volume_mean",
        "Dice volume mean",
        "mean of each lesion volume's Dice",
        "Voxels",
    ),
    Figure(
        "dice_{rule}_pooled", "Dice pooled", "over all voxels of all volumes", "Voxels"
    ),
    Figure(
        "precision_{rule}_pooled",
        "Precision",
        "share of the found voxels that are lesion, pooled",
        "Voxels",
    ),
    Figure(
        "recall_{rule}_pooled",
        "Recall",
        "share of the lesion voxels that are found, pooled",
        "Voxels",
    ),
    Figure(
        "lesion_recall_{rule}",
        "Recall",
        "share of the lesions that a finding touches",
        "Lesions",
    ),
    Figure(
        "lesion_precision_{rule}",
        "Precision",
        "share of the findings that touch a lesion",
        "Lesions",
    ),
    Figure(
        "lesion_f1_{rule}",
        "F1",
        "harmonic mean of lesion recall and lesion precision",
        "Lesions",
    ),
    Figure(
        "false_positive_ml_{rule}_healthy_mean",
        "Found, ml",
        "millilitres found on a healthy scan of this set, mean: all of it is wrong",
        "On a healthy scan",
        2,
    ),
    Figure(
        "false_components_{rule}_healthy_mean",
        "Findings",
        "separate findings on a healthy scan of this set, mean: all of them are wrong",
        "On a healthy scan",
        1,
    ),
)


def exists(value: Any) -> bool:
    """Whether there is such a figure: not None and finite."""
    return value is not None and math.isfinite(value)


def number(value: float | None, digits: int = 3) -> str:
    """Formats a metric; what does not exist is a dash, never 0."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.{digits}f}"


def significant(value: float | None, digits: int = 4) -> str:
    """Formats a score, whose scale is the scorer's own."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:#.{digits}g}"


def with_interval(metrics: Metrics, key: str, digits: int = 3) -> str:
    """Formats a metric with its interval, if it has one, below it."""
    text = number(metrics.get(key), digits)
    interval = metrics.get(f"{key}_interval")
    if interval and all(exists(bound) for bound in interval):
        low, high = (number(bound, digits) for bound in interval)
        text += f"\n[{low}, {high}]"
    return text


def interval_note(metrics: Metrics, named: Iterable[tuple[str, str]]) -> str:
    """Says what the brackets of a table are, and how many patients they rest on.

    Args:
      metrics: One row; the others are of the same volumes.
      named: Key and heading of each column.

    Returns:
      A sentence; "" without intervals.
    """
    named = [(key, heading) for key, heading in named if f"{key}_interval" in metrics]
    if not named:
        return ""
    known = metrics.get("interval_patients") or {}
    headings: dict[int, list[str]] = {}
    for key, heading in named:
        if key in known:
            headings.setdefault(known[key], []).append(heading)
    text = "In brackets: 95 % bootstrap interval over patients"
    counts = [f"{n} for {' / '.join(words)}" for n, words in headings.items()]
    return f"{text}: {'; '.join(counts)}." if counts else f"{text}."


def used_columns(
    *tables: Scorers, headline: Sequence[str] = ()
) -> list[tuple[str, str, str]]:
    """Those of `COLUMNS` that at least one scorer of some table has.

    Args:
      *tables: Scorers and their metrics.
      headline: Keys of the columns that come first, in this order.
    """
    return [
        column
        for column in led_by(headline, COLUMNS, lambda column: column[0])
        if any(
            exists(metrics.get(column[0]))
            for scorers in tables
            for metrics in scorers.values()
        )
    ]


def led_by(
    headline: Sequence[str], items: Iterable[Item], key: Callable[[Item], str]
) -> list[Item]:
    """Puts those first whose key is in the headline, in its order; others stay."""
    order = {name: place for place, name in enumerate(headline)}
    return sorted(items, key=lambda item: order.get(key(item), len(order)))


def table_rows(
    scorers: Scorers, columns: Iterable[tuple[str, str, str]] = COLUMNS
) -> list[list[str]]:
    """One row of formatted cells per scorer: its name, then its figures."""
    keys = [key for key, _, _ in columns]
    return [
        [name, *(with_interval(metrics, key) for key in keys)]
        for name, metrics in scorers.items()
    ]


def detection(
    scorers: Scorers, caption: str, headline: Sequence[str] = ()
) -> Table | None:
    """The main figures of every scorer; the first one stands out.

    Args:
      scorers: Scorers and their metrics.
      caption: Of the table.
      headline: Keys of the figures that the protocol puts first.
    """
    columns = used_columns(scorers, headline=headline)
    if not columns:
        return None
    head = [("", ""), *((heading, meaning) for _, heading, meaning in columns)]
    return Table(caption, head, table_rows(scorers, columns), marked=0)


def best_baseline(results: Mapping[str, Any]) -> str | None:
    """The baseline to hold against: that of the comparison, else the highest AP."""
    named = results.get("comparison", {}).get("best_baseline")
    if named:
        return str(named)
    model = results["run"]["name"]
    others = {
        name: metrics["ap_volume_mean"]
        for name, metrics in results["scorers"].items()
        if name != model and exists(metrics.get("ap_volume_mean"))
    }
    return max(others, key=lambda name: others[name]) if others else None


def healthy_rate(results: Mapping[str, Any]) -> float | None:
    """The false-positive rate on healthy scans behind the rule "healthy_fpr".

    Of the evaluation itself; results that do not hold it have it in their config.
    """
    stated = (results.get("operating") or {}).get("healthy_fpr")
    if stated is not None:
        return float(stated)
    config = results["run"].get("config") or {}
    rate = (config.get("evaluation") or {}).get("healthy_fpr")
    return None if rate is None else float(rate)


def operating_points(results: Mapping[str, Any]) -> Table | None:
    """What is found at each threshold: one row per rule, the ceiling last."""
    metrics = results["scorers"][results["run"]["name"]]
    rules = _rules(results, metrics)
    figures = [
        figure
        for figure in _AT_THRESHOLD
        if any(exists(metrics.get(figure.key.format(rule=rule))) for rule in rules)
    ]
    if not figures:
        return None
    thresholds = _threshold_values(results)
    operating = _same_as_rate(
        results, (results.get("operating") or {}).get("rule"), list(rules)
    )
    rows = []
    for rule, label in rules.items():
        label += " (operating point)" if rule == operating else ""
        cells = [label, significant(thresholds.get(rule))]
        for figure in figures:
            key = figure.key.format(rule=rule)
            cells.append(with_interval(metrics, key, figure.digits))
        rows.append(cells)
    head = [("Threshold from", ""), ("Threshold", "a finding scores above it")]
    head += [(figure.heading, figure.meaning) for figure in figures]
    groups = [("", 2), *_spans([figure.group for figure in figures])]
    best = best_baseline(results)
    if best and rows:
        for cells, rule in zip(rows, rules, strict=True):
            cells.append(number(_dice_of(results, best, rule)))
        meaning = "its Dice (mean over volumes) by the same rule, at its own threshold"
        head.append(("Dice volume mean", meaning))
        groups.append((best, 1))
    order = list(rules)
    note = interval_note(
        metrics,
        [
            (one.key.format(rule=rule), f"{one.heading} ({one.group.lower()})")
            for one in figures
            for rule in rules
            if rule == operating
        ],
    )
    return Table(
        "Thresholds were fixed on validation scans before any test scan was scored, "
        f"except the ceiling. {note}".rstrip(),
        head,
        rows,
        marked=order.index(operating) if operating in order else None,
        weak=(order.index(_CEILING),) if _CEILING in order else (),
        groups=tuple(groups),
    )


def _dice_of(results: Mapping[str, Any], scorer: str, rule: str) -> float | None:
    """Dice of a baseline, which may have the rate of the config only."""
    metrics = results["scorers"][scorer]
    value = metrics.get(f"dice_{rule}_volume_mean")
    if value is None and _same_as_rate(results, "healthy_fpr", [rule]) == rule:
        value = metrics.get("dice_healthy_fpr_volume_mean")
    return value


def _rules(results: Mapping[str, Any], metrics: Metrics) -> dict[str, str]:
    """Rule -> label, of the rules with figures."""
    labels = {
        f"healthy_fpr_{rate}": f"{rate} % of healthy validation voxels"
        for rate in _RATES
    }
    labels["healthy_fpr"] = "healthy validation voxels, at the operating rate"
    labels["validated"] = "best Dice on validation lesions"
    labels[_CEILING] = "ceiling: chosen on this test set; an upper bound, no result"
    present = [
        rule
        for rule in labels
        if any(exists(metrics.get(one.key.format(rule=rule))) for one in _AT_THRESHOLD)
    ]
    if _same_as_rate(results, "healthy_fpr", present) != "healthy_fpr":
        present.remove("healthy_fpr")
    return {rule: labels[rule] for rule in present}


def _same_as_rate(
    results: Mapping[str, Any], rule: str | None, present: Sequence[str]
) -> str | None:
    """The rule "healthy_fpr" by its rate, where that has a row of its own."""
    rate = healthy_rate(results)
    if rule != "healthy_fpr" or rate is None:
        return rule
    named = f"healthy_fpr_{100 * rate:g}"
    return named if named in present else rule


def _threshold_values(results: Mapping[str, Any]) -> dict[str, float | None]:
    stated = {row["rule"]: row["value"] for row in results.get("thresholds", ())}
    values: dict[str, float | None] = {
        f"healthy_fpr_{rate}": stated.get(f"healthy false-positive rate {rate} %")
        for rate in _RATES
    }
    values["validated"] = stated.get("validated")
    metrics = results["scorers"][results["run"]["name"]]
    values[_CEILING] = metrics.get("dice_ceiling_threshold")
    operating = results.get("operating") or {}
    values.setdefault(operating.get("rule", ""), operating.get("threshold"))
    return values


def _spans(groups: Sequence[str]) -> list[tuple[str, int]]:
    return [(group, groups.count(group)) for group in dict.fromkeys(groups)]
