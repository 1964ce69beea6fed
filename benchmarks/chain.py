"""Cost of a reverse chain beside as many calls of its network.

    python -m benchmarks.chain [--calls=250] [--rounds=7] [--batch=8]

A small U-Net (`configs/ddpm.py:cpu`, slices of 96 x 96, random parameters) is called
once, and inside a chain of `--calls` deterministic steps (DDIM), which is one
compiled program. Each round times the chain, and `--calls` separate calls of the
compiled network that are dispatched without waiting; who begins alternates. Prints
one JSON line: medians, and the chain's time over that of the calls (the target is
1.15 or less). Noise is not part of it: docs/diffusion.md has what it costs.
"""

import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from configs import ddpm as ddpm_config
from uad_jax import denoising, runtime
from uad_jax.methods import ddpm
from uad_jax.ops import diffusion
from uad_jax.types import Tree

_CALLS = flags.DEFINE_integer("calls", 250, "Steps of the chain.", 1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds; medians are printed.", 3)
_BATCH = flags.DEFINE_integer("batch", 8, "Slices at once.", 1)


def _seconds(run: Callable[[], jax.Array], count: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(count):
        out = run()
    jax.block_until_ready(out)
    return time.perf_counter() - start


def main(argv: list[str]) -> None:
    """Times, compares, prints."""
    del argv
    config = ddpm_config.get_config("cpu").method
    assert isinstance(config, ddpm.DdpmConfig)
    shape = (_BATCH.value, 96, 96, 1)
    module = denoising.network(config, shape)
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.random(shape), jnp.float32)
    t = jnp.full(_BATCH.value, 99, jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), image, t)["params"]
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.05 * rng.standard_normal(leaf.shape), jnp.float32),
        shapes,
    )
    chain = diffusion.Chain(
        schedule=config.process.make_schedule(),
        kind=config.process.prediction,
        steps=diffusion.chain_steps(config.process.num_steps - 1, _CALLS.value),
        sampler=diffusion.Sampler.DDIM,
    )
    traces = []

    @jax.jit
    def call(params: Tree, xt: jax.Array, t: jax.Array) -> jax.Array:
        return denoising.denoiser(config, {denoising.NETWORK: params}, shape)(xt, t)

    @jax.jit
    def run_chain(params: Tree, xt: jax.Array) -> jax.Array:
        denoise = denoising.denoiser(config, {denoising.NETWORK: params}, shape)

        def counted(xt: jax.Array, t: jax.Array) -> jax.Array:
            traces.append(1)
            return denoise(xt, t)

        return diffusion.sample(counted, chain, xt)

    sides = {
        "chain": lambda: _seconds(lambda: run_chain(params, image)),
        "calls": lambda: _seconds(lambda: call(params, image, t), _CALLS.value),
    }
    for side in sides.values():
        side()  # compiles
    traced = len(traces)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(_ROUNDS.value):
        for name in list(sides)[:: 1 if index % 2 else -1]:
            times[name].append(sides[name]())
    ratios = [a / b for a, b in zip(times["chain"], times["calls"], strict=True)]
    print(
        json.dumps(
            {
                "calls": _CALLS.value,
                "batch": _BATCH.value,
                "chain_seconds": statistics.median(times["chain"]),
                "calls_seconds": statistics.median(times["calls"]),
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "traces_after_the_first_chain": len(traces) - traced,
                "device": jax.devices()[0].device_kind,
            }
        )
    )


if __name__ == "__main__":
    runtime.setup()
    app.run(main)
