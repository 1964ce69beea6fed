"""The contract of every method: one row of the table per method configuration."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from tests.contract import table
from tests.contract.table import ROWS, RUN, TABLE
from uad_jax import checkpoint, types
from uad_jax import mesh as mesh_lib
from uad_jax.methods import base

SCORERS = [name for name, row in TABLE.items() if row.config.make(RUN).score]


def _rows(names: list[str], by_hand: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Parametrises a claim by rows; those `by_hand` are slow like `Row.slow`."""
    slow = {name: TABLE[name].slow or name in by_hand for name in names}
    marks = {name: [pytest.mark.slow] if slow[name] else [] for name in names}
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=marks[name]) for name in names]
    )


every_method = _rows(list(TABLE))
# Claims that compile another training step, which takes these rows longest.
every_small_method = _rows(list(TABLE), by_hand=("spark", "cddpm", "anoddpm"))
every_scorer = _rows(SCORERS)
every_prior = _rows(
    [name for name, row in TABLE.items() if row.config.make(RUN).reconstruct]
)


class Compiled(NamedTuple):
    """Jitted functions of one method, shared by all claims."""

    init: Callable
    update: Callable
    validate: Callable
    score: Callable | None


@functools.cache
def _compiled(name: str) -> Compiled:
    method = TABLE[name].config.make(RUN)
    return Compiled(
        *(jax.jit(f) for f in (method.init, method.update, method.validate)),
        score=jax.jit(method.score) if method.score else None,
    )


def _steps(
    name: str, batch: types.Batch, count: int = 3, seed: int = 0
) -> tuple[types.TrainState, types.Scalars]:
    run = _compiled(name)
    key = jax.random.key(seed)
    state = run.init(jax.random.fold_in(key, 1_000_000), batch)
    scalars: types.Scalars = {}
    for step in range(count):
        state, scalars = run.update(state, batch, jax.random.fold_in(key, step))
    return state, scalars


_trained = functools.cache(lambda name: _steps(name, table.batch(name)))


def _score(name: str, volumes: types.Volumes) -> types.Scores:
    score = _compiled(name).score
    assert score is not None
    return score(_trained(name)[0].for_eval(), volumes, jax.random.key(9))


_scored = functools.cache(lambda name: _score(name, table.volumes(name)))


def _assert_equal(a: types.Tree, b: types.Tree) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def _assert_close(a: types.Tree, b: types.Tree, rtol: float = 1e-4) -> None:
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=3e-5), a, b
    )


def _with(config: Any, path: str, value: Any) -> Any:
    head, _, rest = path.partition(".")
    if rest:
        value = _with(getattr(config, head), rest, value)
    return dataclasses.replace(config, **{head: value})


def _changed(config: Any, values: dict[str, Any]) -> Any:
    """Replaces fields given by their dotted paths."""
    for path, value in values.items():
        config = _with(config, path, value)
    return config


@every_method
def test_shapes(name: str) -> None:
    method = TABLE[name].config.make(RUN)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(method.init, key, table.batch(name))
    after, scalars = jax.eval_shape(method.update, state, table.batch(name), key)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert {"loss", "grad_norm"} <= set(scalars)
    checked = jax.eval_shape(method.validate, state.for_eval(), table.batch(name), key)
    assert "loss" in checked
    for scalar in [*scalars.values(), *checked.values()]:
        assert (scalar.shape, scalar.dtype) == ((), jnp.float32)


@every_scorer
def test_shapes_of_scores(name: str) -> None:
    method = TABLE[name].config.make(RUN)
    assert method.score is not None
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(method.init, key, table.batch(name))
    scores = jax.eval_shape(method.score, state.for_eval(), table.volumes(name), key)
    shape = table.volumes(name).image.shape
    assert scores.anomaly_map.shape == shape[:-1]
    assert scores.slice_score.shape == shape[:2]
    assert scores.volume_score.shape == shape[:1]
    assert scores.reconstruction is None or scores.reconstruction.shape == shape
    for leaf in jax.tree.leaves(scores):
        assert leaf.dtype == jnp.float32


def test_only_pretraining_has_no_score() -> None:
    assert set(TABLE) - set(SCORERS) == {"spark", "fanogan_gan"}


@every_method
def test_config_is_valid(name: str) -> None:
    TABLE[name].config.validate()


@every_method
def test_same_seed_gives_the_same_bits_and_another_seed_does_not(name: str) -> None:
    _assert_equal(_trained(name), _steps(name, table.batch(name)))
    other = _steps(name, table.batch(name), count=1, seed=1)[0]
    assert any(
        (a != b).any()
        for a, b in zip(
            jax.tree.leaves(other.model),
            jax.tree.leaves(_trained(name)[0].model),
            strict=True,
        )
    )


