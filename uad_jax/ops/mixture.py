"""Gaussians, and mixtures of them, given by means and log precisions."""

import math

import jax
import jax.numpy as jnp

from uad_jax.types import Array

_LOG_2PI = math.log(2.0 * math.pi)


def log_density(z: Array, mean: Array, log_precision: Array) -> Array:
    """Log-density of independent Gaussians, summed over the last axis.

    Args:
      z: [..., Z].
      mean: [..., Z].
      log_precision: Natural logarithm of 1 / variance, [..., Z].

    Returns:
      [...] float32.
    """
    quadratic = jnp.square(z - mean) * jnp.exp(log_precision)
    return 0.5 * (log_precision - quadratic - _LOG_2PI).sum(axis=-1)


def released_log_density(z: Array, mean: Array, log_precision: Array) -> Array:
    """What stands for `log_density` in the released codes of You et al. and Baur et al.

    The log precision has the wrong sign and lacks its factor 1/2: components that are
    sure of themselves are held to be less likely.
    """
    quadratic = jnp.square(z - mean) * jnp.exp(log_precision)
    return (math.log(math.pi) - log_precision - 0.5 * quadratic).sum(axis=-1)


def kl_normals(mu: Array, log_sigma: Array, mean: Array, log_precision: Array) -> Array:
    """KL divergence of N(mu, sigma^2) from N(mean, 1 / precision).

    Args:
      mu: [..., Z].
      log_sigma: Natural logarithm of the standard deviation, [..., Z].
      mean: [..., Z].
      log_precision: [..., Z].

    Returns:
      Summed over the last axis, [...] float32, at least 0.
    """
    spread = jnp.exp(2.0 * log_sigma + log_precision)
    shift = jnp.square(mu - mean) * jnp.exp(log_precision)
    terms = spread + shift - 1.0 - 2.0 * log_sigma - log_precision
    return 0.5 * terms.sum(axis=-1)


def kl_uniform(log_weights: Array) -> Array:
    """KL divergence of a categorical distribution from the uniform one.

    Args:
      log_weights: Logarithms of C probabilities, [..., C].

    Returns:
      [...] float32, from 0 to log C.
    """
    weights = jnp.exp(log_weights)
    return (weights * log_weights).sum(axis=-1) + math.log(log_weights.shape[-1])


def log_responsibilities(log_densities: Array) -> Array:
    """Logarithm of what each of C equally likely components has in a point.

    Args:
      log_densities: [..., C].

    Returns:
      [..., C] float32; the exponentials sum to 1 over the last axis.
    """
    return jax.nn.log_softmax(log_densities, axis=-1)
