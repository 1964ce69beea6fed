import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh

from uad_jax import flops

PRODUCT = 2 * 16**3
SQUARE = jnp.ones((16, 16))


def _times(x: jax.Array, count: int, unroll: int = 1) -> jax.Array:
    step = jax.checkpoint(lambda x: x @ x)
    return jax.lax.scan(lambda x, _: (step(x), None), x, length=count, unroll=unroll)[0]


def test_bodies_of_loops_count_as_often_as_they_run() -> None:
    def nested(x: jax.Array) -> jax.Array:
        def outer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return _times(x, 3) @ x, None

        return jax.lax.scan(outer, x @ x, length=5)[0]

    counted = flops.count(nested, SQUARE)
    assert counted.flops == pytest.approx((1 + 5 * (3 + 1)) * PRODUCT, rel=0.01)
    assert counted.open_loops == 0


@pytest.mark.parametrize("unroll", [1, 2, 5, 8])
def test_unrolled_bodies_are_not_counted_twice(unroll: int) -> None:
    counted = flops.count(lambda x: _times(x, 5, unroll), SQUARE)
    assert counted.flops == pytest.approx(5 * PRODUCT, rel=0.01)


def test_gradients_and_maps_over_chunks_are_counted_whole() -> None:
    rows = jnp.ones((6, 16, 16))
    mapped = flops.count(lambda x: jax.lax.map(lambda row: row @ SQUARE, x), rows)
    assert mapped.flops == pytest.approx(6 * PRODUCT, rel=0.01)
    # One product forward and two back; the checkpoint repeats none that is needed.
    gradient = flops.count(jax.grad(lambda x: _times(x, 4).sum()), SQUARE)
    assert gradient.flops == pytest.approx(3 * 4 * PRODUCT, rel=0.05)


def test_the_dearest_branch_counts_and_open_loops_are_named() -> None:
    def branches(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0, 0] > 0, lambda x: _times(x, 7), lambda x: x, x)

    def search(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x[0, 0] < 0, lambda x: x @ x, x)

    assert flops.count(branches, SQUARE).flops == pytest.approx(7 * PRODUCT, rel=0.01)
    found = flops.count(search, SQUARE)
    assert found.open_loops == 1
    assert found.flops == pytest.approx(PRODUCT, rel=0.01)


def test_a_ceiling_is_what_a_product_reached(
    mesh1: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {256: 1e-3, 512: 4e-3, 1024: 0.05}
    monkeypatch.setattr(
        flops, "_seconds_per_product", lambda mesh, dtype, size: seconds[size]
    )
    # 1024 is slower than 512 here, and 2048 would take too long to be tried.
    best = flops.ceiling(mesh1, "float32")
    assert best == flops.Ceiling(2 * 512**3 / 4e-3, 512)


def test_products_on_all_devices_are_timed(mesh8: Mesh) -> None:
    assert 0 < flops._seconds_per_product(mesh8, "bfloat16", 256) < 5
    x = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
    found = flops._products(3, x[None], x)
    assert found.tolist() == [(x @ x @ x @ x).tolist()]
