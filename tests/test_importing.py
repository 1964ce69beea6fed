"""Weights of another program, from the file to the report."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from tests import denoisers, foreign_states, runs, stores
from uad_jax import (
    by_step,
    checkpoint,
    denoising,
    evaluate,
    importing,
    saved_run,
    torch_names,
    train,
    types,
    weights,
    workdir,
)
from uad_jax.config import ExperimentConfig
from uad_jax.data import sources
from uad_jax.methods import cddpm

SHAPE = (1, 32, 32, 1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return stores.tiny_store(tmp_path_factory.mktemp("importing"))


def _config(store: pathlib.Path, method: Any) -> ExperimentConfig:
    config = runs.scale_config(store)
    config.method = method
    config.evaluation.bootstrap_samples = 10
    return config


def _state(
    method: Any,
    spelling: Mapping[str, str] | None = None,
    prefix: str = "diffusion.model.",
) -> dict[str, np.ndarray]:
    """What the program of the paper saves."""
    conditional = isinstance(method, cddpm.CddpmConfig)
    network = denoising.network(method, SHAPE, conditional=conditional)
    condition = jnp.zeros((1, 8)) if conditional else None
    like = jax.eval_shape(
        network.init, jax.random.key(0), jnp.zeros(SHAPE), jnp.zeros(1), condition
    )
    sources = torch_names.unet_sources(network, like, spelling)
    state = foreign_states.drawn_state(like, sources, prefix)
    if conditional:
        encoder = cddpm._encoder(method)
        like = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros(SHAPE))
        sources = torch_names.resnet_sources(like)
        state |= foreign_states.drawn_state(like, sources, "encoder.encoder.")
    return state


@pytest.fixture(scope="module")
def conditioned(
    store: pathlib.Path, tmp_path_factory: pytest.TempPathFactory, mesh1: Mesh
) -> tuple[ExperimentConfig, pathlib.Path, dict[str, np.ndarray]]:
    """A cDDPM's file imported into a run."""
    directory = tmp_path_factory.mktemp("imported")
    method = denoisers.cddpm_config()
    state = _state(method)
    foreign_states.save_state(directory / "theirs.ckpt", state)
    config = _config(store, method)
    step = importing.import_weights(
        config,
        directory / "theirs.ckpt",
        directory / "run",
        note="some/repository, no licence",
        mesh=mesh1,
    )
    assert step == config.total_steps
    return config, directory / "run", state


