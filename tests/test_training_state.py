"""How far a run was trained, against hand values."""

import pytest

from configs import smoke
from tests import slabs
from uad_jax import training_state
from uad_jax.config import Selection


def test_training_state_marks_a_short_falling_run_as_undertrained() -> None:
    config = smoke.get_config()
    config.batch_size, config.reference_slices = 10, 10_000
    lines = [
        {
            "step": step,
            "validation/loss": 200.0 - step,
            "perf/train_seconds": 0.1 * step,
        }
        for step in range(10, 101, 10)
    ]
    state = training_state.training_state(config, 100, lines)
    assert state["slices_seen"] == 1000
    assert state["percent_of_reference"] == 10.0
    assert state["validation_slope"] == pytest.approx(-20 / 110)
    assert state["train_seconds"] == pytest.approx(10.0)
    assert state["undertrained"]
    config.reference_slices = 2000
    assert not training_state.training_state(config, 100, lines)["undertrained"]


def test_training_state_counts_every_slice_of_a_slab() -> None:
    config = smoke.get_config()
    config.batch_size, config.reference_slices = 10, 10_000
    config.method = slabs.config()  # of 3 slices
    state = training_state.training_state(config, 100, [])
    assert state["slices_seen"] == 3000
    assert state["percent_of_reference"] == 30.0


def test_training_state_ends_at_the_checkpoint() -> None:
    config = smoke.get_config()
    lines = [{"step": n, "validation/loss": float(n)} for n in (8, 9, 10, 11, 12)]
    assert training_state.training_state(config, 10, lines)["validation_slope"] > 0
    assert training_state.training_state(config, 7, lines)["validation_slope"] is None


def test_training_state_of_a_run_that_validates_rarely_is_not_passed_over() -> None:
    config = smoke.get_config()
    config.batch_size, config.reference_slices = 10, 100_000
    lines = [{"step": n, "validation/loss": 500.0 - n} for n in (100, 200, 300, 400)]
    state = training_state.training_state(
        config, 400, lines
    )  # one value in the last fifth
    assert state["validation_slope"] == pytest.approx(-100 / 150)
    assert state["undertrained"]
    assert training_state.training_state(config, 400, [])["undertrained"]
    rising = [{"step": n, "validation/loss": float(n)} for n in (100, 200)]
    assert not training_state.training_state(config, 200, rising)["undertrained"]


def test_losses_of_other_slices_each_time_have_no_slope() -> None:
    config = smoke.get_config()
    config.batch_size, config.reference_slices = 10, 10_000
    config.train.selection = Selection.REFERENCE
    lines = [{"step": n, "validation/loss": 100.0 + n} for n in range(10, 101, 10)]
    state = training_state.training_state(config, 100, lines)
    assert state["validation_slope"] is None
    assert state["undertrained"]
