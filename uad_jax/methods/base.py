"""What a method is, and how one loss with one optimiser becomes one."""

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
        -> image; for priors and restoration. The key is one [], or one per row [N]
        (`sample_keys`): then no row depends on its place.
      features: (model, volumes) -> features computed once per volume and cached.
      filters_inside: True if `score` already filters its map, so that the
        evaluator must not post-process further.
      host_score: The same as `score`, but not to be jitted: it drives programs of its
        own. On a CPU it takes the place of a `score` that loops over convolution
        gradients, which XLA:CPU runs slowly inside a loop of its own.
    """

    inputs: Inputs
    init: Callable[[Key, Batch], TrainState]
    update: Callable[[TrainState, Batch, Key], tuple[TrainState, Scalars]]
    validate: Callable[[ModelState, Batch, Key], Scalars]
    score: Callable[[ModelState, Volumes, Key], Scores] | None
    reconstruct: Callable[..., Array] | None = None
    features: Callable[[ModelState, Volumes], Array] | None = None
    filters_inside: bool = False
    host_score: Callable[[ModelState, Volumes, Key], Scores] | None = None


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


def row_keys(key: Key, count: int) -> Array:
    """Keys of `count` rows [count]: as given, or split from one [] key."""
    return key if key.ndim else jax.random.split(key, count)


def split_keys(keys: Key, count: int) -> Key:
    """Splits the keys of the rows, [N], into `count` independent sets, [count, N]."""
    return jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, count))(keys), 1, 0)


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
      collections: Mutable collections, handed from one micro-batch to the next; one
        without valid rows does not change them.
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
        changed, *values = gradient(collections, part)
        weight = jnp.sum(part.valid).astype(jnp.float32) / total
        collections = jax.tree.map(
            lambda new, old: jnp.where(weight > 0, new, old), changed, collections
        )
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


def check_training(accumulate_steps: int, ema_decay: float) -> None:
    """Raises ValueError for values that `single_optimizer` cannot take."""
    if accumulate_steps < 1:
        raise ValueError(f"accumulate_steps is {accumulate_steps}; use 1 or more.")
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay is {ema_decay}; it must lie in [0, 1).")
