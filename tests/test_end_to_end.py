"""The whole walk on 8 virtual devices: store, training, evaluation, report."""

import copy
import csv
import json
import math
import pathlib
import re
import shutil
from typing import Any

import jax
import nibabel
import numpy as np
import pytest

from configs import smoke
from tests import stores
from uad_jax import config as config_lib
from uad_jax import evaluate, prediction, rescoring, train
from uad_jax import mesh as mesh_lib
from uad_jax.anomaly_score_config import Score
from uad_jax.data import sources
from uad_jax.metrics import calibration


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[config_lib.ExperimentConfig, pathlib.Path]:
    """A run of 8 steps on a tiny store, on 8 devices."""
    folder = tmp_path_factory.mktemp("end_to_end")
    config = smoke.get_config()
    config.data.store = str(stores.tiny_store(folder))
    config.evaluation.export_maps = True
    result = train.train(config, folder / "run", progress=False)
    assert result.stopped == "done"
    return config, folder / "run"


@pytest.fixture(scope="module")
def evaluated(
    trained: tuple[config_lib.ExperimentConfig, pathlib.Path],
) -> dict:
    config, workdir = trained
    return evaluate.evaluate(config, workdir, progress=False)["test"]


def test_results_hold_the_model_and_five_baselines(
    trained: tuple[config_lib.ExperimentConfig, pathlib.Path], evaluated: dict
) -> None:
    _, workdir = trained
    text = (workdir / "results" / "test.json").read_text()
    stored = json.loads(text, parse_constant=pytest.fail)  # NaN is not JSON
    assert len(stored["scorers"]) == 6
    assert stored["set"]["num_volumes"] == 3
    assert stored["set"]["num_abnormal"] == 1
    for row in evaluated["scorers"].values():
        assert 0 < row["ap_pooled"] <= 1
    # The phantom's lesion is bright: thresholding solves it, which a test may know.
    assert evaluated["scorers"]["raw intensity"]["auroc_pooled"] > 0.8
    assert evaluated["healthy_reconstruction"]["l1_brain"] > 0
    assert str(workdir.parent) not in text  # no absolute path
    assert stored["run"]["config"]["data"]["store"] == "store"


def test_figures_during_training_are_those_of_the_evaluation(
    trained: tuple[config_lib.ExperimentConfig, pathlib.Path], evaluated: dict
) -> None:
    config, workdir = trained
    step = evaluated["run"]["step"]
    found = evaluate.figures_of_step(config, workdir, step)
    assert found["test/ap_pooled"] == evaluated["scorers"]["smoke"]["ap_pooled"]
    assert all(math.isfinite(value) for value in found.values())


def test_subject_table_has_a_row_per_volume_and_scorer(
    trained: tuple[config_lib.ExperimentConfig, pathlib.Path], evaluated: dict
) -> None:
    del evaluated
    path = trained[1] / "results" / "test_subjects.csv"
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 6
    assert {row["subject"] for row in rows} == {"test-0", "test-1", "test-2"}


def test_calibration_is_stored_beside_the_checkpoint(
    trained: tuple[config_lib.ExperimentConfig, pathlib.Path], evaluated: dict
) -> None:
    step = evaluated["run"]["step"]
    entries = calibration.load(trained[1] / "calibration" / str(step) / "behrendt.json")
    assert set(entries["smoke"].healthy_fpr) == {0.01, 0.05, 0.1}
    assert entries["smoke"].num_healthy == 1


def test_thresholds_are_fixed_at_the_end_of_training_too(
    trained: tuple[config_lib.ExperimentConfig, pathlib.Path],
    evaluated: dict,
    tmp_path: pathlib.Path,
) -> None:
    config, workdir = trained
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "calibration")
    assert evaluate.calibrate(config, tmp_path / "run", progress=False)
    path = f"calibration/{evaluated['run']['step']}/behrendt.json"
    again = calibration.load(tmp_path / "run" / path)
    assert again["smoke"] == calibration.load(workdir / path)["smoke"]


