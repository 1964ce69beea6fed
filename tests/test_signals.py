import os
import pathlib
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest
from jax.sharding import Mesh

from tests import runs, stores
from uad_jax import loop, signals, train, writer


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return stores.tiny_store(tmp_path_factory.mktemp("signals"))


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda s: s.name
)
def test_a_signal_sets_a_flag_and_the_old_handler_comes_back(
    number: signal.Signals,
) -> None:
    before = signal.getsignal(number)
    with signals.StopSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number.name
    assert signal.getsignal(number) is before


def test_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), signals.StopSignal():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_than_the_main_one_only_warns(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = []

    def run() -> None:
        with signals.StopSignal() as stop:
            found.append(stop.received)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [None]
    assert "outside the main thread" in caplog.text


def test_a_second_signal_ends_the_process_at_once() -> None:
    program = """
import os, signal, time
from uad_jax import signals
with signals.StopSignal() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    print(stop.received, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=50,
        cwd=runs.ROOT,
        check=False,
    )
    assert done.stdout.strip() == "SIGTERM"
    assert done.returncode == 128 + signal.SIGINT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_fault_A2_A4_a_signal_saves_at_the_next_step_and_stops(
    number: signal.Signals,
    store: pathlib.Path,
    tmp_path: pathlib.Path,
    mesh1: Mesh,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settle = loop.Reporter.settle
    calls = []

    def interrupt(self: loop.Reporter, state: Any) -> None:
        calls.append(len(calls))
        if len(calls) == 6:  # while step 6 is on the device
            os.kill(os.getpid(), number)
        settle(self, state)

    monkeypatch.setattr(loop.Reporter, "settle", interrupt)
    # Saves only where asked: the step must come from the signal.
    config = runs.scale_config(
        store, total_steps=20, **{"train.save_every": 20, "train.eval_every": 20}
    )
    result = train.train(config, tmp_path / "run", mesh=mesh1)
    assert (result.step, result.stopped) == (6, "preempted")
    assert f"{number.name}: saved step 6 of 20" in caplog.text
    assert "Start the same command again" in caplog.text
    monkeypatch.undo()

    result = train.train(config, tmp_path / "run", mesh=mesh1)
    assert (result.step, result.stopped) == (20, "done")
    train.train(config, tmp_path / "whole", mesh=mesh1)
    runs.assert_equal(
        runs.final_state(config, tmp_path / "run", mesh1),
        runs.final_state(config, tmp_path / "whole", mesh1),
    )
    lines = [x for x in writer.read_metrics(tmp_path / "run") if "train/loss" in x]
    assert [line["step"] for line in lines] == list(range(1, 21))
