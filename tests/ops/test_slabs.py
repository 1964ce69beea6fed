import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uad_jax.ops import slabs


def _valid(*depths: int, length: int) -> jax.Array:
    return jnp.arange(length)[None] < jnp.array(depths)[:, None]


def test_places_by_hand() -> None:
    where = slabs.places(_valid(7, 4, 2, length=7), 3, 1)
    np.testing.assert_array_equal(where.start, [[0, 2, 4], [0, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(
        where.used, [[True, True, True], [True, True, False], [True, False, False]]
    )
    thin = slabs.places(_valid(2, length=2), 3, 0)
    np.testing.assert_array_equal(thin.start, [[0]])


@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_merging_what_was_cut_gives_it_back(overlap: int) -> None:
    valid = _valid(7, 4, 2, length=7)
    x = jax.random.normal(jax.random.key(0), (3, 7, 2, 5)) * valid[..., None, None]
    where = slabs.places(valid, 3, overlap)
    parts = slabs.cut(slabs.padded(x, 3), where.start, 3)
    assert parts.shape == (3, where.start.shape[1], 3, 2, 5)
    np.testing.assert_array_equal(parts[0, 1], x[0, 3 - overlap : 6 - overlap])
    whole = slabs.merged(parts, where, 7)
    np.testing.assert_allclose(whole, x, rtol=1e-6)


def test_where_slabs_overlap_their_mean_counts() -> None:
    where = slabs.places(_valid(4, length=4), 3, 2)
    parts = jnp.array([[[1.0, 2.0, 3.0], [4.0, 6.0, 8.0]]])  # from 0 and from 1
    np.testing.assert_array_equal(slabs.merged(parts, where, 4), [[1, 3, 4.5, 8]])


def test_a_volume_thinner_than_a_slab_is_one_with_padding() -> None:
    x = jnp.array([[1.0, 2.0]])
    where = slabs.places(jnp.ones((1, 2), bool), 3, 0)
    parts = slabs.cut(slabs.padded(x, 3), where.start, 3)
    np.testing.assert_array_equal(parts, [[[1, 2, 0]]])
    np.testing.assert_array_equal(slabs.merged(parts, where, 2), x)
