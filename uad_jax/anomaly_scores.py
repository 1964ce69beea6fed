"""Anomaly scores that the reconstruction methods share, from a few functions of each.

Formulas, sources, and which method has which: docs/scores.md.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from uad_jax import gradient_score, restoring
from uad_jax.anomaly_score_config import Score, ScoreConfig, SliceScore
from uad_jax.methods import lifting
from uad_jax.ops import residuals
from uad_jax.score_functions import Functions, Rows
from uad_jax.types import Array, Key, ModelState, Scores, Volumes


class Slices(NamedTuple):
    """What is computed slice by slice.

    Attributes:
      output: Reconstructions or restorations, [N, M, H, W, C]; of several the maps are
        averaged.
      extra: Variance or gradient, [N, H, W], or None.
      score: Score of the slice, [N], or None if it comes from the map.
    """

    output: Array
    extra: Array | None
    score: Array | None


def scorer(
    functions: Functions,
    config: ScoreConfig,
    residual: residuals.Residual,
    *,
    sample: bool = False,
    chunk: int = 0,
) -> Callable[[ModelState, Volumes, Key], Scores]:
    """Builds the `score` of a method.

    Args:
      functions: The method.
      config: Which score.
      residual: How an image and what became of it are compared.
      sample: RESIDUAL and the combined gradient: decode a sample, not the mean.
      chunk: Slices of a volume that are computed at once; 0 = all. On a CPU,
        gradients take all.

    Returns:
      (model, volumes, key) -> Scores, a pure function. The reconstruction is the one
      that was compared with the image: of a restoration the restored image.
    """

    def slices(model: ModelState, image: Array, mask: Array, keys: Array) -> Slices:
        rows = Rows(image, mask, keys)
        return of_slices(functions, config, model, rows, sample=sample)

    if config.kind is Score.GRADIENT and jax.default_backend() == "cpu":
        # Chunks are a loop, in which XLA:CPU runs convolution gradients slowly.
        chunk = 0
    lifted = lifting.over_slices(slices, chunk)

    def score(model: ModelState, volumes: Volumes, key: Key) -> Scores:
        found: Slices = lifted(model, volumes, key)
        return of_volumes(config, residual, found, volumes)

    return score


def host_scorer(
    functions: Functions,
    config: ScoreConfig,
    residual: residuals.Residual,
    *,
    chunk: int = 0,
) -> Callable[[ModelState, Volumes, Key], Scores] | None:
    """Builds the form of a restoration's `score` that a CPU wants, `host_score`.

    The loop over the steps is Python's, around one compiled step, because XLA:CPU runs
    convolution gradients inside its own loops slowly.

    Args:
      functions: The method.
      config: Which score.
      residual: As in `scorer`.
      chunk: Slices that are restored at once; 0 = all of the batch of volumes.

    Returns:
      What `scorer` returns, not to be jitted; None for scores without a loop.
    """
    if config.kind is not Score.RESTORATION:
        return None
    restore = restoring.on_host(functions, config.restoration, chunk)

    @jax.jit
    def finish(model: ModelState, volumes: Volumes, key: Key, output: Array) -> Scores:
        def each(
            model: ModelState, image: Array, mask: Array, keys: Array
        ) -> Array | None:
            return slice_scores(functions, config, model, image)

        found = lifting.over_slices(each, chunk)(model, volumes, key)
        return of_volumes(config, residual, Slices(output, None, found), volumes)

    def score(model: ModelState, volumes: Volumes, key: Key) -> Scores:
        return finish(model, volumes, key, restore(model, volumes, key))

    return score


def of_volumes(
    config: ScoreConfig, residual: residuals.Residual, found: Slices, volumes: Volumes
) -> Scores:
    """Scores of volumes from what was computed slice by slice.

    Args:
      config: Which score.
      residual: How an image and what became of it are compared.
      found: What `of_slices` gives, [B, D, ...] in place of [N, ...].
      volumes: What is scored.
    """
    anomaly_map = _map(config, residual, found, volumes)
    output = found.output.mean(axis=2)
    scores = lifting.summarise(anomaly_map, output, volumes)
    if found.score is None:
        return scores
    return with_slice_score(scores, found.score, volumes)


def of_slices(
    functions: Functions,
    config: ScoreConfig,
    model: ModelState,
    rows: Rows,
    *,
    sample: bool,
) -> Slices:
    """All of a score that looks at single slices.

    Args:
      functions: The method.
      config: Which score.
      model: Its model.
      rows: The slices.
      sample: As in `scorer`.
    """
    image, mask, keys, _ = rows
    extra = None
    if config.kind in (Score.MC_MEAN, Score.MC_VARIANCE):
        passes = random_passes(functions, config, model, image, keys)
        outputs = passes.mean(axis=1, keepdims=True)
        if config.kind is Score.MC_VARIANCE:
            extra = passes.var(axis=1).mean(axis=-1)
    elif config.kind is Score.RESTORATION:
        outputs = restoring.restored(
            functions, config.restoration, model, image, mask, keys
        )
    else:
        drawn = keys if sample else None
        outputs = functions.reconstruct(
            model, image, drawn, sample=sample, dropout=False
        )[:, None]
        if config.kind is Score.GRADIENT:
            extra = gradient_score.slopes(
                functions, config.gradient, model, image, keys
            )
    return Slices(outputs, extra, slice_scores(functions, config, model, image))


def slice_scores(
    functions: Functions, config: ScoreConfig, model: ModelState, image: Array
) -> Array | None:
    """Scores of slices [N, H, W, C] themselves, [N], or None: they follow the map."""
    if config.slice_score is SliceScore.MAP:
        return None
    terms = functions.terms(model, image, None, functions.pixel_loss)
    if config.slice_score is SliceScore.KL:
        return terms.kl
    return terms.reconstruction + functions.kl_weight * terms.kl


def _map(
    config: ScoreConfig, residual: residuals.Residual, found: Slices, volumes: Volumes
) -> Array:
    """The map [B, D, H, W] from what was computed slice by slice."""

    def compare(output: Array) -> Array:
        return residuals.anomaly_map(residual, volumes.image, output, volumes.valid)

    if config.kind is Score.MC_VARIANCE:
        assert found.extra is not None
        return found.extra
    if config.kind is not Score.GRADIENT:
        return jax.vmap(compare, in_axes=2)(found.output).mean(axis=0)
    assert found.extra is not None
    return gradient_score.weigh(
        found.extra,
        volumes,
        smoothing=config.gradient.smoothing,
        residual=compare(found.output[:, :, 0])
        if config.gradient.times_residual
        else None,
        scale=config.gradient.scale,
    )


def random_passes(
    functions: Functions,
    config: ScoreConfig,
    model: ModelState,
    image: Array,
    keys: Array,
) -> Array:
    """Random reconstructions of slices [N, H, W, C]: [N, passes, H, W, C]."""

    def one(index: Array) -> Array:
        return functions.reconstruct(
            model,
            image,
            jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index),
            sample=config.mc_samples,
            dropout=config.mc_dropout,
        )

    return jax.vmap(one, out_axes=1)(jnp.arange(config.passes))


def with_slice_score(scores: Scores, slice_score: Array, volumes: Volumes) -> Scores:
    """Replaces the scores of slices, and of volumes by their highest slice.

    Args:
      scores: Scores.
      slice_score: [B, D] float32, at least 0. Slices without brain get 0.
      volumes: What was scored.
    """
    brain = volumes.mask.any(axis=(2, 3, 4)) & volumes.valid
    slice_score = jnp.where(brain, slice_score, 0.0)
    return dataclasses.replace(
        scores, slice_score=slice_score, volume_score=slice_score.max(axis=1)
    )
