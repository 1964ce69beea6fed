import logging
import pathlib
import types
from typing import Any

import numpy as np
import pytest

from configs import smoke
from uad_jax import alarms, loop, progress
from uad_jax import members as members_lib


def _take(watch: alarms.Watch, values: list[float], first: int, per_call: int) -> None:
    for i in range(0, len(values), per_call):
        part = np.array(values[i : i + per_call])
        step = first + i + len(part) - 1
        watch.take(step, {alarms.SAME_OUTPUT: part, "loss": part})


@pytest.mark.parametrize("per_call", [1, 3])
def test_an_alarm_that_lasts_is_warned_about_once(
    per_call: int, caplog: pytest.LogCaptureFixture
) -> None:
    watch = alarms.Watch(patience=4)
    with caplog.at_level(logging.WARNING):
        _take(watch, [0, 0.9, 0.9, 0.9, 0, 0.9, 0.9, 0.9], 1, per_call)
        assert not caplog.records  # never four in a row
        _take(watch, [0.95] * 9, 9, per_call)
    (record,) = caplog.records
    message = record.getMessage()
    # Steps 6 to 9 are the first four in a row.
    for word in ("Step 9:", "alarm/same_output", "0.95", "4 steps", "KL weight"):
        assert word in message


def test_each_kind_has_its_own_warning_and_other_scalars_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watch = alarms.Watch(patience=1)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            watch.take(
                step,
                {
                    alarms.CRITIC_WINS: np.array([1.0]),
                    alarms.FLAT_OUTPUT: np.array([1.0]),
                    "alarm/of_a_new_method": np.array([1.0]),
                    "alarmed": np.array([1.0]),
                },
            )
    assert len(caplog.records) == 3
    assert "critic's learning rate" in caplog.text
    assert "see the method" in caplog.text


def test_the_train_loop_looks_at_alarms(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = types.SimpleNamespace(spec=lambda: types.SimpleNamespace(valid=np.ones(8)))
    members = [
        members_lib.Member(
            name=name,
            place=place,
            config=smoke.get_config(),
            workdir=tmp_path / name,
            stream=stream,  # type: ignore[arg-type]
            validation=lambda step: [],
            validate=None,
            checkpoints=None,  # type: ignore[arg-type]
            record=members_lib.Record(),
        )
        for place, name in enumerate(("seed=0", "seed=1"))
    ]
    run = types.SimpleNamespace(
        config=smoke.get_config(),
        members=members,
        active=members,
        programs=types.SimpleNamespace(
            cost=types.SimpleNamespace(flops=1.0), steps_per_call=100
        ),
        watch=progress.Stopwatch(),
    )
    state: Any = None
    flat = np.stack([np.zeros(100), np.full(100, 0.97)], axis=1)
    bad: Any = {"loss": np.ones((100, 2)), alarms.FLAT_OUTPUT: flat}
    caplog.set_level(logging.WARNING)
    with loop.Reporter(run, 0, show=False) as reporter:  # type: ignore[arg-type]
        for step in (100, 200, 300):
            reporter.take(step, bad, state)
            assert len(caplog.records) == (step == 300)  # settled one call late
    assert "seed=1: Step 200: alarm/flat_output = 0.97 for 200 steps" in caplog.text
