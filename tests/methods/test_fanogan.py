import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import adversaries, denoisers
from uad_jax import types
from uad_jax.compat import Compat
from uad_jax.methods import base, fanogan

GAN = adversaries.gan_config()
CONFIG = adversaries.fanogan_config()
RUN = base.RunShape(total_steps=10, steps_per_epoch=5, global_batch=4)
BATCH = denoisers.batch()


@functools.cache
def _update(compat: Compat = Compat.NONE) -> Any:
    """(state, learning rates of generator and critic) -> what a step returns."""
    config = dataclasses.replace(GAN, compat=compat)

    def update(state: types.TrainState, rate: Any, critic_rate: Any) -> Any:
        own = dataclasses.replace(GAN.optimizer, learning_rate=rate)
        theirs = dataclasses.replace(GAN.optimizer, learning_rate=critic_rate)
        critic = dataclasses.replace(GAN.critic, optimizer=theirs)
        changed = dataclasses.replace(config, optimizer=own, critic=critic)
        return changed.make(RUN).update(state, BATCH, jax.random.key(1))

    return jax.jit(update)


@functools.cache
def _gan() -> types.TrainState:
    return jax.jit(GAN.make(RUN).init)(jax.random.key(0), BATCH)


@functools.cache
def _model() -> types.ModelState:
    names = ("encoder", "generator", "critic")
    init = functools.partial(fanogan.init_model, CONFIG, names)
    return jax.jit(init)(jax.random.key(0), BATCH)


def _differing(before: types.ModelState, after: types.ModelState) -> set[str]:
    def differs(name: str) -> bool:
        old, new = (jax.tree.leaves(m.params[name]) for m in (before, after))
        return any((a != b).any() for a, b in zip(old, new, strict=True))

    return {name for name in after.params if differs(name)}


def test_generator_and_critic_move_only_themselves() -> None:
    for rates, expected in (((0.0, 1e-3), {"critic"}), ((1e-3, 0.0), {"generator"})):
        after, scalars = _update()(_gan(), *rates)
        assert _differing(_gan().model, after.model) == expected
    assert {
        "loss",
        "grad_norm",
        "generator_loss",
        "critic_gap",
        "gradient_penalty",
        "grad_norm/critic/critic",
        "alarm/same_output",
    } <= set(scalars)


def test_the_released_penalty_is_that_of_the_columns() -> None:
    ours, theirs = (_update(compat)(_gan(), 1e-3, 0.0)[1] for compat in Compat)
    # The critic does not move, so that nothing but the penalty can differ.
    np.testing.assert_allclose(ours["critic_gap"], theirs["critic_gap"], rtol=1e-5)
    assert abs(ours["gradient_penalty"] - theirs["gradient_penalty"]) > 1e-4


def test_alarms_fire_where_every_code_gives_one_image() -> None:
    state = _gan()
    assert _update()(state, 1e-3, 1e-3)[1]["alarm/same_output"] == 0
    generator = jax.tree.map(jnp.zeros_like, state.model.params["generator"])
    params = {**state.model.params, "generator": generator}
    dead = dataclasses.replace(
        state, model=types.ModelState(params=params, collections={})
    )
    scalars = _update()(dead, 1e-3, 1e-3)[1]
    assert scalars["alarm/same_output"] > 0.9
    assert scalars["alarm/flat_output"] > 0.9


def test_the_second_stage_trains_the_encoder_alone() -> None:
    method = CONFIG.make(RUN)
    before = jax.jit(method.init)(jax.random.key(0), BATCH)
    after, _ = jax.jit(method.update)(before, BATCH, jax.random.key(1))
    assert _differing(before.model, after.model) == {"encoder"}
    assert set(after.opt_state) == {"main"}
    assert set(after.ema or {}) == {"encoder"}


def test_loss_compares_images_and_weighted_features() -> None:
    config = dataclasses.replace(CONFIG, feature_weight=3.0)
    loss = jax.jit(functools.partial(fanogan.loss, config, train=False))
    value, (_, scalars) = loss(_model().params, {}, BATCH, jax.random.key(2))
    output = fanogan.reconstruct_slices(config, _model(), BATCH.image, None)
    assert ((output > 0) & (output < 1)).all()
    error = jnp.square(output - BATCH.image).mean()
    np.testing.assert_allclose(scalars["reconstruction"], error, rtol=1e-5)
    features = [
        fanogan.judge(config, _model().params, image)[1]
        for image in (output, BATCH.image)
    ]
    error = jnp.square(features[0] - features[1]).mean()
    np.testing.assert_allclose(scalars["features"], error, rtol=1e-4)
    expected = scalars["reconstruction"] + 3.0 * scalars["features"]
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_scores_of_slices_are_the_published_ones_or_those_of_the_map() -> None:
    volumes = denoisers.volumes()
    key = jax.random.key(0)
    published = jax.jit(CONFIG.make(RUN).score)(_model(), volumes, key)
    loss = jax.jit(functools.partial(fanogan.loss, CONFIG, train=False))
    one = dataclasses.replace(
        BATCH,
        image=volumes.image[1, 2:],
        valid=jnp.ones(1, bool),
        uid=BATCH.uid[:1],
        slice_index=BATCH.slice_index[:1],
    )
    expected = loss(_model().params, {}, one, key)[0]
    np.testing.assert_allclose(published.slice_score[1, 2], expected, rtol=1e-4)
    np.testing.assert_allclose(
        published.volume_score, published.slice_score.max(axis=1), rtol=1e-5
    )
    plain = dataclasses.replace(CONFIG, feature_score=False).make(RUN).score
    assert plain is not None
    scores = jax.jit(plain)(_model(), volumes, key)
    np.testing.assert_array_equal(scores.anomaly_map, published.anomaly_map)
    np.testing.assert_allclose(
        scores.slice_score, scores.anomaly_map.mean(axis=(2, 3)), rtol=1e-5
    )


def test_codes_lie_between_minus_one_and_one() -> None:
    code = fanogan.encode(CONFIG, _model().params, 1e3 * BATCH.image, None)
    assert (jnp.abs(code) <= 1).all()
    assert (jnp.abs(code) > 0.99).any()


def test_networks_have_the_published_size() -> None:
    config = fanogan.EncoderConfig()
    batch = dataclasses.replace(BATCH, image=jnp.zeros((1, 128, 128, 1)))
    names = ("encoder", "generator", "critic")
    init = functools.partial(fanogan.init_model, config, names)
    params = jax.eval_shape(init, jax.random.key(0), batch).params
    sizes = [sum(x.size for x in jax.tree.leaves(params[name])) for name in names]
    assert sizes == [800_016, 869_409, 677_761]
    assert sum(sizes) == 2_347_186


@pytest.mark.parametrize("config", [GAN, CONFIG])
def test_impossible_settings_are_named(config: Any) -> None:
    network = adversaries.network(latent_size=0)
    with pytest.raises(ValueError, match="latent_size is 0"):
        dataclasses.replace(config, network=network).validate()
    with pytest.raises(ValueError, match="feature_weight is -1"):
        dataclasses.replace(CONFIG, feature_weight=-1.0).validate()
