"""What one training step costs: floating-point operations and device memory."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from uad_jax import mesh as mesh_lib
from uad_jax.types import TrainState, Tree

_GIB = 2**30


class OutOfDeviceMemory(RuntimeError):
    """The step does not fit in the memory of a device."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Estimates for one training step.

    Attributes:
      flops: Floating-point operations of the step on all devices together, as XLA
        counts them before optimisation, or after it where the backend (GPU, TPU)
        counts compiled programs only; the body of an inner loop counts once. NaN if
        the backend does not say.
      total_bytes: Memory of one device; 0 if the backend does not say.
      fixed_bytes: The part of it that does not grow with the batch: parameters,
        gradients, optimiser state, EMA.
    """

    flops: float
    total_bytes: int
    fixed_bytes: int


def estimate(
    lowered: Any, compiled: Any, state: TrainState, num_devices: int = 1
) -> Cost:
    """Reads the costs of a step from its program.

    Args:
      lowered: `jax.stages.Lowered` of the step.
      compiled: `jax.stages.Compiled` of it.
      state: The (abstract) train state, a whole copy of which is on every device.
      num_devices: Devices that share the step.
    """
    flops = (lowered.cost_analysis() or {}).get("flops", math.nan)
    if math.isnan(flops):  # plugin backends analyse compiled programs, per device
        per_device = (compiled.cost_analysis() or {}).get("flops", math.nan)
        flops = per_device * num_devices
    memory = compiled.memory_analysis()
    total = 0
    if memory is not None:
        total = (
            memory.argument_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
        )
    return Cost(
        flops=float(flops),
        total_bytes=total,
        fixed_bytes=_bytes(state) + _bytes(state.model.params),
    )


@contextlib.contextmanager
def explained(batch_size: int, mesh: Mesh, cost: Cost | None = None) -> Iterator[None]:
    """Turns XLA's out-of-memory error into one that says what would fit.

    Args:
      batch_size: Rows of the global batch.
      mesh: The devices that share it.
      cost: The estimates, None before the step is compiled.

    Raises:
      OutOfDeviceMemory: In place of RESOURCE_EXHAUSTED.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        limit = mesh_lib.device_bytes(mesh.local_devices[0])
        raise OutOfDeviceMemory(
            f"{advice(cost, batch_size, mesh.size, limit)} (XLA: "
            f"{str(error).splitlines()[0]})"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether XLA raised this error because memory ran out."""
    return isinstance(
        error, jax.errors.JaxRuntimeError
    ) and "RESOURCE_EXHAUSTED" in str(error)


def advice(cost: Cost | None, batch_size: int, num_devices: int, limit: int) -> str:
    """Says what a step needs and what would fit.

    Args:
      cost: The estimates, None if the step never compiled.
      batch_size: Rows of the global batch.
      num_devices: Devices that share it.
      limit: Bytes of one device, 0 if unknown.
    """
    parts = [f"Out of device memory with batch_size = {batch_size}"]
    parts.append(f" on {num_devices} device(s)")
    if cost is not None and cost.total_bytes:
        parts.append(
            f": one step needs about {cost.total_bytes / _GIB:.2f} GiB per device, "
            f"{cost.fixed_bytes / _GIB:.2f} GiB of it whatever the batch"
        )
    if limit:
        parts.append(f"; the device has {limit / _GIB:.2f} GiB")
    parts.append(". ")
    largest = largest_batch(cost, batch_size, num_devices, limit)
    if largest == 0:
        parts.append("Not even the smallest batch fits: make the model smaller.")
        return "".join(parts)
    if largest is not None and largest < batch_size:
        parts.append(f"About batch_size = {largest} would fit. ")
    parts.append("Use a smaller batch_size")
    times = _micro_batches(batch_size, num_devices, largest or batch_size // 2)
    if times:
        parts.append(f", or keep it and multiply method.accumulate_steps by {times}")
    return "".join([*parts, "."])


def _micro_batches(batch_size: int, num_devices: int, largest: int) -> int | None:
    """Fewest micro-batches of at most `largest` rows that the devices can share."""
    for count in range(2, batch_size // num_devices + 1):
        if batch_size // count <= largest and batch_size % (count * num_devices) == 0:
            return count
    return None


def largest_batch(
    cost: Cost | None, batch_size: int, num_devices: int, limit: int
) -> int | None:
    """Largest global batch that fits, a multiple of the devices; None = unknown.

    All memory beside the fixed part is taken to grow with the batch.
    """
    if cost is None or not limit or cost.total_bytes <= cost.fixed_bytes:
        return None
    share = (limit - cost.fixed_bytes) / (cost.total_bytes - cost.fixed_bytes)
    return max(int(batch_size * share) // num_devices * num_devices, 0)


def _bytes(tree: Tree) -> int:
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )
