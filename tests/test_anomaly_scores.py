import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from configs import smoke
from uad_jax import (
    anomaly_score_config,
    anomaly_scores,
    gradient_score,
    restoring,
    scoring,
    types,
)
from uad_jax.anomaly_score_config import (
    Gradient,
    GradientConfig,
    GradientScale,
    RestorationConfig,
    Score,
    ScoreConfig,
    SliceScore,
    Smoothing,
)
from uad_jax.methods import autoencoder, base
from uad_jax.ops import losses, restoration
from uad_jax.ops.residuals import Residual
from uad_jax.score_functions import Functions, Terms
from uad_jax.types import Array, ModelState

RUN = base.RunShape(total_steps=10, steps_per_epoch=5, global_batch=4)
CONFIG: autoencoder.AutoencoderConfig = smoke.get_config().method
MODEL = ModelState(params={"half": {"scale": jnp.float32(0.5)}}, collections={})


def _reconstruct(
    model: ModelState, image: Array, keys: Array | None, *, sample: bool, dropout: bool
) -> Array:
    """Half of the image; drawn: with one normal number per slice added."""
    output = image * model.params["half"]["scale"]
    if keys is not None and (sample or dropout):
        draw = jax.vmap(jax.random.normal)(keys)
        output = output + (sample + 2 * dropout) * draw.reshape(-1, 1, 1, 1)
    return output


def _terms(
    model: ModelState, image: Array, keys: Array | None, kind: losses.PixelLoss
) -> Terms:
    """The divergence is that of the sum of the slice from 0."""
    output = _reconstruct(model, image, keys, sample=True, dropout=False)
    error = losses.pixels(kind, output, image).sum(axis=(1, 2, 3))
    kl = 0.5 * jnp.square(image.sum(axis=(1, 2, 3)))
    return Terms(output, error, kl)


TOY = Functions(_reconstruct, _terms, kl_weight=3.0)


@functools.cache
def _volumes() -> types.Volumes:
    image = jax.random.uniform(jax.random.key(4), (2, 3, 16, 16, 1))
    mask = jnp.zeros_like(image, bool).at[:, :, 2:14, 2:14].set(True)
    return types.Volumes(
        image=image * mask,
        mask=mask.at[1, 2].set(False),
        valid=jnp.ones((2, 3), bool).at[1, 2].set(False),
        uid=jnp.array([7, 3]),
    )


def _score(config: ScoreConfig, residual: Residual = Residual.ABS) -> types.Scores:
    config.validate("toy", posterior=True, dropout=True)
    score = anomaly_scores.scorer(TOY, config, residual, chunk=2)
    return jax.jit(score)(MODEL, _volumes(), jax.random.key(1))


def test_a_residual_compares_with_one_reconstruction() -> None:
    scores = _score(ScoreConfig(), Residual.SQUARED)
    image = _volumes().image
    np.testing.assert_allclose(scores.reconstruction, image / 2, rtol=1e-6)
    np.testing.assert_allclose(
        scores.anomaly_map, jnp.square(image / 2)[..., 0], rtol=1e-6
    )


@pytest.mark.parametrize("kind", list(losses.PixelLoss))
def test_the_elbo_of_a_slice_has_the_error_of_the_methods_own_loss(
    kind: losses.PixelLoss,
) -> None:
    score = anomaly_scores.scorer(
        TOY._replace(pixel_loss=kind),
        ScoreConfig(slice_score=SliceScore.ELBO),
        Residual.ABS,
    )
    volumes = _volumes()
    found = jax.jit(score)(MODEL, volumes, jax.random.key(1)).slice_score[0]
    half = volumes.image[0] / 2
    error = jnp.square(half) if kind is losses.PixelLoss.L2 else jnp.abs(half)
    divergence = 0.5 * jnp.square(volumes.image[0].sum(axis=(1, 2, 3)))
    expected = error.sum(axis=(1, 2, 3)) + 3.0 * divergence
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def _draws(passes: int) -> np.ndarray:
    """The numbers that the passes draw, [2, 3, passes]."""
    volumes = _volumes()
    draws = np.zeros((2, 3, passes))
    for b, uid in enumerate(volumes.uid):
        for z in range(3):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), uid), z)
            for index in range(passes):
                draws[b, z, index] = jax.random.normal(jax.random.fold_in(key, index))
    return draws


