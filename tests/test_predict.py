"""Prediction: from NIfTI files to maps on their own voxels, by the run alone."""

import copy
import csv
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator

import jax
import nibabel as nib
import numpy as np
import pytest

from configs import smoke
from tests import heads
from tests.heads import Run
from uad_jax import config as config_lib
from uad_jax import (
    evaluate,
    evaluation,
    prediction,
    predictor,
    scoring,
)
from uad_jax import workdir as workdir_lib
from uad_jax.data import nifti
from uad_jax.metrics import calibration
from uad_jax.metrics.protocols import Protocol
from uad_jax.prediction import Prediction


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, mesh1: jax.sharding.Mesh) -> Run:
    """One run for all tests."""
    return heads.trained_run(tmp_path_factory.mktemp("predict"), mesh1)


@pytest.fixture(scope="module")
def predicted(
    run: Run, tmp_path_factory: pytest.TempPathFactory, mesh1: jax.sharding.Mesh
) -> tuple[pathlib.Path, dict[str, Prediction]]:
    """The scans of the evaluation, once more as files."""
    folder = tmp_path_factory.mktemp("out")
    found = run.predict(run.scans.parent / "manifest.csv", folder, mesh=mesh1)
    return folder, {one.subject: one for one in found}


def _load(path: pathlib.Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def _report(one: Prediction) -> dict:
    return json.loads(one.files["report"].read_text(), parse_constant=pytest.fail)


def test_a_scan_gets_the_scores_that_evaluation_gives_it(
    run: Run, predicted: tuple[pathlib.Path, dict[str, Prediction]]
) -> None:
    _, found = predicted
    with (run.workdir / "results" / "test_subjects.csv").open() as file:
        rows = {
            row["subject"]: row
            for row in csv.DictReader(file)
            if row["scorer"] == "smoke"
        }
    assert set(rows) == {"test-5", "test-6"}
    for subject, row in rows.items():
        one = found[subject]
        assert one.volume_score == float(row["volume_score"])
        assert one.healthy_percentile == float(row["healthy_percentile"])
        assert one.found_ml == pytest.approx(
            float(row["found_ml_healthy_fpr"]), abs=6e-4
        )
        exported = run.workdir / "maps" / "test" / f"{subject}_desc-anomaly_map.nii.gz"
        np.testing.assert_array_equal(_load(one.files["anomaly_map"]), _load(exported))


def test_maps_lie_on_the_scans_own_voxels(
    run: Run, predicted: tuple[pathlib.Path, dict[str, Prediction]]
) -> None:
    _, found = predicted
    scan = nib.load(run.scans / "test-6_FLAIR.nii.gz")
    kinds = {
        "anomaly_map": np.float32,
        "anomaly_mask": np.uint8,
        "reconstruction_flair": np.float32,
    }
    for kind, dtype in kinds.items():
        image = nib.load(found["test-6"].files[kind])
        assert image.shape == scan.shape == heads.SHAPE
        assert image.get_data_dtype() == dtype
        for name in (*nifti.PLACE, "pixdim"):
            expected = scan.header[name]
            np.testing.assert_array_equal(image.header[name], expected, name)
        np.testing.assert_array_equal(image.affine, scan.affine)
        assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (
            1,
            2,
        )
        assert b"research only" in image.header["descrip"].item()
    reconstruction = _load(found["test-6"].files["reconstruction_flair"])
    assert np.isfinite(reconstruction).all()
    assert set(np.unique(_load(found["test-6"].files["anomaly_mask"]))) == {0, 1}


def test_of_imported_weights_neither_licences_nor_scans_are_known(
    run: Run, tmp_path: pathlib.Path, mesh1: jax.sharding.Mesh
) -> None:
    workdir = shutil.copytree(run.workdir, tmp_path / "run")
    known = {"step": 8, "file": "theirs.ckpt", "sha256": "0" * 64, "note": ""}
    workdir_lib.write_json(workdir / workdir_lib.IMPORTED, known)
    seen = run.scans / "train-0_FLAIR.nii.gz"  # of the store, not of the weights
    moved = dataclasses.replace(run, workdir=workdir)
    (own,) = run.predict(seen, tmp_path / "own", mesh=mesh1)
    (one,) = moved.predict(seen, tmp_path / "out", mesh=mesh1)
    assert "trained on this very scan" in str(_report(own))
    assert "trained on this very scan" not in str(_report(one))
    facts = _report(one)["run"]
    assert facts["imported"] == known
    assert facts["training_data_licences"] == []
    assert _report(own)["run"]["training_data_licences"] == [heads.LICENCE]
    assert _report(own)["run"]["imported"] is None


@pytest.mark.parametrize("axes", ["LPS", "RAS", "ASL"])
def test_the_peak_lies_where_the_blob_is_in_the_world(
    run: Run, tmp_path: pathlib.Path, mesh1: jax.sharding.Mesh, axes: str
) -> None:
    stored = nib.Nifti1Image(heads.head(11, blob=True), heads.AFFINE)
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(heads.AFFINE),
        nib.orientations.axcodes2ornt(axes),
    )
    turned = stored.as_reoriented(turn)
    data, affine = np.asarray(turned.dataobj), turned.affine
    assert "".join(nib.aff2axcodes(affine)) == axes
    path = heads.save(tmp_path / "sub-1_FLAIR.nii.gz", data, affine)
    (one,) = run.predict(path, tmp_path / "out", mesh=mesh1)
    anomaly_map = nib.load(one.files["anomaly_map"])
    values = np.asarray(anomaly_map.dataobj)
    peak = np.unravel_index(values.argmax(), values.shape)
    world = heads.world(data.shape, anomaly_map.affine)
    assert np.linalg.norm(world[(slice(None), *peak)] - heads.BLOB) < 13
    mask = _load(one.files["anomaly_mask"]) > 0
    near = np.linalg.norm(world - heads.BLOB[:, None, None, None], axis=0) < 17
    assert (mask & near).sum() > 0.5 * mask.sum() > 0
    largest = _report(one)["found"]["largest"][0]
    np.testing.assert_allclose(largest["centre_mm"], heads.BLOB, atol=5)
    assert one.num_components >= 1
    assert largest["ml"] <= one.found_ml


