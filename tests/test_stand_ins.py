import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from tests import stores
from uad_jax import stand_ins
from uad_jax.data import pipeline, sources
from uad_jax.data.config import DataConfig
from uad_jax.methods.base import Inputs
from uad_jax.types import Tree

SHAPE = (6, 32, 32, 2)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> sources.Store:
    directory = tmp_path_factory.mktemp("stand-ins")
    path = stores.tiny_store(directory, grid=SHAPE, modalities=("t1", "t2"))
    return sources.Store.open(pathlib.Path(path))


def _forms(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), tree)


@pytest.mark.parametrize("num_slices", [None, 3])
@pytest.mark.parametrize("needs_lesion", [False, True])
def test_batches_have_the_form_of_those_of_a_store(
    store: sources.Store, mesh8: Mesh, num_slices: int | None, needs_lesion: bool
) -> None:
    inputs = Inputs(num_slices, needs_lesion)
    stream = pipeline.train_stream(
        store, DataConfig(), inputs, batch_size=8, seed=0, mesh=mesh8
    )
    made = stand_ins.batch(
        SHAPE, 8, mesh8, num_slices=num_slices, needs_lesion=needs_lesion
    )
    assert _forms(made) == _forms(stream.spec())
    with stream.batches(0, stack=2) as batches:
        expected = _forms(next(batches))
    stacked = stand_ins.batch(
        SHAPE, 8, mesh8, num_slices=num_slices, needs_lesion=needs_lesion, stack=2
    )
    assert _forms(stacked) == expected


def test_volumes_have_the_form_of_those_of_a_store(
    store: sources.Store, mesh1: Mesh
) -> None:
    volumes, _, _ = next(
        pipeline.volume_batches(
            store, store.volumes[:2], modalities="", batch_size=2, mesh=mesh1
        )
    )
    made = stand_ins.volumes(SHAPE, 2, mesh1)
    assert made.image.dtype == jnp.float32  # decoded
    assert made.image.shape == volumes.image.shape
    assert _forms((made.mask, made.valid, made.uid)) == _forms(
        (volumes.mask, volumes.valid, volumes.uid)
    )


def test_a_volume_has_a_brain_and_a_small_lesion_in_it() -> None:
    image, brain, lesion = stand_ins.volume((40, 48, 48, 1))
    assert 0.3 < brain.mean() < 0.5
    assert 0.01 < lesion[brain].mean() < 0.04
    assert not np.any(lesion & ~brain)
    assert image[~brain].max() == 0 < image[lesion].mean() - image[brain].mean()


def test_a_slab_deeper_than_the_volume_is_refused(mesh1: Mesh) -> None:
    with pytest.raises(ValueError, match="num_slices <= 6"):
        stand_ins.batch(SHAPE, 2, mesh1, num_slices=7)
