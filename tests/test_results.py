"""What is written may be passed on and read by anything that reads JSON."""

import json

import numpy as np
import pytest

from uad_jax import export, results, scoring
from uad_jax.data import geometry
from uad_jax.scoring import Stage
from uad_jax.types import Geometry


def test_folders_of_the_machine_are_cut_off() -> None:
    config = {
        "data": {"store": "/home/someone/stores/ixi", "modalities": "t1,t2"},
        "source": "configs/autoencoder.py:variant=vae,cpu",
        "train": {"warm_start": [{"workdir": "/scratch/run-1", "step": -1}]},
        "xla_flags": "--a=-b --xla_dump_to=/scratch/dump --c",
        "licence": "CC BY; https://example.org/terms",
    }
    assert results.without_folders(config) == {
        "data": {"store": "ixi", "modalities": "t1,t2"},
        "source": "configs/autoencoder.py:variant=vae,cpu",
        "train": {"warm_start": [{"workdir": "run-1", "step": -1}]},
        "xla_flags": "--a=-b --xla_dump_to=dump --c",
        "licence": "CC BY; https://example.org/terms",
    }


def test_what_does_not_exist_is_null() -> None:
    row = {"auroc": float("nan"), "ap": 0.5, "interval": [np.float64("nan"), 1.0]}
    text = json.dumps(results.without_nan(row), allow_nan=False)
    assert json.loads(text) == {"auroc": None, "ap": 0.5, "interval": [None, 1.0]}


@pytest.mark.parametrize(("shift", "outside"), [(0.0, 0.0), (-5.0, -4.0)])
def test_outside_the_brain_a_shown_map_is_never_the_highest(
    shift: float, outside: float
) -> None:
    scores = np.array([[[1.0, 2.0, 1.0]]], np.float32) + np.float32(shift)
    arrays = scoring.VolumeArrays(
        image=scores[..., None],
        brain=np.ones_like(scores, bool),
        lesion=np.zeros_like(scores, bool),
        scores=scores,
        slice_score=np.zeros(1),
        volume_score=0.0,
        maps={Stage.PROCESSED: (scores, np.array([[[True, True, False]]]))},
        reconstruction=None,
        errors={},
    )
    shown = export.shown(arrays)
    np.testing.assert_array_equal(shown[..., :2], scores[..., :2])
    assert shown[0, 0, 2] == outside
    assert shown.dtype == np.float32


@pytest.mark.parametrize("shift", [0.0, -5.0])
def test_outside_the_model_grid_a_map_is_its_background(shift: float) -> None:
    scores = np.array([[[1.0, 2.0, 1.0]]], np.float32) + np.float32(shift)
    brain = np.ones_like(scores, bool)
    arrays = scoring.VolumeArrays(
        image=None,
        brain=brain,
        lesion=~brain,
        scores=scores,
        slice_score=np.zeros(1),
        volume_score=0.0,
        maps={Stage.PROCESSED: (scores, brain)},
        reconstruction=None,
        errors={},
    )
    where = Geometry(
        native_shape=(1, 5, 1),
        native_affine=np.eye(4),
        grid_to_native=geometry.box_transform((0, 1, 0), (1, 1, 1)),
    )
    outside = min(0.0, float(scores.min()))
    expected = [outside, *scores.ravel(), outside]
    np.testing.assert_allclose(export.on_scan(arrays, where).ravel(), expected)
