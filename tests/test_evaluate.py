"""Evaluation on other stores than that of the training, and on odd ones."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from configs import smoke
from tests import runs, stores
from uad_jax import (
    calibrating,
    evaluate,
    evaluation,
    lineage,
    results,
    scoring,
    train,
)
from uad_jax import config as config_lib
from uad_jax import workdir as workdir_lib
from uad_jax.config import EvaluationSet, ExperimentConfig
from uad_jax.data import builder, sources
from uad_jax.metrics import calibration
from uad_jax.metrics.protocols import Protocol
from uad_jax.ops import residuals
from uad_jax.types import Scores, Volumes

TRAINED = ("t1", "t2")
TWO_STEPS = {"total_steps": 2, "train.eval_every": 2, "train.save_every": 2}
RECIPE = {"name": "phantom", "spacing": [2.0, 2.0, 2.0]}  # that of stores.tiny_store


def _scan(number: int, modalities: tuple[str, ...], **fields: object) -> builder.Source:
    grid = (6, 32, 32, len(modalities))
    lesion = fields.get("label") == "abnormal"
    return builder.Source(
        subject=f"scan-{number}",
        load=functools.partial(stores.phantom, number, grid, lesion=lesion),
        modalities=modalities,
        split="test",
        **fields,
    )


def _store(
    directory: pathlib.Path, *scans: builder.Source, **recipe: object
) -> pathlib.Path:
    key = {"recipe_hash": "1", "source_hash": "1"}
    recipe = RECIPE | recipe
    return builder.build_from(scans, directory, recipe=recipe, workers=0, **key)


def _opened(config: ExperimentConfig, **sets: EvaluationSet) -> ExperimentConfig:
    """The config once more, with other sets."""
    opened = smoke.get_config()
    config_lib.fill(opened, config_lib.to_dict(config))
    opened.evaluation.sets = sets
    return opened


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, mesh1: jax.sharding.Mesh
) -> tuple[ExperimentConfig, pathlib.Path]:
    """Two steps on two modalities."""
    folder = tmp_path_factory.mktemp("evaluate")
    store = stores.tiny_store(folder, grid=(6, 32, 32, 2), modalities=TRAINED)
    config = runs.smoke_config(store, **TWO_STEPS)
    train.train(config, folder / "run", mesh=mesh1, progress=False)
    return config, folder / "run"


def test_sets_of_other_stores(
    trained: tuple[ExperimentConfig, pathlib.Path],
    tmp_path: pathlib.Path,
    mesh1: jax.sharding.Mesh,
) -> None:
    config, workdir = trained
    wide = ("flair", "t2", "t1")
    sets = {
        "healthy": _store(tmp_path / "a", _scan(50, TRAINED)),
        "more_modalities": _store(tmp_path / "b", _scan(51, wide, label="abnormal")),
        "without_truth": _store(
            tmp_path / "c",
            _scan(52, TRAINED, label="abnormal", annotated=False),
            _scan(53, TRAINED),
        ),
    }
    config = _opened(
        config,
        **{name: EvaluationSet(store=str(store)) for name, store in sets.items()},
    )
    results = evaluate.evaluate(config, workdir, mesh=mesh1, progress=False)

    healthy = results["healthy"]
    assert healthy["verdict"].startswith("No annotated lesions: there are no")
    assert healthy["healthy_reconstruction"]["l1_brain"] > 0
    assert "ap_pooled" not in healthy["scorers"]["smoke"]

    single = results["more_modalities"]
    assert single["set"]["modalities"] == ["t1", "t2"]  # in the model's order
    assert 0 < single["scorers"]["smoke"]["ap_pooled"] <= 1
    assert single["verdict"].endswith("single cases, no ranking.")

    unknown = results["without_truth"]
    assert unknown["counts"]["volumes without annotation"] == 1
    assert "ap_pooled" not in unknown["scorers"]["smoke"]
    assert "slice_auroc" not in unknown["scorers"]["smoke"]
    assert unknown["scorers"]["smoke"]["volume_auroc"] in (0.0, 0.5, 1.0)

    for name in sets:
        text = (workdir / "results" / f"{name}.json").read_text()
        json.loads(text, parse_constant=pytest.fail)
        assert (workdir / f"report_{name}.html").is_file()
        calibration = workdir / "calibration" / "2" / f"behrendt_{name}.json"
        assert calibration.is_file()
    assert not (workdir / "report.html").exists()


def test_a_store_by_itself_is_a_set_named_after_its_folder() -> None:
    config = smoke.get_config()
    config.evaluation.sets = {"own": EvaluationSet(protocol=Protocol.NONE)}
    named = evaluation.sets_of_stores(config, ["stores/brats21/", "other/brats21"])
    none = Protocol.NONE
    assert named == {
        "brats21": EvaluationSet(store="stores/brats21/", protocol=none),
        "other_brats21": EvaluationSet(store="other/brats21", protocol=none),
    }
    assert set(evaluation.sets_of_stores(config, ["stores/own"])) == {"stores_own"}


def test_sets_of_another_protocol_get_names_of_their_own() -> None:
    config = smoke.get_config()
    baur = Protocol.BAUR
    assert evaluation.sets_with(config, baur) == {
        "test_baur": EvaluationSet(protocol=baur)
    }
    assert evaluation.sets_with(config, Protocol.BEHRENDT) == {"test": EvaluationSet()}
    config.evaluation.sets = {
        "own": EvaluationSet(split="val"),
        "other": EvaluationSet(store="s", protocol=baur),
    }
    assert evaluation.sets_with(config, baur) == {
        "own_baur": EvaluationSet(split="val", protocol=baur),
        "other": EvaluationSet(store="s", protocol=baur),
    }
    assert config.evaluation.sets["own"].protocol is Protocol.BEHRENDT


def test_a_run_called_like_a_baseline_is_refused(
    trained: tuple[ExperimentConfig, pathlib.Path], mesh1: jax.sharding.Mesh
) -> None:
    config, workdir = trained
    with pytest.MonkeyPatch.context() as patch:
        make = scoring.method_scorer
        patch.setattr(
            scoring, "method_scorer", lambda _, *given: make("atlas-z", *given)
        )
        with pytest.raises(ValueError, match=r"called 'atlas-z', like one of the base"):
            evaluate.evaluate(config, workdir, mesh=mesh1, progress=False)


def test_fault_B35_scans_that_moved_from_training_to_test_are_refused(
    trained: tuple[ExperimentConfig, pathlib.Path],
    tmp_path: pathlib.Path,
    mesh1: jax.sharding.Mesh,
) -> None:
    config, workdir = trained
    scans = stores.tiny_scans(grid=(6, 32, 32, 2), modalities=TRAINED)
    moved = [
        dataclasses.replace(scan, split="test") if scan.subject == "train-0" else scan
        for scan in scans
    ]
    again = _opened(config)
    again.data.store = str(_store(tmp_path / "moved", *moved))
    with pytest.raises(ValueError, match=r"1 of 4 scans .* trained on \(train-0\)"):
        evaluate.evaluate(again, workdir, mesh=mesh1, progress=False)


def test_fault_B35_validation_scans_are_not_tested_in_another_store(
    trained: tuple[ExperimentConfig, pathlib.Path],
    tmp_path: pathlib.Path,
    mesh1: jax.sharding.Mesh,
) -> None:
    config, workdir = trained
    # The phantom of val-0, under another name.
    store = _store(tmp_path / "a", _scan(3, TRAINED), _scan(54, TRAINED))
    config = _opened(config, again=EvaluationSet(store=str(store)))
    with pytest.raises(ValueError, match=r"validated on \(scan-3\)"):
        evaluate.evaluate(config, workdir, mesh=mesh1, progress=False)


def test_thresholds_follow_the_checkpoint_they_are_of(
    trained: tuple[ExperimentConfig, pathlib.Path],
    tmp_path: pathlib.Path,
    mesh1: jax.sharding.Mesh,
) -> None:
    config, workdir = trained
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    path = run / "calibration" / "2" / "behrendt.json"
    evaluate.evaluate(config, run, mesh=mesh1, progress=False)
    before = calibration.load(path)
    path.write_text("torn")  # is made again
    evaluate.evaluate(config, run, mesh=mesh1, progress=False)
    assert calibration.load(path) == before
    # Trained anew in the same place, from another seed.
    shutil.rmtree(run / "checkpoints")
    (run / "config.json").unlink()
    config = _opened(config)
    config.seed = 7
    train.train(config, run, mesh=mesh1, progress=False)
    assert evaluate.calibrate(config, run, progress=False)
    after = calibration.load(path)
    assert after["smoke"].healthy_fpr != before["smoke"].healthy_fpr


def test_volumes_of_unequal_depth_are_evaluated_without_the_atlas(
    tmp_path: pathlib.Path, mesh1: jax.sharding.Mesh
) -> None:
    scans = [
        dataclasses.replace(
            _scan(number, ("t1",)),
            split=split,
            load=functools.partial(stores.phantom, number, (depth, 32, 32, 1)),
        )
        for number, (split, depth) in enumerate(
            [("train", 6), ("train", 6), ("train", 5), ("val", 6), ("test", 4)]
        )
    ]
    config = runs.smoke_config(
        _store(tmp_path / "store", *scans), batch_size=4, **TWO_STEPS
    )
    train.train(config, tmp_path / "run", mesh=mesh1, progress=False)
    found = evaluate.evaluate(config, tmp_path / "run", mesh=mesh1, progress=False)
    assert "atlas-z" not in found["test"]["scorers"]
    assert len(found["test"]["scorers"]) == 5


def test_a_set_without_thresholds_stays_in_bounded_memory(
    trained: tuple[ExperimentConfig, pathlib.Path], mesh1: jax.sharding.Mesh
) -> None:
    config, workdir = trained
    exact = evaluate.evaluate(config, workdir, mesh=mesh1, progress=False)["test"]
    config = _opened(config, bounded=EvaluationSet())
    config.evaluation.exact_voxels = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrating, "calibrate", lambda *given, **options: {})
        found = evaluate.evaluate(config, workdir, mesh=mesh1, progress=False)
    found = found["bounded"]
    assert found["pooled"] == "histogram"
    for name, row in found["scorers"].items():
        expected = exact["scorers"][name]["ap_pooled"]
        assert row["ap_pooled"] == pytest.approx(expected, abs=0.01)
    assert found["operating"] == {"rule": None, "threshold": None}
    assert not (workdir / "results" / "bounded_found.npz").exists()


def test_an_evaluation_that_ends_half_way_leaves_no_mixed_results(
    trained: tuple[ExperimentConfig, pathlib.Path], mesh1: jax.sharding.Mesh
) -> None:
    config, workdir = trained
    config = _opened(config, torn=EvaluationSet())
    evaluate.evaluate(config, workdir, mesh=mesh1, progress=False)
    folder = workdir / "results"
    before = (
        (folder / "torn.json").read_bytes(),
        (folder / "torn_found.npz").read_bytes(),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.drawing, "draw", lambda *given, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate.evaluate(config, workdir, mesh=mesh1, progress=False)
    after = (
        (folder / "torn.json").read_bytes(),
        (folder / "torn_found.npz").read_bytes(),
    )
    assert after == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "write_table", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate.evaluate(config, workdir, mesh=mesh1, progress=False)
    assert not (folder / "torn.json").exists()


def test_nothing_is_tuned_on_what_it_is_measured_on(
    trained: tuple[ExperimentConfig, pathlib.Path], mesh1: jax.sharding.Mesh
) -> None:
    config, workdir = trained
    config = _opened(config, test=EvaluationSet(), val=EvaluationSet(split="val"))
    results = evaluate.evaluate(config, workdir, mesh=mesh1, progress=False)
    assert "dice_validated_volume_mean" in results["test"]["scorers"]["smoke"]
    assert "dice_validated_volume_mean" not in results["val"]["scorers"]["smoke"]


def test_fault_B35_scans_of_the_training_are_not_tested_in_another_store(
    trained: tuple[ExperimentConfig, pathlib.Path],
    tmp_path: pathlib.Path,
    mesh1: jax.sharding.Mesh,
) -> None:
    config, workdir = trained
    # The phantom of train-0, under another name.
    store = _store(tmp_path / "a", _scan(0, TRAINED), _scan(54, TRAINED))
    config = _opened(config, again=EvaluationSet(store=str(store)))
    with pytest.raises(ValueError, match=r"1 of 2 scans .* trained on \(scan-0\)"):
        evaluate.evaluate(config, workdir, mesh=mesh1, progress=False)


def test_fault_B35_scans_of_an_earlier_stage_are_not_tested(
    trained: tuple[ExperimentConfig, pathlib.Path],
    tmp_path: pathlib.Path,
    mesh1: jax.sharding.Mesh,
) -> None:
    config, workdir = trained
    second = pathlib.Path(shutil.copytree(workdir, tmp_path / "second"))
    store = _store(tmp_path / "store", _scan(54, TRAINED))
    (scan,) = sources.Store.open(str(store)).volumes
    first = tmp_path / "first"
    first.mkdir()
    note = {"licences": [], "subjects": {"under another name": scan.content}}
    workdir_lib.write_json(first / workdir_lib.FINGERPRINT, note)
    lineage.write(second, [first])
    config = _opened(config, again=EvaluationSet(store=str(store)))
    with pytest.raises(ValueError, match=r"1 of 1 scans .* trained on \(scan-54\)"):
        evaluate.evaluate(config, second, mesh=mesh1, progress=False)


def test_another_method_data_or_recipe_names_both_values(
    trained: tuple[ExperimentConfig, pathlib.Path],
    tmp_path: pathlib.Path,
    mesh1: jax.sharding.Mesh,
) -> None:
    config, workdir = trained

    def refused(config: ExperimentConfig) -> str:
        with pytest.raises((ValueError, workdir_lib.WorkdirError)) as caught:
            evaluate.evaluate(config, workdir, mesh=mesh1, progress=False)
        return str(caught.value)

    other = _opened(config)
    other.method.residual = residuals.Residual.POSITIVE
    assert 'method.residual: "abs" -> "positive"' in refused(other)
    other = _opened(config)
    other.data.modalities = "t2,t1"
    assert 'data.modalities: "" -> "t2,t1"' in refused(other)
    store = _store(tmp_path / "a", _scan(55, TRAINED), name="other")
    other = _opened(config)
    other.data.store = str(store)
    assert 'name: "phantom" -> "other"' in refused(other)
    assert "phantom" in refused(_opened(config, x=EvaluationSet(store=str(store))))


def test_several_processes_are_told_to_evaluate_in_one(
    trained: tuple[ExperimentConfig, pathlib.Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, workdir = trained
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert not evaluate.calibrate(config, workdir)  # training ends well
    with pytest.raises(ValueError, match=r"job has 2.*without --distributed"):
        evaluate.evaluate(config, workdir)


def test_scores_below_zero_without_reconstruction_are_measured_alike(
    trained: tuple[ExperimentConfig, pathlib.Path],
    mesh1: jax.sharding.Mesh,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, workdir = trained
    config = _opened(config, plain=EvaluationSet())
    expected = evaluate.evaluate(config, workdir, mesh=mesh1, progress=False)["plain"]
    wrapped = scoring.method_scorer

    def lowered(*given: object) -> scoring.Scorer:
        scorer = wrapped(*given)

        def score(volumes: Volumes) -> Scores:
            scores = scorer.score(volumes)
            lower = scores.anomaly_map - 5.0
            return dataclasses.replace(scores, anomaly_map=lower, reconstruction=None)

        return scorer._replace(score=score)

    monkeypatch.setattr(scoring, "method_scorer", lowered)
    config = _opened(config, lowered=EvaluationSet())
    found = evaluate.evaluate(config, workdir, mesh=mesh1, progress=False)["lowered"]
    row = expected["scorers"]["smoke"]
    for name in ("ap_pooled", "auroc_pooled", "dice_healthy_fpr_volume_mean"):
        # float32 ties a few scores that differed nearer to 0
        assert found["scorers"]["smoke"][name] == pytest.approx(row[name], abs=0.01)
    assert expected["healthy_reconstruction"]
    assert not found["healthy_reconstruction"]
    assert (workdir / "report_lowered.html").is_file()


def _picture(number: int, *, lesion: bool = False) -> stores.Prepared:
    """A colour picture, all of it "brain"."""
    scan = stores.phantom(number, (1, 32, 32, 3), lesion=lesion)
    codes = np.rint(255 * np.clip(scan.image, 0, 1)).astype(np.uint8)
    return dataclasses.replace(scan, image=codes, brain=np.ones_like(scan.brain))


def test_colour_pictures_are_volumes_of_one_slice(
    tmp_path: pathlib.Path, mesh1: jax.sharding.Mesh
) -> None:
    splits = ["train"] * 8 + ["val"] * 2 + ["test"] * 2
    scans = [
        dataclasses.replace(
            _scan(number, ("red", "green", "blue")),
            split=split,
            label="abnormal" if (lesion := number == 11) else "healthy",
            load=functools.partial(_picture, number, lesion=lesion),
        )
        for number, split in enumerate(splits)
    ]
    config = runs.smoke_config(_store(tmp_path / "store", *scans), **TWO_STEPS)
    config.evaluation.export_maps = True
    train.train(config, tmp_path / "run", mesh=mesh1, progress=False)
    results = evaluate.evaluate(config, tmp_path / "run", mesh=mesh1, progress=False)
    row = results["test"]["scorers"]["smoke"]
    assert 0 < row["ap_pooled"] <= 1
    assert row["slice_auroc"] == row["volume_auroc"]  # a picture is its one slice
    maps = tmp_path / "run" / "maps" / "test"
    assert len(list(maps.glob("*_desc-anomaly_map.nii.gz"))) == 2
    assert len(list(maps.glob("*_space-model_*"))) == 4  # validation scans too