def test_the_report_says_what_made_it_and_no_folder(
    run: Run, predicted: tuple[pathlib.Path, dict[str, Prediction]]
) -> None:
    folder, found = predicted
    one = found["test-6"]
    report = _report(one)
    assert report["notice"] == prediction.NOTICE
    assert "Not a medical device" in report["notice"]
    assert report["run"]["name"] == "smoke"
    assert report["run"]["step"] == 8
    assert report["run"]["commit"]
    assert report["run"]["training_data_licences"] == [heads.LICENCE]
    assert report["recipe"]["name"] == "tiny"
    scan = run.scans / "test-6_FLAIR.nii.gz"
    assert report["input"]["images"] == {
        "flair": {"name": scan.name, "sha256": nifti.read_header(scan)[1]}
    }
    assert report["input"]["voxel_mm"] == [0.9, 0.9, 3.0]
    assert report["score"]["healthy_percentile"] in (0, 50, 100)
    assert report["score"]["num_healthy_validation_scans"] == 2
    assert report["threshold"]["rule"] == "healthy_fpr"
    assert report["threshold"]["source"].startswith("5 % false positives on 2 healthy")
    assert report["found"]["ml"] == one.found_ml
    voxels = _load(one.files["anomaly_mask"]).sum()
    assert report["found"]["ml_of_the_mask_file"] == pytest.approx(
        voxels * 0.9 * 0.9 * 3 / 1000, abs=1e-3
    )
    assert {(folder / name) for name in report["files"].values()} == {
        path for kind, path in one.files.items() if kind != "report"
    }
    for path in folder.glob("*.json"):
        assert str(folder.parent) not in path.read_text()
        assert str(run.workdir.parent) not in path.read_text()
    assert not list(folder.glob(".*"))
    shown = prediction.render([found["test-5"], one], folder)
    assert len([line for line in shown.splitlines() if line.startswith("test-6")]) == 1
    assert f"{one.found_ml:.2f} ml" in shown
    assert shown.endswith("For research only, not a medical device.")


