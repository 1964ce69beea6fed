import json
import pathlib
from typing import Any

import pytest

from configs import smoke
from uad_jax import config as config_lib
from uad_jax import rescoring, workdir
from uad_jax.anomaly_score_config import Score


def _run(root: pathlib.Path) -> pathlib.Path:
    """What a finished training leaves, as far as it matters here."""
    run = root / "run"
    (run / "checkpoints" / "8").mkdir(parents=True)
    (run / "checkpoints" / "8" / "model").write_bytes(b"weights")
    (run / "results").mkdir()
    for name in ("env.json", "shapes.json", "lock", "report.html"):
        (run / name).write_text("{}")
    stored = config_lib.to_json(smoke.get_config())
    (run / workdir.CONFIG).write_text(stored)
    return run


def _experiment(kind: Score = Score.RESTORATION) -> Any:
    config: Any = smoke.get_config()
    config.method.score.kind = kind
    return config


def test_the_new_run_has_the_checkpoints_and_the_new_score(
    tmp_path: pathlib.Path,
) -> None:
    run, output = _run(tmp_path), tmp_path / "restored"
    changes = rescoring.rescore(_experiment(), run, output)
    assert changes == {"method.score.kind": '"residual" -> "restoration"'}
    model = pathlib.Path("checkpoints", "8", "model")
    assert (output / model).read_bytes() == b"weights"
    assert {path.name for path in output.iterdir()} == {
        "checkpoints",
        "config.json",
        "env.json",
        "shapes.json",
    }
    stored = json.loads((output / workdir.CONFIG).read_text())
    assert stored == config_lib.to_dict(_experiment())
    old = json.loads((run / workdir.CONFIG).read_text())
    assert old == config_lib.to_dict(smoke.get_config())


def test_only_the_score_may_change(tmp_path: pathlib.Path) -> None:
    run, config = _run(tmp_path), _experiment()
    config.method.kl_weight = 2.0
    with pytest.raises(ValueError, match=r"alone.*found changes of method.kl_weight"):
        rescoring.rescore(config, run, tmp_path / "other")
    with pytest.raises(ValueError, match="found none"):
        rescoring.rescore(_experiment(Score.RESIDUAL), run, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_run_is_not_written_over(tmp_path: pathlib.Path) -> None:
    run = _run(tmp_path)
    with pytest.raises(workdir.WorkdirError, match="is not empty"):
        rescoring.rescore(_experiment(), run, run)
    with pytest.raises(workdir.WorkdirError, match="is missing"):
        rescoring.rescore(_experiment(), tmp_path / "nothing", tmp_path / "other")
