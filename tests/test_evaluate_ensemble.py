"""An ensemble on the command line: trained, evaluated, compared."""

import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import run
from tests import runs, stores
from uad_jax import config as config_lib
from uad_jax import (
    ensembles,
    entries,
    evaluate,
    evaluate_ensemble,
    saved_run,
    train_ensemble,
    workdir,
)
from uad_jax.config import ExperimentConfig
from uad_jax.evaluation import EvaluationSet
from uad_jax.metrics import calibration
from uad_jax.metrics.postprocess import Protocol
from uad_jax.scoring import Scorer
from uad_jax.types import Scores, Volumes

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHORT = ("--config.method.intermediate_resolution=8", "--config.total_steps=4")


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "run.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return stores.tiny_store(tmp_path_factory.mktemp("ensemble"))


@pytest.fixture(scope="module")
def trained(
    store: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    """The directory of two VAEs, trained by a command."""
    directory = tmp_path_factory.mktemp("trained") / "ensemble"
    command = ("train", "--config=configs/smoke.py", f"--config.data.store={store}")
    done = _run(*command, *SHORT, f"--workdir={directory}", "--ensemble=seed:2")
    assert done.returncode == 0, done.stderr
    assert "Trained. Next: python run.py evaluate" in done.stdout
    return directory


@pytest.fixture(scope="module")
def said(trained: pathlib.Path) -> str:
    """What the evaluation of it prints."""
    done = _run("evaluate", f"--workdir={trained}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def _config(store: pathlib.Path, **options: Any) -> ExperimentConfig:
    config = runs.smoke_config(store, total_steps=4, **{"train.log_every": 2} | options)
    config.source = "configs/smoke.py"
    return config


def test_the_figures_of_the_members_are_their_own(
    said: str, trained: pathlib.Path, store: pathlib.Path
) -> None:
    found = json.loads((trained / evaluate_ensemble.FOLDER / "test.json").read_text())
    for seed in (0, 1):
        own = evaluate.figures_of_step(
            _config(store, seed=seed),
            trained / f"seed-{seed}",
            found["steps"][f"seed={seed}"],
        )
        ours = found["members"][f"seed={seed}"]
        for name in ("ap_pooled", "dice_healthy_fpr_volume_mean", "volume_auroc"):
            assert ours[name] == pytest.approx(own[f"test/{name}"], rel=1e-6)
    values = [one["ap_pooled"] for one in found["members"].values()]
    assert values[0] != values[1]
    assert found["mean"]["ap_pooled"] == pytest.approx(statistics.mean(values))
    spread = found["standard_deviation"]["ap_pooled"]
    assert spread == pytest.approx(statistics.stdev(values))
    for row in ("seed=0", "seed=1", "mean of the members", "standard deviation"):
        assert f"\n{row} " in said
    assert f"{found['mean']['ap_pooled']:.3f}" in said


def test_the_ensembles_own_map_has_results_and_thresholds_like_a_run(
    said: str, trained: pathlib.Path, store: pathlib.Path
) -> None:
    assert "\nensemble's own map " in said
    results = workdir.read_json(trained / "results" / "test.json")
    name = "smoke, mean of 2"
    assert results["run"]["name"] == name
    assert results["run"]["source"] == "ensemble"
    assert results["run"]["training"]["slices_seen"] == 4 * 8
    assert len(results["scorers"]) == 6  # and five baselines
    own = calibration.load(trained / "calibration" / "maps" / "behrendt.json")[name]
    for seed in (0, 1):
        (path,) = (trained / f"seed-{seed}" / "calibration").glob("*/behrendt.json")
        assert calibration.load(path)["smoke"].healthy_fpr != own.healthy_fpr
    assert (trained / "report.html").read_text().count("mean of 2") >= 1


def test_an_ensemble_stands_beside_its_members_in_a_comparison(
    said: str, trained: pathlib.Path, store: pathlib.Path
) -> None:
    evaluate.evaluate(_config(store, seed=1), trained / "seed-1", progress=False)
    one, two = entries.read([trained, trained / "seed-1"])
    assert one.scorer == "smoke, mean of 2"
    assert two.scorer == "smoke"
    figures = json.loads((trained / evaluate_ensemble.FOLDER / "test.json").read_text())
    assert two.metrics["ap_pooled"] == pytest.approx(
        figures["members"]["seed=1"]["ap_pooled"], rel=1e-6
    )


def test_other_modes_ask_for_a_member(
    trained: pathlib.Path, store: pathlib.Path
) -> None:
    with pytest.raises(workdir.WorkdirError, match=r"Name one of them: .*/MEMBER"):
        evaluate.evaluate(_config(store), trained, progress=False)
    with (
        pytest.raises(workdir.WorkdirError, match="seed-0, seed-1"),
        saved_run.opened(_config(store), trained),
    ):
        pass


def test_the_mean_is_over_maps_scores_and_reconstructions() -> None:
    def scorer(value: float) -> Scorer:
        def score(volumes: Volumes) -> Scores:
            return Scores(
                anomaly_map=jax.numpy.full((1, 2, 3, 3), value),
                slice_score=jax.numpy.full((1, 2), 2 * value),
                volume_score=jax.numpy.full((1,), 3 * value),
            )

        return Scorer("one", score, Protocol.BEHRENDT)

    both = evaluate_ensemble.mean_scorer(
        "both", [scorer(1.0), scorer(2.0), scorer(6.0)]
    )
    scores = both.score(None)  # type: ignore[arg-type]
    assert (both.name, both.protocol) == ("both", Protocol.BEHRENDT)
    np.testing.assert_allclose(scores.anomaly_map, 3.0)
    np.testing.assert_allclose(scores.slice_score, 6.0)
    np.testing.assert_allclose(scores.volume_score, 9.0)
    assert scores.reconstruction is None


def test_folds_share_no_threshold_because_each_validates_on_what_others_saw(
    tmp_path: pathlib.Path, mesh1: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stores.folded_store(tmp_path)
    config = _config(store)
    config.evaluation.sets = {
        "test": EvaluationSet(),
        "val": EvaluationSet(split="val"),
    }
    axis = ensembles.parse("fold:0,2", config)
    train_ensemble.train_ensemble(config, axis, tmp_path / "run", mesh=mesh1)
    by_set = evaluate_ensemble.evaluate_ensemble(
        config, axis, tmp_path / "run", mesh=mesh1, progress=False
    )
    found = by_set["test"]
    assert found["ensemble"]["operating"] == {"rule": None, "threshold": None}
    assert found["members"]["ensemble"]["ap_pooled"] > 0
    mean = found["members"]["mean"]
    assert "dice_healthy_fpr_volume_mean" in mean
    assert "dice_healthy_fpr_volume_mean" not in found["members"]["ensemble"]
    # The validation scans of fold 0 trained the member of fold 2, and the reverse.
    assert found["members"]["same_scans"]
    own = by_set["val"]
    assert own["ensemble"] is None
    assert not own["members"]["same_scans"]
    assert own["members"]["ensemble"] is None
    assert set(own["members"]["members"]) == {"fold=0", "fold=2"}
    assert own["members"]["mean"]["false_positive_ml_healthy_fpr_healthy_mean"] >= 0
    assert (tmp_path / "run/results/test.json").is_file()
    assert not (tmp_path / "run/results/val.json").exists()
    monkeypatch.setattr(
        evaluate_ensemble, "evaluate_ensemble", lambda *_, **__: {"val": own}
    )
    said = evaluate_ensemble.evaluated(config, axis, tmp_path / "run", None)
    assert "mean of the members" in said
    assert "ensemble's own map" not in said
    assert "measured on scans of its own" in said


def test_a_comparison_evaluates_an_ensemble_that_was_not(
    tmp_path: pathlib.Path, store: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axis = ensembles.parse("seed:2", _config(store))
    ensembles.write(tmp_path, axis)
    workdir.write_json(tmp_path / "config.json", config_lib.to_dict(_config(store)))
    asked = []
    monkeypatch.setattr(
        evaluate_ensemble,
        "evaluate_ensemble",
        lambda config, axis, folder: asked.append((config.name, axis, folder)),
    )
    assert run._evaluated(tmp_path, tmp_path / "maps") == tmp_path
    assert asked == [("smoke", axis, tmp_path)]
