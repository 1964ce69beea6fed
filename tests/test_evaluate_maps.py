"""Maps made elsewhere are evaluated exactly like a method of our own."""

import copy
import csv
import dataclasses
import functools
import json
import logging
import math
import pathlib
import shutil
from typing import Any

import jax
import nibabel as nib
import numpy as np
import pytest

from tests import runs, stores
from uad_jax import compare, entries, evaluate, evaluate_maps, evaluation, train
from uad_jax.config import (
    EvaluationConfig,
    EvaluationSet,
    ExperimentConfig,
    ThresholdRule,
)
from uad_jax.data import builder
from uad_jax.data.sources import LESION_BIT, Store
from uad_jax.metrics.protocols import Protocol

SPLITS = {"train": 3, "val": 4, "test": 6}
SETTINGS = EvaluationConfig(bootstrap_samples=50)


@pytest.fixture(scope="module")
def own(
    tmp_path_factory: pytest.TempPathFactory, mesh1: jax.sharding.Mesh
) -> tuple[ExperimentConfig, pathlib.Path, dict[str, Any]]:
    """A run with exported maps, and its results."""
    folder = tmp_path_factory.mktemp("evaluate_maps")
    config = runs.smoke_config(stores.tiny_store(folder, SPLITS))
    config.evaluation.bootstrap_samples = SETTINGS.bootstrap_samples
    config.evaluation.export_maps = True
    train.train(config, folder / "run", mesh=mesh1, progress=False)
    results = evaluate.evaluate(config, folder / "run", mesh=mesh1, progress=False)
    return config, folder / "run", results["test"]


def _evaluate(
    folder: pathlib.Path,
    store: str,
    workdir: pathlib.Path,
    mesh: jax.sharding.Mesh,
    **options: Any,
) -> dict[str, Any]:
    return evaluate_maps.evaluate_maps(
        folder,
        pathlib.Path(store),
        workdir,
        mesh=mesh,
        settings=SETTINGS,
        progress=False,
        **options,
    )["test"]


def _rows(workdir: pathlib.Path) -> list[dict[str, str]]:
    with (workdir / "results" / "test_subjects.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_own_exported_maps_give_identical_metrics(
    own: tuple[ExperimentConfig, pathlib.Path, dict[str, Any]],
    tmp_path: pathlib.Path,
    mesh8: jax.sharding.Mesh,
) -> None:
    config, run, expected = own
    found = _evaluate(
        run / "maps" / "test", config.data.store, tmp_path, mesh8, name="smoke"
    )
    for key in ("scorers", "unprocessed", "cases", "comparison", "operating"):
        assert json.dumps(found[key]) == json.dumps(expected[key]), key
    assert found["thresholds"] == expected["thresholds"]
    assert found["set"]["fingerprint"] == expected["set"]["fingerprint"]
    without = ("l1_brain", "l1_box", "ssim", "psnr")  # a map is no reconstruction
    for row, other in zip(_rows(tmp_path), _rows(run), strict=True):
        for name in row.keys() - set(without):
            assert row[name] == other[name], (row["subject"], name)
    assert (tmp_path / "report.html").stat().st_size > 0


