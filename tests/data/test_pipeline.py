import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from tests import stores
from uad_jax.data import pipeline, sources
from uad_jax.data.config import DataConfig, Placement, Sampling
from uad_jax.types import Batch


class Inputs(NamedTuple):
    num_slices: int | None = None
    needs_lesion: bool = False


SLICES = Inputs()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> sources.Store:
    path = stores.tiny_store(tmp_path_factory.mktemp("pipeline"))
    return sources.Store.open(path)


def stream(
    store: sources.Store,
    mesh: Mesh,
    inputs: Inputs = SLICES,
    *,
    batch_size: int = 4,
    seed: int = 0,
    **config: object,
) -> pipeline.TrainStream:
    settings = {"placement": Placement.STREAM, "read_threads": 0, **config}
    return pipeline.train_stream(
        store,
        dataclasses.replace(DataConfig(), **settings),
        inputs,
        batch_size=batch_size,
        seed=seed,
        mesh=mesh,
    )


def take(
    source: pipeline.TrainStream, start: int, count: int, stack: int | None = None
) -> list[Batch]:
    with source.batches(start, stack=stack) as batches:
        return [jax.device_get(next(batches)) for _ in range(count)]


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("inputs", [Inputs(), Inputs(num_slices=3)])
@pytest.mark.parametrize("sampling", list(Sampling))
def test_batch_n_is_the_same_whatever_the_start(
    store: sources.Store, mesh1: Mesh, inputs: Inputs, sampling: Sampling
) -> None:
    source = stream(store, mesh1, inputs, sampling=sampling)
    whole = take(source, 0, 9)
    assert_same(take(source, 5, 4), whole[5:])
    assert any(not np.array_equal(whole[0].image, b.image) for b in whole[1:])


def test_rows_are_the_slices_they_name(store: sources.Store, mesh1: Mesh) -> None:
    source = stream(store, mesh1, Inputs(num_slices=2, needs_lesion=True))
    for step, batch in enumerate(take(source, 0, 3)):
        for row, (uid, z) in enumerate(source.ids(step)):
            codes, plane = store.read_volume(uid)
            assert (batch.uid[row], batch.slice_index[row].tolist()) == (
                uid,
                [z, z + 1],
            )
            np.testing.assert_array_equal(batch.image[row], codes[z : z + 2])
            mask = (plane[z : z + 2, ..., None] & sources.BRAIN_BIT) != 0
            np.testing.assert_array_equal(batch.mask[row], mask)


def test_spec_describes_the_batches(store: sources.Store, mesh8: Mesh) -> None:
    for inputs in (Inputs(), Inputs(2, True)):
        source = stream(store, mesh8, inputs, batch_size=8)
        with source.batches() as batches:
            batch = next(batches)
        jax.tree.map(
            lambda leaf, like: np.testing.assert_equal(
                (leaf.shape, leaf.dtype, leaf.sharding),
                (like.shape, like.dtype, like.sharding),
            ),
            batch,
            source.spec(),
        )


def test_fault_A27_validation_pads_the_last_batch(
    store: sources.Store, mesh1: Mesh
) -> None:
    volumes = pipeline.select(store, DataConfig(), "val")
    make = functools.partial(
        pipeline.validation_batches, store, volumes, batch_size=4, seed=0, mesh=mesh1
    )
    for inputs in (Inputs(), Inputs(2, True)):
        batches = make(inputs, num_slices=6 if inputs.num_slices is None else 3)
        shapes = {str(jax.tree.map(np.shape, batch)) for batch in batches}
        assert len(shapes) == 1
        rows = [bool(np.all(v)) for b in batches for v in np.asarray(b.valid)]
        uids = [int(u) for b in batches for u in np.asarray(b.uid)]
        assert sum(rows) == (6 if inputs.num_slices is None else 3)
        assert [u == -1 for u in uids] == [not row for row in rows]
        last = jax.device_get(batches[-1])
        assert not last.mask[~last.valid].any()
    every = make(Inputs(), num_slices=0)
    brain = sum(n > 0 for volume in volumes for n in volume.brain_voxels)
    assert sum(int(np.sum(batch.valid)) for batch in every) == brain
    assert_same(jax.device_get(every), jax.device_get(make(Inputs(), num_slices=0)))


def test_fault_A27_volume_batches_drop_nothing(
    store: sources.Store, mesh1: Mesh
) -> None:
    volumes = pipeline.select(store, DataConfig(), "test")
    seen = []
    for batch, labels, infos in pipeline.volume_batches(
        store, volumes, modalities="", batch_size=2, mesh=mesh1
    ):
        assert batch.image.shape == (2, 6, 32, 32, 1)
        for row, info in enumerate(infos):
            codes, plane = store.read_volume(info.uid)
            np.testing.assert_array_equal(batch.image[row], codes)
            np.testing.assert_array_equal(labels.lesion[row], plane >> 1)
            assert batch.uid[row] == info.uid
            assert labels.abnormal[row] == (info.label == "abnormal")
            seen.append(info.subject)
        padding = np.arange(2) >= len(infos)
        np.testing.assert_array_equal(np.asarray(batch.uid) == -1, padding)
        assert not np.asarray(batch.valid)[padding].any()
        assert not labels.annotated[padding].any()
    assert seen == [volume.subject for volume in volumes]
