"""Slabs end to end: volumes of 6 slices trained and scored in slabs of 4."""

import json
import pathlib

import jax
import pytest
from jax.sharding import Mesh

from tests import runs, slabs, stores
from uad_jax import config as config_lib
from uad_jax import evaluate, train
from uad_jax.data import sources
from uad_jax.methods import base
from uad_jax.nn.sequence import Mixer


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return stores.tiny_store(tmp_path_factory.mktemp("slabs"), grid=(6, 16, 16, 1))


def _config(store: pathlib.Path, length: int) -> config_lib.ExperimentConfig:
    options = {"total_steps": 4, "batch_size": 2, "train.validation_slices": 6}
    config = runs.smoke_config(store, **options)
    config.method = slabs.config(
        Mixer.TRANSFORMER, slabs={"num_slices": length, "overlap": 1}
    )
    config.reference_slices = 320
    return config


def test_slabs_are_trained_on_validated_scored_and_counted_in_slices(
    store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    config = _config(store, length=4)
    assert train.train(config, tmp_path, mesh=mesh1, progress=False).stopped == "done"
    lines = [
        json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().split("\n") if x
    ]
    assert any("validation/kl" in line for line in lines)
    state = runs.final_state(config, tmp_path, mesh1)
    table = state.model.params["context"]["Transformer_0"]["positions"]
    assert table.shape == (4, 8)
    evaluate.evaluate(config, tmp_path, mesh=mesh1, progress=False)
    found = json.loads((tmp_path / "results" / "test.json").read_text())
    training = found["run"]["training"]
    assert training["slices_seen"] == 4 * 2 * 4
    assert training["percent_of_reference"] == 10.0
    assert found["set"]["num_volumes"] == 3
    model = next(iter(found["scorers"].values()))
    assert 0 < model["ap_pooled"] <= 1


def test_a_validation_set_of_slabs_is_counted_in_slices(
    store: pathlib.Path, mesh1: Mesh
) -> None:
    config = _config(store, length=2)
    method = config.method.make(base.RunShape(4, 1, 2))
    opened = sources.Store.open(store)
    batches = train.validation_batches(config, opened, method.inputs, mesh1)(0)
    # 6 slices in slabs of 2; the one healthy volume has 3 of them.
    assert sum(int(jax.device_get(batch.valid).sum()) for batch in batches) == 6


def test_a_slab_longer_than_a_volume_is_refused_before_training(
    store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    with pytest.raises(
        ValueError, match=r"slab of 7, the shallowest 6.*num_slices <= 6"
    ):
        train.train(_config(store, length=7), tmp_path, mesh=mesh1, progress=False)


def test_slices_that_cannot_be_halved_are_refused_before_training(
    tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    odd = stores.tiny_store(tmp_path, grid=(6, 18, 30, 1))
    with pytest.raises(ValueError, match=r"18x30.*Use one of \[9\]"):
        train.train(
            _config(odd, length=4), tmp_path / "run", mesh=mesh1, progress=False
        )