@pytest.mark.parametrize(
    ("sample", "dropout", "size"),
    [(True, False, 1), (False, True, 2), (True, True, 3)],
)
def test_random_passes_give_their_mean_and_their_variance(
    sample: bool, dropout: bool, size: int
) -> None:
    config = ScoreConfig(
        kind=Score.MC_MEAN, passes=4, mc_samples=sample, mc_dropout=dropout
    )
    draws, image = size * _draws(4), _volumes().image
    scores = _score(config)
    mean = image / 2 + draws.mean(axis=-1)[..., None, None, None]
    np.testing.assert_allclose(scores.reconstruction, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        scores.anomaly_map, jnp.abs(image - mean)[..., 0], rtol=1e-4, atol=1e-5
    )
    scores = _score(dataclasses.replace(config, kind=Score.MC_VARIANCE))
    variance = np.broadcast_to(draws.var(axis=-1)[..., None, None], (2, 3, 16, 16))
    np.testing.assert_allclose(scores.anomaly_map, variance, rtol=1e-4)


@pytest.mark.parametrize("of", list(Gradient))
def test_gradients_of_the_terms_by_hand(of: Gradient) -> None:
    gradient = GradientConfig(of=of, smoothing=0, pixel_loss=losses.PixelLoss.L2)
    config = ScoreConfig(kind=Score.GRADIENT, gradient=gradient)
    image = _volumes().image
    kl = image.sum(axis=(2, 3, 4), keepdims=True) * jnp.ones_like(image)
    error = 0.5 * image
    expected = {
        Gradient.KL: kl,
        Gradient.RECONSTRUCTION: error,
        Gradient.ELBO: error + 3.0 * kl,
    }[of]
    found = _score(config).anomaly_map
    np.testing.assert_allclose(found, expected[..., 0], rtol=1e-5)


def test_the_combined_gradient_is_scaled_per_volume_then_blurred() -> None:
    volumes = _volumes()
    steep = jax.random.uniform(jax.random.key(2), (2, 3, 16, 16)) + 0.5
    left = jax.random.uniform(jax.random.key(3), steep.shape)
    blur = functools.partial(gradient_score.weigh, smoothing=3)
    found = jax.jit(blur)(steep, volumes, residual=left)
    for b in range(2):
        brain = volumes.mask[b, ..., 0] & volumes.valid[b, :, None, None]
        inside = steep[b][brain]
        scaled = (steep[b] - inside.min()) / (inside.max() - inside.min())
        blurred = scipy.ndimage.gaussian_filter(
            np.clip(scaled, 0, 1), (0, 3, 3), radius=(0, 3, 3)
        )
        np.testing.assert_allclose(found[b], blurred * left[b], rtol=1e-4)


def test_the_combined_gradient_of_a_volume_ignores_the_others() -> None:
    config = ScoreConfig(
        kind=Score.GRADIENT, gradient=GradientConfig(times_residual=True)
    )
    score = jax.jit(anomaly_scores.scorer(TOY, config, Residual.ABS))
    both = _volumes()
    brighter = dataclasses.replace(both, image=both.image.at[1].multiply(9.0))
    found = [score(MODEL, one, jax.random.key(1)) for one in (both, brighter)]
    first, second = (scores.anomaly_map for scores in found)
    np.testing.assert_array_equal(first[0], second[0])
    assert (first[1, :2] != second[1, :2]).any()