def test_maps_lie_on_the_grid_of_the_scan(
    trained: tuple[config_lib.ExperimentConfig, pathlib.Path], evaluated: dict
) -> None:
    del evaluated
    config, workdir = trained
    store = sources.Store.open(pathlib.Path(config.data.store))
    info = next(one for one in store.volumes if one.subject == "test-1")
    image = nibabel.load(workdir / "maps/test/test-1_desc-anomaly_map.nii.gz")
    assert image.shape == info.geometry.native_shape
    np.testing.assert_allclose(image.affine, info.geometry.native_affine)
    assert image.get_data_dtype() == np.float32


def test_every_map_says_in_its_header_that_it_is_for_research_only(
    trained: tuple[config_lib.ExperimentConfig, pathlib.Path], evaluated: dict
) -> None:
    del evaluated
    paths = sorted((trained[1] / "maps").rglob("*.nii.gz"))
    assert len(paths) == 2 * 3 + 2  # two of each test scan, one of each validation scan
    for path in paths:
        said = nibabel.load(path).header["descrip"].item().decode()
        processed = "desc-anomaly" in path.name
        protocol = "; protocol behrendt" if processed else ""
        assert said == prediction._IN_HEADER + protocol, path.name


def test_report_is_one_file_that_loads_nothing(
    trained: tuple[config_lib.ExperimentConfig, pathlib.Path], evaluated: dict
) -> None:
    del evaluated
    page = (trained[1] / "report.html").read_text(encoding="utf-8")
    assert "For research only" in page
    assert page.count("data:image/png;base64,") >= 5
    assert "test-1" in page  # a single case
    assert not re.findall(r'(?:src|href)="(?!data:)[^"]+"', page)
    assert str(trained[1].parent) not in page


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Dotted name -> number, text or None of plain JSON types."""
    if isinstance(value, dict):
        parts = [(f"{name}.{key}", item) for key, item in value.items()]
    elif isinstance(value, list):
        parts = [(f"{name}[{place}]", item) for place, item in enumerate(value)]
    else:
        return {name: value}
    return {
        key: leaf for part, item in parts for key, leaf in _leaves(item, part).items()
    }


@pytest.fixture(scope="module")
def many(
    trained: tuple[config_lib.ExperimentConfig, pathlib.Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> config_lib.ExperimentConfig:
    """The run's config with a set of five patients with a lesion: it has intervals."""
    folder = tmp_path_factory.mktemp("many")
    opened = smoke.get_config()
    config_lib.fill(opened, config_lib.to_dict(trained[0]))
    # After five scans, so that none is of the training.
    store = stores.tiny_store(folder, {"train": 5, "test": 10})
    opened.evaluation.sets = {"many": config_lib.EvaluationSet(store=str(store))}
    return opened


@pytest.mark.parametrize("exact_voxels", [10**9, 0])
def test_the_set_knows_its_true_prevalence(
    trained: tuple[config_lib.ExperimentConfig, pathlib.Path],
    many: config_lib.ExperimentConfig,
    mesh8: jax.sharding.Mesh,
    exact_voxels: int,
) -> None:
    many = copy.deepcopy(many)
    many.evaluation.exact_voxels = exact_voxels
    found = evaluate.evaluate(many, trained[1], mesh=mesh8, progress=False)["many"]
    assert found["pooled"] == ("exact" if exact_voxels else "histogram")
    scans = [stores.phantom(5 + n, lesion=True) for n in range(1, 10, 2)]
    counts = np.array([(one.lesion.sum(), one.brain.sum()) for one in scans])
    lesion, brain = counts.T
    facts = found["set"]
    assert facts["prevalence_pooled"] == pytest.approx(lesion.sum() / brain.sum())
    assert facts["prevalence_volume_mean"] == pytest.approx(np.mean(lesion / brain))
    constant = found["scorers"]["constant map"]
    assert constant["ap_pooled"] > facts["prevalence_pooled"]
    assert found["unprocessed"]["constant map"]["ap_pooled"] == pytest.approx(
        facts["prevalence_pooled"]
    )


