"""Convolutions in the layout that XLA:CPU computes fast inside loops."""

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
from jax.extend import core
from jax.extend.core import primitives

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")

# Calls of functions. Their own derivatives, if any, have been taken by then.
_CALLS = (
    primitives.jit_p,
    primitives.custom_jvp_call_p,
    primitives.custom_vjp_call_p,
)


def canonical(function: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """The same function with channels last in its convolutions.

    Gradients of convolutions have batch and channels in other places. XLA:CPU moves
    them where it is fast, but not in the bodies of loops and in the branches of a
    `lax.cond`: there these convolutions are 20 to 40 times slower. Here they are moved
    before.

    Args:
      function: Of arrays, such as a whole step of training: what is returned keeps no
        custom derivatives and is not meant to be differentiated. Convolutions in its
        own loops, in `lax.cond` and in `jax.checkpoint` stay as they are.

    Returns:
      A function with the same arguments and results, up to rounding.
    """

    def run(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        leaves, tree = jax.tree.flatten((args, kwargs))

        def flat(*leaves: Any) -> _Result:
            args, kwargs = jax.tree.unflatten(tree, leaves)
            return function(*args, **kwargs)

        closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)
        return jax.tree.unflatten(jax.tree.structure(shapes), _run(closed, leaves))

    return run


def _run(closed: core.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """Runs a traced function operation by operation."""
    jaxpr = closed.jaxpr
    values = dict(
        zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True)
    )

    def read(name: Any) -> Any:
        return name.val if isinstance(name, core.Literal) else values[name]

    for equation in jaxpr.eqns:
        primitive, params = equation.primitive, equation.params
        given = [read(name) for name in equation.invars]
        if primitive in _CALLS:
            body = params["jaxpr" if primitive is primitives.jit_p else "call_jaxpr"]
            found = _run(body, given)
        elif primitive is primitives.conv_general_dilated_p:
            x, kernel = given
            found = [_convolve(x, kernel, params)]
        else:
            found = primitive.bind(*given, **params)
            found = found if primitive.multiple_results else [found]
        values.update(zip(equation.outvars, found, strict=True))
    return [read(name) for name in jaxpr.outvars]


def _convolve(x: jax.Array, kernel: jax.Array, params: dict[str, Any]) -> jax.Array:
    """A convolution as [N, *space, C], [*space, C in, C out] -> [N, *space, C]."""
    given = params["dimension_numbers"]
    batch, channels, *space = given.lhs_spec
    x = x.transpose(batch, *space, channels)
    channels_out, channels_in, *space = given.rhs_spec
    kernel = kernel.transpose(*space, channels_in, channels_out)
    last = x.ndim - 1
    between = tuple(range(1, last))
    outside = (0, last, *between)
    numbers = jax.lax.ConvDimensionNumbers(
        lhs_spec=outside, rhs_spec=(last, last - 1, *range(last - 1)), out_spec=outside
    )
    found = primitives.conv_general_dilated_p.bind(
        x, kernel, **{**params, "dimension_numbers": numbers}
    )
    # Where each axis of the result stands now.
    batch, channels, *space = given.out_spec
    places = {batch: 0, channels: last, **dict(zip(space, between, strict=True))}
    return found.transpose([places[axis] for axis in range(x.ndim)])