def test_an_unscaled_gradient_multiplies_the_residual_as_it_is() -> None:
    gradient = GradientConfig(
        of=Gradient.RECONSTRUCTION,
        times_residual=True,
        scale=GradientScale.NONE,
        smoothing=0,
        pixel_loss=losses.PixelLoss.L2,
    )
    image = _volumes().image
    found = _score(ScoreConfig(kind=Score.GRADIENT, gradient=gradient)).anomaly_map
    # The slope of (x / 2)^2 is x / 2, and so is the residual.
    np.testing.assert_allclose(found, jnp.square(image / 2)[..., 0], rtol=1e-5)
    blurred = gradient_score.weigh(
        image[..., 0],
        _volumes(),
        smoothing=3,
        residual=image[..., 0],
        scale=GradientScale.NONE,
    )
    alone = gradient_score.weigh(image[..., 0], _volumes(), smoothing=3)
    np.testing.assert_allclose(blurred, alone * image[..., 0], rtol=1e-5)


def test_slices_can_be_scored_by_their_divergence() -> None:
    volumes = _volumes()
    scores = _score(ScoreConfig(slice_score=SliceScore.KL))
    kl = 0.5 * jnp.square(volumes.image.sum(axis=(2, 3, 4)))
    expected = jnp.where(volumes.valid, kl, 0)
    np.testing.assert_allclose(scores.slice_score, expected, rtol=1e-5)
    np.testing.assert_allclose(scores.volume_score, expected.max(axis=1), rtol=1e-5)
    scores = _score(ScoreConfig(slice_score=SliceScore.ELBO))
    error = 0.5 * volumes.image.sum(axis=(2, 3, 4))
    expected = jnp.where(volumes.valid, error + 3 * kl, 0)
    np.testing.assert_allclose(scores.slice_score, expected, rtol=1e-5)


def test_one_step_of_a_restoration_by_hand() -> None:
    settings = RestorationConfig(
        num_steps=1, step_size=1e-3, clip=0.0, masked=False, tv_weights=(2.0,)
    )
    scores = _score(ScoreConfig(kind=Score.RESTORATION, restoration=settings))
    x = _volumes().image
    # ||x - x / 2||^2 + 3 * sum(x)^2 / 2; the total variation of x - x has slope 0.
    slope = 0.5 * x + 3.0 * x.sum(axis=(2, 3, 4), keepdims=True)
    np.testing.assert_allclose(
        scores.reconstruction, x - 1e-3 * slope, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        scores.anomaly_map, jnp.abs(1e-3 * slope)[..., 0], rtol=1e-3, atol=1e-6
    )


def test_one_step_of_the_released_restoration_by_hand() -> None:
    released = anomaly_score_config.denner()
    assert released.sampled
    settings = dataclasses.replace(released, num_steps=1, sampled=False)
    scores = _score(ScoreConfig(kind=Score.RESTORATION, restoration=settings))
    x = _volumes().image
    variation = jax.grad(
        lambda x: restoration.total_variation(x.reshape(-1, 16, 16, 1) / 2).sum()
    )(x)
    slope = jnp.where(x > 0, 0.5, -0.5) + 1.8 * variation
    slope = slope + 3.0 * x.sum(axis=(2, 3, 4), keepdims=True)
    np.testing.assert_allclose(
        scores.reconstruction, x - 1e-3 * slope, rtol=1e-4, atol=1e-6
    )


# From here on with a network.


def _vae(**changes: Any) -> autoencoder.AutoencoderConfig:
    settings = RestorationConfig(num_steps=8, late_from=4, tv_weights=(0.1, 1.0))
    settings = dataclasses.replace(settings, **changes)
    score = ScoreConfig(kind=Score.RESTORATION, restoration=settings)
    return dataclasses.replace(CONFIG, score=score, score_chunk=4)


@functools.cache
def _vae_model() -> ModelState:
    volumes = _volumes()
    batch = types.Batch(
        image=volumes.image[0],
        mask=volumes.mask[0],
        valid=volumes.valid[0],
        uid=jnp.arange(3),
        slice_index=jnp.arange(3),
    )
    init = functools.partial(autoencoder.init_model, CONFIG)
    return jax.jit(init)(jax.random.key(0), batch)


