import dataclasses
import enum
import functools
import json
import logging
import pathlib

import pytest

from uad_jax import config as config_lib
from uad_jax import workdir
from uad_jax.data.config import Placement
from uad_jax.methods import base


class _Form(enum.Enum):
    ROUND = "round"
    SQUARE = "square"


@dataclasses.dataclass
class _MethodConfig:
    form: _Form = _Form.ROUND
    width: int = 8
    scales: tuple[int, ...] = (1, 2)

    def make(self, run: base.RunShape) -> base.Method:
        raise AssertionError("not built in these tests")

    def validate(self) -> None:
        if self.width < 1:
            raise ValueError(f"width is {self.width}; use 1 or more.")


def _experiment() -> config_lib.ExperimentConfig:
    return config_lib.ExperimentConfig(name="probe", method=_MethodConfig())


def test_fill_restores_every_field_from_json() -> None:
    trained = _experiment()
    trained.method = _MethodConfig(form=_Form.SQUARE, width=3, scales=(4,))
    trained.seed = 7
    trained.data.placement = Placement.DEVICE
    trained.train.warm_start = [config_lib.WarmStart(workdir="a", step=3)]
    trained.evaluation.sets = {"x": config_lib.EvaluationSet(split="val")}
    stored = json.loads(config_lib.to_json(trained))
    opened = _experiment()
    config_lib.fill(opened, stored)
    assert opened == trained


def test_fill_names_both_classes_when_the_method_differs() -> None:
    stored = config_lib.to_dict(_experiment())
    stored["method"]["type"] = "OtherConfig"
    with pytest.raises(ValueError, match=r"OtherConfig.*_MethodConfig"):
        config_lib.fill(_experiment(), stored)


def test_fill_refuses_a_stored_field_that_the_code_does_not_know() -> None:
    stored = config_lib.to_dict(_experiment())
    stored["method"]["depth"] = 4
    with pytest.raises(
        ValueError, match=r"_MethodConfig: expected .*found \['depth'\].*Use the code"
    ):
        config_lib.fill(_experiment(), stored)


def test_fill_gives_fields_newer_than_the_run_their_default(
    caplog: pytest.LogCaptureFixture,
) -> None:
    trained = _experiment()
    trained.seed = 7
    stored = config_lib.to_dict(trained)
    del stored["train"]["selection"], stored["method"]["scales"], stored["evaluation"]
    opened = _experiment()
    # What the config file says now is not what the run was trained with.
    opened.train.selection = config_lib.Selection.REFERENCE
    opened.method = _MethodConfig(scales=(5,))
    opened.evaluation.batch_size = 9
    with caplog.at_level(logging.INFO, logger="absl"):
        config_lib.fill(opened, stored)
    assert opened == trained
    (record,) = caplog.records
    named = "defaults are used for: method.scales, train.selection, evaluation."
    assert named in record.getMessage()


def test_a_run_of_older_code_differs_only_where_it_was_changed(
    tmp_path: pathlib.Path,
) -> None:
    config = _experiment()
    stored = config_lib.to_dict(config)
    del stored["train"]["selection"], stored["method"]["scales"]
    (tmp_path / "config.json").write_text(json.dumps(stored))

    def changes() -> dict[str, str]:
        return workdir.refuse_another_config(
            tmp_path,
            config_lib.to_dict(config),
            functools.partial(config_lib.completed, config),
        )

    assert changes() == {}
    config.train.selection = config_lib.Selection.REFERENCE
    with pytest.raises(workdir.WorkdirError, match='selection: "fixed" -> "reference"'):
        changes()
    config = _experiment()
    stored["method"]["type"] = "OtherConfig"
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(workdir.WorkdirError, match='"OtherConfig" -> "_MethodConfig"'):
        changes()


def test_fill_of_a_config_of_the_same_version_says_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="absl"):
        config_lib.fill(_experiment(), config_lib.to_dict(_experiment()))
    assert not caplog.records


def test_validate_lists_all_problems_at_once() -> None:
    config = _experiment()
    config.batch_size = 0
    config.evaluation.healthy_fpr = 1.5
    config.method = _MethodConfig(width=0)
    with pytest.raises(ValueError, match=r"(?s)batch_size.*healthy_fpr.*width"):
        config_lib.validate(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("log_every", 0),
        ("keep_checkpoints", 0),
        ("evaluate_every", -1),
        ("keep_every", -1),
        ("validation_slices", -1),
        ("patience", -1),
    ],
)
def test_validate_names_a_train_field_that_is_too_small(name: str, value: int) -> None:
    config = _experiment()
    setattr(config.train, name, value)
    with pytest.raises(ValueError, match=f"train.{name} is {value}; use {value + 1} "):
        config_lib.validate(config)


def test_validate_wants_multiples_of_steps_per_call() -> None:
    config = _experiment()
    config.total_steps = 101
    config.train = config_lib.TrainConfig(steps_per_call=10)
    with pytest.raises(ValueError, match="total_steps is 101, not a multiple"):
        config_lib.validate(config)


def test_validate_accepts_the_defaults() -> None:
    config_lib.validate(_experiment())
