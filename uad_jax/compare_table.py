"""The tables of a comparison: all figures, the paired tests, single cases."""

import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from uad_jax import results as results_lib
from uad_jax import tables
from uad_jax.entries import IMPORTED
from uad_jax.tables import Figure, Table

DETECTION = "Detection"
OPERATING = "At the operating threshold"
OTHER = "Dice at other thresholds"
CEILING = "Ceiling: chosen on this test set, no result"
SCANS = "Slices and scans"
TRAINING = "Training and time"

COLUMNS = (
    Figure("ap_pooled", "AP pooled", "average precision over all voxels", DETECTION),
    Figure(
        "ap_volume_mean",
        "AP volume mean",
        "mean of each annotated lesion volume's average precision",
        DETECTION,
    ),
    Figure(
        "above_baseline",
        "AP - best baseline",
        "AP volume mean minus that of the best baseline",
        DETECTION,
    ),
    Figure("auroc_pooled", "AUROC pooled", "AUROC over all voxels", DETECTION),
    Figure(
        "lesion_contrast_volume_mean",
        "Lesion contrast",
        "mean score in the lesion over that in the rest of the brain",
        DETECTION,
        2,
    ),
    Figure(
        "dice_{rule}_volume_mean",
        "Dice",
        "mean over lesion volumes; the threshold was fixed before the test",
        OPERATING,
    ),
    Figure(
        "lesion_recall_{rule}",
        "Lesion recall",
        "share of the lesions that a finding touches",
        OPERATING,
    ),
    Figure(
        "false_positive_ml_{rule}_healthy_mean",
        "False ml",
        "millilitres found on a healthy scan, mean: all of it is wrong",
        OPERATING,
        1,
    ),
    *(
        Figure(
            f"dice_healthy_fpr_{rate}_volume_mean",
            f"FPR {rate} %",
            f"mean Dice where {rate} % of the healthy validation voxels are found",
            OTHER,
        )
        for rate in (1, 5, 10)
    ),
    Figure(
        "dice_validated_volume_mean",
        "Validated",
        "mean Dice at the threshold that is best on validation lesions",
        OTHER,
    ),
    Figure(
        "dice_ceiling_pooled",
        "Dice pooled",
        "best pooled Dice over all thresholds, chosen on the test set",
        CEILING,
    ),
    Figure(
        "dice_ceiling_volume_mean",
        "Dice volume mean",
        "mean of each volume's own best Dice, chosen on the test set",
        CEILING,
    ),
    Figure("slice_auroc", "Slice AUROC", "slices with against without lesion", SCANS),
    Figure("volume_auroc", "Volume AUROC", "abnormal against healthy scans", SCANS),
    Figure("slices_seen", "Slices seen", "training slices, repeats too", TRAINING, 0),
    Figure(
        "percent_of_reference",
        "% of budget",
        "share of the training slices of the paper's own budget",
        TRAINING,
        1,
    ),
    Figure(
        "validation_slope",
        "Loss slope",
        "relative change of the validation loss over the last fifth of the training; "
        "below 0 it still falls",
        TRAINING,
    ),
    Figure("train_seconds", "Training s", "seconds of training", TRAINING, 0),
    Figure(
        "evaluation_seconds", "Evaluation s", "seconds of the evaluation", TRAINING, 0
    ),
)
TERMINAL = (
    "ap_pooled",
    "ap_volume_mean",
    "dice_{rule}_volume_mean",
    "lesion_recall_{rule}",
    "volume_auroc",
    "slices_seen",
)


class Row(NamedTuple):
    """One line of the table.

    Attributes:
      name: Run, group, or baseline.
      role: "run", "maps", "group" or "baseline".
      rule: Operating rule.
      figures: Key -> value, "<key>_interval" -> [low, high], "<key>_sd" -> spread
        over the members of a group.
      remark: Such as "undertrained".
    """

    name: str
    role: str
    rule: str
    figures: Mapping[str, Any]
    remark: str = ""


