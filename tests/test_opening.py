"""A run is opened from wherever it and its config file are now."""

import json
import logging
import pathlib

import pytest

from configs import _opening, smoke
from tests import stores
from uad_jax import config as config_lib
from uad_jax import mesh as mesh_lib
from uad_jax import train

ROOT = pathlib.Path(__file__).resolve().parent.parent
OWN = """
from configs import smoke

def get_config(arg=""):
    config = smoke.get_config(arg)
    config.name = "ours"
    return config
"""


def _workdir(path: pathlib.Path, source: str, **dotted: object) -> pathlib.Path:
    """A workdir that holds the config of a run, and nothing else."""
    config = smoke.get_config("variant=ae")
    config.source, config.seed = source, 7
    stored = config_lib.to_dict(config)
    stored |= dotted
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(stored), encoding="utf-8")
    return path


def test_a_config_of_the_repository_is_found_from_any_directory(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = _workdir(tmp_path / "run", "configs/smoke.py:variant=ae")
    monkeypatch.chdir(tmp_path)
    config = _opening.stored_experiment(workdir)
    assert config.seed == 7
    assert config.method.variant.value == "ae"
    assert config.source == "configs/smoke.py:variant=ae"


def test_a_file_beside_the_user_comes_before_one_of_the_repository(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = _workdir(tmp_path / "run", "configs/smoke.py:variant=ae")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "smoke.py").write_text("raise ValueError('read me')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="read me"):
        _opening.stored_experiment(workdir)


def test_the_copy_in_the_workdir_stands_in_for_a_file_that_is_gone(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = _workdir(tmp_path / "run", "lab/ours.py:variant=ae")
    (workdir / train.CONFIG_FILE).write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert _opening.stored_experiment(workdir).seed == 7


def test_a_run_whose_config_file_is_nowhere_gets_one_sentence(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _workdir(tmp_path / "run", "lab/ours.py:variant=ae")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        _opening.parse_flags(["run.py", "predict", "--workdir=run"], ["predict"])
    assert str(caught.value) == (
        "run was trained with lab/ours.py, which is not here; put it back or pass "
        "--config=..."
    )


@pytest.mark.parametrize(
    ("cwd", "chosen", "stored"),
    [
        (".", "configs/ddpm.py:cpu", "configs/ddpm.py:cpu"),
        ("configs", "ddpm.py:paper", "configs/ddpm.py:paper"),
        ("docs", "../configs/ddpm.py", "configs/ddpm.py"),
        (".", f"{ROOT}/configs/ddpm.py:a=b:c", "configs/ddpm.py:a=b:c"),
        (".", "lab/ours.py:cpu", "lab/ours.py:cpu"),
    ],
)
def test_a_run_stores_a_config_of_the_repository_by_its_place_in_it(
    monkeypatch: pytest.MonkeyPatch, cwd: str, chosen: str, stored: str
) -> None:
    monkeypatch.chdir(ROOT / cwd)
    assert _opening.source_of(chosen) == stored


def test_training_keeps_a_copy_of_a_config_file_that_is_somebodys_own(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "ours.py"
    own.write_text(OWN, encoding="utf-8")
    config = smoke.get_config("variant=ae")
    config.data.store = str(stores.tiny_store(tmp_path))
    mesh = mesh_lib.make_mesh()
    for number, (source, kept) in enumerate(
        [(f"{own}:variant=ae", True), ("configs/smoke.py", False), ("", False)]
    ):
        config.source = source
        workdir = tmp_path / str(number)
        train.describe(config, workdir, mesh)
        assert (workdir / train.CONFIG_FILE).is_file() is kept
    assert (tmp_path / "0" / train.CONFIG_FILE).read_text() == OWN


def test_an_older_run_is_opened_with_the_defaults_it_was_trained_with(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    workdir = _workdir(tmp_path / "run", "configs/smoke.py")
    stored = json.loads((workdir / "config.json").read_text())
    del stored["train"]["selection"]
    (workdir / "config.json").write_text(json.dumps(stored))
    with caplog.at_level(logging.INFO, logger="absl"):
        config = _opening.stored_experiment(workdir)
    assert config.train.selection is config_lib.Selection.FIXED
    assert "defaults are used for: train.selection." in caplog.text


def test_a_run_of_newer_code_names_its_workdir(tmp_path: pathlib.Path) -> None:
    workdir = _workdir(tmp_path / "run", "configs/smoke.py", dropout_plan=3)
    with pytest.raises(SystemExit, match=r"run: .*dropout_plan.*Use the code"):
        _opening.stored_experiment(workdir)
