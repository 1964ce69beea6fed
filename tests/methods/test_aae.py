import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import adversaries, denoisers
from uad_jax import optim, types
from uad_jax.compat import Compat
from uad_jax.methods import aae, base
from uad_jax.methods.aae import Variant

CONFIG = adversaries.aae_config()
RUN = base.RunShape(total_steps=10, steps_per_epoch=5, global_batch=4)
BATCH = denoisers.batch()


@functools.cache
def _update(variant: Variant, compat: Compat = Compat.NONE) -> Any:
    """(state, learning rates of autoencoder and critic) -> what a step returns."""
    config = dataclasses.replace(CONFIG, variant=variant, compat=compat)

    def update(state: types.TrainState, rate: Any, critic_rate: Any) -> Any:
        own = dataclasses.replace(config.optimizer, learning_rate=rate)
        theirs = dataclasses.replace(config.optimizer, learning_rate=critic_rate)
        critic = dataclasses.replace(config.critic, optimizer=theirs)
        changed = dataclasses.replace(config, optimizer=own, critic=critic)
        return changed.make(RUN).update(state, BATCH, jax.random.key(1))

    return jax.jit(update)


@functools.cache
def _fresh(variant: Variant) -> types.TrainState:
    config = dataclasses.replace(CONFIG, variant=variant)
    return jax.jit(config.make(RUN).init)(jax.random.key(0), BATCH)


def _moved(variant: Variant, rate: float, critic_rate: float) -> set[str]:
    """Networks that change in a step."""
    after, _ = _update(variant)(_fresh(variant), rate, critic_rate)

    def differs(name: str) -> bool:
        old, new = (s.model.params[name] for s in (_fresh(variant), after))
        pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
        return any((a != b).any() for a, b in pairs)

    return {name for name in after.model.params if differs(name)}


def test_the_critic_moves_only_itself_and_the_others_never_the_critic() -> None:
    variant = Variant.CONSTRAINED_AAE
    assert _moved(variant, 0.0, 1e-3) == {"critic"}
    assert _moved(variant, 1e-3, 0.0) == {"encoder", "decoder"}


def test_a_constrained_autoencoder_has_no_critic() -> None:
    assert _moved(Variant.CONSTRAINED_AE, 1e-3, 1e-3) == {"encoder", "decoder"}
    assert set(_fresh(Variant.CONSTRAINED_AE).opt_state) == {"autoencoder"}


@pytest.mark.parametrize(("step", "expected"), [(0, (2, 3, 1)), (5, (1, 2, 1))])
def test_first_epochs_have_their_own_numbers_of_steps(
    step: int, expected: tuple[int, ...]
) -> None:
    state = dataclasses.replace(_fresh(Variant.CONSTRAINED_AAE), step=jnp.int32(step))
    after, scalars = _update(Variant.CONSTRAINED_AAE)(state, 1e-3, 1e-3)

    def count(name: str) -> int:
        leaves = jax.tree.leaves(after.opt_state[name])
        return int(next(leaf for leaf in leaves if leaf.dtype == jnp.int32))

    names = ("autoencoder", "critic", "encoder")
    assert tuple(count(name) for name in names) == expected
    assert after.step == step + 1
    assert {
        "loss",
        "grad_norm",
        "reconstruction",
        "constraint",
        "generator_loss",
        "critic_gap",
        "gradient_penalty",
        "grad_norm/encoder/encoder",
        "alarm/critic_wins",
        "alarm/same_output",
    } <= set(scalars)


def test_the_released_penalty_lies_beyond_the_prior() -> None:
    variant = Variant.CONSTRAINED_AAE
    state = _fresh(variant)
    ours = _update(variant)(state, 1e-3, 0.0)[1]
    theirs = _update(variant, Compat.DENNER)(state, 1e-3, 0.0)[1]
    # The critic does not move, so that nothing but the penalty can differ.
    np.testing.assert_allclose(ours["critic_gap"], theirs["critic_gap"], rtol=1e-5)
    assert abs(ours["gradient_penalty"] - theirs["gradient_penalty"]) > 1e-4