def rows(result: Mapping[str, Any]) -> list[Row]:
    """The rows of a comparison: runs, groups of several, baselines."""
    runs = result["runs"]
    found = [
        Row(
            name,
            "maps" if run["source"] == "maps" else "run",
            run["operating"]["rule"],
            {**run["metrics"], **run["training"], **_others(run)},
            IMPORTED if run["imported"] else _state(run["training"]),
        )
        for name, run in runs.items()
    ]
    for name, group in result["groups"].items():
        if group["num_runs"] > 1:
            figures = {**group["metrics"], **group["training"], **_above(group)}
            found.append(
                Row(
                    name,
                    "group",
                    group["rule"],
                    figures,
                    _state(*(runs[one]["training"] for one in group["members"])),
                )
            )
    rule = next(iter(runs.values()))["operating"]["rule"]
    for name, metrics in result["baselines"].items():
        found.append(Row(name, "baseline", rule, metrics))
    return found


def used(lines: Sequence[Row], headline: Sequence[str] = ()) -> list[Figure]:
    """The columns that at least one row fills, and that repeat no other.

    Args:
      lines: The rows.
      headline: Keys of the figures that the protocol puts first, each with the group
        that it stands in.
    """
    ranks = {column.key: column.group for column in COLUMNS}
    groups = [ranks[key] for key in headline if key in ranks]
    by_key = tables.led_by(headline, COLUMNS, lambda column: column.key)
    return [
        column
        for column in tables.led_by(
            list(dict.fromkeys([*groups, *ranks.values()])),
            by_key,
            lambda column: column.group,
        )
        if any(math.isfinite(value(row, column)) for row in lines)
        and not (column.group == OTHER and _is_operating(column, lines))
    ]


def value(row: Row, column: Figure) -> float:
    """The figure of a cell; NaN where there is none."""
    found = row.figures.get(column.key.format(rule=row.rule))
    return math.nan if found is None else float(found)


def cell(row: Row, column: Figure) -> str:
    """A figure; below it its spread over a group's runs and its interval."""
    key = column.key.format(rule=row.rule)
    text = tables.with_interval(row.figures, key, column.digits)
    spread = row.figures.get(f"{key}_sd")
    if not tables.exists(spread):
        return text
    first, newline, interval = text.partition("\n")
    return f"{first}\n± {tables.number(spread, column.digits)}{newline}{interval}"


def figures_table(lines: Sequence[Row], headline: Sequence[str] = ()) -> Table:
    """All figures of all rows; arguments as in `used`."""
    columns = used(lines, headline)
    groups = [column.group for column in columns]
    return Table(
        "",
        [("", ""), *((column.heading, column.meaning) for column in columns)],
        [[_title(row), *(cell(row, column) for column in columns)] for row in lines],
        weak=tuple(i for i, row in enumerate(lines) if row.role == "baseline"),
        groups=(
            ("", 1),
            *((group, groups.count(group)) for group in dict.fromkeys(groups)),
        ),
    )


def heading(column: Figure) -> str:
    """The heading of a column on the terminal, which has no line of groups."""
    ceiling = " (ceiling)" if column.group == CEILING else ""
    return f"{column.heading}{ceiling}"


def short_title(row: Row) -> str:
    """The name of a row on the terminal."""
    return f"{row.name} ({row.remark})" if row.remark == "undertrained" else row.name


def tests_table(tests: Sequence[Mapping[str, Any]], caption: str) -> Table:
    """The paired tests of one figure; what limits a test stands below its name."""
    head = [
        (caption, ""),
        ("Difference", "first minus second, mean over volumes"),
        ("95 % interval", "paired bootstrap: patients are drawn, with their volumes"),
        ("p", "permutation test, two-sided: signs are flipped per patient"),
        ("p (Holm)", "corrected for the number of tests of this figure"),
        ("Patients", "with such a volume: with an annotated lesion, or healthy"),
    ]
    lines = [
        ["\n".join([sentence(test), *test["notes"]]), *_tested(test)] for test in tests
    ]
    return Table("", head, lines)


