"""Baselines that are kept between evaluations of several models."""

import copy
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import pytest

from tests import runs, stores
from uad_jax import baseline_scorers, evaluate, evaluation, scoring, train
from uad_jax.baseline_scorers import BaselineMemory, Baselines
from uad_jax.config import EvaluationSet, ExperimentConfig
from uad_jax.data.sources import VolumeInfo
from uad_jax.evaluation import Context
from uad_jax.metrics.protocols import Protocol

MODALITIES = ("t1", "t2")
NONE = Baselines({}, {}, {})


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, mesh1: jax.sharding.Mesh
) -> tuple[ExperimentConfig, pathlib.Path]:
    """One step."""
    folder = tmp_path_factory.mktemp("baselines")
    store = stores.tiny_store(folder, grid=(6, 32, 32, 2), modalities=MODALITIES)
    last = {"total_steps": 1, "train.eval_every": 1, "train.save_every": 1}
    config = runs.smoke_config(store, **last)
    train.train(config, folder / "run", mesh=mesh1, progress=False)
    return config, folder / "run"


@pytest.fixture
def context(
    trained: tuple[ExperimentConfig, pathlib.Path], mesh1: jax.sharding.Mesh
) -> Context:
    (found,) = evaluation.contexts(*trained, 1, mesh1, False)
    return found


def test_baselines_that_are_recalled_change_no_result(
    trained: tuple[ExperimentConfig, pathlib.Path],
    tmp_path: pathlib.Path,
    mesh1: jax.sharding.Mesh,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, workdir = trained
    config = copy.deepcopy(config)
    config.evaluation.sets = {
        "test": EvaluationSet(),
        "val": EvaluationSet(split="val"),
    }
    scored = []
    plain = scoring.baseline_scorer

    def counted(name: str, *given: Any) -> scoring.Scorer:
        scored.append(name)
        return plain(name, *given)

    monkeypatch.setattr(scoring, "baseline_scorer", counted)
    memory = baseline_scorers.BaselineMemory()
    written = []
    for given in (None, memory, memory):
        own = tmp_path / str(len(written))
        shutil.copytree(workdir, own)
        before = len(scored)
        evaluate.evaluate(config, own, mesh=mesh1, progress=False, memory=given)
        found = [json.loads(p.read_text()) for p in sorted(own.glob("results/*.json"))]
        for one in found:
            del one["run"]["evaluation_seconds"], one["run"]["timings"]
        tables = [p.read_bytes() for p in sorted(own.glob("results/*.csv"))]
        tables += [p.read_bytes() for p in sorted(own.glob("calibration/**/*.json"))]
        written.append((found, tables, len(scored) - before))
    assert written[0][:2] == written[1][:2] == written[2][:2]
    assert len(written[2][1]) >= 4
    assert written[1][2] > 0  # of both sets
    assert written[2][2] == 0
    config.evaluation.healthy_fpr = 0.2  # other thresholds: measured anew
    evaluate.evaluate(config, own, mesh=mesh1, progress=False, memory=memory)
    assert len(scored) > written[0][2] + written[1][2]


def _with(part: str, **fields: Any) -> Callable[[Context], Context]:
    def changed(context: Context) -> Context:
        new = dataclasses.replace(getattr(context, part), **fields)
        return dataclasses.replace(context, **{part: new})

    return changed


@pytest.mark.parametrize(
    "change",
    [
        _with("data", modalities="t1"),
        _with("evaluation_set", split="val"),
        _with("evaluation_set", protocol=Protocol.BAUR),
        _with("settings", healthy_fpr=0.2),
        _with("settings", exact_voxels=10),
        lambda context: dataclasses.replace(context, validation=False),
    ],
)
def test_what_is_measured_otherwise_is_not_recalled(
    context: Context, change: Callable[[Context], Context]
) -> None:
    memory = BaselineMemory()
    memory.keep(context, NONE)
    assert memory.recall(dataclasses.replace(context, workdir=pathlib.Path("x")))
    assert memory.recall(change(context)) is None


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize(
    ("label", "fields"),
    [
        ("", {"content": "other"}),
        ("abnormal", {"annotated": False}),
        ("abnormal", {"extra": {"kind": "ms"}}),
    ],
)
def test_other_scans_are_not_recalled(
    context: Context,
    split: str,
    label: str,
    fields: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = BaselineMemory()
    memory.keep(context, NONE)
    select = Context.select

    def changed(self: Context, store: Any, wanted: str) -> list[VolumeInfo]:
        found = select(self, store, wanted)
        if wanted != split:
            return found
        return [
            dataclasses.replace(info, **fields) if label in ("", info.label) else info
            for info in found
        ]

    labels = {info.label for info in select(context, context.store, split)}
    monkeypatch.setattr(Context, "select", changed)
    known = memory.recall(context) is not None
    assert known == (label != "" and label not in labels)


def test_the_oldest_of_too_many_sets_is_forgotten(context: Context) -> None:
    memory = BaselineMemory()
    found = [_with("settings", exact_voxels=10 + n)(context) for n in range(5)]
    for one in found:
        memory.keep(one, NONE)
    assert [memory.recall(one) is not None for one in found] == [False, *[True] * 4]
