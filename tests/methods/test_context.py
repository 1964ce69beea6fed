import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uad_jax import autoencoding, types
from uad_jax.anomaly_score_config import (
    Gradient,
    GradientConfig,
    Score,
    ScoreConfig,
    SliceScore,
)
from uad_jax.compat import Compat
from uad_jax.methods import base, context
from uad_jax.methods.context import ContextConfig, Variant, Weighting
from uad_jax.ops import losses

CONFIG = ContextConfig(
    latent_size=8, width=8, max_width=16, dropout=0.0, kl_weight=3e3, square_side=4
)
CE = dataclasses.replace(CONFIG, variant=Variant.CE, score=ScoreConfig())


def _batch(rows: int = 4) -> types.Batch:
    mask = jnp.zeros((rows, 16, 16, 1), bool).at[:, 3:15, 2:13].set(True)
    image = jax.random.uniform(jax.random.key(0), mask.shape, minval=0.1)
    return types.Batch(
        image=jnp.where(mask, image, 0.0),
        mask=mask,
        valid=jnp.ones(rows, bool),
        uid=jnp.arange(rows),
        slice_index=jnp.arange(rows),
    )


def _volumes(depth: int = 2, seed: int = 0) -> types.Volumes:
    mask = _batch(2 * depth).mask.reshape(2, depth, 16, 16, 1)
    image = jax.random.uniform(jax.random.key(seed), mask.shape)
    return types.Volumes(
        image=jnp.where(mask, image, 0.0),
        mask=mask,
        valid=jnp.ones((2, depth), bool),
        uid=jnp.arange(2),
    )


@functools.cache
def _model(variant: Variant = Variant.CEVAE) -> types.ModelState:
    config = CONFIG if variant is Variant.CEVAE else CE
    init = jax.jit(functools.partial(context.init_model, config))
    return init(jax.random.key(3), _batch())


def _loss(config: ContextConfig, batch: types.Batch | None = None) -> Any:
    """The loss without dropout and its scalars."""
    value = jax.jit(functools.partial(context.validation_loss, config))
    return value(_model(config.variant), batch or _batch(), jax.random.key(7))


def _hidden(config: ContextConfig, batch: types.Batch) -> np.ndarray:
    """Pixels that the loss hides, [B, H, W]."""
    keys = base.sample_keys(jax.random.key(7), batch.uid, batch.slice_index)
    square_keys = autoencoding.split(keys, 3)[0]
    seen = jax.jit(functools.partial(context.hide, config))(batch, square_keys)
    return np.asarray((seen != batch.image)[..., 0])


def test_each_slice_hides_its_own_squares_in_the_brain() -> None:
    batch = _batch()
    hidden = _hidden(CONFIG, batch)
    assert len({mask.tobytes() for mask in hidden}) == 4
    assert hidden.any(axis=(1, 2)).all()
    assert not hidden[~np.asarray(batch.mask[..., 0])].any()


def test_the_released_form_hides_those_of_the_last_valid_slice() -> None:
    batch = _batch()
    batch = dataclasses.replace(batch, valid=jnp.array([True, True, True, False]))
    own = _hidden(CONFIG, batch)
    shared = _hidden(dataclasses.replace(CONFIG, compat=Compat.DENNER), batch)
    assert (shared == own[2]).all()
    assert (own[0] != own[2]).any()


def _reconstructed(
    config: ContextConfig,
    model: types.ModelState,
    image: jax.Array,
    keys: jax.Array | None,
    *,
    sample: bool = True,
) -> jax.Array:
    reconstruct = context.score_functions(config).reconstruct
    fixed = functools.partial(reconstruct, sample=sample, dropout=False)
    return jax.jit(fixed)(model, image, keys)


def _filled(config: ContextConfig, batch: types.Batch, target: jax.Array) -> float:
    """Sum-L1 of the filled-in image from the mean code, branch by branch."""
    hidden = jnp.asarray(_hidden(config, batch))[..., None]
    seen = jnp.where(hidden, 0.0, batch.image)
    output = _reconstructed(config, _model(config.variant), seen, None)
    error = np.asarray(jnp.abs(output - (seen if target is None else target)))
    return error.sum(axis=(1, 2, 3)).mean()