@every_method
def test_a_restored_checkpoint_goes_on_to_the_same_bits(
    name: str, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    batch, key = table.batch(name), jax.random.key(0)
    state, _ = _steps(name, batch, count=2)
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(2, state, metrics=None)
        abstract = mesh_lib.with_shardings(jax.eval_shape(lambda: state), mesh1)
        restored, _ = checkpoints.restore(abstract)
    # As fresh arrays, so that the compiled update takes them.
    restored = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, restored))
    again = _compiled(name).update(restored, batch, jax.random.fold_in(key, 2))
    _assert_equal(again, _trained(name))


@every_method
def test_one_device_equals_eight(name: str, mesh8: Mesh) -> None:
    sharding = mesh_lib.batch_sharded(mesh8)
    batch = jax.device_put(table.batch(name), sharding)
    run, key = _compiled(name), jax.random.key(0)
    state = run.init(jax.random.fold_in(key, 1_000_000), table.batch(name))
    state = jax.device_put(state, mesh_lib.tree_shardings(state, mesh8))
    for step in range(3):
        state, scalars = run.update(state, batch, jax.random.fold_in(key, step))
    assert len(scalars["loss"].sharding.device_set) == 8
    _assert_close((state.model, scalars), (_trained(name)[0].model, _trained(name)[1]))


@every_scorer
def test_scores_of_one_device_equal_those_of_eight(name: str, mesh8: Mesh) -> None:
    sharding = mesh_lib.batch_sharded(mesh8)
    score, state = _compiled(name).score, _trained(name)[0]
    assert score is not None
    state = jax.device_put(state, mesh_lib.tree_shardings(state, mesh8))
    volumes = jax.device_put(table.volumes(name), sharding)
    scores = score(state.for_eval(), volumes, jax.random.key(9))
    assert scores.anomaly_map.sharding.is_equivalent_to(sharding, 4)
    _assert_close(scores, _scored(name))


@every_method
def test_place_in_the_batch_is_irrelevant(name: str) -> None:
    order = np.random.default_rng(0).permutation(ROWS)
    shuffled = jax.tree.map(lambda x: x[order], table.batch(name))
    state, scalars = _steps(name, shuffled)
    _assert_close((state.model, scalars), (_trained(name)[0].model, _trained(name)[1]))


@every_scorer
def test_place_in_the_batch_is_irrelevant_to_scores(name: str) -> None:
    order = np.random.default_rng(0).permutation(ROWS)
    shuffled = jax.tree.map(lambda x: x[order], table.volumes(name))
    scores = _score(name, shuffled)
    _assert_close(scores, jax.tree.map(lambda x: x[order], _scored(name)))


@every_prior
def test_a_prior_depends_on_neither_place_nor_devices(name: str, mesh8: Mesh) -> None:
    method, batch = TABLE[name].config.make(RUN), table.batch(name)
    assert method.reconstruct is not None
    reconstruct = jax.jit(method.reconstruct)
    model = _trained(name)[0].for_eval()
    keys = base.sample_keys(jax.random.key(4), batch.uid, batch.slice_index)
    rows = (batch.image, batch.mask, keys)
    expected = reconstruct(model, *rows)
    assert expected.shape == batch.image.shape
    order = np.random.default_rng(1).permutation(ROWS)
    shuffled = jax.tree.map(lambda x: x[order], rows)
    shuffled = jax.device_put(shuffled, mesh_lib.batch_sharded(mesh8))
    model = jax.device_put(model, mesh_lib.tree_shardings(model, mesh8))
    _assert_close(reconstruct(model, *shuffled), expected[order])


@every_method
def test_padding_is_irrelevant(name: str) -> None:
    half = ROWS // 2
    keep = jnp.arange(ROWS) < half
    padded = table.only(table.batch(name), keep)

    def garbage(x: jax.Array, fill: float) -> jax.Array:
        return jnp.where(keep.reshape(-1, *[1] * (x.ndim - 1)), x, fill)

    other = dataclasses.replace(
        padded, image=garbage(padded.image, 7.0), uid=garbage(padded.uid, -1)
    )
    one, two = _steps(name, padded), _steps(name, other)
    _assert_close((one[0].model, one[1]), (two[0].model, two[1]))
    run, model = _compiled(name), _trained(name)[0].for_eval()
    _assert_close(
        run.validate(model, padded, jax.random.key(2)),
        run.validate(
            model, jax.tree.map(lambda x: x[:half], padded), jax.random.key(2)
        ),
    )


