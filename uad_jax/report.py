"""One self-contained HTML page: tables, curves, pictures, provenance."""

import json
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from uad_jax import breakdowns, pages, tables, verdict
from uad_jax.tables import Table

_TOP = 5  # of a ranking, on the terminal
_FINGERPRINT = 16  # hexadecimal digits shown
_CURVES = ("roc", "precision_recall", "dice")
_POOLED = {
    "exact": "exact: all voxels of the lesion volumes sorted together",
    "histogram": "from histograms of the scores, as the set is too large to sort in "
    "memory: approximate",
}


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


def summary(
    results: Mapping[str, Any], subjects: Sequence[Mapping[str, Any]] = ()
) -> str:
    """The results of one set for the terminal: the main columns and the verdict.

    Args:
      results: What `evaluate.evaluate` returns for one set, or its JSON file holds.
      subjects: Rows of the per-subject CSV, of the model; without lesion masks the
        highest-scoring ones are listed.
    """
    scorers = _model_first(results)["scorers"]
    rule = (results.get("operating") or {}).get("rule") or "healthy_fpr"
    wanted = ["ap_pooled", "ap_volume_mean", f"dice_{rule}_volume_mean"]
    leading = _headline(results)
    wanted = tables.led_by(leading, dict.fromkeys([*wanted, *leading]), str)
    if not _has_voxel_figures(results):
        wanted = ["volume_auroc"]
    columns = {key: heading for key, heading, _ in tables.used_columns(scorers)}
    keys = [key for key in wanted if key in columns]
    parts = []
    if _from_maps(results):
        parts.append("Maps made by another tool, scored here.")
    if keys:
        rows = [
            [name, *(tables.number(metrics.get(key)) for key in keys)]
            for name, metrics in scorers.items()
        ]
        table = text_table(["", *(columns[key] for key in keys)], rows)
        parts.append(f"Protocol {results['set']['protocol']}\n{table}")
    if subjects and not _has_voxel_figures(results):
        ranking = breakdowns.ranking(subjects)
        assert ranking is not None
        header = [heading for heading, _ in ranking.head]
        parts.append(text_table(header, ranking.rows[:_TOP]))
    parts.append(textwrap.fill(_verdict(results), 80))
    parts += [textwrap.fill(f"{name}: {text}", 80) for name, text in _remarks(results)]
    return "\n\n".join(parts)


