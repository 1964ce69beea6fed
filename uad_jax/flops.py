"""Floating-point operations: how many a function does, how many a device can do."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core
from jax.sharding import Mesh

from uad_jax import mesh as mesh_lib

_SIZES = (256, 512, 1024, 2048, 4096, 8192)
_LONGEST = 0.1  # seconds of one product; a CPU stops at 1024 or 2048
_WINDOW = 0.04  # seconds of one measurement
_MEASUREMENTS = 3


class Count(NamedTuple):
    """What one call of a function does.

    Attributes:
      flops: Floating-point operations; NaN if XLA does not say.
      open_loops: Loops whose length depends on data; their bodies count once.
    """

    flops: float
    open_loops: int


class Ceiling(NamedTuple):
    """The most that products of matrices reach.

    Attributes:
      flops_per_second: Of all devices of the mesh together.
      size: Side of the square matrices that reached it.
    """

    flops_per_second: float
    size: int


def count(function: Callable[..., Any], *args: Any) -> Count:
    """Counts the operations of one call, without compiling or running it.

    XLA counts a program before optimisation, where the body of a loop counts once;
    here the bodies of `lax.scan`, `lax.map` and `fori_loop` of fixed length count as
    often as they run. Nothing is counted per device: it is the whole call.

    Args:
      function: A function that can be jitted.
      *args: Arrays, or their shapes and dtypes.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    with _counted_on_the_cpu():
        traced = jax.jit(function).trace(*shapes)
        once = _lowered(traced)
        extra, open_loops = _repeated(traced.jaxpr)
    return Count(once + extra, open_loops)


@contextlib.contextmanager
def _counted_on_the_cpu() -> Iterator[None]:
    """Lowers for the CPU where there is one: GPU backends count after compiling."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        yield
        return
    with jax.default_device(device):
        yield


def _lowered(traced: Any) -> float:
    return float((traced.lower().cost_analysis() or {}).get("flops", math.nan))


def _repeated(jaxpr: Any) -> tuple[float, int]:
    """Operations that XLA's count leaves out because loops run more than once."""
    extra, open_loops = 0.0, 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        parts = [_repeated(body) for body in jax_core.jaxprs_in_params(params)]
        open_loops += sum(loops for _, loops in parts) + (name == "while")
        if name == "scan":
            body = params["jaxpr"]
            traced = jax.jit(jax_core.jaxpr_as_fun(body)).trace(*body.in_avals)
            once, length = _lowered(traced), params["length"]
            done = _copies(length, int(params["unroll"])) * once
            extra += length * (once + parts[0][0]) - done
        elif name == "cond":  # XLA counts the dearest branch
            extra += max(more for more, _ in parts)
        else:
            extra += sum(more for more, _ in parts)
    return extra, open_loops


def _copies(length: int, unroll: int) -> int:
    """Copies of its body that the program of a scan holds."""
    return length if unroll >= length else unroll + length % unroll


def ceiling(mesh: Mesh, dtype: str) -> Ceiling:
    """Measures the fastest product of two square matrices, in well under a second.

    Sizes double until one product takes too long. A loop on the device multiplies
    again and again, so that dispatch does not count; the best of a few measurements
    is kept. float32 is multiplied at JAX's default precision, as models do it: on
    recent NVIDIA devices that is TF32.

    Args:
      mesh: Every device multiplies at the same time.
      dtype: "float32" or "bfloat16".
    """
    best = Ceiling(0.0, 0)
    for size in _SIZES:
        seconds = _seconds_per_product(mesh, dtype, size)
        reached = mesh.size * 2 * size**3 / seconds
        best = max(best, Ceiling(reached, size))
        if 8 * seconds > _LONGEST:
            break
    return best


@jax.jit
def _products(times: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, times, lambda _, x: jnp.matmul(x, w), x)


def _seconds_per_product(mesh: Mesh, dtype: str, size: int) -> float:
    """Seconds of one product of [size, size] matrices on every device."""
    # Tiles of one random block, scaled so that the products neither grow nor vanish.
    tile = np.random.default_rng(0).standard_normal((_SIZES[0], _SIZES[0]))
    block = np.tile(tile, [size // _SIZES[0]] * 2).astype(jnp.dtype(dtype))
    scale = math.sqrt(_SIZES[0]) * size // _SIZES[0]
    x = jax.device_put(np.stack([block] * mesh.size), mesh_lib.batch_sharded(mesh))
    w = jax.device_put((block / scale).astype(dtype), mesh_lib.replicated(mesh))

    def clock(times: int) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(_products(times, x, w))
        return (time.perf_counter() - begin) / times

    clock(1)
    times = max(1, round(_WINDOW / clock(1)))
    return min(clock(times) for _ in range(_MEASUREMENTS))
