import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from tests import runs, stores
from uad_jax import (
    checkpoint,
    divergence,
    ensembles,
    programs,
    train,
    train_ensemble,
    workdir,
    writer,
)
from uad_jax.config import ExperimentConfig, WarmStart


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return stores.tiny_store(tmp_path_factory.mktemp("ensemble"))


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return stores.folded_store(tmp_path_factory.mktemp("folded"))


def _ensemble(
    config: ExperimentConfig,
    text: str,
    directory: pathlib.Path,
    mesh: Mesh,
    **more: Any,
) -> dict[str, Any]:
    axis = ensembles.parse(text, config)
    return train_ensemble.train_ensemble(config, axis, directory, mesh=mesh, **more)


def _close(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b
    )


def _lines(directory: pathlib.Path) -> list[dict[str, float]]:
    """The metrics without those of the clock."""
    return [
        {name: x for name, x in line.items() if not name.startswith("perf/")}
        for line in writer.read_metrics(directory)
    ]


def _like_separate_runs(
    config: Callable[..., ExperimentConfig],
    text: str,
    tmp_path: pathlib.Path,
    mesh: Mesh,
    **tolerance: float,
) -> None:
    """Trains an ensemble and each member on its own: state, metrics, best step."""
    axis = ensembles.parse(text, config())
    _ensemble(config(), text, tmp_path / "all", mesh)
    ends = []
    for folder, value in zip(axis.folders, axis.values, strict=True):
        own = config(**{axis.field: value})
        train.train(own, tmp_path / folder, mesh=mesh)
        ours = runs.final_state(own, tmp_path / "all" / folder, mesh)
        alone = runs.final_state(own, tmp_path / folder, mesh)
        _close(ours, alone, **tolerance)
        for a, b in zip(
            _lines(tmp_path / "all" / folder), _lines(tmp_path / folder), strict=True
        ):
            _close(a, b, **{"rtol": 1e-3, **tolerance})
        best = [
            checkpoint.Checkpoints(path / folder / "checkpoints", read_only=True).best()
            for path in (tmp_path / "all", tmp_path)
        ]
        assert best[0] == best[1] is not None
        stored = workdir.read_json(tmp_path / "all" / folder / workdir.CONFIG)
        assert stored == workdir.read_json(tmp_path / folder / workdir.CONFIG)
        ends.append(ours)
    for other in ends[1:]:
        with pytest.raises(AssertionError):
            _close(other.model, ends[0].model, rtol=1e-4)


