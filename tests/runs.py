"""Small training runs that the tests of training share.

As a program, one run in its own process: `python -m tests.runs OPTIONS_AS_JSON`.
"""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from configs import smoke
from uad_jax import (
    checkpoint,
    distributed,
    evaluate,
    loop,
    programs,
    runtime,
    train,
    workdir,
)
from uad_jax import config as config_lib
from uad_jax import mesh as mesh_lib
from uad_jax.methods import base
from uad_jax.optim import OptimizerConfig
from uad_jax.types import Array, Batch, Key, ModelState, Scalars, TrainState, Tree

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass
class ScaleConfig:
    """A method that compiles at once: image -> gain * image + offset, with noise.

    Attributes:
      noise: Standard deviation of the noise on the input, keyed by volume and slice.
      nan_step: The update that finds a NaN gradient; -1 = none.
      nan_loss: Whether it finds a NaN loss too.
      temporary: Elements of a temporary array of the update, to run out of memory.
      accumulate_steps: Micro-batches per step.
      optimizer: The optimiser.
    """

    noise: float = 0.1
    nan_step: int = -1
    nan_loss: bool = False
    temporary: int = 0
    accumulate_steps: int = 1
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(learning_rate=0.01)
    )

    def validate(self) -> None:
        """Every value works."""

    def make(self, run: base.RunShape) -> base.Method:
        """Builds the method."""

        def init_model(key: Key, batch: Batch) -> ModelState:
            gain = jax.random.normal(key, (batch.image.shape[-1],))
            return ModelState(
                params={"net": {"gain": gain, "offset": jnp.zeros_like(gain)}},
                collections={},
            )

        def loss(
            params: dict[str, Tree],
            collections: dict[str, Tree],
            batch: Batch,
            key: Key,
        ) -> tuple[Array, tuple[dict[str, Tree], Scalars]]:
            keys = base.sample_keys(key, batch.uid, batch.slice_index)
            draw = jax.vmap(lambda k: jax.random.normal(k, batch.image.shape[1:]))
            noisy = batch.image + self.noise * draw(keys)
            net = params["net"]
            shape = (1, 1, 1, -1)
            output = noisy * net["gain"].reshape(shape) + net["offset"].reshape(shape)
            rows = jnp.mean(jnp.square(output - batch.image), axis=(1, 2, 3))
            valid = batch.valid.astype(jnp.float32)
            value = jnp.sum(rows * valid) / jnp.maximum(jnp.sum(valid), 1.0)
            return value, (collections, {"mse": value})

        init, update = base.single_optimizer(
            init_model,
            loss,
            self.optimizer.make(run.total_steps),
            ema_decay=0.9,
            accumulate_steps=self.accumulate_steps,
        )

        def faulty(
            state: TrainState, batch: Batch, key: Key
        ) -> tuple[TrainState, Scalars]:
            new, scalars = update(state, batch, key)
            bad = state.step == self.nan_step
            names = ["grad_norm"] + ["loss"] * self.nan_loss
            for name in names:
                scalars[name] = jnp.where(bad, jnp.nan, scalars[name])
            if self.temporary:
                many = jnp.arange(self.temporary, dtype=jnp.float32)
                scalars["last"] = jnp.sort(many * scalars["loss"])[-1]
            model = jax.tree.map(lambda x: jnp.where(bad, jnp.nan, x), new.model)
            return dataclasses.replace(new, model=model), scalars

        return base.Method(
            inputs=base.Inputs(),
            init=init,
            update=faulty,
            validate=lambda model, batch, key: {
                "loss": loss(model.params, model.collections, batch, key)[0]
            },
            score=None,
        )


def scale_config(store: pathlib.Path, **options: Any) -> config_lib.ExperimentConfig:
    """A run of 8 steps of the method above; options are `--config` paths."""
    config = config_lib.ExperimentConfig(
        name="scale",
        method=ScaleConfig(),
        train=config_lib.TrainConfig(
            log_every=1, eval_every=4, save_every=4, validation_slices=6
        ),
        batch_size=8,
        total_steps=8,
    )
    config.data.store = str(store)
    return overridden(config, options)


def smoke_config(store: pathlib.Path, **options: Any) -> config_lib.ExperimentConfig:
    """The smoke config, two levels deep; options are `--config` paths."""
    config = smoke.get_config()
    config.method.intermediate_resolution = 8  # type: ignore[attr-defined]
    config.data.store = str(store)
    config.train.log_every = 1
    return overridden(config, options)


def overridden(
    config: config_lib.ExperimentConfig, options: dict[str, Any]
) -> config_lib.ExperimentConfig:
    """Sets dotted fields of a config, in place."""
    for path, value in options.items():
        *parents, name = path.split(".")
        target: Any = config
        for parent in parents:
            target = getattr(target, parent)
        kind = type(getattr(target, name))
        setattr(target, name, kind(value))
    return config


def final_state(
    config: config_lib.ExperimentConfig,
    directory: pathlib.Path,
    mesh: Mesh,
    step: int | None = None,
) -> TrainState:
    """The train state of a checkpoint (default: the latest), as numpy arrays."""
    shapes = workdir.read_json(directory / train.SHAPES)
    method = config.method.make(base.RunShape(**shapes["run"]))
    spec = train.spec_from_json(shapes["batch"])
    abstract = programs.abstract_state(method, spec, mesh)
    store = checkpoint.Checkpoints(directory / train.CHECKPOINTS, read_only=True)
    state, _ = store.restore(abstract, step)
    store.close()
    return jax.tree.map(np.asarray, state)


def assert_equal(a: Tree, b: Tree) -> None:
    """The same tree with the same bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def start(options: dict[str, Any], **environment: str) -> subprocess.Popen:
    """Starts a run in its own process; its log goes to `<workdir>.log`."""
    log = pathlib.Path(f"{options['workdir']}.log")
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.runs", json.dumps(options)],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Waits until something has happened in another process."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def main(options: dict[str, Any]) -> int:
    """One run in this process.

    Args:
      options: "store", "workdir", "config" (overrides), "devices", "distributed",
        "pace" (seconds per step), "slow_save" ({"from": step, "seconds": ...}: how
        long saves from a step on take).
    """
    runtime.setup()
    logging.set_verbosity(logging.INFO)
    if options.get("distributed"):
        distributed.initialize()
    pace = options.get("pace", 0.0)
    settle = loop.Reporter.settle

    def slow_settle(self: loop.Reporter, state: TrainState) -> None:
        time.sleep(pace)
        settle(self, state)

    loop.Reporter.settle = slow_settle
    save = checkpoint.Checkpoints.save

    def slow_save(
        self: checkpoint.Checkpoints, step: int, *args: Any, **kw: Any
    ) -> Any:
        slow = options.get("slow_save", {"from": math.inf})
        if step >= slow["from"]:
            print("SAVING SLOWLY", flush=True)
            time.sleep(slow["seconds"])
        return save(self, step, *args, **kw)

    checkpoint.Checkpoints.save = slow_save
    config = smoke_config(pathlib.Path(options["store"]), **options.get("config", {}))
    count = options.get("devices", 1)
    devices = None if options.get("distributed") else jax.devices()[:count]
    directory = pathlib.Path(options["workdir"])
    result = train.train(config, directory, mesh=mesh_lib.make_mesh(devices))
    if options.get("distributed") and result.stopped == "done":
        # As run.py does after training.
        print("CALIBRATED", evaluate.calibrate(config, directory), flush=True)
    print("RESULT", result.step, result.stopped, flush=True)
    return train.EXIT_PREEMPTED if result.stopped == "preempted" else 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
