"""What a method is, and the few ways to compose one."""

import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from uad_jax.types import (
    Array,
    Batch,
    Key,
    ModelState,
    Scalars,
    Scores,
    TrainState,
    Tree,
    Volumes,
)


class Precision(enum.Enum):
    """Type of a network's computation. Parameters and losses are always float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


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


# (params, collections, batch, key) -> (loss, (collections, scalars)), where loss and
# scalars are means over the valid rows of the batch.
Loss = Callable[
    [dict[str, Tree], dict[str, Tree], Batch, Key],
    tuple[Array, tuple[dict[str, Tree], Scalars]],
]
# (model, image [N, H, W, C], mask [N, H, W, 1], keys [N]) -> map [N, H, W] and
# reconstruction [N, H, W, C] or None.
ScoreSlices = Callable[[ModelState, Array, Array, Array], tuple[Array, Array | None]]
# The same for slabs: image [B, S, H, W, C], mask [B, S, H, W, 1], valid [B, S], keys
# [B] -> map [B, S, H, W] and reconstruction [B, S, H, W, C] or None.
ScoreSlab = Callable[
    [ModelState, Array, Array, Array, Array], tuple[Array, Array | None]
]


def sample_keys(key: Key, uid: Array, slice_index: Array) -> Array:
    """Keys that depend on the volume and the slice only.

    Noise drawn from them does not depend on the place in the batch, the devices, the
    padding or the accumulation.

    Args:
      key: Key of the step or of the scoring.
      uid: Volume ids, [N] int32.
      slice_index: Axial index in the volume, [N] int32.

    Returns:
      [N] keys.
    """

    def one(uid: Array, index: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(key, uid), index)

    return jax.vmap(one)(uid.astype(jnp.uint32), slice_index.astype(jnp.uint32))


def single_optimizer(
    init_model: Callable[[Key, Batch], ModelState],
    loss: Loss,
    tx: optax.GradientTransformation,
    *,
    trainable: Sequence[str] | None = None,
    ema_decay: float | Array = 0.0,
    accumulate_steps: int = 1,
) -> tuple[
    Callable[[Key, Batch], TrainState],
    Callable[[TrainState, Batch, Key], tuple[TrainState, Scalars]],
]:
    """Trains one loss with one optimiser.

    Args:
      init_model: Makes the model; only shapes and dtypes of the batch matter.
      loss: The loss.
      tx: The optimiser.
      trainable: Networks that it changes; None = all. The others stay as they are.
      ema_decay: Decay of the averaged parameters; 0 = none. Early steps use
        (1 + step) / (10 + step) if that is smaller.
      accumulate_steps: Micro-batches per optimiser step. Each takes every n-th row,
        so that it is spread over the devices like the batch. Gradients are weighted
        with the valid rows: the result is that of the whole batch, unless the
        collections hold batch statistics.

    Returns:
      `init` and `update` of a Method. Beside the loss's own scalars there are "loss"
      and "grad_norm" (before clipping).
    """
    averaged = not (isinstance(ema_decay, float | int) and ema_decay == 0)

    def init(key: Key, batch: Batch) -> TrainState:
        model = init_model(key, batch)
        chosen, _ = _split(model.params, trainable)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            model=model,
            opt_state={"main": tx.init(chosen)},
            ema=jax.tree.map(jnp.copy, chosen) if averaged else None,
        )

    def update(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Scalars]:
        params, frozen = _split(state.model.params, trainable)

        def gradient(collections: dict[str, Tree], rows: Batch) -> tuple:
            def of(params: dict[str, Tree]) -> tuple:
                return loss({**frozen, **params}, collections, rows, key)

            (value, rest), grads = jax.value_and_grad(of, has_aux=True)(params)
            return rest[0], grads, {"loss": value, **rest[1]}

        collections, grads, scalars = accumulate(
            gradient, state.model.collections, batch, accumulate_steps
        )
        updates, opt_state = tx.update(grads, state.opt_state["main"], params)
        params = optax.apply_updates(params, updates)
        ema = state.ema
        if ema is not None:
            ema = moving_average(ema, params, ema_decay, state.step)
        new = TrainState(
            step=state.step + 1,
            model=ModelState(params={**frozen, **params}, collections=collections),
            opt_state={"main": opt_state},
            ema=ema,
        )
        return new, {**scalars, "grad_norm": optax.tree.norm(grads)}

    return init, update


def accumulate(
    gradient: Callable[[dict[str, Tree], Batch], tuple[dict[str, Tree], Tree, Scalars]],
    collections: dict[str, Tree],
    batch: Batch,
    num_parts: int,
) -> tuple[dict[str, Tree], Tree, Scalars]:
    """Averages gradients and scalars over micro-batches of every n-th row.

    Args:
      gradient: (collections, batch) -> (collections, gradients, scalars), means over
        the valid rows.
      collections: Mutable collections, handed from one micro-batch to the next.
      batch: The whole batch.
      num_parts: Number of micro-batches.

    Returns:
      What `gradient` returns, as means over the valid rows of the whole batch.

    Raises:
      ValueError: If `num_parts` does not divide the batch.
    """
    if num_parts == 1:
        return gradient(collections, batch)
    size = batch.uid.shape[0]
    if size % num_parts:
        raise ValueError(
            f"accumulate_steps is {num_parts}, which does not divide the batch of "
            f"{size} rows. Use a divisor of {size}."
        )
    # The row axis stays in front until the last moment: it is the sharded one.
    parts = jax.tree.map(
        lambda x: x.reshape(size // num_parts, num_parts, *x.shape[1:]), batch
    )
    total = jnp.maximum(jnp.sum(batch.valid), 1).astype(jnp.float32)

    def step(carry: tuple, part: Batch) -> tuple[tuple, None]:
        collections, *sums = carry
        collections, *values = gradient(collections, part)
        weight = jnp.sum(part.valid).astype(jnp.float32) / total
        sums = jax.tree.map(lambda s, v: s + weight * v, sums, values)
        return (collections, *sums), None

    first = jax.tree.map(lambda x: x[:, 0], parts)
    _, *shapes = jax.eval_shape(gradient, collections, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    carry = (collections, *zeros)
    if jax.default_backend() == "cpu":
        # Convolution gradients inside lax.scan are 20 to 40 times slower on XLA:CPU.
        for i in range(num_parts):
            carry, _ = step(carry, jax.tree.map(lambda x, i=i: x[:, i], parts))
    else:
        stacked = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), parts)
        carry, _ = jax.lax.scan(step, carry, stacked)
    return carry


def moving_average(
    average: Tree, params: Tree, decay: float | Array, step: Array
) -> Tree:
    """Moves averaged float32 parameters towards the live ones."""
    step = step.astype(jnp.float32)
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(
        lambda a, p: a + (1.0 - decay) * (p.astype(a.dtype) - a), average, params
    )


def _split(
    params: dict[str, Tree], names: Sequence[str] | None
) -> tuple[dict[str, Tree], dict[str, Tree]]:
    if names is None:
        return params, {}
    missing = [name for name in names if name not in params]
    if missing:
        raise ValueError(f"No networks {missing}; the model has {sorted(params)}.")
    chosen = {name: params[name] for name in names}
    return chosen, {k: v for k, v in params.items() if k not in chosen}


def slicewise(
    score_slices: ScoreSlices, chunk: int = 0
) -> Callable[[ModelState, Volumes, Key], Scores]:
    """Lifts a score of slices to volumes; `chunk` as in `over_slices`."""
    lifted = over_slices(score_slices, chunk)

    def score(model: ModelState, volumes: Volumes, key: Key) -> Scores:
        anomaly_map, output = lifted(model, volumes, key)
        return summarise(anomaly_map, output, volumes)

    return score


def over_slices(
    function: Callable[[ModelState, Array, Array, Array], Tree],
    chunk: int = 0,
    *,
    key_per_volume: bool = False,
) -> Callable[[ModelState, Volumes, Key], Tree]:
    """Lifts a function of slices to volumes.

    Args:
      function: (model, image [N, H, W, C], mask [N, H, W, 1], keys [N]) -> arrays
        [N, ...].
      chunk: Slices per volume that are computed at once, to bound the memory; 0 = all.
      key_per_volume: All slices of a volume get one key, that of slice 0.

    Returns:
      (model, volumes, key) -> arrays [B, D, ...]. The volume axis stays outermost, so
      it may be sharded.
    """

    def lifted(model: ModelState, volumes: Volumes, key: Key) -> Tree:
        batch, depth = volumes.valid.shape
        size = min(chunk or depth, depth)
        count = -(-depth // size)

        def split(x: Array) -> Array:
            pad = [(0, 0), (0, count * size - depth)] + [(0, 0)] * (x.ndim - 2)
            x = jnp.pad(x, pad).reshape(batch, count, size, *x.shape[2:])
            return jnp.moveaxis(x, 1, 0)

        def one(part: tuple[Array, Array, Array]) -> Tree:
            image, mask, index = (x.reshape(batch * size, *x.shape[2:]) for x in part)
            keys = sample_keys(key, jnp.repeat(volumes.uid, size), index)
            out = function(model, image, mask, keys)
            return jax.tree.map(lambda x: x.reshape(batch, size, *x.shape[1:]), out)

        def join(x: Array) -> Array:
            x = jnp.moveaxis(x, 0, 1)
            return x.reshape(batch, count * size, *x.shape[3:])[:, :depth]

        index = jnp.arange(depth) * (0 if key_per_volume else 1)
        index = jnp.broadcast_to(index, (batch, depth))
        parts = (split(volumes.image), split(volumes.mask), split(index))
        return jax.tree.map(join, jax.lax.map(one, parts))

    return lifted


def slabwise(
    score_slab: ScoreSlab, num_slices: int, overlap: int = 0
) -> Callable[[ModelState, Volumes, Key], Scores]:
    """Lifts a score of slabs of consecutive slices to volumes.

    Slabs start every `num_slices - overlap` slices; the last one is moved back so that
    it ends with the volume's last valid slice. Where slabs overlap, their mean counts.
    A volume thinner than a slab is scored as one slab with invalid slices.

    Args:
      score_slab: Scores B slabs at once.
      num_slices: Slab length S.
      overlap: Slices shared by neighbouring slabs, below S.

    Returns:
      `score` of a Method. Valid slices of a volume must precede its padding. The
      result of a volume does not depend on the common depth of the batch.

    Raises:
      ValueError: If the overlap leaves no step.
    """
    if not 0 <= overlap < num_slices:
        raise ValueError(
            f"The overlap is {overlap}; slabs of {num_slices} slices need one in "
            f"[0, {num_slices - 1}]."
        )
    stride = num_slices - overlap

    def score(model: ModelState, volumes: Volumes, key: Key) -> Scores:
        batch, depth = volumes.valid.shape
        padded = max(depth, num_slices)

        def pad(x: Array) -> Array:
            ends = [(0, 0), (0, padded - depth)] + [(0, 0)] * (x.ndim - 2)
            return jnp.pad(x, ends)

        image, mask, valid = pad(volumes.image), pad(volumes.mask), pad(volumes.valid)
        own_depth = valid.sum(axis=1)

        def slab(index: Array) -> tuple[Array, Array, tuple]:
            start = jnp.clip(index * stride, 0, jnp.maximum(own_depth - num_slices, 0))
            before = (index - 1) * stride + num_slices
            used = (index == 0) | (before < own_depth)
            rows = jax.vmap(lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, num_slices))
            keys = sample_keys(key, volumes.uid, start)
            out = score_slab(
                model, rows(image, start), rows(mask, start), rows(valid, start), keys
            )
            return start, used.astype(jnp.float32), out

        def step(sums: tuple, index: Array) -> tuple[tuple, None]:
            start, used, out = slab(index)
            ones = jnp.ones((batch, num_slices), jnp.float32)
            sums = jax.tree.map(
                lambda s, x: _add_rows(s, _scale(x, used), start), sums, (ones, *out)
            )
            return sums, None

        count = 1 + -(-(padded - num_slices) // stride)
        shapes = jax.eval_shape(lambda: slab(jnp.int32(0))[2])
        zeros = jax.tree.map(
            lambda x: jnp.zeros((batch, padded, *x.shape[2:]), x.dtype), shapes
        )
        sums = (jnp.zeros((batch, padded), jnp.float32), *zeros)
        (weight, *out), _ = jax.lax.scan(step, sums, jnp.arange(count))
        share = 1.0 / jnp.maximum(weight, 1.0)
        anomaly_map, output = jax.tree.map(lambda x: _scale(x, share)[:, :depth], out)
        return summarise(anomaly_map, output, volumes)

    return score


def summarise(
    anomaly_map: Array, reconstruction: Array | None, volumes: Volumes
) -> Scores:
    """Adds slice and volume scores: the mean of the map inside the brain (0 if none).

    Args:
      anomaly_map: [B, D, H, W].
      reconstruction: [B, D, H, W, C] or None.
      volumes: What was scored; padding counts for nothing.
    """
    anomaly_map = anomaly_map.astype(jnp.float32)
    brain = volumes.mask[..., 0] & volumes.valid[:, :, None, None]
    sums = jnp.where(brain, anomaly_map, 0.0).sum(axis=(2, 3))
    counts = brain.sum(axis=(2, 3))
    return Scores(
        anomaly_map=anomaly_map,
        slice_score=sums / jnp.maximum(counts, 1),
        volume_score=sums.sum(axis=1) / jnp.maximum(counts.sum(axis=1), 1),
        reconstruction=reconstruction,
    )


def _scale(x: Array, factor: Array) -> Array:
    """Multiplies by a factor given for the leading axes."""
    return x * factor.reshape(factor.shape + (1,) * (x.ndim - factor.ndim))


def _add_rows(total: Array, rows: Array, start: Array) -> Array:
    """Adds rows [B, S, ...] to total [B, D, ...] from each volume's own start."""

    def one(total: Array, rows: Array, start: Array) -> Array:
        old = jax.lax.dynamic_slice_in_dim(total, start, rows.shape[0])
        return jax.lax.dynamic_update_slice_in_dim(total, old + rows, start, axis=0)

    return jax.vmap(one)(total, rows, start)
