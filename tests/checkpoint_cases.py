"""A small train state and damaged checkpoints, shared by the checkpoint tests."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from uad_jax import checkpoint
from uad_jax import mesh as mesh_lib
from uad_jax.types import ModelState, TrainState


def make_state(
    step: int = 0, *, width: int = 6, ema: bool = True, mesh: Mesh | None = None
) -> TrainState:
    """Two networks, one of them frozen and with batch statistics; Adam on the other."""
    keys = jax.random.split(jax.random.key(step), 3)
    encoder = {
        "stem": {"kernel": jax.random.normal(keys[0], (4, width))},
        "head": {"bias": jnp.zeros(4)},
    }
    frozen = {"stem": {"scale": jax.random.normal(keys[1], (width,))}}
    stats = {"batch_stats": {"stem": {"mean": jax.random.normal(keys[2], (3,))}}}
    state = TrainState(
        step=jnp.asarray(step, jnp.int32),
        model=ModelState(
            params={"encoder": encoder, "features": frozen},
            collections={"features": stats},
        ),
        opt_state={"main": optax.adam(1e-3).init(encoder)},
        ema={"encoder": jax.tree.map(lambda x: x + 1, encoder)} if ema else None,
    )
    mesh = mesh or mesh_lib.make_mesh(jax.devices()[:1])
    return jax.device_put(state, mesh_lib.replicated(mesh))


def abstract_of(state: TrainState, mesh: Mesh) -> TrainState:
    """What `restore` is asked for: shapes, dtypes and shardings of a state."""
    return mesh_lib.with_shardings(jax.eval_shape(lambda: state), mesh)


def assert_equal(left: Any, right: Any) -> None:
    """Two trees have the same types, dtypes and bits."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def restore(
    directory: pathlib.Path, mesh: Mesh, step: int | None = None
) -> tuple[TrainState, int]:
    """Opens a directory as a run does, and restores the small state."""
    checkpoints = checkpoint.Checkpoints(directory, keep=3)
    try:
        return checkpoints.restore(abstract_of(make_state(), mesh), step)
    finally:
        checkpoints.close()


def files_of(step_dir: pathlib.Path) -> list[pathlib.Path]:
    """Every file of a step, the manifest included."""
    return sorted(path for path in step_dir.rglob("*") if path.is_file())
