import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import adversaries, denoisers
from uad_jax import alarms, types
from uad_jax.adversarial_config import Bottleneck, NetworkConfig
from uad_jax.compat import Compat
from uad_jax.methods import anovaegan, base

CONFIG = adversaries.anovaegan_config()
JOINT = adversaries.aegan_config()
RUN = base.RunShape(total_steps=10, steps_per_epoch=5, global_batch=4)
BATCH = denoisers.batch()


@functools.cache
def _update(form: str) -> Any:
    """(state, learning rates of autoencoder and critic) -> what a step returns."""
    released = dataclasses.replace(CONFIG, compat=Compat.DENNER)
    forms = {"separate": CONFIG, "joint": JOINT, "released": released}
    config: Any = forms[form]

    def update(state: types.TrainState, rate: Any, critic_rate: Any) -> Any:
        own = dataclasses.replace(config.optimizer, learning_rate=rate)
        theirs = dataclasses.replace(config.optimizer, learning_rate=critic_rate)
        critic = dataclasses.replace(config.critic, optimizer=theirs)
        changed = dataclasses.replace(config, optimizer=own, critic=critic)
        return changed.make(RUN).update(state, BATCH, jax.random.key(1))

    return jax.jit(update)


@functools.cache
def _fresh(form: str) -> types.TrainState:
    config: Any = {"separate": CONFIG, "joint": JOINT}[form]
    return jax.jit(config.make(RUN).init)(jax.random.key(0), BATCH)


def _moved(form: str, rate: float, critic_rate: float) -> set[str]:
    """Networks that change in a step."""
    after, _ = _update(form)(_fresh(form), rate, critic_rate)

    def differs(name: str) -> bool:
        old, new = (s.model.params[name] for s in (_fresh(form), after))
        pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
        return any((a != b).any() for a, b in pairs)

    return {name for name in after.model.params if differs(name)}


@pytest.mark.parametrize("form", ["separate", "joint"])
def test_the_critic_moves_only_itself_and_the_others_never_the_critic(
    form: str,
) -> None:
    assert _moved(form, 0.0, 1e-3) == {"critic"}
    assert _moved(form, 1e-3, 0.0) == {"encoder", "generator"}


def test_every_optimiser_has_its_own_state_and_takes_its_own_number_of_steps() -> None:
    assert set(_fresh("joint").opt_state) == {"vae", "critic"}
    after, scalars = _update("separate")(_fresh("separate"), 1e-3, 1e-3)

    def count(name: str) -> int:
        leaves = jax.tree.leaves(after.opt_state[name])
        return int(next(leaf for leaf in leaves if leaf.dtype == jnp.int32))

    assert {name: count(name) for name in after.opt_state} == {
        "vae": 1,
        "generator": 1,
        "critic": CONFIG.critic.steps,
    }
    assert after.step == 1
    assert set(after.ema or {}) == {"encoder", "generator"}
    assert {
        "loss",
        "grad_norm",
        "reconstruction",
        "kl",
        "generator_loss",
        "critic_loss",
        "critic_gap",
        "critic_accuracy",
        "gradient_penalty",
        "grad_norm/vae/encoder",
        "grad_norm/vae/generator",
        "grad_norm/generator/generator",
        "grad_norm/critic/critic",
        alarms.CRITIC_WINS,
        alarms.FLAT_OUTPUT,
        alarms.SAME_OUTPUT,
    } <= set(scalars)
    assert scalars["grad_norm/generator/generator"] > 0


