"""Evaluating many checkpoints, and a run that still trains."""

import csv
import hashlib
import json
import pathlib
import shutil
import threading
import time
from collections.abc import Iterator
from unittest import mock

import jax
import pytest
from jax.sharding import Mesh

from tests import runs, stores
from uad_jax import by_step, evaluate, train
from uad_jax import workdir as workdir_lib
from uad_jax.config import ExperimentConfig

Trained = tuple[ExperimentConfig, pathlib.Path]
TEN = {
    "total_steps": 10,
    "train.eval_every": 1,
    "train.save_every": 1,
    "train.keep_checkpoints": 10,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, mesh1: Mesh) -> Trained:
    """A run with ten checkpoints."""
    folder = tmp_path_factory.mktemp("by_step")
    config = runs.smoke_config(stores.tiny_store(folder), **TEN)
    train.train(config, folder / "run", mesh=mesh1, progress=False)
    return config, folder / "run"


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Names of what the backend compiles, or takes from its cache, from here on."""
    events: list[str] = []

    def listen(name: str, seconds: float, **_: object) -> None:
        if name == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def _hashes(folder: pathlib.Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _rows(workdir: pathlib.Path) -> list[dict[str, str]]:
    with (workdir / "results" / by_step.FILE).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_ten_checkpoints_are_evaluated_with_what_the_first_compiled(
    trained: Trained, tmp_path: pathlib.Path, mesh1: Mesh, compiled: list[str]
) -> None:
    config, workdir = trained
    shutil.copytree(workdir, tmp_path / "run")
    before = _hashes(tmp_path / "run")
    evaluated = evaluate.evaluate_set
    counts = []

    def counted(*given: object, **options: object) -> dict:
        found = evaluated(*given, **options)
        counts.append(len(compiled))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "evaluate_set", counted)
        rows = by_step.evaluate_steps(
            config, tmp_path / "run", mesh=mesh1, progress=False
        )
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert counts[0] > 0
    assert counts[-1] == counts[0]  # nine more checkpoints, nothing more to compile
    after = _hashes(tmp_path / "run")
    new = {name.split("/")[0] for name in after.keys() - before.keys()}
    assert new == {"results", "calibration"}
    assert {name: after[name] for name in before} == before


def test_rows_are_those_of_the_full_evaluation(trained: Trained, mesh1: Mesh) -> None:
    config, workdir = trained
    by_step.evaluate_steps(config, workdir, steps="4:6", mesh=mesh1, progress=False)
    rows = _rows(workdir)
    assert [row["step"] for row in rows] == ["4", "5", "6"]
    whole = evaluate.evaluate(config, workdir, step=5, mesh=mesh1, progress=False)
    expected = whole["test"]["scorers"]["smoke"]
    assert float(rows[1]["ap_pooled"]) == expected["ap_pooled"]
    name = "dice_healthy_fpr_volume_mean"
    assert float(rows[1][name]) == expected[name]
    assert rows[1]["slices_seen"] == str(5 * config.batch_size)
    assert float(rows[1]["validation_loss"]) > 0
    assert float(rows[2]["train_seconds"]) >= float(rows[0]["train_seconds"])


def test_rows_that_are_there_are_kept_and_the_others_added(
    trained: Trained, mesh1: Mesh
) -> None:
    config, workdir = trained
    by_step.evaluate_steps(config, workdir, steps="2:3", mesh=mesh1, progress=False)
    path = workdir / "results" / by_step.FILE
    evaluated = []
    with pytest.MonkeyPatch.context() as patch:
        whole = evaluate.evaluate_set

        def seen(context: by_step.Context, *given: object, **options: object) -> dict:
            evaluated.append(context.step)
            return whole(context, *given, **options)

        patch.setattr(evaluate, "evaluate_set", seen)
        by_step.evaluate_steps(config, workdir, steps="2:4", mesh=mesh1, progress=False)
        assert 2 not in evaluated
        assert 3 not in evaluated
        text = path.read_text()
        path.write_text(text.replace(_rows(workdir)[0]["evaluation"], "0"))
        evaluated.clear()
        by_step.evaluate_steps(config, workdir, steps="2:3", mesh=mesh1, progress=False)
        assert evaluated == [2]  # that row was of something else
        path.write_text("step\nnonsense")
        evaluated.clear()
        by_step.evaluate_steps(config, workdir, steps="3:3", mesh=mesh1, progress=False)
        assert evaluated == [3]


def test_another_rate_makes_other_rows(
    trained: Trained, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    config, workdir = trained
    without = shutil.ignore_patterns("results")
    shutil.copytree(workdir, tmp_path / "run", ignore=without)
    options = {"steps": "3:3", "mesh": mesh1, "progress": False}
    name = "dice_healthy_fpr_volume_mean"
    (before,) = by_step.evaluate_steps(config, tmp_path / "run", **options)
    strict = runs.smoke_config(
        pathlib.Path(config.data.store), **TEN, **{"evaluation.healthy_fpr": 0.3}
    )
    (after,) = by_step.evaluate_steps(strict, tmp_path / "run", **options)
    assert float(after[name]) != float(before[name])


def test_a_watcher_follows_a_run_to_its_end(
    trained: Trained, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    config, _ = trained
    workdir = tmp_path / "run"
    first = threading.Event()

    def evaluated(step: int) -> dict[str, float]:
        first.set()
        return {}

    config = runs.smoke_config(
        pathlib.Path(config.data.store), **TEN, **{"train.evaluate_every": 1}
    )
    found: list[by_step.Row] = []

    def watch() -> None:
        first.wait(120)
        found.extend(
            by_step.evaluate_steps(
                config,
                workdir,
                watch=True,
                poll_seconds=0.1,
                mesh=mesh1,
                progress=False,
            )
        )

    watcher = threading.Thread(target=watch)
    watcher.start()
    train.train(config, workdir, mesh=mesh1, progress=False, evaluate=evaluated)
    watcher.join(180)
    assert [row["step"] for row in found] == list(range(1, 11))


def _half(workdir: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a run as it was after five of its ten steps, its lock not given back."""
    shutil.copytree(workdir, target, ignore=shutil.ignore_patterns("results"))
    for step in range(6, 11):
        shutil.rmtree(target / "checkpoints" / str(step))
    note = {"host": "here", "pid": 1, "since": "yesterday"}
    (target / workdir_lib.LOCK).write_text(json.dumps(note))


