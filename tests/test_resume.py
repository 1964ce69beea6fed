"""What a run is after it was stopped, in whatever way: the uninterrupted run."""

import pathlib
import signal
import time
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from tests import runs, stores
from uad_jax import checkpoint, train, writer
from uad_jax import mesh as mesh_lib

_STEPS = 12  # checkpoints at 4, 8 and 12


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return stores.tiny_store(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def whole(
    store: pathlib.Path, tmp_path_factory: pytest.TempPathFactory, mesh1: Mesh
) -> pathlib.Path:
    """The uninterrupted run of a VAE with EMA, dropout and clipping."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    config = runs.smoke_config(store, total_steps=_STEPS)
    assert train.train(config, directory, mesh=mesh1).stopped == "done"
    return directory


def _options(store: pathlib.Path, directory: pathlib.Path, **more: object) -> dict:
    return {
        "store": str(store),
        "workdir": str(directory),
        "config": {"total_steps": _STEPS},
        **more,
    }


def _steps(directory: pathlib.Path) -> list[int]:
    path = directory / train.CHECKPOINTS
    return checkpoint.Checkpoints(path, read_only=True).steps() if path.exists() else []


def _finish_and_compare(
    store: pathlib.Path,
    directory: pathlib.Path,
    whole: pathlib.Path,
    mesh: Mesh,
    **options: object,
) -> None:
    """Goes on with a stopped run; the end must have the bits of the whole run."""
    config = runs.smoke_config(store, total_steps=_STEPS, **options)
    result = train.train(config, directory, mesh=mesh)
    assert (result.step, result.stopped) == (_STEPS, "done")
    state = runs.final_state(config, directory, mesh)
    assert state.step == _STEPS
    assert state.ema is not None
    runs.assert_equal(state, runs.final_state(config, whole, mesh))
    ours, theirs = (_losses(path) for path in (directory, whole))
    assert ours == theirs


def _losses(directory: pathlib.Path) -> list[tuple[int, float]]:
    lines = writer.read_metrics(directory)
    return [
        (line["step"], line[name])
        for line in lines
        for name in ("train/loss", "validation/loss")
        if name in line
    ]


@pytest.mark.parametrize(
    "delay",
    [
        0.0,
        pytest.param(0.05, marks=pytest.mark.slow),
        pytest.param(0.3, marks=pytest.mark.slow),
    ],
)
def test_fault_A1_A20_kill_9_during_a_save_goes_on_to_the_same_bits(
    delay: float,
    store: pathlib.Path,
    whole: pathlib.Path,
    tmp_path: pathlib.Path,
    mesh1: Mesh,
) -> None:
    directory = tmp_path / "run"
    child = runs.start(_options(store, directory, pace=0.05))
    checkpoints = directory / train.CHECKPOINTS
    runs.wait_for(lambda: any(checkpoints.glob("8.saving*")))
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert _steps(directory)[0] == 4
    assert _STEPS not in _steps(directory)
    _finish_and_compare(store, directory, whole, mesh1)


def test_fault_A2_A20_sigterm_saves_exits_143_and_goes_on_to_the_same_bits(
    store: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    directory = tmp_path / "run"
    child = runs.start(_options(store, directory, pace=0.2))
    runs.wait_for(lambda: len(_losses(directory)) >= 5)
    child.send_signal(signal.SIGTERM)
    assert child.wait() == train.EXIT_PREEMPTED
    stopped_at = _steps(directory)[-1]
    assert 5 <= stopped_at < _STEPS
    assert stopped_at % 4, "saved because of the signal, not because it was due"
    _finish_and_compare(store, directory, whole, mesh1)


def test_fault_A5_a_second_signal_while_saving_leaves_the_steps_before(
    store: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    directory = tmp_path / "run"
    log = pathlib.Path(f"{directory}.log")
    child = runs.start(
        _options(store, directory, pace=0.1, slow_save={"from": 5, "seconds": 100})
    )
    runs.wait_for(lambda: _steps(directory) == [4])
    child.send_signal(signal.SIGTERM)
    runs.wait_for(lambda: "SAVING SLOWLY" in log.read_text())
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=20) == 128 + signal.SIGTERM
    assert _steps(directory) == [4]
    _finish_and_compare(store, directory, whole, mesh1)


def test_fault_A21_another_worker_count_goes_on_to_the_same_bits(
    store: pathlib.Path,
    whole: pathlib.Path,
    tmp_path: pathlib.Path,
    mesh1: Mesh,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _stop_at_4(store, tmp_path / "run", mesh1, monkeypatch)
    _finish_and_compare(
        store,
        tmp_path / "run",
        whole,
        mesh1,
        **{"data.placement": "stream", "data.num_workers": 2},
    )


def test_another_device_count_goes_on_to_the_same_numbers(
    store: pathlib.Path,
    whole: pathlib.Path,
    tmp_path: pathlib.Path,
    mesh1: Mesh,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _stop_at_4(store, tmp_path / "run", mesh1, monkeypatch)
    two = mesh_lib.make_mesh(jax.devices()[:2])
    config = runs.smoke_config(store, total_steps=_STEPS)
    assert train.train(config, tmp_path / "run", mesh=two).step == _STEPS
    ours = runs.final_state(config, tmp_path / "run", mesh1)
    theirs = runs.final_state(config, whole, mesh1)
    difference = jax.tree.map(
        lambda a, b: np.max(np.abs(a - b), initial=0.0), ours.ema, theirs.ema
    )
    # 8 steps of at most 1e-3 each: a tenth of one step is rounding, not another run.
    assert max(jax.tree.leaves(difference)) < 1e-4


def _stop_at_4(
    store: pathlib.Path,
    directory: pathlib.Path,
    mesh: Mesh,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that dies just after its first checkpoint is complete."""
    save = checkpoint.Checkpoints.save

    def save_and_die(self: checkpoint.Checkpoints, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        self.wait()
        raise KeyboardInterrupt

    config = runs.smoke_config(store, total_steps=_STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train.train(config, directory, mesh=mesh)
    assert _steps(directory) == [4]
