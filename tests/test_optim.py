from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from uad_jax.optim import OptimizerConfig, Schedule


def _rates(config: OptimizerConfig, steps: int) -> np.ndarray:
    """Step sizes of Adam on a constant gradient, which are the learning rates."""
    tx = config.make(steps)
    params = jnp.zeros(())
    state, sizes = tx.init(params), []
    for _ in range(steps):
        update, state = tx.update(jnp.ones(()), state, params)
        sizes.append(-float(update))
    return np.array(sizes)


def test_constant_rate() -> None:
    rates = _rates(OptimizerConfig(learning_rate=0.1), 4)
    np.testing.assert_allclose(rates, 0.1, rtol=1e-4)


def test_linear_schedule_with_warmup_by_hand() -> None:
    config = OptimizerConfig(
        learning_rate=0.1, schedule=Schedule.LINEAR, warmup_steps=2
    )
    expected = [0.0, 0.05, 0.1, 0.075, 0.05, 0.025]
    np.testing.assert_allclose(_rates(config, 6), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("schedule", list(Schedule))
def test_warmup_is_linear_whatever_follows(schedule: Schedule) -> None:
    config = OptimizerConfig(learning_rate=0.1, schedule=schedule, warmup_steps=4)
    np.testing.assert_allclose(
        _rates(config, 8)[:5], [0.0, 0.025, 0.05, 0.075, 0.1], rtol=1e-4, atol=1e-7
    )


def test_cosine_ends_at_the_given_share_of_the_peak() -> None:
    config = OptimizerConfig(
        learning_rate=1.0, schedule=Schedule.COSINE, end_factor=0.2
    )
    rates = _rates(config, 101)[:-1]
    np.testing.assert_allclose(rates[0], 1.0, rtol=1e-4)
    assert (np.diff(rates) <= 1e-6).all()
    np.testing.assert_allclose(rates[-1], 0.2, atol=2e-3)


def test_the_periodic_cosine_comes_back_to_its_peak() -> None:
    config = OptimizerConfig(
        learning_rate=0.1,
        schedule=Schedule.COSINE_PERIODIC,
        half_period=4,
        warmup_steps=2,
        end_factor=0.5,
    )
    rates = _rates(config, 19)
    fall = 0.075 + 0.025 * np.cos(np.pi * np.arange(17) / 4)
    np.testing.assert_allclose(rates[2:], fall, rtol=1e-4)
    np.testing.assert_allclose(rates[[2, 6, 10]], [0.1, 0.05, 0.1], rtol=1e-4)


def test_the_periodic_cosine_without_a_period_is_the_cosine() -> None:
    periodic, plain = (
        OptimizerConfig(learning_rate=0.1, warmup_steps=2, schedule=schedule)
        for schedule in (Schedule.COSINE_PERIODIC, Schedule.COSINE)
    )
    np.testing.assert_allclose(_rates(periodic, 9), _rates(plain, 9), rtol=1e-4)


def _adam_by_hand(config: OptimizerConfig, grads: np.ndarray) -> np.ndarray:
    """Parameters of PyTorch's Adam from its formulas, starting at 1."""
    value, m, v, largest = 1.0, 0.0, 0.0, 0.0
    found = []
    for step, grad in enumerate(grads, 1):
        if config.clip_norm:
            grad = grad * min(1.0, config.clip_norm / abs(grad))
        grad = grad + config.l2 * value
        m = config.b1 * m + (1 - config.b1) * grad
        v = config.b2 * v + (1 - config.b2) * grad**2
        largest = max(largest, v)
        second = (largest if config.amsgrad else v) / (1 - config.b2**step)
        first = m / (1 - config.b1**step)
        value -= config.learning_rate * first / (np.sqrt(second) + config.eps)
        found.append(value)
    return np.array(found)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_adam_follows_the_formulas_of_pytorch(amsgrad: bool, l2: float) -> None:
    config = OptimizerConfig(
        learning_rate=0.1, b2=0.9, clip_norm=2.0, l2=l2, amsgrad=amsgrad
    )
    grads = np.array([0.5, 7.0, -0.2, 0.1, 0.1, -0.05, 0.02])
    tx = config.make(10)
    params = jnp.ones(())
    state, found = tx.init(params), []
    for grad in grads:
        update, state = tx.update(jnp.float32(grad), state, params)
        params = optax.apply_updates(params, update)
        found.append(float(params))
    expected = _adam_by_hand(config, grads)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    other = _adam_by_hand(
        OptimizerConfig(**{**vars(config), "amsgrad": not amsgrad}), grads
    )
    assert abs(other[-1] - expected[-1]) > 1e-3


def test_clipping_bounds_the_global_norm() -> None:
    config = OptimizerConfig(learning_rate=1.0, clip_norm=1.0, b1=0.0)
    tx = config.make(10)
    grads = {"a": jnp.array([30.0]), "b": jnp.array([40.0])}
    _, state = tx.update(grads, tx.init(grads), grads)
    adam = next(s for s in state if isinstance(s, optax.ScaleByAdamState))
    np.testing.assert_allclose(adam.mu["a"], 0.6, rtol=1e-5)
    np.testing.assert_allclose(adam.mu["b"], 0.8, rtol=1e-5)


def test_weight_decay_is_decoupled() -> None:
    tx = OptimizerConfig(learning_rate=0.1, weight_decay=0.5).make(10)
    params = jnp.array(2.0)
    update, _ = tx.update(jnp.zeros(()), tx.init(params), params)
    np.testing.assert_allclose(update, -0.1 * 0.5 * 2.0, rtol=1e-6)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_float_fields_may_be_traced(amsgrad: bool) -> None:
    def size(rate: jax.Array, b1: jax.Array) -> jax.Array:
        config = OptimizerConfig(
            learning_rate=rate, b1=b1, schedule=Schedule.COSINE, amsgrad=amsgrad
        )
        tx = config.make(10)
        return tx.update(jnp.ones(()), tx.init(jnp.zeros(())))[0]

    sizes = jax.vmap(size)(jnp.array([0.1, 0.2]), jnp.array([0.5, 0.9]))
    np.testing.assert_allclose(sizes, [-0.1, -0.2], rtol=1e-4)


def test_traced_clipping_and_weight_decay_equal_fixed_ones() -> None:
    params, grads = jnp.array([2.0, -1.0]), jnp.array([30.0, 40.0])

    def update(clip_norm: float | jax.Array, weight_decay: float | jax.Array) -> Any:
        config = OptimizerConfig(
            learning_rate=0.1, clip_norm=clip_norm, weight_decay=weight_decay, eps=1.0
        )
        tx = config.make(10)
        return tx.update(grads, tx.init(params), params)[0]

    together = jax.vmap(update)(jnp.array([1.0, 5.0]), jnp.array([0.5, 0.1]))
    for found, values in zip(together, ((1.0, 0.5), (5.0, 0.1)), strict=True):
        np.testing.assert_allclose(found, update(*values), rtol=1e-5)
    assert not np.allclose(together[0], together[1])


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"weight_decay": -1.0},
        {"clip_norm": -1.0},
        {"warmup_steps": -1},
        {"end_factor": -0.1},
        {"l2": -0.1},
        {"half_period": -1},
    ],
)
def test_impossible_settings_are_named(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        OptimizerConfig(**change).validate()
