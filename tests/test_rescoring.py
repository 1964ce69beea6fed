import json
import math
import pathlib
from typing import Any

import pytest

from configs import smoke
from tests import runs, stores
from uad_jax import config as config_lib
from uad_jax import rescoring, tv_weight, workdir
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


@pytest.mark.parametrize(
    ("weights", "kind", "message"),
    [
        ((1.0, -2.0), Score.RESTORATION, r"of 0 or more, found .*=1,-2\. Name"),
        ((1.0, math.nan), Score.RESTORATION, "found .*=1,nan"),
        ((1.0,), Score.RESTORATION, "two or more different weights.*found .*=1. "),
        ((1.0, 1.0), Score.RESTORATION, "different"),
        ((1.0, 2.0), Score.MC_MEAN, "score.kind=restoration, found mc_mean. Add"),
    ],
)
def test_weights_that_cannot_be_compared_are_refused_at_once(
    tmp_path: pathlib.Path, weights: tuple[float, ...], kind: Score, message: str
) -> None:
    run, output = _run(tmp_path), tmp_path / "other"
    with pytest.raises(ValueError, match=message):
        rescoring.rescore(_experiment(kind), run, output, tv_weights=weights)
    assert not output.exists()


def test_a_method_without_restoration_chooses_no_weight() -> None:
    config = runs.scale_config(pathlib.Path())
    with pytest.raises(ValueError, match="ScaleConfig has none"):
        tv_weight.check(config, (1.0, 2.0))


def test_a_weight_is_not_chosen_without_healthy_scans(tmp_path: pathlib.Path) -> None:
    config = _experiment()
    config.data.store = str(stores.tiny_store(tmp_path, {"train": 1, "test": 1}))
    with pytest.raises(ValueError, match=r"healthy validation.*none.*tv_weights="):
        tv_weight.choose(config, _run(tmp_path), (1.0, 2.0))


def test_the_table_shows_every_candidate_and_the_chosen_one() -> None:
    found = {
        "weight": 0.5,
        "candidates": [2.0, 0.5],
        "mean_changes": [0.25, 0.125],
        "scans": 3,
        "step": 8,
    }
    title, _, *rows = tv_weight.render(found).splitlines()
    assert "3 scans" in title
    assert "step 8" in title
    assert [row.split() for row in rows] == [
        ["2", "0.25000"],
        ["0.5", "0.12500", "chosen"],
    ]


def test_a_weight_whose_restoration_is_lost_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _experiment()
    scans = {"train": 1, "val": 1, "test": 1}
    config.data.store = str(stores.tiny_store(tmp_path, scans))
    changes = iter([math.nan, 0.2])
    monkeypatch.setattr(tv_weight, "_mean_change", lambda *_: (1, next(changes)))
    monkeypatch.setattr(workdir, "refuse_another_recipe", lambda *_: None)
    with pytest.raises(ValueError, match=r"none with the weights 4: .*Leave them out"):
        tv_weight.choose(config, _run(tmp_path), (4.0, 1.0), progress=False)
