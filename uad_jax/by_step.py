"""Evaluates many checkpoints of a run, also while it trains: `results/by_step.csv`."""

import csv
import fcntl
import hashlib
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging

from uad_jax import (
    calibrating,
    evaluate,
    evaluation,
    report,
    saved_run,
    tables,
    writer,
)
from uad_jax import mesh as mesh_lib
from uad_jax import results as results_lib
from uad_jax import workdir as workdir_lib
from uad_jax.checkpoint import CheckpointError
from uad_jax.config import ExperimentConfig
from uad_jax.evaluation import Context
from uad_jax.saved_run import SavedRun
from uad_jax.scoring import Program

FILE = "by_step.csv"
Row = Mapping[str, Any]


def evaluate_steps(
    config: ExperimentConfig,
    workdir: pathlib.Path,
    *,
    steps: str = "all",
    watch: bool = False,
    poll_seconds: float = 10.0,
    grace_seconds: float = 300.0,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> list[Row]:
    """Evaluates checkpoints one after the other; everything is compiled once.

    Rows that are there already, of the same checkpoint, volumes, protocol and rates,
    are kept, so that it can be stopped and started again. Only the model is scored:
    baselines, pictures and the report belong to `evaluate.evaluate`.

    Args:
      config: The run's config.
      workdir: The run. Gets `results/by_step.csv` and the thresholds of each step;
        nothing else in it is changed.
      steps: "all", or "A:B" for A <= step <= B, either of which may be absent.
      watch: Whether to wait for new checkpoints until the run is finished, or until
        nothing trains in the workdir any more.
      poll_seconds: Time between looks, if it waits.
      grace_seconds: How long nothing may train there: a run that stopped may be
        started again.
      mesh: Devices; None = all.
      progress: Whether to show progress bars.

    Returns:
      All rows of the file: set, step, slices seen, seconds of training, validation
      loss, the figures of the model, and the fingerprint of the set.

    Raises:
      ValueError: If `steps` cannot be read, or names no checkpoint (also when the
        run that is watched has ended).
      checkpoint.CheckpointError: If a checkpoint is damaged.
    """
    first, last = parse(steps)
    evaluation.refuse_several_processes()
    mesh = mesh_lib.make_mesh() if mesh is None else mesh
    with saved_run.opened(config, workdir, mesh) as run:
        compiled = evaluate.program(run, mesh)
        rows = _known_rows(run, mesh)
        watcher = _Watcher(run, last, grace_seconds) if watch else None
        while True:
            waits = watcher is not None and watcher.waits()
            # After that question: what ended the run is then among the steps.
            wanted = [step for step in run.steps() if first <= step <= last]
            if not wanted and not waits:
                raise ValueError(
                    f"No checkpoint of {workdir} is within --steps={steps}; there are "
                    f"{run.steps()}."
                )
            new = [step for step in wanted if not _is_known(config, rows, step)]
            for step in new:
                rows = _add_step(run, step, compiled, mesh, progress, rows)
            if watcher is None or not waits:
                return rows
            if new:
                watcher.saw_life()
            else:
                logging.log_every_n_seconds(
                    logging.INFO,
                    "Waiting for the next checkpoint; Ctrl-C ends it.",
                    600,
                )
                time.sleep(poll_seconds)


class _Watcher:
    """Knows whether a run will make more checkpoints."""

    def __init__(self, run: SavedRun, last: float, grace_seconds: float) -> None:
        self._run = run
        self._last = last
        self._grace_seconds = grace_seconds
        self._alive = time.monotonic()

    def saw_life(self) -> None:
        """Begins the time of grace anew."""
        self._alive = time.monotonic()

    def waits(self) -> bool:
        """False at the end of the run, and aloud when nobody trains any more."""
        steps = self._run.steps()
        if self._run.finished() or (steps and steps[-1] >= self._last):
            return False
        if _trains(self._run.workdir):
            self.saw_life()
        if time.monotonic() - self._alive <= self._grace_seconds:
            return True
        logging.warning(
            "No process has trained in %s for %.3g minutes, and the run is at step %d "
            "of %d: it is not waited for any longer. See why it stopped, start it "
            "again with the same command, and watch it again.",
            self._run.workdir,
            self._grace_seconds / 60,
            steps[-1] if steps else 0,
            self._run.config.total_steps,
        )
        return False


def _trains(workdir: pathlib.Path) -> bool:
    """Whether a process holds the lock of a run; True where that cannot be known."""
    try:
        with (workdir / workdir_lib.LOCK).open("rb") as file:
            if not file.read(1):
                return False  # emptied on the way out
            # Held for an instant only, and only while the note of another is there.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except OSError:  # it is held, or the file system has no locks
        return True


def render(rows: Sequence[Row]) -> str:
    """The main columns for the terminal, a table per protocol."""
    protocols = list(dict.fromkeys(row.get("protocol", "") for row in rows))
    parts = []
    for protocol in protocols:
        same = [row for row in rows if row.get("protocol", "") == protocol]
        parts.append(f"Protocol {protocol or 'not stated'}\n{_table(same)}")
    return "\n\n".join(parts)


def _table(rows: Sequence[Row]) -> str:
    columns = ("set", "step", "validation_loss", "ap_pooled", "ap_volume_mean")
    cells = [
        [
            str(row[name])
            if name in ("set", "step")
            else tables.number(
                None if row.get(name) in (None, "") else float(row[name])
            )
            for name in columns
        ]
        for row in rows
    ]
    return report.text_table(columns, cells)


def parse(steps: str) -> tuple[float, float]:
    """Reads "all" or "A:B" as the first and the last step, both included.

    Raises:
      ValueError: If it is neither.
    """
    if steps == "all":
        return 0, math.inf
    first, colon, last = steps.partition(":")
    digits = all(not part or part.isdecimal() for part in (first, last))
    if not colon or not digits:
        raise ValueError(
            f"--steps={steps} is neither 'all' nor 'A:B', such as 1000:5000."
        )
    return int(first or 0), int(last) if last else math.inf


def _known_rows(run: SavedRun, mesh: jax.sharding.Mesh) -> list[Row]:
    """The rows of an earlier start that still hold."""
    rows = _read(run.workdir / "results" / FILE)
    there = {step: run.identity(step) for step in run.steps()}
    valid = {
        (context.name, step): _key(context)
        for step, identity in there.items()
        for context in evaluation.contexts(
            run.config, run.workdir, step, mesh, False, identity
        )
    }
    kept = []
    for row in rows:
        place = (row["set"], row["step"])
        gone = row["step"] not in there  # deleted since: nothing contradicts it
        if gone or valid.get(place) == row["evaluation"]:
            kept.append(row)
    if len(kept) < len(rows):
        logging.warning(
            "%d of %d rows of %s are of other checkpoints, volumes or rules and are "
            "evaluated again.",
            len(rows) - len(kept),
            len(rows),
            FILE,
        )
    return kept


def _read(path: pathlib.Path) -> list[Row]:
    """The rows of the file; none, with a warning, if it is damaged."""
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                {**row, "step": int(row["step"]), "set": row["set"]}
                | {"evaluation": row["evaluation"]}
                for row in csv.DictReader(file)
            ]
    except (KeyError, ValueError, TypeError) as error:
        logging.warning("%s is damaged (%s) and is made anew.", path, error)
        return []


