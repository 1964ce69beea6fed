import dataclasses
import pathlib

import nibabel as nib
import numpy as np
import pytest
from absl import logging

from tests.data import scans
from uad_jax.data import check, examine
from uad_jax.data.examine import Problem, Severity


def _of(problems: list[Problem], severity: Severity) -> list[Problem]:
    return [problem for problem in problems if problem.severity is severity]


def _small_lesion() -> np.ndarray:
    lesion = np.zeros(scans.SHAPE, bool)
    lesion[10:12, 11:13, 9:11] = True
    return lesion


def test_good_subjects_have_no_problems(tmp_path: pathlib.Path) -> None:
    subjects = [
        scans.subject(tmp_path, "a", 0),
        scans.with_lesion(tmp_path, scans.subject(tmp_path, "b", 1), _small_lesion()),
    ]
    problems = check.check(subjects)
    assert _of(problems, Severity.ERROR) == []
    assert _of(problems, Severity.WARNING) == []
    assert not check.has_errors(problems)


def test_every_bad_file_is_listed(tmp_path: pathlib.Path) -> None:
    subjects = [scans.subject(tmp_path, name, k) for k, name in enumerate("abcd")]
    whole = subjects[0].images["t1"].read_bytes()
    subjects[0].images["t1"].write_bytes(whole[: len(whole) // 2])
    subjects[1].images["t1"].write_text("<html>log in</html>")
    assert subjects[1].brain_mask is not None
    subjects[1].brain_mask.unlink()
    scans.save(subjects[2].images["t1"], np.full(scans.SHAPE, np.nan, np.float32))
    done: list[tuple[int, int, str]] = []
    problems = check.check(subjects, progress=lambda *step: done.append(step))
    errors = _of(problems, Severity.ERROR)
    assert [error.path for error in errors] == [
        subjects[0].images["t1"],
        subjects[1].images["t1"],
        subjects[1].brain_mask,
        subjects[2].images["t1"],
    ]
    assert "HTML" in errors[1].message
    assert done == [(1, 4, "a"), (2, 4, "b"), (3, 4, "c"), (4, 4, "d")]
    text = check.render(problems, subjects)
    assert text.startswith("Checked 4 subjects, 8 files: 4 errors, 0 warnings")
    assert str(subjects[1].brain_mask) in text


def test_unforeseen_failures_do_not_stop_the_others(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("odd")

    subjects = [scans.subject(tmp_path, name, k) for k, name in enumerate("ab")]
    monkeypatch.setattr(examine.nifti, "read_image", fail)
    errors = _of(check.check(subjects), Severity.ERROR)
    assert [error.message for error in errors] == [
        "ZeroDivisionError: odd"
    ] * 4  # images and masks


def test_processes_find_the_same(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects = [scans.subject(tmp_path, name, k) for k, name in enumerate("abc")]
    subjects[1].images["t1"].write_bytes(b"")
    here = check.check(subjects, workers=0)
    monkeypatch.setattr(check, "_SERIAL_SECONDS", 0.0)
    assert check.check(subjects, workers=2) == here


def test_nan_is_a_warning_when_asked_for(tmp_path: pathlib.Path) -> None:
    subject = scans.subject(tmp_path, "a", 0)
    data = scans.image(0)
    data[11, 12, 10] = np.nan
    scans.save(subject.images["t1"], data)
    assert check.has_errors(check.check([subject]))
    reading = examine.Reading(nan_to_zero=True)
    problems = check.check([subject], reading=reading)
    assert "set to 0" in _of(problems, Severity.WARNING)[0].message
    assert not check.has_errors(problems)


def test_fault_B8_empty_brain_is_an_error(tmp_path: pathlib.Path) -> None:
    subject = scans.subject(tmp_path, "a", 0)
    assert subject.brain_mask is not None
    scans.save(subject.brain_mask, np.zeros(scans.SHAPE, np.uint8))
    (error,) = _of(check.check([subject]), Severity.ERROR)
    assert error.path == subject.brain_mask
    assert "no voxel is brain" in error.message
    black = scans.subject(tmp_path, "b", 0)
    scans.save(black.images["t1"], np.zeros(scans.SHAPE, np.float32))
    (error,) = _of(check.check([black]), Severity.ERROR)
    assert "every voxel of the brain is 0" in error.message


def test_fault_B9_constant_image_is_a_warning(tmp_path: pathlib.Path) -> None:
    subject = scans.subject(tmp_path, "a", 0)
    scans.save(subject.images["t1"], np.full(scans.SHAPE, 7, np.float32))
    (warning,) = _of(check.check([subject]), Severity.WARNING)
    assert "constant (7) inside the brain" in warning.message


def test_label_map_given_as_image_is_a_warning(tmp_path: pathlib.Path) -> None:
    subject = scans.subject(tmp_path, "a", 0)
    scans.save(subject.images["t1"], np.ceil(9 * scans.image(0)).astype(np.uint8))
    (warning,) = _of(check.check([subject]), Severity.WARNING)
    assert "only 9 different values inside the brain" in warning.message


def test_one_file_in_two_places_is_an_error(tmp_path: pathlib.Path) -> None:
    subject = scans.with_lesion(
        tmp_path, scans.subject(tmp_path, "a", 0), _small_lesion()
    )
    assert subject.lesion_mask is not None
    subject.images["t2"] = subject.lesion_mask
    (error,) = _of(check.check([subject]), Severity.ERROR)
    assert error.path == subject.lesion_mask
    assert "given twice" in error.message


def test_fault_B18_disagreeing_forms_are_a_warning(tmp_path: pathlib.Path) -> None:
    subject = scans.subject(tmp_path, "a", 0)
    for path in subject.files():
        picture = nib.load(path)
        picture.set_qform(np.diag([4.0, 4, 4, 1]), 1)
        data = np.asarray(picture.dataobj)
        nib.save(nib.Nifti1Image(data, None, picture.header), path)
    warnings = _of(check.check([subject]), Severity.WARNING)
    assert {warning.path for warning in warnings} == set(subject.files())
    assert all("sform and qform differ" in warning.message for warning in warnings)


def test_fault_B28_odd_voxel_sizes_are_a_warning(tmp_path: pathlib.Path) -> None:
    subject = scans.subject(tmp_path, "a", 0)
    microns = np.diag([8000.0, 8000, 8000, 1])
    for path in subject.files():
        scans.save(path, np.asarray(nib.load(path).dataobj), microns)
    messages = [p.message for p in _of(check.check([subject]), Severity.WARNING)]
    assert any("check the units" in message for message in messages)
    assert any("ml; expected 300 to 3000" in message for message in messages)


def test_fault_B29_shape_mismatch_names_both_shapes(tmp_path: pathlib.Path) -> None:
    subject = scans.subject(tmp_path, "a", 0)
    assert subject.brain_mask is not None
    scans.save(subject.brain_mask, np.ones((5, 6, 7), np.uint8))
    for ignore_affine in (False, True):
        reading = examine.Reading(ignore_affine=ignore_affine)
        errors = _of(check.check([subject], reading=reading), Severity.ERROR)
        assert errors[0].path == subject.brain_mask
        assert "(5, 6, 7)" in errors[0].message
        assert str(scans.SHAPE) in errors[0].message


def test_fault_B30_affine_mismatch_is_an_error_unless_ignored(
    tmp_path: pathlib.Path,
) -> None:
    subject = scans.subject(tmp_path, "a", 0)
    assert subject.brain_mask is not None
    shifted = scans.AFFINE.copy()
    shifted[0, 3] += 1
    scans.save(subject.brain_mask, scans.brain().astype(np.uint8), shifted)
    (error,) = _of(check.check([subject]), Severity.ERROR)
    assert error.path == subject.brain_mask
    assert "1 mm" in error.message
    reading = examine.Reading(ignore_affine=True)
    assert not check.has_errors(check.check([subject], reading=reading))
    close = scans.AFFINE.copy()
    close[0, 3] += 0.005  # below a thousandth of a voxel
    scans.save(subject.brain_mask, scans.brain().astype(np.uint8), close)
    assert not check.has_errors(check.check([subject]))


def test_fault_B31_label_sets_are_noted(tmp_path: pathlib.Path) -> None:
    lesion = _small_lesion().astype(np.uint8) * 4
    lesion[10, 11, 9] = 1
    subject = scans.with_lesion(tmp_path, scans.subject(tmp_path, "a", 0), lesion)
    notes = _of(check.check([subject]), Severity.NOTE)
    (note,) = [note for note in notes if note.path == subject.lesion_mask]
    assert "{0, 1, 4}" in note.message


def test_fault_B32_empty_lesion_mask_is_listed(tmp_path: pathlib.Path) -> None:
    empty = np.zeros(scans.SHAPE, bool)
    subject = scans.with_lesion(tmp_path, scans.subject(tmp_path, "a", 0), empty)
    (warning,) = _of(check.check([subject]), Severity.WARNING)
    assert warning.path == subject.lesion_mask
    assert "lesion mask is empty" in warning.message
    healthy = dataclasses.replace(subject, label="healthy")
    assert _of(check.check([healthy]), Severity.WARNING) == []


def test_lesion_of_a_healthy_subject_is_an_error(tmp_path: pathlib.Path) -> None:
    subject = scans.with_lesion(
        tmp_path, scans.subject(tmp_path, "a", 0), _small_lesion()
    )
    healthy = dataclasses.replace(subject, label="healthy")
    (error,) = _of(check.check([healthy]), Severity.ERROR)
    assert "8 lesion voxels, but the subject is labelled healthy" in error.message


def test_fault_B33_lesion_outside_the_brain_is_measured(
    tmp_path: pathlib.Path,
) -> None:
    lesion = np.zeros(scans.SHAPE, bool)
    lesion[10, 12, 10] = True  # the middle
    lesion[0, 0, :3] = True  # the corner: 3 of 4 voxels
    subject = scans.with_lesion(tmp_path, scans.subject(tmp_path, "a", 0), lesion)
    (warning,) = _of(check.check([subject]), Severity.WARNING)
    assert "75.0% of the lesion lies outside the brain mask" in warning.message
    assert "at most 0.400" in warning.message  # 2 * 1 / (1 + 4)


def test_fault_B33_lesion_lost_to_erosion_is_noted(tmp_path: pathlib.Path) -> None:
    rim = scans.brain()
    rim[1:-1, 1:-1] &= ~(
        rim[:-2, 1:-1] & rim[2:, 1:-1] & rim[1:-1, :-2] & rim[1:-1, 2:]
    )
    lesion = rim & (np.indices(scans.SHAPE)[2] == 10)
    count = int(lesion.sum())
    lesion[9:13, 12, 10] = True
    subject = scans.with_lesion(tmp_path, scans.subject(tmp_path, "a", 0), lesion)
    problems = check.check([subject])
    (note,) = [p for p in problems if "edge of the brain mask" in p.message]
    assert f"{count / (count + 4):.1%} of the lesion" in note.message


def test_the_mask_of_a_sham_must_not_be_empty_and_loses_no_dice(
    tmp_path: pathlib.Path,
) -> None:
    lesion = np.zeros(scans.SHAPE, bool)
    lesion[10, 12, 10] = True
    lesion[0, 0, :3] = True  # outside the brain
    found = scans.with_lesion(tmp_path, scans.subject(tmp_path, "a", 0), lesion)
    sham = dataclasses.replace(found, label="sham", split="test")
    assert not any("lesion" in problem.message for problem in check.check([sham]))
    empty = scans.with_lesion(tmp_path, found, np.zeros(scans.SHAPE, bool))
    sham = dataclasses.replace(empty, label="sham", split="test")
    (error,) = _of(check.check([sham]), Severity.ERROR)
    assert "the mask of the sham is empty" in error.message


def test_fault_B34_wrong_modality_is_an_outlier(tmp_path: pathlib.Path) -> None:
    subjects = [scans.subject(tmp_path, f"s{k}", k, 1 + 0.02 * k) for k in range(9)]
    assert _of(check.check(subjects), Severity.WARNING) == []
    subjects.append(scans.subject(tmp_path, "other", 99, 12.0))
    (warning,) = _of(check.check(subjects), Severity.WARNING)
    assert (warning.subject, warning.path) == ("other", subjects[-1].images["t1"])
    assert "another modality" in warning.message
    # The same image in other units is no outlier.
    scans.save(subjects[-1].images["t1"], 1000 * scans.image(99))
    assert _of(check.check(subjects), Severity.WARNING) == []


def test_fault_B35_copy_in_train_and_test_is_an_error(tmp_path: pathlib.Path) -> None:
    subjects = [
        scans.subject(tmp_path, "a", 0, split="train"),
        scans.subject(tmp_path, "b", 0, split="test"),  # the same voxels
        scans.subject(tmp_path, "c", 1, split="val"),
    ]
    (error,) = _of(check.check(subjects), Severity.ERROR)
    assert "the same image is given for a, b, in test and train" in error.message
    same = dataclasses.replace(subjects[1], split="train")
    problems = check.check([subjects[0], same, subjects[2]])
    assert not check.has_errors(problems)
    assert "counts 2 times" in _of(problems, Severity.WARNING)[0].message


def test_patient_leaks_are_errors(tmp_path: pathlib.Path) -> None:
    subjects = [
        scans.subject(tmp_path, "a", 0, patient="p", split="train"),
        scans.subject(tmp_path, "b", 1, patient="p", split="test"),
    ]
    (error,) = _of(check.check(subjects), Severity.ERROR)
    assert "patient 'p' is in test and train" in error.message


def test_missing_skull_stripping_is_an_error(tmp_path: pathlib.Path) -> None:
    subject = dataclasses.replace(scans.subject(tmp_path, "a", 0), brain_mask=None)
    assert not check.has_errors(check.check([subject]))
    scans.save(subject.images["t1"], scans.image(0) + 1)
    (error,) = _of(check.check([subject]), Severity.ERROR)
    assert "not skull-stripped" in error.message


def test_absent_modalities_are_noted(tmp_path: pathlib.Path) -> None:
    subjects = [scans.subject(tmp_path, name, k) for k, name in enumerate("ab")]
    subjects[0].images["t2"] = scans.save(tmp_path / "t2.nii.gz", scans.image(5))
    notes = [p.message for p in _of(check.check(subjects), Severity.NOTE)]
    assert any("1 of 2 subjects have no t2 (b)" in note for note in notes)


def test_equal_messages_share_a_line() -> None:
    problems = [
        Problem(severity=Severity.WARNING, message="odd", subject=name)
        for name in "abcde"
    ]
    text = check.render(problems, [])
    assert text.count("odd") == 1
    assert "a, b, c and 2 more" in text


def test_messages_that_differ_in_numbers_share_a_line() -> None:
    problems = [
        Problem(severity=Severity.NOTE, message=f"{k}.5% lie within 6 mm.", subject="s")
        for k in (10, 9, 20)
    ]
    text = check.render(problems, [])
    assert "NOTE    9.5 to 20.5% lie within 6 mm." in text
    assert "lie" not in check.render(problems, [], notes=False)
    errors = [dataclasses.replace(p, severity=Severity.ERROR) for p in problems]
    assert check.render(errors, []).count("lie within") == 3


def test_silence_of_many_threads_ends_with_the_level_before() -> None:
    before = logging.get_verbosity()
    first, second = examine.quiet(), examine.quiet()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # not nested: as threads do
    assert logging.get_verbosity() == logging.ERROR
    second.__exit__(None, None, None)
    assert logging.get_verbosity() == before