def test_an_imported_file_is_the_model_of_the_run(
    conditioned: tuple[ExperimentConfig, pathlib.Path, dict[str, np.ndarray]],
    mesh1: Mesh,
) -> None:
    config, directory, state = conditioned
    _, model, step = saved_run.load_model(config, directory, mesh=mesh1)
    assert step == config.total_steps
    stem = model.params["denoiser"]["stem"]["kernel"]
    theirs = state["diffusion.model.input_blocks.0.0.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(stem, theirs)
    mean = model.collections["encoder"]["batch_stats"]["backbone"]["bn1"]["mean"]
    np.testing.assert_array_equal(mean, state["encoder.encoder.bn1.running_mean"])
    note = workdir.read_json(directory / workdir.IMPORTED)
    assert note["file"] == "theirs.ckpt"
    assert len(note["sha256"]) == 64


def test_slices_that_lie_otherwise_than_the_authors_are_named(
    store: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = sources.Store.open(store)
    importing._say_how_slices_lie(opened)
    assert "--recipe=behrendt_lps" in caplog.text
    caplog.clear()
    opened.recipe = {**opened.recipe, "turned": True}
    importing._say_how_slices_lie(opened)
    assert caplog.text == ""


def test_an_imported_run_evaluates_to_a_report(
    conditioned: tuple[ExperimentConfig, pathlib.Path, dict[str, np.ndarray]],
    mesh1: Mesh,
) -> None:
    config, directory, _ = conditioned
    found = evaluate.evaluate(config, directory, mesh=mesh1)
    assert 0 <= found["test"]["scorers"][config.name]["ap_pooled"] <= 1
    assert found["test"]["run"]["training"] is None
    page = (directory / "report.html").read_text()
    assert "imported from theirs.ckpt" in page
    assert "some/repository, no licence" in page
    assert "ndertrained" not in page
    (row,) = by_step.evaluate_steps(config, directory, steps="all", mesh=mesh1)
    assert row["step"] == config.total_steps
    assert row["slices_seen"] == ""


def test_the_note_is_of_the_imported_step_alone(
    conditioned: tuple[ExperimentConfig, pathlib.Path, dict[str, np.ndarray]],
) -> None:
    config, directory, _ = conditioned
    known = workdir.imported(directory, config.total_steps)
    assert known is not None
    assert known["file"] == "theirs.ckpt"
    assert workdir.imported(directory, config.total_steps + 1) is None
    assert workdir.imported(directory.parent, config.total_steps) is None


def test_a_failed_import_leaves_no_note(
    store: pathlib.Path,
    tmp_path: pathlib.Path,
    mesh1: Mesh,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = denoisers.pddpm_config()
    file = tmp_path / "theirs.npz"
    np.savez(file, **_state(method))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.Checkpoints, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        importing.import_weights(
            _config(store, method), file, tmp_path / "run", mesh=mesh1
        )
    assert not (tmp_path / "run" / workdir.IMPORTED).exists()


def test_anoddpm_weights_are_known_by_their_names(
    store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    method = denoisers.anoddpm_config()
    state = _state(method, torch_names.ANODDPM, prefix="")
    content = {
        "ema": {
            name: foreign_states.tensor(name, x.size, x.shape)
            for name, x in state.items()
        }
    }
    file = tmp_path / "theirs.pt"
    foreign_states.save_archive(file, content, state)
    config = _config(store, method)
    importing.import_weights(config, file, tmp_path / "run", entry="ema", mesh=mesh1)
    _, model, _ = saved_run.load_model(config, tmp_path / "run", mesh=mesh1)
    np.testing.assert_array_equal(
        model.params["denoiser"]["stem"]["kernel"],
        state["down.0.0.weight"].transpose(2, 3, 1, 0),
    )


def test_an_imported_run_has_nothing_left_to_train(
    conditioned: tuple[ExperimentConfig, pathlib.Path, dict[str, np.ndarray]],
    mesh1: Mesh,
) -> None:
    config, directory, _ = conditioned
    assert train.train(config, directory, mesh=mesh1).step == config.total_steps


def test_a_run_is_not_overwritten(
    conditioned: tuple[ExperimentConfig, pathlib.Path, dict[str, np.ndarray]],
    mesh1: Mesh,
) -> None:
    config, directory, _ = conditioned
    path = directory.parent / "theirs.ckpt"
    with pytest.raises(workdir.WorkdirError, match="into a new --workdir"):
        importing.import_weights(config, path, directory, mesh=mesh1)


def test_ddpm_and_pddpm_take_the_same_file(
    store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    method = denoisers.pddpm_config()
    file = tmp_path / "theirs.npz"
    np.savez(file, **_state(method))
    for name, config in (("pddpm", method), ("ddpm", denoisers.ddpm_config())):
        importing.import_weights(
            _config(store, config), file, tmp_path / name, mesh=mesh1
        )


def test_a_file_of_another_size_names_what_does_not_fit(
    store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    method = denoisers.pddpm_config()
    file = tmp_path / "theirs.npz"
    np.savez(file, **_state(method))
    method.unet.width = 16
    with pytest.raises(weights.WeightsError, match="middle_0/conv_0/kernel: expected"):
        importing.import_weights(
            _config(store, method), file, tmp_path / "run", mesh=mesh1
        )
    assert not list((tmp_path / "run").glob("checkpoints/[0-9]*"))


def test_methods_without_an_importer_say_so(
    store: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "theirs.npz"
    np.savez(file, weight=np.zeros(1))
    config = _config(store, denoisers.spark_config())
    nothing = types.ModelState(params={}, collections={})
    with pytest.raises(ValueError, match="no importer for SparkConfig"):
        importing.fill(config, weights.read(file), nothing, SHAPE)
