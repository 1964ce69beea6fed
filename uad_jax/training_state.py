"""How far a run was trained: what must stand beside every result."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from uad_jax.config import ExperimentConfig, Selection
from uad_jax.methods.base import RunShape


def training_state(
    config: ExperimentConfig, step: int, lines: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """Says how far the model was trained.

    Args:
      config: The run's config.
      step: The checkpoint.
      lines: The run's `metrics.jsonl`.

    Returns:
      Slices seen (repeats too; of a slab or window all), per cent of the paper's
      budget (None if unknown), relative slope of the validation loss over the last
      fifth of the run up to `step` and at least its last two values (negative = still
      falling; None with fewer than two, or if each was measured on other slices,
      `Selection.REFERENCE`), training seconds, and whether the run counts as
      undertrained: less than a quarter of the budget and not known to have stopped
      falling.
    """
    losses, seconds = [], None
    for line in lines:
        if line["step"] > step:
            break
        seconds = line.get("perf/train_seconds", seconds)
        if "validation/loss" in line:
            losses.append((line["step"], line["validation/loss"]))
    # What a row is does not depend on the length of the run.
    run = RunShape(config.total_steps, 1, config.batch_size)
    slab = config.method.make(run).inputs.num_slices or 1
    slices = step * config.batch_size * slab
    share = None
    if config.reference_slices:
        share = 100.0 * slices / config.reference_slices
    last_fifth = sum(point[0] >= 0.8 * step for point in losses)
    slope = _relative_slope(losses[-max(last_fifth, 2) :])
    if config.train.selection is Selection.REFERENCE:
        slope = None  # its changes are those of the draw
    falling = slope is None or slope < 0
    return {
        "slices_seen": slices,
        "percent_of_reference": share,
        "validation_slope": slope,
        "train_seconds": seconds,
        "undertrained": share is not None and share < 25.0 and falling,
    }


def _relative_slope(points: Sequence[tuple[int, float]]) -> float | None:
    """Change of the fitted line over the points, as a share of their mean."""
    if len(points) < 2:
        return None
    steps, losses = np.array(points, np.float64).T
    slope = np.polyfit(steps, losses, 1)[0]
    return float(slope * (steps[-1] - steps[0]) / losses.mean())
