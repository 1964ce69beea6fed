"""Several processes over the loopback interface are one program."""

import pathlib
import signal
import socket
import subprocess

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from tests import runs, stores
from uad_jax import distributed, train, writer
from uad_jax import mesh as mesh_lib


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return stores.tiny_store(tmp_path_factory.mktemp("distributed"))


def _start(
    store: pathlib.Path, directory: pathlib.Path, processes: int, **options: object
) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {
        "store": str(store),
        "workdir": str(directory),
        "distributed": True,
        **options,
    }
    return [
        runs.start(
            given,
            JAX_NUM_CPU_DEVICES="1",
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
            JAX_NUM_PROCESSES=str(processes),
            JAX_PROCESS_ID=str(index),
            UAD_JAX_HEARTBEAT_SECONDS="10",
        )
        for index in range(processes)
    ]


def _num_lines(directory: pathlib.Path) -> int:
    return len(writer.read_metrics(directory))


def test_two_processes_train_to_the_numbers_of_one(
    store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    children = _start(store, tmp_path / "two", 2)
    config = runs.smoke_config(store)
    train.train(config, tmp_path / "one", mesh=mesh_lib.make_mesh(jax.devices()[:2]))
    log = pathlib.Path(f"{tmp_path / 'two'}.log")
    assert [child.wait(300) for child in children] == [0, 0], log.read_text()[-4000:]
    assert log.read_text().count("RESULT 8 done") == 2
    # Thresholds are left to one process, and only one process shows progress.
    assert log.read_text().count("CALIBRATED False") == 2
    assert log.read_text().count("step 8 of 8:") == 1

    # What the pair saved opens here, on another number of devices.
    two = runs.final_state(config, tmp_path / "two", mesh1)
    one = runs.final_state(config, tmp_path / "one", mesh1)
    difference = jax.tree.map(
        lambda a, b: np.max(np.abs(a - b), initial=0.0), two.model, one.model
    )
    # 8 steps of at most 1e-3 each: a hundredth of one step is rounding.
    assert max(jax.tree.leaves(difference)) < 1e-5
    for ours, theirs in zip(
        writer.read_metrics(tmp_path / "two"),
        writer.read_metrics(tmp_path / "one"),
        strict=True,
    ):
        assert ours["step"] == theirs["step"]
        for name in {"train/loss", "validation/loss"} & set(theirs):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5)


@pytest.mark.slow
def test_fault_A3_a_signal_to_one_process_stops_all_at_the_same_step(
    store: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    options = {"pace": 0.2, "config": {"total_steps": 400, "train.save_every": 400}}
    children = _start(store, tmp_path / "run", 2, **options)
    runs.wait_for(lambda: _num_lines(tmp_path / "run") >= 3)
    children[1].send_signal(signal.SIGTERM)
    assert [child.wait(60) for child in children] == [train.EXIT_PREEMPTED] * 2
    log = pathlib.Path(f"{tmp_path / 'run'}.log").read_text()
    results = [line for line in log.splitlines() if line.startswith("RESULT")]
    assert len(results) == 2
    assert results[0] == results[1]
    assert results[0].endswith("preempted")


@pytest.mark.slow
def test_fault_A40_a_dead_process_ends_the_others_and_a_restart_goes_on(
    store: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    options = {"pace": 0.2, "config": {"total_steps": 60}}
    children = _start(store, tmp_path / "run", 2, **options)
    runs.wait_for(lambda: _num_lines(tmp_path / "run") >= 12)
    children[1].kill()
    codes = [child.wait(60) for child in children]
    assert codes[0] != 0
    again = _start(store, tmp_path / "run", 2, config={"total_steps": 60})
    assert [child.wait(300) for child in again] == [0, 0]
    assert "resumed at step" in pathlib.Path(f"{tmp_path / 'run'}.log").read_text()


def test_evaluation_during_training_needs_a_single_process(
    store: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    config = runs.smoke_config(store, **{"train.evaluate_every": 4})
    with pytest.raises(ValueError, match="evaluations run in one process only"):
        train.train(config, tmp_path / "run", evaluate=lambda step: {})
    assert not (tmp_path / "run").exists()


def test_incomplete_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ValueError, match="not JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"):
        distributed.initialize()


def test_one_process_agrees_with_itself() -> None:
    assert distributed.any_process(True)
    assert not distributed.any_process(False)
    assert distributed.is_main()
