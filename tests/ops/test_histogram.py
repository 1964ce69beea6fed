import jax
import jax.numpy as jnp
import numpy as np

from uad_jax import mesh as mesh_lib
from uad_jax.ops import histogram

_counts = jax.jit(histogram.counts)


def test_bins_by_hand() -> None:
    edges = jnp.array([-1.0, 0.0, 2.0])
    scores = jnp.array([-5.0, -1.0, -0.5, 0.0, 1.0, 2.0, 2.1])
    found = histogram.bin_index(scores, edges)
    np.testing.assert_array_equal(found, [0, 0, 1, 1, 2, 2, 3])


def test_counts_by_hand() -> None:
    found = _counts(
        jnp.array([[0.5, 1.5, 1.5, 9.0]]),
        jnp.array([[False, True, True, False]]),
        jnp.array([[True, True, False, True]]),
        jnp.array([1.0, 2.0]),
    )
    np.testing.assert_array_equal(found, [[[1, 0, 1], [0, 1, 0]]])
    assert found.dtype == jnp.int32


def test_everything_counted_is_in_one_bin_far_out_values_too() -> None:
    rng = np.random.default_rng(0)
    scores = (rng.normal(size=(3, 4, 5, 6)) * 1e30).astype(np.float32)
    lesion, counted = rng.random((2, *scores.shape)) < 0.5
    edges = np.sort(rng.normal(size=7)).astype(np.float32)
    found = np.asarray(_counts(scores, lesion, counted, edges))
    for n in range(3):
        assert found[n, 0].sum() == (counted & ~lesion)[n].sum()
        assert found[n, 1].sum() == (counted & lesion)[n].sum()
        above = (scores[n] > edges[3]) & counted[n] & lesion[n]
        assert found[n, 1, 4:].sum() == above.sum()


def test_fault_D8_eight_devices_count_like_one_without_talking(
    mesh8: jax.sharding.Mesh,
) -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(8, 2, 5, 5)).astype(np.float32)
    lesion, counted = rng.random((2, *scores.shape)) < 0.5
    edges = np.linspace(-1, 1, 9, dtype=np.float32)
    sharded = jax.device_put((scores, lesion, counted), mesh_lib.batch_sharded(mesh8))
    edges_everywhere = jax.device_put(edges, mesh_lib.replicated(mesh8))
    found = _counts(*sharded, edges_everywhere)
    np.testing.assert_array_equal(found, _counts(scores, lesion, counted, edges))
    program = _counts.lower(*sharded, edges_everywhere).compile().as_text()
    assert "all-gather" not in program
    assert "all-reduce" not in program
