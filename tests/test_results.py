"""What is written may be passed on and read by anything that reads JSON."""

import json

import numpy as np

from uad_jax import results


def test_folders_of_the_machine_are_cut_off() -> None:
    config = {
        "data": {"store": "/home/someone/stores/ixi", "modalities": "t1,t2"},
        "source": "configs/autoencoder.py:variant=vae,cpu",
        "train": {"warm_start": [{"workdir": "/scratch/run-1", "step": -1}]},
        "xla_flags": "--a=-b --xla_dump_to=/tmp/dump --c",
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
