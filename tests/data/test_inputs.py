import pathlib

import pytest

from uad_jax.data import inputs

FLAIR = ("flair",)


def _touch(folder: pathlib.Path, *names: str) -> pathlib.Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def _refused(source: pathlib.Path, wanted: tuple[str, ...] = FLAIR, **given) -> str:
    with pytest.raises(ValueError, match=str(source)) as caught:
        inputs.find(str(source), wanted, **given)
    return str(caught.value)


def test_a_file_is_a_subject_with_the_brain_mask_beside_it(
    tmp_path: pathlib.Path,
) -> None:
    _touch(tmp_path, "sub-1_FLAIR.nii.gz", "sub-1_mask.nii", "sub-2_FLAIR.nii.gz")
    (one,) = inputs.find(str(tmp_path / "sub-1_FLAIR.nii.gz"), FLAIR)
    assert one.files.subject == "sub-1"
    assert one.files.images == {"flair": tmp_path / "sub-1_FLAIR.nii.gz"}
    assert one.files.brain_mask == tmp_path / "sub-1_mask.nii"
    (two,) = inputs.find(str(tmp_path / "sub-2_FLAIR.nii.gz"), FLAIR)
    assert (two.files.brain_mask, two.warnings) == (None, ())


def test_of_a_folder_the_models_modalities_are_taken(tmp_path: pathlib.Path) -> None:
    names = [f"sub-{k}_{m}.nii.gz" for k in (1, 2) for m in ("T1w", "FLAIR")]
    found = inputs.find(str(_touch(tmp_path, *names, "sub-1_lesion.nii.gz")), FLAIR)
    assert [one.files.subject for one in found] == ["sub-1", "sub-2"]
    assert [list(one.files.images) for one in found] == [["flair"], ["flair"]]
    assert all(one.files.lesion_mask is None for one in found)
    both = inputs.find(str(tmp_path), ("t1", "flair"))
    assert [sorted(one.files.images) for one in both] == [["flair", "t1"]] * 2


def test_every_scan_of_another_modality_is_named(tmp_path: pathlib.Path) -> None:
    names = ["a_T1.nii.gz", "b_FLAIR.nii.gz", "c_T2.nii.gz"]
    text = _refused(_touch(tmp_path, *names))
    assert "2 of 3 subjects do not fit" in text
    assert "a: there is t1, but the model was trained on flair" in text
    assert "c: there is t2" in text
    assert "b:" not in text
    (one,) = inputs.find(str(tmp_path), FLAIR, modality="flair")
    assert one.files.subject == "b"


def test_a_name_in_the_middle_counts_and_is_not_overruled(
    tmp_path: pathlib.Path,
) -> None:
    path = _touch(tmp_path, "p26_T1_1mm.nii.gz") / "p26_T1_1mm.nii.gz"
    assert "there is t1" in _refused(path)
    assert "says t1, but the model" in _refused(path, modality="flair")
    (one,) = inputs.find(str(path), ("t1",))
    assert (one.files.subject, list(one.files.images)) == ("p26_T1_1mm", ["t1"])


def test_a_name_that_says_nothing_needs_the_users_word(
    tmp_path: pathlib.Path,
) -> None:
    path = _touch(tmp_path, "scan.nii.gz", "b.nii.gz") / "scan.nii.gz"
    assert "does not say its modality" in _refused(path)
    assert "--modality=flair" in _refused(tmp_path)
    assert len(inputs.find(str(tmp_path), FLAIR, modality="flair")) == 2
    assert "there is t1" in _refused(path, modality="t1")
    # A model of images that nobody named takes any single image.
    for name in ("scan.nii.gz", "x_T1.nii.gz"):
        path = _touch(tmp_path, name) / name
        (one,) = inputs.find(str(path), ("image",))
        assert one.files.images == {"image": path}


def test_force_takes_the_only_image_with_a_warning(tmp_path: pathlib.Path) -> None:
    folder = _touch(tmp_path, "a_T1.nii.gz", "b_FLAIR.nii.gz")
    first, second = inputs.find(str(folder), FLAIR, force=True)
    assert first.files.images == {"flair": folder / "a_T1.nii.gz"}
    assert "by force: there is t1" in first.warnings[0]
    assert second.warnings == ()
    _touch(tmp_path, "a_T2.nii.gz")  # which of the two?
    assert "there is t1, t2" in _refused(folder, force=True)


def test_the_columns_of_a_manifest_are_believed(tmp_path: pathlib.Path) -> None:
    _touch(tmp_path, "t1_of_a.nii.gz", "b.nii.gz", "m.nii.gz")
    path = tmp_path / "list.csv"
    path.write_text(
        "subject,image_flair,brain_mask,lesion_mask,split\n"
        "a,t1_of_a.nii.gz,m.nii.gz,m.nii.gz,train\nb,b.nii.gz,,,\n"
    )
    a, b = (one.files for one in inputs.find(str(path), FLAIR))
    assert (a.brain_mask, b.brain_mask) == (tmp_path / "m.nii.gz", None)
    assert {a.label, b.label, a.split, b.split} == {"healthy", "test"}


def test_other_files_are_refused(tmp_path: pathlib.Path) -> None:
    _touch(tmp_path, "scan.dcm")
    assert "Convert other formats" in _refused(tmp_path / "scan.dcm")
    assert "there is no file" in _refused(tmp_path / "gone_FLAIR.nii.gz")
    assert "neither a manifest nor a folder" in _refused(tmp_path / "gone")
