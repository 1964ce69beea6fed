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
    # The last micro-batch, rows 3 and 7, is padding and does not change them.
    assert parts.model.collections["net"]["calls"] == 9


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