@every_scorer
def test_padding_is_irrelevant_to_scores(name: str) -> None:
    deeper = jax.tree.map(
        lambda x: (
            jnp.pad(x, [(0, 0), (0, 2)] + [(0, 0)] * (x.ndim - 2)) if x.ndim > 1 else x
        ),
        table.volumes(name),
    )
    scores = _score(name, deeper)
    depth = table.volumes(name).valid.shape[1]
    _assert_close(scores.anomaly_map[:, :depth], _scored(name).anomaly_map)
    _assert_close(scores.volume_score, _scored(name).volume_score)
    assert (scores.slice_score[:, depth:] == 0).all()


@every_method
def test_one_batch_is_overfitted_within_300_steps(name: str) -> None:
    row = TABLE[name]
    method = dataclasses.replace(row.config, **row.overfit).make(RUN)
    batch = table.batch(name)
    state = jax.jit(method.init)(jax.random.key(0), batch)
    first = jax.jit(method.validate)(state.for_eval(), batch, jax.random.key(1))
    # The one program that runs longer than it takes to optimise it.
    optimised = {"xla_backend_optimization_level": 3}
    update = jax.jit(method.update, donate_argnums=0, compiler_options=optimised)
    for step in range(RUN.total_steps):
        state, _ = update(state, batch, jax.random.key(step))
    last = jax.jit(method.validate)(state.for_eval(), batch, jax.random.key(1))
    assert last[row.reconstruction] <= row.overfit_bound * first[row.reconstruction]


@functools.cache
def _members(name: str) -> Callable:
    """One compiled step of several members: (states, keys, float fields)."""

    def update(state: types.TrainState, key: types.Key, values: dict) -> tuple:
        method = _changed(TABLE[name].config, values).make(RUN)
        return method.update(state, table.batch(name), key)

    return jax.jit(jax.vmap(update))


def _run_members(
    name: str, states: types.TrainState, keys: types.Key, values: dict[str, jax.Array]
) -> tuple:
    for step in range(2):
        folded = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        states, scalars = _members(name)(states, folded, values)
    return states.model, scalars


def _member(tree: types.Tree, index: int) -> types.Tree:
    return jax.tree.map(lambda x: x[index], tree)


@every_small_method
def test_vmap_over_seeds_equals_separate_runs(name: str) -> None:
    seeds = (0, 1)
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    init = jax.jit(jax.vmap(TABLE[name].config.make(RUN).init, in_axes=(0, None)))
    states = init(
        jax.vmap(jax.random.fold_in, (0, None))(keys, 1_000_000), table.batch(name)
    )
    fields = TABLE[name].float_fields
    values = {path: jnp.full(2, pair[0]) for path, pair in fields.items()}
    together = _run_members(name, states, keys, values)
    for i, seed in enumerate(seeds):
        state, scalars = _steps(name, table.batch(name), count=2, seed=seed)
        _assert_close(_member(together, i), (state.model, scalars), rtol=1e-3)


@every_method
def test_vmap_over_float_fields_equals_separate_runs(name: str) -> None:
    config, batch, key = TABLE[name].config, table.batch(name), jax.random.key(0)
    fields = TABLE[name].float_fields
    start = _compiled(name).init(jax.random.fold_in(key, 1_000_000), batch)
    states = jax.tree.map(lambda x: jnp.stack([x, x]), start)
    values = {path: jnp.array(pair) for path, pair in fields.items()}
    together = _run_members(name, states, jnp.stack([key, key]), values)
    # The first values are those of the config, whose programs are compiled already.
    second = _changed(config, {path: pair[1] for path, pair in fields.items()})
    updates = (_compiled(name).update, jax.jit(second.make(RUN).update))
    losses = []
    for i, update in enumerate(updates):
        state = start
        for step in range(2):
            state, scalars = update(state, batch, jax.random.fold_in(key, step))
        _assert_close(_member(together, i), (state.model, scalars), rtol=1e-3)
        losses.append(scalars["loss"])
    assert losses[0] != losses[1]


@every_small_method
def test_accumulation_equals_the_whole_batch(name: str) -> None:
    row, batch = TABLE[name], table.batch(name)
    method = dataclasses.replace(row.config, accumulate_steps=2).make(RUN)
    if row.batch_statistics:
        # Of two equal halves, whose statistics are those of the whole.
        batch = jax.tree.map(lambda x: jnp.repeat(x[: ROWS // 2], 2, axis=0), batch)
    else:
        batch = table.only(batch, jnp.arange(ROWS) != 2)
    state = _compiled(name).init(jax.random.key(0), batch)
    whole = _compiled(name).update(state, batch, jax.random.key(1))
    parts = jax.jit(method.update)(state, batch, jax.random.key(1))
    _assert_close((whole[0].model.params, whole[1]), (parts[0].model.params, parts[1]))
