import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uad_jax import types
from uad_jax.anomaly_score_config import (
    Gradient,
    GradientConfig,
    Score,
    ScoreConfig,
    SliceScore,
)
from uad_jax.methods import base, dae
from uad_jax.methods.dae import DaeConfig
from uad_jax.ops import losses, residuals

CONFIG = DaeConfig(width=4, num_levels=2, noise_cells=4, score_chunk=2)


def _batch(rows: int = 3, channels: int = 2) -> types.Batch:
    shape = (rows, 16, 16, channels)
    mask = jnp.zeros((rows, 16, 16, 1), bool).at[:, 4:14, 2:12].set(True)
    return types.Batch(
        image=jnp.where(mask, jax.random.uniform(jax.random.key(0), shape), 0.0),
        mask=mask,
        valid=jnp.ones(rows, bool),
        uid=jnp.arange(rows),
        slice_index=jnp.arange(rows),
    )


@functools.cache
def _model() -> types.ModelState:
    return jax.jit(functools.partial(dae.init_model, CONFIG))(
        jax.random.key(3), _batch()
    )


@jax.jit
def _denoise(model: types.ModelState, image: jax.Array) -> jax.Array:
    return dae.reconstruct_slices(CONFIG, model, image)


def test_noise_is_added_inside_the_brain_only() -> None:
    batch = _batch()
    noise = np.asarray(dae.noise(CONFIG, batch, jax.random.key(1)))
    brain = np.broadcast_to(batch.mask, noise.shape)
    assert (noise[brain] != 0).all()
    assert (noise[~brain] == 0).all()
    assert (noise[0] != noise[1])[brain[0]].all()


def test_loss_is_the_squared_error_in_the_brain_over_all_pixels() -> None:
    batch, key = _batch(), jax.random.key(1)
    model = _model()
    batch = dataclasses.replace(batch, valid=jnp.array([True, False, True]))
    loss = jax.jit(functools.partial(dae.loss, CONFIG))
    value, (_, scalars) = loss(model.params, {}, batch, key)
    noise = jax.jit(functools.partial(dae.noise, CONFIG))(batch, key)
    output = _denoise(model, batch.image + noise)
    error = np.asarray(batch.mask * (output - batch.image) ** 2)[[0, 2]]
    np.testing.assert_allclose(value, error.sum() / (2 * 16 * 16 * 2), rtol=1e-5)
    expected = np.square(np.asarray(noise)[[0, 2]]).mean()
    np.testing.assert_allclose(scalars["noise"], expected, rtol=1e-5)


def test_a_shared_shift_moves_all_slices_alike() -> None:
    batch = dataclasses.replace(_batch(), mask=jnp.ones((3, 16, 16, 1), bool))
    own, shared = (
        np.asarray(
            dae.noise(
                dataclasses.replace(CONFIG, shared_shift=alike),
                batch,
                jax.random.key(1),
            )
        )
        for alike in (False, True)
    )
    shifts = []
    for one, other in zip(own, shared, strict=True):
        candidates = [
            (y, x)
            for y in range(16)
            for x in range(16)
            if np.allclose(np.roll(one, (y, x), axis=(0, 1)), other, atol=1e-5)
        ]
        assert len(candidates) == 1
        shifts.append(candidates[0])
    # The field is the row's own in both cases; from its own place to the shared one.
    assert len(set(shifts)) == 3


@pytest.mark.parametrize("residual", [residuals.Residual.ABS, residuals.Residual.SSIM])
def test_score_compares_clean_volumes(residual: residuals.Residual) -> None:
    batch = _batch(rows=6)
    volumes = types.Volumes(
        image=batch.image.reshape(2, 3, 16, 16, 2),
        mask=batch.mask.reshape(2, 3, 16, 16, 1),
        valid=jnp.ones((2, 3), bool),
        uid=jnp.arange(2),
    )
    config = dataclasses.replace(CONFIG, residual=residual)
    method = config.make(base.RunShape(10, 5, 4))
    assert method.score is not None
    scores = jax.jit(method.score)(_model(), volumes, jax.random.key(0))
    output = _denoise(_model(), batch.image)
    np.testing.assert_allclose(
        scores.reconstruction.reshape(output.shape), output, rtol=1e-4, atol=1e-5
    )
    expected = residuals.anomaly_map(
        residual, volumes.image, output.reshape(volumes.image.shape), volumes.valid
    )
    np.testing.assert_allclose(scores.anomaly_map, expected, rtol=1e-3, atol=1e-4)


def test_the_map_can_be_the_gradient_of_the_error() -> None:
    batch = _batch()
    gradient = GradientConfig(
        of=Gradient.RECONSTRUCTION, smoothing=0, pixel_loss=losses.PixelLoss.L2
    )
    config = dataclasses.replace(
        CONFIG, score=ScoreConfig(kind=Score.GRADIENT, gradient=gradient)
    )
    config.validate()
    score = config.make(base.RunShape(10, 5, 4)).score
    assert score is not None
    volumes = types.Volumes(
        image=batch.image[None],
        mask=batch.mask[None],
        valid=batch.valid[None],
        uid=jnp.zeros(1, jnp.int32),
    )

    @jax.jit
    def slope(image: jax.Array) -> jax.Array:
        def error(image: jax.Array) -> jax.Array:
            return jnp.square(_denoise(_model(), image) - image).sum()

        return jnp.abs(jax.grad(error)(image)).mean(axis=-1)

    found = jax.jit(score)(_model(), volumes, jax.random.key(0)).anomaly_map
    np.testing.assert_allclose(found[0], slope(batch.image), rtol=1e-3, atol=1e-4)


def test_the_prior_is_the_reconstruction() -> None:
    batch = _batch()
    prior = jax.jit(functools.partial(dae.reconstruct, CONFIG))(
        _model(), batch.image, batch.mask, jax.random.key(1), 0.5
    )
    np.testing.assert_allclose(prior, _denoise(_model(), batch.image), atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"width": 0},
        {"num_levels": 0},
        {"noise_cells": 0},
        {"noise_deviation": 0.0},
        {"score_chunk": -1},
        {"ema_decay": 1.0},
        {"accumulate_steps": 0},
        {"score": ScoreConfig(kind=Score.RESTORATION)},
        {"score": ScoreConfig(kind=Score.GRADIENT)},  # of the KL
        {"score": ScoreConfig(slice_score=SliceScore.KL)},
    ],
)
def test_impossible_settings_are_named(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(CONFIG, **change).validate()


def test_an_image_that_does_not_fit_names_the_allowed_sizes() -> None:
    config = dataclasses.replace(CONFIG, num_levels=6)
    with pytest.raises(ValueError, match="multiples of 32; the image is 16x16"):
        dae.init_model(config, jax.random.key(0), _batch())