def test_a_watcher_of_a_run_that_died_ends_and_says_so(
    trained: Trained, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    config, workdir = trained
    _half(workdir, tmp_path / "run")
    options = {"watch": True, "poll_seconds": 0.05, "grace_seconds": 0.3}
    options |= {"mesh": mesh1, "progress": False}
    with mock.patch.object(by_step.logging, "warning") as warned:
        rows = by_step.evaluate_steps(config, tmp_path / "run", **options)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    (said,) = [call.args[0] % call.args[1:] for call in warned.call_args_list]
    assert f"trained in {tmp_path / 'run'} for 0.005 minutes" in said
    assert "step 5 of 10" in said
    with pytest.raises(ValueError, match=r"within --steps=7:; there are \[1, 2"):
        by_step.evaluate_steps(config, tmp_path / "run", steps="7:", **options)


def test_a_watcher_waits_as_long_as_a_process_holds_the_run(
    trained: Trained, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    config, workdir = trained
    _half(workdir, tmp_path / "run")
    ended = threading.Event()

    def watch() -> None:
        by_step.evaluate_steps(
            config,
            tmp_path / "run",
            steps="5:",
            watch=True,
            poll_seconds=0.05,
            grace_seconds=0.1,
            mesh=mesh1,
            progress=False,
        )
        ended.set()

    with workdir_lib.opened(tmp_path / "run"):
        watcher = threading.Thread(target=watch)
        watcher.start()
        evaluated = tmp_path / "run" / "results" / by_step.FILE
        while watcher.is_alive() and not evaluated.exists():
            time.sleep(0.05)
        watcher.join(1.0)
        assert watcher.is_alive()
    watcher.join(180)
    assert ended.is_set()


def test_a_step_that_the_run_deletes_is_passed_over(
    trained: Trained, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    config, workdir = trained
    without = shutil.ignore_patterns("results")
    shutil.copytree(workdir, tmp_path / "run", ignore=without)
    scorer = evaluate.model_scorer

    def late(run: by_step.SavedRun, step: int, compiled: by_step.Program) -> object:
        if step == 2:
            shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
        return scorer(run, step, compiled)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "model_scorer", late)
        rows = by_step.evaluate_steps(
            config, tmp_path / "run", steps=":3", mesh=mesh1, progress=False
        )
    assert [row["step"] for row in rows] == [1, 3]


@pytest.mark.parametrize("steps", ["some", "5", "a:b", "-3:4"])
def test_steps_that_cannot_be_read_are_refused(steps: str) -> None:
    with pytest.raises(ValueError, match=r"neither 'all' nor 'A:B'"):
        by_step.parse(steps)


def test_steps_are_read_with_both_ends_included() -> None:
    assert by_step.parse("all") == (0, float("inf"))
    assert by_step.parse("10:20") == (10, 20)
    assert by_step.parse(":20") == (0, 20)
    assert by_step.parse("10:") == (10, float("inf"))


def test_no_checkpoint_in_the_range_is_an_error(trained: Trained, mesh1: Mesh) -> None:
    config, workdir = trained
    with pytest.raises(ValueError, match=r"within --steps=50:; there are \[1, 2"):
        by_step.evaluate_steps(config, workdir, steps="50:", mesh=mesh1)


def test_figures_of_two_protocols_are_two_tables() -> None:
    row = {"step": 5, "validation_loss": 0.5, "ap_pooled": 0.25, "ap_volume_mean": 0.75}
    first = {**row, "set": "test", "protocol": "behrendt"}
    second = {**row, "set": "test_baur", "protocol": "baur", "ap_pooled": 0.125}
    one, other = by_step.render([first, second, {**first, "step": 6}]).split("\n\n")
    assert one.splitlines()[0] == "Protocol behrendt"
    assert len(one.splitlines()) == 5
    assert "0.125" not in one
    assert other.splitlines()[0] == "Protocol baur"
    assert "0.125" in other
    assert by_step.render([first]).startswith("Protocol behrendt\nset")
