"""Cost of one batch of noise, alone and as a share of a train step.

    python -m benchmarks.noise [--batch=32] [--rounds=9]

Slices of 96 x 96; one field per slice, and one shared by the batch (for 3-D noise the
slices lie at different depths of one field). The train step is that of
`configs/ddpm.py:cpu` with Gaussian noise. Every round times all of them in another
order. Prints one JSON line: medians in ms, and the median of each kind's time over
that of the step in the same round.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from configs import ddpm as ddpm_config
from uad_jax import runtime, types
from uad_jax.methods import base
from uad_jax.ops import noise

_BATCH = flags.DEFINE_integer("batch", 32, "Slices at once.", 1)
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Rounds; medians are printed.", 3)
_SIDES = (96, 96, 1)


def _step(batch_size: int) -> Callable[[], types.Tree]:
    """One train step, compiled; it keeps its state."""
    config = ddpm_config.get_config("cpu").method
    process = dataclasses.replace(config.process, noise=noise.Noise.GAUSSIAN)
    config = dataclasses.replace(config, process=process)
    method = config.make(base.RunShape(100, 10, batch_size))
    image = np.random.default_rng(0).random((batch_size, *_SIDES), np.float32)
    rows = jnp.arange(batch_size)
    batch = types.Batch(
        image=jnp.asarray(image),
        mask=jnp.ones((batch_size, *_SIDES), bool),
        valid=rows >= 0,
        uid=rows,
        slice_index=rows,
    )
    state = jax.jit(method.init)(jax.random.key(0), batch)
    update = jax.jit(method.update)
    return lambda: update(state, batch, jax.random.key(1))


def main(argv: list[str]) -> None:
    """Times, compares, prints."""
    del argv
    size = _BATCH.value
    one = jax.random.key(0)
    keys = {"": jax.random.split(one, size), "_shared": one}
    t = jnp.arange(size) * 7 % 1000
    runs: dict[str, Callable[[], types.Tree]] = {"step": _step(size)}
    for kind in noise.Noise:
        draw = jax.jit(noise.make(kind, _SIDES))
        for suffix, key in keys.items():
            runs[kind.value + suffix] = lambda draw=draw, key=key: draw(key, t)
    for run in runs.values():
        jax.block_until_ready(run())  # compiles
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = np.random.default_rng(0)
    for _ in range(_ROUNDS.value):
        for name in order.permutation(list(runs)):
            start = time.perf_counter()
            jax.block_until_ready(runs[name]())
            times[name].append(1000 * (time.perf_counter() - start))
    shares = {
        name: statistics.median(np.divide(times[name], times["step"]).tolist())
        for name in runs
    }
    found = {
        "batch": size,
        "ms": {name: statistics.median(values) for name, values in times.items()},
        "share_of_step": {n: share for n, share in shares.items() if n != "step"},
        "device": jax.devices()[0].device_kind,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    runtime.setup()
    app.run(main)
