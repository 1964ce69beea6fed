import dataclasses
import functools
import itertools
import multiprocessing
import pathlib
import threading
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from tests import stores
from uad_jax import mesh as mesh_lib
from uad_jax.data import builder, pipeline, placement, sources
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


def test_select_goes_by_split_and_modality(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    scans = stores.tiny_scans(grid=(2, 8, 8, 2), modalities=("t1", "t2"))
    narrow = functools.partial(stores.phantom, 0, (2, 8, 8, 1))
    scans[0] = dataclasses.replace(scans[0], load=narrow, modalities=("t1",))
    builder.build_from(
        scans, tmp_path / "s", recipe={}, recipe_hash="", source_hash="", workers=0
    )
    some = sources.Store.open(tmp_path / "s")

    def names(split: str, modalities: str = "") -> list[str]:
        config = DataConfig(modalities=modalities)
        return [v.subject for v in pipeline.select(some, config, split)]

    assert names("train", "t1") == ["train-0", "train-1", "train-2"]
    assert not caplog.records
    assert names("train") == names("train", "t2,t1") == ["train-1", "train-2"]
    assert "left out: train-0" in caplog.text
    assert names("val") == ["val-0", "val-1"]
    assert names("test") == ["test-0", "test-1", "test-2"]


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
        batches = make(inputs, num_examples=6 if inputs.num_slices is None else 3)
        shapes = {str(jax.tree.map(np.shape, batch)) for batch in batches}
        assert len(shapes) == 1
        rows = [bool(np.all(v)) for b in batches for v in np.asarray(b.valid)]
        uids = [int(u) for b in batches for u in np.asarray(b.uid)]
        assert sum(rows) == (6 if inputs.num_slices is None else 3)
        assert [u == -1 for u in uids] == [not row for row in rows]
        last = jax.device_get(batches[-1])
        assert not last.mask[~last.valid].any()
    every = make(Inputs(), num_examples=0)
    brain = sum(n > 0 for volume in volumes for n in volume.brain_voxels)
    assert sum(int(np.sum(batch.valid)) for batch in every) == brain
    assert_same(jax.device_get(every), jax.device_get(make(Inputs(), num_examples=0)))


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


@pytest.mark.parametrize("stack", [None, 2])
@pytest.mark.parametrize("inputs", [Inputs(), Inputs(3, True)])
def test_placements_give_the_same_bits(
    store: sources.Store, mesh8: Mesh, inputs: Inputs, stack: int | None
) -> None:
    results = []
    for where in (Placement.STREAM, Placement.DEVICE):
        source = stream(store, mesh8, inputs, batch_size=8, placement=where)
        with source.batches(3, stack=stack) as batches:
            results.append([next(batches) for _ in range(3)])
    for left, right in zip(*results, strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_equal(
                (a.shape, a.dtype, a.sharding), (b.shape, b.dtype, b.sharding)
            ),
            left,
            right,
        )
    assert_same(*jax.device_get(results))


def test_stacked_batches_are_consecutive_ones(
    store: sources.Store, mesh1: Mesh
) -> None:
    source = stream(store, mesh1)
    single, stacked = take(source, 2, 4), take(source, 2, 2, stack=2)
    np.testing.assert_array_equal(
        np.stack([b.image for b in single]), np.concatenate([b.image for b in stacked])
    )


def test_placement_auto_goes_by_size(store: sources.Store, mesh1: Mesh) -> None:
    place = functools.partial(stream, store, mesh1, placement=Placement.AUTO)
    assert place().placement is Placement.DEVICE
    assert place(device_budget_gib=1e-9).placement is Placement.STREAM


@pytest.mark.parametrize(
    ("limit", "expected"), [(2**16, Placement.STREAM), (2**40, Placement.DEVICE)]
)
def test_placement_auto_leaves_most_of_a_small_device_to_the_model(
    limit: int,
    expected: Placement,
    store: sources.Store,
    mesh1: Mesh,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mesh_lib, "device_bytes", lambda device: limit)
    opened = stream(store, mesh1, placement=Placement.AUTO)
    assert opened.placement is expected


@pytest.mark.parametrize("where", [Placement.STREAM, Placement.DEVICE])
def test_batches_pass_the_transfer_guard(
    store: sources.Store, mesh8: Mesh, where: Placement
) -> None:
    source = stream(store, mesh8, batch_size=8, placement=where)
    make = source._gathered if where is Placement.DEVICE else source._streamed
    with jax.transfer_guard("disallow"):
        items = make(0, None)  # in this thread: the guard does not reach others
        for _ in range(2):
            next(items)
        with source.batches() as batches:
            next(batches)


def test_fault_A21_workers_and_threads_do_not_change_a_bit(
    store: sources.Store, mesh1: Mesh
) -> None:
    inputs = Inputs(num_slices=2)  # drawn starts: the rng is part of the claim
    expected = take(stream(store, mesh1, inputs), 0, 7)
    for threads, workers in ((2, 0), (0, 2)):
        source = stream(store, mesh1, inputs, read_threads=threads, num_workers=workers)
        assert_same(take(source, 3, 4), expected[3:])


@pytest.mark.parametrize("where", [Placement.STREAM, Placement.DEVICE])
def test_processes_take_contiguous_blocks_of_the_global_batch(
    store: sources.Store, mesh1: Mesh, where: Placement
) -> None:
    whole = stream(store, mesh1, Inputs(2), placement=where)
    blocks = []
    for index in range(2):
        part = pipeline.TrainStream(
            store,
            whole._config,
            Inputs(2),
            whole.volumes,
            batch_size=4,
            seed=0,
            mesh=mesh1,
            process=(index, 2),
        )
        if where is Placement.STREAM:
            blocks.append(next(part.host_batches(6)))
        else:
            blocks.append(take(part, 6, 1)[0])
    joined = jax.tree.map(lambda *rows: np.concatenate(rows), *blocks)
    assert_same([joined], take(whole, 6, 1))


def test_fault_A24_reading_error_names_the_batch_and_later_batches_still_come(
    tmp_path: pathlib.Path, mesh1: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = sources.Store.open(stores.tiny_store(tmp_path, {"train": 2}))
    source = stream(store, mesh1)
    expected = take(source, 0, 6)
    bad = store.records(*np.array(source.ids(2)[1]))
    read = store.read_slices

    def failing(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if bad in records:
            raise sources.StoreError("bad sector")
        return read(records)

    monkeypatch.setattr(store, "read_slices", failing)
    with source.batches() as batches:
        assert_same([jax.device_get(next(batches)) for _ in range(2)], expected[:2])
        with pytest.raises(sources.StoreError, match=r"batch 2: bad sector"):
            next(batches)
    first = next(n for n in range(3, 6) if bad not in step_records(store, source, n))
    assert_same(take(source, first, 1), expected[first : first + 1])


def step_records(
    store: sources.Store, source: pipeline.TrainStream, step: int
) -> np.ndarray:
    uid, z = np.array(source.ids(step)).T
    return store.records(uid, z)


def test_a_reading_error_that_passes_is_tried_again(
    store: sources.Store, mesh1: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = stream(store, mesh1)
    expected = take(source, 0, 2)
    read, calls = store.read_slices, iter([True, False, False, False])

    def flaky(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if next(calls, False):
            raise sources.StoreError("network away")
        return read(records)

    monkeypatch.setattr(store, "read_slices", flaky)
    assert_same(take(source, 0, 2), expected)


def test_fault_A25_the_default_starts_no_process(
    store: sources.Store, mesh1: Mesh
) -> None:
    assert DataConfig().num_workers == 0
    source = pipeline.train_stream(
        store, DataConfig(), SLICES, batch_size=4, seed=0, mesh=mesh1
    )
    take(source, 0, 2)
    assert not multiprocessing.active_children()


def test_fault_A25_workers_refuse_to_start_workers(
    store: sources.Store, mesh1: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A script without a main guard runs again in each of its workers.
    monkeypatch.setattr(multiprocessing, "parent_process", object)
    with (
        stream(store, mesh1, num_workers=2).batches() as batches,
        pytest.raises(ValueError, match="__main__"),
    ):
        next(batches)


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_fault_A26_every_slice_comes_once_per_epoch(
    store: sources.Store, mesh1: Mesh, batch_size: int
) -> None:
    source = stream(store, mesh1, batch_size=batch_size, min_brain_fraction=0.0)
    slices = {(v.uid, z) for v in source.volumes for z in range(6) if v.brain_voxels[z]}
    assert source.num_examples == len(slices)
    steps = -(-2 * len(slices) // batch_size)
    seen = [row for step in range(steps) for row in source.ids(step)]
    for epoch in range(2):
        part = seen[epoch * len(slices) : (epoch + 1) * len(slices)]
        assert sorted(part) == sorted(slices)
    assert seen[: len(slices)] != seen[len(slices) : 2 * len(slices)]


def test_fault_A26_processes_lose_no_record(store: sources.Store, mesh1: Mesh) -> None:
    whole = stream(store, mesh1, batch_size=6, min_brain_fraction=0.0)
    seen = []
    for index in range(3):
        part = pipeline.TrainStream(
            store,
            whole._config,
            SLICES,
            whole.volumes,
            batch_size=6,
            seed=0,
            mesh=mesh1,
            process=(index, 3),
        )
        batches = part.host_batches()
        for _ in range(whole.num_examples // 6):
            batch = next(batches)
            seen += list(
                zip(batch.uid.tolist(), batch.slice_index.tolist(), strict=True)
            )
    assert len(seen) == len(set(seen)) == whole.num_examples // 6 * 6


def test_slabs_lie_inside_the_brain_and_their_starts_vary(
    store: sources.Store, mesh1: Mesh
) -> None:
    source = stream(store, mesh1, Inputs(num_slices=2), batch_size=9)
    assert source.num_examples == 9  # three volumes of six slices
    starts = {z for step in range(6) for _, z in source.ids(step)}
    assert starts == {0, 1, 2, 3, 4}
    per_volume = [uid for uid, _ in source.ids(0)]
    assert sorted(per_volume) == sorted(3 * [v.uid for v in source.volumes])


def test_one_per_volume_draws_another_slice_every_epoch(
    store: sources.Store, mesh1: Mesh
) -> None:
    source = stream(store, mesh1, batch_size=3, sampling=Sampling.ONE_PER_VOLUME)
    assert (source.num_examples, source.steps_per_epoch) == (3, 1)
    drawn: dict[int, set[int]] = {}
    for step in range(12):
        rows = source.ids(step)
        assert sorted(uid for uid, _ in rows) == [v.uid for v in source.volumes]
        for uid, z in rows:
            drawn.setdefault(uid, set()).add(z)
    assert all(len(slices) > 2 for slices in drawn.values())


def test_fault_A22_fingerprint_follows_data_and_order_only(
    tmp_path: pathlib.Path, store: sources.Store, mesh1: Mesh
) -> None:
    base = stream(store, mesh1).fingerprint
    grown = stores.tiny_store(tmp_path, {"train": 4, "val": 2, "test": 3})
    changed = [
        stream(sources.Store.open(grown), mesh1),
        stream(store, mesh1, seed=1),
        stream(store, mesh1, batch_size=2),
        stream(store, mesh1, sampling=Sampling.ONE_PER_VOLUME),
        stream(store, mesh1, Inputs(2)),
        stream(store, mesh1, min_brain_fraction=0.1),
    ]
    assert len({base, *(source.fingerprint for source in changed)}) == 7
    elsewhere = sources.Store.open(stores.tiny_store(tmp_path / "elsewhere"))
    same = [
        stream(elsewhere, mesh1),
        stream(store, mesh1, placement=Placement.DEVICE, num_workers=2),
    ]
    assert {source.fingerprint for source in same} == {base}


def test_channels_are_chosen_in_the_order_asked_for(
    tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    path = stores.tiny_store(
        tmp_path, {"train": 2}, grid=(4, 16, 16, 3), modalities=("t1", "t2", "flair")
    )
    three = sources.Store.open(path)
    for where in (Placement.STREAM, Placement.DEVICE):
        source = stream(three, mesh1, modalities="flair, t1", placement=where)
        batch = take(source, 0, 1)[0]
        for row, (uid, z) in enumerate(source.ids(0)):
            np.testing.assert_array_equal(
                batch.image[row], three.read_volume(uid)[0][z][..., [2, 0]]
            )
    with pytest.raises(ValueError, match="the store has t1, t2, flair"):
        stream(three, mesh1, modalities="pd")


def test_wrong_sizes_name_the_remedy(store: sources.Store, mesh8: Mesh) -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        stream(store, mesh8, batch_size=12)
    with pytest.raises(ValueError, match=r"slab of 7, the shallowest 6.*_slices <= 6"):
        stream(store, mesh8, Inputs(num_slices=7), batch_size=8)
    with pytest.raises(ValueError, match="min_brain_fraction"):
        stream(store, mesh8, batch_size=8, min_brain_fraction=1.0)


def test_prefetch_stops_its_thread_when_closed_or_dropped() -> None:
    before = threading.active_count()
    for drop in (False, True):
        items = placement.Prefetch(itertools.count())
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        if not drop:
            items.close()
        thread = items._thread
        del items
        thread.join(timeout=5)
        assert not thread.is_alive()
    assert threading.active_count() == before


def test_prefetch_ends_with_its_iterator() -> None:
    items = placement.Prefetch(iter([1, 2]))
    assert list(items) == [1, 2]
    assert list(items) == []
