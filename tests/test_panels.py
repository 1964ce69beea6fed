"""Pictures of a comparison show what each run found, where it found it."""

import io
import pathlib
import zipfile
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from tests import stores
from tests.fake_runs import fake_run
from uad_jax import entries, figures, panels
from uad_jax.entries import Entry

DICE = {  # subject -> Dice of the two runs
    "test-1": (0.9, 0.8),
    "test-3": (0.5, 0.6),
    "test-5": (0.3, 0.2),
    "test-7": (0.1, 0.7),
}
AP = {"test-1": 0.9, "test-3": 0.5, "test-5": 0.2, "test-7": 0.4}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("panels")
    return stores.tiny_store(folder, {"train": 1, "test": 8})


def two(
    folder: pathlib.Path, store: str, masks: Any = None, **options: Any
) -> list[Entry]:
    """Two runs; the first finds the left half of everything, the second nothing."""
    half = np.zeros((6, 32, 32), bool)
    half[:, :16] = True
    folders = [
        fake_run(
            folder / name,
            AP,
            {subject: pair[run] for subject, pair in DICE.items()},
            masks=dict.fromkeys(AP, mask) if masks is None else masks,
            store=store,
            healthy=["test-0", "test-2"],
            **options,
        )
        for run, (name, mask) in enumerate({"half": half, "none": half & False}.items())
    ]
    return entries.read(folders)


def test_best_median_worst_and_the_most_disputed_are_shown(
    store: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    found, notes = panels.choose(two(tmp_path, str(store)))
    assert notes == []
    assert {one.title: one.why for one in found} == {
        "test-1": "best by mean AP over the runs (0.90)",
        "test-7": "median by mean AP over the runs (0.40); "
        "the runs' Dice is farthest apart (0.60)",
        "test-5": "worst by mean AP over the runs (0.20)",
    }
    assert found[0].captions["half"] == "Dice 0.90, AP 0.90, above 0.5"
    assert found[0].captions["none"] == "Dice 0.80, AP 0.90, above 0.5"


def test_image_and_truth_are_those_of_the_store(
    store: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    found, _ = panels.choose(two(tmp_path, str(store)))
    case = found[0].case
    made = stores.phantom(2, lesion=True)  # after train-0 and test-0
    np.testing.assert_allclose(case.image, made.image[..., 0], atol=2e-5)
    np.testing.assert_array_equal(case.lesion, made.lesion)
    assert found[0].found["half"][:, :16].all()
    assert not found[0].found["none"].any()


def panel() -> panels.Panel:
    """An even image; the truth is at large x, run "a" finds it, "b" the other side."""
    image = np.full((3, 20, 24), 0.5, np.float32)
    truth = np.zeros(image.shape, bool)
    truth[1, 13:17, 10:14] = True
    found = {"a": truth, "b": truth[:, ::-1]}
    case = figures.Case(
        title="x",
        image=image,
        reconstruction=None,
        anomaly_map=image,
        found=truth,
        lesion=truth,
        brain=np.ones(image.shape, bool),
    )
    captions = {"a": "Dice 1.00", "b": "Dice 0.00"}
    return panels.Panel(title="x", why="", case=case, found=found, captions=captions)


def cells(png: bytes, count: int) -> list[np.ndarray]:
    """The pictures of a row, left to right, cut out where they are not white."""
    pixels = matplotlib.image.imread(io.BytesIO(png))[..., :3]
    gray = (np.abs(pixels - 0.5) < 0.02).all(axis=-1)
    columns = gray.sum(axis=0) > 0.25 * gray.sum(axis=0).max()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], columns, [False]])))
    spans = [(a, b) for a, b in edges.reshape(-1, 2) if b - a > 40]
    rows = np.flatnonzero(gray.sum(axis=1) > 100)
    assert len(spans) == count
    return [pixels[rows[0] : rows[-1], a:b] for a, b in spans]


def test_each_run_is_drawn_with_its_own_finding() -> None:
    image, truth, first, second = cells(panels.draw(panel()), 4)

    def red(picture: np.ndarray) -> np.ndarray:
        return picture[..., 0] - picture[..., 2] > 0.2

    def blue(picture: np.ndarray) -> np.ndarray:
        return picture[..., 2] - picture[..., 0] > 0.3

    half = image.shape[1] // 2
    assert not red(image).any()
    assert not blue(image).any()
    assert not red(truth).any()
    # Large x is on the left side of the picture (`figures.radiological`).
    for picture in (truth, first, second):
        assert blue(picture)[:, :half].any()
        assert not blue(picture)[:, half:].any()
    assert red(first)[:, :half].any()
    assert not red(first)[:, half:].any()
    assert not red(second)[:, :half].any()
    assert red(second)[:, half:].any()


