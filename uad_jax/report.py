"""One self-contained HTML page: tables, curves, pictures, provenance."""

import base64
import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

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
    ("slice_auroc", "Slice AUROC", "slices with against slices without lesion"),
    ("volume_auroc", "Volume AUROC", "abnormal against healthy volumes"),
)


def number(value: float | None, digits: int = 3) -> str:
    """Formats a metric; what does not exist is a dash, never 0."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.{digits}f}"


def table_rows(scorers: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """One row of formatted cells per scorer, in `COLUMNS` order after the name."""
    rows = []
    for name, metrics in scorers.items():
        cells = [name]
        for key, _, _ in COLUMNS:
            cell = number(metrics.get(key))
            interval = metrics.get(f"{key}_interval")
            if interval and all(math.isfinite(v) for v in interval):
                cell += f" [{number(interval[0])}, {number(interval[1])}]"
            cells.append(cell)
        rows.append(cells)
    return rows


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lays out a plain-text table for the terminal."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    lines = []
    for line in table:
        first = line[0].ljust(widths[0])
        rest = [
            cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)
        ]
        lines.append("  ".join([first, *rest]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def summary(results: Mapping[str, Any]) -> str:
    """The results of one set for the terminal: the main columns and the verdict."""
    keys = ("ap_pooled", "ap_volume_mean", "dice_healthy_fpr_volume_mean")
    headings = {key: heading for key, heading, _ in COLUMNS}
    scorers = dict(results["scorers"])
    model = results["run"]["name"]  # first also in results read from a file, sorted
    rows = [
        [name, *(number(metrics.get(key)) for key in keys)]
        for name, metrics in ({model: scorers.pop(model)} | scorers).items()
    ]
    table = text_table(["", *(headings[key] for key in keys)], rows)
    return f"{table}\n\n{textwrap.fill(results['verdict'], 80)}"


def write(
    path: pathlib.Path, results: Mapping[str, Any], figures: Mapping[str, bytes]
) -> None:
    """Writes the report.

    Args:
      path: The HTML file.
      results: What `evaluate.evaluate` returns for one set.
      figures: Name -> PNG bytes; embedded in the page.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("uad_jax"), autoescape=True, trim_blocks=True
    )
    environment.filters["number"] = number
    page = environment.get_template("report.html.j2").render(
        results=results,
        columns=COLUMNS,
        rows=table_rows,
        figures={
            name: "data:image/png;base64," + base64.b64encode(png).decode()
            for name, png in figures.items()
        },
    )
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
