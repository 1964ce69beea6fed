import contextlib
import dataclasses
import io
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax.sharding import Mesh

from tests import runs, stores
from tests.test_seams import AdversarialConfig
from uad_jax import (
    anomaly_scores,
    bench,
    bench_score,
    bench_setting,
    config,
    flops,
    programs,
)
from uad_jax.anomaly_score_config import Score
from uad_jax.methods import base

FAST: dict[str, Any] = {"repeats": 3, "seconds": 0.02}
SHARED = {
    "kind",
    "batch",
    "precision",
    "compile",
    "input",
    "slices_per_second",
    "flops_per_slice",
    "flops_note",
    "flops_per_second",
    "share_of_ceiling",
    "memory",
}
TRAIN = SHARED | {"slices_per_step", "steps_per_call", "milliseconds_per_step"}
SCORE = SHARED | {
    "depth",
    "milliseconds_per_volume",
    "postprocess_milliseconds_per_volume",
    "metrics_milliseconds_per_volume",
    "whole_volume_milliseconds",
}


@pytest.fixture(scope="module", autouse=True)
def small_products() -> Iterator[None]:
    """Measures the ceilings on one size: the tests ask for figures, not for speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flops, "_SIZES", (256,))
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return stores.tiny_store(tmp_path_factory.mktemp("bench"))


@dataclasses.dataclass(frozen=True)
class Measured:
    """One benchmark of the tiny autoencoder, and what it left behind."""

    result: dict[str, Any]
    file: pathlib.Path
    lines: list[str]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.result["rows"]


@pytest.fixture(scope="module")
def measured(
    store: pathlib.Path, tmp_path_factory: pytest.TempPathFactory, mesh1: Mesh
) -> Measured:
    file = tmp_path_factory.mktemp("out") / "bench.json"
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        result = bench.bench(
            runs.smoke_config(store), batches=(8, 4), output=file, mesh=mesh1, **FAST
        )
    return Measured(result, file, text.getvalue().splitlines())


def test_every_row_is_complete(measured: Measured) -> None:
    assert [(row["kind"], row["batch"]) for row in measured.rows] == [
        ("train", 8),
        ("train", 4),
        ("score", 2),
    ]
    for row in measured.rows:
        assert set(row) == (TRAIN if row["kind"] == "train" else SCORE)
        assert row["compile"]["seconds"] > 0
        assert row["memory"]["peak_bytes"] > 0
        assert "compiled program" in row["memory"]["source"]  # this is a CPU
        assert row["precision"] == "float32"
    environment = measured.result["environment"]
    assert {"device_kind", "commit", "packages", "xla_flags"} <= set(environment)
    assert measured.result["input"]["shape"] == [6, 32, 32, 1]


def test_rates_follow_from_the_median_times(measured: Measured) -> None:
    *steps, score = measured.rows
    for row in steps:
        timing = row["milliseconds_per_step"]
        assert 0 < timing["min"] <= timing["median"] <= timing["max"]
        expected = 1000 * row["batch"] / timing["median"]
        assert row["slices_per_second"] == pytest.approx(expected)
    per_volume = score["milliseconds_per_volume"]["median"]
    assert score["slices_per_second"] == pytest.approx(1000 * 6 / per_volume)
    after = [
        score[f"{part}_milliseconds_per_volume"]["median"]
        for part in ("postprocess", "metrics")
    ]
    assert min(after) > 0
    assert score["whole_volume_milliseconds"] == pytest.approx(per_volume + sum(after))


def test_operations_per_slice_do_not_depend_on_the_batch(measured: Measured) -> None:
    large, small, score = (row["flops_per_slice"] for row in measured.rows)
    assert large == pytest.approx(small, rel=0.1)
    assert 0 < score < large  # without gradients


def test_shares_are_of_the_ceilings_of_the_same_run(measured: Measured) -> None:
    ceilings = measured.result["ceilings"]
    for row in measured.rows:
        reached = row["flops_per_slice"] * row["slices_per_second"]
        assert row["flops_per_second"] == pytest.approx(reached)
        for name in ("float32", "bfloat16"):
            share = row["share_of_ceiling"][name]
            assert 0 < share <= 1.5
            ceiling = ceilings[name]["flops_per_second"]
            assert share == pytest.approx(reached / ceiling)


def test_the_wait_is_that_of_the_real_stream(measured: Measured) -> None:
    for row in measured.rows[:2]:
        assert row["input"]["placement"] == "device"  # the tiny fold fits
        assert 0 <= row["input"]["wait_share"] < 1
        assert row["input"]["milliseconds_per_step"]["median"] > 0
    assert measured.rows[2]["input"] is None


def test_the_largest_batch_is_an_estimate_from_two_programs(
    measured: Measured,
) -> None:
    found = measured.result["largest_batch"]
    assert found["train"]["estimated_from"] == [4, 8]
    assert found["score"]["estimated_from"] == [1, 2]
    by_size = {row["batch"]: row["memory"]["program_bytes"] for row in measured.rows}
    train = found["train"]
    per_row = (by_size[8] - by_size[4]) / 4
    assert train["bytes_per_row"] == pytest.approx(per_row)
    needed = train["fixed_bytes"] + train["batch"] * per_row
    assert needed <= train["limit_bytes"] < needed + 2 * per_row
    assert "estimate" in train["note"]


def test_the_file_holds_what_is_returned_and_no_folder(
    measured: Measured, store: pathlib.Path
) -> None:
    text = measured.file.read_text()
    assert json.loads(text) == measured.result
    assert measured.result["input"]["store"] == store.name
    assert str(store.parent) not in text
    assert sorted(path.name for path in measured.file.parent.iterdir()) == [
        measured.file.name
    ]


def test_every_row_is_one_line(measured: Measured) -> None:
    starts = [
        "smoke train b=8: ",
        "smoke train b=4: ",
        "smoke train: about ",
        "smoke score b=2 volumes of 6 slices: ",
        "smoke score: about ",
    ]
    assert len(measured.lines) == len(starts)
    for line, start in zip(measured.lines, starts, strict=True):
        assert line.startswith(start)
    for word in ("slices/s", "ms/step", "GFLOP/slice", "fp32 matmul", "input wait"):
        assert word in measured.lines[0]
    assert "whole volume" in measured.lines[3]
    assert measured.lines[0] == bench.line("smoke", measured.rows[0])


def test_a_figure_has_three_digits_and_no_exponent() -> None:
    found = [bench._figure(x) for x in (1234.5, 650.2, 98.04, 1.3, 0.0123)]
    assert found == ["1,234", "650", "98", "1.3", "0.0123"]


def test_a_batch_that_does_not_fit_is_a_row_and_the_sweep_goes_on(
    mesh1: Mesh,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build = programs.build

    def small_device(*args: Any) -> programs.Programs:
        if args[1].uid.shape[0] > 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 bytes too many")
        return build(*args)

    monkeypatch.setattr(programs, "build", small_device)
    tiny = _scale_config()
    result = bench.bench(tiny, score=False, batches=(8, 4), mesh=mesh1, **FAST)
    bad, good = result["rows"]
    assert set(bad) == {"kind", "batch", "error"}
    assert "Out of device memory with batch_size = 8" in bad["error"]
    assert good["slices_per_second"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("scale train b=8: Out of device memory")
    assert lines[1].startswith("scale train b=4: ")


def test_memory_that_really_runs_out_is_a_row(mesh1: Mesh) -> None:
    tiny = runs.overridden(_scale_config(), {"method.temporary": 2**43})
    result = bench.bench(tiny, score=False, batches=(4,), mesh=mesh1, **FAST)
    assert "Out of device memory" in result["rows"][0]["error"]
    assert result["largest_batch"] == {}


def test_scores_that_do_not_fit_are_a_row(
    store: pathlib.Path, mesh1: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 bytes too many")

    monkeypatch.setattr(bench_score, "_measured_score", fails)
    result = bench.bench(runs.smoke_config(store), train=False, mesh=mesh1, **FAST)
    (row,) = result["rows"]
    assert "2 volumes of 6 slices" in row["error"]
    assert "evaluation.batch_size" in row["error"]


def test_a_pretraining_stage_is_skipped_with_a_sentence(
    mesh1: Mesh, capsys: pytest.CaptureFixture[str]
) -> None:
    result = bench.bench(_scale_config(), train=False, mesh=mesh1, **FAST)
    (row,) = result["rows"]
    assert row["skipped"] == "scale is a pretraining stage and scores nothing."
    assert row["skipped"] in capsys.readouterr().out


def test_several_steps_per_call_are_counted_as_steps(
    mesh1: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_setting, "timed", lambda call, setting: [0.4])
    one = bench.bench(_scale_config(), score=False, mesh=mesh1, **FAST)["rows"][0]
    monkeypatch.setattr(programs, "steps_per_call", lambda wanted, mesh: 4)
    four = bench.bench(_scale_config(), score=False, mesh=mesh1, **FAST)["rows"][0]
    assert (one["steps_per_call"], four["steps_per_call"]) == (1, 4)
    assert one["milliseconds_per_step"]["median"] == 400
    assert four["milliseconds_per_step"]["median"] == 100
    assert four["slices_per_second"] == 8 / 0.1
    assert four["flops_per_slice"] == one["flops_per_slice"]
    assert four["flops_per_second"] == 4 * one["flops_per_second"]


def test_times_of_a_batch_of_volumes_are_divided_by_the_volumes(
    store: pathlib.Path, mesh1: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_setting, "timed", lambda call, setting: [0.4])
    tiny = runs.smoke_config(store)
    (row,) = bench.bench(tiny, train=False, mesh=mesh1, **FAST)["rows"]
    assert row["milliseconds_per_volume"]["median"] == 200
    assert row["postprocess_milliseconds_per_volume"]["median"] == 200
    assert row["metrics_milliseconds_per_volume"]["median"] == 400  # one at a time
    assert row["slices_per_second"] == 6 / 0.2
    per_second = row["flops_per_slice"] * row["slices_per_second"]
    assert row["flops_per_second"] == pytest.approx(per_second)


def test_a_score_that_the_host_drives_is_timed_as_evaluation_runs_it(
    store: pathlib.Path, mesh1: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny: Any = runs.smoke_config(store)
    tiny.method.score.kind = Score.RESTORATION
    tiny.method.score.restoration.num_steps = 2
    build, calls = anomaly_scores.host_scorer, []

    def counted(*args: Any, **options: Any) -> Any:
        score = build(*args, **options)
        assert score is not None

        def call(*given: Any) -> Any:
            calls.append(1)
            return score(*given)

        return call

    def timed(call: Any, setting: Any) -> list[float]:
        call(3)
        return [0.4]

    monkeypatch.setattr(anomaly_scores, "host_scorer", counted)
    monkeypatch.setattr(bench_setting, "timed", timed)
    (row,) = bench.bench(tiny, train=False, mesh=mesh1, **FAST)["rows"]
    assert len(calls) == 1 + 3 + 1  # compiled, timed, and the map to post-process
    assert set(row) == SCORE
    assert row["compile"]["seconds"] > 0
    assert row["memory"]["program_bytes"] is None
    # Two steps with gradients, each several times one reconstruction.
    monkeypatch.setattr(anomaly_scores, "host_scorer", build)
    tiny.method.score.kind = Score.RESIDUAL
    (plain,) = bench.bench(tiny, train=False, mesh=mesh1, **FAST)["rows"]
    assert row["flops_per_slice"] > 4 * plain["flops_per_slice"]


def test_slabs_count_all_their_slices(store: pathlib.Path, mesh1: Mesh) -> None:
    slabs = config.ExperimentConfig(name="slabs", method=AdversarialConfig())
    slabs.data.store = str(store)
    result = bench.bench(slabs, score=False, batches=(2,), mesh=mesh1, **FAST)
    (row,) = result["rows"]
    per_step = row["milliseconds_per_step"]["median"]
    assert row["slices_per_step"] == 2 * 3
    assert row["slices_per_second"] == pytest.approx(1000 * 6 / per_step)


def test_what_cannot_work_is_refused_before_anything_is_compiled(
    mesh8: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "single_optimizer", None)  # nothing may get this far
    tiny = _scale_config()
    for options, sentence in (
        ({"batches": (12,)}, "12 rows cannot be split over 8 devices"),
        ({"batches": (0,)}, "batch of 0 rows: use 1 or more"),
        ({"train": False, "score": False}, "Neither training nor scoring"),
        ({"repeats": 0}, "0 repeats"),
        ({"recipe": "grid3mm"}, "no recipe 'grid3mm'.*grid2mm"),
    ):
        with pytest.raises(ValueError, match=sentence):
            bench.bench(tiny, mesh=mesh8, **{**FAST, **options})


def _scale_config() -> config.ExperimentConfig:
    """A method that compiles at once and has no scores, without a store."""
    tiny = runs.scale_config(pathlib.Path())
    tiny.data.store = ""
    return tiny