def _key(context: Context) -> str:
    """Identifies what a row was made of: checkpoint, volumes, protocol, thresholds."""
    parts = [
        context.fingerprint(context.test),
        context.data.modalities,
        context.evaluation_set.threshold_from.value,
        *calibrating.origin(context).values(),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _is_known(config: ExperimentConfig, rows: Sequence[Row], step: int) -> bool:
    known = {row["set"] for row in rows if row["step"] == step}
    return known >= set(evaluation.sets(config))


def _add_step(
    run: SavedRun,
    step: int,
    compiled: Program,
    mesh: jax.sharding.Mesh,
    progress: bool,
    rows: list[Row],
) -> list[Row]:
    """Evaluates one checkpoint and writes the file once more."""
    try:
        identity = run.identity(step)
        scorer = evaluate.model_scorer(run, step, compiled)
    except CheckpointError:
        if step in run.steps():
            raise
        logging.warning(
            "The run deleted step %d before it was evaluated: train.keep_every or "
            "train.keep_checkpoints would keep it.",
            step,
        )
        return rows
    new = []
    for context in evaluation.contexts(
        run.config, run.workdir, step, mesh, progress, identity
    ):
        logging.info("Evaluating step %d on %s.", step, context.name)
        results = evaluate.evaluate_set(context, scorer(context), alone=True)
        new.append(_row(context, results))
    names = {row["set"] for row in new}
    rows = [r for r in rows if r["step"] != step or r["set"] not in names] + new
    rows.sort(key=lambda row: (row["set"], row["step"]))
    results_lib.write_table(run.workdir / "results" / FILE, rows)
    return rows


def _row(context: Context, results: Mapping[str, Any]) -> Row:
    training = results["run"]["training"] or {}  # of imported weights nothing is known
    losses = [
        line["validation/loss"]
        for line in writer.read_metrics(context.workdir)
        if "validation/loss" in line and line["step"] <= context.step
    ]
    figures = {
        name: value
        for name, value in results["scorers"][context.scorer].items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    return {
        "set": context.name,
        "step": context.step,
        "protocol": context.evaluation_set.protocol.value,
        "slices_seen": training.get("slices_seen", ""),
        "train_seconds": training.get("train_seconds", ""),
        "validation_loss": losses[-1] if losses else "",
        **figures,
        "fingerprint": results["set"]["fingerprint"],
        "evaluation": _key(context),
    }
