"""Training rows of a benchmark: the trainer's own compiled step, many times."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator

import jax

from uad_jax import bench_setting, programs
from uad_jax import cost as cost_lib
from uad_jax.bench_setting import Row, Setting
from uad_jax.data import pipeline
from uad_jax.methods.base import Method
from uad_jax.types import Batch, Key, Scalars, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Training:
    """What a training row runs."""

    method: Method
    stream: pipeline.TrainStream | None
    spec: Batch
    built: programs.Programs
    compile: Row

    @property
    def stack(self) -> int | None:
        """Batches of one call, as the stream wants it."""
        return self.built.steps_per_call if self.built.steps_per_call > 1 else None


def measure(setting: Setting, size: int) -> Row:
    """Measures training steps with one global batch size.

    Args:
      setting: The benchmark.
      size: Rows of the global batch, a multiple of the devices.

    Returns:
      A row of plain JSON types; only "kind", "batch" and "error" if memory ran out.
    """
    row: Row = {"kind": "train", "batch": size}
    before = bench_setting.peak_bytes(setting.mesh)
    try:
        with cost_lib.explained(size, setting.mesh):
            training = _compiled_training(setting, size)
        with cost_lib.explained(size, setting.mesh, training.built.cost):
            row |= _measured_steps(setting, training)
    except cost_lib.OutOfDeviceMemory as error:
        return row | {"error": str(error)}
    total = training.built.cost.total_bytes
    return row | {"memory": bench_setting.memory(setting.mesh, before, total)}


def needed_bytes(setting: Setting, size: int) -> int:
    """Memory of one device for a step, as compiled; 0 if the backend does not say."""
    return _compiled_training(setting, size).built.cost.total_bytes


def _compiled_training(setting: Setting, size: int) -> _Training:
    stream = setting.stream(size)
    epoch = 1 if stream is None else stream.steps_per_epoch
    method = setting.method(size, epoch)
    spec = stream.spec() if stream else bench_setting.shapes(setting.made_up(size))
    per_call = programs.steps_per_call(
        setting.config.train.steps_per_call, setting.mesh
    )
    with bench_setting.compiling() as facts:
        built = programs.build(method, spec, (), setting.mesh, per_call)
    return _Training(
        method=method, stream=stream, spec=spec, built=built, compile=facts
    )


def _measured_steps(setting: Setting, training: _Training) -> Row:
    config, mesh, built = setting.config, setting.mesh, training.built
    state = programs.init(training.method, training.spec, config.seed, mesh)
    steps = _Steps(built, state, programs.run_key(config.seed, mesh))
    if training.stream is None:
        found = None
        batch = setting.made_up(training.spec.uid.shape[0], training.stack)
    else:
        with training.stream.batches(0, stack=training.stack) as batches:
            batch = next(batches)
            found = _measured_input(setting, training, steps, batches)
    seconds = bench_setting.timed(
        lambda calls: steps.run(lambda: batch, calls), setting
    )
    per_step = bench_setting.milliseconds(seconds, 1 / built.steps_per_call)
    slices = training.spec.valid.size

    def step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Scalars]:
        return training.method.update(state, programs.decoded(batch), key)

    abstract = programs.abstract_state(training.method, training.spec, mesh)
    return {
        "slices_per_step": slices,
        "steps_per_call": built.steps_per_call,
        "precision": bench_setting.precision(config),
        "compile": training.compile,
        "milliseconds_per_step": per_step,
        "input": found,
        **bench_setting.speed(
            setting,
            step,
            (abstract, training.spec, jax.random.key(0)),
            built.cost.flops,
            slices,
            per_step["median"] / 1000,
        ),
    }


def _measured_input(
    setting: Setting,
    training: _Training,
    steps: "_Steps",
    batches: Iterator[Batch],
) -> Row:
    """The same steps on the real stream: their time, and the host's wait for it."""
    assert training.stream is not None
    shares: list[float] = []

    def run(calls: int) -> None:
        begin = time.perf_counter()
        waited = steps.run(lambda: next(batches), calls)
        shares.append(waited / (time.perf_counter() - begin))

    seconds = bench_setting.timed(run, setting)
    return {
        "placement": training.stream.placement.value,
        "wait_share": statistics.median(shares[-setting.repeats :]),
        "milliseconds_per_step": bench_setting.milliseconds(
            seconds, 1 / training.built.steps_per_call
        ),
    }


class _Steps:
    """Training steps as the trainer takes them: scalars are fetched one call late."""

    def __init__(self, built: programs.Programs, state: TrainState, key: Key) -> None:
        self._update, self._state, self._key = built.update, state, key

    def run(self, take: Callable[[], Batch], calls: int) -> float:
        """Runs some calls to their end; returns the seconds spent waiting in `take`."""
        waited, pending = 0.0, None
        for _ in range(calls):
            begin = time.perf_counter()
            batch = take()
            waited += time.perf_counter() - begin
            self._state, scalars = self._update(self._state, batch, self._key)
            if pending is not None:
                jax.device_get(pending)
            pending = scalars
        jax.device_get(pending)
        jax.block_until_ready(self._state)
        return waited
