"""Losses of critics and generators, the gradient penalty, and signs of collapse.

Critic values are [N, S]: one value per row for S = 1, one per site of a feature map
for critics that judge patches. Everything is float32.
"""

import enum
from collections.abc import Callable

import jax
import jax.numpy as jnp

from uad_jax.ops import losses

_TINY = 1e-12  # keeps the derivative of a norm finite where a gradient is 0


class Adversary(enum.Enum):
    """What a critic maximises."""

    LOG_LOSS = "log_loss"  # classifies real and fake: Jensen-Shannon divergence
    WGAN_GP = "wgan_gp"  # tells means apart with slope 1: Wasserstein distance


def critic_loss(kind: Adversary, real: jax.Array, fake: jax.Array) -> jax.Array:
    """What the critic minimises, without the gradient penalty.

    Args:
      kind: The adversary.
      real: Critic values of real rows, [N, S].
      fake: Critic values of made rows, [N, S].

    Returns:
      [N] float32, means over the sites: cross entropy of both classes (2 log 2 for a
      critic that knows nothing), or fake - real.

    Source: Goodfellow et al. 2014, eq. 1; Gulrajani et al. 2017, eq. 3.
    """
    if kind is Adversary.LOG_LOSS:
        return (jax.nn.softplus(-real) + jax.nn.softplus(fake)).mean(axis=1)
    return (fake - real).mean(axis=1)


def generator_loss(kind: Adversary, fake: jax.Array) -> jax.Array:
    """What the generator minimises.

    Args:
      kind: The adversary.
      fake: Critic values of made rows, [N, S].

    Returns:
      [N] float32: -log of the probability of being taken for real (the form that does
      not saturate), or minus the critic's value.
    """
    if kind is Adversary.LOG_LOSS:
        return jax.nn.softplus(-fake).mean(axis=1)
    return -fake.mean(axis=1)


