import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uad_jax.nn import sequence
from uad_jax.nn.sequence import Context, Mixer, Positions

LENGTH = 5
MIXERS = [mixer for mixer in Mixer if mixer is not Mixer.NONE]


def _features(mixer: Mixer, rows: int = 2, length: int = LENGTH) -> jax.Array:
    shape = (2, 2, 16) if mixer is Mixer.CONVGRU else (8,)
    return jax.random.normal(jax.random.key(1), (rows, length, *shape))


@functools.cache
def _context(mixer: Mixer, length: int = LENGTH, **changes: int) -> tuple:
    """Compiled module and its parameters, one program per mixer and length."""
    module = Context(
        mixer=mixer, latent_size=8, num_heads=2, feedforward_size=16, **changes
    )
    every = jnp.ones((2, length), bool)
    x = _features(mixer, length=length)
    variables = jax.jit(module.init)(jax.random.key(0), x, every)
    return jax.jit(module.apply), variables


def _mixed(mixer: Mixer, x: jax.Array, valid: jax.Array) -> np.ndarray:
    apply, variables = _context(mixer, x.shape[1])
    return np.asarray(jnp.stack(apply(variables, x, valid)))


@pytest.mark.parametrize("mixer", MIXERS)
def test_padding_anywhere_changes_nothing_for_the_other_slices(mixer: Mixer) -> None:
    x = _features(mixer)
    for first, last in ((0, 3), (2, 5), (1, 4)):
        inside = (jnp.arange(LENGTH) >= first) & (jnp.arange(LENGTH) < last)
        valid = jnp.stack([inside, inside])
        noise = 9.0 * jax.random.normal(jax.random.key(2), x.shape)
        other = jnp.where(valid.reshape(2, LENGTH, *[1] * (x.ndim - 2)), x, noise)
        one, two = _mixed(mixer, x, valid), _mixed(mixer, other, valid)
        np.testing.assert_array_equal(one[:, :, first:last], two[:, :, first:last])
        whole = _mixed(mixer, x, jnp.ones_like(valid))
        # The slices that are padding now were looked at before.
        assert not np.allclose(whole[:, :, first:last], one[:, :, first:last], 1e-3)


@pytest.mark.parametrize("mixer", [Mixer.GRU, Mixer.LSTM, Mixer.CONVGRU])
def test_a_recurrence_of_padded_slabs_is_that_of_the_short_slab(mixer: Mixer) -> None:
    # Backwards it must begin at the last valid slice, not at the padding.
    x, count = _features(mixer), LENGTH - 2
    valid = jnp.broadcast_to(jnp.arange(LENGTH)[None] < count, (2, LENGTH))
    _, variables = _context(mixer)
    short = _context(mixer, count)[0](variables, x[:, :count], valid[:, :count])
    padded = _mixed(mixer, x, valid)[:, :, :count]
    np.testing.assert_allclose(padded, jnp.stack(short), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_flow_between_all_slices(mixer: Mixer) -> None:
    apply, variables = _context(mixer)
    x, valid = _features(mixer), jnp.ones((2, LENGTH), bool)

    @jax.jit
    def reach(t: jax.Array) -> jax.Array:
        def mean_of(x: jax.Array) -> jax.Array:
            return apply(variables, x, valid)[0][0, t].sum()

        return jnp.abs(jax.grad(mean_of)(x)).sum(axis=tuple(range(2, x.ndim)))

    for t in (0, 2, LENGTH - 1):
        found = np.asarray(reach(jnp.int32(t)))
        assert (found[0] > 0).all()
        assert (found[1] == 0).all()  # another volume


@pytest.mark.parametrize("mixer", MIXERS)
def test_order_matters_and_one_slice_is_enough(mixer: Mixer) -> None:
    x, order = _features(mixer), np.array([3, 0, 4, 1, 2])
    valid = jnp.ones((2, LENGTH), bool)
    straight, mixed = _mixed(mixer, x, valid), _mixed(mixer, x[:, order], valid)
    assert not np.allclose(straight[:, :, order], mixed, atol=1e-3)
    assert np.isfinite(_mixed(mixer, x[:, :1], valid[:, :1])).all()


@pytest.mark.parametrize("mixer", MIXERS)
def test_hidden_slices_are_seen_by_none(mixer: Mixer) -> None:
    apply, variables = _context(mixer)
    x, valid = _features(mixer), jnp.ones((2, LENGTH), bool)
    hidden = jnp.broadcast_to(jnp.arange(LENGTH)[None] == 2, valid.shape)
    other = x.at[:, 2].set(7.0)
    one, two = (
        apply(variables, x, valid, hidden),
        apply(variables, other, valid, hidden),
    )
    np.testing.assert_array_equal(one[0], two[0])
    assert (apply(variables, x, valid)[0][:, 2] != one[0][:, 2]).any()


def test_convolve_equals_a_convolution() -> None:
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (2, 4, 3, 5))
    kernel = jax.random.normal(keys[1], (3, 3, 5, 7))
    expected = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(
        sequence.convolve(x, kernel), expected, rtol=1e-4, atol=1e-5
    )


def test_conv_gru_of_one_pixel_is_a_gru() -> None:
    # Of a map of one pixel only the middle of each kernel counts.
    cell, plain = sequence.ConvGruCell(4), nn.GRUCell(4)
    x = jax.random.normal(jax.random.key(0), (3, 1, 1, 6))
    state = jax.random.normal(jax.random.key(1), (3, 1, 1, 4))
    params = jax.jit(cell.init)(jax.random.key(2), state, x)["params"]
    given = jnp.split(params["input_kernel"][1, 1], 3, axis=-1)
    kept = jnp.split(params["state_kernel"][1, 1], 3, axis=-1)
    zeros = jnp.zeros(4)
    same = {
        f"i{n}": {"kernel": k, "bias": zeros} for n, k in zip("rzn", given, strict=True)
    } | {f"h{n}": {"kernel": k} for n, k in zip("rzn", kept, strict=True)}
    same["hn"]["bias"] = zeros
    expected, _ = jax.jit(plain.apply)({"params": same}, state[:, 0, 0], x[:, 0, 0])
    found, _ = jax.jit(cell.apply)({"params": params}, state, x)
    np.testing.assert_allclose(found[:, 0, 0], expected, rtol=1e-5, atol=1e-6)


def test_sinusoids_by_hand() -> None:
    table = sequence.sinusoids(3, 4)
    assert table.shape == (3, 4)
    expected = [math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02)]
    np.testing.assert_allclose(table[2], expected, rtol=1e-5)


@pytest.mark.parametrize("positions", list(Positions))
def test_positions_tell_equal_slices_apart(positions: Positions) -> None:
    module = sequence.Transformer(1, 2, 16, positions)
    x = jnp.ones((1, LENGTH, 8))
    valid = jnp.ones((1, LENGTH), bool)
    out, variables = jax.jit(module.init_with_output)(jax.random.key(0), x, valid)
    assert not np.allclose(out[0, 0], out[0, 1], atol=1e-3)
    learned = positions is Positions.LEARNED
    assert ("positions" in variables["params"]) == learned


@pytest.mark.parametrize("mixer", MIXERS)
def test_layers_are_stacked(mixer: Mixer) -> None:
    x, valid = _features(mixer), jnp.ones((2, LENGTH), bool)

    def layers(count: int) -> int:
        module = Context(mixer, 8, count, num_heads=2)
        shapes = jax.eval_shape(module.init, jax.random.key(0), x, valid)
        return len(jax.tree.leaves(shapes))

    assert layers(2) > layers(1)
