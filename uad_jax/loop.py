"""The steady state of training: step, settle, validate, save."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging

from uad_jax import alarms, distributed, divergence, programs, signals
from uad_jax import progress as progress_lib
from uad_jax import writer as writer_lib
from uad_jax.config import Selection
from uad_jax.data import pipeline
from uad_jax.members import Member, Run
from uad_jax.types import Scalars, TrainState

NAN_DUMP = "nan_dump"

# Validation noise is the same at every step and in every run, so that losses compare.
_VALIDATION_SEED = 0


def loop(
    run: Run,
    state: TrainState,
    start: int,
    stop: signals.StopSignal,
    show: bool,
) -> tuple[int, str]:
    """Trains from step `start` to the end, a signal, or the end of the patience.

    The scalars of a call are fetched after the next call was dispatched, so that the
    device never waits for the host; before a validation or a save they are fetched at
    once, so that no checkpoint precedes the proof that its step was finite.

    Returns:
      Finished steps, and "done", "preempted" or "patience".
    """
    every, total = run.config.train, run.config.total_steps
    run.watch.start(max(one.record.train_seconds for one in run.active))
    stride = run.programs.steps_per_call
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
                state, scalars = run.programs.update(state, batch, run.key)
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
            active = run.active
            losses: list[dict[str, float]] = [{} for _ in active]
            if validate:
                losses = [_validate(run, one, state, step) for one in active]
                for one, found in zip(active, losses, strict=True):
                    save |= _validated(one, step, found, reporter)
            save |= len(run.active) < len(active)  # the last step of some
            if not run.active:
                stopped = "patience"
            if save or stopped != "done":
                _save(run, step, state, active, losses)
            if evaluate and stopped == "done":
                for one in active:
                    reporter.evaluated(one, step, _evaluate(run, one, step))
            if stopped != "done":
                break
        for one in run.members:
            one.checkpoints.wait()
    if step >= total:
        return step, "done"
    if stopped == "preempted":
        logging.warning(
            "%s: saved step %d of %d. Start the same command again to go on.",
            stop.received or "A signal to another process",
            step,
            total,
        )
    return step, stopped


def _evaluation_due(run: Run, step: int) -> bool:
    every = run.config.train.evaluate_every
    asked = any(one.evaluate is not None for one in run.members)
    return asked and every > 0 and step % every == 0


def _evaluate(run: Run, member: Member, step: int) -> Mapping[str, float]:
    """Evaluates the checkpoint just saved, from disk, as it is done offline."""
    assert member.evaluate is not None
    with run.watch.charge("eval"):
        member.checkpoints.wait()
        return member.evaluate(step)


def _asked_to_stop(stop: signals.StopSignal, step: int, log_every: int) -> bool:
    """Whether a signal came. Several processes ask each other at log steps only."""
    if jax.process_count() > 1 and step % log_every:
        return False
    return distributed.any_process(stop.received is not None)


def _validate(
    run: Run, member: Member, state: TrainState, step: int
) -> dict[str, float]:
    """Means over the valid rows of the validation set; empty without one."""
    if member.validate is None:
        return {}
    with run.watch.charge("eval"):
        key = programs.run_key(_VALIDATION_SEED, run.mesh)
        if run.config.train.selection is Selection.REFERENCE:
            key = jax.random.fold_in(key, step)
        own = run.part(state, member)
        batches = member.validation(step)
        fetched = jax.device_get([member.validate(own, one, key) for one in batches])
    counts = np.array([count for _, count in fetched], np.float64)
    return {
        name: float(
            np.average([scalars[name] for scalars, _ in fetched], weights=counts)
        )
        for name in fetched[0][0]
    }


def _validated(
    member: Member, step: int, losses: dict[str, float], reporter: "Reporter"
) -> bool:
    """Writes down a validation; True if it is the member's best."""
    if not losses:
        return False
    reporter.validated(member, step, losses)
    return member.record.validated(step, losses["loss"])


