import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests import stores
from uad_jax.data import builder, sources


def build(store: pathlib.Path, scans: list[builder.Source], **options: object) -> None:
    settings = {"recipe": {"name": "phantom"}, "recipe_hash": "r", "source_hash": "s"}
    builder.build_from(scans, store, **{"workers": 0, **settings, **options})


def snapshot(store: pathlib.Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in store.rglob("*")
        if path.is_file()
    }


def records_file(store: pathlib.Path) -> pathlib.Path:
    return next(store.rglob("*.array_record-*"))


def test_building_twice_does_nothing(tmp_path: pathlib.Path) -> None:
    scans = stores.tiny_scans({"train": 2})
    build(tmp_path / "a", scans)
    before = snapshot(tmp_path / "a")
    never = [dataclasses.replace(scan, load=pytest.fail) for scan in scans]
    build(tmp_path / "a", never)
    assert snapshot(tmp_path / "a") == before
    assert os.listdir(tmp_path) == ["a"]


def test_pool_and_single_process_write_the_same_store(tmp_path: pathlib.Path) -> None:
    scans = stores.tiny_scans({"train": 3, "test": 2})
    shown: list[tuple[int, int, str]] = []
    build(tmp_path / "one", scans)
    build(
        tmp_path / "pool",
        scans[::-1],
        workers=2,
        progress=lambda *arguments: shown.append(arguments),
    )
    one, pool = (sources.Store.open(tmp_path / name) for name in ("one", "pool"))
    assert one.fingerprint == pool.fingerprint
    assert [v.to_json() for v in one.volumes] == [v.to_json() for v in pool.volumes]
    np.testing.assert_array_equal(one.read_volume(4)[0], pool.read_volume(4)[0])
    assert [done for done, _, _ in shown] == [1, 2, 3, 4, 5]


