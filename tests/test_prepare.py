import dataclasses
import pathlib

import numpy as np
import pytest

from tests.data import scans
from uad_jax import prepare
from uad_jax.data import examine, manifest, preprocess, sources
from uad_jax.ops import intensity


@pytest.fixture(autouse=True)
def _tiny_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(
        preprocess.RECIPES["grid2mm"], name="tiny", grid=(18, 18, 16), spacing=(8,) * 3
    )
    monkeypatch.setitem(preprocess.RECIPES, "tiny", recipe)


@pytest.fixture
def source(tmp_path: pathlib.Path) -> pathlib.Path:
    lesion = np.zeros(scans.SHAPE, bool)
    lesion[10:12, 11:13, 9:11] = True
    folder = tmp_path / "in"
    subjects = [
        scans.subject(folder, "a", 0, split="train", licence="CC0"),
        scans.subject(folder, "b", 1, split="val", extra={"age": "40"}),
        scans.with_lesion(folder, scans.subject(folder, "c", 2, split="test"), lesion),
        scans.subject(folder, "d", 3, split="test", label="abnormal"),
    ]
    path = folder / "manifest.csv"
    manifest.write(path, subjects)
    return path


def test_prepare_writes_what_the_manifest_says(
    source: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = prepare.prepare(str(source), tmp_path / "store", "tiny", workers=0)
    store = sources.Store.open(tmp_path / "store")
    assert store.grid == (16, 18, 18, 1)
    assert store.modalities == ("t1",)
    a, b, c, d = store.volumes
    assert (a.subject, a.split, a.licence, a.annotated) == ("a", "train", "CC0", True)
    assert b.extra["age"] == "40"
    assert (c.label, c.annotated, d.annotated) == ("abnormal", True, False)
    image, plane = store.read_volume(c.uid)
    subjects = manifest.read(source)
    expected = prepare.load(subjects[2], preprocess.RECIPES["tiny"], examine.Reading())
    np.testing.assert_array_equal(image, intensity.encode(expected.image)[0])
    np.testing.assert_array_equal(plane & sources.LESION_BIT > 0, expected.lesion)
    assert expected.lesion.any()
    assert summary["volumes"] == 4
    assert summary["slices"] == 64
    assert summary["splits"] == {"train": 1, "val": 1, "test": 2}
    assert not summary["there"]
    printed = capsys.readouterr().out
    assert "about" in printed  # the estimate
    assert f"--config.data.store={tmp_path / 'store'}" in printed


def test_prepare_twice_does_nothing(
    source: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = tmp_path / "store"
    prepare.prepare(str(source), store, "tiny", workers=0)
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    moved = source.parent.rename(tmp_path / "moved")  # the same files elsewhere
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "apply", None)  # would fail if called
        summary = prepare.prepare(str(moved / source.name), store, "tiny", workers=0)
    assert summary["there"]
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


def test_prepare_again_when_a_scan_or_label_changed(
    source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    store = tmp_path / "store"
    prepare.prepare(str(source), store, "tiny", workers=0)
    first = sources.Store.open(store).fingerprint
    scans.save(source.parent / "a.nii.gz", scans.image(9))
    assert not prepare.prepare(str(source), store, "tiny", workers=0)["there"]
    second = sources.Store.open(store).fingerprint
    subjects = manifest.read(source)
    subjects[0] = dataclasses.replace(subjects[0], split="val")
    manifest.write(source, subjects)
    assert not prepare.prepare(str(source), store, "tiny", workers=0)["there"]
    assert len({first, second, sources.Store.open(store).fingerprint}) == 3


def test_fault_B6_prepare_names_all_bad_files_and_writes_nothing(
    source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for name in ("a", "c"):
        path = source.parent / f"{name}.nii.gz"
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="Nothing was written") as error:
        prepare.prepare(str(source), tmp_path / "store", "tiny", workers=0)
    assert str(source.parent / "a.nii.gz") in str(error.value)
    assert str(source.parent / "c.nii.gz") in str(error.value)
    assert not (tmp_path / "store").exists()


def test_fault_B35_prepare_refuses_a_copy_in_train_and_test(
    source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    copy = (source.parent / "a.nii.gz").read_bytes()
    (source.parent / "c.nii.gz").write_bytes(copy)
    with pytest.raises(
        ValueError, match="the same image is given for a, c, in test and train"
    ):
        prepare.prepare(str(source), tmp_path / "store", "tiny", workers=0)
    assert not (tmp_path / "store").exists()


def test_prepare_ignores_an_affine_only_when_asked(
    source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shifted = scans.AFFINE.copy()
    shifted[1, 3] += 3
    mask = source.parent / "b_mask.nii.gz"
    scans.save(mask, scans.brain().astype(np.uint8), shifted)
    with pytest.raises(ValueError, match="3 mm"):
        prepare.prepare(str(source), tmp_path / "store", "tiny", workers=0)
    prepare.prepare(
        str(source), tmp_path / "store", "tiny", workers=0, ignore_affine=True
    )
    scans.save(mask, scans.brain().astype(np.uint8))
    prepare.prepare(str(source), tmp_path / "right", "tiny", workers=0)
    given, right = (sources.Store.open(tmp_path / n) for n in ("store", "right"))
    np.testing.assert_array_equal(given.read_volume(1)[1], right.read_volume(1)[1])


def test_prepare_reads_a_plain_folder(tmp_path: pathlib.Path) -> None:
    for number in range(4):
        scans.save(tmp_path / f"in/{number}.nii.gz", scans.image(number))
    summary = prepare.prepare(
        str(tmp_path / "in"), tmp_path / "store", "tiny", modality="t2", workers=0
    )
    assert summary["modalities"] == ["t2"]
    assert summary["splits"] == {"train": 2, "val": 1, "test": 1}


def test_prepare_says_when_there_is_nothing_to_train_on(
    source: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest.write(source, manifest.read(source)[2:])
    prepare.prepare(str(source), tmp_path / "store", "tiny", workers=0)
    assert "nothing to train on" in capsys.readouterr().out


def test_unknown_recipe_names_the_nearest(source: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'behrendt'"):
        prepare.prepare(str(source), source.parent / "store", "berendt")


def test_check_data_prints_the_table_and_exits_by_it(
    source: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare.check_data(str(source), workers=0) == 0
    assert "Checked 4 subjects, 9 files: 0 errors" in capsys.readouterr().out
    (source.parent / "a.nii.gz").write_bytes(b"")
    assert prepare.check_data(str(source), workers=0) == 1
    assert "the file is empty" in capsys.readouterr().out
