import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uad_jax import types
from uad_jax.methods import base, lifting

SHAPE = (4, 4, 1)


def _volumes(depths: list[int], padded: int, key: int = 0) -> types.Volumes:
    image = np.zeros((len(depths), padded, *SHAPE), np.float32)
    valid = np.zeros((len(depths), padded), bool)
    for b, depth in enumerate(depths):
        rng = np.random.default_rng(key + b)
        image[b, :depth] = rng.random((depth, *SHAPE))
        valid[b, :depth] = True
    mask = image > 0.3
    return types.Volumes(
        image=jnp.asarray(image),
        mask=jnp.asarray(mask),
        valid=jnp.asarray(valid),
        uid=jnp.arange(len(depths)),
    )


_MODEL = types.ModelState(params={}, collections={})


def _noisy_slices(
    model: types.ModelState, image: jax.Array, mask: jax.Array, keys: jax.Array
) -> tuple[jax.Array, jax.Array]:
    noise = jax.vmap(lambda key: jax.random.normal(key, SHAPE))(keys)
    return (image + noise)[..., 0], image + noise


@pytest.mark.parametrize("chunk", [2, 3, 100])
def test_slicewise_does_not_depend_on_the_chunk(chunk: int) -> None:
    volumes = _volumes([7, 5], 7)
    key = jax.random.key(0)
    whole = lifting.slicewise(_noisy_slices)(_MODEL, volumes, key)
    parts = lifting.slicewise(_noisy_slices, chunk)(_MODEL, volumes, key)
    # The whole runs without a loop, as another program.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        whole,
        parts,
    )
    assert whole.anomaly_map.shape == (2, 7, 4, 4)
    assert whole.reconstruction is not None
    assert whole.reconstruction.shape == (2, 7, *SHAPE)


def test_slicewise_noise_is_that_of_training() -> None:
    volumes = _volumes([3, 3], 3)
    key = jax.random.key(0)
    scores = lifting.slicewise(_noisy_slices)(_MODEL, volumes, key)
    keys = base.sample_keys(key, jnp.array([1]), jnp.array([2]))
    noise = jax.random.normal(keys[0], SHAPE)
    np.testing.assert_allclose(
        scores.anomaly_map[1, 2], (volumes.image[1, 2] + noise)[..., 0], rtol=1e-6
    )


def test_slice_and_volume_scores_are_means_inside_the_valid_brain() -> None:
    volumes = _volumes([3, 2], 3)
    mask = volumes.mask.at[0, 1].set(False)
    volumes = dataclasses.replace(volumes, mask=mask.at[1, 2].set(True))
    scores = lifting.slicewise(lambda m, x, b, k: (x[..., 0], None))(
        _MODEL, volumes, jax.random.key(0)
    )
    image, brain = np.asarray(volumes.image[..., 0]), np.asarray(volumes.mask[..., 0])
    np.testing.assert_allclose(
        scores.slice_score[0, 0], image[0, 0][brain[0, 0]].mean(), rtol=1e-6
    )
    assert scores.slice_score[0, 1] == 0.0  # no brain
    assert scores.slice_score[1, 2] == 0.0  # padding
    np.testing.assert_allclose(
        scores.volume_score[1], image[1, :2][brain[1, :2]].mean(), rtol=1e-6
    )
    assert scores.reconstruction is None


def _noisy_slab(
    model: types.ModelState,
    image: jax.Array,
    mask: jax.Array,
    valid: jax.Array,
    keys: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    # One draw per slab, from the key of its first slice.
    noise = jax.vmap(lambda key: jax.random.normal(key, ()))(keys[:, 0])
    out = image + noise.reshape(-1, 1, 1, 1, 1)
    return out[..., 0], out


@pytest.mark.parametrize("overlap", [0, 1, 3])
@pytest.mark.parametrize("depth", [4, 7, 11])
def test_slabwise_equals_a_loop_over_slabs(depth: int, overlap: int) -> None:
    volumes, key = _volumes([depth], depth), jax.random.key(0)
    scores = lifting.slabwise(_noisy_slab, 4, overlap)(_MODEL, volumes, key)
    starts, start = [], 0
    while start + 4 < depth:
        starts.append(start)
        start += 4 - overlap
    starts.append(depth - 4)
    total, count = np.zeros((depth, 4, 4)), np.zeros((depth, 1, 1))
    for start in starts:
        keys = base.sample_keys(key, volumes.uid, jnp.array([start]))[:, None]
        part = volumes.image[:, start : start + 4], volumes.mask, volumes.valid
        total[start : start + 4] += _noisy_slab(_MODEL, *part, keys)[0][0]
        count[start : start + 4] += 1
    np.testing.assert_allclose(scores.anomaly_map[0], total / count, rtol=1e-5)


@pytest.mark.parametrize("overlap", [0, 2])
def test_slabwise_ignores_the_common_depth_and_the_place_in_the_batch(
    overlap: int,
) -> None:
    score = lifting.slabwise(_noisy_slab, 4, overlap)
    both = score(_MODEL, _volumes([9, 6], 9), jax.random.key(0))
    padded = score(_MODEL, _volumes([9, 6], 13), jax.random.key(0))
    alone = _volumes([6], 6, key=1)
    alone = dataclasses.replace(alone, uid=jnp.array([1]))
    single = score(_MODEL, alone, jax.random.key(0))
    for other in (both, padded):
        np.testing.assert_allclose(
            other.anomaly_map[1, :6], single.anomaly_map[0], rtol=1e-6
        )
        np.testing.assert_allclose(
            other.volume_score[1], single.volume_score[0], rtol=1e-6
        )


def test_slabwise_scores_a_volume_thinner_than_a_slab() -> None:
    volumes = _volumes([2], 2)
    seen = []

    def score_slab(
        model: types.ModelState,
        image: jax.Array,
        mask: jax.Array,
        valid: jax.Array,
        keys: jax.Array,
    ) -> tuple[jax.Array, None]:
        seen.append(valid.shape)
        return jnp.where(valid[:, :, None, None], image[..., 0], 1e9), None

    scores = lifting.slabwise(score_slab, 5)(_MODEL, volumes, jax.random.key(0))
    np.testing.assert_array_equal(scores.anomaly_map, volumes.image[..., 0])
    assert set(seen) == {(1, 5)}


@pytest.mark.parametrize("overlap", [-1, 4, 5])
def test_slabwise_refuses_an_overlap_without_a_step(overlap: int) -> None:
    with pytest.raises(ValueError, match=f"overlap is {overlap}"):
        lifting.slabwise(_noisy_slab, 4, overlap)