def test_fault_D8_an_evaluation_on_eight_devices_has_the_figures_of_one(
    trained: tuple[config_lib.ExperimentConfig, pathlib.Path],
    many: config_lib.ExperimentConfig,
    mesh1: jax.sharding.Mesh,
    mesh8: jax.sharding.Mesh,
) -> None:
    one, eight = (
        evaluate.evaluate(many, trained[1], mesh=mesh, progress=False)["many"]
        for mesh in (mesh1, mesh8)
    )
    figures = one["scorers"]["smoke"]
    assert figures["dice_healthy_fpr_pooled"] > 0
    assert figures["lesion_recall_healthy_fpr"] > 0
    assert len(figures["ap_volume_mean_interval"]) == 2
    assert len(figures["dice_healthy_fpr_volume_mean_interval"]) == 2
    assert len(one["comparison"]["interval"]) == 2
    for part in ("scorers", "unprocessed", "comparison", "counts"):
        expected, found = _leaves(one[part]), _leaves(eight[part])
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            same = value
            if isinstance(value, float):
                same = pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True)
            assert found[name] == same, f"{part}{name}"


def test_evaluation_leaves_the_run_as_it_was(
    trained: tuple[config_lib.ExperimentConfig, pathlib.Path], evaluated: dict
) -> None:
    del evaluated
    config, workdir = trained

    def checkpoints() -> dict[str, int]:
        folder = workdir / "checkpoints"
        return {
            str(path.relative_to(folder)): path.stat().st_mtime_ns
            for path in folder.rglob("*")
        }

    before = checkpoints()
    evaluate.evaluate(config, workdir, progress=False)
    assert checkpoints() == before


def _files(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_run_is_scored_anew_with_the_weight_that_healthy_scans_choose(
    trained: tuple[config_lib.ExperimentConfig, pathlib.Path],
    evaluated: dict,
    tmp_path: pathlib.Path,
) -> None:
    config, workdir = trained
    before, output = _files(workdir), tmp_path / "restored"
    asked: Any = copy.deepcopy(config)
    asked.method.score.kind = Score.RESTORATION
    asked.method.score.restoration.num_steps = 2
    weights = (500.0, 0.5)
    rescoring.rescore(asked, workdir, output, tv_weights=weights, progress=False)
    stored = json.loads((output / "config.json").read_text())
    config_lib.fill(asked, stored)  # what the command line does
    (found,) = evaluate.evaluate(asked, output, progress=False).values()

    chosen = json.loads((output / "tv_weight.json").read_text())
    assert found["run"]["tv_weight"] == chosen
    assert chosen["candidates"] == list(weights)
    assert (chosen["scans"], chosen["step"]) == (1, evaluated["run"]["step"])
    best = int(np.argmin(chosen["mean_changes"]))
    assert asked.method.score.restoration.tv_weights == (weights[best],)
    # The residual is absolute: its mean on the healthy scan is the mean change.
    path = output / f"calibration/{chosen['step']}/behrendt.json"
    (score,) = calibration.load(path)["smoke"].healthy_volume_scores
    assert min(chosen["mean_changes"]) == pytest.approx(score, rel=1e-3)
    page = (output / "report.html").read_text(encoding="utf-8")
    assert f"{weights[best]:g}, with which 1 healthy validation scans" in page

    results = json.loads((output / "results" / "test.json").read_text())
    old, new = (
        {name: row["ap_pooled"] for name, row in one["scorers"].items()}
        for one in (evaluated, results)
    )
    assert {name for name in old if old[name] != new[name]} == {"smoke"}
    assert _files(workdir) == before


def test_another_modality_is_refused_with_both_names(
    trained: tuple[config_lib.ExperimentConfig, pathlib.Path],
    tmp_path: pathlib.Path,
    mesh8: jax.sharding.Mesh,
) -> None:
    config, workdir = trained
    other = stores.tiny_store(tmp_path, modalities=("t2",))
    opened = smoke.get_config()
    config_lib.fill(opened, config_lib.to_dict(config))
    opened.evaluation.sets = {"t2": config_lib.EvaluationSet(store=str(other))}
    with pytest.raises(ValueError, match=r"(?s)modalities.*t2.*t1"):
        evaluate.evaluate(opened, workdir, mesh=mesh8, progress=False)


def test_make_mesh_uses_all_virtual_devices() -> None:
    assert mesh_lib.make_mesh().size == 8
