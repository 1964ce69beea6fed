"""Anomaly maps from gradients of a model's loss with respect to the pixels."""

import jax
import jax.numpy as jnp

from uad_jax.anomaly_score_config import Gradient, GradientConfig, GradientScale
from uad_jax.ops import filters
from uad_jax.score_functions import Functions
from uad_jax.types import Array, ModelState, Volumes

_LEAST_RANGE = 1e-12  # flatter gradients count as having this range


def slopes(
    functions: Functions,
    config: GradientConfig,
    model: ModelState,
    image: Array,
    keys: Array,
) -> Array:
    """Absolute gradient of a term of the loss with respect to the pixels.

    Args:
      functions: The method.
      config: Which term.
      model: Its model.
      image: [N, H, W, C] float32.
      keys: One per slice, [N].

    Returns:
      [N, H, W] float32, the mean over the channels (and the draws of the code).
    """
    of, pixel_loss = config.of, config.pixel_loss

    def value(x: Array, keys: Array | None) -> Array:
        terms = functions.terms(model, x, keys, pixel_loss)
        if of is Gradient.KL:
            return terms.kl.sum()
        if of is Gradient.RECONSTRUCTION:
            return terms.reconstruction.sum()
        return (terms.reconstruction + functions.kl_weight * terms.kl).sum()

    def one(keys: Array | None) -> Array:
        return jnp.abs(jax.grad(value)(image, keys)).mean(axis=-1)

    if not config.samples:
        return one(None)
    draws = jax.vmap(lambda key: jax.random.split(key, config.samples))(keys)
    return jax.vmap(one, in_axes=1)(draws).mean(axis=0)


def weigh(
    steepness: Array,
    volumes: Volumes,
    *,
    smoothing: float,
    residual: Array | None = None,
    scale: GradientScale = GradientScale.VOLUME,
) -> Array:
    """Blurs gradients and, if asked to, weighs a residual with them.

    Args:
      steepness: Absolute gradients, [B, D, H, W] float32.
      volumes: What they are of.
      smoothing: Standard deviation in pixels of the Gaussian, cut at one deviation,
        that blurs each slice; 0 = none.
      residual: [B, D, H, W], which the scaled gradients multiply; None = they are the
        map, unscaled.
      scale: How they are scaled. VOLUME: to 0 ... 1 over the brain of each volume (the
        code of Zimmerer et al. scales over the batch, which makes a score depend on
        its neighbours).

    Returns:
      [B, D, H, W] float32.

    Source: Zimmerer et al. 2018, "Context-encoding variational autoencoder for
    unsupervised anomaly detection", and the authors' released code.
    """
    if residual is not None and scale is GradientScale.VOLUME:
        brain = volumes.mask[..., 0] & volumes.valid[:, :, None, None]
        axes = (1, 2, 3)
        low = jnp.where(brain, steepness, jnp.inf).min(axis=axes, keepdims=True)
        high = jnp.where(brain, steepness, -jnp.inf).max(axis=axes, keepdims=True)
        empty = ~brain.any(axis=axes, keepdims=True)
        low, high = jnp.where(empty, 0.0, low), jnp.where(empty, 1.0, high)
        scaled = (steepness - low) / jnp.maximum(high - low, _LEAST_RANGE)
        steepness = jnp.clip(scaled, 0.0, 1.0)
    if smoothing:
        steepness = filters.gaussian(steepness, smoothing, truncate=1.0)
    return steepness if residual is None else steepness * residual