def test_moved_without_its_store_and_on_8_devices_a_run_predicts_the_same(
    run: Run,
    predicted: tuple[pathlib.Path, dict[str, Prediction]],
    tmp_path: pathlib.Path,
    mesh8: jax.sharding.Mesh,
) -> None:
    folder, _ = predicted
    shutil.copytree(run.workdir, tmp_path / "elsewhere")
    config = smoke.get_config("variant=ae")
    config_lib.fill(config, workdir_lib.read_json(tmp_path / "elsewhere/config.json"))
    hidden = run.store.rename(tmp_path / "hidden")
    try:
        moved = dataclasses.replace(run, config=config, workdir=tmp_path / "elsewhere")
        scan = run.scans / "test-6_FLAIR.nii.gz"
        (one,) = moved.predict(scan, tmp_path / "out", mesh=mesh8)
    finally:
        hidden.rename(run.store)
    for kind in ("anomaly_map", "reconstruction_flair"):
        path = one.files[kind]
        np.testing.assert_allclose(_load(path), _load(folder / path.name), atol=2e-6)


def test_the_same_scan_gives_the_same_bytes_whatever_is_beside_it(
    run: Run,
    predicted: tuple[pathlib.Path, dict[str, Prediction]],
    tmp_path: pathlib.Path,
    mesh1: jax.sharding.Mesh,
) -> None:
    folder, _ = predicted
    (one,) = run.predict(run.scans / "val-4_FLAIR.nii.gz", tmp_path, mesh=mesh1)
    assert one.subject == "val-4"
    for path in one.files.values():
        assert path.read_bytes() == (folder / path.name).read_bytes()


def _refused(run: Run, source: pathlib.Path, output: pathlib.Path, **given) -> str:
    with pytest.raises((ValueError, RuntimeError)) as caught:
        run.predict(source, output, **given)
    assert not list(output.rglob("*")) or output == source
    return str(caught.value)


def test_fault_B6_all_unfit_scans_are_named_and_nothing_is_written(
    run: Run, tmp_path: pathlib.Path, mesh1: jax.sharding.Mesh
) -> None:
    folder = tmp_path / "in"
    heads.save(folder / "a_FLAIR.nii.gz", heads.head(1))
    whole = heads.save(folder / "b_FLAIR.nii.gz", heads.head(2)).read_bytes()
    (folder / "b_FLAIR.nii.gz").write_bytes(whole[:-100])
    heads.save(folder / "c_FLAIR.nii.gz", np.where(heads.head(3) > 0, np.nan, 0))
    heads.save(folder / "d_FLAIR.nii.gz", heads.head(4) + 1)  # not skull-stripped
    text = _refused(run, folder, tmp_path / "out", mesh=mesh1)
    assert text.startswith("Nothing was predicted. Checked 4 subjects")
    for name, what in (("b", "damaged or truncated"), ("c", "NaN"), ("d", "stripped")):
        assert f"{name}_FLAIR.nii.gz" in text
        assert what in text
    assert "a_FLAIR.nii.gz" not in text
    # What only the preparation finds: a brain larger than the grid.
    large = tmp_path / "large"
    for name in "ef":
        heads.save(
            large / f"{name}_FLAIR.nii.gz",
            heads.head(5),
            heads.AFFINE @ np.diag([2, 2, 2, 1]),
        )
    text = _refused(run, large, tmp_path / "out", mesh=mesh1)
    assert "2 of 2 scans cannot be prepared" in text
    assert "falls outside the tiny grid" in text


def test_another_modality_is_refused_unless_forced(
    run: Run, tmp_path: pathlib.Path, mesh1: jax.sharding.Mesh
) -> None:
    path = heads.save(tmp_path / "in" / "a_T1.nii.gz", heads.head(1))
    text = _refused(run, path, tmp_path / "out", mesh=mesh1)
    assert "there is t1, but the model was trained on flair" in text
    (one,) = run.predict(path, tmp_path / "out", mesh=mesh1, force=True)
    assert "by force" in one.warnings[0]
    assert "by force" in _report(one)["warnings"][0]
    assert "WARNING a: Predicted all the same" in prediction.render([one], tmp_path)


