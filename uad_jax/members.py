"""The runs that one program trains, mostly a single one, and what they share."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jax.sharding import Mesh

from uad_jax import checkpoint as checkpoint_lib
from uad_jax import programs
from uad_jax import progress as progress_lib
from uad_jax.config import ExperimentConfig
from uad_jax.data import pipeline, placement
from uad_jax.types import Array, Batch, Key, Scalars, TrainState


class TrainResult(NamedTuple):
    """How a call of `train` ended.

    Attributes:
      step: Finished optimiser steps.
      stopped: "done", "preempted" (by a signal; start again to go on) or "patience".
      summary: Best step and loss, validations since then, seconds of training.
    """

    step: int
    stopped: str
    summary: dict[str, float]


@dataclasses.dataclass
class Record:
    """What the loop remembers beside the train state; saved with each checkpoint.

    Attributes:
      best_loss: Lowest validation loss; NaN never is.
      best_step: Its step, 0 before the first.
      since_best: Validations since then.
      train_seconds: Seconds of training so far.
    """

    best_loss: float = math.inf
    best_step: int = 0
    since_best: int = 0
    train_seconds: float = 0.0

    @classmethod
    def saved(cls, metrics: Mapping[str, float]) -> "Record":
        """Reads the record that was saved with a checkpoint."""
        record = cls()
        for field in dataclasses.fields(cls):
            if field.name in metrics:
                value = metrics[field.name]
                setattr(record, field.name, type(getattr(record, field.name))(value))
        return record

    def validated(self, step: int, loss: float) -> bool:
        """Takes one validation loss; True if it is the best."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.since_best = loss, step, 0
            return True
        self.since_best += 1
        return False

    def out_of_patience(self, patience: int) -> bool:
        """Whether there were `patience` validations without a better loss."""
        return 0 < patience <= self.since_best

    def result(self, step: int, stopped: str) -> TrainResult:
        """What `train` returns."""
        return TrainResult(step, stopped, dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """One run. It is trained alone, or beside others by one program.

    Attributes:
      name: What tells it from the others, "seed=1"; "" if it is alone.
      place: Its index on the axis of the members, which is axis 0 of every leaf of the
        train state and the last axis of the scalars; None if it is alone.
      config: The experiment.
      workdir: Directory of the run.
      stream: Its own training batches.
      validation: The validation batches of a step, on the mesh; may be empty.
      validate: Compiled, (its train state, batch, key) -> (scalars, number of valid
        rows); None without validation batches.
      checkpoints: Where its checkpoints go.
      record: What is remembered beside its train state.
      evaluate: Called with the step of a complete checkpoint, every
        `train.evaluate_every` steps; what it returns is written as "eval/NAME".
    """

    name: str = ""
    place: int | None = None
    config: ExperimentConfig
    workdir: pathlib.Path
    stream: pipeline.TrainStream
    validation: Callable[[int], Sequence[Batch]]
    validate: Callable[[TrainState, Batch, Key], tuple[Scalars, Array]] | None
    checkpoints: checkpoint_lib.Checkpoints
    record: Record
    evaluate: Callable[[int], Mapping[str, float]] | None = None

    def scalars(self, fetched: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Its own scalars of a call, each [steps of the call]."""
        if self.place is None:
            return dict(fetched)
        return {name: values[:, self.place] for name, values in fetched.items()}


class Batches(Protocol):
    """Where the batches of all members come from; `pipeline.TrainStream` of one."""

    def batches(
        self, start_step: int = 0, *, stack: int | None = None
    ) -> placement.Prefetch[Batch]:
        """Yields batches from one step on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What stays the same while the loop runs.

    Attributes:
      config: The experiment; of several members what they share.
      members: The runs that are trained.
      stream: The training batches of all of them.
      key: The key of the run, or the keys of all members.
      programs: The compiled programs.
      part: (train state, member) -> the member's own train state.
      watch: Where the time goes.
      mesh: The data mesh.
    """

    config: ExperimentConfig
    members: Sequence[Member]
    stream: Batches
    key: Key
    programs: programs.Programs
    part: Callable[[TrainState, Member], TrainState]
    watch: progress_lib.Stopwatch
    mesh: Mesh

    @property
    def active(self) -> list[Member]:
        """The members whose training has not ended for lack of improvement.

        The others are computed further, and nothing of it is kept.
        """
        patience = self.config.train.patience
        return [one for one in self.members if not one.record.out_of_patience(patience)]