def _save(
    run: Run,
    step: int,
    state: TrainState,
    members: Sequence[Member],
    losses: Sequence[Mapping[str, float]],
) -> None:
    """Saves some members with the losses of this step, if any.

    All earlier saves are complete before the first one begins: whenever the process is
    killed, there is a step that all members have.
    """
    with run.watch.charge("save"):
        for member in members:
            member.checkpoints.wait()
        for member, own in zip(members, losses, strict=True):
            member.record.train_seconds = run.watch.train
            metrics = {**dataclasses.asdict(member.record), **own}
            finite = {k: v for k, v in metrics.items() if math.isfinite(v)}
            member.checkpoints.save(step, run.part(state, member), metrics=finite)


class _Log:
    """The metrics of one member."""

    def __init__(self, run: Run, member: Member, start: int) -> None:
        rows = member.stream.spec().valid.size  # slices, also where rows are slabs
        self.member = member
        self.alarms = alarms.Watch(who=member.name)
        self.meter = progress_lib.Meter(run.watch, rows)
        self.writer = writer_lib.MetricWriter(member.workdir, resume_step=start)
        self._flops = run.programs.cost.flops / (rows * len(run.members))

    def line(self, step: int) -> dict[str, float]:
        """Writes and returns a line of metrics."""
        metrics = self.meter.line() | {"perf/flops_per_slice": self._flops}
        self.writer.write(step, metrics)
        return metrics


class Reporter:
    """Takes the scalars of each call, one call late; writes, shows, and stops NaN."""

    def __init__(self, run: Run, start: int, show: bool) -> None:
        self._run = run
        self._logs = {one.workdir: _Log(run, one, start) for one in run.active}
        shown = show and distributed.is_main()
        self._bar = progress_lib.Bar(run.config.total_steps, start, shown)
        self._pending: tuple[int, Scalars] | None = None

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.close()
        for log in self._logs.values():
            log.writer.close()

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
        step, fetched = self._pending[0], jax.device_get(self._pending[1])
        self._pending = None
        logs = [self._logs[one.workdir] for one in self._run.active]
        for log in logs:
            scalars = log.member.scalars(fetched)
            bad = divergence.first_bad(scalars)
            if bad is not None:
                step += bad + 1 - self._run.programs.steps_per_call
                values = {name: float(x[bad]) for name, x in scalars.items()}
                self._stop(log.member, step, values, state)
            log.alarms.take(step, scalars)
            log.meter.add(scalars)
        self._bar.advance(self._run.programs.steps_per_call)
        config = self._run.config
        if step % config.train.log_every == 0 or step >= config.total_steps:
            self._bar.show(step, _together([log.line(step) for log in logs]))

    def _stop(
        self, member: Member, step: int, scalars: dict[str, float], state: TrainState
    ) -> NoReturn:
        with jax.transfer_guard("allow"):
            divergence.stop(
                member.workdir / NAN_DUMP,
                step,
                scalars,
                _rows(member.stream, step - 1),
                self._run.part(state, member).model.params,
                member=member.name,
            )

    def validated(self, member: Member, step: int, losses: dict[str, float]) -> None:
        """Writes the scalars of a validation."""
        self._logs[member.workdir].writer.write(
            step, {f"validation/{name}": value for name, value in losses.items()}
        )
        if not math.isfinite(losses["loss"]):
            logging.warning(
                "%sThe validation loss of step %d is %s; it cannot be the best.",
                f"{member.name}: " if member.name else "",
                step,
                losses["loss"],
            )

    def evaluated(
        self, member: Member, step: int, figures: Mapping[str, float]
    ) -> None:
        """Writes the figures of a full evaluation."""
        self._logs[member.workdir].writer.write(
            step, {f"eval/{name}": value for name, value in figures.items()}
        )


def _together(lines: Sequence[dict[str, float]]) -> dict[str, float]:
    """What the progress bar shows: the mean loss, and the slices of all members."""
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    shown = {"perf/slices_per_second": sum(x["perf/slices_per_second"] for x in lines)}
    return shown | ({"train/loss": float(np.mean(losses))} if losses else {})


def _rows(stream: pipeline.TrainStream, batch: int) -> list[dict[str, int | str]]:
    """What was in a global batch, with names for people."""
    names = {volume.uid: volume.subject for volume in stream.volumes}
    return [
        {"subject": names[uid], "uid": uid, "slice_index": index}
        for uid, index in stream.ids(batch)
    ]
