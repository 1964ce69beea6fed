"""Segmentations come back as they were, and a damaged file says so."""

import pathlib
import zipfile

import numpy as np
import pytest

from uad_jax import segmentations

FACTS = {"store": "data/store", "rule": "healthy_fpr", "threshold": "0.25"}


def masks() -> dict[str, np.ndarray]:
    """Three volumes; their depths differ and no size is a multiple of eight."""
    rng = np.random.default_rng(0)
    return {
        "b/../odd name": rng.random((3, 5, 7)) < 0.3,
        "a": np.zeros((1, 5, 7), bool),
        "ä": np.ones((4, 5, 7), bool),
    }


def written(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "results" / "test_found.npz"
    segmentations.save(path, masks(), FACTS)
    return path


def add_twice(path: pathlib.Path) -> None:
    with segmentations.create(path, {}) as writer:
        writer.add("a", np.ones((1, 1, 1), bool))
        writer.add("a", np.ones((1, 1, 1), bool))


def test_masks_and_facts_come_back_in_order(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path)
    found, facts = segmentations.load(path)
    assert facts == FACTS
    assert list(found) == list(masks())
    for subject, mask in masks().items():
        assert found[subject].dtype == bool
        np.testing.assert_array_equal(found[subject], mask)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_an_empty_set_is_a_file_too(tmp_path: pathlib.Path) -> None:
    segmentations.save(tmp_path / "none.npz", {}, {})
    found, facts = segmentations.load(tmp_path / "none.npz")
    assert len(found) == 0
    assert facts == {}


def test_the_same_masks_give_the_same_bytes(tmp_path: pathlib.Path) -> None:
    first, second = written(tmp_path / "1"), written(tmp_path / "2")
    assert first.read_bytes() == second.read_bytes()


def test_the_file_is_small(tmp_path: pathlib.Path) -> None:
    mask = np.zeros((80, 96, 96), bool)
    mask[30:40, 40:60, 30:50] = True
    segmentations.save(tmp_path / "big.npz", {"x": mask}, {})
    assert (tmp_path / "big.npz").stat().st_size < mask.size / 200


def test_numpy_alone_can_read_the_file(tmp_path: pathlib.Path) -> None:
    with np.load(written(tmp_path), allow_pickle=False) as file:
        packed = file["000000"]
    mask = masks()["b/../odd name"]
    np.testing.assert_array_equal(packed, np.packbits(mask))


def test_an_error_while_writing_keeps_the_old_file(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="comes twice"):
        add_twice(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_subject_that_comes_twice_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="'a' comes twice"):
        add_twice(tmp_path / "x.npz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "mask", [np.zeros((2, 2, 2), np.float32), np.zeros((2, 2), bool)]
)
def test_what_is_no_segmentation_is_refused(
    mask: np.ndarray, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(ValueError, match="expected bool"):
        segmentations.save(tmp_path / "x.npz", {"a": mask}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(segmentations.SegmentationsError, match=r"gone\.npz is missing"):
        segmentations.load(tmp_path / "gone.npz")


def test_a_torn_file_is_named(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(
            segmentations.SegmentationsError, match=r"test_found.*damag"
        ):
            segmentations.load(path)


def test_no_flipped_byte_changes_a_mask_unnoticed(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    noticed = 0
    for place in range(0, len(whole), 7):
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
        )
        try:
            found, facts = segmentations.load(path)
            read = {subject: found[subject] for subject in found}
        except segmentations.SegmentationsError:
            noticed += 1
            continue
        assert facts == FACTS
        for subject, mask in masks().items():
            np.testing.assert_array_equal(read[subject], mask)
    assert noticed > len(whole) / 7 / 2


def test_a_damaged_mask_is_noticed_before_it_is_asked_for(
    tmp_path: pathlib.Path,
) -> None:
    path = written(tmp_path)
    whole = bytearray(path.read_bytes())
    entry = whole.index(b"PK\x01\x02")  # of the first mask, in the directory
    whole[entry + 16] ^= 0xFF  # its checksum
    path.write_bytes(whole)
    with pytest.raises(
        segmentations.SegmentationsError, match=r"000000\.npy does not match"
    ):
        segmentations.load(path)


def test_a_file_of_another_kind_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "other.npz"
    np.savez(path, index=np.zeros(3))
    with pytest.raises(
        segmentations.SegmentationsError, match=r"other\.npz is damaged"
    ):
        segmentations.load(path)
    np.savez(path, something=np.zeros(3))
    with pytest.raises(
        segmentations.SegmentationsError, match=r"other\.npz is damaged"
    ):
        segmentations.load(path)


def test_pickled_members_are_never_opened(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "pickled.npz"
    np.savez(path, index=np.array([{"version": 1}], dtype=object))
    with pytest.raises(segmentations.SegmentationsError, match="allow_pickle"):
        segmentations.load(path)


def test_a_volume_that_vanished_is_noticed(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "n", "w") as new:
        for name in old.namelist():
            if name != "000001.npy":
                new.writestr(name, old.read(name))
    (tmp_path / "n").replace(path)
    with pytest.raises(segmentations.SegmentationsError, match=r"000001\.npy"):
        segmentations.load(path)
