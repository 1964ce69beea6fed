import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from tests import checkpoint_cases as cases
from uad_jax import checkpoint, warm_start
from uad_jax.types import TrainState


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run with steps 5 (the best) and 6."""
    workdir = tmp_path_factory.mktemp("source")
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints")
    checkpoints.save(5, cases.make_state(5), metrics={"loss": 1.0})
    checkpoints.save(6, cases.make_state(6), metrics={"loss": 2.0})
    checkpoints.close()
    return workdir


def renamed(state: TrainState) -> TrainState:
    """The same model, its networks called backbone/encoder and prior."""
    model = dataclasses.replace(
        state.model,
        params={
            "student": {"backbone": state.model.params["encoder"]},
            "prior": state.model.params["features"],
        },
        collections={"prior": state.model.collections["features"]},
    )
    return dataclasses.replace(state, model=model, ema=None)


def test_everything_is_taken_with_averages(source: pathlib.Path, mesh1: Mesh) -> None:
    target = cases.make_state(0)
    state, fresh = warm_start.warm_start(target, [(source, -1, "", "")], mesh1)
    assert fresh == []
    best = cases.make_state(5)
    cases.assert_equal(state.model, best.for_eval())
    cases.assert_equal(state.ema, best.ema)
    assert int(state.step) == 0
    cases.assert_equal(state.opt_state, target.opt_state)


def test_a_step_and_the_checkpoint_directory_may_be_given(
    source: pathlib.Path, mesh1: Mesh
) -> None:
    entries = [(str(source / "checkpoints"), 6, "", "")]
    state, _ = warm_start.warm_start(cases.make_state(0), entries, mesh1)
    cases.assert_equal(state.model, cases.make_state(6).for_eval())


def test_prefixes_move_networks_with_their_collections(
    source: pathlib.Path, mesh1: Mesh
) -> None:
    target = renamed(cases.make_state(0))
    entries = [
        (source, 5, "encoder/stem", "student/backbone/stem"),
        (source, 5, "features", "prior"),
    ]
    state, fresh = warm_start.warm_start(target, entries, mesh1)
    expected = renamed(cases.make_state(5))
    taken = cases.make_state(5).for_eval().params["encoder"]["stem"]
    student = state.model.params["student"]["backbone"]
    cases.assert_equal(student["stem"], taken)
    cases.assert_equal(state.model.params["prior"], expected.model.params["prior"])
    cases.assert_equal(state.model.collections, expected.model.collections)
    assert fresh == ["model/params/student/backbone/head/bias"]
    cases.assert_equal(
        student["head"], target.model.params["student"]["backbone"]["head"]
    )


def test_what_stays_fresh_is_named_by_module(
    source: pathlib.Path, mesh1: Mesh, caplog: pytest.LogCaptureFixture
) -> None:
    entries = [(source, 5, "features", "features")]
    with caplog.at_level("INFO", logger="absl"):
        _, fresh = warm_start.warm_start(cases.make_state(0), entries, mesh1)
    assert len(fresh) > 1
    assert f"Warm start leaves {len(fresh)} leaves fresh: encoder" in caplog.messages
    entries = [(source, 5, "encoder/stem", "encoder/stem")]
    with caplog.at_level("INFO", logger="absl"):
        _, fresh = warm_start.warm_start(cases.make_state(0), entries, mesh1)
    assert caplog.messages[-1].endswith("fresh: encoder/head, features")


def test_a_part_below_a_network_takes_its_statistics(
    source: pathlib.Path, mesh1: Mesh
) -> None:
    entries = [(source, 5, "features/stem", "features/stem")]
    state, fresh = warm_start.warm_start(cases.make_state(0), entries, mesh1)
    cases.assert_equal(state.model.collections, cases.make_state(5).model.collections)
    assert len(fresh) == 2
    assert all(path.startswith("model/params/encoder/") for path in fresh)


def test_a_prefix_matches_whole_names_only(source: pathlib.Path, mesh1: Mesh) -> None:
    with pytest.raises(ValueError, match=r"under 'enc'.*encoder, features"):
        warm_start.warm_start(cases.make_state(0), [(source, 5, "enc", "enc")], mesh1)


def test_all_misfits_are_listed_at_once(source: pathlib.Path, mesh1: Mesh) -> None:
    target = cases.make_state(0, width=9)
    target.model.params["encoder"]["extra"] = {"w": jnp.zeros(2)}
    half = target.model.params["encoder"]["head"]
    half["bias"] = half["bias"].astype(jnp.bfloat16)
    with pytest.raises(ValueError, match="does not fit") as caught:
        warm_start.warm_start(target, [(source, 5, "", "")], mesh1)
    message = str(caught.value)
    for line in (
        "model/params/encoder/stem/kernel: expected (4, 9) float32, found (4, 6)",
        "model/params/encoder/extra/w: expected (2,) float32, not in the checkpoint",
        "model/params/encoder/head/bias: expected (4,) bfloat16, found (4,) float32",
        "model/params/features/stem/scale: expected (9,) float32, found (6,)",
    ):
        assert line in message
    assert "mean" not in message


def test_two_entries_must_not_fill_the_same_leaf(
    source: pathlib.Path, mesh1: Mesh
) -> None:
    entries = [(source, 5, "encoder", "encoder"), (source, 6, "", "")]
    with pytest.raises(ValueError, match=r"two entries(.|\n)*encoder/stem/kernel"):
        warm_start.warm_start(cases.make_state(0), entries, mesh1)


def test_the_result_may_be_donated(source: pathlib.Path, mesh8: Mesh) -> None:
    state, _ = warm_start.warm_start(
        cases.make_state(0, mesh=mesh8), [(source, 5, "", "")], mesh8
    )
    assert state.ema is not None
    kernel = state.model.params["encoder"]["stem"]["kernel"]
    assert kernel.sharding.device_set == set(mesh8.devices.flat)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    before = np.asarray(kernel)
    after = step(state)
    np.testing.assert_array_equal(
        after.model.params["encoder"]["stem"]["kernel"], before + 1
    )
    assert after.ema is not None
    np.testing.assert_array_equal(after.ema["encoder"]["stem"]["kernel"], before + 1)


def test_a_missing_run_is_an_error(tmp_path: pathlib.Path, mesh1: Mesh) -> None:
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint"):
        warm_start.warm_start(
            cases.make_state(0), [(tmp_path / "none", -1, "", "")], mesh1
        )
    assert not (tmp_path / "none").exists()
