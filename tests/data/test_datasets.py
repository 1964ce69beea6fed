import csv
import pathlib

import pytest

from uad_jax.data import datasets, splits

COLUMNS = ["", "img_name", "age", "label", "img_path", "mask_path", "seg_path"]


def _row(set_folder: str, name: str, *, ixi: bool = False) -> list[str]:
    folder = f"/{set_folder}"
    return [
        "7",
        f"{name}_t1.nii.gz" if ixi else name,
        "38.9",
        "0" if ixi else "1",
        f"{folder}/t1/{name}_t1.nii.gz",
        f"{folder}/mask/{name}_mask.nii.gz",
        "" if ixi else f"{folder}/seg/{name}_seg.nii.gz",
    ]


def _write_list(path: pathlib.Path, rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def _touch_images(base: pathlib.Path, rows: list[list[str]], *others: str) -> None:
    for row in rows:
        for cell in row[4:]:
            if cell:
                (base / cell.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
                (base / cell.lstrip("/")).touch()
        for other in others:
            image = base / row[4].lstrip("/").replace("t1", other)
            image.parent.mkdir(parents=True, exist_ok=True)
            image.touch()


def _ixi(root: pathlib.Path, *, data: str = "", lists: str = "") -> None:
    """Two folds; A is in train, val and test; B twice in train; E has no T2."""
    names = {letter: f"IXI{100 + k}-HH-{k}" for k, letter in enumerate("ABCDEFG")}
    rows = {key: _row("Train/ixi", name, ixi=True) for key, name in names.items()}
    for name, letters in (
        ("IXI_train_fold0", "ABBCEG"),
        ("IXI_val_fold0", "AD"),
        ("IXI_train_fold1", "BBDE"),
        ("IXI_val_fold1", "CG"),
        ("IXI_test", "AF"),
    ):
        _write_list(
            root / lists / "splits" / f"{name}.csv", [rows[key] for key in letters]
        )
    with_t2 = [row for key, row in rows.items() if key != "E"]
    _touch_images(root / data, list(rows.values()))
    _touch_images(root / data, with_t2, "t2")
    with open(root / lists / "splits" / "avail_t2.csv", "w") as file:
        file.write(",0\n")
        for number, row in enumerate(with_t2):
            file.write(f"{number},{row[1].replace('t1', 't2')}\n")


def _roles(subjects: list, fold: int) -> dict[str, str]:
    """Letters, so that a fold reads like the lists in `_ixi`."""
    letter = {f"IXI{100 + k}-HH-{k}": c for k, c in enumerate("ABCDEFG")}
    return {
        letter[subject.partition("_copy")[0]] + subject.partition("_copy")[2]: role
        for subject, role in splits.assign(subjects, fold).items()
    }


@pytest.mark.parametrize(("data", "lists"), [("", ""), ("Data", "Data"), ("Data", "")])
def test_ixi_layout_loads_with_and_without_a_data_folder(
    tmp_path: pathlib.Path, data: str, lists: str
) -> None:
    _ixi(tmp_path, data=data, lists=lists)
    subjects = datasets.load(f"ixi:{tmp_path}")
    base = tmp_path / data / "Train" / "ixi"
    first = subjects[0]
    assert first.subject == "IXI100-HH-0"
    assert first.patient == "IXI100"
    assert first.images == {
        "t1": base / "t1" / "IXI100-HH-0_t1.nii.gz",
        "t2": base / "t2" / "IXI100-HH-0_t2.nii.gz",
    }
    assert first.brain_mask == base / "mask" / "IXI100-HH-0_mask.nii.gz"
    assert (first.lesion_mask, first.label) == (None, "healthy")
    assert first.extra["age"] == "38.9"
    without = next(s for s in subjects if s.subject == "IXI104-HH-4")
    assert list(without.images) == ["t1"]


def test_ixi_repeats_and_leaks_are_removed(tmp_path: pathlib.Path) -> None:
    _ixi(tmp_path)
    subjects = datasets.load(f"ixi:{tmp_path}")
    assert len(subjects) == 7
    assert _roles(subjects, 0) == {
        "A": "test",
        "B": "train",
        "C": "train",
        "D": "val",
        "E": "train",
        "F": "test",
        "G": "train",
    }
    assert _roles(subjects, 1) == {
        "A": "test",
        "B": "train",
        "C": "val",
        "D": "train",
        "E": "train",
        "F": "test",
        "G": "val",
    }


def test_ixi_reference_keeps_repeats_and_leaks(tmp_path: pathlib.Path) -> None:
    _ixi(tmp_path)
    subjects = datasets.load(f"ixi:{tmp_path}", reference=True)
    assert _roles(subjects, 0) == {
        "A": "test",
        "A2": "val",
        "A3": "train",
        "B": "train",
        "B2": "train",
        "C": "train",
        "D": "val",
        "E": "train",
        "F": "test",
        "G": "train",
    }
    copies = [s for s in subjects if s.patient == "IXI100"]
    assert len({tuple(s.files()) for s in copies}) == 1


def test_ixi_t2_alone_leaves_out_subjects_without_it(tmp_path: pathlib.Path) -> None:
    _ixi(tmp_path)
    subjects = datasets.load(f"ixi:{tmp_path}", modality="t2")
    assert len(subjects) == 6
    assert {tuple(subject.images) for subject in subjects} == {("t2",)}


@pytest.mark.parametrize(
    ("name", "folder", "prefix", "others"),
    [
        ("brats21", "Test/Brats21", "Brats21", ("t2", "flair")),
        ("mslub", "Test/MSLUB", "MSLUB", ("t2",)),
        ("atlas_v2", "Test/ATLAS_v2", "ATLAS_v2", ()),
        ("wmh", "Test/WMH", "WMH", ()),
    ],
)
def test_annotated_sets_load_as_val_and_test(
    tmp_path: pathlib.Path, name: str, folder: str, prefix: str, others: tuple[str, ...]
) -> None:
    rows = [_row(folder, f"case{number}") for number in range(3)]
    _write_list(tmp_path / "splits" / f"{prefix}_val.csv", rows[:1])
    _write_list(tmp_path / "splits" / f"{prefix}_test.csv", rows[1:])
    _touch_images(tmp_path, rows, *others)
    subjects = datasets.load(f"{name}:{tmp_path}")
    assert splits.assign(subjects) == {"case0": "val", "case1": "test", "case2": "test"}
    assert {subject.label for subject in subjects} == {"abnormal"}
    assert subjects[0].lesion_mask == tmp_path / folder / "seg" / "case0_seg.nii.gz"
    assert tuple(subjects[0].images) == ("t1", *others)
    assert subjects[0].licence


def test_all_missing_images_of_a_set_are_named(tmp_path: pathlib.Path) -> None:
    _ixi(tmp_path)
    base = tmp_path / "Train" / "ixi"
    (base / "t2" / "IXI101-HH-1_t2.nii.gz").unlink()
    (base / "mask" / "IXI103-HH-3_mask.nii.gz").unlink()
    with pytest.raises(ValueError, match="2 problem") as error:
        datasets.load(f"ixi:{tmp_path}")
    assert "IXI101-HH-1_t2" in str(error.value)
    assert "IXI103-HH-3_mask" in str(error.value)


def test_wrong_sources_say_what_was_expected(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'brats21'"):
        datasets.load(f"brats:{tmp_path}")
    with pytest.raises(ValueError, match=r"expected the split lists MSLUB_val\.csv"):
        datasets.load(f"mslub:{tmp_path}")
    _ixi(tmp_path)
    with pytest.raises(ValueError, match=r"modality flair\. Found: t1, t2"):
        datasets.load(f"ixi:{tmp_path}", modality="flair")


def test_folder_is_a_row_too(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.nii.gz").touch()
    by_row = datasets.load(f"folder:{tmp_path}", modality="t2")
    assert by_row == datasets.load(str(tmp_path), modality="t2")
    assert list(by_row[0].images) == ["t2"]
