import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uad_jax import mesh as mesh_lib


def test_to_global_splits_rows_in_order(mesh8: jax.sharding.Mesh) -> None:
    rows = {"x": np.arange(16.0).reshape(16, 1)}
    placed = mesh_lib.to_global(rows, mesh8)["x"]
    assert len(placed.addressable_shards) == 8
    np.testing.assert_array_equal(placed.addressable_shards[1].data, [[2.0], [3.0]])
    np.testing.assert_array_equal(placed, rows["x"])


def test_to_global_names_the_numbers_of_an_uneven_batch(
    mesh8: jax.sharding.Mesh,
) -> None:
    with pytest.raises(ValueError, match=r"12 rows .* 8 devices.*multiple of 8"):
        mesh_lib.to_global(np.zeros((12, 1)), mesh8)


def test_with_shardings_replicates_every_leaf(mesh8: jax.sharding.Mesh) -> None:
    abstract = jax.eval_shape(lambda: {"w": jnp.zeros((3, 2)), "n": jnp.int32(0)})
    placed = mesh_lib.with_shardings(abstract, mesh8)
    assert placed["w"].sharding == mesh_lib.replicated(mesh8)
    assert placed["n"].shape == ()


def test_indexing_a_sharded_array_works(mesh8: jax.sharding.Mesh) -> None:
    placed = mesh_lib.to_global(np.arange(8.0), mesh8)
    assert float(placed[3]) == 3.0  # raises under an Explicit mesh axis
