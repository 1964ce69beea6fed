"""Training with several optimisers: players that move in turn.

A player is an optimiser with the networks it moves; a step of training is a sequence
of moves.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from uad_jax.methods import base
from uad_jax.ops import convolutions
from uad_jax.types import Array, Batch, ModelState, TrainState, Tree

# (parameters of all networks, rows) -> (loss [], means over the valid rows).
Loss = Callable[[dict[str, Tree], Batch], tuple[Array, dict[str, Any]]]


class Player(NamedTuple):
    """An optimiser and what it moves.

    Attributes:
      name: Its entry in the optimiser state.
      networks: Names of the networks.
      tx: The optimiser.
    """

    name: str
    networks: tuple[str, ...]
    tx: optax.GradientTransformation


class Position(NamedTuple):
    """What the players change.

    Attributes:
      params: Of all networks.
      opt_state: One entry per player.
    """

    params: dict[str, Tree]
    opt_state: dict[str, Tree]


def start(
    model: ModelState,
    players: Sequence[Player],
    averaged: Sequence[str],
    ema_decay: float | Array,
) -> TrainState:
    """The state of a fresh run.

    Args:
      model: The initialised networks.
      players: Who is trained.
      averaged: Networks whose averages are kept.
      ema_decay: Decay of the averages; 0 = none.
    """
    off = isinstance(ema_decay, float | int) and ema_decay == 0
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        model=model,
        opt_state={
            player.name: player.tx.init(_chosen(model.params, player))
            for player in players
        },
        ema=None
        if off
        else {name: jax.tree.map(jnp.copy, model.params[name]) for name in averaged},
    )


def advance(
    state: TrainState, position: Position, ema_decay: float | Array
) -> TrainState:
    """The state after the moves of one step."""
    ema = state.ema
    if ema is not None:
        live = {name: position.params[name] for name in ema}
        ema = base.moving_average(ema, live, ema_decay, state.step)
    return TrainState(
        step=state.step + 1,
        model=ModelState(params=position.params, collections={}),
        opt_state=position.opt_state,
        ema=ema,
    )


def move(
    player: Player, loss: Loss, position: Position, batch: Batch, accumulate_steps: int
) -> tuple[Position, dict[str, Any]]:
    """One optimiser step of one player; nothing else changes.

    Args:
      player: Who moves.
      loss: What it minimises: a mean over the valid rows.
      position: What there is.
      batch: The whole batch.
      accumulate_steps: Micro-batches.

    Returns:
      The new position, and the loss's scalars with "loss" and, for each network,
      "grad_norm/PLAYER/NETWORK" (before clipping).
    """
    params = _chosen(position.params, player)

    def gradient(_: dict[str, Tree], rows: Batch) -> tuple:
        def of(chosen: dict[str, Tree]) -> tuple:
            return loss({**position.params, **chosen}, rows)

        (value, scalars), grads = jax.value_and_grad(of, has_aux=True)(params)
        return {}, grads, {"loss": value, **scalars}

    _, grads, scalars = base.accumulate(gradient, {}, batch, accumulate_steps)
    own = position.opt_state[player.name]
    updates, own = player.tx.update(grads, own, params)
    norms = {
        f"grad_norm/{player.name}/{name}": optax.tree.norm(grads[name])
        for name in player.networks
    }
    after = Position(
        {**position.params, **optax.apply_updates(params, updates)},
        {**position.opt_state, player.name: own},
    )
    return after, {**scalars, **norms}


def repeat(
    step: Callable[[Position, Array], tuple[Position, dict[str, Any]]],
    position: Position,
    count: int,
    *,
    early: Array | None = None,
    early_count: int = 0,
) -> tuple[Position, dict[str, Any]]:
    """Takes several steps on one batch.

    Args:
      step: (position, index [] int32) -> (position, scalars).
      position: Where to begin.
      count: Number of steps.
      early: While this is true, [] bool, there are `early_count` steps instead.
      early_count: 1 or more with `early`.

    Returns:
      The last position and the scalars of the last step.
    """
    if jax.default_backend() == "cpu":
        step = convolutions.canonical(step)
    shapes = jax.eval_shape(step, position, jnp.int32(0))[1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    length: int | Array = count
    if early is not None and early_count != count:
        length = jnp.where(early, early_count, count)
    return jax.lax.fori_loop(
        0, length, lambda i, carry: step(carry[0], i), (position, zeros)
    )


def _chosen(params: dict[str, Tree], player: Player) -> dict[str, Tree]:
    return {name: params[name] for name in player.networks}
