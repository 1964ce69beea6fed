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
from uad_jax import train, types, warm_start
from uad_jax.methods import base, spark

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


def _active(batch: types.Batch) -> jax.Array:
    """The cells that the loss shows."""
    keys = base.sample_keys(KEY, batch.uid, batch.slice_index)
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
    return spark.draw_cells(CONFIG, keys, batch.image.shape)


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
    run = jax.jit(functools.partial(spark.loss, CONFIG, train=False))
    value, collections = run(model, batch, KEY)
    jax.tree.map(np.testing.assert_array_equal, collections, model.collections)

    active = _active(batch)

    @jax.jit
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


def test_hidden_cells_are_target_only_and_seen_cells_input_only() -> None:
    batch, model = _batch(), _model()
    active = _active(batch)
    hidden = ~jnp.repeat(jnp.repeat(active, 32, 1), 32, 2)[..., None]
    variables = {"params": model.params["spark"], **model.collections["spark"]}
    network = spark._network(CONFIG, batch.image.shape)

    @jax.jit
    def errors(image: jax.Array) -> jax.Array:
        """Squared error of each pixel."""
        return jnp.square(jnp.asarray(network.apply(variables, image, active)) - image)

    run = jax.jit(functools.partial(spark.loss, CONFIG, train=False))
    for image in (batch.image, jnp.where(hidden, 0.5, batch.image)):
        value = run(model, dataclasses.replace(batch, image=image), KEY)[0]
        expected = jnp.where(hidden, errors(image), 0).sum() / hidden.sum()
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    # What is hidden does not reach the output.
    output = jax.jit(lambda image: jnp.asarray(network.apply(variables, image, active)))
    np.testing.assert_array_equal(
        output(batch.image), output(jnp.where(hidden, 0.5, batch.image))
    )


def test_blocks_are_skipped_in_training_alone() -> None:
    batch, model = _batch(), _model()
    still = dataclasses.replace(CONFIG, drop_path=0.0)
    values = {
        (config.drop_path, train): float(
            jax.jit(functools.partial(spark.loss, config, train=train))(
                model, batch, KEY
            )[0]
        )
        for config in (CONFIG, still)
        for train in (True, False)
    }
    assert values[0.5, True] != values[0.0, True]
    assert values[0.5, False] == values[0.0, False]


def test_training_moves_the_statistics() -> None:
    model = _model()
    run = jax.jit(functools.partial(spark.loss, CONFIG, train=True))
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


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return stores.tiny_store(tmp_path_factory.mktemp("spark"), grid=(3, 64, 64, 1))


@pytest.fixture(scope="module")
def pretrained(
    store: pathlib.Path, tmp_path_factory: pytest.TempPathFactory, mesh1: Mesh
) -> tuple[pathlib.Path, types.ModelState]:
    """A pretraining run of two steps, and its model."""
    directory = tmp_path_factory.mktemp("pretrained") / "run"
    config = _experiment(store, CONFIG, 2)
    train.train(config, directory, mesh=mesh1)
    return directory, runs.final_state(config, directory, mesh1).for_eval()


def _experiment(store: pathlib.Path, method: Any, steps: int) -> Any:
    config = runs.scale_config(store)
    config.method, config.total_steps, config.batch_size = method, steps, 4
    config.train.eval_every = config.train.save_every = steps
    return config


def test_a_pretrained_backbone_starts_the_condition_encoder(
    store: pathlib.Path,
    pretrained: tuple[pathlib.Path, types.ModelState],
    tmp_path: pathlib.Path,
    mesh1: Mesh,
) -> None:
    directory, source = pretrained
    config = _experiment(store, denoisers.cddpm_config(), 1)
    config.method.optimizer.learning_rate = 1e-12
    config.train.warm_start = [
        config_lib.WarmStart(str(directory), 2, "spark/backbone", "encoder/backbone")
    ]
    train.train(config, tmp_path, mesh=mesh1)
    target = runs.final_state(config, tmp_path, mesh1).model
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7),
        target.params["encoder"]["backbone"],
        source.params["spark"]["backbone"],
    )


def test_a_backbone_is_taken_with_its_statistics(
    pretrained: tuple[pathlib.Path, types.ModelState], mesh1: Mesh
) -> None:
    directory, source = pretrained
    state = jax.jit(denoisers.cddpm_config().make(RUN).init)(KEY, _batch())
    entry = (directory, 2, "spark/backbone", "encoder/backbone")
    state, fresh = warm_start.warm_start(state, [entry], mesh1)
    assert all("/denoiser/" in path or "/fc/" in path for path in fresh)
    for found, expected in (
        (state.model.params["encoder"], source.params["spark"]),
        (
            state.model.collections["encoder"]["batch_stats"],
            source.collections["spark"]["batch_stats"],
        ),
    ):
        jax.tree.map(
            np.testing.assert_array_equal, found["backbone"], expected["backbone"]
        )
