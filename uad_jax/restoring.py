"""Restores slices with a model: what You et al. lower, step by step.

Source: You et al. 2019, "Unsupervised lesion detection via image restoration with a
normative prior".
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from uad_jax.anomaly_score_config import RestorationConfig, Smoothing
from uad_jax.methods import base
from uad_jax.ops import restoration
from uad_jax.score_functions import Bind, Functions, Rows
from uad_jax.types import Array, Key, ModelState, Tree, Volumes


def objective(
    functions: Functions, config: RestorationConfig, model: ModelState
) -> restoration.Objective:
    """What a restoration lowers: error + weighted KL + weight * total variation."""

    def value(x: Array, y: Array, weight: Array, keys: Array | None) -> Array:
        terms = functions.terms(model, x, keys, config.pixel_loss)
        change = y - x if config.smoothing is Smoothing.CHANGE else x - terms.output
        likely = terms.reconstruction + functions.kl_weight * terms.kl
        return likely + weight * restoration.total_variation(change)

    return value


def restored(
    functions: Functions,
    config: RestorationConfig,
    model: ModelState,
    image: Array,
    mask: Array,
    keys: Array,
) -> Array:
    """Restores slices once for each weight of the total variation.

    Args:
      functions: The method.
      config: How.
      model: Its model.
      image: [N, H, W, C] float32.
      mask: Brain, [N, H, W, 1] bool.
      keys: One per slice, [N].

    Returns:
      [N, L, H, W, C] float32 for L weights.
    """
    steps, weights = _steps(config)
    down = objective(functions, config, model)
    drawn = keys if config.sampled else None
    found = restoration.sweep(down, image, mask, weights, steps, drawn)
    return jnp.moveaxis(found, 0, 1)


def _steps(config: RestorationConfig) -> tuple[restoration.Steps, Array]:
    """The steps and the weights [L] of a restoration."""
    index = jnp.arange(config.num_steps)
    early = jnp.asarray(config.step_size, jnp.float32)
    steps = restoration.Steps(
        sizes=jnp.where(index < config.late_from, early, config.late_step_size),
        clip=config.clip,
        masked=config.masked,
    )
    weights = [jnp.asarray(weight, jnp.float32) for weight in config.tv_weights]
    return steps, jnp.stack(weights)


def walker(
    bind: Bind, config: RestorationConfig
) -> Callable[[ModelState, Rows], Array]:
    """Restores slices by a loop on the host around one compiled step.

    XLA:CPU runs convolution gradients inside its own loops slowly.

    Args:
      bind: The method's functions for some rows.
      config: How.

    Returns:
      (model, rows) -> what `restored` gives, [N, L, H, W, C]; not to be jitted.
    """

    @jax.jit
    def advance(model: ModelState, x: Array, rows: Rows, index: Array) -> Array:
        """One step of [L, N, H, W, C], for all weights."""
        down = objective(bind(rows), config, model)
        steps, weights = _steps(config)
        drawn = rows.keys if config.sampled else None

        def one(x: Array, weight: Array) -> Array:
            return restoration.step(
                down, x, rows.image, rows.mask, weight, steps, drawn, index
            )

        return jax.vmap(one)(x, weights)

    def walk(model: ModelState, rows: Rows) -> Array:
        x = jnp.stack([rows.image.astype(jnp.float32)] * len(config.tv_weights))
        for index in range(config.num_steps):
            x = advance(model, x, rows, jnp.int32(index))
        return jnp.moveaxis(x, 0, 1)

    return walk


def in_parts(function: Callable[[Rows], Tree], rows: Rows, size: int) -> Tree:
    """Applies a function of rows to `size` of them at a time, on the host.

    Args:
      function: Rows -> arrays [N, ...].
      rows: All rows.
      size: Of a part; 0 = all. The last part begins earlier, so that all have the same
        shapes and one program serves them.

    Returns:
      What the function gives for all rows.
    """
    count = len(rows.image)
    size = min(size or count, count)
    parts = []
    for start in range(0, count, size):
        first = min(start, count - size)
        part = jax.tree.map(lambda x, i=first: x[i : i + size], rows)
        found = function(part)
        parts.append(jax.tree.map(lambda x, i=start - first: x[i:], found))
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def on_host(
    functions: Functions, config: RestorationConfig, chunk: int = 0
) -> Callable[[ModelState, Volumes, Key], Array]:
    """Restores volumes slice by slice as `walker` does.

    Args:
      functions: The method.
      config: How.
      chunk: Slices that are restored at once; 0 = all of the batch of volumes.

    Returns:
      (model, volumes, key) -> what `restored` gives for every slice,
      [B, D, L, H, W, C]; not to be jitted.
    """
    walk = walker(lambda rows: functions, config)

    def restore(model: ModelState, volumes: Volumes, key: Key) -> Array:
        rows = _flat(volumes, key)
        found = in_parts(lambda part: walk(model, part), rows, chunk)
        return found.reshape(*volumes.valid.shape, *found.shape[1:])

    return restore


@jax.jit
def _flat(volumes: Volumes, key: Key) -> Rows:
    """Every slice of volumes, B * D rows."""
    depth = volumes.valid.shape[1]
    index = jnp.tile(jnp.arange(depth), len(volumes.uid))
    keys = base.sample_keys(key, jnp.repeat(volumes.uid, depth), index)
    image, mask = (x.reshape(-1, *x.shape[2:]) for x in (volumes.image, volumes.mask))
    return Rows(image, mask, keys)
