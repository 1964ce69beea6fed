"""What a method is, and the few ways to compose one."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from uad_jax.types import (
    Array,
    Batch,
    Key,
    ModelState,
    Scalars,
    Scores,
    TrainState,
    Volumes,
)


class Inputs(NamedTuple):
    """What one training example is.

    Attributes:
      num_slices: None for single slices; S for slabs of S consecutive slices.
      needs_lesion: Whether `Batch.lesion` must be filled.
    """

    num_slices: int | None = None
    needs_lesion: bool = False


class RunShape(NamedTuple):
    """What a schedule may depend on.

    Attributes:
      total_steps: Optimiser steps of the run.
      steps_per_epoch: Steps of one pass of the configured sampling.
      global_batch: Rows of the global batch.
    """

    total_steps: int
    steps_per_epoch: int
    global_batch: int


class Method(NamedTuple):
    """An anomaly detection method as pure functions (compare optax).

    Attributes:
      inputs: What one training example is.
      init: (key, batch) -> TrainState; only shapes and dtypes of the batch matter.
      update: (state, batch, key) -> (state, scalars). The caller folds the step
        into the key.
      validate: (model, batch, key) -> scalars. Has the entry "loss", the lower
        the better, which selects the best checkpoint.
      score: (model, volumes, key) -> Scores; None for pretraining stages.
      reconstruct: (model, image [N, H, W, C], mask [N, H, W, 1], key, strength)
        -> image; for priors and restoration.
      features: (model, volumes) -> features computed once per volume and cached.
      filters_inside: True if `score` already filters its map, so that the
        evaluator must not post-process further.
    """

    inputs: Inputs
    init: Callable[[Key, Batch], TrainState]
    update: Callable[[TrainState, Batch, Key], tuple[TrainState, Scalars]]
    validate: Callable[[ModelState, Batch, Key], Scalars]
    score: Callable[[ModelState, Volumes, Key], Scores] | None
    reconstruct: Callable[..., Array] | None = None
    features: Callable[[ModelState, Volumes], Array] | None = None
    filters_inside: bool = False


class MethodConfig(Protocol):
    """A dataclass that builds a method."""

    def make(self, run: RunShape) -> Method:
        """Builds the method. Float fields of the config may be traced scalars."""
        ...

    def validate(self) -> None:
        """Raises ValueError for settings that cannot work (host only)."""
        ...
