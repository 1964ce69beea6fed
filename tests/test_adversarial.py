import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import denoisers
from uad_jax import adversarial, alarms, players
from uad_jax.adversarial_config import CriticConfig
from uad_jax.compat import Compat
from uad_jax.ops.adversarial import Adversary
from uad_jax.players import Player, Position
from uad_jax.types import Scalars

PLAYER = Player("critic", ("critic",), optax.sgd(0.1))
BATCH = denoisers.batch()
VALID = jnp.ones(4, bool)


def _critic(x: jax.Array) -> jax.Array:
    return jnp.square(x).reshape(len(x), -1).sum(axis=1, keepdims=True)


def _loss(compat: Compat, away: bool) -> Scalars:
    shape = (4, 6, 5, 1)
    real, fake = (jax.random.normal(jax.random.key(i), shape) for i in (1, 2))
    keys = jax.random.split(jax.random.key(3), 4)
    config = CriticConfig(penalty_weight=2.0)
    value, scalars = adversarial.critic_loss(
        config, compat, _critic, real, fake, keys, VALID, away=away
    )
    gap = _critic(real).mean() - _critic(fake).mean()
    np.testing.assert_allclose(scalars["critic_gap"], gap, rtol=1e-5)
    np.testing.assert_allclose(
        value, 2.0 * scalars["gradient_penalty"] - gap, rtol=1e-5
    )
    return scalars


def test_released_forms_change_the_penalty_and_nothing_else() -> None:
    forms = [(Compat.NONE, False), (Compat.DENNER, False), (Compat.NONE, True)]
    found = [_loss(*form) for form in forms]
    assert len({float(scalars["gradient_penalty"]) for scalars in found}) == 3
    assert len({float(scalars["critic_gap"]) for scalars in found}) == 1


def test_a_classifying_critic_pays_no_penalty() -> None:
    x = jax.random.normal(jax.random.key(1), (4, 3))
    keys = jax.random.split(jax.random.key(3), 4)
    config = CriticConfig(adversary=Adversary.LOG_LOSS)
    args = config, Compat.NONE, _critic, x, -x, keys, VALID
    value, scalars = adversarial.critic_loss(*args)
    assert "gradient_penalty" not in scalars
    expected = jax.nn.softplus(-_critic(x)) + jax.nn.softplus(_critic(x))
    np.testing.assert_allclose(value, expected.mean(), rtol=1e-5)


def test_alarm_fires_on_a_critic_that_has_won() -> None:
    alarm = functools.partial(adversarial.critic_alarm, Adversary.WGAN_GP)
    for gap, expected in ((1.0, 0.0), (9.0, 4.5)):
        scalars = {"critic_gap": jnp.array(gap), "critic_distance": jnp.array(2.0)}
        np.testing.assert_allclose(
            alarm(scalars)[alarms.CRITIC_WINS], expected, rtol=1e-5
        )
    alarm = functools.partial(adversarial.critic_alarm, Adversary.LOG_LOSS)
    for accuracy, expected in ((0.9, 0.0), (1.0, 1.0)):
        scalars = {"critic_accuracy": jnp.array(accuracy)}
        assert alarm(scalars)[alarms.CRITIC_WINS] == expected


@pytest.mark.parametrize("compat", Compat)
@pytest.mark.parametrize("shape", [(4, 6, 5, 1), (4, 7)])
def test_alarm_means_the_same_for_both_forms_of_the_penalty(
    compat: Compat, shape: tuple[int, ...]
) -> None:
    # Every made row is off its real one by the same step: a linear critic along it has
    # the largest gap that its penalty allows.
    real = jax.random.normal(jax.random.key(1), shape)
    away = jax.random.normal(jax.random.key(2), (1, *shape[1:]))
    by_column = compat is Compat.DENNER
    axes = 1 if by_column else tuple(range(1, len(shape)))
    along = away / jnp.sqrt(jnp.square(away).sum(axes, keepdims=True))
    keys = jax.random.split(jax.random.key(3), 4)

    def judged(slope: float) -> Scalars:
        def critic(x: jax.Array) -> jax.Array:
            values = slope * (x * along).reshape(len(x), -1).sum(axis=1)
            # Four sites, whose sum has this slope in one form, and mean in the other.
            return jnp.stack([values / 4 if by_column else values] * 4, axis=1)

        config = CriticConfig()
        _, scalars = adversarial.critic_loss(
            config, compat, critic, real, real - away, keys, VALID
        )
        return scalars | adversarial.critic_alarm(config.adversary, scalars)

    fair, winner = judged(1.0), judged(3.0)
    np.testing.assert_allclose(fair["gradient_penalty"], 0, atol=1e-5)
    np.testing.assert_allclose(fair["critic_gap"], fair["critic_distance"], rtol=1e-4)
    assert fair[alarms.CRITIC_WINS] == 0
    np.testing.assert_allclose(winner["gradient_penalty"], 4, rtol=1e-4)
    np.testing.assert_allclose(winner[alarms.CRITIC_WINS], 3, rtol=1e-4)


def _position() -> Position:
    params = {"critic": {"w": jnp.array(1.0)}, "other": {"w": jnp.array(1.0)}}
    return Position(params, {"critic": PLAYER.tx.init({"critic": params["critic"]})})


def test_a_move_changes_its_own_networks_only() -> None:
    def loss(params: dict, rows: object) -> tuple:
        return jnp.square(params["critic"]["w"] + params["other"]["w"]), {}

    after, scalars = players.move(PLAYER, loss, _position(), BATCH, 1)
    # 1 - 0.1 * 2 * (1 + 1)
    np.testing.assert_allclose(after.params["critic"]["w"], 0.6, rtol=1e-6)
    assert after.params["other"]["w"] == 1
    np.testing.assert_allclose(scalars["grad_norm/critic/critic"], 4.0)
    np.testing.assert_allclose(scalars["loss"], 4.0)


@pytest.mark.parametrize(
    ("early", "early_count", "steps"),
    [(None, 0, 3), (True, 5, 5), (False, 5, 3), (True, 1, 1)],
)
def test_steps_are_repeated_as_often_as_asked(
    early: bool | None, early_count: int, steps: int
) -> None:
    def step(position: Position, index: jax.Array) -> tuple[Position, Scalars]:
        moved = jax.tree.map(lambda w: w + 1.0, position.params)
        return Position(moved, position.opt_state), {"index": index.astype(jnp.float32)}

    run = functools.partial(
        players.repeat,
        step,
        count=3,
        early_count=early_count,
    )
    flag = None if early is None else jnp.array(early)
    after, scalars = jax.jit(lambda p: run(position=p, early=flag))(_position())
    assert after.params["critic"]["w"] == 1 + steps
    assert scalars["index"] == steps - 1
