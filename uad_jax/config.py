"""The description of one experiment."""

import copy
import dataclasses
import enum
import json
from typing import Any

from absl import logging

from uad_jax.data.config import DataConfig
from uad_jax.methods.base import MethodConfig
from uad_jax.metrics.protocols import Protocol


@dataclasses.dataclass
class WarmStart:
    """Parameters to take from another run.

    Attributes:
      workdir: The other run.
      step: Its checkpoint; -1 = best, or the latest if it never validated.
      source_prefix: Path in the other run's model, "encoder/backbone"; "" = all.
      target_prefix: Path in this run's model that it fills.
    """

    workdir: str = ""
    step: int = -1
    source_prefix: str = ""
    target_prefix: str = ""


class Selection(enum.Enum):
    """What the validation loss, which selects the best checkpoint, is measured on."""

    FIXED = "fixed"  # the same slices and random numbers every time
    # One slice of each volume, and random numbers, drawn anew every time: the released
    # code of the diffusion models. The lowest of many such losses is a lucky one.
    REFERENCE = "reference"


@dataclasses.dataclass
class TrainConfig:
    """How the loop runs. All `*_every` are in optimiser steps.

    Attributes:
      steps_per_call: Steps scanned in one dispatch (accelerators; 1 on a CPU).
      log_every: Steps between lines of metrics.
      eval_every: Steps between validations.
      save_every: Steps between checkpoints.
      evaluate_every: Steps between full evaluations, as `run.py evaluate` does
        them; 0 = none. Each is preceded by a checkpoint. One process only.
      keep_checkpoints: Newest checkpoints to keep beside the best one.
      keep_every: Also keep every checkpoint at a multiple of this; 0 = none.
      selection: What the validation loss is measured on.
      validation_slices: Size of the fixed validation set, rounded up to whole slabs;
        0 = all slices.
      patience: Stop after this many validations without a better loss; 0 = never.
      warm_start: Parameters taken from other runs when training begins.
    """

    steps_per_call: int = 1
    log_every: int = 50
    eval_every: int = 500
    save_every: int = 500
    evaluate_every: int = 0
    keep_checkpoints: int = 2
    keep_every: int = 0
    selection: Selection = Selection.FIXED
    validation_slices: int = 256
    patience: int = 0
    warm_start: list[WarmStart] = dataclasses.field(default_factory=list)


class ThresholdRule(enum.Enum):
    """Where the operating threshold comes from."""

    HEALTHY_FPR = "healthy_fpr"  # voxel false-positive rate on healthy validation
    VALIDATED = "validated"  # best Dice on annotated validation volumes


@dataclasses.dataclass
class EvaluationSet:
    """One set of volumes to evaluate on.

    Attributes:
      store: Directory written by `run.py prepare`; "" = the training store.
      split: "test", "val" or "train".
      threshold_from: Where the operating threshold comes from.
      protocol: Post-processing and aggregation.
    """

    store: str = ""
    split: str = "test"
    threshold_from: ThresholdRule = ThresholdRule.HEALTHY_FPR
    protocol: Protocol = Protocol.BEHRENDT


@dataclasses.dataclass
class EvaluationConfig:
    """How checkpoints are evaluated.

    Attributes:
      batch_size: Volumes scored at a time (rounded up to the device count).
      healthy_fpr: Operating voxel false-positive rate on healthy validation scans.
      bootstrap_samples: Resamplings of the subjects for intervals.
      export_maps: Whether anomaly maps are written as NIfTI.
      exact_voxels: Scores that may be held in memory (5 bytes each). A larger set,
        counted over all scorers with and without post-processing, gets its pooled
        figures from histograms, and is validated one scorer at a time.
      sets: Name -> set. Empty = {"test": EvaluationSet()}. Names are those of files.
    """

    batch_size: int = 2
    healthy_fpr: float = 0.05
    bootstrap_samples: int = 1000
    export_maps: bool = False
    exact_voxels: int = 400_000_000
    sets: dict[str, EvaluationSet] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class ExperimentConfig:
    """One experiment, from data to evaluation.

    Attributes:
      name: Short name for tables and reports.
      method: The method's own config, with its optimiser.
      data: The training data.
      train: How the loop runs.
      evaluation: How checkpoints are evaluated.
      seed: Seeds parameters, data order and noise.
      batch_size: Rows of the global batch: slices, or slabs for methods of slabs.
      total_steps: Optimiser steps.
      reference_slices: Training slices of the paper's own budget; 0 = unknown.
      source: The --config it came from, so that a run can be opened again.
    """

    name: str
    method: MethodConfig
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    seed: int = 0
    batch_size: int = 64
    total_steps: int = 10_000
    reference_slices: int = 0
    source: str = ""


def to_dict(config: Any) -> dict[str, Any]:
    """Converts a config to plain JSON types; the method carries its class name."""
    return _plain(config)


def to_json(config: Any) -> str:
    """Serialises a config to stable, indented JSON."""
    return json.dumps(_plain(config), indent=2, sort_keys=True)


