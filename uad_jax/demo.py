"""The whole way on the embedded cohort: make, prepare, train, evaluate, report."""

import dataclasses
import pathlib
import time
from typing import Any

from absl import logging

from uad_jax import environment, evaluate, prepare, report, train
from uad_jax import workdir as workdir_lib
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
    results = _found_before(run)
    if results is None:
        (results,) = evaluate.evaluate(config, run).values()
    else:
        logging.info("%s is evaluated: nothing left to do.", run)
    print("\n" + report.summary(results))
    seconds = time.monotonic() - start
    print(f"\nReport: {run / 'report.html'}")
    print(f"Anomaly maps (NIfTI): {run / 'maps'}")
    print(f"For research only, not a medical device. {seconds:.0f} s in all.")
    logging.flush()
    return 0


def _found_before(run: pathlib.Path) -> dict[str, Any] | None:
    """Results of an earlier start, unless training or code went on since."""
    page = run / "report.html"  # an evaluation writes it last
    metrics = run / "metrics.jsonl"
    if not page.is_file() or page.stat().st_mtime < metrics.stat().st_mtime:
        return None
    results = workdir_lib.read_json(run / "results" / "test.json")
    commit = environment.commit()
    same = results["run"]["environment"]["commit"] == commit
    return results if same and not commit.endswith("+changes") else None


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)
