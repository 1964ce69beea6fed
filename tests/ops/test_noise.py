import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uad_jax import mesh
from uad_jax.ops import noise, simplex

SHAPE = (16, 24, 1)
_compiled = {}


def _make(kind: noise.Noise, **options):
    """Noise function compiled once per test session."""
    name = (kind, *options.items())
    if name not in _compiled:
        _compiled[name] = jax.jit(noise.make(kind, SHAPE, **options))
    return _compiled[name]


def _keys(count: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


KINDS = pytest.mark.parametrize("kind", list(noise.Noise))


@KINDS
def test_noise_of_a_sample_depends_on_its_key_alone(kind: noise.Noise) -> None:
    make, keys, t = _make(kind), _keys(4), jnp.full((4,), 7)
    fields = np.asarray(make(keys, t))
    assert fields.shape == (4, *SHAPE)
    assert fields.dtype == np.float32
    order = np.array([3, 1, 0, 2])
    np.testing.assert_array_equal(make(keys[order], t), fields[order])
    assert len({field.tobytes() for field in fields}) == 4
    twin = make(jnp.stack([keys[1], keys[1], keys[2], keys[1]]), t)
    np.testing.assert_array_equal(twin[0], twin[3])


@KINDS
def test_one_key_gives_one_field_to_all_samples(kind: noise.Noise) -> None:
    t = jnp.full((4,), 7)
    shared = np.asarray(_make(kind)(jax.random.key(5), t))
    assert shared.shape == (4, *SHAPE)
    np.testing.assert_array_equal(shared, np.broadcast_to(shared[:1], shared.shape))
    own = _make(kind)(jnp.broadcast_to(jax.random.key(5), (4,)), t)
    np.testing.assert_allclose(own, shared, atol=1e-5)


def test_only_noise_in_space_looks_at_the_step() -> None:
    keys = jnp.broadcast_to(jax.random.key(1), (4,))
    for kind in noise.Noise:
        fields = np.asarray(_make(kind)(keys, jnp.array([0, 200, 200, 999])))
        np.testing.assert_array_equal(fields[1], fields[2])
        same = np.allclose(fields[0], fields[3])
        assert same == (kind is not noise.Noise.SIMPLEX_3D)


def test_unit_variance_divides_simplex_noise_by_its_deviation() -> None:
    keys, t = _keys(4), jnp.arange(4)
    for kind, std in ((noise.Noise.SIMPLEX, 0.592), (noise.Noise.SIMPLEX_3D, 0.505)):
        # Pixels near the origin are too close to 0 to divide.
        plain = _make(kind, unit_variance=False)(keys, t)
        ratio = np.asarray(plain)[:, 5:] / np.asarray(_make(kind)(keys, t))[:, 5:]
        np.testing.assert_allclose(ratio, std, rtol=2e-3)


def test_gaussian_noise_is_standard_normal_and_independent() -> None:
    fields = _make(noise.Noise.GAUSSIAN)(_keys(400), jnp.zeros(400, jnp.int32))
    flat = np.asarray(fields).reshape(400, -1)
    assert abs(flat.mean()) < 0.015
    assert abs(flat.std() - 1) < 0.015
    assert np.abs(np.corrcoef(flat[:, :20].T) - np.eye(20)).max() < 0.25


def test_simplex_noise_is_the_field_of_the_key() -> None:
    keys = _keys(4)
    folded = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
    fixed = simplex.plan(SHAPE[:2], simplex.Octaves())
    make = jax.jit(lambda k: simplex.field2(fixed, simplex.permutations(k)))
    expected = make(folded)
    found = _make(noise.Noise.SIMPLEX, unit_variance=False)(keys, jnp.arange(4))
    np.testing.assert_allclose(found[..., 0], expected, atol=1e-6)


def test_channels_are_independent_and_the_first_stays_the_same() -> None:
    keys, t = _keys(4), jnp.full((4,), 3)
    colour = jax.jit(noise.make(noise.Noise.SIMPLEX, (16, 24, 2)))(keys, t)
    grey = _make(noise.Noise.SIMPLEX)(keys, t)
    np.testing.assert_allclose(colour[..., :1], grey, atol=1e-6)
    assert np.abs(np.asarray(colour[..., 1] - colour[..., 0])).max() > 0.1


def test_new_keys_and_steps_reuse_the_program() -> None:
    for kind in noise.Noise:
        make = _make(kind)
        make(_keys(4), jnp.full((4,), 7))
        before = make._cache_size()
        make(_keys(4, seed=9), jnp.arange(4))
        assert make._cache_size() == before


def test_noise_may_be_vectorised_over_runs() -> None:
    make = noise.make(noise.Noise.SIMPLEX, SHAPE)
    keys, t = _keys(4).reshape(2, 2), jnp.zeros(2, jnp.int32)
    found = jax.jit(jax.vmap(lambda k: make(k, t)))(keys)
    expected = _make(noise.Noise.SIMPLEX)(keys.reshape(-1), jnp.zeros(4, jnp.int32))
    np.testing.assert_allclose(found.reshape(4, *SHAPE), expected, atol=1e-5)


def test_noise_splits_over_devices_without_communication(mesh8) -> None:
    make = jax.jit(noise.make(noise.Noise.SIMPLEX, SHAPE))
    split = mesh.batch_sharded(mesh8)
    keys, t = _keys(8), jnp.arange(8)
    program = make.lower(jax.device_put(keys, split), jax.device_put(t, split))
    program = program.compile()
    assert not re.search("all-(gather|reduce|to-all)|permute", program.as_text())
    found = program(jax.device_put(keys, split), jax.device_put(t, split))
    np.testing.assert_allclose(found, make(keys, t), atol=1e-6)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"Unknown noise 'perlin'.*gaussian, simplex"):
        noise.make("perlin", SHAPE)
    with pytest.raises(ValueError, match="0 octaves"):
        noise.make(noise.Noise.SIMPLEX, SHAPE, octaves=simplex.Octaves(0))
    with pytest.raises(ValueError, match=r"shape \(3,\) for 2 samples"):
        noise.make(noise.Noise.GAUSSIAN, SHAPE)(_keys(3), jnp.zeros(2, jnp.int32))
