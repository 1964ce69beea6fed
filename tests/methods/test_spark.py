import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from tests import denoisers, runs, stores
from uad_jax import config as config_lib
from uad_jax import train, types
from uad_jax.methods import base, spark

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
RUN = base.RunShape(total_steps=10, steps_per_epoch=5, global_batch=4)
KEY = jax.random.key(3)
CONFIG = denoisers.spark_config()


def _batch(side: int = 64) -> types.Batch:
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.random((4, side, side, 1)), jnp.float32)
    return dataclasses.replace(denoisers.batch(), image=image, mask=image > 0)


@functools.cache
def _model() -> types.ModelState:
    shapes = jax.eval_shape(CONFIG.make(RUN).init, KEY, _batch()).model
    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        x = 0.3 * rng.standard_normal(leaf.shape)
        return jnp.asarray(np.abs(x) if path[-1].key == "var" else x, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize(("side", "ratio", "seen"), [(96, 0.65, 3), (64, 0.25, 3)])
def test_every_slice_shows_as_many_cells_and_each_cell_as_often(
    side: int, ratio: float, seen: int
) -> None:
    config = dataclasses.replace(CONFIG, mask_ratio=ratio)
    keys = jax.random.split(KEY, 3000)
    active = np.asarray(spark.draw_cells(config, keys, (3000, side, side, 1)))
    assert (active.sum(axis=(1, 2)) == seen).all()
    share = seen / active[0].size
    # Five standard errors of a share of 3000 draws.
    tolerance = 5 * np.sqrt(share * (1 - share) / 3000)
    np.testing.assert_allclose(active.mean(axis=0), share, atol=tolerance)


def test_loss_is_the_squared_error_of_the_hidden_cells() -> None:
    batch, model = _batch(), _model()
    run = jit(functools.partial(spark.loss, CONFIG, train=False))
    value, collections = run(model, batch, KEY)
    jax.tree.map(np.testing.assert_array_equal, collections, model.collections)

    keys = base.sample_keys(KEY, batch.uid, batch.slice_index)
    active = spark.draw_cells(CONFIG, keys, batch.image.shape)

    @jit
    def output(image: jax.Array) -> jax.Array:
        variables = {"params": model.params["spark"], **model.collections["spark"]}
        return jnp.asarray(
            spark._network(CONFIG, image.shape).apply(variables, image, active)
        )

    errors = []
    found = np.asarray(output(batch.image))
    for n in range(4):
        for row, column in np.argwhere(~np.asarray(active[n])):
            cell = np.s_[n, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
            errors.append(np.square(found[cell] - np.asarray(batch.image)[cell]))
    assert len(errors) == 4 * 3
    np.testing.assert_allclose(value, np.mean(errors), rtol=1e-5)


def test_what_is_seen_has_no_error_of_its_own() -> None:
    """Only the hidden cells of the target count, and only the seen ones are input."""
    batch, model = _batch(), _model()
    keys = base.sample_keys(KEY, batch.uid, batch.slice_index)
    active = spark.draw_cells(CONFIG, keys, batch.image.shape)
    hidden = ~jnp.repeat(jnp.repeat(active, 32, 1), 32, 2)[..., None]
    gradient = jit(
        jax.grad(
            lambda image: spark.loss(
                CONFIG, model, dataclasses.replace(batch, image=image), KEY, False
            )[0]
        )
    )(batch.image)
    assert (jnp.abs(gradient) * hidden).sum() > 0
    flat = dataclasses.replace(batch, image=jnp.where(hidden, 0.0, batch.image))
    run = jit(functools.partial(spark.loss, CONFIG, train=False))
    assert float(run(model, flat, KEY)[0]) != float(run(model, batch, KEY)[0])


def test_training_moves_the_statistics() -> None:
    model = _model()
    run = jit(functools.partial(spark.loss, CONFIG, train=True))
    _, collections = run(model, _batch(), KEY)
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()), collections, model.collections
    )
    assert all(jax.tree.leaves(moved))


def test_slices_without_whole_cells_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 32; the image is 48x48"):
        CONFIG.make(RUN).init(KEY, _batch(48))
    with pytest.raises(ValueError, match="of the 1x1 cells of a slice 0 would be seen"):
        spark.draw_cells(CONFIG, KEY[None], (1, 32, 32, 1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio is 1.0"),
        ({"stage_sizes": (1, 1)}, r"stage_sizes is \(1, 1\)"),
        ({"decoder_width": 48}, "decoder_width 48"),
        ({"accumulate_steps": 0}, "accumulate_steps is 0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
    ],
)
def test_settings_that_cannot_work_are_named(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **changes).validate()


def test_a_pretrained_backbone_starts_the_condition_encoder(
    tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    grid = (3, 64, 64, 1)
    store = stores.tiny_store(tmp_path / "store", grid=grid)

    def experiment(method: base.MethodConfig, steps: int) -> Any:
        config = runs.scale_config(store)
        config.method, config.total_steps = method, steps
        config.batch_size = 4
        config.train.eval_every = config.train.save_every = steps
        return config

    pretraining = experiment(CONFIG, 2)
    train.train(pretraining, tmp_path / "spark", mesh=mesh1)
    source = runs.final_state(pretraining, tmp_path / "spark", mesh1).for_eval()

    conditioned = experiment(denoisers.cddpm_config(), 1)
    conditioned.method.optimizer.learning_rate = 1e-12
    conditioned.train.warm_start = [
        config_lib.WarmStart(
            str(tmp_path / "spark"), 2, "spark/backbone", "encoder/backbone"
        )
    ]
    train.train(conditioned, tmp_path / "cddpm", mesh=mesh1)
    target = runs.final_state(conditioned, tmp_path / "cddpm", mesh1).model
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7),
        target.params["encoder"]["backbone"],
        source.params["spark"]["backbone"],
    )
    # The statistics went on from those of the pretraining.
    found = target.collections["encoder"]["batch_stats"]["backbone"]["bn1"]["mean"]
    before = source.collections["spark"]["batch_stats"]["backbone"]["bn1"]["mean"]
    assert (found != before).any()
    np.testing.assert_allclose(found, before, atol=0.2)
    assert (target.params["encoder"]["fc"]["kernel"] != 0).any()
