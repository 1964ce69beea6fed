import pathlib

import numpy as np
import pytest
from jax.sharding import Mesh

from tests import runs, stores
from uad_jax import train, writer
from uad_jax.config import ExperimentConfig, Selection
from uad_jax.data import pipeline, sources
from uad_jax.methods.base import Inputs


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return stores.tiny_store(
        tmp_path_factory.mktemp("selection"), {"train": 3, "val": 9}
    )


def _config(store: pathlib.Path, selection: Selection) -> ExperimentConfig:
    return runs.scale_config(
        store,
        **{
            "train.selection": selection,
            "train.eval_every": 2,
            "train.validation_slices": 0,
            "method.optimizer.learning_rate": 1e-12,  # the model stays as it is
        },
    )


@pytest.mark.parametrize("selection", list(Selection))
def test_fixed_losses_of_a_standing_model_are_equal_and_reference_losses_are_not(
    store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh, selection: Selection
) -> None:
    train.train(_config(store, selection), tmp_path, mesh=mesh1)
    lines = writer.read_metrics(tmp_path)
    losses = [line["validation/loss"] for line in lines if "validation/loss" in line]
    assert len(losses) == 4
    spread = np.ptp(losses) / np.mean(losses)
    assert (spread < 1e-5) == (selection is Selection.FIXED)


def test_reference_selection_draws_one_slice_of_every_healthy_volume(
    store: pathlib.Path, mesh1: Mesh
) -> None:
    config = _config(store, Selection.REFERENCE)
    opened = sources.Store.open(store)
    batches = train.validation_batches(config, opened, Inputs(), mesh1)
    expected = sorted(
        volume.uid
        for volume in pipeline.select(opened, config.data, "val")
        if volume.label == "healthy"
    )
    drawn = []
    for step in (2, 4, 2):
        (batch,) = batches(step)
        valid = np.asarray(batch.valid)
        order = np.argsort(np.asarray(batch.uid)[valid])
        assert list(np.asarray(batch.uid)[valid][order]) == expected
        drawn.append(list(np.asarray(batch.slice_index)[valid][order]))
    assert drawn[0] == drawn[2] != drawn[1]


def test_reference_selection_draws_the_random_numbers_anew(
    store: pathlib.Path,
    tmp_path: pathlib.Path,
    mesh1: Mesh,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The slices stay: what changes the loss is the noise."""
    draw = train.validation_batches
    monkeypatch.setattr(
        train,
        "validation_batches",
        lambda *args: lambda step: draw(*args)(0),
    )
    train.train(_config(store, Selection.REFERENCE), tmp_path, mesh=mesh1)
    lines = writer.read_metrics(tmp_path)
    losses = [line["validation/loss"] for line in lines if "validation/loss" in line]
    assert np.ptp(losses) > 1e-5 * np.mean(losses)
