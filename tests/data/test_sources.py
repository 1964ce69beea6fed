import pathlib
import pickle
import zlib

import numpy as np
import pytest

from tests import stores
from uad_jax.data import sources
from uad_jax.ops import intensity


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return stores.tiny_store(tmp_path_factory.mktemp("sources"))


def test_volumes_come_back_as_written(path: pathlib.Path) -> None:
    store = sources.Store.open(path)
    assert store.grid == (6, 32, 32, 1)
    scans = {scan.subject: scan for scan in stores.tiny_scans()}
    for volume in store.volumes:
        prepared = scans[volume.subject].load()
        codes, plane = store.read_volume(volume.uid)
        np.testing.assert_array_equal(codes, intensity.encode(prepared.image)[0])
        np.testing.assert_array_equal(plane & sources.BRAIN_BIT, prepared.brain)
        np.testing.assert_array_equal(
            (plane & sources.LESION_BIT) != 0, prepared.lesion
        )
        assert volume.brain_voxels == prepared.brain.sum(axis=(1, 2)).tolist()


def test_read_slices_keeps_the_order_asked_for(path: pathlib.Path) -> None:
    store = sources.Store.open(path)
    uid, z = np.array([5, 0, 5, 2]), np.array([1, 5, 0, 2])
    codes, _ = store.read_slices(store.records(uid, z))
    for row, (volume, depth) in enumerate(zip(uid, z, strict=True)):
        np.testing.assert_array_equal(codes[row], store.read_volume(volume)[0][depth])


def test_store_survives_pickling_with_files_open(path: pathlib.Path) -> None:
    store = sources.Store.open(path)
    expected = store.read_volume(0)[0]
    again = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(again.read_volume(0)[0], expected)


def test_a_slice_that_is_not_there_is_named(path: pathlib.Path) -> None:
    store = sources.Store.open(path)
    store._records[3, 5] = -1
    with pytest.raises(sources.StoreError, match="volume 3 has no slice 5"):
        store.records(np.array([3]), np.array([5]))


def test_missing_store_says_how_to_make_one(tmp_path: pathlib.Path) -> None:
    with pytest.raises(sources.StoreError, match=r"run\.py prepare"):
        sources.Store.open(tmp_path / "nothing")


def test_unpack_reads_every_zlib_level() -> None:
    rng = np.random.default_rng(0)
    for size in (7, 300, 70_000):  # one stored block holds 65535 bytes
        data = rng.integers(0, 3, size, np.uint8)
        for level in (0, 1, 6, 9):
            packed = zlib.compress(data.tobytes(), level)
            np.testing.assert_array_equal(sources.unpack(packed, size), data)
