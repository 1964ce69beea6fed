import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uad_jax.nn import resnet, spark
from uad_jax.types import Tree

SMALL: dict[str, Any] = {"stage_sizes": (1, 1, 1, 1), "width": 2, "decoder_width": 32}
ACTIVE = jnp.array([[[True, False]], [[False, True]]])


def _image() -> jax.Array:
    return jax.random.uniform(jax.random.key(0), (2, 32, 64, 1))


def _count(tree: Tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@functools.cache
def _filled(**fields: Any) -> tuple[spark.SparK, Tree]:
    network = spark.SparK(**{**SMALL, **fields})
    shapes = jax.eval_shape(network.init, jax.random.key(0), _image(), ACTIVE)
    rng = np.random.default_rng(1)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        x = 0.3 * rng.standard_normal(leaf.shape).astype(np.float32)
        return np.abs(x) + 0.5 if path[-1].key in ("var", "scale") else x

    return network, jax.tree_util.tree_map_with_path(draw, shapes)


@functools.partial(jax.jit, static_argnums=0)
def _train(
    network: spark.SparK, variables: Tree, image: jax.Array, **kwargs: Any
) -> tuple[jax.Array, Tree]:
    return network.apply(
        variables, image, ACTIVE, train=True, mutable=["batch_stats"], **kwargs
    )


def test_parameters_are_those_of_the_published_network() -> None:
    image = jax.ShapeDtypeStruct((2, 96, 96, 1), jnp.float32)
    active = jax.ShapeDtypeStruct((2, 3, 3), bool)
    network = spark.SparK()
    out, variables = jax.eval_shape(
        network.init_with_output, jax.random.key(0), image, active
    )
    assert out.shape == (2, 96, 96, 1)
    shares = {"backbone": 0, "densify": 0, "decode": 0, "out": 0}
    for name, part in variables["params"].items():
        shares[name.split("_")[0]] += _count(part)
    assert shares == {
        "backbone": 23_501_760,
        "densify": 4_157_632,
        "decode": 10_304_896,
        "out": 17,
    }


def test_the_backbone_is_that_of_the_condition_encoder() -> None:
    _, variables = _filled()
    encoder = resnet.ConditionEncoder(3, stage_sizes=(1, 1, 1, 1), width=2)
    other = jax.eval_shape(encoder.init, jax.random.key(0), _image())
    for group in ("params", "batch_stats"):
        ours, theirs = variables[group]["backbone"], other[group]["backbone"]
        assert jax.tree.map(np.shape, ours) == jax.tree.map(np.shape, theirs)


def test_what_is_hidden_has_no_influence() -> None:
    network, variables = _filled()
    hidden = ~jnp.repeat(jnp.repeat(ACTIVE, 32, 1), 32, 2)[..., None]
    out, stats = _train(network, variables, _image())
    again, same = _train(network, variables, jnp.where(hidden, 9.0, _image()))
    for x, y in zip(
        jax.tree.leaves((out, stats)), jax.tree.leaves((again, same)), strict=True
    ):
        np.testing.assert_array_equal(x, y)
    seen, _ = _train(network, variables, jnp.where(hidden, _image(), 9.0))
    assert np.abs(seen - out).max() > 1e-3


def test_every_parameter_and_each_token_is_used() -> None:
    network, variables = _filled()

    @jax.jit
    def gradient(params: Tree) -> Tree:
        def loss(params: Tree) -> jax.Array:
            # Statistics in use: batch statistics would hide biases before them.
            out = network.apply({**variables, "params": params}, _image(), ACTIVE)
            return jnp.square(out).sum()

        return jax.grad(loss)(params)

    grads = gradient(variables["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.any(leaf), path
    assert sum("token" in part for part in grads.values()) == 4


def test_padded_rows_do_not_change_the_others() -> None:
    network, variables = _filled()
    valid = jnp.array([True, False])
    out, stats = _train(network, variables, _image(), valid=valid)
    other = _image().at[1].set(5.0)
    again, same = _train(network, variables, other, valid=valid)
    np.testing.assert_allclose(out[0], again[0], rtol=1e-5, atol=1e-5)
    for x, y in zip(jax.tree.leaves(stats), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_bfloat16_keeps_float32_parameters_and_output() -> None:
    exact, variables = _filled()
    coarse, _ = _filled(dtype=jnp.bfloat16)
    expected, _ = _train(exact, variables, _image())
    out, stats = _train(coarse, variables, _image())
    assert {leaf.dtype for leaf in jax.tree.leaves((out, stats))} == {
        jnp.dtype(jnp.float32)
    }
    assert 0 < np.abs(out - expected).max() < 0.2 * np.abs(expected).max()


def test_conv_transpose_by_hand() -> None:
    x = jnp.zeros((1, 3, 3, 1)).at[0, 1, 1, 0].set(1.0)
    kernel = jnp.arange(1.0, 17.0).reshape(4, 4, 1, 1)
    out = spark.conv_transpose(x, kernel)[0, :, :, 0]
    # Input 1 writes outputs 2 * 1 - 1 + (0 ... 3) with taps 0 ... 3.
    expected = np.zeros((6, 6))
    expected[1:5, 1:5] = kernel[:, :, 0, 0]
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("shape", [(2, 6, 4, 3), (1, 1, 1, 2)])
def test_conv_transpose_equals_the_dilated_convolution(shape: tuple[int, ...]) -> None:
    x = jax.random.normal(jax.random.key(0), shape)
    kernel = jax.random.normal(jax.random.key(1), (4, 4, shape[-1], 5))
    expected = jax.lax.conv_general_dilated(
        x,
        kernel[::-1, ::-1],
        (1, 1),
        ((2, 2), (2, 2)),
        lhs_dilation=(2, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    out = jax.jit(spark.conv_transpose)(x, kernel)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_cells_must_fit_the_image() -> None:
    network = spark.SparK(**SMALL)
    with pytest.raises(ValueError, match=r"give \(2, 1, 2\)"):
        network.init(jax.random.key(0), _image(), jnp.ones((2, 2, 2), bool))