def fill(config: Any, stored: dict[str, Any]) -> None:
    """Sets every field of a config to its stored value, in place.

    A field that the stored config lacks is newer than the run. It gets the default of
    its class, with which new fields do what was done before they existed; what the
    config file says of it is not what the run was trained with.

    Args:
      config: A config of the same classes as the stored one.
      stored: What `to_dict` returned, now or in an older version.

    Raises:
      ValueError: If the classes differ, or a stored field is unknown here.
    """
    newer = _fill(config, stored)
    if newer:
        logging.info(
            "The stored config is older than this code; defaults are used for: %s.",
            ", ".join(newer),
        )


def completed(config: Any, stored: dict[str, Any]) -> dict[str, Any]:
    """A stored config with the fields that it lacks at their defaults.

    Args:
      config: A config of the same classes.
      stored: What `to_dict` returned, now or in an older version.

    Returns:
      What can be compared with `to_dict(config)`; if the classes or fields differ
      otherwise, the stored config as it is.
    """
    opened = copy.deepcopy(config)
    try:
        _fill(opened, stored)
    except ValueError:
        return stored
    return to_dict(opened)


def _fill(config: Any, stored: dict[str, Any], prefix: str = "") -> list[str]:
    """Does what `fill` does; returns the dotted names of the newer fields."""
    found, expected = type(config).__name__, stored.get("type")
    if found != expected:
        raise ValueError(
            f"The stored config holds a {expected}, but the config file makes a "
            f"{found}. Pass the --config that the run was trained with."
        )
    fields = dataclasses.fields(config)
    unknown = set(stored) - {"type"} - {field.name for field in fields}
    if unknown:
        raise ValueError(
            f"{found}: expected its fields in this version of the code, found "
            f"{sorted(unknown)} too in the stored config. Use the code that trained "
            "the run."
        )
    newer = []
    for field in fields:
        name = f"{prefix}{field.name}"
        if field.name not in stored:
            newer.append(name)
            _set_default(config, field)
            continue
        current = getattr(config, field.name)
        if dataclasses.is_dataclass(current):
            newer += _fill(current, stored[field.name], f"{name}.")
        else:
            setattr(config, field.name, _filled(current, stored[field.name]))
    return newer


def _set_default(config: Any, field: dataclasses.Field) -> None:
    """Sets a field to the default of its class; without one it stays as it is."""
    if field.default is not dataclasses.MISSING:
        setattr(config, field.name, field.default)
    elif field.default_factory is not dataclasses.MISSING:
        setattr(config, field.name, field.default_factory())


def _filled(current: Any, stored: Any) -> Any:
    if isinstance(current, enum.Enum):
        return type(current)(stored)
    if isinstance(current, tuple):
        return tuple(stored)
    if isinstance(stored, list):
        return [_from_plain(item) for item in stored]
    if isinstance(stored, dict):
        return {key: _from_plain(item) for key, item in stored.items()}
    return stored


def _from_plain(item: Any) -> Any:
    """Items of lists and dicts are the two config classes that can be in one."""
    if not isinstance(item, dict) or "type" not in item:
        return item
    classes = {kind.__name__: kind for kind in (WarmStart, EvaluationSet)}
    config = classes[item["type"]]()
    fill(config, item)
    return config


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: _plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
        }
        return {"type": type(value).__name__, **fields}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def validate(config: ExperimentConfig) -> None:
    """Checks what can be checked without data or devices.

    Raises:
      ValueError: Lists every problem found.
    """
    problems = []
    train = config.train
    for name in ("batch_size", "total_steps"):
        if getattr(config, name) < 1:
            problems.append(f"{name} is {getattr(config, name)}; use 1 or more.")
    for name in ("steps_per_call", "log_every", "eval_every", "save_every"):
        if getattr(train, name) < 1:
            problems.append(f"train.{name} is {getattr(train, name)}; use 1 or more.")
    if train.keep_checkpoints < 1:
        problems.append(
            f"train.keep_checkpoints is {train.keep_checkpoints}; use 1 or more."
        )
    for name in ("evaluate_every", "keep_every", "validation_slices", "patience"):
        if getattr(train, name) < 0:
            problems.append(f"train.{name} is {getattr(train, name)}; use 0 or more.")
    if not problems:
        chunk = train.steps_per_call
        for name, value in (
            ("total_steps", config.total_steps),
            ("train.log_every", train.log_every),
            ("train.eval_every", train.eval_every),
            ("train.save_every", train.save_every),
            ("train.evaluate_every", train.evaluate_every),
        ):
            if value % chunk:
                problems.append(
                    f"{name} is {value}, not a multiple of train.steps_per_call = "
                    f"{chunk}. Use a multiple, or steps_per_call = 1."
                )
    for name in ("batch_size", "bootstrap_samples"):
        if getattr(config.evaluation, name) < 1:
            problems.append(
                f"evaluation.{name} is {getattr(config.evaluation, name)}; use 1 or "
                "more."
            )
    for name in config.evaluation.sets:
        if not name or "/" in name:
            problems.append(f"evaluation.sets has the name {name!r}; files bear it.")
    if not 0 < config.evaluation.healthy_fpr < 1:
        problems.append(
            f"evaluation.healthy_fpr is {config.evaluation.healthy_fpr}; "
            "it must lie between 0 and 1."
        )
    try:
        config.method.validate()
    except ValueError as error:
        problems.append(f"method: {error}")
    if problems:
        raise ValueError("The config cannot work:\n  " + "\n  ".join(problems))