@pytest.mark.parametrize("smoothing", list(Smoothing))
def test_a_restoration_lowers_its_objective(smoothing: Smoothing) -> None:
    config = _vae(smoothing=smoothing, step_size=1e-3, late_step_size=1e-3)
    functions = autoencoder.score_functions(config)
    settings, model = config.score.restoration, _vae_model()
    image, mask = _volumes().image[0], _volumes().mask[0]
    keys = jax.random.split(jax.random.key(0), 3)

    @jax.jit
    def values(image: Array) -> tuple[Array, Array]:
        found = restoring.restored(functions, settings, model, image, mask, keys)
        down = restoring.objective(functions, settings, model)
        weights = [jnp.float32(weight) for weight in settings.tv_weights]
        before = [down(image, image, weight, None) for weight in weights]
        after = [
            down(found[:, i], image, weight, None) for i, weight in enumerate(weights)
        ]
        return jnp.stack(before), jnp.stack(after)

    before, after = values(image)
    assert (after < 0.999 * before).all()


def test_the_loop_on_the_host_restores_the_same(mesh1: jax.sharding.Mesh) -> None:
    config = _vae(sampled=True)
    config.score.slice_score = SliceScore.KL
    method = config.make(RUN)
    assert method.score is not None
    args = _vae_model(), _volumes(), jax.random.key(5)
    expected = jax.jit(method.score)(*args)
    found = scoring.program("vae", method, mesh1)(*args)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        found,
        expected,
    )


def test_a_restored_volume_ignores_the_others() -> None:
    method = _vae(sampled=True).make(RUN)
    assert method.host_score is not None
    both, key = _volumes(), jax.random.key(5)
    scores = method.host_score(_vae_model(), both, key)
    alone = method.host_score(_vae_model(), jax.tree.map(lambda x: x[1:], both), key)
    np.testing.assert_allclose(
        alone.anomaly_map[0, :2], scores.anomaly_map[1, :2], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "has", "message"),
    [
        ({"kind": Score.RESTORATION}, {"posterior": False}, "Use one of residual, mc_"),
        ({"kind": Score.MC_MEAN}, {"posterior": False, "dropout": False}, "gradient"),
        ({"kind": Score.GRADIENT}, {"posterior": False}, "gradient.of is kl.*ae has"),
        ({"slice_score": SliceScore.KL}, {"posterior": False}, "Use map"),
        ({"kind": Score.MC_MEAN, "passes": 1}, {}, "passes is 1"),
        (
            {"kind": Score.MC_MEAN, "mc_dropout": False},
            {"posterior": False},
            "Switch on score.mc_dropout",
        ),
        ({"restoration": RestorationConfig(tv_weights=())}, {}, "tv_weights"),
        ({"restoration": RestorationConfig(num_steps=0)}, {}, "num_steps"),
        ({"restoration": RestorationConfig(step_size=0.0)}, {}, "step_size"),
        ({"restoration": RestorationConfig(clip=-1.0)}, {}, "clip"),
        ({"gradient": GradientConfig(smoothing=-1)}, {}, "smoothing"),
        (
            {
                "kind": Score.GRADIENT,
                "gradient": GradientConfig(of=Gradient.RECONSTRUCTION, samples=2),
            },
            {"posterior": False},
            "samples is 2",
        ),
    ],
)
def test_scores_that_make_no_sense_are_refused(
    change: dict[str, Any], has: dict[str, bool], message: str
) -> None:
    config = ScoreConfig(**change)
    with pytest.raises(ValueError, match=message):
        config.validate("ae", **{"posterior": True, "dropout": True, **has})


def test_an_autoencoder_refuses_what_needs_a_posterior() -> None:
    config = dataclasses.replace(
        CONFIG,
        variant=autoencoder.Variant.AE,
        score=ScoreConfig(kind=Score.RESTORATION),
    )
    with pytest.raises(ValueError, match=r"variant=ae cannot give.*mc_variance"):
        config.validate()
