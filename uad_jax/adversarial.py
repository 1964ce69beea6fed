"""What the adversarial methods share: networks, critic, alarms, score.

Critics always compute in float32.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from uad_jax import alarms, anomaly_scores, players
from uad_jax.adversarial_config import Bottleneck, CriticConfig, NetworkConfig
from uad_jax.anomaly_score_config import ScoreConfig
from uad_jax.compat import Compat
from uad_jax.methods import base
from uad_jax.nn import autoencoder, blocks, critics
from uad_jax.ops import adversarial as adversarial_ops
from uad_jax.ops import losses, residuals
from uad_jax.ops.adversarial import Adversary
from uad_jax.players import Player, Position
from uad_jax.score_functions import Functions, Terms
from uad_jax.types import (
    Array,
    Batch,
    Key,
    ModelState,
    Scalars,
    Tree,
)

CRITIC = "critic"  # its name in the parameters, and that of its player

_SATURATED = 0.99  # accuracy of a critic that has won
_TOO_STEEP = 2.0  # gap of a critic in units of what its penalty allows
_COLLAPSED = 0.1  # spread of images in units of what it should be


def networks(
    config: NetworkConfig,
    precision: base.Precision,
    image_shape: tuple[int, ...],
    *,
    bottleneck: Bottleneck = Bottleneck.DENSE,
    num_heads: int = 1,
) -> tuple[autoencoder.Encoder, autoencoder.Decoder]:
    """Builds encoder and generator for images of shape (..., H, W, C).

    Raises:
      ValueError: If the image does not fit the intermediate resolution.
    """
    height, width, channels = image_shape[-3:]
    spatial = bottleneck is Bottleneck.SPATIAL
    shared: dict[str, Any] = {
        "num_levels": num_levels(config, image_shape),
        "width": config.width,
        "max_width": config.max_width,
        "dtype": jnp.dtype(precision.value),
    }
    encoder = autoencoder.Encoder(
        latent_size=None if spatial else config.latent_size,
        latent_channels=config.latent_size,
        num_heads=num_heads,
        norm=config.norm,
        **shared,
    )
    generator = autoencoder.Decoder(
        image_shape=(height, width, channels),
        widen=spatial,
        norm=config.generator_norm,
        **shared,
    )
    return encoder, generator


def image_critic(
    config: NetworkConfig,
    image_shape: tuple[int, ...],
    norm: blocks.Norm,
    patch: bool = True,
) -> critics.ConvCritic:
    """Builds a critic of images (..., H, W, C), the encoder's convolutions again."""
    return critics.ConvCritic(
        num_levels=num_levels(config, image_shape),
        patch=patch,
        width=config.width,
        max_width=config.max_width,
        norm=norm,
    )


def num_levels(config: NetworkConfig, image_shape: tuple[int, ...]) -> int:
    """Number of halvings of images of shape (..., H, W, C)."""
    height, width, _ = image_shape[-3:]
    return blocks.num_levels(height, width, config.intermediate_resolution)


def init_networks(
    modules: dict[str, nn.Module], inputs: dict[str, Array], key: Key
) -> ModelState:
    """Initialises networks, each with its own key and an input of one row."""
    keys = jax.random.split(key, len(modules))
    params = {
        name: module.init(k, inputs[name])["params"]
        for (name, module), k in zip(modules.items(), keys, strict=True)
    }
    return ModelState(params=params, collections={})


def apply(module: nn.Module, params: Tree, x: Array, **kwargs: Any) -> Any:
    """Runs a network that has parameters only."""
    return module.apply({"params": params}, x, **kwargs)


def split_keys(keys: Array, count: int) -> list[Array]:
    """Splits the keys of the rows [N] into independent sets, [N] each."""
    parts = jax.vmap(lambda key: jax.random.split(key, count))(keys)
    return [parts[:, i] for i in range(count)]


