import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uad_jax.ops import adversarial
from uad_jax.ops.adversarial import Adversary

KEYS = jax.random.split(jax.random.key(0), 4)


def _images(rows: int = 4, seed: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (rows, 6, 5, 2))


def _linear(weight: jax.Array, x: jax.Array) -> jax.Array:
    """A critic of one site whose slope is the weight."""
    return (x * weight[None]).reshape(len(x), -1).sum(axis=1, keepdims=True)


def test_a_linear_critic_of_slope_one_pays_no_penalty() -> None:
    weight = jax.random.normal(jax.random.key(2), (6, 5, 2))
    unit = weight / jnp.linalg.norm(weight)
    penalty = functools.partial(adversarial.gradient_penalty, x=_images())
    np.testing.assert_allclose(penalty(functools.partial(_linear, unit)), 0, atol=1e-6)
    np.testing.assert_allclose(
        penalty(functools.partial(_linear, 3 * unit)), 4.0, rtol=1e-5
    )


def test_penalty_by_hand_where_the_slope_depends_on_the_place() -> None:
    x = _images()

    def square(x: jax.Array) -> jax.Array:
        return 0.5 * jnp.square(x).reshape(len(x), -1).sum(axis=1, keepdims=True)

    norm = np.linalg.norm(np.asarray(x).reshape(4, -1), axis=1)
    np.testing.assert_allclose(
        adversarial.gradient_penalty(square, x), (norm - 1) ** 2, rtol=1e-5
    )
    columns = np.linalg.norm(np.asarray(x), axis=1)
    np.testing.assert_allclose(
        adversarial.gradient_penalty(square, x, per_column=True),
        ((columns - 1) ** 2).mean(axis=(1, 2)),
        rtol=1e-5,
    )


def test_both_penalties_agree_for_codes_and_count_sites_differently() -> None:
    code = jax.random.normal(jax.random.key(3), (4, 7))
    one = functools.partial(_linear, jnp.arange(7.0))
    np.testing.assert_allclose(
        adversarial.gradient_penalty(one, code),
        adversarial.gradient_penalty(one, code, per_column=True),
        rtol=1e-6,
    )

    def three(x: jax.Array) -> jax.Array:
        return jnp.repeat(one(x), 3, axis=1)

    slope = np.linalg.norm(np.arange(7))
    np.testing.assert_allclose(
        adversarial.gradient_penalty(three, code), (slope - 1) ** 2, rtol=1e-5
    )
    np.testing.assert_allclose(
        adversarial.gradient_penalty(three, code, per_column=True),
        (3 * slope - 1) ** 2,
        rtol=1e-5,
    )


def test_largest_gap_by_hand() -> None:
    real = jnp.array([[[3.0, 0.0], [4.0, 5.0]]])  # columns of length 5 and 5
    gap = functools.partial(adversarial.largest_gap, real, jnp.zeros((1, 2, 2)))
    np.testing.assert_allclose(gap(4), [50**0.5], rtol=1e-6)
    np.testing.assert_allclose(gap(4, per_column=True), [10 / 4], rtol=1e-6)


def test_a_constant_critic_has_a_finite_gradient() -> None:
    def loss(weight: jax.Array) -> jax.Array:
        critic = functools.partial(_linear, weight)
        return adversarial.gradient_penalty(critic, _images()).sum()

    value, gradient = jax.value_and_grad(loss)(jnp.zeros((6, 5, 2)))
    np.testing.assert_allclose(value, 4.0, rtol=1e-4)
    assert jnp.isfinite(gradient).all()


def test_interpolation_lies_between_or_beyond() -> None:
    real, fake = _images(seed=4), _images(seed=5)
    draw = jax.vmap(jax.random.uniform)(KEYS)[:, None, None, None]
    between = adversarial.interpolate(KEYS, real, fake)
    np.testing.assert_allclose(between, real + draw * (fake - real), rtol=1e-5)
    away = adversarial.interpolate(KEYS, real, fake, away=True)
    np.testing.assert_allclose(away, real - draw * (fake - real), rtol=1e-5)


def test_losses_by_hand() -> None:
    real, fake = jnp.array([[1.0, 3.0]]), jnp.array([[-1.0, 2.0]])
    wasserstein = adversarial.critic_loss(Adversary.WGAN_GP, real, fake)
    np.testing.assert_allclose(wasserstein, [0.5 - 2.0])
    np.testing.assert_allclose(
        adversarial.generator_loss(Adversary.WGAN_GP, fake), [-0.5]
    )
    sigmoid = 1 / (1 + np.exp(-np.array([[1.0, 3.0], [-1.0, 2.0]])))
    np.testing.assert_allclose(
        adversarial.critic_loss(Adversary.LOG_LOSS, real, fake),
        [-(np.log(sigmoid[0]) + np.log(1 - sigmoid[1])).mean()],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        adversarial.generator_loss(Adversary.LOG_LOSS, fake),
        [-np.log(sigmoid[1]).mean()],
        rtol=1e-6,
    )
    np.testing.assert_allclose(adversarial.accuracy(real, fake), [0.75])


@pytest.mark.parametrize("made", ["equal", "flat", "same"])
def test_spread_tells_flat_and_same_images_from_good_ones(made: str) -> None:
    image = _images(rows=6)
    output = {
        "equal": image,
        "flat": jnp.broadcast_to(
            image.mean(axis=(1, 2, 3), keepdims=True), (6, 6, 5, 2)
        ),
        "same": jnp.broadcast_to(image[:1], image.shape),
    }[made]
    # Padding counts for nothing.
    valid = jnp.arange(6) < 4
    output, image = (
        jnp.where(valid[:, None, None, None], x, 9.0) for x in (output, image)
    )
    pixels, batch = adversarial.spread(
        adversarial.moments(output, valid), adversarial.moments(image, valid)
    )
    small = {"equal": (), "flat": ("pixels", "batch"), "same": ("batch",)}[made]
    for name, value in (("pixels", pixels), ("batch", batch)):
        if name in small:
            assert value < (0.01 if made == "same" or name == "pixels" else 0.3)
        else:
            np.testing.assert_allclose(
                value, 1.0, rtol=1e-5 if made == "equal" else 0.2
            )


def test_energy_distance_is_small_for_one_distribution_and_large_for_one_image() -> (
    None
):
    valid = jnp.arange(64) < 60
    draw = jax.random.normal(jax.random.key(6), (2, 64, 3, 3, 1))
    same = adversarial.energy_distance(draw[0], draw[1], valid)
    alike = adversarial.energy_distance(jnp.zeros_like(draw[0]), draw[1], valid)
    assert abs(same) < 0.05
    assert alike > 0.2
    first = adversarial.energy_distance(
        draw[0].at[60:].set(7.0), draw[1].at[60:].set(-7.0), valid
    )
    np.testing.assert_allclose(first, same, rtol=1e-5)


def test_energy_distance_by_hand() -> None:
    x, y = jnp.array([[0.0], [2.0]]), jnp.array([[3.0], [4.0]])
    # Pairs of different rows: |0 - 4|, |2 - 3|; |0 - 2|; |3 - 4|.
    np.testing.assert_allclose(
        adversarial.energy_distance(x, y, jnp.ones(2, bool)), 2.5 - 0.5 * (2 + 1)
    )