def test_records_are_a_plain_tfds_data_set(tmp_path: pathlib.Path) -> None:
    path = stores.tiny_store(tmp_path, {"train": 2})
    script = (
        "import sys, tensorflow_datasets as tfds\n"
        f"b = tfds.builder_from_directory({str(path / 'slices' / '1.0.0')!r})\n"
        "e = b.as_data_source('slices')[7]\n"
        "assert (e['uid'], e['z'], e['image'].shape) == (1, 1, (32, 32, 1))\n"
        "assert not {'tensorflow', 'jax', 'uad_jax'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    data = tfds.builder_from_directory(str(path / "slices/1.0.0"))
    codes, plane = sources.Store.open(path).read_volume(1)
    example = data.as_data_source("slices")[8]
    np.testing.assert_array_equal(example["image"], codes[2])
    np.testing.assert_array_equal(example["plane"], plane[2])


def test_failing_scans_are_all_listed_and_nothing_is_left(
    tmp_path: pathlib.Path,
) -> None:
    scans = stores.tiny_scans({"train": 4})

    def broken(message: str) -> Callable[[], stores.Prepared]:
        def load() -> stores.Prepared:
            raise OSError(message)

        return load

    scans[0] = dataclasses.replace(scans[0], load=broken("not gzip"))
    scans[2] = dataclasses.replace(scans[2], load=broken("truncated"))
    scans[3] = dataclasses.replace(
        scans[3], load=lambda: stores.phantom(0, (6, 16, 16, 1))
    )
    with pytest.raises(ValueError, match="3 of 4 scans") as error:
        build(tmp_path / "a", scans)
    for part in ("train-0: OSError: not gzip", "train-2: OSError", "(16, 16, 1)"):
        assert part in str(error.value)
    assert os.listdir(tmp_path) == []
    every = [dataclasses.replace(scan, load=broken("gone")) for scan in scans]
    with pytest.raises(ValueError, match="4 of 4 scans"):
        build(tmp_path / "a", every)
    assert os.listdir(tmp_path) == []


def test_nan_and_wrong_shapes_are_refused(tmp_path: pathlib.Path) -> None:
    good = stores.phantom(0)
    bad = dataclasses.replace(good, image=np.full_like(good.image, np.nan))
    two = dataclasses.replace(good, image=np.zeros((6, 32, 32, 2), np.float32))
    for prepared, match in ((bad, "NaN"), (two, r"\(6, 32, 32, 2\)")):
        scan = builder.Source(
            subject="s", load=lambda p=prepared: p, modalities=("t1",)
        )
        with pytest.raises(ValueError, match=match):
            build(tmp_path / "a", [scan])


def test_missing_modalities_are_empty_channels(tmp_path: pathlib.Path) -> None:
    wide = stores.phantom(0, (4, 16, 16, 2))
    one = dataclasses.replace(wide, image=wide.image[..., 1:])
    scans = [
        builder.Source(subject="a", load=lambda: wide, modalities=("t1", "t2")),
        builder.Source(subject="b", load=lambda: one, modalities=("t2",)),
    ]
    build(tmp_path / "a", scans)
    store = sources.Store.open(tmp_path / "a")
    assert [v.modalities for v in store.volumes] == [("t1", "t2"), ("t2",)]
    first, second = store.read_volume(0)[0], store.read_volume(1)[0]
    np.testing.assert_array_equal(first[..., 1], second[..., 1])
    assert not second[..., 0].any()


def test_pictures_stay_uint8_and_depths_may_differ(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)

    def picture(depth: int) -> stores.Prepared:
        image = rng.integers(0, 256, (depth, 8, 8, 3), np.uint8)
        brain = np.ones(image.shape[:3], bool)
        return stores.Prepared(image, brain, ~brain, stores.phantom(0).geometry)

    pictures = [picture(1), picture(3)]
    scans = [
        builder.Source(
            subject=str(n), load=lambda n=n: pictures[n], modalities=("r", "g", "b")
        )
        for n in range(2)
    ]
    build(tmp_path / "a", scans)
    store = sources.Store.open(tmp_path / "a")
    assert (store.dtype, store.grid) == (np.uint8, (3, 8, 8, 3))
    for uid, expected in enumerate(pictures):
        np.testing.assert_array_equal(store.read_volume(uid)[0], expected.image)


def test_clipped_values_and_notes_are_kept(tmp_path: pathlib.Path) -> None:
    good = stores.phantom(0)
    image = good.image.copy()
    image[2, :3, 0] = 7.0
    high = dataclasses.replace(good, image=image, notes=("t1: too bright.",))
    build(
        tmp_path / "a",
        [builder.Source(subject="s", load=lambda: high, modalities=("t1",))],
    )
    volume = sources.Store.open(tmp_path / "a").volumes[0]
    assert (volume.clipped, volume.notes) == (3, ("t1: too bright.",))


def test_a_directory_that_is_no_store_is_not_touched(tmp_path: pathlib.Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match="not a prepared store"):
        build(tmp_path, stores.tiny_scans({"train": 2}))
    assert (tmp_path / "thesis.tex").exists()


def test_subjects_must_be_unique(tmp_path: pathlib.Path) -> None:
    scans = stores.tiny_scans({"train": 2})
    with pytest.raises(ValueError, match="train-0"):
        build(tmp_path / "a", [*scans, scans[0]])


def _truncate(store: pathlib.Path) -> None:
    os.truncate(records_file(store), records_file(store).stat().st_size // 2)


def _flip(store: pathlib.Path) -> None:
    raw = bytearray(records_file(store).read_bytes())
    raw[len(raw) // 2] ^= 1
    records_file(store).write_bytes(raw)


def _flip_small(store: pathlib.Path) -> None:
    text = (store / "volumes.json").read_text(encoding="utf-8")
    (store / "volumes.json").write_text(
        text.replace('"healthy"', '"healthx"', 1), encoding="utf-8"
    )


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _flip,
        _flip_small,
        lambda store: records_file(store).unlink(),
        lambda store: (store / "store.json").unlink(),
        lambda store: (store / "store.json").write_text("{", encoding="utf-8"),
        lambda store: (store / "index.npz").unlink(),
    ],
    ids=["truncated", "flip", "json", "records", "no-meta", "bad-meta", "index"],
)
def test_fault_B40_torn_store_is_rebuilt(
    tmp_path: pathlib.Path,
    damage: Callable[[pathlib.Path], object],
    request: pytest.FixtureRequest,
) -> None:
    store = stores.tiny_store(tmp_path, {"train": 2})
    fingerprint = sources.Store.open(store).fingerprint
    damage(store)
    if request.node.callspec.id != "flip":  # needs the records' hash or a read
        with pytest.raises(sources.StoreError):
            sources.Store.open(store)
    assert stores.tiny_store(tmp_path, {"train": 2}) == store
    again = sources.Store.open(store)
    assert again.fingerprint == fingerprint
    assert again.read_volume(1)[0].any()
    assert os.listdir(tmp_path) == ["store"]


def test_fault_B40_flipped_bit_is_seen_when_read(tmp_path: pathlib.Path) -> None:
    store = stores.tiny_store(tmp_path, {"train": 2})
    sound = sources.Store.open(store)
    expected = [sound.read_volume(uid)[0] for uid in range(2)]
    raw = records_file(store).read_bytes()
    wrong = 0
    for place in range(64, len(raw), len(raw) // 40):
        flipped = bytearray(raw)
        flipped[place] ^= 1
        records_file(store).write_bytes(flipped)
        try:
            damaged = sources.Store.open(store)
            got = [damaged.read_volume(uid)[0] for uid in range(2)]
        except sources.StoreError:
            continue
        wrong += not all(map(np.array_equal, got, expected))
    assert wrong == 0


def test_fault_B40_killed_build_leaves_no_store_and_is_cleared(
    tmp_path: pathlib.Path,
) -> None:
    script = (
        "import dataclasses, os, pathlib, signal, sys\n"
        "from tests import stores\n"
        "from uad_jax.data import builder\n"
        "def die():\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "scans = stores.tiny_scans({'train': 3})\n"
        "scans[2] = dataclasses.replace(scans[2], load=die)\n"
        "builder.build_from(scans, pathlib.Path(sys.argv[1]), recipe={},\n"
        "    recipe_hash='r', source_hash='s', workers=0)\n"
    )
    store = tmp_path / "store"
    done = subprocess.run([sys.executable, "-c", script, str(store)], check=False)
    assert done.returncode == -9
    assert not store.exists()
    assert os.listdir(tmp_path)  # the temporary directory of the killed build
    build(store, stores.tiny_scans({"train": 3}))
    assert os.listdir(tmp_path) == ["store"]


@pytest.mark.parametrize("part", ["recipe_hash", "source_hash"])
def test_fault_B41_stale_store_is_rebuilt(tmp_path: pathlib.Path, part: str) -> None:
    store = tmp_path / "store"
    build(store, stores.tiny_scans({"train": 2}))
    before = sources.Store.open(store).fingerprint
    build(store, stores.tiny_scans({"train": 3}), **{part: "another"})
    after = sources.Store.open(store)
    assert len(after.volumes) == 3
    assert after.fingerprint != before
    assert after.meta[part] == "another"
    assert os.listdir(tmp_path) == ["store"]


def test_fault_A22_fingerprint_follows_content_not_place(
    tmp_path: pathlib.Path,
) -> None:
    scans = stores.tiny_scans({"train": 2})
    relabelled = [scans[0], dataclasses.replace(scans[1], split="val")]
    other = [scans[0], dataclasses.replace(scans[1], load=lambda: stores.phantom(9))]
    prints = []
    for number, some in enumerate((scans, scans, relabelled, other)):
        build(tmp_path / str(number), some)
        prints.append(sources.Store.open(tmp_path / str(number)).fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_store_can_be_moved(tmp_path: pathlib.Path) -> None:
    store = stores.tiny_store(tmp_path, {"train": 2})
    shutil.move(store, tmp_path / "elsewhere")
    moved = sources.Store.open(tmp_path / "elsewhere")
    assert moved.read_volume(0)[0].any()
    text = (tmp_path / "elsewhere/store.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert json.loads(text)["schema"] == sources.SCHEMA_VERSION


def test_another_schema_version_is_refused(tmp_path: pathlib.Path) -> None:
    store = stores.tiny_store(tmp_path, {"train": 2})
    meta = json.loads((store / "store.json").read_text(encoding="utf-8"))
    meta["schema"] = 0
    meta["digest"] = sources.digest(meta)
    (store / "store.json").write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(sources.StoreError, match="schema version 0, expected"):
        sources.Store.open(store)
