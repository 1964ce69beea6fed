import numpy as np
import pytest

from uad_jax import progress


def test_time_is_charged_to_one_account_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    watch = progress.Stopwatch()
    with watch.charge("compile"):
        now[0] += 50
    watch.start(train_seconds=7.0)
    meter = progress.Meter(watch, slices_per_step=10)
    with watch.wait():
        now[0] += 1
    now[0] += 3
    meter.add({"loss": np.array([1.0, 2.0])})
    meter.add({"loss": np.array([6.0, 7.0])})
    with watch.charge("eval"):
        now[0] += 20
    line = meter.line()
    assert line["train/loss"] == 4.0
    assert line["perf/slices_per_second"] == 4 * 10 / 4
    assert line["perf/input_wait_share"] == 1 / 4
    assert line["perf/train_seconds"] == 11
    assert line["perf/compile_seconds"] == 50
    assert line["perf/eval_seconds"] == 20