def test_members_of_several_seeds_are_the_separate_runs(
    store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    def config(**options: Any) -> ExperimentConfig:
        return runs.scale_config(
            store, **{"data.placement": "stream", "seed": 3, **options}
        )

    _like_separate_runs(config, "seed:3", tmp_path, mesh1)
    assert workdir.read_json(tmp_path / "all" / workdir.ENSEMBLE)["values"] == [3, 4, 5]


def test_members_of_several_folds_are_the_separate_runs_on_eight_devices(
    folded: pathlib.Path, tmp_path: pathlib.Path, mesh8: Mesh
) -> None:
    def config(**options: Any) -> ExperimentConfig:
        return runs.scale_config(
            folded,
            **{"data.placement": "device", "train.validation_slices": 0} | options,
        )

    _like_separate_runs(config, "fold:3", tmp_path, mesh8)
    seen = [
        set(
            workdir.read_json(tmp_path / f"all/fold-{n}/{workdir.FINGERPRINT}")[
                "subjects"
            ]
        )
        for n in range(3)
    ]
    assert [len(one) for one in seen] == [5, 5, 4]


def test_members_of_several_values_of_a_field_are_the_separate_runs(
    store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    def config(**options: Any) -> ExperimentConfig:
        return runs.scale_config(store, **options)

    text = "method.optimizer.learning_rate:0.003,0.01"
    _like_separate_runs(config, text, tmp_path, mesh1)
    folder = tmp_path / "all" / "learning_rate-0.003"
    assert workdir.read_json(folder / workdir.CONFIG)["method"]["optimizer"][
        "learning_rate"
    ] == pytest.approx(0.003)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["seed:5", "method.kl_weight:0.1,10", "method.dropout:0,0.5"]
)
def test_members_of_a_vae_are_the_separate_runs(
    text: str, store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    def config(**options: Any) -> ExperimentConfig:
        return runs.smoke_config(store, **options)

    _like_separate_runs(config, text, tmp_path, mesh1, rtol=2e-3, atol=3e-5)


@pytest.fixture(scope="module")
def vaes(
    store: pathlib.Path, tmp_path_factory: pytest.TempPathFactory, mesh1: Mesh
) -> pathlib.Path:
    """Two VAEs with EMA, dropout and clipping, of seeds 0 and 1, after 12 steps."""
    directory = tmp_path_factory.mktemp("vaes") / "run"
    config = runs.smoke_config(store, total_steps=12)
    results = _ensemble(config, "seed:2", directory, mesh1)
    assert {one.stopped for one in results.values()} == {"done"}
    return directory


def test_a_vae_of_an_ensemble_is_the_one_trained_alone(
    vaes: pathlib.Path, store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    config = runs.smoke_config(store, total_steps=12, seed=1)
    train.train(config, tmp_path, mesh=mesh1)
    ours = runs.final_state(config, vaes / "seed-1", mesh1)
    alone = runs.final_state(config, tmp_path, mesh1)
    assert ours.ema is not None
    _close(ours, alone, rtol=2e-3, atol=3e-5)
    for a, b in zip(_lines(vaes / "seed-1"), _lines(tmp_path), strict=True):
        _close(a, b, rtol=1e-3)
    other = runs.final_state(config, vaes / "seed-0", mesh1)
    with pytest.raises(AssertionError):
        _close(other.model, alone.model, rtol=0.1, atol=1e-2)


def test_scanned_steps_of_members_are_those_of_single_steps(
    store: pathlib.Path,
    tmp_path: pathlib.Path,
    mesh1: Mesh,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = runs.scale_config(store, **{"train.log_every": 2})
    _ensemble(config, "seed:2", tmp_path / "single", mesh1)
    monkeypatch.setattr(programs, "steps_per_call", lambda wanted, mesh: 2)
    for placement in ("stream", "device"):
        config = runs.scale_config(
            store, **{"train.log_every": 2, "data.placement": placement}
        )
        _ensemble(config, "seed:2", tmp_path / placement, mesh1)
        for folder in ("seed-0", "seed-1"):
            _close(
                runs.final_state(config, tmp_path / placement / folder, mesh1),
                runs.final_state(config, tmp_path / "single" / folder, mesh1),
            )


class _Killed(BaseException):
    """Stands for a signal that nobody catches."""


def _killed_at(
    step: int,
    member: str,
    config: ExperimentConfig,
    directory: pathlib.Path,
    mesh: Mesh,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kills an ensemble of two while it saves, and goes on with it to the end."""
    save = checkpoint.Checkpoints.save

    def killed(self: checkpoint.Checkpoints, at: int, *args: Any, **kw: Any) -> bool:
        if at == step and self.directory.parent.name == member:
            raise _Killed
        return save(self, at, *args, **kw)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", killed)
    with pytest.raises(_Killed):
        _ensemble(config, "seed:2", directory, mesh)
    monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
    results = _ensemble(config, "seed:2", directory, mesh)
    assert {one.stopped for one in results.values()} == {"done"}


def _assert_the_same_bits(
    config: ExperimentConfig, a: pathlib.Path, b: pathlib.Path, mesh: Mesh
) -> None:
    for folder in ("seed-0", "seed-1"):
        runs.assert_equal(
            runs.final_state(config, a / folder, mesh),
            runs.final_state(config, b / folder, mesh),
        )
        assert _lines(a / folder) == _lines(b / folder)


def test_vaes_killed_between_two_saves_go_on_to_the_same_bits(
    vaes: pathlib.Path,
    store: pathlib.Path,
    tmp_path: pathlib.Path,
    mesh1: Mesh,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = runs.smoke_config(store, total_steps=12, **{"train.keep_checkpoints": 1})
    _killed_at(8, "seed-1", config, tmp_path / "run", mesh1, monkeypatch)
    _assert_the_same_bits(config, tmp_path / "run", vaes, mesh1)


@pytest.mark.parametrize(("step", "member"), [(4, "seed-1"), (12, "seed-0")])
def test_an_ensemble_killed_in_its_first_or_last_save_goes_on_to_the_same_bits(
    step: int,
    member: str,
    store: pathlib.Path,
    tmp_path: pathlib.Path,
    mesh1: Mesh,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = runs.scale_config(store, total_steps=12, **{"train.keep_checkpoints": 1})
    _ensemble(config, "seed:2", tmp_path / "whole", mesh1)
    _killed_at(step, member, config, tmp_path / "run", mesh1, monkeypatch)
    again = "begin again at step 0: seed-0 saved step 4, and seed-1 nothing"
    assert (again in caplog.text) == (step == 4)
    _assert_the_same_bits(config, tmp_path / "run", tmp_path / "whole", mesh1)


def test_a_member_out_of_patience_ends_where_it_would_alone(
    store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    def config(rate: float = 0.01, total: int = 16) -> ExperimentConfig:
        return runs.scale_config(
            store,
            **{
                "method.optimizer.learning_rate": rate,
                "train.patience": 1,
                "train.eval_every": 2,
                "total_steps": total,
            },
        )

    text = "method.optimizer.learning_rate:0.01,3.0"
    results = _ensemble(config(total=10), text, tmp_path / "run", mesh1)
    assert results["learning_rate=0.01"].stopped == "done"
    ended = results["learning_rate=3.0"]
    alone = train.train(config(3.0), tmp_path / "alone", mesh=mesh1)
    assert (ended.step, ended.stopped) == (alone.step, "patience")
    assert alone.step < 10
    longer = _ensemble(config(), text, tmp_path / "run", mesh1)
    assert longer["learning_rate=0.01"].step == 16
    assert longer["learning_rate=3.0"].step == ended.step
    folder = tmp_path / "run" / "learning_rate-3.0"
    _close(
        runs.final_state(config(3.0), folder, mesh1),
        runs.final_state(config(3.0), tmp_path / "alone", mesh1),
    )
    assert _lines(folder)[-1]["step"] == alone.step


def test_a_finished_ensemble_says_so(
    store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    config = runs.scale_config(store)
    first = _ensemble(config, "seed:2", tmp_path, mesh1)
    assert [one.step for one in first.values()] == [8, 8]
    before = (tmp_path / "seed-1" / writer.METRICS).read_bytes()
    assert list(_ensemble(config, "seed:2", tmp_path, mesh1)) == ["seed=0", "seed=1"]
    assert (tmp_path / "seed-1" / writer.METRICS).read_bytes() == before


def test_more_members_take_no_more_programs(
    store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    compiled: list[str] = []

    def listen(event: str, seconds: float, **kwargs: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    config = runs.scale_config(store, total_steps=4)
    jax.monitoring.register_event_duration_secs_listener(listen)
    counts = []
    for number in (2, 4):
        jax.clear_caches()  # what other tests have compiled counts for neither
        compiled.clear()
        _ensemble(config, f"seed:{number}", tmp_path / f"{len(counts)}", mesh1)
        counts.append(len(compiled))
    jax.monitoring.unregister_event_duration_listener(listen)
    assert counts[0] == counts[1] > 0


def test_every_member_is_warm_started(
    vaes: pathlib.Path, store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    config = runs.smoke_config(
        store, total_steps=1, **{"method.optimizer.learning_rate": 1e-12}
    )
    config.train.warm_start = [WarmStart(workdir=str(vaes / "seed-1"), step=12)]
    _ensemble(config, "seed:7,8", tmp_path, mesh1)
    expected = runs.final_state(config, vaes / "seed-1", mesh1).for_eval().params
    for seed in (7, 8):
        found = runs.final_state(config, tmp_path / f"seed-{seed}", mesh1)
        _close(found.model.params, expected)


def test_a_diverging_member_is_named(
    store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    config = runs.scale_config(store)
    with pytest.raises(
        divergence.Diverged, match=r"^noise=1e\+30: Step 1: .*begin without noise=1e"
    ):
        _ensemble(config, "method.noise:0.1,1e30", tmp_path, mesh1)
    note = json.loads((tmp_path / "noise-1e+30/nan_dump/step_1.json").read_text())
    assert note["batch"][0]["subject"].startswith("train-")


def test_full_evaluations_become_metrics_of_each_member(
    store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    asked = []

    def evaluate(config: ExperimentConfig, folder: pathlib.Path, step: int) -> dict:
        asked.append((config.seed, folder.name, step))
        return {"test/ap": 0.5 + config.seed}

    config = runs.scale_config(store, **{"train.evaluate_every": 4})
    _ensemble(config, "seed:2", tmp_path, mesh1, evaluate=evaluate)
    assert asked == [
        (0, "seed-0", 4),
        (1, "seed-1", 4),
        (0, "seed-0", 8),
        (1, "seed-1", 8),
    ]
    lines = writer.read_metrics(tmp_path / "seed-1")
    assert [x["eval/test/ap"] for x in lines if "eval/test/ap" in x] == [1.5, 1.5]


def test_a_value_that_turns_a_part_off_is_refused(
    store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    config = runs.smoke_config(store)
    for text in ("method.ema_decay:0,0.9", "method.optimizer.clip_norm:0,1"):
        with pytest.raises(ValueError, match=r"=0\.0 alone has another train state"):
            _ensemble(config, text, tmp_path / text[7:10], mesh1)


def test_a_single_run_and_an_ensemble_do_not_share_a_directory(
    store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    config = runs.scale_config(store)
    train.train(config, tmp_path / "one", mesh=mesh1)
    with pytest.raises(workdir.WorkdirError, match="holds a single run"):
        _ensemble(config, "seed:2", tmp_path / "one", mesh1)
    _ensemble(config, "seed:2", tmp_path / "two", mesh1)
    with pytest.raises(
        workdir.WorkdirError, match=r"holds an ensemble.*seed-0, seed-1"
    ):
        train.train(config, tmp_path / "two", mesh=mesh1)
    with pytest.raises(workdir.WorkdirError, match="begun with the members seed=0, "):
        _ensemble(config, "seed:3", tmp_path / "two", mesh1)
    # A member is an ordinary run, which has ended.
    config.seed = 1
    assert train.train(config, tmp_path / "two" / "seed-1", mesh=mesh1).step == 8


def test_members_without_a_step_in_common_are_refused(
    store: pathlib.Path, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    config = runs.scale_config(store)
    _ensemble(config, "seed:2", tmp_path, mesh1)
    for path in (tmp_path / "seed-1" / train.CHECKPOINTS).iterdir():
        path.rename(tmp_path / path.name)
    with pytest.raises(
        checkpoint.CheckpointError, match=r"seed-0: \[4, 8\], seed-1: no"
    ):
        _ensemble(config, "seed:2", tmp_path, mesh1)
