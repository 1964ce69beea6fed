"""The compiled programs of several runs that are trained as one.

Every leaf of the train state gains axis 0, the members. What they differ in are keys,
batches and float fields of the method's config: `jax.vmap` over `Method.update`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from uad_jax import cost as cost_lib
from uad_jax import mesh as mesh_lib
from uad_jax import programs
from uad_jax.data import placement
from uad_jax.methods.base import Method
from uad_jax.types import Array, Batch, Key, Scalars, TrainState, Tree

Number = TypeVar("Number", int, float)

# The method of one member. The argument is its place, a traced [] int32.
Make = Callable[[Array], Method]

_UNTRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def chosen(values: Sequence[Number], place: Array) -> Any:
    """One of several numbers, by a traced index.

    Args:
      values: One Python number per member.
      place: Index of the member, [] int32.

    Returns:
      The number itself if all are equal; else a traced scalar that takes part in
      arithmetic as a Python number does: bfloat16 times it is bfloat16.
    """
    if len(set(values)) == 1:
        return values[0]
    found: Any = values[-1]
    for index, value in enumerate(values[:-1]):
        found = jnp.where(place == index, value, found)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Together:
    """Compiled programs of M members.

    Attributes:
      programs: `update` takes and returns what belongs to all members: (state, batch
        [K * M, B, ...], keys [M]) -> (state, scalars each [K, M]). Its `validate` is
        None.
      part: (state, place) -> the train state of one member.
      joined: [M train states] -> the state of all.
      validate: (train state of one, batch, key, place) -> (scalars, number of valid
        rows); None without validation batches.
    """

    programs: programs.Programs
    part: Callable[[TrainState, int], TrainState]
    joined: Callable[[Sequence[TrainState]], TrainState]
    validate: Callable[[TrainState, Batch, Key, int], tuple[Scalars, Array]] | None


def keys(seeds: Sequence[int], mesh: Mesh) -> Key:
    """The keys of runs of these seeds on the mesh, [M]."""
    numbers = np.stack([jax.random.key_data(jax.random.key(seed)) for seed in seeds])
    return jax.random.wrap_key_data(jax.device_put(numbers, mesh_lib.replicated(mesh)))


def abstract_member(make: Make, spec: Batch, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the train state of one member.

    Raises:
      ValueError: If the method decides something in Python by the number in which the
        members differ.
    """
    try:
        state = jax.eval_shape(_init(make, spec), _place(), jax.random.key(0))
    except _UNTRACEABLE as error:
        raise ValueError(_untraceable(error)) from error
    return mesh_lib.with_shardings(state, mesh)


def init(make: Make, spec: Batch, seeds: Sequence[int], mesh: Mesh) -> TrainState:
    """Initialises all members on the mesh; one program."""
    every = jax.jit(
        jax.vmap(_init(make, spec)), out_shardings=mesh_lib.replicated(mesh)
    )
    return every(_places(len(seeds), mesh), keys(seeds, mesh))


def build(
    make: Make,
    num_members: int,
    spec: Batch,
    validation: Sequence[Batch],
    mesh: Mesh,
    steps_per_call: int,
) -> Together:
    """Compiles everything that the loop calls, each once for all members.

    Args:
      make: The methods.
      num_members: How many, M.
      spec: Shapes and dtypes of the global batch of one member.
      validation: Validation batches of one member, all of one shape.
      mesh: The data mesh.
      steps_per_call: Steps scanned in one call of `update`, K.

    Raises:
      ValueError: See `abstract_member`.
    """
    whole = mesh_lib.replicated(mesh)
    one = abstract_member(make, spec, mesh)
    every = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            (num_members, *leaf.shape), leaf.dtype, sharding=whole
        ),
        one,
    )
    rows = placement.sharding(mesh, stacked=True)
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            (steps_per_call * num_members, *leaf.shape), leaf.dtype, sharding=rows
        ),
        spec,
    )
    try:
        lowered = jax.jit(
            _update(make, num_members, steps_per_call),
            donate_argnums=0,
            in_shardings=(whole, jax.tree.map(lambda _: rows, spec), whole),
            out_shardings=whole,
        ).lower(every, batch, keys(range(num_members), mesh))
    except _UNTRACEABLE as error:
        raise ValueError(_untraceable(error)) from error
    update = lowered.compile()
    places = [jax.device_put(np.int32(place), whole) for place in range(num_members)]
    part = jax.jit(_part, out_shardings=whole).lower(every, places[0]).compile()
    join = jax.jit(_joined, out_shardings=whole)
    validate = None
    if validation:
        validate = (
            jax.jit(_validate(make), out_shardings=whole)
            .lower(one, validation[0], programs.run_key(0, mesh), places[0])
            .compile()
        )
    return Together(
        programs=programs.Programs(
            update=update,
            validate=None,
            cost=cost_lib.estimate(lowered, update, every, mesh.size),
            steps_per_call=steps_per_call,
        ),
        part=lambda state, place: part(state, places[place]),
        joined=lambda states: join(list(states)),
        validate=None
        if validate is None
        else lambda state, batch, key, place: validate(
            state, batch, key, places[place]
        ),
    )


def _init(make: Make, spec: Batch) -> Callable[[Array, Key], TrainState]:
    def one(place: Array, key: Key) -> TrainState:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), spec)
        return make(place).init(key, programs.decoded(zeros))

    return one


def _update(make: Make, num_members: int, steps_per_call: int) -> Callable[..., Any]:
    def one(
        place: Array, state: TrainState, batch: Batch, key: Key
    ) -> tuple[TrainState, Scalars]:
        key = jax.random.fold_in(key, state.step)
        return make(place).update(state, programs.decoded(batch), key)

    def step(state: TrainState, batch: Batch, keys: Key) -> tuple[TrainState, Scalars]:
        places = jnp.arange(num_members, dtype=jnp.int32)
        return jax.vmap(one)(places, state, batch, keys)

    def call(state: TrainState, batch: Batch, keys: Key) -> tuple[TrainState, Scalars]:
        if steps_per_call > 1:
            steps = jax.tree.map(
                lambda x: x.reshape(steps_per_call, num_members, *x.shape[1:]), batch
            )
            return jax.lax.scan(lambda s, b: step(s, b, keys), state, steps)
        state, scalars = step(state, batch, keys)
        return state, jax.tree.map(lambda scalar: scalar[None], scalars)

    return call


def _validate(make: Make) -> Callable[..., tuple[Scalars, Array]]:
    def run(
        state: TrainState, batch: Batch, key: Key, place: Array
    ) -> tuple[Scalars, Array]:
        method = make(place)
        scalars = method.validate(state.for_eval(), programs.decoded(batch), key)
        return scalars, jnp.sum(batch.valid)

    return run


def _part(state: TrainState, place: Array) -> TrainState:
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, place, keepdims=False), state
    )


def _joined(states: Sequence[TrainState]) -> TrainState:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def _place() -> Tree:
    return jax.ShapeDtypeStruct((), jnp.int32)


def _places(num_members: int, mesh: Mesh) -> Array:
    numbers = np.arange(num_members, dtype=np.int32)
    return jax.device_put(numbers, mesh_lib.replicated(mesh))


def _untraceable(error: Exception) -> str:
    return (
        "The members cannot share one program: the method decides something in Python "
        "by the number in which they differ. Train them as separate runs. (JAX: "
        f"{str(error).splitlines()[0]})"
    )
