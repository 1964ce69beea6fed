"""Restoration of images towards what a model finds likely, by gradient steps."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from uad_jax.types import Array

# (x [N, H, W, C], y [N, H, W, C], weight [], keys [N] or None) -> [N]: how unlikely the
# restoration x of the image y is.
Objective = Callable[[Array, Array, Array, Array | None], Array]


class Steps(NamedTuple):
    """How the gradient steps are taken.

    Attributes:
      sizes: One per step, [T] float32.
      clip: Largest entry of a gradient, [] or a number; 0 = no limit.
      masked: Whether only the brain is changed.
    """

    sizes: Array
    clip: float | Array
    masked: bool


def total_variation(image: Array) -> Array:
    """Sums the absolute differences of neighbouring pixels along both axes.

    Args:
      image: [N, H, W, C] float.

    Returns:
      [N] float32, over all channels. Equal neighbours have the gradient 0 (that of
      `jnp.abs` at 0 is 1, which would move an image that was not changed yet).
    """

    def size(difference: Array) -> Array:
        sign = jax.lax.stop_gradient(jnp.sign(difference))
        return (difference * sign).sum(axis=(1, 2, 3))

    image = image.astype(jnp.float32)
    return size(image[:, 1:] - image[:, :-1]) + size(image[:, :, 1:] - image[:, :, :-1])


def step(
    objective: Objective,
    x: Array,
    image: Array,
    mask: Array,
    weight: float | Array,
    steps: Steps,
    keys: Array | None,
    index: int | Array,
) -> Array:
    """Takes one step down the objective.

    The gradient is that of the sum over the images, so a step does not depend on how
    many are restored together.

    Args:
      objective: What falls.
      x: The restorations so far, [N, H, W, C] float32.
      image: Where they began, the same shape.
      mask: Brain, [N, H, W, 1] bool.
      weight: Handed to the objective.
      steps: The steps.
      keys: One per image, [N]; the objective gets other ones at every step. None = it
        gets none.
      index: Which step, from 0.

    Returns:
      [N, H, W, C] float32.
    """
    weight = jnp.asarray(weight, jnp.float32)
    clip = jnp.asarray(steps.clip, jnp.float32)
    limit = jnp.where(clip > 0, clip, jnp.inf)
    if keys is not None:
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
    gradient = jax.grad(lambda x: objective(x, image, weight, keys).sum())(x)
    change = steps.sizes[index] * jnp.clip(gradient, -limit, limit)
    return x - (change * mask if steps.masked else change)


def restore(
    objective: Objective,
    image: Array,
    mask: Array,
    weight: float | Array,
    steps: Steps,
    keys: Array | None = None,
) -> Array:
    """Walks from an image down the objective; the arguments are those of `step`.

    Source: You et al. 2019, "Unsupervised lesion detection via image restoration with
    a normative prior"; Chen et al. 2020, the journal version.
    """

    def once(x: Array, index: Array) -> tuple[Array, None]:
        return step(objective, x, image, mask, weight, steps, keys, index), None

    index = jnp.arange(len(steps.sizes))
    return jax.lax.scan(once, image.astype(jnp.float32), index)[0]


def sweep(
    objective: Objective,
    image: Array,
    mask: Array,
    weights: Array,
    steps: Steps,
    keys: Array | None = None,
) -> Array:
    """Restores images once for each weight, all at the same time.

    Args:
      objective: As in `restore`.
      image: As in `restore`.
      mask: As in `restore`.
      weights: [L] float32.
      steps: As in `restore`.
      keys: As in `restore`; every weight gets the same.

    Returns:
      [L, N, H, W, C] float32.
    """
    return jax.vmap(
        lambda weight: restore(objective, image, mask, weight, steps, keys)
    )(weights)
