import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from uad_jax.ops import mixture

RNG = np.random.default_rng(0)
Z = RNG.normal(size=(5, 1, 3))
MEAN = RNG.normal(size=(5, 4, 3))
LOG_PRECISION = RNG.normal(size=(5, 4, 3))


def _scipy() -> np.ndarray:
    deviation = np.exp(-0.5 * LOG_PRECISION)
    return scipy.stats.norm.logpdf(Z, MEAN, deviation).sum(axis=-1)


def test_log_density_equals_scipy() -> None:
    found = mixture.log_density(Z, MEAN, LOG_PRECISION)
    np.testing.assert_allclose(found, _scipy(), rtol=1e-5, atol=1e-5)


def test_responsibilities_sum_to_one_and_equal_bayes_rule() -> None:
    found = jnp.exp(
        mixture.log_responsibilities(mixture.log_density(Z, MEAN, LOG_PRECISION))
    )
    density = np.exp(_scipy())
    np.testing.assert_allclose(found.sum(axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(
        found, density / density.sum(axis=-1, keepdims=True), rtol=1e-4
    )


def test_the_released_log_density_has_another_sign_and_factor() -> None:
    found = mixture.released_log_density(Z, MEAN, LOG_PRECISION)
    wrong = -1.5 * LOG_PRECISION.sum(axis=-1)
    constant = 3 * (np.log(np.pi) + 0.5 * np.log(2 * np.pi))
    np.testing.assert_allclose(found, _scipy() + wrong + constant, rtol=1e-4)


def test_kl_of_normals_equals_its_sampled_value_and_vanishes_for_equal_ones() -> None:
    mu, log_sigma = np.array([0.5, -1.0]), np.array([-0.3, 0.2])
    mean, log_precision = np.array([0.1, 0.4]), np.array([0.6, -0.5])
    found = mixture.kl_normals(mu, log_sigma, mean, log_precision)
    z = mu + np.exp(log_sigma) * RNG.normal(size=(200_000, 2))
    inside = scipy.stats.norm.logpdf(z, mu, np.exp(log_sigma))
    outside = scipy.stats.norm.logpdf(z, mean, np.exp(-0.5 * log_precision))
    np.testing.assert_allclose(found, (inside - outside).sum(-1).mean(), rtol=0.02)
    same = mixture.kl_normals(mu, log_sigma, mu, -2.0 * log_sigma)
    np.testing.assert_allclose(same, 0, atol=1e-6)


def test_kl_from_uniform_runs_from_zero_to_log_of_the_components() -> None:
    equal = jnp.log(jnp.full(4, 0.25))
    sure = jax.nn.log_softmax(jnp.array([50.0, 0.0, 0.0, 0.0]))
    half = jnp.log(jnp.array([0.5, 0.5, 1e-30, 1e-30]))
    np.testing.assert_allclose(mixture.kl_uniform(equal), 0, atol=1e-6)
    np.testing.assert_allclose(mixture.kl_uniform(sure), np.log(4), rtol=1e-6)
    np.testing.assert_allclose(mixture.kl_uniform(half), np.log(2), rtol=1e-6)
