import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import gmvae as experiments
from uad_jax import anomaly_score_config, types
from uad_jax.compat import Compat
from uad_jax.methods import base, gmvae
from uad_jax.methods.gmvae import GmvaeConfig
from uad_jax.ops import losses
from uad_jax.types import Array

CONFIG = GmvaeConfig(
    latent_size=4,
    context_size=2,
    num_components=3,
    width=8,
    max_width=16,
    intermediate_resolution=4,
    kl_weight=2.0,
)
SPATIAL = dataclasses.replace(CONFIG, spatial=True, prior_width=5)
DENNER = dataclasses.replace(SPATIAL, compat=Compat.DENNER)
FORMS = {"dense": CONFIG, "spatial": SPATIAL, "denner": DENNER}
KEYS = jax.random.split(jax.random.key(2), 2)


def _batch(size: int = 16) -> types.Batch:
    shape = (2, size, size, 1)
    return types.Batch(
        image=jax.random.uniform(jax.random.key(0), shape),
        mask=jnp.ones(shape, bool),
        valid=jnp.ones(2, bool),
        uid=jnp.arange(2),
        slice_index=jnp.arange(2),
    )


@functools.cache
def _model(form: str) -> types.ModelState:
    init = functools.partial(gmvae.init_model, FORMS[form])
    return jax.jit(init)(jax.random.key(1), _batch())


@functools.cache
def _autoencoded(form: str, sampled: bool) -> tuple[Array, gmvae.Latents]:
    run = functools.partial(gmvae.autoencode, FORMS[form], keys=KEYS, sample=sampled)
    return jax.jit(run)(_model(form).params, _batch().image)


def _loss(config: GmvaeConfig, form: str) -> tuple[Array, types.Scalars]:
    run = functools.partial(gmvae.loss, config, train=False)
    value, (_, scalars) = jax.jit(run)(
        _model(form).params, {}, _batch(), jax.random.key(7)
    )
    return value, scalars


@pytest.mark.parametrize(
    ("arg", "compat", "expected"),
    [
        ("paper", Compat.NONE, 1_764_787),
        # The 1x1 convolutions of four codes of one channel, 1 -> 64 -> 9 components
        # twice with a second bias, and 1 -> 128 channels back.
        (
            "spatial,paper",
            Compat.NONE,
            1_358_241 + 4 * 129 + 128 + 2 * 65 * 9 + 9 + 256,
        ),
        ("spatial,paper", Compat.DENNER, 1_358_241 + 4 * 129 + 128 + 2 * 65 * 9 + 9),
    ],
)
def test_parameter_counts_of_the_published_sizes(
    arg: str, compat: Compat, expected: int
) -> None:
    method: Any = experiments.get_config(arg).method
    config = dataclasses.replace(method, compat=compat)
    init = functools.partial(gmvae.init_model, config)
    model = jax.eval_shape(init, jax.random.key(0), _batch(128))
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == expected


@pytest.mark.parametrize("form", list(FORMS))
def test_loss_is_reconstruction_plus_weighted_divergences(form: str) -> None:
    value, scalars = _loss(FORMS[form], form)
    parts = [scalars[f"kl_{name}"] for name in ("code", "context", "component")]
    np.testing.assert_allclose(scalars["kl"], sum(parts), rtol=1e-5)
    np.testing.assert_allclose(
        value, scalars["reconstruction"] + 2 * scalars["kl"], rtol=1e-6
    )
    assert min(parts) > 0


def test_mean_reduction_only_scales_the_loss() -> None:
    mean = dataclasses.replace(CONFIG, reduction=losses.Reduction.MEAN)
    np.testing.assert_allclose(
        _loss(CONFIG, "dense")[0], 256 * _loss(mean, "dense")[0], rtol=1e-5
    )


def test_divergences_of_a_dense_code_by_hand() -> None:
    _, latents = _autoencoded("dense", True)
    params = _model("dense").params
    found = gmvae.divergences(CONFIG, params, latents)
    prior, latents = jax.device_get((params["prior"], latents))  # numpy from here on
    rows = []
    for n in range(2):
        w = latents.context[n]
        mean = w @ prior["Dense_0"]["kernel"] + prior["Dense_0"]["bias"]
        log_precision = w @ prior["Dense_1"]["kernel"] + prior["Dense_1"]["bias"]
        mean = mean.reshape(3, 4)
        precision = np.exp(log_precision + prior["extra"]).reshape(3, 4)
        z, mu, sigma = latents.z[n], latents.mu[n], np.exp(latents.log_sigma[n])
        density = (0.5 * np.log(precision) - 0.5 * precision * (z - mean) ** 2).sum(-1)
        q = np.exp(density) / np.exp(density).sum()
        kl = precision * (sigma**2 + (mu - mean) ** 2) - 1 - np.log(precision)
        rows.append((q * (0.5 * (kl - 2 * np.log(sigma))).sum(-1)).sum())
    np.testing.assert_allclose(found.code, rows, rtol=1e-4)
    # Below the free bits the divergence of c is held at them.
    np.testing.assert_allclose(found.component, 1.0)


