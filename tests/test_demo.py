import json
import os
import pathlib

import pytest

from configs import demo as demo_config
from uad_jax import demo, environment, evaluate, prepare, train
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


def test_a_finished_demo_says_so_until_training_or_code_goes_on(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    evaluated = []
    results = {
        "run": {"name": "model", "environment": {"commit": "abc"}},
        "set": {"protocol": "behrendt"},
        "scorers": {"a baseline": {}, "model": {"ap_pooled": 0.25}},
        "verdict": "As good as it gets.",
    }

    def evaluation(*given: object) -> dict[str, object]:
        evaluated.append(given)
        return {"test": results}

    monkeypatch.setattr(cohort, "write_cohort", lambda *given: tmp_path / "m.csv")
    monkeypatch.setattr(prepare, "prepare", lambda *given: None)
    monkeypatch.setattr(train, "train", lambda *given: train.TrainResult(3, "done", {}))
    monkeypatch.setattr(evaluate, "evaluate", evaluation)
    monkeypatch.setattr(environment, "commit", lambda: "abc")
    run = tmp_path / "run"
    (run / "results").mkdir(parents=True)
    (run / "metrics.jsonl").touch()

    def start() -> int:
        assert demo.demo(demo_config.get_config("quick"), tmp_path, quick=True) == 0
        said = capsys.readouterr().out
        assert said.index("0.250") < said.index("a baseline")
        return len(evaluated)

    assert start() == 1
    (run / "results" / "test.json").write_text(json.dumps(results), encoding="utf-8")
    (run / "report.html").touch()
    assert start() == 1
    monkeypatch.setattr(environment, "commit", lambda: "abd")
    assert start() == 2
    monkeypatch.setattr(environment, "commit", lambda: "abc")
    later = (run / "report.html").stat().st_mtime + 1
    os.utime(run / "metrics.jsonl", (later, later))
    assert start() == 3
