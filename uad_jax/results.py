"""Writes what an evaluation found: JSON, tables, maps, curves, report."""

import csv
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from uad_jax import config as config_lib
from uad_jax import environment, evaluation, figures, report, summary, writer
from uad_jax import workdir as workdir_lib
from uad_jax.data import geometry, nifti
from uad_jax.data.sources import VolumeInfo
from uad_jax.evaluation import GROUP_BY, Context
from uad_jax.metrics import calibration
from uad_jax.scoring import VolumeArrays, VolumeResult


def threshold_rows(
    context: Context, calibrated: calibration.Calibration
) -> list[dict[str, Any]]:
    """The thresholds of the model, with where they come from, for the report."""
    rows = [
        {
            "rule": f"healthy false-positive rate {100 * rate:g} %",
            "value": value,
            "source": f"{calibrated.num_healthy} healthy validation volumes, no labels",
        }
        for rate, value in sorted(calibrated.healthy_fpr.items())
    ]
    value, source = calibrated.validated_or_healthy(
        context.config.evaluation.healthy_fpr
    )
    rows.append({"rule": "validated", "value": value, "source": source})
    return rows


def run_facts(context: Context) -> dict[str, Any]:
    """What was evaluated: config, environment, data, and how far it was trained."""
    config = context.config
    lines = writer.read_metrics(context.workdir)
    return {
        "name": config.name,
        "method": type(config.method).__name__,
        "step": context.step,
        "seed": config.seed,
        "environment": without_folders(environment.describe()),
        "data_fingerprint": context.store.fingerprint,
        "config": without_folders(config_lib.to_dict(config)),
        "training": summary.training_state(config, context.step, lines),
    }


def without_folders(value: Any) -> Any:
    """Cuts absolute paths in plain JSON types down to their last name.

    Results and reports are passed on; the folders of the machine are not.
    """
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    if pathlib.PurePath(value).is_absolute():
        return pathlib.PurePath(value).name
    flags = [flag.partition("=") for flag in value.split(" ")]  # --xla_dump_to=/...
    if not any(pathlib.PurePath(text).is_absolute() for _, _, text in flags):
        return value
    return " ".join(
        name + equals + (without_folders(text) if text else "")
        for name, equals, text in flags
    )


def without_nan(value: Any) -> Any:
    """Makes NaN and infinity None: JSON has neither."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def set_facts(context: Context, found: Sequence[VolumeResult]) -> dict[str, Any]:
    """What it was evaluated on, with counts."""
    abnormal = [result for result in found if result.abnormal]
    return {
        "name": context.name,
        "split": context.evaluation_set.split,
        "protocol": context.evaluation_set.protocol.value,
        "group_by": GROUP_BY,
        "recipe": context.store.recipe.get("name", ""),
        "modalities": context.data.modalities.split(","),
        "data_kind": data_kind(found),
        "licences": sorted({result.info.licence for result in found} - {""}),
        "num_volumes": len(found),
        "num_abnormal": len(abnormal),
        "num_healthy": len(found) - len(abnormal),
        "num_annotated_abnormal": sum(result.annotated for result in abnormal),
    }


def data_kind(found: Sequence[VolumeResult]) -> str:
    """Names the data: synthetic, implanted and real lesions never share a table."""
    kinds = {result.info.extra.get("data", "") for result in found}
    return ", ".join(sorted(kinds - {""})) or "as given"


def write_map(context: Context, info: VolumeInfo, arrays: VolumeArrays) -> None:
    """Writes one anomaly map on the grid of the scan it was made from."""
    folder = context.workdir / "maps" / context.name
    folder.mkdir(parents=True, exist_ok=True)
    inside = map_to_show(arrays)
    native = geometry.to_native(inside, info.geometry)
    nifti.write_map(
        folder / f"{info.subject}_desc-anomaly_map.nii.gz", native, info.geometry
    )


def map_to_show(arrays: VolumeArrays) -> np.ndarray:
    """The map with 0, or its lowest score if that is lower, outside the brain."""
    lowest = min(0.0, float(arrays.anomaly_map.min()))
    return np.where(arrays.eroded, arrays.anomaly_map, lowest).astype(np.float32)


def write(
    context: Context,
    results: dict[str, Any],
    found: dict[str, list[VolumeResult]],
    cases: Sequence[figures.Case],
) -> None:
    """Writes `results/<set>.json`, `results/<set>_subjects.csv` and the report.

    Args:
      context: The evaluation.
      results: The content of the JSON file.
      found: Scorer -> results; the model comes first.
      cases: Subjects to show.
    """
    folder = context.workdir / "results"
    workdir_lib.write_json(folder / f"{context.name}.json", without_nan(results))
    _write_subjects(folder / f"{context.name}_subjects.csv", found)
    drawn = summary.draw_curves(found, writer.read_metrics(context.workdir))
    if cases:
        limit = max(float(np.quantile(case.anomaly_map, 0.998)) for case in cases)
        drawn["cases"] = figures.case_panels(cases, limit)
    own = context.name == evaluation.DEFAULT_SET
    page = "report.html" if own else f"report_{context.name}.html"
    report.write(context.workdir / page, results, drawn)
    logging.info("Report: %s", context.workdir / page)


def _write_subjects(path: pathlib.Path, found: dict[str, list[VolumeResult]]) -> None:
    """One row per subject and scorer."""
    rows = [
        {"scorer": name, **summary.subject_row(result)}
        for name, results in found.items()
        for result in results
    ]
    temporary = path.with_suffix(".csv.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    temporary.replace(path)
