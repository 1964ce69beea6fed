"""Noise of the diffusion methods: training examples, their error, steps of a test.

Images are about [0, 1] outside and about [-1, 1] where they are noised and denoised.
Steps are zero-based: t in [0, T).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uad_jax.denoising_config import ProcessConfig, ScoringConfig
from uad_jax.methods import base
from uad_jax.ops import augment as augment_lib
from uad_jax.ops import diffusion, losses
from uad_jax.ops.augment import AugmentConfig
from uad_jax.types import Array, Batch, Key

# (keys [N], shape [N, H, W, C]) -> the noised pixels, [N, H, W, 1] bool
Region = Callable[[Array, tuple[int, ...]], Array]
_AUGMENT = 3  # draw of a row; `noised` uses 0 to 2


def to_signed(image: Array) -> Array:
    """Maps about [0, 1] to about [-1, 1]."""
    return 2.0 * image.astype(jnp.float32) - 1.0


def from_signed(x0: Array) -> Array:
    """Inverts `to_signed`."""
    return 0.5 * (x0 + 1.0)


class Noised(NamedTuple):
    """A training example, made by the keys of its rows.

    Attributes:
      x0: Clean images, [N, H, W, C] in about [-1, 1].
      xt: Images at step t, [N, H, W, C].
      t: Steps, [N] int32.
      target: What the denoiser should predict, [N, H, W, C].
      keys: For further draws, [N].
    """

    x0: Array
    xt: Array
    t: Array
    target: Array
    keys: Array


def noised(process: ProcessConfig, batch: Batch, key: Key) -> Noised:
    """Noises each row of a batch to a step of its own.

    Step and noise follow from the key, the volume and the slice; shared noise from the
    key alone.
    """
    schedule = process.make_schedule()
    keys = base.sample_keys(key, batch.uid, batch.slice_index)
    step_keys, noise_keys, others = (diffusion.fold_in(keys, i) for i in range(3))
    if process.shared_noise:
        noise_keys = jax.random.fold_in(key, 1)
    limit = process.train_steps or process.num_steps
    t = jax.vmap(lambda k: jax.random.randint(k, (), 0, limit))(step_keys)
    x0 = to_signed(batch.image)
    eps = process.make_noise(x0.shape)(noise_keys, t)
    xt = diffusion.q_sample(schedule, x0, t, eps)
    target = eps  # from_x0 recovers it to rounding only
    if process.prediction is not diffusion.Prediction.EPS:
        target = diffusion.from_x0(schedule, process.prediction, x0, xt, t)
    return Noised(x0, xt, t, target, others)


def augmented(config: AugmentConfig, batch: Batch, key: Key) -> Batch:
    """Changes each slice of a training batch at random, keyed like its noise."""
    keys = base.sample_keys(key, batch.uid, batch.slice_index)
    keys = diffusion.fold_in(keys, _AUGMENT)
    return dataclasses.replace(
        batch, image=augment_lib.augment(config, keys, batch.image)
    )


def mean_error(
    process: ProcessConfig,
    denoise: diffusion.Denoiser,
    batch: Batch,
    key: Key,
    region: Region | None = None,
) -> Array:
    """Mean error of the prediction where a row is noised, at a random step each.

    Args:
      process: The diffusion process.
      denoise: The denoiser.
      batch: Slices, image [B, H, W, C] float32.
      key: Key of the step.
      region: Draws what is noised; the denoiser sees the rest clean, and it does not
        count. None = all of the slice.

    Returns:
      The mean over the valid rows, [] float32.
    """
    example = noised(process, batch, key)
    if region is None:
        inside = jnp.ones((*batch.image.shape[:-1], 1), bool)
        prediction = denoise(example.xt, example.t)
    else:
        inside = region(example.keys, batch.image.shape)
        prediction = denoise(jnp.where(inside, example.xt, example.x0), example.t)
    rows = row_errors(process, prediction, example.target, inside)
    return losses.mean_over_valid(rows, batch.valid)


def row_errors(
    process: ProcessConfig, prediction: Array, target: Array, inside: Array
) -> Array:
    """Mean distance of each row inside its region.

    Args:
      process: Says which distance.
      prediction: [N, H, W, C].
      target: [N, H, W, C].
      inside: The pixels that count, [N, H, W, 1] bool.

    Returns:
      [N] float32; 0 where no pixel counts.
    """
    terms = losses.pixels(process.pixel_loss, prediction, target).mean(-1)
    return jax.vmap(losses.mean_over_valid)(terms, inside[..., 0])


def noise_steps(
    process: ProcessConfig,
    scoring: ScoringConfig,
    count: int,
    strength: float | Array | None = None,
) -> Array:
    """Steps to which `count` images are noised, [count, E] int32.

    Args:
      process: The diffusion process.
      scoring: Its test steps are taken if no strength is given.
      count: Number of images.
      strength: Share of the steps in (0, 1], [] or [count]: t is the rounded share of
        T less 1, at least 0. With T = 1000, 0.5 means t = 499. Inside `jit` a share
        out of range counts as the nearest one in range.

    Raises:
      ValueError: If a strength whose value is known is out of range.
    """
    if strength is None:
        steps = jnp.asarray(scoring.test_steps, jnp.int32)[None, :]
        return jnp.broadcast_to(steps, (count, len(scoring.test_steps)))
    if isinstance(strength, jax.core.Tracer):
        steps = jnp.round(strength * process.num_steps).astype(jnp.int32) - 1
        steps = jnp.clip(steps, 0, process.num_steps - 1)
    else:
        shares = np.asarray(strength)
        steps = jnp.asarray(
            [strength_step(process, share) for share in shares.ravel().tolist()]
        ).reshape(shares.shape)
    return jnp.broadcast_to(steps, (count,))[:, None]


def strength_step(process: ProcessConfig, strength: float) -> int:
    """The step of a strength that is a number; the rule stands in `noise_steps`.

    Raises:
      ValueError: If it is out of range.
    """
    if not 0 < strength <= 1:
        raise ValueError(
            f"strength is {strength}; it is the noised share of the "
            f"{process.num_steps} steps and must lie in (0, 1]."
        )
    return max(round(strength * process.num_steps) - 1, 0)


def image_keys(process: ProcessConfig, key: Key, count: int) -> Array:
    """Keys of images, [count]: as given, else one for all if shared, else split."""
    if process.shared_noise and key.ndim == 0:
        return jnp.broadcast_to(key, (count,))
    return base.row_keys(key, count)


def for_each_step(
    process: ProcessConfig, image: Array, keys: Array, steps: Array
) -> tuple[Array, Array, Array]:
    """Repeats images once for each of their steps, and draws the noise.

    The noise of a step follows from the key and the step, so that an ensemble contains
    what each of its steps gives alone.

    Args:
      process: The diffusion process.
      image: [N, H, W, C].
      keys: [N].
      steps: [N, E] int32.

    Returns:
      Images [N * E, H, W, C], steps [N * E] and noise [N * E, H, W, C], image by image.
    """
    ensemble = steps.shape[1]
    t = steps.reshape(-1)
    keys = jax.vmap(jax.random.fold_in)(jnp.repeat(keys, ensemble), t)
    eps = process.make_noise(image.shape)(keys, t)
    return jnp.repeat(image, ensemble, axis=0), t, eps
