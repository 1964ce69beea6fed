import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import smoke
from uad_jax import autoencoding, types
from uad_jax import config as config_lib
from uad_jax.methods import autoencoder, base
from uad_jax.methods.autoencoder import AutoencoderConfig, Variant
from uad_jax.ops import losses, residuals
from uad_jax.ops.losses import PixelLoss
from uad_jax.ops.residuals import Residual

CONFIG: AutoencoderConfig = smoke.get_config().method
RUN = base.RunShape(total_steps=10, steps_per_epoch=5, global_batch=4)


def _batch(rows: int = 4, channels: int = 1) -> types.Batch:
    shape = (rows, 16, 16, channels)
    return types.Batch(
        image=jax.random.uniform(jax.random.key(0), shape),
        mask=jnp.ones((rows, 16, 16, 1), bool),
        valid=jnp.ones(rows, bool),
        uid=jnp.arange(rows),
        slice_index=jnp.arange(rows),
    )


def _volumes(batch: types.Batch) -> types.Volumes:
    """The rows of a batch as the slices of one volume."""
    return types.Volumes(
        image=batch.image[None],
        mask=batch.mask[None],
        valid=batch.valid[None],
        uid=jnp.zeros(1, jnp.int32),
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

    def reconstruction(config: AutoencoderConfig, which: int) -> jax.Array:
        method = config.make(RUN)
        assert method.score is not None
        scores = jax.jit(method.score)(model, _volumes(batch), keys[which])
        assert scores.reconstruction is not None
        return scores.reconstruction[0]

    keys = [jax.random.key(i) for i in (0, 1)]
    np.testing.assert_array_equal(reconstruction(CONFIG, 0), reconstruction(CONFIG, 1))
    sampled = dataclasses.replace(CONFIG, sample_at_test=True)
    assert (reconstruction(sampled, 0) != reconstruction(sampled, 1)).any()
    prior = autoencoder.reconstruct(
        CONFIG, model, batch.image, batch.mask, jax.random.key(0), 1.0
    )
    np.testing.assert_allclose(prior, reconstruction(CONFIG, 0), atol=1e-6)


def test_sample_has_the_posteriors_mean_and_deviation() -> None:
    # A decoder cannot be inverted, so the code is read through the loss: z of
    # N(mu, sigma^2) is drawn by the stated formula from the row's third stream.
    batch = _batch(rows=1)
    model = _model(CONFIG, batch)
    keys = jax.random.split(jax.random.key(5), 1)
    networks = autoencoder.networks(CONFIG, batch.image.shape)
    output, (mu, log_sigma) = autoencoding.autoencode(
        networks, model.params, batch.image, keys=keys
    )
    draw = jax.random.normal(jax.random.split(keys[0], 4)[2], mu.shape[1:])
    expected = networks.decoder.apply(
        {"params": model.params["decoder"]}, mu + jnp.exp(log_sigma) * draw[None]
    )
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("residual", list(Residual))
def test_residuals_are_those_of_volumes(residual: Residual) -> None:
    batch = _batch(channels=2)
    config = dataclasses.replace(CONFIG, residual=residual)
    score = config.make(RUN).score
    assert score is not None
    volumes = _volumes(batch)
    scores = jax.jit(score)(_model(CONFIG, batch), volumes, jax.random.key(0))
    output = scores.reconstruction
    assert output is not None
    expected = residuals.anomaly_map(residual, volumes.image, output, volumes.valid)
    assert expected.shape == (1, 4, 16, 16)
    np.testing.assert_allclose(scores.anomaly_map, expected, rtol=1e-5, atol=1e-5)


def test_residuals_of_stored_configs_still_open() -> None:
    assert [Residual(value) for value in ("abs", "positive", "squared")] == [
        Residual.ABS,
        Residual.POSITIVE,
        Residual.SQUARED,
    ]
    config = smoke.get_config()
    stored = config_lib.to_dict(config)
    del stored["method"]["score"], stored["method"]["latent_channels"]
    stored["method"]["residual"] = "positive"
    config_lib.fill(config, stored)
    assert config.method == dataclasses.replace(CONFIG, residual=Residual.POSITIVE)


def test_the_divergence_of_a_spatial_code_is_summed_over_its_sites() -> None:
    config = dataclasses.replace(
        CONFIG, variant=Variant.VAE_SPATIAL, latent_channels=3, kl_weight=2.0
    )
    batch = _batch()
    model = _model(config, batch)
    networks = autoencoder.networks(config, batch.image.shape)
    _, (mu, log_sigma) = autoencoding.autoencode(networks, model.params, batch.image)
    assert mu.shape == log_sigma.shape == (4, 1, 1, 3)
    value, scalars = _loss(config, train=False)
    terms = 0.5 * (mu**2 + jnp.exp(2 * log_sigma) - 2 * log_sigma - 1)
    np.testing.assert_allclose(scalars["kl"], terms.sum() / 4, rtol=1e-5)
    np.testing.assert_allclose(
        value, scalars["reconstruction"] + 2 * scalars["kl"], rtol=1e-6
    )


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
        {"latent_channels": -1},
    ],
)
def test_impossible_settings_are_named(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(CONFIG, **change).validate()
