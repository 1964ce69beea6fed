from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uad_jax.nn import blocks


def _reference(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_transpose(x, kernel, (2, 2), "SAME")


def test_conv_transpose_by_hand() -> None:
    x = jnp.zeros((1, 3, 3, 1)).at[0, 1, 1, 0].set(1.0)
    kernel = jnp.arange(25.0).reshape(5, 5, 1, 1)
    out = blocks.conv_transpose(x, kernel)[0, :, :, 0]
    # Input 1 lies at output 2; the unflipped kernel is mirrored around output 2.
    np.testing.assert_array_equal(out[1:6, 1:6], kernel[::-1, ::-1, 0, 0])
    assert jnp.sum(out) == kernel.sum()


@pytest.mark.parametrize("shape", [(2, 6, 6, 3), (1, 3, 5, 1), (2, 1, 4, 2)])
def test_conv_transpose_equals_lax_in_value_and_gradients(
    shape: tuple[int, ...],
) -> None:
    key = jax.random.key(0)
    x = jax.random.normal(key, shape)
    kernel = jax.random.normal(jax.random.key(1), (5, 5, shape[-1], 4))
    weights = jax.random.normal(
        jax.random.key(2), (shape[0], 2 * shape[1], 2 * shape[2], 4)
    )
    np.testing.assert_allclose(
        blocks.conv_transpose(x, kernel), _reference(x, kernel), rtol=1e-4, atol=1e-5
    )
    ours = jax.grad(lambda *a: jnp.vdot(weights, blocks.conv_transpose(*a)), (0, 1))
    theirs = jax.grad(lambda *a: jnp.vdot(weights, _reference(*a)), (0, 1))
    for a, b in zip(ours(x, kernel), theirs(x, kernel), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_conv_transpose_module_shares_parameters_with_flax() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    theirs = nn.ConvTranspose(5, (5, 5), (2, 2))
    variables = theirs.init(jax.random.key(1), x)
    out = blocks.ConvTranspose(5).apply(variables, x)
    np.testing.assert_allclose(out, theirs.apply(variables, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 6, 6, 3), (1, 4, 10, 1), (2, 2, 4, 2)])
def test_conv_stride2_equals_lax_in_value_and_both_derivatives(
    shape: tuple[int, ...],
) -> None:
    def reference(x: jax.Array, kernel: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=numbers
        )

    x = jax.random.normal(jax.random.key(0), shape)
    kernel = jax.random.normal(jax.random.key(1), (5, 5, shape[-1], 4))

    def results(conv: Callable) -> tuple:
        def slope(kernel: jax.Array) -> jax.Array:
            return jax.grad(lambda x: jnp.sum(jnp.sin(conv(x, kernel))))(x)

        def penalty(kernel: jax.Array) -> jax.Array:
            return jnp.sum(jnp.square(slope(kernel)))

        return conv(x, kernel), slope(kernel), jax.grad(penalty)(kernel)

    for ours, theirs in zip(
        results(blocks.conv_stride2), results(reference), strict=True
    ):
        scale = jnp.abs(theirs).max()
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-5)


def test_strided_conv_shares_parameters_with_flax() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 8, 6, 3))
    theirs = nn.Conv(5, (5, 5), (2, 2))
    variables = theirs.init(jax.random.key(1), x)
    out = blocks.StridedConv(5).apply(variables, x)
    np.testing.assert_allclose(out, theirs.apply(variables, x), rtol=1e-4, atol=1e-5)


def test_channel_affine_divides_by_the_frozen_deviation() -> None:
    x = jnp.ones((1, 2, 2, 3))
    out, variables = blocks.ChannelAffine().init_with_output(jax.random.key(0), x)
    np.testing.assert_allclose(out, np.full(x.shape, 1 / np.sqrt(1.001)), rtol=1e-6)
    assert sum(p.size for p in jax.tree.leaves(variables)) == 6


def test_leaky_relu_slope_is_that_of_keras() -> None:
    np.testing.assert_allclose(
        blocks.leaky_relu(jnp.array([-1.0, 2.0])), [-0.3, 2.0], rtol=1e-6
    )


def test_dropout_keeps_the_mean_and_depends_on_each_rows_key_only() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    x = jnp.ones((4, 5000))
    out = blocks.dropout(x, 0.2, keys)
    assert set(np.unique(out)) == {0.0, np.float32(1 / 0.8)}
    np.testing.assert_allclose(out.mean(), 1.0, atol=0.02)
    np.testing.assert_array_equal(blocks.dropout(x[2:], 0.2, keys[2:]), out[2:])
    traced = jax.jit(blocks.dropout)(x, jnp.float32(0.2), keys)
    np.testing.assert_array_equal(traced > 0, out > 0)


def test_dropout_without_keys_or_rate_is_the_identity() -> None:
    x = jnp.ones((2, 3))
    assert blocks.dropout(x, 0.5, None) is x
    assert blocks.dropout(x, 0.0, jax.random.split(jax.random.key(0), 2)) is x


@pytest.mark.parametrize(
    ("height", "width", "resolution", "levels"),
    [
        (128, 128, 8, 4),
        (128, 128, 16, 3),
        (96, 96, 6, 4),
        (96, 96, 12, 3),
        (96, 96, 0, 4),
        (128, 128, 0, 4),
        (96, 80, 5, 4),
        (80, 96, 10, 3),
    ],
)
def test_num_levels(height: int, width: int, resolution: int, levels: int) -> None:
    assert blocks.num_levels(height, width, resolution) == levels


def test_num_levels_refuses_the_silent_12x12_code() -> None:
    with pytest.raises(ValueError, match=r"is 8.*96x96.*\[48, 24, 12, 6, 3\]"):
        blocks.num_levels(96, 96, 8)


@pytest.mark.parametrize("size", [(95, 95), (100, 100), (96, 90), (8, 8)])
def test_num_levels_names_the_remedy(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"Use one of|Pad to even sides"):
        blocks.num_levels(*size, 0)
