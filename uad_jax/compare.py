"""Compares runs, and maps made by other tools, that were evaluated on one set."""

import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from uad_jax import (
    compare_table,
    entries,
    pages,
    pairs,
    panels,
    report,
    tables,
    verdict,
)
from uad_jax import results as results_lib
from uad_jax import workdir as workdir_lib
from uad_jax.compare_table import Row
from uad_jax.entries import Entry
from uad_jax.metrics import statistics

_WIDTH = 88  # of sentences on the terminal
_MOST_TESTS = 20  # on the terminal


def compare(
    folders: Sequence[pathlib.Path],
    output: pathlib.Path,
    *,
    set_name: str = "",
    num_samples: int = 1000,
    num_rounds: int = 10_000,
) -> dict[str, Any]:
    """Compares runs on one set: a table, paired tests, curves and pictures.

    Args:
      folders: Workdirs of evaluated runs or of scored maps.
      output: Gets `compare.json`, `compare.csv` and `compare.html`.
      set_name: The set; "" = the one set that all were evaluated on.
      num_samples: Bootstrap resamplings of the patients.
      num_rounds: Sign patterns of the permutation tests.

    Returns:
      The content of `compare.json` (where NaN is null): "set", "runs", "groups",
      "baselines", "pairs", "group_pairs", "cases", "curves", "panels", "notes".

    Raises:
      entries.CompareError: If the results are missing or damaged, or are not of the
        same volumes and protocol.
    """
    found = entries.read(folders, set_name)
    tests = {"num_samples": num_samples, "num_rounds": num_rounds}
    baselines = _baselines(found)
    precisions = {
        name: pairs.volume_values([entry], "ap", name).volumes
        for name, entry in baselines.items()
    }
    lacking = _missing(found, baselines)
    grouped = pairs.groups(found)
    several = any(len(members) > 1 for members in grouped.values())
    shown, missing = panels.choose(found)
    result: dict[str, Any] = {
        "set": found[0].results["set"],
        "runs": {entry.name: _run(entry, precisions, num_samples) for entry in found},
        "groups": {
            name: _group(members, precisions, lacking, num_samples)
            for name, members in grouped.items()
        },
        "baselines": {
            name: entry.results["scorers"][name] for name, entry in baselines.items()
        },
        "pairs": pairs.compare_all({one.name: [one] for one in found}, **tests),
        "group_pairs": pairs.compare_all(grouped, **tests) if several else [],
        "cases": pairs.cases(found),
        "curves": {entry.name: _curve(entry) for entry in found},
        "panels": [{"subject": one.title, "why": one.why} for one in shown],
        "notes": [*_notes(found, baselines, lacking), *missing],
    }
    output.mkdir(parents=True, exist_ok=True)
    workdir_lib.write_json(output / "compare.json", results_lib.without_nan(result))
    lines = compare_table.rows(result)
    compare_table.write_csv(output / "compare.csv", lines)
    pictures = [panels.draw(one) for one in shown]
    _write_page(output / "compare.html", result, lines, pictures)
    logging.info("Comparison: %s", output / "compare.html")
    return result


def render(result: Mapping[str, Any]) -> str:
    """A comparison for the terminal: main columns, tests, notes."""
    lines = compare_table.rows(result)
    leading = result["set"].get("headline") or ()
    columns = [
        column
        for column in compare_table.used(lines, leading)
        if column.key in (*compare_table.TERMINAL, *leading)
    ]
    cells = [
        [
            compare_table.short_title(row),
            *(
                tables.number(compare_table.value(row, column), column.digits)
                for column in columns
            ),
        ]
        for row in lines
    ]
    facts = result["set"]
    parts = [
        f"Set {facts['name']}: {facts['num_volumes']} volumes "
        f"({facts['num_abnormal']} abnormal), protocol {facts['protocol']}",
        report.text_table(["", *map(compare_table.heading, columns)], cells),
    ]
    tests = _tested(result["group_pairs"] or result["pairs"])
    if len(tests) > _MOST_TESTS:
        parts.append(f"{len(tests)} paired tests: see compare.html or compare.json.")
    elif tests:
        header = ["", "difference", "95 % interval", "p", "p (Holm)", "patients"]
        parts.append(report.text_table(header, compare_table.tests_lines(tests)))
    for metric, patients in result["cases"].items():
        single = compare_table.cases_table(
            patients, list(result["runs"]), pairs.METRICS[metric].heading
        )
        header = [heading for heading, _ in single.head]
        parts.append(f"{single.caption}\n{report.text_table(header, single.rows)}")
    parts += [
        textwrap.fill(f"{name}: {group['claim']}", _WIDTH)
        for name, group in result["groups"].items()
        if group["num_runs"] > 1
    ]
    parts += [textwrap.fill(f"Note: {note}", _WIDTH) for note in result["notes"]]
    return "\n\n".join(parts)