def write(
    path: pathlib.Path,
    results: Mapping[str, Any],
    figures: Mapping[str, bytes],
    *,
    subjects: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Writes the report.

    Args:
      path: The HTML file.
      results: What `evaluate.evaluate` returns for one set.
      figures: Name -> PNG bytes, embedded in the page: "cases", "gallery",
        "volume_scores", "training", "roc", "precision_recall", "dice"; any of them
        may be absent.
      subjects: Rows of the per-subject CSV, of the model.
    """
    pages.write(
        path,
        "report.html.j2",
        **_content(_model_first(results), subjects),
        has_curves=any(name in figures for name in _CURVES),
        figures={name: pages.embedded(png) for name, png in figures.items()},
    )


def _content(
    results: Mapping[str, Any], subjects: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Everything the template shows but the figures."""
    facts, run = results["set"], results["run"]
    rule = (results.get("operating") or {}).get("rule")
    has_voxels = _has_voxel_figures(results)
    found: dict[str, Table | None] = {
        "detection": tables.detection(
            results["scorers"], _caption(results), _headline(results)
        ),
        "operating": tables.operating_points(results),
        "size": breakdowns.by_lesion_size(results),
        "load": breakdowns.by_load(results),
        "groups": breakdowns.groups(results),
        "sham": breakdowns.sham(results),
        "cases": breakdowns.cases(results),
        "subjects": breakdowns.subjects(subjects, rule) if has_voxels else None,
        "ranking": None if has_voxels else breakdowns.ranking(subjects),
        "unprocessed": tables.detection(
            results.get("unprocessed") or {},
            "The same scores as they come, each at thresholds of its own.",
            _headline(results),
        ),
        "reconstruction": breakdowns.reconstruction(results),
        "thresholds": _thresholds(results),
    }
    groups = [
        tables.detection(
            scorers, f"{name}, with all healthy volumes.", _headline(results)
        )
        for name, scorers in (results.get("groups") or {}).items()
    ]
    shown = (results["scorers"], results.get("unprocessed") or {})
    return {
        "title": run["name"],
        "set_name": facts["name"],
        "facts": _facts(results),
        "from_maps": _from_maps(results),
        "automatic_truth": "automatic" in str(facts.get("data_kind", "")).lower(),
        "undertrained": bool((run.get("training") or {}).get("undertrained")),
        "has_voxels": has_voxels,
        "verdict": _verdict(results),
        "prevalence": _prevalence(results),
        "tables": {key: table for key, table in found.items() if table is not None},
        "groups": [table for table in groups if table is not None],
        "old_false_positives": _old_false_positives(results),
        "meanings": [column[1:] for column in tables.used_columns(*shown)],
        "counts": {key: n for key, n in (results.get("counts") or {}).items() if n},
        "training": _training(run.get("training") or {}),
        "provenance": _provenance(results),
        "environment": json.dumps(run["environment"], indent=2, ensure_ascii=False),
        "config": json.dumps(run["config"], indent=2, ensure_ascii=False)
        if run.get("config")
        else "",
    }


def _model_first(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results read from a file have their scorers sorted by name."""
    model = results["run"]["name"]
    return {
        **results,
        **{
            key: dict(sorted(results[key].items(), key=lambda item: item[0] != model))
            for key in ("scorers", "unprocessed")
            if results.get(key)
        },
        "groups": {
            group: dict(sorted(scorers.items(), key=lambda item: item[0] != model))
            for group, scorers in (results.get("groups") or {}).items()
        },
    }


def _model(results: Mapping[str, Any]) -> Mapping[str, Any]:
    return results["scorers"][results["run"]["name"]]


def _from_maps(results: Mapping[str, Any]) -> bool:
    return results["run"].get("source") == "maps"


def _has_voxel_figures(results: Mapping[str, Any]) -> bool:
    """Whether there are lesion masks to hold voxels against."""
    return any(
        tables.exists(_model(results).get(key))
        for key in ("ap_pooled", "ap_volume_mean")
    )


def _verdict(results: Mapping[str, Any]) -> str:
    missing = results.get("missing_baselines") or {}
    return verdict.with_missing(results["verdict"], missing)


def _remarks(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reader must know of baselines and operating threshold, if anything."""
    missing = results.get("missing_baselines") or {}
    found = [
        ("Missing baselines", "; ".join(f"{n}: {why}" for n, why in missing.items())),
        ("Operating threshold", (results.get("operating") or {}).get("note") or ""),
        ("Protocol", results["set"].get("protocol_note") or ""),
    ]
    return [(name, text) for name, text in found if text]


def _prevalence(results: Mapping[str, Any]) -> str:
    share = _model(results).get("prevalence_pooled")
    return f"{share:.4f}" if tables.exists(share) else ""


def _old_false_positives(results: Mapping[str, Any]) -> str:
    """Voxels on a healthy scan, of results without the figures in millilitres."""
    count = _model(results).get("false_positive_voxels_healthy_fpr_healthy_mean")
    return tables.number(count, 0) if tables.exists(count) else ""


def _caption(results: Mapping[str, Any]) -> str:
    text = f"First {results['run']['name']}"
    if len(results["scorers"]) > 1:
        text += ", then baselines that learn nothing or only means"
    columns = [(key, heading) for key, heading, _ in tables.COLUMNS]
    return f"{text}. {tables.interval_note(_model(results), columns)}".rstrip()


def _facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was evaluated on what, for the head of the page."""
    run, facts = results["run"], results["set"]
    model = run["method"]
    if run.get("step") is not None:
        model += f", checkpoint of step {run['step']:,}"
    if run.get("seed") is not None:
        model += f", seed {run['seed']}"
    rows = [
        ("Method", model),
        ("Data", facts["data_kind"]),
        ("Volumes", _volumes(facts)),
        ("Modalities", ", ".join(facts["modalities"])),
        ("Post-processing", ": ".join(_post_processing(facts))),
    ]
    if _has_voxel_figures(results) and results.get("pooled"):
        rows.append(("Pooled figures", _POOLED[results["pooled"]]))
    lost = _model(results).get("out_of_reach_percent_pooled")
    if tables.exists(lost):
        best = _model(results)["dice_reachable_pooled"]
        rows.append(
            (
                "Out of reach",
                f"{lost:.1f} % of the lesion voxels lie outside the eroded brain mask; "
                f"a perfect map would have a pooled Dice of {best:.3f}",
            )
        )
    return rows + _remarks(results)


def _headline(results: Mapping[str, Any]) -> Sequence[str]:
    """Keys of the figures that the protocol puts first; none in older results."""
    return results["set"].get("headline") or ()


def _post_processing(facts: Mapping[str, Any]) -> list[str]:
    """The protocol and, if the results say them, its steps on this grid."""
    steps = facts.get("steps")
    return [f"protocol {facts['protocol']}", *([steps] if steps else [])]


def _volumes(facts: Mapping[str, Any]) -> str:
    kinds = [
        (facts["num_abnormal"], "abnormal"),
        (facts["num_healthy"], "healthy"),
        (facts.get("num_sham", 0), "sham implants"),
    ]
    text = f"{facts['num_volumes']:,}"
    if facts.get("num_patients"):
        text += f" of {facts['num_patients']:,} patients"
    text += ": " + ", ".join(f"{count:,} {kind}" for count, kind in kinds if count)
    if facts["num_abnormal"]:
        masks = facts["num_annotated_abnormal"]
        text += f"; lesion masks of {masks:,}" if masks else "; no lesion masks"
    return text


def _thresholds(results: Mapping[str, Any]) -> Table | None:
    rows = [
        [row["rule"], tables.significant(row["value"]), row["source"]]
        for row in results.get("thresholds") or ()
    ]
    if not rows:
        return None
    head = [("Rule", ""), ("Threshold", "a finding scores above it"), ("Chosen on", "")]
    caption = "A voxel is found if its score lies above the threshold."
    return Table(caption, head, rows, words=(2,))


def _training(state: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How far the model was trained; empty for maps made elsewhere."""
    if not state:
        return []
    rows = [("Slices seen", f"{state['slices_seen']:,}")]
    share = state.get("percent_of_reference")
    if tables.exists(share):
        rows.append(("Share of the paper's budget", f"{tables.number(share, 1)} %"))
    if tables.exists(state.get("train_seconds")):
        rows.append(("Training", f"{state['train_seconds']:,.0f} s"))
    if tables.exists(state.get("validation_slope")):
        slope = f"{state['validation_slope']:+.3f}"
        rows.append(("Change of the validation loss over the last fifth", slope))
    return rows


def _provenance(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    run, facts = results["run"], results["set"]
    environment = run["environment"]
    rows = [
        ("uad_jax", f"{environment['uad_jax']}, commit {environment['commit']}"),
        ("Device", _device(environment)),
        ("Data fingerprint", str(run["data_fingerprint"])[:_FINGERPRINT]),
        ("Set fingerprint", str(facts.get("fingerprint") or "")[:_FINGERPRINT]),
        ("Split", facts.get("split") or ""),
        ("Recipe", facts.get("recipe") or ""),
    ]
    seconds = ", ".join(
        f"{name} {value} s" for name, value in (run.get("timings") or {}).items()
    )
    if run.get("evaluation_seconds") is not None:
        whole = f"{run['evaluation_seconds']} s"
        rows.append(("Evaluated in", f"{whole} ({seconds})" if seconds else whole))
    licences = "; ".join(facts.get("licences") or ()) or "not stated"
    rows.append(("Data licences", licences))
    if run.get("imported"):
        weights = run["imported"]
        short = weights["sha256"][:_FINGERPRINT]
        rows.append(("Weights", f"imported from {weights['file']} (SHA-256 {short})"))
        rows.append(("Source of the weights", weights["note"] or "not stated"))
    if run.get("tv_weight"):
        rows.append(("Weight of the total variation", _tv_weight(run["tv_weight"])))
    return [row for row in rows if row[1]]


def _tv_weight(found: Mapping[str, Any]) -> str:
    pairs = zip(found["candidates"], found["mean_changes"], strict=True)
    figures = ", ".join(f"{weight:g}: {change:.5f}" for weight, change in pairs)
    return (
        f"{found['weight']:g}, with which {found['scans']} healthy validation scans "
        f"change least (mean change of a brain voxel with {figures})"
    )


def _device(environment: Mapping[str, Any]) -> str:
    if "device_kind" not in environment:
        return ""
    return f"{environment.get('num_devices', 1)} x {environment['device_kind']}"
