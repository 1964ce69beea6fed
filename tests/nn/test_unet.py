import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uad_jax import flops
from uad_jax.nn import unet
from uad_jax.types import Tree

SMALL: dict[str, Any] = {
    "width": 8,
    "multipliers": (1, 2),
    "num_blocks": 1,
    "head_size": 8,
}
TINY = {**SMALL, "multipliers": (2,), "num_blocks": 0}
STEPS = jnp.array([3, 700])
CONDITION = jnp.array([[0.1, -1.0, 2.0], [0.5, 0.0, 1.0]])


def _images(height: int = 8, width: int = 12, channels: int = 1) -> jax.Array:
    return jax.random.uniform(jax.random.key(0), (2, height, width, channels))


def _shapes(
    size: int = 96, condition: int | None = None, **fields: Any
) -> tuple[unet.UNet, Tree, list[jax.ShapeDtypeStruct]]:
    network = unet.UNet(**fields)
    inputs = [
        jax.ShapeDtypeStruct((1, size, size, 1), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    ]
    if condition:
        inputs.append(jax.ShapeDtypeStruct((1, condition), jnp.float32))
    variables = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    return network, variables, inputs


def _count(tree: Tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@functools.cache
def _filled(**fields: Any) -> tuple[unet.UNet, Tree]:
    """A small network whose parameters are all random: nothing is zero."""
    network = unet.UNet(**{**SMALL, **fields})
    condition = CONDITION if network.conditional else None
    shapes = jax.eval_shape(
        network.init, jax.random.key(1), _images(), STEPS, condition
    )
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(1)
    drawn = [0.3 * rng.standard_normal(x.shape).astype(np.float32) for x in leaves]
    return network, jax.tree.unflatten(structure, drawn)


@functools.partial(jax.jit, static_argnums=0)
def _apply(network: unet.UNet, variables: Tree, *inputs: jax.Array) -> jax.Array:
    return network.apply(variables, *inputs)


@pytest.mark.parametrize(
    ("fields", "condition", "parameters"),
    [
        ({"film": False}, None, 34_493_313),
        ({}, None, 37_513_857),
        ({"conditional": True}, 512, 44_068_481),
    ],
    ids=["DDPM", "pDDPM", "cDDPM"],
)
def test_parameters_and_work_of_the_published_networks(
    fields: dict[str, Any], condition: int | None, parameters: int
) -> None:
    network, variables, inputs = _shapes(condition=condition, **fields)
    assert _count(variables) == parameters
    # The published count includes products with the padding; XLA's does not.
    work = flops.count(network.apply, variables, *inputs).flops
    assert work == pytest.approx(149.12e9, rel=0.025)


def test_the_parts_of_pddpm_hold_the_published_shares() -> None:
    params = _shapes()[1]["params"]
    shares = {"step": 0, "down": 0, "middle": 0, "up": 0, "out": 0}
    for name, part in params.items():
        shares[name.split("_")[0].replace("stem", "down")] += _count(part)
    assert shares == {
        "step": 328_704,
        "down": 11_554_048,
        "middle": 3_151_360,
        "up": 22_478_336,
        "out": 1_409,
    }
    blocks = [part for part in params.values() if "conv_0" in part]
    assert len(blocks) == 27
    assert sum("qkv" in part for part in params.values()) == 1


def test_parameters_of_anoddpm() -> None:
    _, variables, _ = _shapes(
        256,
        film=False,
        multipliers=(1, 1, 2, 2, 4, 4),
        num_blocks=2,
        attention_levels=(3, 4, 5),
        num_heads=2,
    )
    assert _count(variables) == 131_649_793


def test_a_fresh_network_returns_zero() -> None:
    network = unet.UNet(**TINY)
    out, variables = jax.jit(network.init_with_output)(
        jax.random.key(0), _images(), STEPS
    )
    np.testing.assert_array_equal(out, np.zeros((2, 8, 12, 1)))
    params = variables["params"]
    assert not np.any(params["middle_0"]["conv_1"]["kernel"])
    assert not np.any(params["middle_attention"]["out"]["kernel"])
    # Everything else is uniform within 1 / sqrt(fan_in), biases too.
    kernel = np.asarray(params["up_0_0"]["conv_0"]["kernel"])
    bound = 1 / np.sqrt(9 * kernel.shape[2])
    assert 0.95 * bound < np.abs(kernel).max() <= bound
    assert kernel.var() == pytest.approx(bound**2 / 3, rel=0.1)
    assert 0 < np.abs(params["stem"]["bias"]).max() <= 1 / 3


@pytest.mark.parametrize("film", [True, False])
def test_rows_depend_on_their_own_image_and_step_only(film: bool) -> None:
    network, variables = _filled(film=film)
    image = _images()
    out = _apply(network, variables, image, STEPS)
    assert out.shape == image.shape
    again = _apply(network, variables, image.at[1].add(1.0), STEPS.at[1].add(9))
    np.testing.assert_allclose(again[0], out[0], rtol=1e-5, atol=1e-5)
    assert np.abs(again[1] - out[1]).max() > 1e-2
    step = _apply(network, variables, image, STEPS.at[1].add(9))
    assert np.abs(step[1] - out[1]).max() > 1e-3


def test_the_condition_changes_its_own_row() -> None:
    network, variables = _filled(conditional=True)
    out = _apply(network, variables, _images(), STEPS, CONDITION)
    changed = CONDITION.at[1, 0].add(1.0)
    again = _apply(network, variables, _images(), STEPS, changed)
    np.testing.assert_allclose(again[0], out[0], rtol=1e-5, atol=1e-5)
    assert np.abs(again[1] - out[1]).max() > 1e-3


def test_a_condition_is_given_exactly_to_conditional_networks() -> None:
    network = unet.UNet(**SMALL)
    with pytest.raises(ValueError, match=r"conditional is False.*\(2, 3\)"):
        jax.eval_shape(network.init, jax.random.key(0), _images(), STEPS, CONDITION)
    network = unet.UNet(**SMALL, conditional=True)
    with pytest.raises(ValueError, match=r"conditional is True.*none"):
        jax.eval_shape(network.init, jax.random.key(0), _images(), STEPS)


def test_bfloat16_keeps_float32_parameters_and_output_and_stays_close() -> None:
    exact, variables = _filled()
    coarse, same = _filled(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(_shapes(dtype=jnp.bfloat16)[1])} == {
        jnp.dtype(jnp.float32)
    }
    image = 100.0 * _images()
    expected = _apply(exact, variables, image, STEPS)
    out = _apply(coarse, same, image, STEPS)
    assert out.dtype == jnp.float32
    assert np.isfinite(out).all()
    assert 0 < np.abs(out - expected).max() < 0.1 * np.abs(expected).max()


def test_computing_blocks_again_changes_no_number() -> None:
    kept, variables = _filled(**TINY)
    again, same = _filled(**TINY, remat=True)
    assert jax.tree.structure(variables) == jax.tree.structure(same)

    def count(network: unet.UNet) -> int:
        program = jax.make_jaxpr(network.apply)(variables, _images(), STEPS)
        return sum("prevent_cse" in eqn.params for eqn in program.eqns)

    assert count(kept) == 0
    assert count(again) == 4  # three residual blocks and the attention

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(network: unet.UNet, variables: Tree) -> tuple:
        def loss(variables: Tree) -> jax.Array:
            return jnp.square(network.apply(variables, _images(), STEPS)).mean()

        return jax.value_and_grad(loss)(variables)

    ours, theirs = (
        np.concatenate([x.ravel() for x in jax.tree.leaves(gradient(net, variables))])
        for net in (kept, again)
    )
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5 * np.abs(ours).max())


def test_levels_attend_where_asked() -> None:
    params = _shapes(8, **SMALL, attention_levels=(1,))[1]["params"]
    assert {name for name in params if "attention" in name} == {
        "down_1_0_attention",
        "middle_attention",
        "up_1_0_attention",
        "up_1_1_attention",
    }


def test_attention_equals_the_formula_head_by_head() -> None:
    module = unet.Attention(head_size=2)
    x = jax.random.normal(jax.random.key(0), (1, 2, 3, 4))
    params = jax.jit(module.init)(jax.random.key(1), x)["params"]
    params["out"] = {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}
    h = np.asarray(x).reshape(6, 4)
    normed = (h - h.mean()) / np.sqrt(h.var() + 1e-5)  # one group of four channels
    qkv = normed @ np.asarray(params["qkv"]["kernel"]) + params["qkv"]["bias"][None]
    expected = []
    for head in range(2):
        q, k, v = (qkv[:, 4 * i + 2 * head :][:, :2] for i in range(3))
        weights = np.exp(q @ k.T / np.sqrt(2))
        expected.append(weights / weights.sum(1, keepdims=True) @ v)
    expected = h + np.concatenate(expected, axis=1)
    out = jax.jit(module.apply)({"params": params}, x).reshape(6, 4)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_head_sizes_must_divide_the_channels() -> None:
    with pytest.raises(ValueError, match=r"head_size is 7.*16 channels"):
        _shapes(8, **{**SMALL, "head_size": 7})


def test_fresh_blocks_halve_by_means_and_double_by_copies() -> None:
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    for resample, expected in (
        (unet.Resample.NONE, x[0, :, :, 0]),
        (unet.Resample.HALVE, [[2.5, 4.5], [10.5, 12.5]]),
        (unet.Resample.DOUBLE, np.repeat(np.repeat(x[0, :, :, 0], 2, 0), 2, 1)),
    ):
        block = unet.ResidualBlock(1, resample)
        init = jax.jit(block.init_with_output)
        out, _ = init(jax.random.key(0), x, jnp.ones((1, 3)))
        np.testing.assert_array_equal(out[0, :, :, 0], expected)


def test_steps_are_embedded_as_cosines_then_sines() -> None:
    out = unet.embed_steps(jnp.array([0, 5]), 4)
    np.testing.assert_array_equal(out[0], [1, 1, 0, 0])
    expected = [np.cos(5), np.cos(0.05), np.sin(5), np.sin(0.05)]
    np.testing.assert_allclose(out[1], expected, rtol=1e-5)
    last = unet.embed_steps(jnp.array([999]), 128)
    assert last[0, 127] == pytest.approx(np.sin(999 / 10_000 ** (63 / 64)), rel=1e-4)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((95, 96), r"multiples of 4.*95x96.*Crop it to 92x96, pad it to 96x96"),
        ((98, 97), r"Crop it to 96x96, pad it to 100x100"),
        ((2, 4), r"Crop it to 4x4, pad it to 4x4"),
    ],
)
def test_sizes_that_cannot_be_halved_are_refused(
    size: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        unet.check_size(*size, 3)
    network = unet.UNet(**{**SMALL, "multipliers": (1, 1, 1)})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(network.init, jax.random.key(0), _images(*size), STEPS)
