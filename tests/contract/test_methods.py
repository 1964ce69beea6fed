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

from configs import smoke
from tests import denoisers
from uad_jax import checkpoint, denoising_config, optim, types
from uad_jax import mesh as mesh_lib
from uad_jax.methods import base
from uad_jax.methods.autoencoder import Variant
from uad_jax.ops import losses, noise

SIZE = 16
ROWS = 8
RUN = base.RunShape(total_steps=300, steps_per_epoch=10, global_batch=ROWS)


class Row(NamedTuple):
    """One method in the table.

    Attributes:
      config: Tiny, with every random part switched on.
      overfit: Changes for the overfit claim (no dropout, a larger learning rate).
      reconstruction: Scalar that must fall to 5 % when overfitting.
      float_fields: Float fields that may be vmapped, as paths, with two values; the
        first is the config's own.
    """

    config: base.MethodConfig
    overfit: dict[str, Any]
    reconstruction: str
    float_fields: dict[str, tuple[float, float]]


def _autoencoder(variant: Variant) -> Row:
    fields = {
        "optimizer.learning_rate": (1e-3, 3e-3),
        "optimizer.clip_norm": (100.0, 1.0),
        "dropout": (0.1, 0.3),
    }
    if variant is Variant.VAE:
        fields["kl_weight"] = (1.0, 10.0)
    return Row(
        config=smoke.get_config(f"variant={variant.value}").method,
        # The KL term of a VAE is the price of every bit it stores: with the weight 1
        # it will not memorise a batch, so the overfit claim takes a small one.
        overfit={
            "dropout": 0.0,
            "kl_weight": 1e-3,
            "width": 32,
            "max_width": 64,
            "intermediate_resolution": 4,
            "latent_size": 32,
            "ema_decay": 0.0,
            "optimizer": optim.OptimizerConfig(
                learning_rate=2e-3, schedule=optim.Schedule.COSINE
            ),
        },
        reconstruction="reconstruction",
        float_fields=fields,
    )


def _diffusion(config: Any, **process: Any) -> Row:
    """A diffusion method; `process` makes the overfit claim possible.

    Heavily noised slices cannot be told apart, so it trains on lightly noised ones.
    """
    changes = {"pixel_loss": losses.PixelLoss.L2, **process}
    return Row(
        config=config,
        overfit={
            "unet": denoising_config.UNetConfig(
                width=16, multipliers=(1,), num_blocks=0, head_size=16
            ),
            "process": dataclasses.replace(config.process, **changes),
            "ema_decay": 0.0,
            "optimizer": optim.OptimizerConfig(
                learning_rate=5e-3, schedule=optim.Schedule.COSINE
            ),
        },
        reconstruction="loss",
        float_fields={
            "optimizer.learning_rate": (1e-3, 3e-3),
            "optimizer.clip_norm": (config.optimizer.clip_norm, 0.1),
            "ema_decay": (0.9, 0.5),
        },
    )


TABLE = {variant.value: _autoencoder(variant) for variant in Variant}
TABLE["ddpm"] = _diffusion(denoisers.ddpm_config(), train_steps=100)
TABLE["anoddpm"] = _diffusion(denoisers.anoddpm_config(), noise=noise.Noise.GAUSSIAN)
TABLE["pddpm"] = _diffusion(denoisers.pddpm_config(), train_steps=100)
every_method = pytest.mark.parametrize("name", list(TABLE))


def _brains(rows: int) -> jax.Array:
    """Smooth blobs on black, [rows, SIZE, SIZE, 1] in [0, 1]."""
    rng = np.random.default_rng(0)
    centre = rng.uniform(5, 11, (rows, 2, 1, 1))
    radius = rng.uniform(3, 6, (rows, 1, 1))
    y, x = np.mgrid[:SIZE, :SIZE]
    distance = np.hypot(y - centre[:, 0], x - centre[:, 1])
    image = np.clip(1.5 - distance / radius, 0, 1) * rng.uniform(0.6, 1, (rows, 1, 1))
    return jnp.asarray(image[..., None], jnp.float32)


@functools.cache
def _batch() -> types.Batch:
    image = _brains(ROWS)
    return types.Batch(
        image=image,
        mask=image > 0,
        valid=jnp.ones(ROWS, bool),
        uid=jnp.arange(ROWS) // 2,
        slice_index=jnp.arange(ROWS) % 2 + 3,
    )


@functools.cache
def _volumes() -> types.Volumes:
    image = _brains(ROWS * 3).reshape(ROWS, 3, SIZE, SIZE, 1)
    return types.Volumes(
        image=image,
        mask=image > 0,
        valid=jnp.ones((ROWS, 3), bool),
        uid=jnp.arange(ROWS),
    )


class Compiled(NamedTuple):
    """Jitted functions of one method, shared by all claims."""

    init: Callable
    update: Callable
    validate: Callable
    score: Callable


