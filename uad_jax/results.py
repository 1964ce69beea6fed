"""Writes what an evaluation found: JSON, tables, maps, curves, report."""

import csv
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from uad_jax import config as config_lib
from uad_jax import environment, evaluation, report, summary, training_state, writer
from uad_jax import workdir as workdir_lib
from uad_jax.calibrating import Calibrations
from uad_jax.data import geometry
from uad_jax.data.sources import VolumeInfo
from uad_jax.evaluation import GROUP_BY, Context
from uad_jax.measuring import VolumeResult
from uad_jax.metrics import protocols
from uad_jax.metrics.calibration import Calibration
from uad_jax.scoring import Stage


def threshold_rows(
    context: Context, calibrations: Calibrations, scorer: str
) -> list[dict[str, Any]]:
    """The thresholds of a scorer, with where they come from, for the report."""
    calibrated = calibrations.get((scorer, Stage.PROCESSED))
    if calibrated is None:
        return []
    rows = [
        {
            "rule": f"healthy false-positive rate {100 * rate:g} %",
            "value": value,
            "source": f"{calibrated.num_healthy} healthy validation volumes, no labels",
        }
        for rate, value in sorted(calibrated.healthy_fpr.items())
    ]
    if calibrated.validated is not None:
        count = calibrated.num_abnormal
        source = f"best pooled Dice on {count} abnormal validation scans"
        rows.append(
            {"rule": "validated", "value": calibrated.validated, "source": source}
        )
    return rows


def run_facts(context: Context) -> dict[str, Any]:
    """What was evaluated: config, environment, data, and how far it was trained."""
    config = context.config
    facts: dict[str, Any] = {
        "name": context.scorer,
        "source": "maps",
        "method": "maps made elsewhere",
        "step": context.step,
        "seed": None,
        "environment": without_folders(environment.describe()),
        "data_fingerprint": context.store.fingerprint,
        "config": None,
        "training": None,
    }
    if config is None or context.step is None:
        return {**facts, **context.facts}
    lines = writer.read_metrics(context.workdir)
    imported = workdir_lib.imported(context.workdir, context.step)
    state = training_state.training_state(config, context.step, lines)
    return facts | {
        "source": "checkpoint",
        "method": type(config.method).__name__,
        "seed": config.seed,
        "config": without_folders(config_lib.to_dict(config)),
        "imported": imported,
        "tv_weight": _tv_weight(context.workdir),
        "training": None if imported else state,  # nobody knows how it was trained
    }


def _tv_weight(workdir: pathlib.Path) -> Any:
    """How the weight of a restoration was chosen, where it was; else None."""
    path = workdir / workdir_lib.TV_WEIGHT
    return workdir_lib.read_json(path) if path.is_file() else None


def staged_segmentations(context: Context) -> pathlib.Path:
    """Where segmentations wait until the whole evaluation is done."""
    return context.workdir / "results" / f".{context.name}_found.npz"


def segmentation_facts(
    context: Context, infos: Sequence[VolumeInfo], operating: Mapping[str, Any]
) -> dict[str, str]:
    """What a reader of the segmentations needs; the store's folder is this machine's.

    Args:
      context: The evaluation.
      infos: The volumes.
      operating: Rule and threshold.
    """
    return {
        "store": str(context.store.path.absolute()),
        "split": context.evaluation_set.split,
        "modalities": context.data.modalities,
        "rule": str(operating["rule"]),
        "threshold": repr(operating["threshold"]),
        "fingerprint": context.fingerprint(infos),
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
        **_protocol_facts(context, found),
        "group_by": GROUP_BY,
        "recipe": context.store.recipe.get("name", ""),
        "modalities": context.data.modalities.split(","),
        "data_kind": data_kind(found),
        "licences": sorted({result.info.licence for result in found} - {""}),
        "num_volumes": len(found),
        "num_abnormal": len(abnormal),
        "num_healthy": sum(result.healthy for result in found),
        "num_sham": sum(result.sham for result in found),
        "num_annotated_abnormal": sum(result.annotated for result in abnormal),
        "num_patients": len({result.info.patient for result in found}),
        "fingerprint": context.fingerprint([result.info for result in found]),
        "voxel_ml": found[0].voxel_ml,
        **_prevalence([result for result in found if result.has_lesion]),
    }