def test_maps_under_baur_are_positive_and_are_scored_alike_again(
    own: tuple[ExperimentConfig, pathlib.Path, dict[str, Any]],
    tmp_path: pathlib.Path,
    mesh8: jax.sharding.Mesh,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config, run, behrendt = own
    config = copy.deepcopy(config)
    config.evaluation.sets = evaluation.sets_with(config, Protocol.BAUR)
    before = (run / "results" / "test.json").read_bytes()
    (results,) = evaluate.evaluate(config, run, mesh=mesh8, progress=False).items()
    name, expected = results
    assert name == "test_baur"
    assert (run / "results" / "test.json").read_bytes() == before
    assert (run / "calibration" / str(expected["run"]["step"]) / "baur.json").is_file()
    facts = expected["set"]
    assert facts["protocol"] == "baur"
    assert facts["steps"].startswith("only what is brighter than the reconstruction")
    assert "eroded by 3 pixels" in facts["steps"]  # 12 of 128, at 32
    assert facts["protocol_note"] == ""
    assert facts["fingerprint"] != behrendt["set"]["fingerprint"]
    for figure in ("ap_volume_mean", "ap_pooled"):
        assert (
            expected["scorers"]["smoke"][figure] != behrendt["scorers"]["smoke"][figure]
        )
    caplog.clear()
    found = evaluate_maps.evaluate_maps(
        run / "maps" / name,
        pathlib.Path(config.data.store),
        tmp_path,
        name="smoke",
        set_name=name,
        evaluation_set=EvaluationSet(protocol=Protocol.BAUR),
        mesh=mesh8,
        settings=SETTINGS,
        progress=False,
    )[name]
    for key in ("scorers", "unprocessed", "cases", "comparison", "operating"):
        assert json.dumps(found[key]) == json.dumps(expected[key]), key
    assert "smoke gives no reconstruction" in found["set"]["protocol_note"]
    assert "smoke gives no reconstruction" in caplog.text
    header = nib.load(sorted((run / "maps" / name).glob("*desc-anomaly_map*"))[0])
    assert b"protocol baur" in bytes(header.header["descrip"])


def test_maps_of_test_scans_alone_give_the_ceiling_and_no_threshold(
    own: tuple[ExperimentConfig, pathlib.Path, dict[str, Any]],
    tmp_path: pathlib.Path,
    mesh1: jax.sharding.Mesh,
) -> None:
    store = Store.open(own[0].data.store)
    folder = tmp_path / "oracle"
    folder.mkdir()
    for info in store.volumes:
        if info.split != "test":
            continue
        _, plane = store.read_volume(info.uid)
        lesion = ((plane & LESION_BIT) > 0).astype(np.uint8).transpose(1, 2, 0)
        image = nib.Nifti1Image(lesion, info.geometry.native_affine)
        nib.save(image, folder / f"{info.subject}_tool.nii.gz")
    found = _evaluate(
        folder,
        own[0].data.store,
        tmp_path / "out",
        mesh1,
        evaluation_set=EvaluationSet(protocol=Protocol.NONE),
    )
    oracle = found["scorers"]["oracle"]
    for metric in ("ap_pooled", "auroc_pooled", "dice_ceiling_pooled", "volume_auroc"):
        assert oracle[metric] == 1.0
    assert not [name for name in oracle if "healthy_fpr" in name or "valid" in name]
    assert found["operating"] == {"rule": None, "threshold": None}


def _store(directory: pathlib.Path, **splits: tuple[int, str]) -> pathlib.Path:
    """A store of split -> number and label; no scan is in that of the run."""
    scans = [
        builder.Source(
            subject=f"study-{split}-{number}",
            load=functools.partial(
                stores.phantom, 100 * place + number + 50, lesion=label == "abnormal"
            ),
            modalities=("t1",),
            label=label,
            split=split,
        )
        for place, (split, (count, label)) in enumerate(splits.items())
        for number in range(count)
    ]
    return builder.build_from(
        scans,
        directory,
        recipe={"name": "phantom", "spacing": [2.0, 2.0, 2.0]},
        recipe_hash="phantom-1",
        source_hash=str(splits),
        workers=0,
    )


def _noise(folder: pathlib.Path, store: pathlib.Path) -> pathlib.Path:
    """Maps of noise, of every scan of a store."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for info in Store.open(store).volumes:
        noise = rng.random(info.geometry.native_shape, dtype=np.float32)
        image = nib.Nifti1Image(noise, info.geometry.native_affine)
        nib.save(image, folder / f"{info.subject}.nii.gz")
    return folder


def test_a_run_and_its_maps_are_compared_on_a_store_of_lesions_alone(
    own: tuple[ExperimentConfig, pathlib.Path, dict[str, Any]],
    tmp_path: pathlib.Path,
    mesh1: jax.sharding.Mesh,
) -> None:
    config, workdir, _ = own
    run, theirs = tmp_path / "run", tmp_path / "theirs"
    shutil.copytree(workdir, run)
    study = _store(tmp_path / "study", val=(2, "abnormal"), test=(3, "abnormal"))
    config = dataclasses.replace(
        config,
        evaluation=dataclasses.replace(
            config.evaluation, sets=evaluation.sets_of_stores(config, [str(study)])
        ),
    )
    ours = evaluate.evaluate(config, run, mesh=mesh1, progress=False)["study"]
    found = _evaluate(run / "maps" / "study", str(study), theirs, mesh1, name="smoke")

    # The run has healthy thresholds of its training store, the maps have none.
    mine, other = ours["scorers"]["smoke"], found["scorers"]["smoke"]
    validated = [name for name in other if "_validated" in name]
    assert "dice_validated_volume_mean" in validated
    assert {name: mine[name] for name in validated} == {
        name: other[name] for name in validated
    }
    assert math.isfinite(other["dice_validated_pooled"])
    assert any("healthy_fpr" in name for name in mine)
    assert not any("healthy_fpr" in name for name in other)
    assert "dice_validated_volume_mean" in found["scorers"]["raw intensity"]
    assert found["thresholds"] == [ours["thresholds"][-1]]
    assert [row["rule"] for row in found["thresholds"]] == ["validated"]
    assert ours["operating"]["healthy_fpr"] == 0.05
    assert "note" not in ours["operating"]
    assert found["operating"]["rule"] == "validated"
    assert found["operating"]["threshold"] == found["thresholds"][0]["value"]
    assert "no healthy validation scans" in found["operating"]["note"]
    assert "healthy_fpr" not in found["operating"]
    assert found["missing_baselines"] == {
        "atlas-z": "fewer than 2 healthy training scans"
    }
    assert ours["missing_baselines"] == {}
    for row in _rows(theirs):
        assert row["dice_validated"]
        assert not any("healthy_fpr" in name for name in row)

    # The run calls the set "study", the maps "test".
    first, second = entries.read([run, theirs])
    assert first.results["set"]["name"] == "study"
    assert second.results["set"]["name"] == "test"
    assert first.subjects.keys() == second.subjects.keys()
    both = compare.compare(
        [run, theirs], tmp_path / "both", num_samples=50, num_rounds=50
    )
    assert set(both["runs"]) == {"run", "theirs"}
    assert any("Operating rules differ" in note for note in both["notes"])


def test_healthy_scans_without_healthy_validation_have_no_percentile(
    tmp_path: pathlib.Path, mesh1: jax.sharding.Mesh
) -> None:
    store = _store(tmp_path / "store", val=(2, "abnormal"), test=(2, "healthy"))
    folder = _noise(tmp_path / "noise", store)
    found = _evaluate(folder, str(store), tmp_path / "out", mesh1)
    assert found["operating"]["rule"] == "validated"
    assert all(not row["healthy_percentile"] for row in _rows(tmp_path / "out"))
    assert (tmp_path / "out" / "report.html").is_file()


def test_fault_D6_a_rule_that_validation_scans_do_not_allow_changes_aloud(
    own: tuple[ExperimentConfig, pathlib.Path, dict[str, Any]],
    tmp_path: pathlib.Path,
    mesh1: jax.sharding.Mesh,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = _store(tmp_path / "store", val=(2, "healthy"), test=(2, "healthy"))
    folder = _noise(tmp_path / "noise", store)
    rates = dataclasses.replace(SETTINGS, healthy_fpr=0.02)
    asked = EvaluationSet(threshold_from=ThresholdRule.VALIDATED)
    with caplog.at_level(logging.WARNING):
        found = evaluate_maps.evaluate_maps(
            folder,
            store,
            tmp_path / "out",
            evaluation_set=asked,
            settings=rates,
            mesh=mesh1,
            progress=False,
        )["test"]
    operating = found["operating"]
    assert operating["rule"] == "healthy_fpr"
    assert operating["healthy_fpr"] == 0.02
    assert "no annotated abnormal validation scans" in operating["note"]
    assert "2 % false positives" in operating["note"]
    warned = [one for one in caplog.records if operating["note"] in one.getMessage()]
    assert len(warned) == 1
    assert all("healthy" in row["rule"] for row in found["thresholds"])
    stored = json.loads((tmp_path / "out" / "results" / "test.json").read_text())
    assert stored["operating"] == operating

    # On the validation scans themselves, whose lesions would tune it.
    known = _evaluate(
        own[1] / "maps" / "test",
        own[0].data.store,
        tmp_path / "val",
        mesh1,
        evaluation_set=dataclasses.replace(asked, split="val"),
    )
    assert known["operating"]["rule"] == "healthy_fpr"
    assert "would be tuned on the scans of this set" in known["operating"]["note"]
    tested = _evaluate(
        own[1] / "maps" / "test",
        own[0].data.store,
        tmp_path / "test",
        mesh1,
        evaluation_set=asked,
    )
    assert tested["operating"]["rule"] == "validated"
    assert "note" not in tested["operating"]
