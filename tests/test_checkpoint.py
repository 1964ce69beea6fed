import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from tests import checkpoint_cases as cases
from uad_jax import checkpoint
from uad_jax import mesh as mesh_lib


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = checkpoint.Checkpoints(directory, keep=3)
    checkpoints.save(10, cases.make_state(10), metrics={"loss": 2.0})
    checkpoints.save(20, cases.make_state(20), metrics={"loss": 1.0})
    checkpoints.save(30, cases.make_state(30), metrics={"loss": 1.5})
    checkpoints.close()
    return directory


@pytest.fixture
def saved(saved_once: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """Steps 10, 20 (the best) and 30, to be changed at will."""
    return pathlib.Path(shutil.copytree(saved_once, tmp_path / "checkpoints"))


def test_restore_returns_every_leaf_typed(saved: pathlib.Path, mesh1: Mesh) -> None:
    state, step = cases.restore(saved, mesh1)
    assert step == 30
    cases.assert_equal(state, cases.make_state(30))
    state, step = cases.restore(saved, mesh1, step=10)
    assert step == 10
    cases.assert_equal(state, cases.make_state(10))


@pytest.mark.parametrize("ema", [True, False])
def test_restore_model_is_the_evaluation_view(
    ema: bool, tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    state = cases.make_state(4, ema=ema)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(4, state, metrics=None)
    abstract = cases.abstract_of(state, mesh1)
    model = checkpoints.restore_model(abstract.model, 4)
    checkpoints.close()
    cases.assert_equal(model, state.for_eval())
    averaged = model.params["encoder"]["head"]["bias"]
    assert float(averaged[0]) == (1.0 if ema else 0.0)


def test_restore_model_does_not_read_the_optimiser(
    saved: pathlib.Path, mesh1: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    read = checkpoint.leaves_lib.read

    def spy(step_dir: pathlib.Path, wanted: dict[str, jax.Array]) -> object:
        asked.extend(wanted)
        return read(step_dir, wanted)

    monkeypatch.setattr(checkpoint.leaves_lib, "read", spy)
    checkpoints = checkpoint.Checkpoints(saved, read_only=True)
    checkpoints.restore_model(cases.abstract_of(cases.make_state(), mesh1).model)
    checkpoints.close()
    assert "ema/encoder/stem/kernel" in asked
    assert "model/params/encoder/stem/kernel" not in asked
    assert not [path for path in asked if path.startswith("opt_state")]


def test_state_may_be_donated_right_after_save(
    tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    state = jax.device_put(
        {"big": jnp.arange(2_000_000, dtype=jnp.float32)}, mesh_lib.replicated(mesh1)
    )
    overwrite = jax.jit(
        lambda x: jax.tree.map(lambda y: y * 0 - 1, x), donate_argnums=0
    )
    checkpoints = checkpoint.Checkpoints(tmp_path)
    full = cases.make_state(1)
    full = type(full)(
        step=full.step,
        model=type(full.model)(params=state, collections={}),
        opt_state={},
    )
    abstract = cases.abstract_of(full, mesh1)
    checkpoints.save(1, full, metrics=None)
    jax.block_until_ready(overwrite(full))
    restored, _ = checkpoints.restore(abstract)
    checkpoints.close()
    np.testing.assert_array_equal(
        restored.model.params["big"], np.arange(2_000_000, dtype=np.float32)
    )


def test_best_survives_a_restart(saved: pathlib.Path) -> None:
    checkpoints = checkpoint.Checkpoints(saved, keep=1)
    assert (checkpoints.best(), checkpoints.latest()) == (20, 30)
    assert checkpoints.metrics(20) == {"loss": 1.0}
    checkpoints.save(40, cases.make_state(40), metrics={"loss": 3.0})
    checkpoints.close()
    assert checkpoint.Checkpoints(saved).steps() == [20, 40]


def test_retention_keeps_newest_best_and_multiples(tmp_path: pathlib.Path) -> None:
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2, keep_every=30)
    state = cases.make_state()
    losses = {10: 5.0, 20: 1.0, 30: 4.0, 40: 3.0, 50: 3.0, 60: 3.0, 70: 2.0}
    for step, loss in losses.items():
        assert checkpoints.save(step, state, metrics={"loss": loss})
    checkpoints.close()
    assert checkpoints.steps() == [20, 30, 60, 70]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["20", "30", "60", "70"]


def test_read_only_changes_nothing(saved: pathlib.Path, mesh1: Mesh) -> None:
    (saved / "30" / "note.json").write_text("{}")
    (saved / "40.saving").mkdir()
    before = sorted(str(p) for p in saved.rglob("*"))
    checkpoints = checkpoint.Checkpoints(saved, read_only=True)
    model = checkpoints.restore_model(
        cases.abstract_of(cases.make_state(), mesh1).model
    )
    cases.assert_equal(model, cases.make_state(20).for_eval())
    with pytest.raises(checkpoint.CheckpointError, match="read-only"):
        checkpoints.save(50, cases.make_state(), metrics=None)
    checkpoints.close()
    assert sorted(str(p) for p in saved.rglob("*")) == before


def test_nothing_saved_is_not_an_error_but_cannot_be_restored(
    tmp_path: pathlib.Path, mesh1: Mesh
) -> None:
    checkpoints = checkpoint.Checkpoints(tmp_path / "none", read_only=True)
    assert checkpoints.steps() == []
    assert checkpoints.latest() is None
    assert checkpoints.best() is None
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint"):
        checkpoints.restore(cases.abstract_of(cases.make_state(), mesh1))
    checkpoints.close()


def test_a_step_asked_for_must_exist(saved: pathlib.Path, mesh1: Mesh) -> None:
    with pytest.raises(checkpoint.CheckpointError, match=r"no step 25.*\[10, 20, 30\]"):
        cases.restore(saved, mesh1, step=25)


def test_fault_A12_foreign_names_are_ignored(saved: pathlib.Path, mesh1: Mesh) -> None:
    (saved / "notes.txt").write_text("mine")
    (saved / "best").mkdir()
    (saved / "99").write_text("a file, no step")
    (saved / "007").mkdir()
    state, step = cases.restore(saved, mesh1)
    assert step == 30
    cases.assert_equal(state, cases.make_state(30))
    assert (saved / "notes.txt").read_text() == "mine"
    assert (saved / "99").is_file()


def test_fault_A14_saving_the_same_step_is_refused_aloud(
    saved: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = checkpoint.Checkpoints(saved, keep=3)
    assert not checkpoints.save(30, cases.make_state(1), metrics=None)
    checkpoints.close()
    assert "Step 30 is saved already" in caplog.text


def test_fault_A14_rollback_deletes_newer_steps(
    saved: pathlib.Path, mesh1: Mesh, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = checkpoint.Checkpoints(saved, keep=3)
    state, _ = checkpoints.restore(cases.abstract_of(cases.make_state(), mesh1), 10)
    assert checkpoints.save(15, state, metrics=None)
    checkpoints.close()
    assert checkpoints.steps() == [10, 15]
    assert "Rollback to step 15 deletes step 30" in caplog.text


def test_fault_A15_another_structure_names_every_leaf(
    saved: pathlib.Path, mesh1: Mesh
) -> None:
    other = cases.make_state(ema=False)
    other.model.params["extra"] = {"w": jnp.zeros(2)}
    checkpoints = checkpoint.Checkpoints(saved)
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoints.restore(
            cases.abstract_of(other, mesh1), describe="method.width: 64 -> 96"
        )
    checkpoints.close()
    message = str(caught.value)
    assert "the model differs (method.width: 64 -> 96)" in message
    expected = "model/params/extra/w: expected (2,) float32, not in the checkpoint"
    assert expected in message
    assert "ema/encoder/stem/kernel: not in the model, found (4, 6) float32" in message
    assert "ema/encoder/head/bias: not in the model, found (4,) float32" in message
    assert checkpoints.steps() == [10, 20, 30]  # a misfit is no damage


def test_fault_A16_another_shape_names_every_leaf(
    saved: pathlib.Path, mesh1: Mesh
) -> None:
    wide = cases.abstract_of(cases.make_state(width=9), mesh1)
    checkpoints = checkpoint.Checkpoints(saved, read_only=True)
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoints.restore(wide)
    with pytest.raises(checkpoint.CheckpointError, match="the model differs"):
        checkpoints.restore_model(wide.model)
    checkpoints.close()
    lines = str(caught.value).splitlines()
    expected = "model/params/features/stem/scale: expected (9,) float32, found (6,)"
    assert any(expected in line for line in lines)
    # kernel in params, ema and both Adam moments; scale is frozen
    assert sum("expected" in line for line in lines) == 5


def test_fault_A17_another_dtype_is_refused_unless_cast(
    saved: pathlib.Path, mesh1: Mesh
) -> None:
    half = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x,
        cases.make_state(30),
    )
    abstract = cases.abstract_of(half, mesh1)
    checkpoints = checkpoint.Checkpoints(saved, read_only=True)
    with pytest.raises(checkpoint.CheckpointError, match=r"bfloat16, found .* float32"):
        checkpoints.restore(abstract)
    state, _ = checkpoints.restore(abstract, allow_cast=True)
    checkpoints.close()
    cases.assert_equal(state, half)


def _check_other_devices(directory: pathlib.Path, old: Mesh, new: Mesh) -> None:
    state = cases.make_state(3, mesh=old)
    checkpoints = checkpoint.Checkpoints(directory)
    checkpoints.save(3, state, metrics=None)
    abstract = cases.abstract_of(state, new)
    restored, _ = checkpoints.restore(abstract)
    model = checkpoints.restore_model(abstract.model)
    checkpoints.close()
    cases.assert_equal(restored, state)
    for leaf in [*jax.tree.leaves(restored), *jax.tree.leaves(model)]:
        assert leaf.sharding.device_set == set(new.devices.flat)


def test_fault_A18_saved_on_eight_devices_opens_on_one(
    tmp_path: pathlib.Path, mesh1: Mesh, mesh8: Mesh
) -> None:
    _check_other_devices(tmp_path, mesh8, mesh1)


def test_fault_A19_saved_on_one_device_fills_eight(
    tmp_path: pathlib.Path, mesh1: Mesh, mesh8: Mesh
) -> None:
    _check_other_devices(tmp_path, mesh1, mesh8)


def test_fault_A18_a_target_without_shardings_is_refused(saved: pathlib.Path) -> None:
    checkpoints = checkpoint.Checkpoints(saved, read_only=True)
    with pytest.raises(ValueError, match="no sharding"):
        checkpoints.restore(jax.eval_shape(cases.make_state))
    checkpoints.close()


@pytest.mark.parametrize("where", ["params", "ema", "collections"])
def test_fault_A30_not_finite_parameters_are_not_saved(
    where: str, tmp_path: pathlib.Path
) -> None:
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, cases.make_state(1), metrics={"loss": 1.0})
    bad = cases.make_state(2)
    assert bad.ema is not None
    tree = {
        "params": bad.model.params["encoder"]["head"],
        "ema": bad.ema["encoder"]["head"],
        "collections": bad.model.collections["features"]["batch_stats"]["stem"],
    }[where]
    name = next(iter(tree))
    tree[name] = tree[name].at[1].set(np.nan if where == "ema" else np.inf)
    with pytest.raises(
        checkpoint.CheckpointError, match=rf"NaN or Inf in 1 of .*{name}"
    ):
        checkpoints.save(2, bad, metrics={"loss": 0.5})
    checkpoints.close()
    assert (checkpoints.latest(), checkpoints.best()) == (1, 1)


def test_fault_A31_nan_is_never_best(tmp_path: pathlib.Path) -> None:
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=5)
    state = cases.make_state()
    for step, loss in enumerate([np.nan, 3.0, 2.0, np.nan, -np.inf]):
        checkpoints.save(step, state, metrics={"loss": loss})
    checkpoints.wait()
    assert checkpoints.best() == 2
    checkpoints.close()
    assert json.loads((tmp_path / "2" / "note.json").read_text())["metrics"]
