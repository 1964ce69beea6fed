"""What the rows of a benchmark share: the setting, the clock, and what is counted."""

import contextlib
import dataclasses
import enum
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from uad_jax import flops, stand_ins
from uad_jax.config import EvaluationSet, ExperimentConfig
from uad_jax.data import pipeline, sources
from uad_jax.methods.base import Method, RunShape
from uad_jax.metrics.protocols import Protocol
from uad_jax.types import Batch

_CACHE_HIT = "/jax/compilation_cache/cache_hits"
_MOST_CALLS = 10_000  # of one measurement

Row = dict[str, Any]  # plain JSON types


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What all rows share.

    Attributes:
      config: The experiment.
      mesh: The devices.
      store: The training store, or None for made-up data.
      shape: D, H, W, C of a volume.
      recipe: Name of the preprocessing that gives this shape.
      ceilings: dtype -> the fastest product of matrices.
      repeats: Measurements per figure.
      seconds: Shortest time of one measurement.
    """

    config: ExperimentConfig
    mesh: Mesh
    store: sources.Store | None
    shape: stand_ins.Shape
    recipe: str
    ceilings: dict[str, flops.Ceiling]
    repeats: int
    seconds: float

    def method(self, batch_size: int, steps_per_epoch: int = 1) -> Method:
        """Builds the method for a run with this global batch."""
        shape = RunShape(self.config.total_steps, steps_per_epoch, batch_size)
        return self.config.method.make(shape)

    def stream(self, batch_size: int) -> pipeline.TrainStream | None:
        """Opens the training stream; None without a store."""
        if self.store is None:
            return None
        return pipeline.train_stream(
            self.store,
            self.config.data,
            self.method(batch_size).inputs,
            batch_size=batch_size,
            seed=self.config.seed,
            mesh=self.mesh,
        )

    def made_up(self, batch_size: int, stack: int | None = None) -> Batch:
        """A batch of the right shapes without data."""
        inputs = self.method(batch_size).inputs
        return stand_ins.batch(
            self.shape,
            batch_size,
            self.mesh,
            num_slices=inputs.num_slices,
            needs_lesion=inputs.needs_lesion,
            stack=stack,
        )

    @property
    def protocol(self) -> Protocol:
        """Post-processing of the first evaluation set."""
        sets = list(self.config.evaluation.sets.values()) or [EvaluationSet()]
        return sets[0].protocol


def timed(call: Callable[[int], Any], setting: Setting) -> list[float]:
    """Seconds of one call, measured `repeats` times over enough calls.

    Args:
      call: Runs so many calls to their end.
      setting: Gives the repeats and the shortest time of one.
    """

    def clock(calls: int) -> float:
        begin = time.perf_counter()
        call(calls)
        return (time.perf_counter() - begin) / calls

    clock(1)  # fills caches and queues
    calls = min(max(1, math.ceil(setting.seconds / clock(1))), _MOST_CALLS)
    return [clock(calls) for _ in range(setting.repeats)]


def milliseconds(seconds: list[float], share: float = 1.0) -> Row:
    """Median and range in ms of the measured seconds, times `share`."""
    values = [1000 * share * value for value in seconds]
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


@contextlib.contextmanager
def compiling() -> Iterator[Row]:
    """Times tracing, lowering and compiling, and sees whether the cache served it."""
    facts: Row = {"seconds": 0.0, "from_persistent_cache": False}

    def seen(event: str, **_: Any) -> None:
        facts["from_persistent_cache"] |= event == _CACHE_HIT

    jax.monitoring.register_event_listener(seen)
    begin = time.perf_counter()
    try:
        yield facts
    finally:
        facts["seconds"] = time.perf_counter() - begin
        jax.monitoring.unregister_event_listener(seen)


def speed(
    setting: Setting,
    function: Callable[..., Any],
    arguments: Sequence[Any],
    compiled_flops: float,
    slices: int,
    seconds: float,
) -> Row:
    """Slices and operations per second, and the share of each ceiling.

    Args:
      setting: The benchmark.
      function: What one call computes, on all devices together.
      arguments: Its arguments, or their shapes and dtypes.
      compiled_flops: XLA's count of the compiled program, where it does not count
        others; NaN = no count.
      slices: Slices that one call works on.
      seconds: Time of one call.
    """
    counted = flops.count(function, *arguments)
    note = ""
    if counted.open_loops:
        note = f"{counted.open_loops} loops of a length that depends on data count once"
    total = counted.flops
    if math.isnan(total):
        total, note = compiled_flops, "compiled program, bodies of loops count once"
    known = not math.isnan(total)
    return {
        "slices_per_second": slices / seconds,
        "flops_per_slice": total / slices if known else None,
        "flops_note": note if known else "XLA gives no count on this backend",
        "flops_per_second": total / seconds if known else None,
        "share_of_ceiling": {
            name: total / seconds / ceiling.flops_per_second if known else None
            for name, ceiling in setting.ceilings.items()
        },
    }


def memory(mesh: Mesh, before: int, program_bytes: int) -> Row:
    """Peak memory of one device.

    Args:
      mesh: The devices.
      before: `peak_bytes` before the row.
      program_bytes: Arguments, temporaries and outputs of the program; 0 = unknown.
    """
    peak: int | None = peak_bytes(mesh)
    source = "device: peak of the process, reached in this row"
    if peak == before:  # an earlier row needed more, or the device does not say
        peak = program_bytes or None
        source = "compiled program: arguments, temporaries and outputs"
    return {
        "peak_bytes": peak,
        "source": source if peak else "unknown",
        "program_bytes": program_bytes or None,
    }


def peak_bytes(mesh: Mesh) -> int:
    """Most memory that the process has used on one device; 0 if it does not say."""
    stats = mesh.local_devices[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", 0)


def precision(config: ExperimentConfig) -> str | None:
    """Type of the computation, where the method has the choice."""
    chosen = getattr(config.method, "precision", None)
    return chosen.value if isinstance(chosen, enum.Enum) else chosen


def shapes(batch: Batch) -> Batch:
    """Shapes, dtypes and shardings of a batch."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding
        ),
        batch,
    )