def test_fault_B34_intensities_unlike_the_training_are_a_loud_warning(
    run: Run, tmp_path: pathlib.Path, mesh1: jax.sharding.Mesh
) -> None:
    other = heads.head(1) ** 12  # another histogram
    path = heads.save(tmp_path / "in" / "a_FLAIR.nii.gz", other / other.max())
    (one,) = run.predict(path, tmp_path / "out", mesh=mesh1)
    assert "unlike those of the 3 training scans" in one.warnings[0]
    path = heads.save(tmp_path / "in" / "a_FLAIR.nii.gz", heads.head(1, blob=True) * 7)
    (one,) = run.predict(path, tmp_path / "out", mesh=mesh1)
    assert one.warnings == ()  # neither the unit nor a lesion is another modality


def test_fault_B15_a_model_that_gives_nan_writes_nothing(
    run: Run,
    tmp_path: pathlib.Path,
    mesh1: jax.sharding.Mesh,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scored = scoring.score_volumes

    def broken(*given: object) -> Iterator[scoring.VolumeArrays]:
        for arrays in scored(*given):
            bad = np.full_like(arrays.reconstruction, np.nan)
            yield arrays._replace(reconstruction=bad)

    monkeypatch.setattr(scoring, "score_volumes", broken)
    path = heads.save(tmp_path / "in" / "a_FLAIR.nii.gz", heads.head(1))
    text = _refused(run, path, tmp_path / "out", mesh=mesh1)
    assert "a: the model gives NaN" in text
    assert "reconstruction_flair" in text


def test_what_a_run_lacks_is_named_with_the_command_that_makes_it(
    run: Run, tmp_path: pathlib.Path, mesh1: jax.sharding.Mesh
) -> None:
    shutil.copytree(run.workdir, tmp_path / "run")
    bare = dataclasses.replace(run, workdir=tmp_path / "run")
    path = run.scans / "test-5_FLAIR.nii.gz"
    shutil.rmtree(tmp_path / "run" / "calibration")
    text = _refused(bare, path, tmp_path / "out", mesh=mesh1)
    assert "holds no threshold for smoke" in text
    assert f"run.py evaluate --workdir={tmp_path / 'run'} --step=8" in text
    profile = tmp_path / "run" / "data_profile.json"
    stored = json.loads(profile.read_text())
    profile.write_text(json.dumps({**stored, "recipe_hash": "another"}))
    assert "in another way" in _refused(bare, path, tmp_path / "out", mesh=mesh1)
    profile.unlink()
    text = _refused(bare, path, tmp_path / "out", mesh=mesh1)
    assert "does not say on which modality" in text
    data = tmp_path / "run" / "data_fingerprint.json"
    data.write_text(json.dumps({"recipe": {"name": "phantom"}}))
    text = _refused(bare, path, tmp_path / "out", mesh=mesh1, modality="flair")
    assert "cannot make of NIfTI files" in text


def test_the_threshold_is_that_of_the_sets_rule(
    run: Run, tmp_path: pathlib.Path, mesh1: jax.sharding.Mesh
) -> None:
    workdir = shutil.copytree(run.workdir, tmp_path / "run")
    config = smoke.get_config("variant=ae")
    config_lib.fill(config, workdir_lib.read_json(workdir / "config.json"))
    rule = config_lib.ThresholdRule.VALIDATED
    config.evaluation.sets = {"test": config_lib.EvaluationSet(threshold_from=rule)}

    def threshold() -> predictor.Threshold:
        return predictor.restore(config, workdir, None, mesh1).threshold

    healthy = threshold()
    assert healthy.rule == "healthy_fpr"
    assert "since there are no annotated abnormal" in healthy.source
    path = workdir / "calibration" / "8" / "behrendt.json"
    entry = calibration.load(path)["smoke"]
    assert healthy.value == entry.healthy_fpr[0.05]
    labelled = dataclasses.replace(entry, validated=0.25, num_abnormal=4)
    calibration.save(path, {"smoke": labelled}, calibration.load_origin(path))
    assert threshold() == predictor.Threshold(
        value=0.25,
        rule="validated",
        source="best pooled Dice on 4 abnormal validation scans",
    )


def test_under_another_protocol_a_scan_gets_what_that_evaluation_gives_it(
    run: Run, tmp_path: pathlib.Path, mesh1: jax.sharding.Mesh
) -> None:
    workdir = shutil.copytree(run.workdir, tmp_path / "run")
    config = copy.deepcopy(run.config)
    config.evaluation.sets = evaluation.sets_with(config, Protocol.BAUR)
    other = dataclasses.replace(run, config=config, workdir=workdir)
    path = run.scans / "test-6_FLAIR.nii.gz"
    text = _refused(other, path, tmp_path / "out", mesh=mesh1)
    assert f"run.py evaluate --workdir={workdir} --step=8 --protocol=baur" in text

    (results,) = evaluate.evaluate(config, workdir, mesh=mesh1, progress=False).values()
    (one,) = other.predict(path, tmp_path / "out", mesh=mesh1)
    report = _report(one)
    assert report["protocol"] == "baur"
    assert report["threshold"]["value"] == results["operating"]["threshold"]
    exported = workdir / "maps" / "test_baur" / "test-6_desc-anomaly_map.nii.gz"
    values = _load(one.files["anomaly_map"])
    np.testing.assert_array_equal(values, _load(exported))
    behrendt = _load(exported.parents[1] / "test" / exported.name)
    assert np.count_nonzero(values) < np.count_nonzero(behrendt)


def test_maps_are_not_written_among_the_scans(
    run: Run, tmp_path: pathlib.Path, mesh1: jax.sharding.Mesh
) -> None:
    heads.save(tmp_path / "a_FLAIR.nii.gz", heads.head(1))
    text = _refused(run, tmp_path, tmp_path / "maps", mesh=mesh1)
    assert "would be taken for scans" in text


def test_a_file_without_orientation_needs_the_users_word_and_keeps_its_header(
    run: Run, tmp_path: pathlib.Path, mesh1: jax.sharding.Mesh
) -> None:
    path = tmp_path / "in" / "a_FLAIR.nii"
    path.parent.mkdir()
    bare = nib.Nifti1Image(heads.head(1), None)
    bare.header["pixdim"][1:4] = (0.9, 0.9, 3.0)
    nib.save(bare, path)
    text = _refused(run, path, tmp_path / "out", mesh=mesh1)
    assert "--assume_orientation=RAS" in text
    (one,) = run.predict(path, tmp_path, mesh=mesh1, assume_orientation="LPS")
    header, _ = nifti.read_header(one.files["anomaly_map"])
    assert (int(header["sform_code"]), int(header["qform_code"])) == (0, 0)
    assert any("LPS was assumed" in note for note in _report(one)["input"]["notes"])


def test_a_scan_of_the_training_is_said_to_be_one(
    predicted: tuple[pathlib.Path, dict[str, Prediction]],
) -> None:
    _, found = predicted
    for name, one in found.items():
        said = any("trained on this very scan" in text for text in one.warnings)
        assert said == name.startswith("train-")


def test_a_new_prediction_replaces_the_report_first(
    run: Run,
    tmp_path: pathlib.Path,
    mesh1: jax.sharding.Mesh,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = run.scans / "test-5_FLAIR.nii.gz"
    (one,) = run.predict(path, tmp_path, mesh=mesh1)
    assert one.files["report"].is_file()
    full = OSError(28, "No space left on device")

    def save_no_more(*_: object) -> None:
        raise full

    monkeypatch.setattr(nib, "save", save_no_more)
    with pytest.raises(nifti.NiftiError, match="No space left"):
        run.predict(path, tmp_path, mesh=mesh1)
    assert not one.files["report"].exists()  # it would praise maps of another model
    assert not list(tmp_path.glob(".*"))
