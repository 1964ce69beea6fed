import csv
import dataclasses
import pathlib

import nibabel as nib
import numpy as np
import pytest

from uad_jax.data import anatomy, cohort, fields, lesions, manifest, scanner

Kind = lesions.Kind
SMALL = cohort.CohortConfig(
    seed=3,
    modalities="flair",
    kinds="ms",
    train=1,
    val_healthy=0,
    val_per_kind=0,
    test_healthy=0,
    test_per_kind=1,
    twins=True,
)


@pytest.fixture(scope="module")
def ms() -> cohort.Subject:
    return cohort.make_subject(12, Kind.MS)


@pytest.fixture(scope="module")
def twin() -> cohort.Subject:
    return cohort.make_subject(12, Kind.HEALTHY)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("cohort") / "small"
    return cohort.write_cohort(SMALL, folder, workers=1, progress=False)


def test_same_seed_gives_the_same_bits(ms: cohort.Subject) -> None:
    again = cohort.make_subject(12, Kind.MS, ("flair",))
    np.testing.assert_array_equal(again.images["flair"], ms.images["flair"])
    np.testing.assert_array_equal(again.lesion, ms.lesion)


def test_another_seed_gives_another_brain(ms: cohort.Subject) -> None:
    other = cohort.make_subject(13, Kind.MS, ("flair",))
    assert (other.brain != ms.brain).sum() > 1000
    assert (other.images["flair"] != ms.images["flair"]).mean() > 0.2


def test_twin_equals_the_subject_outside_the_lesion(
    ms: cohort.Subject, twin: cohort.Subject
) -> None:
    np.testing.assert_array_equal(ms.brain, twin.brain)
    assert not twin.lesion.any()
    for modality in scanner.MODALITIES:
        changed = ms.images[modality] != twin.images[modality]
        assert changed[ms.lesion].mean() > 0.9
        # Soft edges, thick slices and interpolation reach a few voxels further.
        assert not changed[_far_from(ms.lesion, voxels=5)].any()


def test_stroke_stays_in_one_hemisphere_and_leaves_the_rest_equal() -> None:
    stroke = cohort.make_subject(21, Kind.STROKE, ("t1",))
    twin = cohort.make_subject(21, Kind.HEALTHY, ("t1",))
    assert stroke.lesion.sum() > 50
    far = _far_from(stroke.lesion, voxels=5)
    assert not (stroke.images["t1"] != twin.images["t1"])[far].any()
    columns = np.flatnonzero(stroke.lesion.any((1, 2)))
    assert columns.max() < 50 or columns.min() > 45


def test_lesions_lie_inside_the_brain_and_are_of_the_expected_size() -> None:
    for kind, low, high in ((Kind.MS, 0.1, 80), (Kind.TUMOUR, 2, 220)):
        subject = cohort.make_subject(5, kind, ("flair",))
        assert low < subject.lesion.sum() * 0.008 < high
        assert not (subject.lesion & ~subject.brain).any()
        assert 1000 < subject.brain.sum() * 0.008 < 2000


def test_images_are_zero_outside_the_brain_and_finite_codes(ms: cohort.Subject) -> None:
    for image in ms.images.values():
        assert image.dtype == np.int16
        assert not image[~ms.brain].any()
        assert 500 < np.median(image[ms.brain]) < 2500


def test_tissues_are_ordered_as_in_real_scans() -> None:
    for modality, order in {
        "t1": ("vent", "gm", "wm"),
        "t2": ("wm", "gm", "vent"),
        "flair": ("vent", "wm", "gm"),
    }.items():
        values = [scanner.CONTRAST[modality][anatomy.INDEX[name]] for name in order]
        assert values == sorted(values)


def test_ms_lesions_are_bright_on_flair_and_t2_and_dark_on_t1(
    ms: cohort.Subject, twin: cohort.Subject
) -> None:
    change = {
        name: np.median(ms.images[name][ms.lesion] / twin.images[name][ms.lesion])
        for name in scanner.MODALITIES
    }
    assert change["flair"] > 1.1
    assert change["t2"] > 1.1
    assert change["t1"] < 0.96


def test_mass_effect_moves_the_anatomy_of_a_tumour() -> None:
    tumour = cohort.make_subject(5, Kind.TUMOUR, ("flair",))
    twin = cohort.make_subject(5, Kind.HEALTHY, ("flair",))
    changed = tumour.images["flair"] != twin.images["flair"]
    assert changed.sum() > 1.5 * tumour.lesion.sum()


