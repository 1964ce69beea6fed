import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uad_jax.ops import erase
from uad_jax.ops.erase import EraseConfig

CONFIG = EraseConfig(probability=1.0, min_share=0.25, max_share=0.5)


ROWS = 256
KEYS = jax.random.split(jax.random.key(0), ROWS)


def _slabs() -> tuple[jax.Array, jax.Array]:
    """Slabs of ones whose brain is the box [1:5, 4:12, 2:14] of [6, 16, 16]."""
    mask = np.zeros((ROWS, 6, 16, 16, 1), bool)
    mask[:, 1:5, 4:12, 2:14] = True
    return jnp.ones(mask.shape), jnp.asarray(mask)


@functools.partial(jax.jit, static_argnames="num_cuboids")
def _erase(
    keys: jax.Array, mask: jax.Array, probability: float, num_cuboids: int
) -> jax.Array:
    changes = {"probability": probability, "num_cuboids": num_cuboids}
    config = dataclasses.replace(CONFIG, **changes)
    return erase.erase(config, keys, jnp.ones(mask.shape), mask)


def _hit(
    keys: jax.Array = KEYS, probability: float = 1.0, number: int = 1
) -> np.ndarray:
    """Where the slabs are erased, [ROWS, S, H, W] bool."""
    return np.asarray(_erase(keys, _slabs()[1], probability, number) == 0)[..., 0]


def test_erases_one_cuboid_of_the_stated_size_within_the_brain() -> None:
    hit = _hit()
    assert not (hit & ~np.asarray(_slabs()[1])[..., 0]).any()
    for axis, extent in enumerate((4, 8, 12)):
        others = tuple(i for i in (1, 2, 3) if i != axis + 1)
        edges = hit.any(axis=others).sum(axis=1)
        assert edges.min() == extent // 4
        assert edges.max() == extent // 2
        # Every place in the box is reached, and about as often from both ends.
        places = hit.any(axis=others).sum(axis=0)
        inside = places[places > 0]
        assert len(inside) == extent
        assert abs(int(inside[0]) - int(inside[-1])) < 40
    # A cuboid has as many voxels as the product of its edges.
    edges = [hit.any(axis=a).sum(axis=1) for a in ((2, 3), (1, 3), (1, 2))]
    np.testing.assert_array_equal(hit.sum(axis=(1, 2, 3)), np.prod(edges, axis=0))
    assert len({row.tobytes() for row in hit}) > 150  # another one for each slab


def test_a_slab_depends_on_its_key_alone() -> None:
    order = np.random.default_rng(0).permutation(ROWS)
    np.testing.assert_array_equal(_hit(KEYS[order]), _hit()[order])


def test_probability_number_and_empty_slabs() -> None:
    some = _hit(probability=0.3).any(axis=(1, 2, 3)).mean()
    assert abs(some - 0.3) < 0.09
    assert _hit(number=4).mean() > 2 * _hit().mean()
    image, mask = _slabs()
    off = dataclasses.replace(CONFIG, probability=0.0)
    np.testing.assert_array_equal(erase.erase(off, KEYS, image, mask), image)
    np.testing.assert_array_equal(_erase(KEYS, jnp.zeros_like(mask), 1.0, 1), image)


@pytest.mark.parametrize(
    "change",
    [
        {"probability": 1.5},
        {"num_cuboids": 0},
        {"min_share": 0.0},
        {"min_share": 0.6},
        {"max_share": 1.1},
    ],
)
def test_impossible_settings_are_named(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(CONFIG, **change).validate()