def test_loss_is_the_sum_of_its_weighted_terms() -> None:
    config = dataclasses.replace(
        CONFIG, joint=True, kl_weight=3.0, adversarial_weight=0.25
    )
    params = _fresh("separate").model.params
    loss = jax.jit(functools.partial(anovaegan.loss, config))
    value, (_, scalars) = loss(params, {}, BATCH, jax.random.key(2))
    expected = (
        scalars["reconstruction"]
        + 3.0 * scalars["kl"]
        + 0.25 * scalars["generator_loss"]
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(
        scalars["reconstruction"], 256 * scalars["l1"], rtol=1e-5
    )


def test_the_released_penalty_is_that_of_the_columns() -> None:
    ours, theirs = (
        _update(form)(_fresh("separate"), 1e-3, 0.0)[1]
        for form in ("separate", "released")
    )
    # The critic does not move, so that nothing but the penalty can differ.
    np.testing.assert_allclose(ours["critic_gap"], theirs["critic_gap"], rtol=1e-5)
    assert abs(ours["gradient_penalty"] - theirs["gradient_penalty"]) > 1e-4


def test_reconstructions_without_keys_are_the_decoded_mean() -> None:
    model = _fresh("separate").model
    keys = [jax.random.split(jax.random.key(i), 4) for i in (0, 1)]
    mean = anovaegan.reconstruct_slices(CONFIG, model, BATCH.image, None)
    codes = anovaegan.encode(CONFIG, model.params, BATCH.image)
    expected = anovaegan.decode(CONFIG, model.params, codes, BATCH.image.shape)
    np.testing.assert_array_equal(mean, expected)
    samples = [
        anovaegan.reconstruct_slices(CONFIG, model, BATCH.image, k) for k in keys
    ]
    assert (samples[0] != samples[1]).any()
    assert (samples[0] != mean).any()
    pseudo_healthy = anovaegan.reconstruct(
        dataclasses.replace(CONFIG, sample_at_test=False),
        model,
        BATCH.image,
        BATCH.mask,
        jax.random.key(0),
    )
    np.testing.assert_array_equal(pseudo_healthy, mean)


@pytest.mark.parametrize(
    ("bottleneck", "variational", "expected"),
    [
        (Bottleneck.DENSE, True, (931_216, 869_409, 677_761)),
        (Bottleneck.DENSE, False, (800_016, 869_409, 677_761)),
        # Two (one) 1x1 convolutions to 64 channels, and one back to 128.
        (Bottleneck.SPATIAL, True, (666_752 + 2 * 8256, 743_457, 677_761)),
        (Bottleneck.SPATIAL, False, (666_752 + 8256, 743_457, 677_761)),
    ],
)
def test_networks_have_the_published_size(
    bottleneck: Bottleneck, variational: bool, expected: tuple[int, ...]
) -> None:
    config = anovaegan.AnoVaeGanConfig(
        bottleneck=bottleneck,
        variational=variational,
        network=NetworkConfig(
            latent_size=128 if bottleneck is Bottleneck.DENSE else 64
        ),
    )
    image = jnp.zeros((1, 128, 128, 1))
    batch = dataclasses.replace(BATCH, image=image)
    init = functools.partial(anovaegan.init_model, config)
    params = jax.eval_shape(init, jax.random.key(0), batch).params
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(params[name]))
        for name in ("encoder", "generator", "critic")
    ]
    assert tuple(sizes) == expected


def _scaled(factor: float) -> types.Scalars:
    """Scalars of a step after the generator's last layer was scaled."""
    state = _fresh("separate")
    generator = state.model.params["generator"]
    last = jax.tree.map(lambda x: factor * x, generator["Conv_1"])
    params = {**state.model.params, "generator": {**generator, "Conv_1": last}}
    model = dataclasses.replace(state.model, params=params)
    changed = dataclasses.replace(state, model=model)
    return _update("separate")(changed, 1e-3, 1e-3)[1]


def test_alarms_fire_on_a_dead_generator_and_not_on_a_live_one() -> None:
    dead, live = _scaled(0.0), _scaled(1.0)
    for name in (alarms.FLAT_OUTPUT, alarms.SAME_OUTPUT):
        assert dead[name] > 0.9
        assert live[name] == 0
    assert live[alarms.CRITIC_WINS] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl_weight": -1.0}, "kl_weight is -1"),
        ({"adversarial_weight": -1.0}, "adversarial_weight is -1"),
        ({"network": adversaries.network(dropout=1.0)}, "network.dropout is 1"),
        ({"network": adversaries.network(width=4)}, "multiples of 8"),
        ({"critic": adversaries.critic(steps=0)}, "critic.steps is 0"),
        ({"ema_decay": 1.0}, "ema_decay"),
    ],
)
def test_impossible_settings_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change).validate()
