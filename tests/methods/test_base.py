import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from uad_jax import types
from uad_jax.methods import base
from uad_jax.ops import losses

SHAPE = (4, 4, 1)


def _batch(rows: int = 8) -> types.Batch:
    image = jax.random.uniform(jax.random.key(0), (rows, *SHAPE))
    return types.Batch(
        image=image,
        mask=jnp.ones((rows, *SHAPE), bool),
        valid=jnp.ones(rows, bool),
        uid=jnp.arange(rows),
        slice_index=jnp.arange(rows) + 10,
    )


def _init_model(key: types.Key, batch: types.Batch) -> types.ModelState:
    params = {
        "net": {"scale": jax.random.normal(key, SHAPE)},
        "frozen": {"offset": jnp.full(SHAPE, 0.5)},
    }
    return types.ModelState(
        params=params, collections={"net": {"calls": jnp.zeros(())}}
    )


def _loss(
    params: dict[str, types.Tree],
    collections: dict[str, types.Tree],
    batch: types.Batch,
    key: types.Key,
) -> tuple:
    keys = base.sample_keys(key, batch.uid, batch.slice_index)
    noise = jax.vmap(lambda k: jax.random.normal(k, SHAPE))(keys)
    out = params["net"]["scale"][None] * (batch.image + 0.1 * noise)
    out = out + params["frozen"]["offset"][None]
    value = losses.mean_over_valid(losses.l2(out, batch.image), batch.valid)
    collections = {"net": {"calls": collections["net"]["calls"] + 1}}
    return value, (collections, {"half": value / 2})


def _trained(
    batch: types.Batch, steps: int = 3, **kwargs: object
) -> tuple[types.TrainState, types.Scalars]:
    init, update = base.single_optimizer(
        _init_model,
        _loss,
        optax.sgd(1e-2),
        trainable=["net"],
        **kwargs,
    )
    state = init(jax.random.key(1), batch)
    step = jax.jit(update, donate_argnums=0)
    scalars: types.Scalars = {}
    for i in range(steps):
        state, scalars = step(state, batch, jax.random.key(i))
    return state, scalars


def test_sample_keys_depend_on_uid_and_slice_only() -> None:
    key = jax.random.key(0)
    uid, index = jnp.array([3, 3, 5, -1]), jnp.array([1, 2, 1, 0])
    data = jax.random.key_data(base.sample_keys(key, uid, index))
    assert len({tuple(row) for row in data.tolist()}) == 4
    again = jax.random.key_data(base.sample_keys(key, uid[::-1], index[::-1]))
    np.testing.assert_array_equal(again[::-1], data)
    swapped = base.sample_keys(key, jnp.array([1]), jnp.array([3]))
    assert (jax.random.key_data(swapped)[0] != data[0]).any()


def test_update_reports_the_gradient_norm_of_the_whole_batch() -> None:
    batch = _batch()
    init, update = base.single_optimizer(
        _init_model, _loss, optax.sgd(0.0), trainable=["net"]
    )
    state = init(jax.random.key(1), batch)
    _, scalars = update(state, batch, jax.random.key(0))
    grads = jax.grad(
        lambda net: _loss(
            {**state.model.params, "net": net},
            state.model.collections,
            batch,
            jax.random.key(0),
        )[0]
    )(state.model.params["net"])
    np.testing.assert_allclose(
        scalars["grad_norm"], jnp.linalg.norm(grads["scale"]), rtol=1e-5
    )
    np.testing.assert_allclose(scalars["half"], scalars["loss"] / 2)


def test_frozen_networks_stay_and_have_neither_optimiser_nor_average() -> None:
    state, _ = _trained(_batch(), ema_decay=0.9)
    np.testing.assert_array_equal(state.model.params["frozen"]["offset"], 0.5)
    assert state.ema is not None
    assert set(state.ema) == {"net"}
    assert set(state.for_eval().params) == {"net", "frozen"}
    assert state.model.collections["net"]["calls"] == 3
    assert state.step == 3


