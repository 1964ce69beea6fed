"""The whole way on the embedded cohort: make, prepare, train, evaluate, report."""

import dataclasses
import pathlib
import time
from typing import Any

from absl import logging

from uad_jax import evaluate, prepare, report, train
from uad_jax.config import ExperimentConfig
from uad_jax.data import cohort

MODALITY = "flair"
_RECIPE = "grid2mm"


def cohort_config(quick: bool) -> cohort.CohortConfig:
    """The demo's cohort: one modality, small enough for minutes on two cores."""
    if quick:
        return cohort.CohortConfig(
            modalities=MODALITY,
            train=8,
            val_healthy=2,
            val_per_kind=1,
            test_healthy=2,
            test_per_kind=2,
        )
    return cohort.CohortConfig(
        modalities=MODALITY,
        train=48,
        val_healthy=5,
        val_per_kind=2,
        test_healthy=5,
        test_per_kind=7,
    )


def demo(config: ExperimentConfig, workdir: pathlib.Path, *, quick: bool) -> int:
    """Runs the demo; what an earlier start finished is not done again.

    Args:
      config: The experiment; its store is set here.
      workdir: Gets `cohort/` (NIfTI and manifest), `store/`, and `run/` with
        checkpoints, maps and report.
      quick: A smaller cohort.

    Returns:
      Exit status: 0, or that of a training which a signal (Ctrl-C) stopped.
    """
    start = time.monotonic()
    run = workdir / "run"
    _say(f"1/4 Making brains that never were ({MODALITY.upper()})")
    manifest = cohort.write_cohort(cohort_config(quick), workdir / "cohort")
    _say("2/4 Preparing slices")
    prepare.prepare(str(manifest), workdir / "store", _RECIPE)
    config.data = dataclasses.replace(config.data, store=str(workdir / "store"))
    config.evaluation.export_maps = True
    _say("3/4 Training on healthy brains only")
    if train.train(config, run).stopped == "preempted":
        return train.EXIT_PREEMPTED
    _say("4/4 Looking for lesions in brains it has never seen")
    results = evaluate.evaluate(config, run)
    _print_table(next(iter(results.values())))
    seconds = time.monotonic() - start
    print(f"\nReport: {run / 'report.html'}")
    print(f"Anomaly maps (NIfTI): {run / 'maps'}")
    print(f"For research only, not a medical device. {seconds:.0f} s in all.")
    logging.flush()
    return 0


def _print_table(results: dict[str, Any]) -> None:
    keys = ("ap_pooled", "ap_volume_mean", "dice_healthy_fpr_volume_mean")
    headings = {key: heading for key, heading, _ in report.COLUMNS}
    header = ["", *(headings[key] for key in keys)]
    rows = [
        [name, *(report.number(metrics.get(key)) for key in keys)]
        for name, metrics in results["scorers"].items()
    ]
    print("\n" + report.text_table(header, rows))


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)
