from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from uad_jax.ops import convolutions

X = jax.random.normal(jax.random.key(0), (3, 8, 6, 2))
KERNEL = jax.random.normal(jax.random.key(1), (3, 5, 2, 4))


def _convolve(x: jax.Array, kernel: jax.Array, **changes: Any) -> jax.Array:
    options: dict[str, Any] = {"window_strides": (2, 1), "padding": "SAME", **changes}
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **options)


def _loss(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Two convolutions, one of them in a call of its own, and custom derivatives."""
    hidden = jax.nn.relu(jax.jit(_convolve)(x, kernel))
    dilated = {"window_strides": (1, 1), "lhs_dilation": (2, 1)}
    padding = ((2, 2), (2, 2))
    back = _convolve(hidden, kernel.swapaxes(2, 3), padding=padding, **dilated)
    return jnp.square(back).sum() + jax.nn.logsumexp(hidden)


def _gradient(x: jax.Array, kernel: jax.Array) -> dict[str, jax.Array]:
    kernel_slope, x_slope = jax.grad(_loss, argnums=(1, 0))(x, kernel)
    return {"kernel": kernel_slope, "x": x_slope}


def _penalty(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The gradient of a gradient, as of a critic's penalty."""
    return jax.grad(lambda k: jnp.square(jax.grad(_loss)(x, k)).sum())(kernel)


def _grouped(x: jax.Array, kernel: jax.Array) -> jax.Array:
    def loss(kernel: jax.Array) -> jax.Array:
        return jnp.square(_convolve(x, kernel, feature_group_count=2)).sum()

    return jax.grad(loss)(kernel[:, :, :1])


def _layouts(jaxpr: Any) -> Iterator[jax.lax.ConvDimensionNumbers]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            yield equation.params["dimension_numbers"]
        for body in core.jaxprs_in_params(equation.params):
            yield from _layouts(body)


CANONICAL = jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


@pytest.mark.parametrize("function", [_gradient, _penalty, _grouped])
def test_gradients_are_the_same_with_channels_last(function: Any) -> None:
    # Without them there is nothing to change.
    given = set(_layouts(jax.make_jaxpr(function)(X, KERNEL).jaxpr))
    assert given - {CANONICAL}
    changed = convolutions.canonical(function)
    assert set(_layouts(jax.make_jaxpr(changed)(X, KERNEL).jaxpr)) == {CANONICAL}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3),
        jax.jit(changed)(X, KERNEL),
        jax.jit(function)(X, KERNEL),
    )


def test_it_stands_in_loops_of_several_members_with_what_surrounds_it() -> None:
    def steps(convert: Any, kernel: jax.Array, rate: jax.Array) -> jax.Array:
        def step(index: jax.Array, kernel: jax.Array) -> jax.Array:
            slope = _gradient(X, kernel)["kernel"]
            return kernel - rate * slope / jnp.linalg.norm(slope) * (index + 1)

        return jax.lax.fori_loop(0, 3, convert(step), kernel)

    kernels, rates = jnp.stack([KERNEL, 2 * KERNEL]), jnp.array([0.1, 0.2])
    found, expected = (
        jax.jit(jax.vmap(lambda k, r, c=convert: steps(c, k, r)))(kernels, rates)
        for convert in (convolutions.canonical, lambda step: step)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
