"""The compiled programs of a run: made once, ahead of time, and never again."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uad_jax import cost as cost_lib
from uad_jax import mesh as mesh_lib
from uad_jax.methods.base import Method
from uad_jax.ops import intensity
from uad_jax.types import Array, Batch, Key, Scalars, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """Compiled programs; a batch of another shape is an error, not a recompilation.

    Attributes:
      update: (state, batch, key) -> (state, scalars each [steps_per_call]). The
        state is donated. The step is folded into the key inside.
      validate: (state, batch, key) -> (scalars, number of valid rows []); None
        without validation batches.
      cost: What one step costs.
      steps_per_call: Steps of one call of `update`.
    """

    update: Callable[[TrainState, Batch, Key], tuple[TrainState, Scalars]]
    validate: Callable[[TrainState, Batch, Key], tuple[Scalars, Array]] | None
    cost: cost_lib.Cost
    steps_per_call: int


def decoded(batch: Batch) -> Batch:
    """Turns the image codes of a batch into float32; runs inside jit."""
    return dataclasses.replace(batch, image=intensity.decode(batch.image))


def abstract_state(method: Method, spec: Batch, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a method's train state, without computing it."""
    state = jax.eval_shape(_init(method, spec), jax.random.key(0))
    return mesh_lib.with_shardings(state, mesh)


def init(method: Method, spec: Batch, seed: int, mesh: Mesh) -> TrainState:
    """Initialises a train state on the mesh, without a copy on the host."""
    abstract = abstract_state(method, spec, mesh)
    make = jax.jit(
        _init(method, spec), out_shardings=mesh_lib.tree_shardings(abstract, mesh)
    )
    return make(run_key(seed, mesh))


def run_key(seed: int, mesh: Mesh) -> Key:
    """The key of a run on the mesh; step n trains with `fold_in(key, n)`."""
    # As plain numbers: keys cannot be placed on the devices of other processes.
    numbers = np.asarray(jax.random.key_data(jax.random.key(seed)))
    return jax.random.wrap_key_data(jax.device_put(numbers, mesh_lib.replicated(mesh)))


def build(
    method: Method,
    spec: Batch,
    validation: Sequence[Batch],
    mesh: Mesh,
    steps_per_call: int,
) -> Programs:
    """Compiles everything that the loop calls.

    Args:
      method: The method to train.
      spec: Shapes and dtypes of the global batch.
      validation: The fixed validation batches, all of one shape.
      mesh: The data mesh.
      steps_per_call: Steps scanned in one call of `update`.
    """
    state = abstract_state(method, spec, mesh)
    key = run_key(0, mesh)
    lowered = _update(method, spec, mesh, steps_per_call).lower(
        state, _stacked(spec, mesh, steps_per_call), key
    )
    update = lowered.compile()
    validate = None
    if validation:
        jitted = jax.jit(_validate(method), out_shardings=mesh_lib.replicated(mesh))
        validate = jitted.lower(state, validation[0], key).compile()
    return Programs(
        update=update,
        validate=validate,
        cost=cost_lib.estimate(lowered, update, state, mesh.size),
        steps_per_call=steps_per_call,
    )


def steps_per_call(wanted: int, mesh: Mesh) -> int:
    """What `train.steps_per_call` becomes on these devices."""
    if wanted > 1 and mesh.devices.flat[0].platform == "cpu":
        logging.warning(
            "train.steps_per_call = %d is taken as 1 on a CPU, where convolution "
            "gradients inside a scan run 20 to 40 times slower.",
            wanted,
        )
        return 1
    return wanted


def _init(method: Method, spec: Batch) -> Callable[[Key], TrainState]:
    def make(key: Key) -> TrainState:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), spec)
        return method.init(key, decoded(zeros))

    return make


def _update(method: Method, spec: Batch, mesh: Mesh, steps_per_call: int) -> Any:
    def step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Scalars]:
        key = jax.random.fold_in(key, state.step)
        return method.update(state, decoded(batch), key)

    def call(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Scalars]:
        if steps_per_call > 1:
            return jax.lax.scan(lambda s, b: step(s, b, key), state, batch)
        state, scalars = step(state, batch, key)
        return state, jax.tree.map(lambda scalar: scalar[None], scalars)

    whole = mesh_lib.replicated(mesh)
    rows = _rows(mesh, steps_per_call)
    return jax.jit(
        call,
        donate_argnums=0,
        in_shardings=(whole, jax.tree.map(lambda _: rows, spec), whole),
        out_shardings=whole,
    )


def _validate(method: Method) -> Callable[..., tuple[Scalars, Array]]:
    def run(state: TrainState, batch: Batch, key: Key) -> tuple[Scalars, Array]:
        scalars = method.validate(state.for_eval(), decoded(batch), key)
        return scalars, jnp.sum(batch.valid)

    return run


def _rows(mesh: Mesh, steps_per_call: int) -> NamedSharding:
    """Rows over the devices; they are axis 1 where the steps of a call are axis 0."""
    if steps_per_call == 1:
        return mesh_lib.batch_sharded(mesh)
    return NamedSharding(mesh, PartitionSpec(None, mesh_lib.AXIS))


def _stacked(spec: Batch, mesh: Mesh, steps_per_call: int) -> Batch:
    lead = () if steps_per_call == 1 else (steps_per_call,)
    rows = _rows(mesh, steps_per_call)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            (*lead, *leaf.shape), leaf.dtype, sharding=rows
        ),
        spec,
    )
