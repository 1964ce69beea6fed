import os
import pathlib
import shutil
import socket
import subprocess
import sys
import textwrap

import pytest
from jax.sharding import Mesh

from tests import checkpoint_cases as cases
from uad_jax import checkpoint, integrity

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = checkpoint.Checkpoints(directory)
    checkpoints.save(1, cases.make_state(1), metrics={"loss": 1.0})
    checkpoints.save(2, cases.make_state(2), metrics={"loss": 2.0})
    checkpoints.close()
    return directory


@pytest.fixture
def saved(saved_once: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """Steps 1 and 2, to be damaged at will."""
    return pathlib.Path(shutil.copytree(saved_once, tmp_path / "checkpoints"))


def check_falls_back(directory: pathlib.Path, mesh: Mesh) -> None:
    """Step 2 is quarantined with its evidence, and step 1 is used."""
    evidence = {p.relative_to(directory / "2") for p in (directory / "2").rglob("*")}
    state, step = cases.restore(directory, mesh)
    assert step == 1
    cases.assert_equal(state, cases.make_state(1))
    bad = directory / "2.bad"
    assert {p.relative_to(bad) for p in bad.rglob("*")} == evidence
    assert not (directory / "2").exists()


@pytest.mark.parametrize("damage", ["delete", "truncate"])
def test_fault_A7_lost_data_falls_back(
    damage: str, saved: pathlib.Path, mesh1: Mesh, caplog: pytest.LogCaptureFixture
) -> None:
    biggest = max((saved / "2" / "d").iterdir(), key=lambda path: path.stat().st_size)
    if damage == "delete":
        biggest.unlink()
    else:
        biggest.write_bytes(biggest.read_bytes()[:-7])
    check_falls_back(saved, mesh1)
    warnings = [r for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    for part in (biggest.name, "kept as 2.bad", "step 1 is used instead"):
        assert part in warnings[0].getMessage()


def test_fault_A8_every_flipped_byte_is_detected(saved: pathlib.Path) -> None:
    step_dir = saved / "2"
    assert integrity.problems(step_dir) == []
    flips = 0
    for path in cases.files_of(step_dir):
        sound = path.read_bytes()
        for position in range(0, len(sound), max(1, len(sound) // 12)):
            for bit in (0x01, 0x20):
                damaged = bytearray(sound)
                damaged[position] ^= bit
                path.write_bytes(damaged)
                assert integrity.problems(step_dir), f"{path.name} byte {position}"
                flips += 1
        path.write_bytes(sound)
    assert flips > 300
    assert integrity.problems(step_dir) == []


def test_fault_A8_a_flipped_bit_falls_back(saved: pathlib.Path, mesh1: Mesh) -> None:
    biggest = max((saved / "2" / "d").iterdir(), key=lambda path: path.stat().st_size)
    damaged = bytearray(biggest.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    biggest.write_bytes(damaged)
    check_falls_back(saved, mesh1)


def test_fault_A8_a_damaged_step_asked_for_by_number_is_an_error(
    saved: pathlib.Path, mesh1: Mesh
) -> None:
    (saved / "1" / "note.json").write_text("{}")
    with pytest.raises(checkpoint.CheckpointError, match=r"note\.json has changed"):
        cases.restore(saved, mesh1, step=1)
    assert (saved / "1").exists()


@pytest.mark.parametrize(
    "name", ["_METADATA", "array_metadatas/process_0", "note.json"]
)
def test_fault_A9_garbled_metadata_falls_back(
    name: str, saved: pathlib.Path, mesh1: Mesh, caplog: pytest.LogCaptureFixture
) -> None:
    (saved / "2" / name).write_text('{"tree": [')
    check_falls_back(saved, mesh1)
    assert f"{name} has changed" in caplog.text


def test_fault_A9_garbled_only_checkpoint_is_one_typed_error(
    saved: pathlib.Path, mesh1: Mesh
) -> None:
    shutil.rmtree(saved / "1")
    (saved / "2" / "_METADATA").write_text("?")
    for _ in range(2):  # nothing is moved: the second start must not begin from zero
        with pytest.raises(
            checkpoint.CheckpointError, match=r"2: _METADATA has changed"
        ):
            cases.restore(saved, mesh1)


def test_fault_A10_a_step_without_a_manifest_is_incomplete(
    saved: pathlib.Path, mesh1: Mesh
) -> None:
    (saved / "2" / integrity.MANIFEST).unlink()
    assert checkpoint.Checkpoints(saved, read_only=True).latest() == 1
    check_falls_back(saved, mesh1)


def test_fault_A10_a_manifest_that_verifies_needs_no_marker(
    saved: pathlib.Path, mesh1: Mesh
) -> None:
    # As if it had been written by an Orbax that leaves no commit_success.txt.
    (saved / "2" / "commit_success.txt").unlink(missing_ok=True)
    integrity.write_manifest(saved / "2")
    _, step = cases.restore(saved, mesh1)
    assert step == 2


def test_fault_A11_an_empty_newest_directory_is_skipped(
    saved: pathlib.Path, mesh1: Mesh
) -> None:
    (saved / "7").mkdir()
    checkpoints = checkpoint.Checkpoints(saved)
    assert checkpoints.latest() == 2
    _, step = checkpoints.restore(cases.abstract_of(cases.make_state(), mesh1))
    assert step == 2
    assert checkpoints.save(7, cases.make_state(7), metrics=None)
    checkpoints.close()
    assert checkpoints.latest() == 7


def test_only_damaged_steps_never_look_like_a_fresh_start(saved: pathlib.Path) -> None:
    integrity.quarantine(saved / "1")
    integrity.quarantine(saved / "2")
    with pytest.raises(checkpoint.CheckpointError, match=r"only 1\.bad, 2\.bad"):
        checkpoint.Checkpoints(saved).latest()


def test_quarantine_keeps_earlier_evidence(saved: pathlib.Path) -> None:
    (saved / "2.bad").mkdir()
    assert integrity.quarantine(saved / "2").name == "2.bad.1"
    assert integrity.quarantined(saved) == ["2.bad", "2.bad.1"]


# A child saves step 1, waits, starts to save step 2, and dies as told.
_CHILD = """
import os, resource, signal, sys, time
import jax, jax.numpy as jnp
from tests import checkpoint_cases as cases
from uad_jax import checkpoint, integrity

directory, fate = sys.argv[1:]
checkpoints = checkpoint.Checkpoints(directory)
checkpoints.save(1, cases.make_state(1), metrics=None)
checkpoints.wait()
state = cases.make_state(2)
big = {"w": jax.random.normal(jax.random.key(0), (2_000_000,))}
state.model.params["big"] = jax.block_until_ready(big)

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if fate == "disk_full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    checkpoints.save(2, state, metrics=None)
    try:
        checkpoints.wait()
    except checkpoint.CheckpointError as error:
        print(error)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    )
    print("after the failure:", checkpoints.steps())
    checkpoints.save(3, cases.make_state(3), metrics=None)
    checkpoints.close()
    print("in the end:", checkpoints.steps())
else:
    if fate == "before_rename":
        integrity.sync_directory = die  # called when the manifest is written
    checkpoints.save(2, state, metrics=None)
    if fate == "before_rename":
        checkpoints.wait()
    time.sleep(float(fate))
    die()
"""


def start_child(directory: pathlib.Path, fate: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_CHILD), str(directory), fate],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_fault_A1_kill_9_during_a_save_leaves_the_last_complete_step(
    tmp_path: pathlib.Path, mesh1: Mesh, caplog: pytest.LogCaptureFixture
) -> None:
    fates = {"0": (1,), "0.05": (1, 2), "before_rename": (1,)}  # fate -> latest step
    children = {fate: start_child(tmp_path / fate, fate) for fate in fates}
    for fate, child in children.items():
        output, _ = child.communicate(timeout=120)
        assert child.returncode == -9, output
        directory = tmp_path / fate
        caplog.clear()
        left_over = [p.name for p in directory.iterdir() if ".saving" in p.name]
        checkpoints = checkpoint.Checkpoints(directory)
        latest = checkpoints.latest()
        assert left_over or fate != "before_rename"
        assert {p.name for p in directory.iterdir()} == {"1", str(latest)}
        assert latest in fates[fate]
        if latest == 1:
            with caplog.at_level("INFO", logger="absl"):  # whatever tests before set
                _, step = checkpoints.restore(
                    cases.abstract_of(cases.make_state(), mesh1)
                )
            assert step == 1
            restored = [r for r in caplog.messages if r.startswith("Restored step 1")]
            assert len(restored) == 1
        assert checkpoints.save(2, cases.make_state(2), metrics=None) == (latest == 1)
        checkpoints.close()
        assert checkpoints.steps() == [1, 2]
        assert sorted(p.name for p in directory.iterdir()) == ["1", "2"]


def test_fault_A6_a_full_disk_is_loud_and_harms_no_older_step(
    tmp_path: pathlib.Path,
) -> None:
    child = start_child(tmp_path, "disk_full")
    output, _ = child.communicate(timeout=120)
    assert child.returncode == 0, output
    assert f"Saving step 2 to {tmp_path} failed (" in output
    assert "bytes free there" in output
    assert "after the failure: [1]" in output
    assert "in the end: [1, 3]" in output


# Two processes save, lose the newest step, and fall back together.
_PEER = """
import pathlib, sys
import jax

directory, port, process = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(process))

from jax.experimental import multihost_utils
from tests import checkpoint_cases as cases
from uad_jax import checkpoint, mesh as mesh_lib

mesh = mesh_lib.make_mesh()
states = {step: cases.make_state(step, mesh=mesh) for step in (1, 2, 3)}
checkpoints = checkpoint.Checkpoints(directory)
for step, state in states.items():
    assert checkpoints.save(step, state, metrics={"loss": float(step)})
checkpoints.wait()
assert (checkpoints.steps(), checkpoints.best()) == ([1, 2, 3], 1)
multihost_utils.sync_global_devices("damage")
if process == "0":
    (pathlib.Path(directory) / "3" / "note.json").write_text("?")
restored, step = checkpoints.restore(cases.abstract_of(states[1], mesh))
assert step == 2, step
cases.assert_equal(restored, states[2])
assert not checkpoints.save(2, restored, metrics=None)
assert checkpoints.save(3, states[3], metrics=None)
checkpoints.close()
print(checkpoints.steps())
"""


@pytest.mark.slow
def test_two_processes_share_one_directory(tmp_path: pathlib.Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    peers = [
        subprocess.Popen(
            [sys.executable, "-c", _PEER, str(tmp_path), str(port), process],
            cwd=ROOT,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in ("0", "1")
    ]
    for peer in peers:
        output, _ = peer.communicate(timeout=120)
        assert peer.returncode == 0, output
        assert "[1, 2, 3]" in output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "3", "3.bad"]