def _run(
    entry: Entry, baselines: Mapping[str, Mapping[str, float]], num_samples: int
) -> dict[str, Any]:
    run = entry.results["run"]
    rule, threshold = entry.operating
    return {
        "source": run.get("source", "checkpoint"),
        "method": run.get("method", ""),
        "step": run.get("step"),
        "seed": run.get("seed"),
        "modalities": entry.results["set"].get("modalities", []),
        "operating": {"rule": rule, "threshold": threshold},
        "training": dict(entry.training),
        "imported": dict(entry.imported),
        "device": entry.device,
        "evaluation_seconds": run.get("evaluation_seconds"),
        "timings": run.get("timings") or {},
        "metrics": entry.metrics,
        "against_baselines": pairs.against_baselines([entry], baselines, num_samples),
    }


def _group(
    members: Sequence[Entry],
    baselines: Mapping[str, Mapping[str, float]],
    missing: Mapping[str, str],
    num_samples: int,
) -> dict[str, Any]:
    """Mean and spread over the members, and an interval over the patients."""
    metrics = _mean_and_spread([member.metrics for member in members])
    precisions = pairs.volume_values(members, "ap")
    if precisions.num_patients >= verdict.MIN_PATIENTS_TO_RANK:
        interval = statistics.bootstrap_volumes(*precisions, num_samples=num_samples)
        metrics["ap_volume_mean_interval"] = [interval.low, interval.high]
    above = [pairs.against_baselines([one], baselines, num_samples) for one in members]
    return {
        "members": [member.name for member in members],
        "num_runs": len(members),
        "num_patients": precisions.num_patients,
        "rule": members[0].operating[0],
        "training": _mean_and_spread([member.training for member in members]),
        "metrics": metrics,
        "against_baselines": pairs.against_baselines(members, baselines, num_samples),
        "claim": pairs.claim(members, above, missing),
    }


