"""Losses with explicit reductions: one value per row, then a mean over valid rows.

Learning rates only mean something together with the reduction: Baur et al. sum over
the pixels, which is height * width * channels times a mean.
"""

import enum

import jax
import jax.numpy as jnp


class Reduction(enum.Enum):
    """How the terms of one row become one number."""

    SUM = "sum"
    MEAN = "mean"


class PixelLoss(enum.Enum):
    """Distance of a prediction to its target, pixel by pixel."""

    L1 = "l1"
    L2 = "l2"


def pixels(kind: PixelLoss, x: jax.Array, y: jax.Array) -> jax.Array:
    """Absolute or squared differences, unreduced, [...] float32."""
    difference = _float32(x) - _float32(y)
    return jnp.abs(difference) if kind is PixelLoss.L1 else jnp.square(difference)


def l1(x: jax.Array, y: jax.Array, reduction: Reduction = Reduction.SUM) -> jax.Array:
    """Absolute difference of each row.

    Args:
      x: [N, ...] float.
      y: [N, ...] float, the shape of x.
      reduction: Over all axes but the first.

    Returns:
      [N] float32.
    """
    return per_row(pixels(PixelLoss.L1, x, y), reduction)


def l2(x: jax.Array, y: jax.Array, reduction: Reduction = Reduction.SUM) -> jax.Array:
    """Squared difference of each row, without a root or a factor 1/2.

    Args:
      x: [N, ...] float.
      y: [N, ...] float, the shape of x.
      reduction: Over all axes but the first.

    Returns:
      [N] float32.
    """
    return per_row(pixels(PixelLoss.L2, x, y), reduction)


def kl_normal(
    mu: jax.Array, log_sigma: jax.Array, reduction: Reduction = Reduction.SUM
) -> jax.Array:
    """KL divergence of N(mu, sigma^2) from N(0, 1) of each row.

    Args:
      mu: Means, [N, ...].
      log_sigma: Natural logarithm of the standard deviations (not variances).
      reduction: Over the latent variables.

    Returns:
      0.5 * (mu^2 + sigma^2 - log sigma^2 - 1), reduced, [N] float32, >= 0.

    Source: Kingma and Welling 2014, appendix B.
    """
    mu, log_sigma = _float32(mu), _float32(log_sigma)
    terms = jnp.square(mu) + jnp.exp(2.0 * log_sigma) - 2.0 * log_sigma - 1.0
    return per_row(0.5 * terms, reduction)


def per_row(terms: jax.Array, reduction: Reduction) -> jax.Array:
    """Reduces [N, ...] to [N]."""
    axes = tuple(range(1, terms.ndim))
    if reduction is Reduction.MEAN:
        return terms.mean(axes)
    return terms.sum(axes)


def mean_over_valid(rows: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean of the valid rows of the global batch; 0 if there are none.

    Args:
      rows: One value per row, [...] float.
      valid: False on padding, same shape.

    Returns:
      [] float32. Padding has no influence, not even on the gradient.
    """
    total = jnp.sum(jnp.where(valid, _float32(rows), 0.0))
    return total / jnp.maximum(jnp.sum(valid), 1).astype(jnp.float32)


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)
