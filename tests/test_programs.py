import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from tests import runs, stores
from uad_jax import mesh as mesh_lib
from uad_jax import programs, saved_run, train, writer
from uad_jax.data import pipeline, sources
from uad_jax.methods import base
from uad_jax.types import Batch, Key, ModelState, Scalars, TrainState


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return stores.tiny_store(tmp_path_factory.mktemp("programs"))


def _init(key: Key, batch: Batch) -> TrainState:
    assert batch.image.dtype == jnp.float32
    return TrainState(
        step=jnp.int32(0),
        model=ModelState(params={"net": jax.random.normal(key, (3,))}, collections={}),
        opt_state={},
    )


def _update(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Scalars]:
    assert batch.image.dtype == jnp.float32
    new = TrainState(step=state.step + 1, model=state.model, opt_state={})
    scalars = {"loss": jax.random.uniform(key), "image": jnp.mean(batch.image)}
    return new, scalars


_METHOD = base.Method(
    inputs=base.Inputs(),
    init=_init,
    update=_update,
    validate=lambda model, batch, key: {"loss": jnp.float32(0)},
    score=None,
)


def _batch(mesh: Mesh) -> Batch:
    """Four slices of the code 32768, which stands for 0.5."""
    return mesh_lib.to_global(
        Batch(
            image=np.full((4, 8, 8, 1), 32768, np.uint16),
            mask=np.ones((4, 8, 8, 1), bool),
            valid=np.ones(4, bool),
            uid=np.arange(4, dtype=np.int32),
            slice_index=np.zeros(4, np.int32),
        ),
        mesh,
    )


def test_a_step_gets_the_runs_key_and_decoded_images_and_the_state_is_donated(
    mesh1: Mesh,
) -> None:
    batch = _batch(mesh1)
    built = programs.build(_METHOD, batch, [], mesh1, 1)
    state = programs.init(_METHOD, batch, 5, mesh1)
    key = programs.run_key(5, mesh1)
    for step in range(3):
        old = state
        state, scalars = built.update(state, batch, key)
        expected = jax.random.uniform(jax.random.fold_in(jax.random.key(5), step))
        np.testing.assert_array_equal(scalars["loss"], [expected])
        np.testing.assert_allclose(scalars["image"], [0.5], atol=2e-5)
        assert old.model.params["net"].is_deleted()
    assert not batch.image.is_deleted()
    assert built.validate is None


def test_a_batch_of_another_shape_is_an_error_not_a_recompilation(mesh1: Mesh) -> None:
    batch = _batch(mesh1)
    built = programs.build(_METHOD, batch, [], mesh1, 1)
    state = programs.init(_METHOD, batch, 0, mesh1)
    half = jax.tree.map(lambda x: x[:2], batch)
    with pytest.raises(TypeError, match="was compiled"):
        built.update(state, half, programs.run_key(0, mesh1))


def test_the_first_state_depends_on_the_seed_and_lies_on_all_devices(
    mesh8: Mesh,
) -> None:
    spec = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((8, *x.shape[1:]), x.dtype),
        _batch(mesh_lib.make_mesh(jax.devices()[:1])),
    )
    states = [programs.init(_METHOD, spec, seed, mesh8) for seed in (1, 1, 2)]
    first, again, other = (np.asarray(s.model.params["net"]) for s in states)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert states[0].model.params["net"].sharding == mesh_lib.replicated(mesh8)


def test_validation_is_the_mean_over_valid_slices_of_the_averaged_model(
    store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    # 6 healthy slices in batches of 4: the second one is half padding.
    config = runs.scale_config(store, batch_size=4, **{"method.noise": 0.0})
    train.train(config, tmp_path / "run", mesh=mesh1)
    _, model, _ = saved_run.load_model(config, tmp_path / "run", 8, mesh1)
    opened = sources.Store.open(store)
    healthy = [
        volume
        for volume in pipeline.select(opened, config.data, "val")
        if volume.label == "healthy"
    ]
    assert len(healthy) == 1
    codes, _ = opened.read_volume(healthy[0].uid)
    image = codes.astype(np.float64) * (2 / 65535) - 0.5
    net = {name: float(x[0]) for name, x in model.params["net"].items()}
    expected = np.mean(np.square(image * net["gain"] + net["offset"] - image))
    found = writer.read_metrics(tmp_path / "run")[-1]["validation/loss"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
