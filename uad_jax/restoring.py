"""Restores slices with a model: what You et al. lower, step by step.

Source: You et al. 2019, "Unsupervised lesion detection via image restoration with a
normative prior".
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from uad_jax.anomaly_score_config import RestorationConfig, Smoothing
from uad_jax.methods import base, lifting
from uad_jax.ops import restoration
from uad_jax.score_functions import Functions
from uad_jax.types import Array, Key, ModelState, Volumes


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


def on_host(
    functions: Functions, config: RestorationConfig, chunk: int = 0
) -> Callable[[ModelState, Volumes, Key], Array]:
    """Restores volumes by a loop on the host around one compiled step.

    XLA:CPU runs convolution gradients inside its own loops slowly.

    Args:
      functions: The method.
      config: How.
      chunk: Slices that are restored at once; 0 = all of the batch of volumes.

    Returns:
      (model, volumes, key) -> what `restored` gives for every slice,
      [B, D, L, H, W, C]; not to be jitted.
    """

    @jax.jit
    def advance(
        model: ModelState, x: Array, rows: tuple[Array, Array, Array], index: Array
    ) -> Array:
        """One step of [L, N, H, W, C], for all weights."""
        image, mask, keys = rows
        down = objective(functions, config, model)
        steps, weights = _steps(config)
        drawn = keys if config.sampled else None

        def one(x: Array, weight: Array) -> Array:
            return restoration.step(down, x, image, mask, weight, steps, drawn, index)

        return jax.vmap(one)(x, weights)

    def restore(model: ModelState, volumes: Volumes, key: Key) -> Array:
        rows = _flat(volumes, key)
        count = len(rows[0])
        size = min(chunk or count, count)
        parts = []
        for start in range(0, count, size):
            # The last part begins earlier, so that one program serves all.
            first = min(start, count - size)
            part = jax.tree.map(lambda x, i=first: x[i : i + size], rows)
            x = jnp.stack([part[0].astype(jnp.float32)] * len(config.tv_weights))
            for index in range(config.num_steps):
                x = advance(model, x, part, jnp.int32(index))
            parts.append(x[:, start - first :])
        found = jnp.moveaxis(jnp.concatenate(parts, axis=1), 0, 1)
        return found.reshape(*volumes.valid.shape, *found.shape[1:])

    return restore


@jax.jit
def _flat(volumes: Volumes, key: Key) -> tuple[Array, Array, Array]:
    """Image, mask and key of every slice of volumes, [B * D, ...]."""
    depth = volumes.valid.shape[1]
    index = jnp.tile(jnp.arange(depth), len(volumes.uid))
    keys = base.sample_keys(key, jnp.repeat(volumes.uid, depth), index)
    image, mask = (x.reshape(-1, *x.shape[2:]) for x in (volumes.image, volumes.mask))
    return image, mask, keys


def choose_tv_weight(
    functions: Functions,
    config: RestorationConfig,
    model: ModelState,
    volumes: Volumes,
    key: Key,
) -> tuple[Array, Array]:
    """Chooses the weight of the total variation on healthy scans, without labels.

    Args:
      functions: The method.
      config: How to restore; `tv_weights` are the candidates.
      model: Its model.
      volumes: Healthy validation scans.
      key: Key of the draws.

    Returns:
      The index of the weight that changes the brain least, [] int32, and the mean
      absolute change with each weight, [L] float32.
    """

    def slices(model: ModelState, image: Array, mask: Array, keys: Array) -> Array:
        return restored(functions, config, model, image, mask, keys)

    found = lifting.over_slices(slices)(model, volumes, key)
    counted = volumes.mask & volumes.valid[:, :, None, None, None]
    return restoration.least_change(volumes.image, jnp.moveaxis(found, 2, 0), counted)
