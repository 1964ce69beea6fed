import pathlib

import pytest

from uad_jax.data import manifest


def _touch(root: pathlib.Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def _csv(root: pathlib.Path, text: str) -> pathlib.Path:
    path = root / "manifest.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_read_finds_modalities_masks_and_extra_columns(tmp_path: pathlib.Path) -> None:
    _touch(tmp_path, "a/t1.nii.gz", "a/flair.nii.gz", "b.nii", "m.nii", "seg.nii")
    path = _csv(
        tmp_path,
        "\ufeffsubject,image_t1,image_FLAIR,brain_mask,lesion_mask,fold,licence,age\n"
        "s1,a/t1.nii.gz,a/flair.nii.gz,m.nii,,2,CC0,61.5\n"
        "\n"
        '"s 2, ü",b.nii,,,seg.nii,,,\n',
    )
    first, second = manifest.read(path)
    assert first == manifest.SubjectFiles(
        subject="s1",
        patient="s1",
        images={"flair": tmp_path / "a/flair.nii.gz", "t1": tmp_path / "a/t1.nii.gz"},
        brain_mask=tmp_path / "m.nii",
        fold=2,
        licence="CC0",
        extra={"age": "61.5"},
    )
    assert second.subject == "s 2, ü"
    assert second.label == "abnormal"  # a lesion mask, no label
    assert second.images == {"t1": tmp_path / "b.nii"}
    assert second.fold is None


def test_image_column_is_named_by_modality_column_or_argument(
    tmp_path: pathlib.Path,
) -> None:
    _touch(tmp_path, "a.nii", "b.nii")
    path = _csv(tmp_path, "subject,image,modality\na,a.nii,T2\nb,b.nii,\n")
    a, b = manifest.read(path, modality="t1")
    assert list(a.images) == ["t2"]
    assert list(b.images) == ["t1"]
    assert list(manifest.read(path)[1].images) == [manifest.DEFAULT_MODALITY]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_delimiters_are_read(tmp_path: pathlib.Path, delimiter: str) -> None:
    _touch(tmp_path, "a,b.nii")
    text = "subject,image,age\na,NAME,4\n".replace(",", delimiter)
    (subject,) = manifest.read(_csv(tmp_path, text.replace("NAME", "a,b.nii")))
    assert (subject.images, subject.extra) == (
        {manifest.DEFAULT_MODALITY: tmp_path / "a,b.nii"},
        {"age": "4"},
    )


def test_write_and_read_are_inverse(tmp_path: pathlib.Path) -> None:
    _touch(tmp_path, "in/a_t1.nii", "in/a_t2.nii", "in/m.nii", "out/x")
    subjects = [
        manifest.SubjectFiles(
            subject="a",
            patient="p",
            images={"t1": tmp_path / "in/a_t1.nii", "t2": tmp_path / "in/a_t2.nii"},
            lesion_mask=tmp_path / "in/m.nii",
            label="healthy",
            split="val",
            fold=0,
            licence="x, y",
            extra={"age": "3"},
        ),
        manifest.SubjectFiles(
            subject="b",
            patient="b",
            images={"t2": tmp_path / "in/a_t2.nii"},
            extra={"age": ""},
        ),
    ]
    for folder in (tmp_path, tmp_path / "out"):  # relative and absolute paths
        manifest.write(folder / "manifest.csv", subjects)
        assert manifest.read(folder / "manifest.csv") == subjects


def test_two_scans_of_one_patient_share_the_patient(tmp_path: pathlib.Path) -> None:
    _touch(tmp_path, "a.nii", "b.nii")
    path = _csv(tmp_path, "subject,patient,image\na1,p,a.nii\na2,p,b.nii\n")
    assert [s.patient for s in manifest.read(path)] == ["p", "p"]


def test_fault_B6_all_missing_files_are_named_at_once(tmp_path: pathlib.Path) -> None:
    _touch(tmp_path, "a.nii")
    path = _csv(
        tmp_path,
        "subject,image,brain_mask,split\n"
        "a,a.nii,gone_mask.nii,train\n"
        "b,gone.nii.gz,,train\n"
        "c,a.nii,,tain\n",
    )
    with pytest.raises(ValueError, match="3 problem") as error:
        manifest.read(path)
    for part in ("gone_mask.nii", "gone.nii.gz", "Did you mean 'train'"):
        assert part in str(error.value)


def test_rows_are_reported_together(tmp_path: pathlib.Path) -> None:
    _touch(tmp_path, "a.nii")
    path = _csv(
        tmp_path,
        "subject,image,label,split,fold\n"
        "a,a.nii,healty,,\n"
        "a,a.nii,,validation,\n"
        "b,,,,-1\n"
        "c,a.nii\n"
        ",a.nii,,,\n"
        "../d,a.nii,,,\n",
    )
    with pytest.raises(ValueError, match="problem") as error:
        manifest.read(path)
    for part in (
        "line 2: label is 'healty'; expected one of healthy, abnormal, sham.",
        "line 3: split is 'validation'",
        "line 3: subject 'a' is already on line 2",
        "line 4: subject 'b' has no image",
        "line 4: fold is '-1'",
        "line 5: 2 cells",
        "line 6: the subject is empty",
        "line 7: subject '../d' holds a slash",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("heading", "message"),
    [
        ("subject,image,lesionmask", "Did you mean 'lesion_mask'"),
        ("subject_id,image", "Did you mean 'subject'"),
        ("subject,img_path", "Did you mean 'image'"),
        ("subject,image,mask", "'brain_mask or lesion_mask'"),
        ("subject,image,image", "occurs twice"),
        ("subject,age", "no image column"),
        ("", "no column 'subject'"),
    ],
)
def test_heading_typos_name_the_nearest_column(
    tmp_path: pathlib.Path, heading: str, message: str
) -> None:
    with pytest.raises(ValueError, match="problem") as error:
        manifest.read(_csv(tmp_path, heading + "\n"))
    assert message in str(error.value)


def test_harmless_extra_columns_pass(tmp_path: pathlib.Path) -> None:
    _touch(tmp_path, "a.nii")
    path = _csv(tmp_path, "subject,image,age,sex,site,scanner\na,a.nii,1,F,x,y\n")
    assert set(manifest.read(path)[0].extra) == {"age", "sex", "site", "scanner"}


def test_folder_pairs_images_with_masks(tmp_path: pathlib.Path) -> None:
    _touch(
        tmp_path,
        "a.nii.gz",
        "a_mask.nii.gz",
        "sub/b.nii",
        "sub/b_lesion.nii.gz",
        "c.nii",
        "c_seg.nii",
        "notes.txt",
        ".hidden.nii",
    )
    a, b, c = sorted(manifest.read(tmp_path), key=lambda subject: subject.subject)
    assert (a.subject, a.label, a.brain_mask) == (
        "a",
        "healthy",
        tmp_path / "a_mask.nii.gz",
    )
    assert (b.label, b.lesion_mask) == ("abnormal", tmp_path / "sub/b_lesion.nii.gz")
    assert (c.label, c.lesion_mask) == ("abnormal", tmp_path / "c_seg.nii")
    assert [list(s.images) for s in (a, b, c)] == [[manifest.DEFAULT_MODALITY]] * 3


def test_folder_groups_modalities_of_one_subject(tmp_path: pathlib.Path) -> None:
    _touch(
        tmp_path,
        "sub-01_ses-1_T1w.nii.gz",
        "sub-01_ses-1_FLAIR.nii.gz",
        "sub-01_ses-1_mask.nii.gz",
        "sub-01_ses-2_T1w.nii.gz",
    )
    first, second = manifest.read(tmp_path)
    assert (first.subject, list(first.images)) == ("sub-01_ses-1", ["flair", "t1"])
    assert first.brain_mask is not None
    assert first.patient == second.patient == "sub-01"
    only = manifest.read(tmp_path, modality="flair")
    assert [list(subject.images) for subject in only] == [["flair"]]


def test_a_modality_that_no_file_has_is_answered_with_those_there(
    tmp_path: pathlib.Path,
) -> None:
    _touch(tmp_path, "a_T1.nii", "b_T2.nii")
    with pytest.raises(ValueError, match=r"'flair'\. Found: t1, t2"):
        manifest.read(tmp_path, modality="flair")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a_T1.nii", "a_tissue.nii"), "some files name their modality"),
        (("a.nii", "b_mask.nii"), "a brain mask without an image b"),
        (("x/a.nii", "y/a.nii"), "two images of one name"),
        (("a.nii", "a_seg.nii", "a_lesion.nii"), "two masks of one kind"),
        (("readme.txt",), "no subjects"),
        (("a_T1_1mm.nii", "a_T2_1mm.nii"), "images of several kinds"),
        (("a_1mm.nii", "a-T1-x.nii", "a_mask_1mm.nii"), "images of several kinds"),
    ],
)
def test_folder_problems_are_errors(
    tmp_path: pathlib.Path, names: tuple[str, ...], message: str
) -> None:
    _touch(tmp_path, *names)
    with pytest.raises(ValueError, match="problem") as error:
        manifest.read(tmp_path)
    assert message in str(error.value)


def test_absent_source_is_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="neither a manifest nor a folder"):
        manifest.read(tmp_path / "gone")


def test_a_sham_needs_a_mask_and_its_implant_on_the_same_patient(
    tmp_path: pathlib.Path,
) -> None:
    _touch(tmp_path, "a.nii", "m.nii")
    heading = "subject,patient,image,lesion_mask,label,sham_of\n"
    implant = "one,p,a.nii,m.nii,abnormal,\n"
    good = _csv(tmp_path, heading + implant + "two,p,a.nii,m.nii,sham,one\n")
    assert manifest.read(good)[1].label == "sham"
    for row, message in (
        ("two,p,a.nii,,sham,one", "sham 'two' has no lesion_mask"),
        ("two,p,a.nii,m.nii,sham,three", "sham_of is 'three'; expected an abnormal"),
        ("two,q,a.nii,m.nii,sham,one", "expected an abnormal subject of the same"),
    ):
        bad = _csv(tmp_path, heading + implant + row + "\n")
        with pytest.raises(ValueError, match=message):
            manifest.read(bad)