def sentence(test: Mapping[str, Any]) -> str:
    """Who beats whom."""
    first, verdict, second = test["first"], test["verdict"], test["second"]
    if verdict in (
        "above",
        "below",
        "beats",
        "is beaten by",
        "better than",
        "worse than",
    ):
        return f"{first} {verdict} {second}"
    return f"{first} and {second}: {verdict}"


def tests_lines(tests: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The same as lines of one terminal table."""
    return [[f"{_short(t['heading'])}: {sentence(t)}", *_tested(t)] for t in tests]


def _short(heading: str) -> str:
    return heading.removesuffix(" at the operating threshold")


def cases_table(
    patients: Mapping[str, Mapping[str, float]], runs: Sequence[str], heading: str
) -> Table:
    """A row per patient, where there are too few to rank by."""
    return Table(
        f"{heading} of each patient: there are too few for more than that.",
        [("", ""), *((run, "") for run in runs)],
        [
            [patient, *(tables.number(values.get(run)) for run in runs)]
            for patient, values in patients.items()
        ],
    )


def runs_table(runs: Mapping[str, Mapping[str, Any]]) -> Table:
    """What each run is."""
    head = ["", "method", "step", "seed", "modalities", "rule", "threshold", "device"]
    return Table(
        "The threshold is the run's own, on the scale of its own scores.",
        [(heading, "") for heading in head],
        [
            [
                name,
                run["method"] or "maps of another tool",
                _text(run["step"]),
                _text(run["seed"]),
                ", ".join(run["modalities"]),
                _text(run["operating"]["rule"]),
                tables.significant(run["operating"]["threshold"]),
                _text(run["device"]),
            ]
            for name, run in runs.items()
        ],
    )


def write_csv(path: pathlib.Path, lines: Sequence[Row]) -> None:
    """Writes every scalar figure of every row; what does not exist is empty."""
    found = [dict(_scalars(row.figures)) for row in lines]
    names = sorted({name for figures in found for name in figures})
    results_lib.write_table(
        path,
        [
            {
                "name": row.name,
                "role": row.role,
                "operating_rule": row.rule,
                "remark": row.remark,
                **{name: figures.get(name, "") for name in names},
            }
            for row, figures in zip(lines, found, strict=True)
        ],
    )


def _scalars(figures: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, found in figures.items():
        if key.endswith("_interval") and found:
            yield f"{key.removesuffix('_interval')}_low", found[0]
            yield f"{key.removesuffix('_interval')}_high", found[1]
        elif isinstance(found, int | float) and math.isfinite(found):
            yield key, found


def _title(row: Row) -> str:
    about = [row.role] if row.role in ("maps", "group") else []
    about += [row.remark] if row.remark else []
    return "\n".join([row.name, *about])


def _tested(test: Mapping[str, Any]) -> list[str]:
    interval = "-"
    if test["interval"]:
        interval = "[{:+.3f}, {:+.3f}]".format(*test["interval"])
    difference = test["difference"]
    return [
        "-" if difference is None else f"{difference:+.3f}",
        interval,
        tables.number(test["p"], 4),
        tables.number(test["p_holm"], 4),
        str(test["num_patients"]),
    ]


def _state(*trainings: Mapping[str, Any]) -> str:
    """The remark on a row: one member that is undertrained makes the group so."""
    return "undertrained" if any(one.get("undertrained") for one in trainings) else ""


def _others(run: Mapping[str, Any]) -> dict[str, Any]:
    return {"evaluation_seconds": run["evaluation_seconds"], **_above(run)}


def _above(side: Mapping[str, Any]) -> dict[str, Any]:
    found = side["against_baselines"]
    if not found:
        return {}
    return {
        "above_baseline": found["difference"],
        "above_baseline_interval": found["interval"],
    }


def _is_operating(column: Figure, lines: Sequence[Row]) -> bool:
    """Whether the column repeats the Dice at every row's operating threshold."""
    return all(column.key == f"dice_{row.rule}_volume_mean" for row in lines)


def _text(found: Any) -> str:
    return "-" if found is None or found == "" else str(found)
