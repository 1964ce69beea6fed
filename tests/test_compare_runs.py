"""Real runs and real maps are compared from what evaluation writes."""

import csv
import pathlib

import jax
import pytest

from tests import runs, stores
from uad_jax import by_step, compare, entries, evaluate, evaluate_maps, train
from uad_jax.config import EvaluationConfig

STEPS = {"total_steps": 2, "train.eval_every": 1, "train.save_every": 1}


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, mesh1: jax.sharding.Mesh
) -> list[pathlib.Path]:
    """Two seeds of one run, and the first one's maps as if of another tool."""
    folder = tmp_path_factory.mktemp("compare_runs")
    store = stores.tiny_store(folder, {"train": 2, "val": 3, "test": 4})
    for seed in (0, 1):
        config = runs.smoke_config(store, seed=seed, **STEPS)
        config.evaluation.bootstrap_samples = 20
        config.evaluation.export_maps = seed == 0
        workdir = folder / f"seed{seed}"
        train.train(config, workdir, mesh=mesh1, progress=False)
        evaluate.evaluate(config, workdir, mesh=mesh1, progress=False)
        if seed == 0:
            by_step.evaluate_steps(config, workdir, mesh=mesh1, progress=False)
    evaluate_maps.evaluate_maps(
        folder / "seed0" / "maps" / "test",
        store,
        folder / "maps",
        mesh=mesh1,
        settings=EvaluationConfig(bootstrap_samples=20),
        progress=False,
    )
    return [folder / name for name in ("seed0", "seed1", "maps")]


def test_runs_and_maps_stand_in_one_table(
    folders: list[pathlib.Path], tmp_path: pathlib.Path
) -> None:
    result = compare.compare(folders, tmp_path, num_samples=20, num_rounds=20)
    assert list(result["runs"]) == ["seed0", "seed1", "maps"]
    own, _, theirs = (run["metrics"] for run in result["runs"].values())
    assert theirs["ap_pooled"] == own["ap_pooled"]
    assert result["groups"]["smoke (2 runs)"]["members"] == ["seed0", "seed1"]
    assert len(result["baselines"]) == 5
    assert result["runs"]["seed0"]["source"] == "checkpoint"
    assert result["runs"]["maps"]["source"] == "maps"
    # Two lesion volumes: single cases, no tests.
    assert {test["num_patients"] for test in result["pairs"]} == {2}
    assert len(result["cases"]["ap"]) == 2
    assert compare.render(result)


def test_the_pictures_come_from_store_and_segmentations(
    folders: list[pathlib.Path], tmp_path: pathlib.Path
) -> None:
    result = compare.compare(folders, tmp_path, num_samples=20, num_rounds=20)
    assert {one["subject"] for one in result["panels"]} == {"test-1", "test-3"}
    assert not [note for note in result["notes"] if "picture" in note]
    page = (tmp_path / "compare.html").read_text()
    assert str(folders[0].parent) not in page
    found = [entry.found for entry in entries.read(folders)]
    assert all(one is not None and len(one) == 4 for one in found)


def test_curves_follow_the_checkpoints(
    folders: list[pathlib.Path], tmp_path: pathlib.Path
) -> None:
    result = compare.compare(folders, tmp_path, num_samples=20, num_rounds=20)
    curves = result["curves"]
    assert [point["step"] for point in curves["seed0"]["points"]] == [1, 2]
    assert [line["step"] for line in curves["seed0"]["validation"]] == [1, 2]
    assert len(curves["seed1"]["points"]) == 1
    assert curves["maps"]["points"][0]["step"] is None
    with (tmp_path / "compare.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3 + 1 + 5