def normal(keys: Array, shape: tuple[int, ...]) -> Array:
    """Standard normal numbers of each row's own key, [N, *shape] float32."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def critic_loss(
    config: CriticConfig,
    compat: Compat,
    critic: Callable[[Array], Array],
    real: Array,
    fake: Array,
    keys: Array,
    valid: Array,
    *,
    away: bool = False,
) -> tuple[Array, Scalars]:
    """What a critic minimises, and how it stands.

    Args:
      config: The critic.
      compat: Whose gradient penalty.
      critic: [N, ...] -> values [N, S].
      real: Real rows, [N, ...].
      fake: Made rows, [N, ...]; nothing flows into them.
      keys: [N], of the points between both.
      valid: False on padding, [N] bool.
      away: As in `ops.adversarial.interpolate`.

    Returns:
      The loss [] and scalars: "critic_loss" (with the penalty), "critic_gap" (mean of
      real minus made), "critic_accuracy", and for WGAN_GP "gradient_penalty" (before
      its weight) and "critic_distance" (what the gap of a critic without penalty
      cannot exceed).
    """
    fake = jax.lax.stop_gradient(fake)
    values = critic(real), critic(fake)

    def mean(rows: Array) -> Array:
        return losses.mean_over_valid(rows, valid)

    value = mean(adversarial_ops.critic_loss(config.adversary, *values))
    scalars = {
        "critic_gap": mean((values[0] - values[1]).mean(axis=1)),
        "critic_accuracy": mean(adversarial_ops.accuracy(*values)),
    }
    if config.adversary is Adversary.WGAN_GP:
        between = adversarial_ops.interpolate(keys, real, fake, away=away)
        form = {"per_column": compat is Compat.DENNER}
        penalty = mean(adversarial_ops.gradient_penalty(critic, between, **form))
        bound = adversarial_ops.largest_gap(real, fake, values[0].shape[1], **form)
        scalars |= {"gradient_penalty": penalty, "critic_distance": mean(bound)}
        value = value + config.penalty_weight * penalty
    return value, {**scalars, "critic_loss": value}


def train_critic(
    config: CriticConfig,
    compat: Compat,
    player: Player,
    pair: Callable[[dict[str, Tree], Batch, Array], tuple[Array, Array]],
    values: Callable[[dict[str, Tree], Array], Array],
    position: Position,
    batch: Batch,
    key: Key,
    *,
    accumulate_steps: int,
    away: bool = False,
    **repeated: Any,
) -> tuple[Position, Scalars]:
    """The critic's steps on one batch; no other network moves.

    Args:
      config: The critic.
      compat: Whose gradient penalty.
      player: The critic's.
      pair: (params, rows, keys [N]) -> real and made rows; called anew at each step.
      values: (params, [N, ...]) -> critic values [N, S].
      position: Where to begin.
      batch: The whole batch, with all that `pair` needs.
      key: Noise of the steps.
      accumulate_steps: Micro-batches.
      away: As in `critic_loss`.
      **repeated: Keywords of `players.repeat`.

    Returns:
      The position and the scalars of the last step, those of `critic_loss`.
    """

    def step(position: Position, index: Array) -> tuple[Position, dict[str, Any]]:
        step_key = jax.random.fold_in(key, index)

        def loss(params: dict[str, Tree], rows: Batch) -> tuple[Array, Scalars]:
            keys = base.sample_keys(step_key, rows.uid, rows.slice_index)
            first, second = split_keys(keys, 2)
            real, fake = pair(params, rows, first)
            return critic_loss(
                config,
                compat,
                functools.partial(values, params),
                real,
                fake,
                second,
                rows.valid,
                away=away,
            )

        return players.move(player, loss, position, batch, accumulate_steps)

    position, found = players.repeat(step, position, config.steps, **repeated)
    del found["loss"]
    return position, found | critic_alarm(config.adversary, found)


def critic_alarm(adversary: Adversary, scalars: Scalars) -> Scalars:
    """Says whether the critic has won.

    Returns:
      "alarm/critic_wins": the accuracy above 0.99 (LOG_LOSS), or the gap in units of
      what the penalty allows above 2, where it has lost its hold (WGAN_GP).
    """
    if adversary is Adversary.LOG_LOSS:
        found, limit = scalars["critic_accuracy"], _SATURATED
    else:
        found = scalars["critic_gap"] / (scalars["critic_distance"] + 1e-6)
        limit = _TOO_STEEP
    return {alarms.CRITIC_WINS: jnp.where(found > limit, found, 0.0)}


def reconstruction_terms(
    pixel_loss: losses.PixelLoss,
    reduction: losses.Reduction,
    output: Array,
    batch: Batch,
) -> dict[str, Any]:
    """Compares reconstructions [B, H, W, C] with the images of a batch.

    Returns:
      "reconstruction": the reduced distance; "l1": the mean absolute error; "moments":
      what `output_alarms` needs of both, which are no scalars.
    """

    def mean(rows: Array) -> Array:
        return losses.mean_over_valid(rows, batch.valid)

    errors = losses.pixels(pixel_loss, output, batch.image)
    return {
        "reconstruction": mean(losses.per_row(errors, reduction)),
        "l1": mean(losses.l1(output, batch.image, losses.Reduction.MEAN)),
        "moments": tuple(
            adversarial_ops.moments(x, batch.valid) for x in (output, batch.image)
        ),
    }


def output_alarms(output: dict[str, Array], image: dict[str, Array]) -> Scalars:
    """Says whether what the model makes has become constant.

    Args:
      output: `ops.adversarial.moments` of what it makes.
      image: Those of the images of the same rows.

    Returns:
      "spread_pixels" and "spread_batch" (1 = as much as the images), and "alarm/
      flat_output" and "alarm/same_output": what is missing where it is over 0.9.
    """
    within, between = adversarial_ops.spread(output, image)

    def alarm(spread: Array) -> Array:
        return jnp.where(spread < _COLLAPSED, 1.0 - spread, 0.0)

    return {
        "spread_pixels": within,
        "spread_batch": between,
        alarms.FLAT_OUTPUT: alarm(within),
        alarms.SAME_OUTPUT: alarm(between),
    }


def terms(
    image: Array, output: Array, kind: losses.PixelLoss, kl: Array | None = None
) -> Terms:
    """What the shared scores need of slices [N, H, W, C] and their reconstructions."""
    errors = losses.pixels(kind, output, image)
    rows = losses.per_row(errors, losses.Reduction.SUM)
    return Terms(output, rows, jnp.zeros_like(rows) if kl is None else kl)


class Scored(Protocol):
    """The fields of a config that say how volumes are scored."""

    score: ScoreConfig
    residual: residuals.Residual
    score_chunk: int


def scores(
    functions: Functions, config: Scored, *, sample: bool = False
) -> dict[str, Any]:
    """Both forms of the score, "score" and "host_score" of a Method.

    Args:
      functions: What the shared scores need of the method.
      config: Which score.
      sample: Decode a sample of the posterior, not its mean.
    """
    args = functions, config.score, config.residual
    chunk = config.score_chunk
    return {
        "score": anomaly_scores.scorer(*args, sample=sample, chunk=chunk),
        "host_score": anomaly_scores.host_scorer(*args, chunk=chunk),
    }
