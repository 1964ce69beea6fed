import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uad_jax.ops import losses
from uad_jax.ops.losses import Reduction


def test_l1_and_l2_by_hand() -> None:
    x = jnp.array([[1.0, 2.0], [0.0, -1.0]])
    y = jnp.array([[0.0, 4.0], [0.0, 2.0]])
    np.testing.assert_allclose(losses.l1(x, y), [3.0, 3.0])
    np.testing.assert_allclose(losses.l1(x, y, Reduction.MEAN), [1.5, 1.5])
    np.testing.assert_allclose(losses.l2(x, y), [5.0, 9.0])
    np.testing.assert_allclose(losses.l2(x, y, Reduction.MEAN), [2.5, 4.5])


def test_losses_are_float32_whatever_the_input() -> None:
    x = jnp.full((2, 4096), 1.0, jnp.bfloat16)
    y = jnp.zeros((2, 4096), jnp.bfloat16)
    assert losses.l1(x, y).dtype == jnp.float32
    np.testing.assert_array_equal(losses.l1(x, y), [4096.0, 4096.0])


def test_kl_of_the_standard_normal_is_zero() -> None:
    zeros = jnp.zeros((3, 5))
    np.testing.assert_array_equal(losses.kl_normal(zeros, zeros), np.zeros(3))


def test_kl_takes_log_sigma_not_log_variance() -> None:
    # N(1, 2^2): 0.5 * (1 + 4 - 2 log 2 - 1)
    value = losses.kl_normal(jnp.ones((1, 1)), jnp.full((1, 1), np.log(2.0)))
    np.testing.assert_allclose(value, [0.5 * (4 - 2 * np.log(2.0))], rtol=1e-6)


def test_kl_agrees_with_monte_carlo() -> None:
    mu, sigma = 0.7, 0.4
    z = mu + sigma * np.random.default_rng(0).normal(size=400_000)
    log_q = -0.5 * ((z - mu) / sigma) ** 2 - np.log(sigma)
    expected = np.mean(log_q + 0.5 * z**2)
    value = losses.kl_normal(jnp.full((1, 1), mu), jnp.full((1, 1), np.log(sigma)))
    np.testing.assert_allclose(value[0], expected, rtol=1e-2)


def test_mean_over_valid_ignores_padding_and_its_gradient() -> None:
    valid = jnp.array([True, False, True])

    def mean(rows: jax.Array) -> jax.Array:
        return losses.mean_over_valid(rows, valid)

    rows = jnp.array([1.0, jnp.inf, 5.0])
    assert mean(rows) == 3.0
    np.testing.assert_array_equal(jax.grad(mean)(rows), [0.5, 0.0, 0.5])


@pytest.mark.parametrize("shape", [(4,), (2, 3)])
def test_mean_over_no_valid_rows_is_zero(shape: tuple[int, ...]) -> None:
    assert losses.mean_over_valid(jnp.ones(shape), jnp.zeros(shape, bool)) == 0.0