def test_an_odd_slice_does_not_spoil_the_gradients_of_the_others() -> None:
    batch = _batch()
    odd = dataclasses.replace(
        batch,
        image=batch.image.at[1].set(7.0),
        valid=jnp.array([True, False]),
    )
    run = functools.partial(gmvae.loss, CONFIG, collections={}, train=False)

    @jax.jit
    def slope(params: types.Tree, batch: types.Batch) -> types.Tree:
        def value(params: types.Tree) -> Array:
            return run(params, batch=batch, key=jax.random.key(3))[0]

        return jax.grad(value)(params)

    leaves = jax.tree.leaves(slope(_model("dense").params, odd))
    assert all(jnp.isfinite(leaf).all() for leaf in leaves)


@pytest.mark.parametrize(("form", "sites"), [("dense", 1), ("spatial", 16)])
def test_free_bits_hold_for_every_site_and_stop_the_gradient(
    form: str, sites: int
) -> None:
    _, latents = _autoencoded(form, True)
    params = _model(form).params

    def component(prior: types.Tree, free_bits: float) -> Array:
        config = dataclasses.replace(FORMS[form], free_bits=free_bits)
        return gmvae.divergences(config, {"prior": prior}, latents).component.sum()

    value, slope = jax.value_and_grad(component)(params["prior"], 5.0)
    np.testing.assert_allclose(value, 2 * 5.0 * sites, rtol=1e-6)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(slope))
    value, slope = jax.value_and_grad(component)(params["prior"], 0.0)
    assert 0 < value < 2 * np.log(3) * sites
    assert any((leaf != 0).any() for leaf in jax.tree.leaves(slope))


def test_the_spatial_form_decodes_z_and_the_released_one_bypasses_it() -> None:
    for form, bypassed in (("spatial", False), ("denner", True)):
        sampled, mean = _autoencoded(form, True), _autoencoded(form, False)
        assert sampled[1].z.shape == (2, 4, 4, 4)
        assert (sampled[1].z != mean[1].z).all()
        assert (sampled[0] == mean[0]).all() == bypassed


def test_the_released_responsibilities_change_the_divergence() -> None:
    _, latents = _autoencoded("spatial", True)
    params = _model("spatial").params
    codes = [
        gmvae.divergences(config, params, latents).code for config in (SPATIAL, DENNER)
    ]
    assert (codes[0] != codes[1]).all()


def test_a_sample_is_decoded_at_the_test_only_where_asked() -> None:
    batch = _batch()
    volumes = types.Volumes(
        image=batch.image[None],
        mask=batch.mask[None],
        valid=batch.valid[None],
        uid=jnp.zeros(1, jnp.int32),
    )
    for sampled in (False, True):
        config = dataclasses.replace(CONFIG, sample_at_test=sampled)
        score = config.make(base.RunShape(10, 5, 2)).score
        assert score is not None
        maps = [
            jax.jit(score)(_model("dense"), volumes, jax.random.key(i)).anomaly_map
            for i in (0, 1)
        ]
        assert (maps[0] != maps[1]).any() == sampled


def test_a_restoration_has_the_published_settings_of_the_gmvae() -> None:
    settings = GmvaeConfig().score.restoration
    assert (settings.clip, settings.tv_weights) == (100.0, (1.8,))
    same = anomaly_score_config.RestorationConfig(
        clip=settings.clip, tv_weights=settings.tv_weights
    )
    assert settings == same  # all else as for a VAE
    for arg in ("", "cpu", "spatial"):
        method: Any = experiments.get_config(arg).method
        assert method.score == GmvaeConfig().score
    # The study has settings of its own.
    method = experiments.get_config("paper").method
    assert method.score.restoration.clip == 0
    assert not method.score.restoration.masked


@pytest.mark.parametrize(
    "change",
    [
        {"latent_size": 0},
        {"num_components": 0},
        {"context_size": 0},
        {"free_bits": -1.0},
        {"kl_weight": -1.0},
        {"dropout": 1.0},
        {"width": 4},
        {"width": 32, "max_width": 16},
        {"score_chunk": -1},
    ],
)
def test_impossible_settings_are_named(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(CONFIG, **change).validate()