def test_a_context_encoder_compares_with_the_clean_image() -> None:
    batch, found = _batch(), _loss(CE)
    expected = _filled(CE, batch, batch.image)
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
    assert set(found) == {"loss", "context", "l1"}
    np.testing.assert_allclose(found["l1"] * 256, expected, rtol=1e-5)


@pytest.mark.parametrize("compat", list(Compat))
def test_the_context_of_a_cevae_is_filled_in_from_the_mean(compat: Compat) -> None:
    config = dataclasses.replace(CONFIG, compat=compat)
    batch, found = _batch(), _loss(config)
    clean = _filled(config, batch, batch.image)
    hidden = _filled(config, batch, None)
    assert abs(clean - hidden) > 0.1
    expected = hidden if compat is Compat.DENNER else clean
    np.testing.assert_allclose(found["context"], expected, rtol=1e-5)


@pytest.mark.parametrize("reduction", list(losses.Reduction))
@pytest.mark.parametrize("weighting", list(Weighting))
def test_the_loss_weighs_its_terms(
    weighting: Weighting, reduction: losses.Reduction
) -> None:
    config = dataclasses.replace(
        CONFIG, weighting=weighting, context_weight=0.3, reduction=reduction
    )
    found = _loss(config)
    whole = found["reconstruction"] + 3e3 * found["kl"]
    expected = whole + found["context"]
    if weighting is Weighting.SHARE:
        expected = 0.7 * whole + 0.3 * found["context"]
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-6)
    pixels = 256 if reduction is losses.Reduction.SUM else 1
    np.testing.assert_allclose(found["reconstruction"], pixels * found["l1"], rtol=1e-5)


def test_the_vae_of_a_cevae_is_that_of_a_slice_alone() -> None:
    batch, found = _batch(), _loss(CONFIG)
    keys = base.sample_keys(jax.random.key(7), batch.uid, batch.slice_index)
    output, codes = autoencoding.autoencode(
        context.networks(CONFIG, batch.image.shape),
        _model().params,
        batch.image,
        keys=autoencoding.split(keys, 3)[1],
    )
    error = np.abs(output - batch.image).sum(axis=(1, 2, 3)).mean()
    np.testing.assert_allclose(found["reconstruction"], error, rtol=1e-5)
    np.testing.assert_allclose(found["kl"], losses.kl_normal(*codes).mean(), rtol=1e-3)


def test_dropout_is_on_in_training_only() -> None:
    config = dataclasses.replace(CONFIG, dropout=0.5)
    assert _loss(config)["loss"] == _loss(CONFIG)["loss"]
    train = jax.jit(functools.partial(context.loss, config))
    value, _ = train(_model().params, {}, _batch(), jax.random.key(7))
    assert value != _loss(config)["loss"]


def test_a_slice_without_brain_hides_nothing_and_stays_finite() -> None:
    batch = _batch()
    empty = dataclasses.replace(
        batch, image=batch.image.at[1].set(0.0), mask=batch.mask.at[1].set(False)
    )
    assert not _hidden(CONFIG, empty)[1].any()
    assert all(np.isfinite(value) for value in _loss(CONFIG, empty).values())


@functools.cache
def _score() -> Any:
    return jax.jit(CONFIG.make(base.RunShape(10, 5, 4)).score)


