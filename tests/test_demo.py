import pathlib

import pytest

from configs import demo as demo_config
from uad_jax import demo, evaluate, prepare, train
from uad_jax.data import cohort


def test_a_stopped_training_is_not_evaluated(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = []
    monkeypatch.setattr(cohort, "write_cohort", lambda *given: tmp_path / "m.csv")
    monkeypatch.setattr(prepare, "prepare", lambda *given: None)
    monkeypatch.setattr(
        train, "train", lambda *given: train.TrainResult(3, "preempted", {})
    )
    monkeypatch.setattr(evaluate, "evaluate", lambda *given: evaluated.append(given))
    config = demo_config.get_config("quick")
    assert demo.demo(config, tmp_path, quick=True) == train.EXIT_PREEMPTED
    assert not evaluated