def test_maps_of_every_subject_sum_to_the_template_brain() -> None:
    base = anatomy.template()
    maps = anatomy.refold(base, np.random.default_rng(0))
    np.testing.assert_allclose(maps.sum(0), base.maps.sum(0), atol=1e-5)
    assert maps.min() >= -1e-6
    assert np.abs(maps - base.maps).max() > 0.5


def test_smooth_fields_have_unit_variance_up_to_the_border() -> None:
    rng = np.random.default_rng(0)
    draws = np.stack(
        [fields.smooth_field(rng, (12, 10, 8), 2.0, 6.0) for _ in range(400)]
    )
    np.testing.assert_allclose(draws.std(0), 1, atol=0.2)
    neighbour = (draws[:, 5, 5, 4] * draws[:, 8, 5, 4]).mean()  # 6 mm apart
    assert neighbour == pytest.approx(np.exp(-0.5), abs=0.15)


def test_manifest_lists_every_file(written: pathlib.Path) -> None:
    with written.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["healthy", "abnormal", "healthy"]
    assert rows[2]["twin_of"] == rows[1]["subject"]
    assert rows[2]["patient"] == rows[1]["patient"]
    assert rows[0]["lesion_mask"] == ""
    image = nib.load(written.parent / rows[1]["image_flair"])
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert int(image.header["qform_code"]) > 0
    assert int(image.header["sform_code"]) > 0
    np.testing.assert_array_equal(image.get_qform(), image.get_sform())
    lesion = np.asarray(nib.load(written.parent / rows[1]["lesion_mask"]).dataobj)
    assert lesion.any()


def test_manifest_reads_back_like_a_users(written: pathlib.Path) -> None:
    subjects = manifest.read(written)
    assert [s.label for s in subjects] == ["healthy", "abnormal", "healthy"]
    assert subjects[1].extra["kind"] == "ms"
    assert subjects[1].images["flair"].exists()


def test_second_start_does_nothing(written: pathlib.Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in written.parent.iterdir()}
    cohort.write_cohort(SMALL, written.parent, progress=False)
    assert {p: p.stat().st_mtime_ns for p in written.parent.iterdir()} == before
    other = dataclasses.replace(SMALL, seed=4)
    with pytest.raises(ValueError, match="Choose another folder"):
        cohort.write_cohort(other, written.parent, progress=False)


def test_worker_processes_change_no_bit(
    written: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    two = cohort.write_cohort(SMALL, tmp_path / "two", workers=2, progress=False)
    assert two.read_text() == written.read_text()
    for path in sorted(two.parent.glob("*.nii.gz")):
        ours = np.asarray(nib.load(path).dataobj)
        theirs = np.asarray(nib.load(written.parent / path.name).dataobj)
        np.testing.assert_array_equal(ours, theirs)
    assert not list(tmp_path.glob("*.partial-*"))


def test_more_subjects_change_no_other_subject() -> None:
    few = {e.subject: e for e in cohort.plan(SMALL)}
    more = cohort.plan(dataclasses.replace(SMALL, train=5, test_per_kind=3))
    assert set(few.values()) <= set(more)
    assert len({e.seed for e in more if not e.twin_of}) == 8


def test_scanner_d_only_where_it_is_asked_for() -> None:
    config = dataclasses.replace(SMALL, unseen_per_kind=2, twins=False)
    assert [e.scanner for e in cohort.plan(config)] == [None, None, "D", "D"]


def test_unusable_config_lists_every_problem() -> None:
    config = cohort.CohortConfig(modalities="t1,pet", kinds="ms,ms", train=-1)
    with pytest.raises(ValueError, match=r"pet.*ms,ms.*train=-1"):
        config.validate()


def test_anatomy_travels_with_its_licence_and_stays_small() -> None:
    folder = pathlib.Path(anatomy.__file__).parent / "assets"
    assert (folder / "anatomy.npz").stat().st_size < 300_000
    notice = (folder / "LICENSE_ICBM152.txt").read_text()
    assert "provided that the above copyright notice appear" in " ".join(notice.split())


def _far_from(mask: np.ndarray, voxels: int) -> np.ndarray:
    """Voxels further than a cube of the given half width from the mask."""
    near = mask.copy()
    for axis in range(3):
        near = np.any(
            [np.roll(near, shift, axis) for shift in range(-voxels, voxels + 1)],
            axis=0,
        )
    return ~near