def accuracy(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Share of the sites of both classes on the right side of 0.

    Args:
      real: Critic values of real rows, [N, S].
      fake: Critic values of made rows, [N, S].

    Returns:
      [N] float32 in [0, 1]; 0.5 for a critic that knows nothing.
    """
    right = 0.5 * (real > 0) + 0.5 * (fake < 0)
    return right.mean(axis=1).astype(jnp.float32)


def interpolate(
    keys: jax.Array, real: jax.Array, fake: jax.Array, *, away: bool = False
) -> jax.Array:
    """Draws a point between each real row and its fake one.

    Args:
      keys: One key per row, [N].
      real: [N, ...].
      fake: [N, ...].
      away: Draw on the other side of `real` instead: the released code of the
        adversarial autoencoders extrapolates.

    Returns:
      real + e * (fake - real) with e uniform in [0, 1), [N, ...] float32.
    """
    real, fake = real.astype(jnp.float32), fake.astype(jnp.float32)
    draw = jax.vmap(jax.random.uniform)(keys)
    draw = draw.reshape(-1, *[1] * (real.ndim - 1))
    return real + draw * (real - fake if away else fake - real)


def gradient_penalty(
    critic: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    *,
    per_column: bool = False,
) -> jax.Array:
    """How far the slope of a critic is from 1.

    Args:
      critic: [N, ...] -> [N, S]; a row depends on the same row only.
      x: Where the slope is taken, [N, ...] float32.
      per_column: Take the norm over axis 1 (of an image the height) alone and average
        over the rest, and add the sites up: what the released code does. For vectors
        and one site both forms agree.

    Returns:
      (|gradient of the mean over the sites| - 1)^2 of each row, [N] float32.

    Source: Gulrajani et al. 2017, eq. 3.
    """

    def total(x: jax.Array) -> jax.Array:
        sites = critic(x).astype(jnp.float32)
        return sites.sum() if per_column else sites.mean(axis=1).sum()

    gradient = jax.grad(total)(x.astype(jnp.float32))
    axes = (1,) if per_column else tuple(range(1, x.ndim))
    norm = jnp.sqrt(jnp.sum(jnp.square(gradient), axis=axes) + _TINY)
    return losses.per_row(jnp.square(norm - 1.0), losses.Reduction.MEAN)


def largest_gap(
    real: jax.Array, fake: jax.Array, num_sites: int, *, per_column: bool = False
) -> jax.Array:
    """The most by which a critic tells two rows apart if its penalty is 0.

    The gap is the slope along the way from one to the other, whose norm is that of
    `gradient_penalty`: 1 in all, or 1 for each column of the sum over the sites.

    Args:
      real: [N, ...].
      fake: [N, ...].
      num_sites: Values S of the critic for a row.
      per_column: As in `gradient_penalty`.

    Returns:
      Bound of (mean over the sites of real) - (that of fake), [N] float32: the
      Euclidean distance, or the columns' distances added up and divided by S.
    """
    square = jnp.square(real.astype(jnp.float32) - fake.astype(jnp.float32))
    axes = (1,) if per_column else tuple(range(1, square.ndim))
    norm = jnp.sqrt(jnp.sum(square, axis=axes) + _TINY)
    bound = losses.per_row(norm, losses.Reduction.SUM)
    return bound / num_sites if per_column else bound


def moments(x: jax.Array, valid: jax.Array) -> dict[str, jax.Array]:
    """What `spread` needs, as means over the valid rows, which micro-batches share.

    Args:
      x: Images, [N, H, W, C] float.
      valid: False on padding, [N] bool.

    Returns:
      "mean" and "square" of each pixel over the rows, [H, W, C], and "pixels" [], the
      mean over the rows of the standard deviation within an image.
    """
    x = x.astype(jnp.float32)

    def over_rows(x: jax.Array) -> jax.Array:
        keep = valid.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(keep, x, 0.0).sum(axis=0) / jnp.maximum(valid.sum(), 1)

    return {
        "mean": over_rows(x),
        "square": over_rows(jnp.square(x)),
        "pixels": over_rows(x.std(axis=(1, 2, 3))),
    }


def spread(
    output: dict[str, jax.Array], image: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """How much images vary, compared with those that they stand for.

    Args:
      output: `moments` of the images.
      image: `moments` of what they should look like.

    Returns:
      Two ratios [] of standard deviations: within an image (0 = flat images) and
      between the images of the batch (0 = all the same). 1 = as much as they should.
    """

    def between(m: dict[str, jax.Array]) -> jax.Array:
        variance = (m["square"] - jnp.square(m["mean"])).mean()
        return jnp.sqrt(jnp.maximum(variance, 0.0))

    floor = 1e-4  # a batch of equal images spreads as much as it should
    return (
        (output["pixels"] + floor) / (image["pixels"] + floor),
        (between(output) + floor) / (between(image) + floor),
    )


def energy_distance(x: jax.Array, y: jax.Array, valid: jax.Array) -> jax.Array:
    """Distance of two distributions of images, from one sample of each.

    Args:
      x: Sample of the first, [N, ...] float.
      y: Sample of the second, [N, ...] float, as many rows.
      valid: False on rows of both that do not count, [N] bool.

    Returns:
      E|x - y| - (E|x - x'| + E|y - y'|) / 2 over pairs of different rows, Euclidean
      and divided by the root of the number of pixels, [] float32: 0 on average where
      the distributions are one, and above 0 where the x are all alike.

    Source: Szekely and Rizzo 2013, "Energy statistics".
    """
    x, y = (a.reshape(len(a), -1).astype(jnp.float32) for a in (x, y))
    pairs = valid[:, None] & valid[None, :] & ~jnp.eye(len(x), dtype=bool)
    count = jnp.maximum(pairs.sum(), 1)

    def mean_distance(a: jax.Array, b: jax.Array) -> jax.Array:
        square = jnp.square(a).sum(1)[:, None] + jnp.square(b).sum(1)[None, :]
        inner = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
        square = jnp.maximum(square - 2.0 * inner, 0.0)
        return jnp.where(pairs, jnp.sqrt(square), 0.0).sum() / count

    own = 0.5 * (mean_distance(x, x) + mean_distance(y, y))
    return (mean_distance(x, y) - own) / jnp.sqrt(x.shape[1])