def test_the_score_is_the_residual_times_the_gradient_scaled_per_volume() -> None:
    volumes, model = _volumes(), _model()
    scores = _score()(model, volumes, jax.random.key(0))
    image = volumes.image.reshape(-1, 16, 16, 1)
    networks = context.networks(CONFIG, image.shape)

    def kl(image: jax.Array) -> jax.Array:
        codes = networks.encoder.apply({"params": model.params["encoder"]}, image)
        return losses.kl_normal(*codes).sum()

    slope = np.abs(jax.grad(kl)(image)).reshape(2, 2, 16, 16)
    brain = np.asarray(volumes.mask[..., 0])
    for b in range(2):
        inside = slope[b][brain[b]]
        slope[b] = np.clip((slope[b] - inside.min()) / np.ptp(inside), 0, 1)
    offsets = np.arange(-3, 4)
    kernel = np.exp(-0.5 * (offsets / 3.0) ** 2)
    padded = np.pad(slope, [(0, 0), (0, 0), (3, 3), (3, 3)], mode="symmetric")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (7, 7), axis=(2, 3))
    weights = np.outer(kernel, kernel) / kernel.sum() ** 2
    blurred = (windows * weights).sum(axis=(-2, -1))
    residual = np.abs(volumes.image - scores.reconstruction)[..., 0]
    np.testing.assert_allclose(
        scores.anomaly_map, blurred * residual, rtol=1e-3, atol=1e-5
    )


def test_the_score_ignores_its_neighbours_and_the_padding() -> None:
    volumes, model = _volumes(), _model()
    alone = _score()(model, volumes, jax.random.key(0))
    other = dataclasses.replace(volumes, image=volumes.image.at[1].multiply(50.0))
    beside = _score()(model, other, jax.random.key(0))
    np.testing.assert_allclose(
        beside.anomaly_map[0], alone.anomaly_map[0], rtol=1e-4, atol=1e-6
    )
    garbage = 9.0 + _volumes(seed=1).image
    padded = types.Volumes(
        image=jnp.concatenate([volumes.image, garbage], axis=1),
        mask=jnp.concatenate([volumes.mask, volumes.mask], axis=1),
        valid=jnp.concatenate([volumes.valid, ~volumes.valid], axis=1),
        uid=volumes.uid,
    )
    deeper = _score()(model, padded, jax.random.key(0))
    np.testing.assert_allclose(
        deeper.anomaly_map[:, :2], alone.anomaly_map, rtol=1e-4, atol=1e-6
    )


def test_nothing_is_hidden_and_nothing_random_without_keys() -> None:
    batch, model = _batch(), _model()
    keys = base.sample_keys(jax.random.key(1), batch.uid, batch.slice_index)
    fixed = _reconstructed(CONFIG, model, batch.image, None)
    mean = _reconstructed(CONFIG, model, batch.image, keys, sample=False)
    drawn = _reconstructed(CONFIG, model, batch.image, keys)
    np.testing.assert_array_equal(fixed, mean)
    assert (fixed != drawn).any()
    prior = context.reconstruct(
        CONFIG, model, batch.image, batch.mask, jax.random.key(0)
    )
    np.testing.assert_array_equal(prior, fixed)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (CONFIG, {"max_squares": 0}, "max_squares is 0"),
        (CONFIG, {"square_side": -1}, "square_side is -1"),
        (CONFIG, {"kl_weight": -1.0}, "kl_weight is -1"),
        (CONFIG, {"context_weight": 1.5}, "context_weight is 1.5"),
        (CONFIG, {"dropout": 1.0}, "dropout is 1"),
        (CONFIG, {"width": 4}, "width is 4"),
        (CE, {"score": context.combined_score()}, "ce has no posterior"),
        (CE, {"score": ScoreConfig(slice_score=SliceScore.KL)}, "ce has no posterior"),
    ],
)
def test_impossible_settings_are_named(
    config: ContextConfig, change: dict[str, Any], message: str
) -> None:
    config.validate()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change).validate()


def test_a_context_encoder_may_weigh_by_the_gradient_of_its_error() -> None:
    gradient = GradientConfig(of=Gradient.RECONSTRUCTION, times_residual=True)
    score = ScoreConfig(kind=Score.GRADIENT, gradient=gradient)
    dataclasses.replace(CE, score=score).validate()


def test_a_square_larger_than_the_image_is_an_error() -> None:
    config = dataclasses.replace(CONFIG, square_side=17)
    with pytest.raises(ValueError, match=r"17 pixels.*16x16"):
        context.init_model(config, jax.random.key(0), _batch())
