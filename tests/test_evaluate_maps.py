"""Maps made elsewhere are evaluated exactly like a method of our own."""

import csv
import json
import pathlib
from typing import Any

import jax
import nibabel as nib
import numpy as np
import pytest

from tests import runs, stores
from uad_jax import evaluate, evaluate_maps, train
from uad_jax.config import EvaluationConfig, EvaluationSet, ExperimentConfig
from uad_jax.data.sources import LESION_BIT, Store
from uad_jax.metrics.postprocess import Protocol

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
