import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from absl import logging
from jax.sharding import Mesh

from tests import runs, stores
from uad_jax import (
    checkpoint,
    cost,
    divergence,
    lineage,
    loop,
    members,
    saved_run,
    train,
    workdir,
    writer,
)
from uad_jax import mesh as mesh_lib
from uad_jax.config import ExperimentConfig, WarmStart
from uad_jax.data import pipeline, sources
from uad_jax.data.config import Placement
from uad_jax.methods import base


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return stores.tiny_store(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def finished(
    store: pathlib.Path, tmp_path_factory: pytest.TempPathFactory, mesh1: Mesh
) -> pathlib.Path:
    """The workdir of a finished run of 8 steps."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    result = train.train(runs.scale_config(store), directory, mesh=mesh1)
    assert result.stopped == "done"
    return directory


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """The names of the programs that were compiled so far in this test."""
    events: list[str] = []

    def listen(event: str, seconds: float, **kwargs: Any) -> None:
        if event.endswith("backend_compile_duration"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_run_leaves_checkpoints_metrics_and_descriptions(
    finished: pathlib.Path,
) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "checkpoints",
        "config.json",
        "env.json",
        "data_fingerprint.json",
        "metrics.jsonl",
        "parameters.txt",
        "tb",
    }
    assert "net/gain" in (finished / "parameters.txt").read_text()
    lines = writer.read_metrics(finished)
    trained = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in trained] == list(range(1, 9))
    assert [line["step"] for line in lines if "validation/loss" in line] == [4, 8]
    for name in ("slices_per_second", "input_wait_share", "train_seconds"):
        assert all(line[f"perf/{name}"] >= 0 for line in trained)
    seconds = [line["perf/train_seconds"] for line in trained]
    assert seconds == sorted(seconds)
    assert trained[-1]["perf/compile_seconds"] > 0
    assert trained[-1]["perf/eval_seconds"] > 0
    assert trained[-1]["perf/flops_per_slice"] > 32 * 32
    data = json.loads((finished / "data_fingerprint.json").read_text())
    assert data["licences"] == ["synthetic"]
    assert sorted(data["subjects"]) == ["train-0", "train-1", "train-2"]


def test_a_run_shorter_than_log_every_still_logs_its_last_step(
    store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    config = runs.scale_config(store, **{"train.log_every": 100})
    train.train(config, tmp_path / "run", mesh=mesh1)
    lines = writer.read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "train/loss" in line] == [8]


def test_the_loss_falls(finished: pathlib.Path) -> None:
    losses = [
        x["train/loss"] for x in writer.read_metrics(finished) if "train/loss" in x
    ]
    assert losses[-1] < losses[0]


def test_a_finished_run_says_so_and_compiles_nothing(
    store: pathlib.Path,
    finished: pathlib.Path,
    mesh1: Mesh,
    compiled: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.set_verbosity(logging.INFO)
    result = train.train(runs.scale_config(store), finished, mesh=mesh1)
    assert (result.step, result.stopped) == (8, "done")
    assert result.summary["best_step"] == 8
    assert "is finished" in caplog.text
    assert not compiled


def test_nothing_compiles_once_the_loop_runs(
    store: pathlib.Path,
    tmp_path: pathlib.Path,
    mesh1: Mesh,
    compiled: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = []
    settle = loop.Reporter.settle

    def count(self: loop.Reporter, state: Any) -> None:
        counts.append(len(compiled))
        settle(self, state)

    monkeypatch.setattr(loop.Reporter, "settle", count)
    config = runs.scale_config(store, total_steps=12)
    train.train(config, tmp_path / "run", mesh=mesh1)
    # The first validation and save (step 4) may compile small programs, no later one.
    after_first_save = counts[5:]
    assert len(after_first_save) > 5
    assert counts[0] == counts[3] > 0
    assert after_first_save[0] == after_first_save[-1]


def test_the_steady_loop_refuses_batches_that_are_still_on_the_host(
    store: pathlib.Path,
    tmp_path: pathlib.Path,
    mesh1: Mesh,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Host:
        def __init__(self, batches: Iterator[Any]) -> None:
            self._batches = batches

        def __enter__(self) -> Iterator[Any]:
            return self._batches

        def __exit__(self, *exception: object) -> None:
            pass

    monkeypatch.setattr(
        pipeline.TrainStream,
        "batches",
        lambda self, start, stack=None: Host(self.host_batches(start)),
    )
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train.train(runs.scale_config(store), tmp_path / "run", mesh=mesh1)


@pytest.mark.parametrize("placement", [Placement.STREAM, Placement.DEVICE])
def test_every_placement_trains_to_the_same_bits(
    placement: Placement,
    store: pathlib.Path,
    finished: pathlib.Path,
    tmp_path: pathlib.Path,
    mesh1: Mesh,
) -> None:
    config = runs.scale_config(store, **{"data.placement": placement})
    train.train(config, tmp_path / "run", mesh=mesh1)
    runs.assert_equal(
        runs.final_state(config, tmp_path / "run", mesh1),
        runs.final_state(config, finished, mesh1),  # Placement.AUTO
    )


def test_eight_devices_train_to_the_numbers_of_one(
    store: pathlib.Path,
    finished: pathlib.Path,
    tmp_path: pathlib.Path,
    mesh1: Mesh,
    mesh8: Mesh,
) -> None:
    config = runs.scale_config(store)
    train.train(config, tmp_path / "run", mesh=mesh8)
    one = runs.final_state(config, finished, mesh1)
    eight = runs.final_state(config, tmp_path / "run", mesh1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, eight
    )


def test_steps_per_call_is_one_on_a_cpu_and_that_is_said(
    store: pathlib.Path,
    finished: pathlib.Path,
    tmp_path: pathlib.Path,
    mesh1: Mesh,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = runs.scale_config(
        store, **{"train.steps_per_call": 2, "train.log_every": 2}
    )
    train.train(config, tmp_path / "run", mesh=mesh1)
    assert "train.steps_per_call = 2 is taken as 1 on a CPU" in caplog.text
    runs.assert_equal(
        runs.final_state(config, tmp_path / "run", mesh1),
        runs.final_state(config, finished, mesh1),
    )


def test_scanned_steps_train_to_the_numbers_of_single_ones(
    store: pathlib.Path,
    finished: pathlib.Path,
    tmp_path: pathlib.Path,
    mesh1: Mesh,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train, "_steps_per_call", lambda config, mesh: 2)
    config = runs.scale_config(store, **{"train.log_every": 2})
    train.train(config, tmp_path / "run", mesh=mesh1)
    one = runs.final_state(config, finished, mesh1)
    two = runs.final_state(config, tmp_path / "run", mesh1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, two)
    single = [
        x["train/loss"] for x in writer.read_metrics(finished) if "train/loss" in x
    ]
    scanned = [
        x["train/loss"]
        for x in writer.read_metrics(tmp_path / "run")
        if "train/loss" in x
    ]
    np.testing.assert_allclose(scanned, np.reshape(single, (-1, 2)).mean(1), rtol=1e-5)


def test_load_model_gives_the_averaged_parameters_on_any_mesh(
    store: pathlib.Path, finished: pathlib.Path, mesh1: Mesh, mesh8: Mesh
) -> None:
    config = runs.scale_config(store)
    state = runs.final_state(config, finished, mesh1)
    method, model, step = saved_run.load_model(config, finished, mesh=mesh8)
    assert step == 8
    assert method.inputs.num_slices is None
    runs.assert_equal(jax.tree.map(np.asarray, model), state.for_eval())
    assert model.params["net"]["gain"].sharding == mesh_lib.replicated(mesh8)
    assert saved_run.load_model(config, finished, 4, mesh1)[2] == 4


def test_warm_start_begins_with_the_other_runs_parameters(
    store: pathlib.Path, finished: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    config = runs.scale_config(
        store, **{"total_steps": 1, "method.optimizer.learning_rate": 1e-12}
    )
    config.train.warm_start = [WarmStart(workdir=str(finished), step=8)]
    train.train(config, tmp_path / "run", mesh=mesh1)
    _, ours, _ = saved_run.load_model(config, tmp_path / "run", mesh=mesh1)
    _, theirs, _ = saved_run.load_model(config, finished, 8, mesh1)
    np.testing.assert_allclose(
        ours.params["net"]["gain"], theirs.params["net"]["gain"], rtol=1e-6
    )
    seen = lineage.seen(tmp_path / "run")
    assert lineage.origins(tmp_path / "run") == seen == lineage.seen(finished)


def test_a_warm_start_from_another_fold_is_refused(
    tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    """Its own validation scans have trained the run it starts from."""
    folds = stores.folded_store(tmp_path / "folds")
    config = runs.scale_config(folds, total_steps=1)
    train.train(config, tmp_path / "first", mesh=mesh1)
    config = runs.scale_config(folds, **{"total_steps": 1, "data.fold": 1})
    config.train.warm_start = [WarmStart(workdir=str(tmp_path / "first"))]
    with pytest.raises(ValueError, match="trained the run that this one starts from"):
        train.train(config, tmp_path / "run", mesh=mesh1)


def test_patience_ends_a_run_for_good(
    store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    config = runs.scale_config(
        store,
        **{
            "total_steps": 40,
            "train.patience": 2,
            "method.optimizer.learning_rate": 1e-30,
        },
    )
    result = train.train(config, tmp_path / "run", mesh=mesh1)
    assert (result.step, result.stopped) == (12, "patience")
    assert result.summary["best_step"] == 4
    again = train.train(config, tmp_path / "run", mesh=mesh1)
    assert (again.step, again.stopped) == (12, "patience")
    config.train.patience = 3
    assert train.train(config, tmp_path / "run", mesh=mesh1).step == 16


def test_full_evaluations_see_the_complete_checkpoint_of_their_step(
    store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    config = runs.scale_config(store, **{"train.evaluate_every": 3})
    seen = []

    def evaluate(step: int) -> dict[str, float]:
        _, _, restored = saved_run.load_model(config, tmp_path / "run", step, mesh1)
        seen.append(restored)
        return {"test/ap": step / 10}

    train.train(config, tmp_path / "run", mesh=mesh1, evaluate=evaluate)
    assert seen == [3, 6]
    lines = writer.read_metrics(tmp_path / "run")
    found = {x["step"]: x["eval/test/ap"] for x in lines if "eval/test/ap" in x}
    assert found == {3: 0.3, 6: 0.6}


def _stream(
    store: pathlib.Path, config: ExperimentConfig, mesh: Mesh
) -> pipeline.TrainStream:
    return pipeline.train_stream(
        sources.Store.open(store),
        config.data,
        base.Inputs(),
        batch_size=config.batch_size,
        seed=config.seed,
        mesh=mesh,
    )


@pytest.mark.parametrize("nan_loss", [False, True])
def test_fault_A28_A29_a_nan_stops_with_step_and_batch_ids(
    nan_loss: bool, store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    config = runs.scale_config(
        store, **{"method.nan_step": 5, "method.nan_loss": nan_loss}
    )
    with pytest.raises(divergence.Diverged, match=r"Step 6: .*grad_norm = nan"):
        train.train(config, tmp_path / "run", mesh=mesh1)
    dump = json.loads((tmp_path / "run" / "nan_dump" / "step_6.json").read_text())
    assert dump["scalars"]["grad_norm"] == "nan"
    assert math.isnan(float(dump["parameter_norms"]["net"]))
    stream = _stream(store, config, mesh1)
    found = [(row["uid"], row["slice_index"]) for row in dump["batch"]]
    assert found == stream.ids(5)
    subjects = {volume.uid: volume.subject for volume in stream.volumes}
    assert [row["subject"] for row in dump["batch"]] == [subjects[u] for u, _ in found]
    # What came before is finite and on record.
    steps = [line["step"] for line in writer.read_metrics(tmp_path / "run")]
    assert max(steps) == 5
    state = runs.final_state(config, tmp_path / "run", mesh1)
    assert state.step == 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("bad_step", [5, 6])
def test_fault_A28_a_nan_inside_a_call_of_two_steps_is_that_steps(
    bad_step: int,
    store: pathlib.Path,
    tmp_path: pathlib.Path,
    mesh1: Mesh,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train, "_steps_per_call", lambda config, mesh: 2)
    config = runs.scale_config(
        store, **{"method.nan_step": bad_step - 1, "train.log_every": 2}
    )
    with pytest.raises(divergence.Diverged, match=f"Step {bad_step}:"):
        train.train(config, tmp_path / "run", mesh=mesh1)
    path = tmp_path / "run" / "nan_dump" / f"step_{bad_step}.json"
    found = [
        (x["uid"], x["slice_index"]) for x in json.loads(path.read_text())["batch"]
    ]
    assert found == _stream(store, config, mesh1).ids(bad_step - 1)


def test_fault_A30_a_step_that_is_not_finite_is_never_a_checkpoint(
    store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    # The update that makes step 4 finds the NaN, and step 4 is to be saved.
    config = runs.scale_config(store, **{"method.nan_step": 3})
    with pytest.raises(divergence.Diverged, match="Step 4"):
        train.train(config, tmp_path / "run", mesh=mesh1)
    assert not checkpoint.Checkpoints(tmp_path / "run" / "checkpoints").steps()


def test_fault_A31_a_nan_never_is_the_best() -> None:
    record = members.Record()
    assert not record.validated(4, math.nan)
    assert record.validated(8, 2.0)
    assert not record.validated(12, math.nan)
    assert (record.best_step, record.since_best) == (8, 1)
    assert members.Record.saved(dataclasses.asdict(record)) == record


def test_fault_A34_another_config_does_not_go_on_with_this_run(
    store: pathlib.Path, finished: pathlib.Path, mesh1: Mesh
) -> None:
    config = runs.scale_config(store, **{"total_steps": 12, "method.noise": 0.5})
    with pytest.raises(workdir.WorkdirError, match=r"method\.noise: 0\.1 -> 0\.5"):
        train.train(config, finished, mesh=mesh1)


def test_fault_A35_a_workdir_that_cannot_be_written_fails_before_compiling(
    store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh, compiled: list[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(workdir.WorkdirError, match="cannot be written"):
        train.train(runs.scale_config(store), tmp_path / "file" / "run", mesh=mesh1)
    assert not compiled


def test_fault_A36_two_processes_do_not_train_in_one_workdir(
    store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    with (
        workdir.opened(tmp_path / "run"),
        pytest.raises(workdir.WorkdirError, match=r"in use by process \d+ on "),
    ):
        train.train(runs.scale_config(store), tmp_path / "run", mesh=mesh1)


def test_fault_A37_an_indivisible_batch_names_the_numbers(
    store: pathlib.Path, tmp_path: pathlib.Path, mesh8: Mesh
) -> None:
    config = runs.scale_config(store, batch_size=12)
    with pytest.raises(ValueError, match=r"12 cannot be split over 8 devices.*8 or 16"):
        train.train(config, tmp_path / "run", mesh=mesh8)
    assert not (tmp_path / "run").exists()


def test_fault_A38_out_of_memory_says_what_is_needed(
    store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    config = runs.scale_config(store, **{"method.temporary": 2**43})
    with pytest.raises(cost.OutOfDeviceMemory) as caught:
        train.train(config, tmp_path / "run", mesh=mesh1)
    text = str(caught.value)
    assert "batch_size = 8 on 1 device(s)" in text
    assert "needs about 3276" in text  # 2^43 float32 are 32,768 GiB
    assert "multiply method.accumulate_steps by 2" in text
    assert "RESOURCE_EXHAUSTED" in text