def test_many_runs_wrap_into_rows() -> None:
    one = panel()
    masks = {f"run {i}": one.found["a"] for i in range(7)}
    many = panels.Panel(
        title="x", why="", case=one.case, found=masks, captions=dict.fromkeys(masks, "")
    )
    wide = matplotlib.image.imread(io.BytesIO(panels.draw(many))).shape
    narrow = matplotlib.image.imread(io.BytesIO(panels.draw(one))).shape
    assert wide[1] == narrow[1]
    assert wide[0] > 1.2 * narrow[0]


def test_a_store_that_is_gone_is_said(tmp_path: pathlib.Path) -> None:
    found, notes = panels.choose(two(tmp_path, "/nowhere/store"))
    assert found == []
    assert "the store of the images is gone" in notes[0]
    assert "/nowhere" not in notes[0]


def _flip(path: pathlib.Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


def test_damaged_segmentations_of_one_run_cost_its_pictures_only(
    store: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    runs = two(tmp_path, str(store))
    path = tmp_path / "half" / "results" / "test_found.npz"
    with zipfile.ZipFile(path) as archive:
        members = [one for one in archive.infolist() if "index" not in one.filename]
    for member in members:  # after they were checked: the packed voxels
        start = member.header_offset + 30 + len(member.filename) + 20
        _flip(path, start + member.compress_size - 3)
    found, notes = panels.choose(runs)
    assert [set(one.found) for one in found] == [{"none"}] * 3
    (note,) = notes
    assert "segmentations of half are damaged" in note
    assert str(tmp_path) not in note
    (tmp_path / "none" / "results" / "test_found.npz").unlink()
    found, notes = panels.choose(runs)
    assert found == []
    assert notes[-1] == "There are no pictures."
    assert not any(str(tmp_path) in note for note in notes)


def test_a_damaged_record_of_the_store_is_a_note_without_its_folder(
    tmp_path: pathlib.Path,
) -> None:
    own = stores.tiny_store(tmp_path, {"train": 1, "test": 8})
    runs = two(tmp_path, str(own))
    (records,) = own.rglob("*.array_record-*")
    data = bytearray(records.read_bytes())
    data[256:-65536] = bytes(byte ^ 0xFF for byte in data[256:-65536])
    records.write_bytes(data)
    found, notes = panels.choose(runs)
    assert found == []
    (note,) = notes
    assert "the store 'store' of the images is damaged at 'test-" in note
    assert str(tmp_path) not in note


def test_segmentations_of_another_shape_are_said(
    store: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    masks = dict.fromkeys(AP, np.ones((6, 32, 31), bool))
    found, notes = panels.choose(two(tmp_path, str(store), masks))
    assert found == []
    assert "(6, 32, 32)" in notes[0]
    assert "(6, 32, 31)" in notes[0]


def test_without_segmentations_there_are_no_pictures(tmp_path: pathlib.Path) -> None:
    folders = [fake_run(tmp_path / name, AP) for name in ("a", "b")]
    found, notes = panels.choose(entries.read(folders))
    assert found == []
    assert "No run has stored segmentations" in notes[0]


def test_without_lesion_masks_volumes_are_chosen_by_rank(
    tmp_path: pathlib.Path,
) -> None:
    folders = [
        fake_run(tmp_path / name, {}, {"a": 0.0}, healthy=list("abc"))
        for name in ("one", "two")
    ]
    found = entries.read(folders)
    for entry, scale in zip(found, (1.0, 100.0), strict=True):
        for subject, score in (("a", 2.0), ("b", 3.0), ("c", 1.0)):
            entry.subjects[subject]["volume_score"] = str(scale * score)
    chosen = panels.chosen_subjects(found)
    assert list(chosen) == ["b", "a", "c"]
    assert [why.split()[0] for why in chosen.values()] == [
        "highest",
        "median",
        "lowest",
    ]


def test_curves_are_drawn_over_steps_and_over_seconds() -> None:
    curves = {
        "run": {
            "points": [
                {"step": 1.0, "train_seconds": 5.0, "ap": 0.1, "dice": 0.2},
                {"step": 2.0, "train_seconds": 9.0, "ap": 0.3, "dice": float("nan")},
            ],
            "validation": [{"step": 1, "train_seconds": None, "validation_loss": 2.0}],
        },
        "maps": {
            "points": [{"step": None, "train_seconds": None, "ap": 0.2, "dice": None}],
            "validation": [],
        },
    }
    drawn = panels.draw_curves(curves)
    assert set(drawn) == {"step", "train_seconds"}
    for png in drawn.values():
        assert matplotlib.image.imread(io.BytesIO(png)).std() > 0.05
    assert panels.draw_curves({"maps": curves["maps"]}) == {}
