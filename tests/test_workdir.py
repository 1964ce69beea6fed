import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap

import pytest

from uad_jax import workdir

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_json_survives_a_round_trip(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "new" / "value.json"
    workdir.write_json(path, {"b": [1, 2.5], "a": None})
    assert workdir.read_json(path) == {"a": None, "b": [1, 2.5]}
    assert [p.name for p in path.parent.iterdir()] == ["value.json"]


def test_json_that_cannot_be_written_leaves_the_old_file(
    tmp_path: pathlib.Path,
) -> None:
    path = tmp_path / "value.json"
    workdir.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        workdir.write_json(path, {"a": 2, "b": object()})
    assert workdir.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def test_a_missing_or_damaged_file_is_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(workdir.WorkdirError, match=r"config\.json is missing"):
        workdir.read_json(path)
    path.write_text('{"a": ')
    with pytest.raises(workdir.WorkdirError, match=r"config\.json is damaged"):
        workdir.read_json(path)


def test_environment_has_versions_and_no_paths(tmp_path: pathlib.Path) -> None:
    workdir.write_environment(tmp_path)
    text = (tmp_path / "env.json").read_text()
    stored = json.loads(text)
    assert {"python", "packages", "device_kind", "commit", "xla_flags"} <= stored.keys()
    assert str(ROOT) not in text
    assert str(pathlib.Path.home()) not in text


def test_fault_A35_a_workdir_that_cannot_be_made_fails_at_once(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "run"
    with (
        pytest.raises(workdir.WorkdirError, match=re.escape(str(target))) as caught,
        workdir.opened(target),
    ):
        pytest.fail("the workdir was opened")
    assert "Use another --workdir" in str(caught.value)


def test_fault_A35_a_full_disk_fails_at_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(workdir.WorkdirError, match="No space left on device"):
        workdir.make_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_fault_A35_a_read_only_workdir_fails_at_once(tmp_path: pathlib.Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(workdir.WorkdirError, match="cannot be written"):
            workdir.make_writable(tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_fault_A36_a_second_run_on_a_workdir_is_kept_out(
    tmp_path: pathlib.Path,
) -> None:
    with workdir.opened(tmp_path):
        holder = json.loads((tmp_path / "lock").read_text())
        assert holder["pid"] == os.getpid()
        with (
            pytest.raises(workdir.WorkdirError, match="is in use by process") as caught,
            workdir.opened(tmp_path),
        ):
            pytest.fail("the workdir was opened twice")
        for part in (f"process {os.getpid()}", holder["host"], holder["since"]):
            assert part in str(caught.value)
    with workdir.opened(tmp_path):
        pass


_HOLD = """
import pathlib, sys, time
from uad_jax import workdir

with workdir.opened(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_fault_A36_another_process_keeps_us_out_until_it_is_killed(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_HOLD), str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with (
            pytest.raises(workdir.WorkdirError, match=f"process {child.pid} on"),
            workdir.opened(tmp_path),
        ):
            pytest.fail("the workdir was opened twice")
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=60)
    with workdir.opened(tmp_path):
        assert f"The lock of process {child.pid}" in caplog.text
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / "lock").read_text() == ""


CONFIG = {
    "type": "ExperimentConfig",
    "total_steps": 100,
    "seed": 0,
    "method": {"type": "AutoencoderConfig", "latent_size": 128},
    "train": {"type": "TrainConfig", "save_every": 50, "steps_per_call": 1},
    "evaluation": {"sets": {}},
    "data": {"num_workers": 0, "fold": 1},
}
FINGERPRINT = {"seed": 0, "recipe": "a1", "train": ["sub-1", "sub-2", "sub-3"]}


def changed(**dotted: object) -> dict[str, object]:
    config = json.loads(json.dumps(CONFIG))
    for name, value in dotted.items():
        *parents, last = name.split("__")
        target = config
        for parent in parents:
            target = target[parent]
        target[last] = value
    return config


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
    """The workdir of a run that has saved a step."""
    workdir.check_config(tmp_path, CONFIG)
    workdir.check_fingerprint(tmp_path, FINGERPRINT)
    (tmp_path / "checkpoints" / "50").mkdir(parents=True)
    return tmp_path


def test_before_the_first_checkpoint_everything_may_change(
    tmp_path: pathlib.Path,
) -> None:
    workdir.check_config(tmp_path, CONFIG)
    workdir.check_fingerprint(tmp_path, FINGERPRINT)
    assert workdir.check_config(tmp_path, changed(seed=1)) == {}
    assert workdir.check_fingerprint(tmp_path, {"seed": 1}) == {}
    assert workdir.read_json(tmp_path / "config.json")["seed"] == 1
    assert workdir.read_json(tmp_path / "data_fingerprint.json") == {"seed": 1}


def test_fault_A34_a_resumed_run_keeps_its_config(run: pathlib.Path) -> None:
    assert workdir.check_config(run, CONFIG) == {}
    other = changed(method__latent_size=64, seed=3, total_steps=200)
    with pytest.raises(workdir.WorkdirError) as caught:
        workdir.check_config(run, other)
    assert "method.latent_size: 128 -> 64" in str(caught.value)
    assert "seed: 0 -> 3" in str(caught.value)
    assert "total_steps" not in str(caught.value)
    assert workdir.read_json(run / "config.json") == CONFIG


def test_fault_A34_another_method_is_another_run(run: pathlib.Path) -> None:
    other = changed(method={"type": "DDPMConfig", "channels": 32})
    with pytest.raises(workdir.WorkdirError, match=r"AutoencoderConfig.*DDPMConfig"):
        workdir.check_config(run, other)


def test_fault_A34_allowed_changes_are_logged_and_stored(
    run: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = changed(
        total_steps=200,
        train__save_every=10,
        train__steps_per_call=2,
        data__num_workers=2,
        evaluation={"sets": {"brats21": {"split": "test"}}},
    )
    changes = workdir.check_config(run, other)
    assert changes["total_steps"] == "100 -> 200"
    assert set(changes) == {
        "total_steps",
        "train.save_every",
        "train.steps_per_call",
        "data.num_workers",
        "evaluation.sets.brats21",
    }
    assert "train.steps_per_call: 1 -> 2 (the run is then no longer" in caplog.text
    assert workdir.read_json(run / "config.json") == other


def test_fault_A22_changed_data_stop_a_resumed_run(
    run: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    new = {"seed": 0, "recipe": "b2", "train": ["sub-1", "sub-3", "sub-4", "sub-5"]}
    assert workdir.check_fingerprint(run, FINGERPRINT) == {}
    with pytest.raises(workdir.WorkdirError) as caught:
        workdir.check_fingerprint(run, new)
    message = str(caught.value)
    assert 'recipe: "a1" -> "b2"' in message
    assert (
        'train: 3 -> 4 entries; gone: ["sub-2"]; added: ["sub-4", "sub-5"]' in message
    )
    assert "--accept_data_change" in message
    assert workdir.read_json(run / "data_fingerprint.json") == FINGERPRINT
    changes = workdir.check_fingerprint(run, new, accept_change=True)
    assert set(changes) == {"recipe", "train"}
    assert "The training data of the run change" in caplog.text
    assert workdir.check_fingerprint(run, new) == {}


def test_fault_A22_another_order_is_another_data_set(run: pathlib.Path) -> None:
    turned = {**FINGERPRINT, "train": ["sub-2", "sub-1", "sub-3"]}
    with pytest.raises(workdir.WorkdirError, match="another order"):
        workdir.check_fingerprint(run, turned)


def test_difference_compares_as_json_does() -> None:
    assert (
        workdir.difference({"a": (1, 2), "b": {3: 4}}, {"a": [1, 2], "b": {"3": 4}})
        == {}
    )
    assert workdir.difference({"a": float("nan")}, {"a": float("nan")}) == {}
    assert workdir.difference({"a": 1}, {"a": 1.0}) == {}
    assert workdir.difference({"a": 1}, {"b": 1}) == {
        "a": "1 -> (absent)",
        "b": "(absent) -> 1",
    }