def _mean_and_spread(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means and "<key>_sd" of the figures that all have."""
    found: dict[str, Any] = {}
    for key in each[0]:
        values = [one.get(key) for one in each]
        if all(type(item) in (int, float) for item in values):
            summary = statistics.summarize(np.array(values, np.float64))
            found[key] = summary.mean
            found[f"{key}_sd"] = summary.sd
    return found


def _baselines(found: Sequence[Entry]) -> dict[str, Entry]:
    """Baseline -> the first entry that has it."""
    named: dict[str, Entry] = {}
    for entry in found:
        for name in entry.results["scorers"]:
            if name != entry.scorer and name in entry.rows:
                named.setdefault(name, entry)
    return named


def _missing(found: Sequence[Entry], baselines: Mapping[str, Entry]) -> dict[str, str]:
    """Baseline that no entry has -> why."""
    reasons: dict[str, str] = {}
    for entry in found:
        reasons |= entry.results.get("missing_baselines") or {}
    return {name: why for name, why in reasons.items() if name not in baselines}


def _curve(entry: Entry) -> dict[str, Any]:
    """The figures of a run over its checkpoints, and its validation losses."""
    dice = f"dice_{entry.operating[0]}_volume_mean"
    keys = {"ap": "ap_volume_mean", "dice": dice, "volume_auroc": "volume_auroc"}
    points: list[dict[str, Any]] = [
        {
            "step": entries.value(row, "step"),
            "train_seconds": entries.value(row, "train_seconds"),
            **{name: entries.value(row, key) for name, key in keys.items()},
        }
        for row in entry.by_step
    ] or [
        {
            "step": entry.results["run"].get("step"),
            "train_seconds": entry.training.get("train_seconds"),
            **{name: entry.metrics.get(key) for name, key in keys.items()},
        }
    ]
    losses, seconds = [], None
    for line in entry.lines:
        seconds = line.get("perf/train_seconds", seconds)
        if "validation/loss" in line:
            losses.append(
                {
                    "step": line["step"],
                    "train_seconds": seconds,
                    "validation_loss": line["validation/loss"],
                }
            )
    return {"points": points, "validation": losses}


def _notes(
    found: Sequence[Entry],
    baselines: Mapping[str, Entry],
    missing: Mapping[str, str],
) -> list[str]:
    """What a reader must know of the whole comparison."""
    notes = [f"{entry.name}: {note}" for entry in found for note in entry.notes]
    for entry in found:
        if note := (entry.results.get("operating") or {}).get("note"):
            notes.append(f"{entry.name}: {note}")
    for name, why in missing.items():
        notes.append(f"The baseline {name} is missing: {why}.")
    for what, spelled in (
        ("Slices seen", {e.name: e.training.get("slices_seen") for e in found}),
        ("Devices of the training", {e.name: e.device or None for e in found}),
        ("Operating rules", {e.name: e.operating[0] or None for e in found}),
        (
            "Operating rates on healthy scans",
            {e.name: tables.healthy_rate(e.results) for e in found},
        ),
        ("Pooled figures", {e.name: e.results.get("pooled") for e in found}),
        (
            "Modalities",
            {e.name: "+".join(e.results["set"].get("modalities", [])) for e in found},
        ),
    ):
        known = {name: item for name, item in spelled.items() if item is not None}
        if _differ(list(known.values())):
            listed = ", ".join(f"{name} {item}" for name, item in known.items())
            notes.append(f"{what} differ: {listed}.")
    for name, first in baselines.items():
        for entry in found:
            figures = [
                one.results["scorers"].get(name, {}).get("ap_pooled")
                for one in (first, entry)
            ]
            if None not in figures and not math.isclose(*figures, abs_tol=1e-6):
                notes.append(
                    f"The baseline {name} of {entry.name} has another AP "
                    f"({figures[1]:.3f}) than that of {first.name}, which is shown."
                )
    return notes


def _differ(values: Sequence[Any]) -> bool:
    if values and all(isinstance(value, int) for value in values):
        return not pairs.same_slices(values)
    return len(set(values)) > 1


def _write_page(
    path: pathlib.Path,
    result: Mapping[str, Any],
    lines: Sequence[Row],
    panel_pictures: Sequence[bytes],
) -> None:
    curves = panels.draw_curves(result["curves"])
    runs = list(result["runs"])
    pages.write(
        path,
        "compare.html.j2",
        set=result["set"],
        num_runs=len(runs),
        rows=_set_rows(result["set"]),
        notes=result["notes"],
        figures=compare_table.figures_table(lines, result["set"].get("headline") or ()),
        tests=_tests_tables(result["pairs"]),
        group_tests=_tests_tables(result["group_pairs"]),
        cases=[
            compare_table.cases_table(patients, runs, pairs.METRICS[metric].heading)
            for metric, patients in result["cases"].items()
        ],
        panels=[
            {**facts, "picture": pages.embedded(png)}
            for facts, png in zip(result["panels"], panel_pictures, strict=True)
        ],
        curves=[
            {"over": panels.AXES[name], "picture": pages.embedded(png)}
            for name, png in curves.items()
        ],
        runs=compare_table.runs_table(result["runs"]),
        groups=[
            (name, f"{', '.join(group['members'])}. {group['claim']}")
            for name, group in result["groups"].items()
            if group["num_runs"] > 1
        ],
        meanings=[
            (f"{column.heading} ({column.group.lower()})", column.meaning)
            for column in compare_table.used(lines)
        ],
    )


def _tested(tests: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Without those that had too few patients."""
    return [test for test in tests if test["p"] is not None]


def _tests_tables(tests: Sequence[Mapping[str, Any]]) -> list[tables.Table]:
    """One table per figure, as Holm's correction is."""
    return [
        compare_table.tests_table(same, same[0]["heading"])
        for metric in pairs.METRICS
        if (same := [test for test in _tested(tests) if test["metric"] == metric])
    ]


def _set_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (
            "Volumes",
            f"{facts['num_volumes']}: {facts['num_abnormal']} abnormal "
            f"({facts['num_annotated_abnormal']} with a lesion mask), "
            f"{facts['num_healthy']} healthy",
        ),
        ("Data", str(facts["data_kind"])),
        ("Protocol", ": ".join(filter(None, (facts["protocol"], facts.get("steps"))))),
        ("Fingerprint", f"{facts['fingerprint'][:16]}, the same for every row"),
    ]
