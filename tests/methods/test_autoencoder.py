import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import smoke
from uad_jax import types
from uad_jax.methods import autoencoder, base
from uad_jax.methods.autoencoder import AutoencoderConfig, Residual, Variant
from uad_jax.ops import losses
from uad_jax.ops.losses import PixelLoss

CONFIG: AutoencoderConfig = smoke.get_config().method


def _batch(rows: int = 4, channels: int = 1) -> types.Batch:
    shape = (rows, 16, 16, channels)
    return types.Batch(
        image=jax.random.uniform(jax.random.key(0), shape),
        mask=jnp.ones((rows, 16, 16, 1), bool),
        valid=jnp.ones(rows, bool),
        uid=jnp.arange(rows),
        slice_index=jnp.arange(rows),
    )


def _model(config: AutoencoderConfig, batch: types.Batch) -> types.ModelState:
    return autoencoder.init_model(config, jax.random.key(3), batch)


def _loss(config: AutoencoderConfig, **kwargs: bool) -> tuple:
    batch = _batch()
    model = _model(config, batch)
    value, (_, scalars) = autoencoder.loss(
        config, model.params, {}, batch, jax.random.key(7), **kwargs
    )
    return value, scalars


@pytest.mark.parametrize("reduction", list(losses.Reduction))
@pytest.mark.parametrize("pixel_loss", list(PixelLoss))
def test_loss_is_reconstruction_plus_weighted_kl(
    reduction: losses.Reduction, pixel_loss: PixelLoss
) -> None:
    config = dataclasses.replace(
        CONFIG, reduction=reduction, pixel_loss=pixel_loss, kl_weight=3.0
    )
    value, scalars = _loss(config, train=False)
    np.testing.assert_allclose(
        value, scalars["reconstruction"] + 3.0 * scalars["kl"], rtol=1e-6
    )
    if pixel_loss is PixelLoss.L1:
        pixels = 256 if reduction is losses.Reduction.SUM else 1
        np.testing.assert_allclose(
            scalars["reconstruction"], pixels * scalars["l1"], rtol=1e-5
        )


def test_mean_reduction_only_scales_the_loss() -> None:
    total = _loss(CONFIG)[0]
    mean = _loss(dataclasses.replace(CONFIG, reduction=losses.Reduction.MEAN))[0]
    np.testing.assert_allclose(total, 256 * mean, rtol=1e-5)


@pytest.mark.parametrize("variant", [Variant.AE, Variant.AE_SPATIAL])
def test_autoencoders_have_no_kl(variant: Variant) -> None:
    value, scalars = _loss(dataclasses.replace(CONFIG, variant=variant))
    assert set(scalars) == {"reconstruction", "l1"}
    assert value == scalars["reconstruction"]


@pytest.mark.parametrize("variant", list(Variant))
def test_dropout_is_on_in_training_only(variant: Variant) -> None:
    without = dataclasses.replace(CONFIG, variant=variant, dropout=0.0)
    config = dataclasses.replace(without, dropout=0.5)
    assert _loss(config, train=True)[0] != _loss(without, train=True)[0]
    assert _loss(config, train=False)[0] == _loss(without, train=False)[0]


def test_vae_scores_the_mean_unless_asked_for_a_sample() -> None:
    batch = _batch()
    model = _model(CONFIG, batch)
    keys = [jax.random.split(jax.random.key(i), 4) for i in (0, 1)]

    def reconstruction(config: AutoencoderConfig, which: int) -> jax.Array:
        return autoencoder.score_slices(
            config, model, batch.image, batch.mask, keys[which]
        )[1]

    np.testing.assert_array_equal(reconstruction(CONFIG, 0), reconstruction(CONFIG, 1))
    sampled = dataclasses.replace(CONFIG, sample_at_test=True)
    assert (reconstruction(sampled, 0) != reconstruction(sampled, 1)).any()
    prior = autoencoder.reconstruct(
        CONFIG, model, batch.image, batch.mask, jax.random.key(0), 1.0
    )
    np.testing.assert_array_equal(prior, reconstruction(CONFIG, 0))


def test_sample_has_the_posteriors_mean_and_deviation() -> None:
    # A decoder cannot be inverted, so the code is read through the loss: z of
    # N(mu, sigma^2) is drawn by the stated formula from the row's third stream.
    batch = _batch(rows=1)
    model = _model(CONFIG, batch)
    keys = jax.random.split(jax.random.key(5), 1)
    output, (mu, log_sigma) = autoencoder.autoencode(
        CONFIG, model.params, batch.image, keys=keys
    )
    draw = jax.random.normal(jax.random.split(keys[0], 4)[2], mu.shape[1:])
    _, decoder = autoencoder.networks(CONFIG, batch.image.shape)
    expected = decoder.apply(
        {"params": model.params["decoder"]}, mu + jnp.exp(log_sigma) * draw[None]
    )
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


def test_residuals_by_hand() -> None:
    batch = _batch(channels=2)
    model = _model(CONFIG, batch)
    keys = jax.random.split(jax.random.key(0), 4)
    maps = {}
    for residual in Residual:
        config = dataclasses.replace(CONFIG, residual=residual)
        maps[residual], output = autoencoder.score_slices(
            config, model, batch.image, batch.mask, keys
        )
    difference = np.asarray(batch.image - output)
    assert maps[Residual.ABS].shape == (4, 16, 16)
    for residual, expected in (
        (Residual.ABS, np.abs(difference)),
        (Residual.POSITIVE, np.maximum(difference, 0)),
        (Residual.SQUARED, difference**2),
    ):
        np.testing.assert_allclose(maps[residual], expected.mean(-1), rtol=1e-5)


def test_bfloat16_is_close_to_float32_and_keeps_float32_state() -> None:
    exact, _ = _loss(CONFIG, train=False)
    config = dataclasses.replace(CONFIG, precision=base.Precision.BFLOAT16)
    close, _ = _loss(config, train=False)
    assert close.dtype == jnp.float32
    np.testing.assert_allclose(close, exact, rtol=0.02)
    assert close != exact
    state = jax.eval_shape(
        config.make(base.RunShape(10, 5, 4)).init, jax.random.key(0), _batch()
    )
    floats = {x.dtype for x in jax.tree.leaves(state) if x.dtype != jnp.int32}
    assert floats == {jnp.dtype(jnp.float32)}


def test_image_that_does_not_fit_names_the_allowed_resolutions() -> None:
    config = dataclasses.replace(CONFIG, intermediate_resolution=3)
    with pytest.raises(ValueError, match=r"is 3.*16x16.*\[8, 4, 2, 1\]"):
        _model(config, _batch())


@pytest.mark.parametrize(
    "change",
    [
        {"latent_size": 0},
        {"kl_weight": -1.0},
        {"dropout": 1.0},
        {"ema_decay": 1.0},
        {"accumulate_steps": 0},
        {"width": 4},
        {"width": 32, "max_width": 16},
        {"score_chunk": -1},
    ],
)
def test_impossible_settings_are_named(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(CONFIG, **change).validate()
