"""Chooses the weight of a restoration's total variation on healthy scans, no labels.

Source: You et al. 2019, "Unsupervised lesion detection via image restoration with a
normative prior", section 2.3: the weight is taken that changes healthy images least.
"""

import copy
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tqdm
from absl import logging

from uad_jax import calibrating, saved_run, scoring
from uad_jax import mesh as mesh_lib
from uad_jax import workdir as workdir_lib
from uad_jax.anomaly_score_config import Score, ScoreConfig
from uad_jax.config import ExperimentConfig
from uad_jax.data import pipeline
from uad_jax.data.sources import Store, VolumeInfo
from uad_jax.types import Array, Scores, Volumes


def check(config: ExperimentConfig, weights: Sequence[float]) -> None:
    """Raises ValueError unless these weights can be compared for this config."""
    asked = "--choose_tv_weight=" + ",".join(f"{weight:g}" for weight in weights)
    good = [weight for weight in weights if math.isfinite(weight) and weight >= 0]
    if len(good) < len(weights) or len(set(weights)) < max(len(weights), 2):
        raise ValueError(
            f"Expected two or more different weights of 0 or more, found {asked}. "
            "Name candidates such as --choose_tv_weight=0.5,1,2,4."
        )
    score = getattr(config.method, "score", None)
    if not isinstance(score, ScoreConfig):
        raise ValueError(
            f"{asked} is for restorations, and {type(config.method).__name__} has "
            "none. Leave it out."
        )
    if score.kind is not Score.RESTORATION:
        raise ValueError(
            f"{asked} is for restorations: expected score.kind=restoration, found "
            f"{score.kind.value}. Add --config.method.score.kind=restoration."
        )


def with_weight(config: ExperimentConfig, weight: float) -> ExperimentConfig:
    """A copy of the config that restores with one weight."""
    changed: Any = copy.deepcopy(config)
    changed.method.score.restoration.tv_weights = (weight,)
    return changed


def choose(
    config: ExperimentConfig,
    workdir: pathlib.Path,
    weights: Sequence[float],
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Restores the healthy validation scans of a run with each weight.

    Args:
      config: The experiment, scored by a restoration.
      workdir: The trained run, whose best checkpoint is taken; only read.
      weights: The candidates.
      progress: Whether to show a progress bar.

    Returns:
      "weight", the chosen one; "candidates" and "mean_changes", of each the mean
      absolute change of a brain voxel; "scans", how many there were; "step".

    Raises:
      ValueError: If the weights cannot be compared, or no validation scan is healthy.
      workdir.WorkdirError: If the store is not of the recipe of the training.
    """
    check(config, weights)
    store = Store.open(pathlib.Path(config.data.store))
    infos = calibrating.healthy(pipeline.select(store, config.data, "val"))
    if not infos:
        raise ValueError(
            f"{store.path}: expected healthy validation scans to choose the weight of "
            "the total variation on, found none. Prepare a store with some, or set "
            "--config.method.score.restoration.tv_weights=(2.2,) yourself."
        )
    workdir_lib.refuse_another_recipe(workdir, store.recipe)
    changes, step = [], -1
    bar = tqdm.tqdm(
        total=len(infos) * len(weights),
        desc="Choosing",
        unit="scan",
        disable=None if progress else True,  # None: on a terminal
    )
    with bar:
        for weight in weights:
            changed = with_weight(config, weight)
            step, change = _mean_change(changed, workdir, store, infos, bar)
            changes.append(change)
    lost = [w for w, x in zip(weights, changes, strict=True) if not math.isfinite(x)]
    if lost:
        names = ", ".join(f"{weight:g}" for weight in lost)
        raise ValueError(
            f"Expected finite restorations, found none with the weights {names}: the "
            "steps are too long for them. Leave them out of --choose_tv_weight, or "
            "lower score.restoration.step_size, or set its clip."
        )
    best = weights[min(range(len(weights)), key=changes.__getitem__)]
    if best in (max(weights), min(weights)) and best > 0:
        way = "larger" if best == max(weights) else "smaller"
        logging.warning(
            "The %s candidate, %g, changes healthy brains least: try %s ones too.",
            f"{way.removesuffix('r')}st",
            best,
            way,
        )
    return {
        "weight": best,
        "candidates": list(weights),
        "mean_changes": changes,
        "scans": len(infos),
        "step": step,
    }


def _mean_change(
    config: ExperimentConfig,
    workdir: pathlib.Path,
    store: Store,
    infos: Sequence[VolumeInfo],
    bar: tqdm.tqdm,
) -> tuple[int, float]:
    """Checkpoint step, and what its restoration changes in the brains of scans."""
    mesh = mesh_lib.make_mesh()
    with saved_run.opened(config, workdir, mesh) as run:
        step = run.default_step()
        model = run.model(step)
        compiled = scoring.program(config.name, run.method, mesh)
    total, count = 0.0, 0.0
    for volumes, _, rows in pipeline.volume_batches(
        store,
        infos,
        modalities=config.data.modalities,
        batch_size=config.evaluation.batch_size,
        mesh=mesh,
    ):
        decoded = scoring.decode(volumes)
        scores = compiled(model, decoded, jax.random.key(config.seed))
        part = jax.device_get(_change(decoded, scores))
        total, count = total + float(part[0]), count + float(part[1])
        bar.update(len(rows))
    return step, total / max(count, 1.0)


@jax.jit
def _change(volumes: Volumes, scores: Scores) -> tuple[Array, Array]:
    """Sum of the absolute change in the brain, and the number of its values."""
    assert scores.reconstruction is not None
    counted = volumes.mask & volumes.valid[:, :, None, None, None]
    change = jnp.abs(scores.reconstruction - volumes.image)
    total = jnp.sum(jnp.where(counted, change, 0.0))
    return total, jnp.sum(counted, dtype=jnp.float32) * volumes.image.shape[-1]


def render(found: Mapping[str, Any]) -> str:
    """A table of what `choose` found."""
    scans = "1 scan" if found["scans"] == 1 else f"{found['scans']} scans"
    lines = [
        f"Mean change of a brain voxel, {scans} (healthy, validation), step "
        f"{found['step']}:",
        f"{'tv_weight':>9}  change",
    ]
    for weight, change in zip(found["candidates"], found["mean_changes"], strict=True):
        note = "  chosen" if weight == found["weight"] else ""
        lines.append(f"{weight:>9g}  {change:.5f}{note}")
    return "\n".join(lines)