def _protocol_facts(context: Context, found: Sequence[VolumeResult]) -> dict[str, Any]:
    """The protocol, what it does on this grid, and the figures that lead with it."""
    protocol = context.evaluation_set.protocol
    steps = protocols.steps(protocol)
    where = found[0].info.geometry
    edges = geometry.spacing(where.native_affine @ where.grid_to_native)
    _, height, width, _ = context.store.grid
    note = ""
    if steps.keep_positive and not found[0].reconstruction:
        note = (
            f"{context.scorer} gives no reconstruction, so the protocol "
            f"{protocol.value} takes its map as it is. It should score only what is "
            "brighter than expected, as the positive residual does."
        )
        logging.warning("Set %s: %s", context.name, note)
    return {
        "protocol": protocol.value,
        "steps": protocols.describe(protocol, height, width, (edges[0], edges[1])),
        "headline": list(steps.headline),
        "protocol_note": note,
    }


def _prevalence(lesions: Sequence[VolumeResult]) -> dict[str, float | None]:
    """Share of lesion among the brain voxels of volumes with a lesion mask.

    It is the AP of a constant map without erosion: what the baseline of that name has
    is more where the protocol erodes. Lesion outside the brain mask counts as brain.
    """
    if not lesions:
        return {"prevalence_pooled": None, "prevalence_volume_mean": None}
    lesion = np.array([one.lesion_voxels for one in lesions])
    brain = np.array([_num_voxels(one) for one in lesions])
    return {
        "prevalence_pooled": float(lesion.sum() / brain.sum()),
        "prevalence_volume_mean": float(np.mean(lesion / brain)),
    }


def _num_voxels(result: VolumeResult) -> int:
    """Voxels that count, from the scores or from their histogram."""
    if result.voxels is not None:
        scored = len(result.voxels.scores)
    else:
        scored = 0 if result.bins is None else int(result.bins.sum())
    return scored + int(result.outside.sum())


def data_kind(found: Sequence[VolumeResult]) -> str:
    """Names the data: synthetic, implanted and real lesions never share a table."""
    kinds = {result.info.extra.get("data", "") for result in found}
    return ", ".join(sorted(kinds - {""})) or "as given"


def write(
    context: Context,
    results: dict[str, Any],
    found: Mapping[Stage, summary.Results],
    calibrated: Calibration | None,
    drawn: Mapping[str, bytes],
) -> None:
    """Writes `results/<set>.json`, `results/<set>_subjects.csv` and the report.

    The JSON file is there only while all others are of the same evaluation.

    Args:
      context: The evaluation.
      results: The content of the JSON file.
      found: Stage -> scorer -> results; what is evaluated comes first.
      calibrated: Calibration of what is evaluated, for percentiles.
      drawn: Figure -> PNG.
    """
    folder = context.workdir / "results"
    summary_path = folder / f"{context.name}.json"
    summary_path.unlink(missing_ok=True)  # from here on the files are of two kinds
    staged = staged_segmentations(context)
    if staged.exists():
        staged.replace(folder / f"{context.name}_found.npz")
    else:
        (folder / f"{context.name}_found.npz").unlink(missing_ok=True)
    rows = subject_rows(found[Stage.PROCESSED], context.scorer, calibrated)
    write_table(folder / f"{context.name}_subjects.csv", rows)
    workdir_lib.write_json(summary_path, without_nan(results))
    own = context.name == evaluation.DEFAULT_SET
    page = "report.html" if own else f"report_{context.name}.html"
    own_rows = [row for row in rows if row["scorer"] == context.scorer]
    report.write(context.workdir / page, results, drawn, subjects=own_rows)
    logging.info("Report: %s", context.workdir / page)


def subject_rows(
    found: summary.Results, scorer: str, calibrated: Calibration | None
) -> list[dict[str, Any]]:
    """One row per scorer and subject; percentiles of what is evaluated only."""
    rows = []
    for name, results in found.items():
        scores: Sequence[float] = ()
        if name == scorer and calibrated is not None:
            scores = calibrated.healthy_volume_scores
        rows += [
            {"scorer": name, **summary.subject_row(one, scores)} for one in results
        ]
    return rows


def read_subjects(
    workdir: pathlib.Path, name: str, scorer: str
) -> Sequence[Mapping[str, Any]]:
    """Reads the rows of one scorer from `results/<set>_subjects.csv`."""
    path = workdir / "results" / f"{name}_subjects.csv"
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["scorer"] == scorer]


def write_table(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as CSV, atomically; a field that a row lacks stays empty."""
    fields = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, fieldnames=fields, restval="")
        table.writeheader()
        table.writerows(rows)
    temporary.replace(path)