@functools.cache
def _compiled(name: str) -> Compiled:
    method = TABLE[name].config.make(RUN)
    assert method.score is not None
    return Compiled(
        *(jax.jit(f) for f in (method.init, method.update)),
        *(jax.jit(f) for f in (method.validate, method.score)),
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


_trained = functools.cache(lambda name: _steps(name, _batch()))
_scored = functools.cache(
    lambda name: _compiled(name).score(
        _trained(name)[0].for_eval(), _volumes(), jax.random.key(9)
    )
)


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
    assert method.score is not None
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(method.init, key, _batch())
    after, scalars = jax.eval_shape(method.update, state, _batch(), key)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert {"loss", "grad_norm"} <= set(scalars)
    checked = jax.eval_shape(method.validate, state.for_eval(), _batch(), key)
    assert "loss" in checked
    for scalar in [*scalars.values(), *checked.values()]:
        assert (scalar.shape, scalar.dtype) == ((), jnp.float32)
    scores = jax.eval_shape(method.score, state.for_eval(), _volumes(), key)
    shape = _volumes().image.shape
    assert scores.anomaly_map.shape == shape[:-1]
    assert scores.slice_score.shape == shape[:2]
    assert scores.volume_score.shape == shape[:1]
    assert scores.reconstruction is None or scores.reconstruction.shape == shape
    for leaf in jax.tree.leaves(scores):
        assert leaf.dtype == jnp.float32


@every_method
def test_config_is_valid(name: str) -> None:
    TABLE[name].config.validate()


@every_method
def test_same_seed_gives_the_same_bits_and_another_seed_does_not(name: str) -> None:
    _assert_equal(_trained(name), _steps(name, _batch()))
    other = _steps(name, _batch(), count=1, seed=1)[0]
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
    batch, key = _batch(), jax.random.key(0)
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
    batch = jax.device_put(_batch(), sharding)
    run, key = _compiled(name), jax.random.key(0)
    state = run.init(jax.random.fold_in(key, 1_000_000), _batch())
    state = jax.device_put(state, mesh_lib.tree_shardings(state, mesh8))
    for step in range(3):
        state, scalars = run.update(state, batch, jax.random.fold_in(key, step))
    assert len(scalars["loss"].sharding.device_set) == 8
    _assert_close((state.model, scalars), (_trained(name)[0].model, _trained(name)[1]))
    scores = run.score(
        state.for_eval(), jax.device_put(_volumes(), sharding), jax.random.key(9)
    )
    assert scores.anomaly_map.sharding.is_equivalent_to(sharding, 4)
    _assert_close(scores, _scored(name))


@every_method
def test_place_in_the_batch_is_irrelevant(name: str) -> None:
    order = np.random.default_rng(0).permutation(ROWS)
    shuffled = jax.tree.map(lambda x: x[order], _batch())
    state, scalars = _steps(name, shuffled)
    _assert_close((state.model, scalars), (_trained(name)[0].model, _trained(name)[1]))
    scores = _compiled(name).score(
        _trained(name)[0].for_eval(),
        jax.tree.map(lambda x: x[order], _volumes()),
        jax.random.key(9),
    )
    _assert_close(scores, jax.tree.map(lambda x: x[order], _scored(name)))


@every_method
def test_padding_is_irrelevant(name: str) -> None:
    half = ROWS // 2
    keep = jnp.arange(ROWS) < half
    padded = dataclasses.replace(_batch(), valid=keep)

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
    volumes = _volumes()
    deeper = jax.tree.map(
        lambda x: (
            jnp.pad(x, [(0, 0), (0, 2)] + [(0, 0)] * (x.ndim - 2)) if x.ndim > 1 else x
        ),
        volumes,
    )
    scores = run.score(model, deeper, jax.random.key(9))
    _assert_close(scores.anomaly_map[:, :3], _scored(name).anomaly_map)
    _assert_close(scores.volume_score, _scored(name).volume_score)
    assert (scores.slice_score[:, 3:] == 0).all()


@every_method
def test_one_batch_is_overfitted_within_300_steps(name: str) -> None:
    row = TABLE[name]
    method = dataclasses.replace(row.config, **row.overfit).make(RUN)
    batch = _batch()
    state = jax.jit(method.init)(jax.random.key(0), batch)
    first = jax.jit(method.validate)(state.for_eval(), batch, jax.random.key(1))
    update = jax.jit(method.update, donate_argnums=0)
    for step in range(RUN.total_steps):
        state, _ = update(state, batch, jax.random.key(step))
    last = jax.jit(method.validate)(state.for_eval(), batch, jax.random.key(1))
    assert last[row.reconstruction] <= 0.05 * first[row.reconstruction]


@functools.cache
def _members(name: str) -> Callable:
    """One compiled step of several members: (states, keys, float fields)."""

    def update(state: types.TrainState, key: types.Key, values: dict) -> tuple:
        method = _changed(TABLE[name].config, values).make(RUN)
        return method.update(state, _batch(), key)

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


@every_method
def test_vmap_over_seeds_equals_separate_runs(name: str) -> None:
    seeds = (0, 1)
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    init = jax.jit(jax.vmap(TABLE[name].config.make(RUN).init, in_axes=(0, None)))
    states = init(jax.vmap(jax.random.fold_in, (0, None))(keys, 1_000_000), _batch())
    fields = TABLE[name].float_fields
    values = {path: jnp.full(2, pair[0]) for path, pair in fields.items()}
    together = _run_members(name, states, keys, values)
    for i, seed in enumerate(seeds):
        state, scalars = _steps(name, _batch(), count=2, seed=seed)
        _assert_close(_member(together, i), (state.model, scalars), rtol=1e-3)


@every_method
def test_vmap_over_float_fields_equals_separate_runs(name: str) -> None:
    config, batch, key = TABLE[name].config, _batch(), jax.random.key(0)
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


@every_method
def test_accumulation_equals_the_whole_batch(name: str) -> None:
    config = TABLE[name].config
    if not hasattr(config, "accumulate_steps"):
        pytest.skip("this method does not accumulate")
    method = dataclasses.replace(config, accumulate_steps=2).make(RUN)
    batch = dataclasses.replace(_batch(), valid=jnp.arange(ROWS) != 2)
    state = _compiled(name).init(jax.random.key(0), batch)
    whole = _compiled(name).update(state, batch, jax.random.key(1))
    parts = jax.jit(method.update)(state, batch, jax.random.key(1))
    _assert_close((whole[0].model, whole[1]), (parts[0].model, parts[1]))