def test_epochs_of_different_lengths_share_a_program() -> None:
    """As the folds of an ensemble have them."""
    schedule = optim.Schedule.COSINE
    scheduled = dataclasses.replace(adversaries.optimizer(), schedule=schedule)
    config = dataclasses.replace(
        CONFIG,
        optimizer=scheduled,
        critic=dataclasses.replace(CONFIG.critic, optimizer=scheduled),
    )
    state = dataclasses.replace(_fresh(config.variant), step=jnp.int32(2))

    def update(steps_per_epoch: int | jax.Array) -> types.Scalars:
        method = config.make(RUN._replace(steps_per_epoch=steps_per_epoch))
        after, scalars = method.update(state, BATCH, jax.random.key(1))
        return {**scalars, "moved": after.model.params["encoder"]["Dense_0"]["bias"]}

    lengths = (1, 5)  # step 2 is late, and early
    together = jax.jit(jax.vmap(update))(jnp.array(lengths))
    alone = jax.jit(functools.partial(update, lengths[1]))()
    for name, value in alone.items():
        np.testing.assert_allclose(together[name][1], value, rtol=1e-3, atol=1e-5)
    assert abs(together["moved"][0] - together["moved"][1]).max() > 1e-4


def test_constraint_is_the_change_of_the_code() -> None:
    config = dataclasses.replace(CONFIG, constraint_weight=3.0)
    model = _fresh(Variant.CONSTRAINED_AAE).model
    loss = jax.jit(functools.partial(aae.loss, config, train=False))
    value, (_, scalars) = loss(model.params, {}, BATCH, jax.random.key(2))

    def change(image: jax.Array) -> jax.Array:
        code = aae.encode(config, model.params, image)
        output = aae.decode(config, model.params, code, image.shape)
        again = aae.encode(config, model.params, output)
        return jnp.square(code - again).mean()

    np.testing.assert_allclose(scalars["constraint"], change(BATCH.image), rtol=1e-4)
    expected = scalars["reconstruction"] + 3.0 * scalars["constraint"]
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_reconstructions_vary_with_the_key_by_dropout_only() -> None:
    model = _fresh(Variant.CONSTRAINED_AAE).model
    run = functools.partial(aae.reconstruct_slices, model=model, image=BATCH.image)
    keys = jax.random.split(jax.random.key(0), 4)
    assert (run(CONFIG, keys=None) != run(CONFIG, keys=keys)).any()
    without = dataclasses.replace(CONFIG, network=adversaries.network(dropout=0.0))
    without.network.generator_norm = CONFIG.network.generator_norm
    np.testing.assert_array_equal(run(without, keys=None), run(without, keys=keys))


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        (Variant.AAE, 1_979_921 + 9_051),
        (Variant.CONSTRAINED_AAE, 1_979_921 + 18_001),
        (Variant.CONSTRAINED_AE, 1_979_921),
    ],
)
def test_networks_have_the_published_size(variant: Variant, expected: int) -> None:
    config = aae.AaeConfig(variant=variant)
    config.network.intermediate_resolution = 16
    if variant is Variant.CONSTRAINED_AAE:
        config.critic_hidden = (100, 50)
    batch = dataclasses.replace(BATCH, image=jnp.zeros((1, 128, 128, 1)))
    init = functools.partial(aae.init_model, config)
    params = jax.eval_shape(init, jax.random.key(0), batch).params
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"constraint_weight": -1.0}, "constraint_weight is -1"),
        ({"first_epochs": -1}, "first_epochs is -1"),
        ({"first_steps": 0}, "first_steps is 0"),
        ({"critic_hidden": ()}, "critic_hidden"),
        ({"critic": adversaries.critic(steps=0)}, "critic.steps is 0"),
    ],
)
def test_impossible_settings_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change).validate()
