import collections
import dataclasses
import hashlib
import pathlib

import nibabel as nib
import numpy as np
import pytest

from tests.data import phantom
from uad_jax.data import (
    check,
    implant,
    implant_plan,
    implant_protocol,
    manifest,
    nifti,
    splits,
)

REAL_DATA = pathlib.Path(__file__).parents[3] / "shared" / "data"
needs_real_data = pytest.mark.skipif(
    not (REAL_DATA / "ixi_t1").is_dir(), reason="the real scans are not here"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return phantom.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def rows(data: pathlib.Path) -> list[implant_protocol.Row]:
    return implant_protocol.plan_rows(data, phantom.SUBJECTS, seed=1)


@pytest.fixture(scope="module")
def written(
    data: pathlib.Path,
    rows: list[implant_protocol.Row],
    tmp_path_factory: pytest.TempPathFactory,
) -> pathlib.Path:
    return implant_protocol.write_protocol(
        data, tmp_path_factory.mktemp("out"), rows=rows
    )


def test_the_frozen_rows_have_not_changed() -> None:
    # Every figure of the protocol is about these volumes. Another choice of masks,
    # intensities or subjects is another protocol, with another name.
    text = implant_protocol.ROWS_CSV.read_bytes()
    assert hashlib.sha256(text).hexdigest()[:16] == "3d84d4cda66fbbd7"


def test_the_frozen_rows_are_those_of_the_design() -> None:
    rows = implant_protocol.read_rows()
    split_of = implant_protocol.read_split()
    counts = collections.Counter((row.split, row.role) for row in rows)
    assert counts == {
        ("train", "healthy"): 20,
        ("val", "healthy"): 6,
        ("test", "healthy"): 6,
        ("val", "implant"): 12,
        ("test", "implant"): 24,
        ("test", "sham"): 24,
        ("train", "implant"): 40,
    }
    assert all(split_of[row.patient] == row.split for row in rows)
    assert len({row.subject for row in rows}) == len(rows)
    kinds = collections.Counter(
        (row.patient, row.kind)
        for row in rows
        if (row.split, row.role) == ("test", "implant")
    )
    assert set(kinds.values()) == {2}
    for row in rows:
        if row.role == "implant":
            low, high = implant.RATIOS
            assert low <= float(row.ratio) <= high


def test_the_frozen_masks_are_disjoint_and_without_patient26() -> None:
    rows = [row for row in implant_protocol.read_rows() if row.mask]
    test = {(r.kind, r.mask_patient) for r in rows if r.split == "test"}
    rest = {(r.kind, r.mask_patient) for r in rows if r.split != "test"}
    assert not test & rest
    assert len(test) == 24  # every test implant is another patient's lesion
    assert not any("patient26" in row.mask for row in rows)
    for row in rows:
        assert (row.generator == "test") == (row.split == "test")


def test_frozen_shams_differ_from_their_implants_in_the_ratio_alone() -> None:
    rows = {row.subject: row for row in implant_protocol.read_rows()}
    for sham in rows.values():
        if sham.role != "sham":
            continue
        real = rows[sham.sham_of]
        expected = dataclasses.replace(
            real,
            subject=sham.subject,
            role="sham",
            sham_of=real.subject,
            ratio="1.0",
            lesion_t1=sham.lesion_t1,
        )
        assert sham == expected
        ratio = float(real.lesion_t1) / float(sham.lesion_t1)
        assert ratio == pytest.approx(float(real.ratio), abs=0.02)


def test_rows_survive_the_csv(
    rows: list[implant_protocol.Row], tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "rows.csv"
    implant_protocol.write_rows(path, rows)
    assert implant_protocol.read_rows(path) == rows


def test_the_folder_is_ready_to_prepare(
    written: pathlib.Path, rows: list[implant_protocol.Row]
) -> None:
    subjects = manifest.read(written)
    assert not check.has_errors(check.check(subjects, workers=0))
    by_name = {row.subject: row for row in rows}
    labels = collections.Counter((s.split, s.label) for s in subjects)
    assert labels == {
        ("train", "healthy"): 1,
        ("val", "healthy"): 1,
        ("val", "abnormal"): 2,
        ("test", "healthy"): 3,
        ("test", "abnormal"): 12,
        ("test", "sham"): 12,
    }
    roles = splits.assign(subjects)
    for subject in subjects:
        row = by_name[subject.subject]
        assert roles[subject.subject] == row.split
        assert subject.patient == row.patient
        assert subject.extra["data"] == "implant"
        assert subject.extra["kind"] == row.kind
        assert "CC BY-SA" in subject.licence
        assert ("MSLUB" in subject.licence) == (row.kind == "ms")
        assert ("SOOP" in subject.licence) == (row.kind == "stroke")
        assert (subject.lesion_mask is None) == (row.role == "healthy")


def test_untouched_scans_keep_their_voxels_and_all_files_their_grid(
    written: pathlib.Path, data: pathlib.Path
) -> None:
    for subject in manifest.read(written):
        source = nib.load(data / f"ixi_t1/{subject.patient}_T1.nii.gz")
        image = nib.load(subject.images["t1"])
        assert image.get_data_dtype() == np.int16
        for path in subject.files():
            np.testing.assert_array_equal(nib.load(path).affine, source.affine)
        same = np.asarray(image.dataobj) == np.asarray(source.dataobj)
        assert same.all() == (subject.label == "healthy")
        if subject.lesion_mask:
            lesion = nib.load(subject.lesion_mask)
            assert lesion.get_data_dtype() == np.uint8
            inside = np.asarray(lesion.dataobj) > 0
            assert same[inside].mean() < 0.6 < same.mean()


def test_a_second_call_writes_the_same_bytes(
    written: pathlib.Path,
    data: pathlib.Path,
    rows: list[implant_protocol.Row],
    tmp_path: pathlib.Path,
) -> None:
    few = [row for row in rows if row.patient == "B"]
    again = implant_protocol.write_protocol(data, tmp_path, rows=few)
    for path in again.parent.glob("*.nii.gz"):
        assert path.read_bytes() == (written.parent / path.name).read_bytes()


def test_training_implants_are_written_apart(
    data: pathlib.Path, rows: list[implant_protocol.Row], tmp_path: pathlib.Path
) -> None:
    path = implant_protocol.write_protocol(data, tmp_path, rows=rows, training=True)
    subjects = manifest.read(path)
    assert {(s.subject, s.split, s.label) for s in subjects} == {
        ("A_ms1", "train", "abnormal"),
        ("A_stroke1", "train", "abnormal"),
    }
    assert {s.extra["generator"] for s in subjects} == {"train"}


@pytest.mark.parametrize(
    ("field", "value"),
    [("lesion_voxels", "3"), ("lesion_sha256", "0" * 16), ("scan_sha256", "0" * 16)],
)
def test_a_volume_that_differs_from_its_row_is_an_error(
    data: pathlib.Path, rows: list[implant_protocol.Row], field: str, value: str
) -> None:
    row = next(row for row in rows if row.role == "implant")
    background = implant_plan.read_background(data, row.patient)
    implant_protocol.make(data, row, background)  # as it is, it agrees
    changed = dataclasses.replace(row, **{field: value})
    with pytest.raises(ValueError, match=f"{row.subject}: (.|\n)*{field} is") as error:
        implant_protocol.make(data, changed, background)
    assert "would not compare" in str(error.value)


def test_a_changed_intensity_is_an_error_but_rounding_is_not(
    data: pathlib.Path, rows: list[implant_protocol.Row]
) -> None:
    row = next(row for row in rows if row.role == "implant")
    background = implant_plan.read_background(data, row.patient)
    mean = float(row.lesion_t1)
    near = dataclasses.replace(row, lesion_t1=f"{mean + 0.2:.2f}")
    implant_protocol.make(data, near, background)
    far = dataclasses.replace(row, ratio=str(float(row.ratio) - 0.01))
    with pytest.raises(ValueError, match="lesion_t1 is"):
        implant_protocol.make(data, far, background)


def test_missing_files_are_listed_together(
    rows: list[implant_protocol.Row], tmp_path: pathlib.Path
) -> None:
    with pytest.raises(ValueError, match="problem") as error:
        implant_protocol.write_protocol(tmp_path, tmp_path / "out", rows=rows)
    for part in ("A_T1.nii.gz", "E_tissue.nii.gz", "_lesion.nii.gz"):
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()


@needs_real_data
def test_the_ms_frame_is_the_brain_box_of_patient26() -> None:
    path = REAL_DATA / "mslub/atlas_1mm/patient26_T1_1mm.nii.gz"
    scan = nifti.read_image(path)
    where = np.argwhere(scan.data > 0)
    low = scan.affine[:3, 3] + where.min(0) - 0.5
    high = scan.affine[:3, 3] + where.max(0) + 0.5
    assert implant.FRAMES["mslub"] == (tuple(low[:2]), tuple(high))


@needs_real_data
@pytest.mark.parametrize("role", ["implant", "sham"])
def test_real_volumes_agree_with_the_frozen_rows(role: str) -> None:
    rows = [r for r in implant_protocol.read_rows() if r.role == role]
    for row in (rows[0], rows[-1]):
        background = implant_plan.read_background(REAL_DATA, row.patient)
        volume = implant_protocol.make(REAL_DATA, row, background)
        ratio = volume.image[volume.lesion].mean()
        ratio /= background.image[volume.lesion].mean()
        assert ratio == pytest.approx(float(row.ratio), abs=0.02)