def test_unknown_trainable_network_is_an_error() -> None:
    init, _ = base.single_optimizer(
        _init_model, _loss, optax.sgd(0.1), trainable=["critic"]
    )
    with pytest.raises(ValueError, match=r"\['critic'\].*\['frozen', 'net'\]"):
        init(jax.random.key(0), _batch())


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_accumulation_equals_the_whole_batch_with_uneven_padding(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # "gpu" takes the scanned form, which any backend can run.
    batch = dataclasses.replace(
        _batch(), valid=jnp.array([True] * 3 + [False] * 3 + [True, False])
    )
    whole, one = _trained(batch)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    parts, four = _trained(batch, accumulate_steps=4)
    np.testing.assert_allclose(
        whole.model.params["net"]["scale"],
        parts.model.params["net"]["scale"],
        rtol=1e-5,
    )
    for name in one:
        np.testing.assert_allclose(one[name], four[name], rtol=1e-5)
    assert parts.model.collections["net"]["calls"] == 12


def test_accumulation_that_does_not_divide_the_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"accumulate_steps is 3.*8 rows"):
        _trained(_batch(), accumulate_steps=3)


def test_moving_average_warms_up_and_stays_float32() -> None:
    average = {"a": jnp.zeros(())}
    params = {"a": jnp.ones((), jnp.bfloat16)}
    first = base.moving_average(average, params, 0.99, jnp.int32(0))
    np.testing.assert_allclose(first["a"], 0.9, rtol=1e-6)
    late = base.moving_average(average, params, 0.99, jnp.int32(10_000))
    np.testing.assert_allclose(late["a"], 0.01, rtol=1e-5)
    assert late["a"].dtype == jnp.float32


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
    whole = base.slicewise(_noisy_slices)(_MODEL, volumes, key)
    parts = base.slicewise(_noisy_slices, chunk)(_MODEL, volumes, key)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert whole.anomaly_map.shape == (2, 7, 4, 4)
    assert whole.reconstruction is not None
    assert whole.reconstruction.shape == (2, 7, *SHAPE)


def test_slicewise_noise_is_that_of_training() -> None:
    volumes = _volumes([3, 3], 3)
    key = jax.random.key(0)
    scores = base.slicewise(_noisy_slices)(_MODEL, volumes, key)
    keys = base.sample_keys(key, jnp.array([1]), jnp.array([2]))
    noise = jax.random.normal(keys[0], SHAPE)
    np.testing.assert_allclose(
        scores.anomaly_map[1, 2], (volumes.image[1, 2] + noise)[..., 0], rtol=1e-6
    )


def test_slice_and_volume_scores_are_means_inside_the_valid_brain() -> None:
    volumes = _volumes([3, 2], 3)
    mask = volumes.mask.at[0, 1].set(False)
    volumes = dataclasses.replace(volumes, mask=mask.at[1, 2].set(True))
    scores = base.slicewise(lambda m, x, b, k: (x[..., 0], None))(
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
    noise = jax.vmap(lambda key: jax.random.normal(key, ()))(keys)
    out = image + noise.reshape(-1, 1, 1, 1, 1)
    return out[..., 0], out


@pytest.mark.parametrize("overlap", [0, 1, 3])
@pytest.mark.parametrize("depth", [4, 7, 11])
def test_slabwise_equals_a_loop_over_slabs(depth: int, overlap: int) -> None:
    volumes, key = _volumes([depth], depth), jax.random.key(0)
    scores = base.slabwise(_noisy_slab, 4, overlap)(_MODEL, volumes, key)
    starts, start = [], 0
    while start + 4 < depth:
        starts.append(start)
        start += 4 - overlap
    starts.append(depth - 4)
    total, count = np.zeros((depth, 4, 4)), np.zeros((depth, 1, 1))
    for start in starts:
        keys = base.sample_keys(key, volumes.uid, jnp.array([start]))
        part = volumes.image[:, start : start + 4], volumes.mask, volumes.valid
        total[start : start + 4] += _noisy_slab(_MODEL, *part, keys)[0][0]
        count[start : start + 4] += 1
    np.testing.assert_allclose(scores.anomaly_map[0], total / count, rtol=1e-5)


@pytest.mark.parametrize("overlap", [0, 2])
def test_slabwise_ignores_the_common_depth_and_the_place_in_the_batch(
    overlap: int,
) -> None:
    score = base.slabwise(_noisy_slab, 4, overlap)
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

    scores = base.slabwise(score_slab, 5)(_MODEL, volumes, jax.random.key(0))
    np.testing.assert_array_equal(scores.anomaly_map, volumes.image[..., 0])
    assert set(seen) == {(1, 5)}


@pytest.mark.parametrize("overlap", [-1, 4, 5])
def test_slabwise_refuses_an_overlap_without_a_step(overlap: int) -> None:
    with pytest.raises(ValueError, match=f"overlap is {overlap}"):
        base.slabwise(_noisy_slab, 4, overlap)
