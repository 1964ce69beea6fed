"""The steady state of training: step, settle, validate, save."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from uad_jax import alarms, distributed, divergence, programs, signals
from uad_jax import checkpoint as checkpoint_lib
from uad_jax import progress as progress_lib
from uad_jax import writer as writer_lib
from uad_jax.config import ExperimentConfig, Selection
from uad_jax.data import pipeline
from uad_jax.types import Batch, Scalars, TrainState

NAN_DUMP = "nan_dump"

# Validation noise is the same at every step and in every run, so that losses compare.
_VALIDATION_SEED = 0


class TrainResult(NamedTuple):
    """How a call of `train` ended.

    Attributes:
      step: Finished optimiser steps.
      stopped: "done", "preempted" (by a signal; start again to go on) or "patience".
      summary: Best step and loss, validations since then, seconds of training.
    """

    step: int
    stopped: str
    summary: dict[str, float]


@dataclasses.dataclass
class Record:
    """What the loop remembers beside the train state; saved with each checkpoint.

    Attributes:
      best_loss: Lowest validation loss; NaN never is.
      best_step: Its step, 0 before the first.
      since_best: Validations since then.
      train_seconds: Seconds of training so far.
    """

    best_loss: float = math.inf
    best_step: int = 0
    since_best: int = 0
    train_seconds: float = 0.0

    @classmethod
    def saved(cls, metrics: Mapping[str, float]) -> "Record":
        """Reads the record that was saved with a checkpoint."""
        record = cls()
        for field in dataclasses.fields(cls):
            if field.name in metrics:
                value = metrics[field.name]
                setattr(record, field.name, type(getattr(record, field.name))(value))
        return record

    def validated(self, step: int, loss: float) -> bool:
        """Takes one validation loss; True if it is the best."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.since_best = loss, step, 0
            return True
        self.since_best += 1
        return False

    def out_of_patience(self, patience: int) -> bool:
        """Whether there were `patience` validations without a better loss."""
        return 0 < patience <= self.since_best

    def result(self, step: int, stopped: str) -> TrainResult:
        """What `train` returns."""
        return TrainResult(step, stopped, dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What stays the same while the loop runs.

    Attributes:
      config: The experiment.
      workdir: Directory of the run.
      mesh: The data mesh.
      stream: The training batches.
      validation: The validation batches of a step, on the mesh; may be empty.
      programs: The compiled programs.
      checkpoints: Where checkpoints go.
      watch: Where the time goes.
      evaluate: Called with the step of a complete checkpoint, every
        `train.evaluate_every` steps; what it returns is written as "eval/NAME".
    """

    config: ExperimentConfig
    workdir: pathlib.Path
    mesh: Mesh
    stream: pipeline.TrainStream
    validation: Callable[[int], Sequence[Batch]]
    programs: programs.Programs
    checkpoints: checkpoint_lib.Checkpoints
    watch: progress_lib.Stopwatch
    evaluate: Callable[[int], Mapping[str, float]] | None = None


def loop(
    run: Run,
    state: TrainState,
    start: int,
    record: Record,
    stop: signals.StopSignal,
    show: bool,
) -> TrainResult:
    """Trains from step `start` to the end, a signal, or the end of the patience.

    The scalars of a call are fetched after the next call was dispatched, so that the
    device never waits for the host; before a validation or a save they are fetched at
    once, so that no checkpoint precedes the proof that its step was finite.
    """
    every, total = run.config.train, run.config.total_steps
    run.watch.start(record.train_seconds)
    stride = run.programs.steps_per_call
    key = programs.run_key(run.config.seed, run.mesh)
    stack = stride if stride > 1 else None
    step, stopped = start, "done"
    with (
        run.stream.batches(start, stack=stack) as batches,
        Reporter(run, start, show) as reporter,
    ):
        while step < total:
            with jax.transfer_guard("disallow"):
                with run.watch.wait():
                    batch = next(batches)
                state, scalars = run.programs.update(state, batch, key)
                del batch
                step += stride
                reporter.take(step, scalars, state)
            if _asked_to_stop(stop, step, every.log_every):
                stopped = "preempted"
            validate = step % every.eval_every == 0 or step >= total
            evaluate = _evaluation_due(run, step)
            save = evaluate or step % every.save_every == 0 or step >= total
            if not (validate or save or stopped == "preempted"):
                continue
            reporter.settle(state)
            losses: dict[str, float] = {}
            if validate and run.programs.validate is not None:
                losses = _validate(run, state, step)
                reporter.validated(step, losses)
                save |= record.validated(step, losses["loss"])
            if record.out_of_patience(every.patience):
                stopped = "patience"
            if save or stopped != "done":
                _save(run, step, state, losses, record)
            if evaluate and stopped == "done":
                reporter.evaluated(step, _evaluate(run, step))
            if stopped != "done":
                break
        run.checkpoints.wait()
    if step >= total:
        return record.result(step, "done")
    if stopped == "preempted":
        logging.warning(
            "%s: saved step %d of %d. Start the same command again to go on.",
            stop.received or "A signal to another process",
            step,
            total,
        )
    return record.result(step, stopped)


def _evaluation_due(run: Run, step: int) -> bool:
    every = run.config.train.evaluate_every
    return run.evaluate is not None and every > 0 and step % every == 0


def _evaluate(run: Run, step: int) -> Mapping[str, float]:
    """Evaluates the checkpoint just saved, from disk, as it is done offline."""
    assert run.evaluate is not None
    with run.watch.charge("eval"):
        run.checkpoints.wait()
        return run.evaluate(step)


def _asked_to_stop(stop: signals.StopSignal, step: int, log_every: int) -> bool:
    """Whether a signal came. Several processes ask each other at log steps only."""
    if jax.process_count() > 1 and step % log_every:
        return False
    return distributed.any_process(stop.received is not None)


def _validate(run: Run, state: TrainState, step: int) -> dict[str, float]:
    """Means over the valid rows of the validation set."""
    assert run.programs.validate is not None
    with run.watch.charge("eval"):
        key = programs.run_key(_VALIDATION_SEED, run.mesh)
        if run.config.train.selection is Selection.REFERENCE:
            key = jax.random.fold_in(key, step)
        batches = run.validation(step)
        parts = [run.programs.validate(state, batch, key) for batch in batches]
        fetched = jax.device_get(parts)
    counts = np.array([count for _, count in fetched], np.float64)
    return {
        name: float(
            np.average([scalars[name] for scalars, _ in fetched], weights=counts)
        )
        for name in fetched[0][0]
    }


def _save(
    run: Run, step: int, state: TrainState, losses: dict[str, float], record: Record
) -> None:
    with run.watch.charge("save"):
        record.train_seconds = run.watch.train
        metrics = {**dataclasses.asdict(record), **losses}
        finite = {k: v for k, v in metrics.items() if math.isfinite(v)}
        run.checkpoints.save(step, state, metrics=finite)


class Reporter:
    """Takes the scalars of each call, one call late; writes, shows, and stops NaN."""

    def __init__(self, run: Run, start: int, show: bool) -> None:
        config = run.config
        rows = run.stream.spec().valid.size  # slices, also where rows are slabs
        self._run = run
        self._flops = run.programs.cost.flops / rows
        self._meter = progress_lib.Meter(run.watch, rows)
        self._writer = writer_lib.MetricWriter(run.workdir, resume_step=start)
        shown = show and distributed.is_main()
        self._bar = progress_lib.Bar(config.total_steps, start, shown)
        self._alarms = alarms.Watch()
        self._pending: tuple[int, Scalars] | None = None

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.close()
        self._writer.close()

    def take(self, step: int, scalars: Scalars, state: TrainState) -> None:
        """Settles the call before, while the device works on this one."""
        self.settle(state)
        self._pending = step, scalars

    def settle(self, state: TrainState) -> None:
        """Fetches the scalars that are still on the device.

        Raises:
          divergence.Diverged: If one of them is not finite.
        """
        if self._pending is None:
            return
        step, scalars = self._pending[0], jax.device_get(self._pending[1])
        self._pending = None
        bad = divergence.first_bad(scalars)
        if bad is not None:
            bad_step = step - self._run.programs.steps_per_call + bad + 1
            values = {name: float(x[bad]) for name, x in scalars.items()}
            rows = self._rows(bad_step - 1)
            with jax.transfer_guard("allow"):
                divergence.stop(
                    self._run.workdir / NAN_DUMP,
                    bad_step,
                    values,
                    rows,
                    state.model.params,
                )
        self._alarms.take(step, scalars)
        self._meter.add(scalars)
        self._bar.advance(self._run.programs.steps_per_call)
        config = self._run.config
        if step % config.train.log_every == 0 or step >= config.total_steps:
            metrics = self._meter.line() | {"perf/flops_per_slice": self._flops}
            self._writer.write(step, metrics)
            self._bar.show(step, metrics)

    def validated(self, step: int, losses: dict[str, float]) -> None:
        """Writes the scalars of a validation."""
        self._writer.write(
            step, {f"validation/{name}": value for name, value in losses.items()}
        )
        if not math.isfinite(losses["loss"]):
            logging.warning(
                "The validation loss of step %d is %s; it cannot be the best.",
                step,
                losses["loss"],
            )

    def evaluated(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes the figures of a full evaluation."""
        self._writer.write(
            step, {f"eval/{name}": value for name, value in figures.items()}
        )

    def _rows(self, batch: int) -> list[dict[str, int | str]]:
        """What was in a global batch, with names for people."""
        stream = self._run.stream
        names = {volume.uid: volume.subject for volume in stream.volumes}
        return [
            {"subject": names[uid], "uid": uid, "slice_index": index}
            for uid, index in stream.ids(batch)
        ]
