"""Adversarial autoencoders: a critic holds the codes to a normal distribution.

Sources: Makhzani et al. 2015, "Adversarial autoencoders"; Chen and Konukoglu 2018,
"Unsupervised detection of lesions in brain MRI using constrained adversarial
auto-encoders", whose constraint keeps the code of a reconstruction close to the code
of the image; networks, critics and schedule are those of the released code of Baur et
al. 2021, "Autoencoders for unsupervised anomaly segmentation in brain MR images: a
comparative study".

Deviations: the gradient penalty is taken between prior and codes; the released code
extrapolates beyond the prior (`compat=denner`). The critic's steps on one batch share
the codes, as the encoder does not move meanwhile, with one draw of its dropout.
"""

import dataclasses
import enum
import functools
from typing import Any

import jax
import jax.numpy as jnp

from uad_jax import adversarial, optim, players
from uad_jax.adversarial import CRITIC
from uad_jax.adversarial_config import (
    CriticConfig,
    NetworkConfig,
    adam,
    check_weights,
)
from uad_jax.anomaly_score_config import ScoreConfig
from uad_jax.compat import Compat
from uad_jax.methods import base
from uad_jax.nn import autoencoder, blocks, critics
from uad_jax.ops import adversarial as adversarial_ops
from uad_jax.ops import losses, residuals
from uad_jax.players import Player, Position
from uad_jax.score_functions import Functions, Terms
from uad_jax.types import Array, Batch, Key, ModelState, Scalars, TrainState, Tree

ENCODER, DECODER = "encoder", "decoder"
_AUTOENCODER = "autoencoder"  # the player that moves both


class Variant(enum.Enum):
    """What is asked of the codes."""

    AAE = "aae"  # to be normally distributed
    CONSTRAINED_AAE = "constrained_aae"  # that, and to survive a reconstruction
    CONSTRAINED_AE = "constrained_ae"  # to survive a reconstruction; no critic

    @property
    def has_critic(self) -> bool:
        """Whether the distribution of the codes is judged."""
        return self is not Variant.CONSTRAINED_AE

    @property
    def constrained(self) -> bool:
        """Whether reconstructions are encoded again."""
        return self is not Variant.AAE


@dataclasses.dataclass
class AaeConfig:
    """An adversarial autoencoder. The image size follows the data.

    On each batch the autoencoder takes its steps, then the critic, then the encoder
    one against the critic.

    Attributes:
      variant: What is asked of the codes.
      network: Encoder and decoder (as the generator).
      critic: The critic of codes and its optimiser.
      critic_hidden: Units of its hidden layers.
      constraint_weight: Weight of the squared distance between the code of an image
        and that of its reconstruction (constrained variants).
      first_epochs: Epochs at the beginning with the following numbers of steps.
      first_steps: Steps of the autoencoder on each batch then; later it takes one.
      first_critic_steps: Steps of the critic then; 0 = as many as later.
      pixel_loss: Distance of the reconstruction.
      reduction: Over pixels.
      compat: Where the gradient penalty is taken.
      score: What makes the anomaly map.
      residual: How image and reconstruction become an anomaly map.
      score_chunk: Slices of a volume that are scored at once; 0 = all.
      precision: Type of encoder and decoder; the critic's is float32.
      accumulate_steps: Micro-batches per optimiser step.
      ema_decay: Decay of the averaged encoder and decoder; 0 = none.
      optimizer: The optimiser of encoder and decoder.
    """

    variant: Variant = Variant.AAE
    network: NetworkConfig = dataclasses.field(
        default_factory=lambda: NetworkConfig(generator_norm=blocks.Norm.NONE)
    )
    critic: CriticConfig = dataclasses.field(
        default_factory=lambda: CriticConfig(steps=20)
    )
    critic_hidden: tuple[int, ...] = (50, 50)
    constraint_weight: float = 1.0
    first_epochs: int = 6
    first_steps: int = 20
    first_critic_steps: int = 0
    pixel_loss: losses.PixelLoss = losses.PixelLoss.L2
    reduction: losses.Reduction = losses.Reduction.MEAN
    compat: Compat = Compat.NONE
    score: ScoreConfig = dataclasses.field(default_factory=ScoreConfig)
    residual: residuals.Residual = residuals.Residual.ABS
    score_chunk: int = 32
    precision: base.Precision = base.Precision.FLOAT32
    accumulate_steps: int = 1
    ema_decay: float = 0.0
    optimizer: optim.OptimizerConfig = dataclasses.field(
        default_factory=lambda: adam(1e-4)
    )

    def validate(self) -> None:
        """Raises ValueError for settings that cannot work."""
        self.network.validate()
        self.critic.validate()
        check_weights(
            constraint_weight=self.constraint_weight,
            first_epochs=self.first_epochs,
            first_critic_steps=self.first_critic_steps,
            score_chunk=self.score_chunk,
        )
        if self.first_steps < 1:
            raise ValueError(f"first_steps is {self.first_steps}; use 1 or more.")
        if not self.critic_hidden or min(self.critic_hidden) < 1:
            raise ValueError(
                f"critic_hidden is {self.critic_hidden}; use at least one layer of 1 "
                "or more units."
            )
        base.check_training(self.accumulate_steps, self.ema_decay)
        self.score.validate(
            f"variant={self.variant.value}",
            posterior=False,
            dropout=self.network.dropout > 0,
        )
        self.optimizer.validate()

    def make(self, run: base.RunShape) -> base.Method:
        """Builds the method. Float fields may be traced scalars."""
        # Folds that are trained together may have epochs of different lengths.
        early = self.first_epochs * run.steps_per_epoch if self.first_epochs else 0
        moving, functions = _players(self, run, early), score_functions(self)

        def init(key: Key, batch: Batch) -> TrainState:
            model = init_model(self, key, batch)
            averaged = (ENCODER, DECODER)
            return players.start(model, list(moving.values()), averaged, self.ema_decay)

        return base.Method(
            inputs=base.Inputs(),
            init=init,
            update=functools.partial(_update, self, moving, early),
            validate=functools.partial(validation_loss, self),
            reconstruct=functools.partial(reconstruct, self),
            **adversarial.scores(functions, self),
        )


def networks(
    config: AaeConfig, image_shape: tuple[int, ...]
) -> tuple[autoencoder.Encoder, autoencoder.Decoder, critics.CodeCritic]:
    """Builds encoder, decoder and critic for images of shape (..., H, W, C).

    Raises:
      ValueError: If the image does not fit the intermediate resolution.
    """
    encoder, decoder = adversarial.networks(
        config.network, config.precision, image_shape
    )
    return encoder, decoder, critics.CodeCritic(config.critic_hidden)


def init_model(config: AaeConfig, key: Key, batch: Batch) -> ModelState:
    """Initialises encoder, decoder and, if there is one, critic."""
    encoder, decoder, critic = networks(config, batch.image.shape)
    modules: dict[str, Any] = {ENCODER: encoder, DECODER: decoder}
    if config.variant.has_critic:
        modules[CRITIC] = critic
    code = jnp.zeros((1, config.network.latent_size))
    image = jnp.zeros((1, *batch.image.shape[-3:]))
    inputs = {ENCODER: image, DECODER: code, CRITIC: code}
    return adversarial.init_networks(modules, inputs, key)


def encode(
    config: AaeConfig, params: dict[str, Tree], image: Array, keys: Array | None = None
) -> Array:
    """Codes of slices [N, H, W, C], [N, latent_size] float32.

    Keys, one per slice, [N], switch dropout on.
    """
    return adversarial.apply(
        networks(config, image.shape)[0],
        params[ENCODER],
        image,
        dropout=config.network.dropout,
        keys=None if keys is None else [keys],
    )[0]


def decode(
    config: AaeConfig,
    params: dict[str, Tree],
    code: Array,
    image_shape: tuple[int, ...],
    keys: Array | None = None,
) -> Array:
    """Slices [N, H, W, C] float32 of codes [N, latent_size]; keys as in `encode`."""
    return adversarial.apply(
        networks(config, image_shape)[1],
        params[DECODER],
        code,
        dropout=config.network.dropout,
        keys=keys,
    )


def loss(
    config: AaeConfig,
    params: dict[str, Tree],
    collections: dict[str, Tree],
    batch: Batch,
    key: Key,
    *,
    train: bool = True,
) -> tuple[Array, tuple[dict[str, Tree], dict[str, Any]]]:
    """Reconstruction error and, in constrained variants, the change of the code.

    Args:
      config: The model.
      params: {"encoder", "decoder", ...}.
      collections: Empty; handed through.
      batch: Slices, image [B, H, W, C] float32.
      key: Key of the step.
      train: Whether dropout is on.

    Returns:
      The loss [] and (collections, scalars). Scalars: "reconstruction" as it enters
      the loss, "constraint" before its weight (mean over the code), "l1" the mean
      absolute error, and "moments": those of reconstructions and images.
    """
    rows = base.sample_keys(key, batch.uid, batch.slice_index)
    drop: list[Any] = adversarial.split_keys(rows, 3) if train else [None] * 3
    code = encode(config, params, batch.image, drop[0])
    output = decode(config, params, code, batch.image.shape, drop[1])
    scalars = adversarial.reconstruction_terms(
        config.pixel_loss, config.reduction, output, batch
    )
    value = scalars["reconstruction"]
    if config.variant.constrained:
        again = encode(config, params, output, drop[2])
        change = losses.l2(code, again, losses.Reduction.MEAN)
        scalars["constraint"] = losses.mean_over_valid(change, batch.valid)
        value = value + config.constraint_weight * scalars["constraint"]
    return value, (collections, scalars)


def validation_loss(
    config: AaeConfig, model: ModelState, batch: Batch, key: Key
) -> Scalars:
    """The reconstruction error without dropout; the rest stands beside it."""
    _, (_, scalars) = loss(
        config, model.params, model.collections, batch, key, train=False
    )
    del scalars["moments"]
    return {"loss": scalars["reconstruction"], **scalars}


def reconstruct_slices(
    config: AaeConfig,
    model: ModelState,
    image: Array,
    keys: Array | None,
    *,
    sample: bool = False,
    dropout: bool = True,
) -> Array:
    """Reconstructs slices.

    Args:
      config: The model.
      model: Its parameters.
      image: [N, H, W, C] float32.
      keys: One key per slice, [N]; None: nothing is random.
      sample: No effect: there is no posterior.
      dropout: Drop units where there are keys, the only chance in this model.

    Returns:
      [N, H, W, C] float32.
    """
    drop: list[Any] = [None, None]
    if keys is not None and dropout:
        drop = adversarial.split_keys(keys, 2)
    code = encode(config, model.params, image, drop[0])
    return decode(config, model.params, code, image.shape, drop[1])


def score_functions(config: AaeConfig) -> Functions:
    """What the shared scores need of the model."""

    def own_terms(
        model: ModelState, image: Array, keys: Array | None, kind: losses.PixelLoss
    ) -> Terms:
        output = reconstruct_slices(config, model, image, None)
        return adversarial.terms(image, output, kind)

    return Functions(functools.partial(reconstruct_slices, config), own_terms)


def reconstruct(
    config: AaeConfig,
    model: ModelState,
    image: Array,
    mask: Array,
    key: Key,
    strength: float | Array = 1.0,
) -> Array:
    """Pseudo-healthy version of slices [N, H, W, C]; key and strength do nothing."""
    return reconstruct_slices(config, model, image, None)


def _players(
    config: AaeConfig, run: base.RunShape, early: int | Array
) -> dict[str, Player]:
    """The players; schedules count their own steps."""
    if isinstance(early, int):
        early = min(early, run.total_steps)
    else:
        early = jnp.minimum(early, run.total_steps)
    late = run.total_steps - early
    first_critic_steps = config.first_critic_steps or config.critic.steps
    moving = [
        Player(
            _AUTOENCODER,
            (ENCODER, DECODER),
            config.optimizer.make(early * config.first_steps + late),
        )
    ]
    if config.variant.has_critic:
        critic_steps = early * first_critic_steps + late * config.critic.steps
        moving += [
            Player(CRITIC, (CRITIC,), config.critic.optimizer.make(critic_steps)),
            Player(ENCODER, (ENCODER,), config.optimizer.make(run.total_steps)),
        ]
    return {player.name: player for player in moving}


def _update(
    config: AaeConfig,
    moving: dict[str, Player],
    early: int | Array,
    state: TrainState,
    batch: Batch,
    key: Key,
) -> tuple[TrainState, Scalars]:
    """Steps of the autoencoder, of the critic, and one of the encoder against it."""
    position = Position(state.model.params, state.opt_state)
    phases = [jax.random.fold_in(key, i) for i in range(4)]
    parts = config.accumulate_steps
    is_early = state.step < early if config.first_epochs else None

    def step(position: Position, index: Array) -> tuple[Position, dict[str, Any]]:
        step_key = jax.random.fold_in(phases[0], index)

        def own_loss(params: dict[str, Tree], rows: Batch) -> tuple:
            value, (_, scalars) = loss(config, params, {}, rows, step_key)
            return value, scalars

        return players.move(moving[_AUTOENCODER], own_loss, position, batch, parts)

    position, scalars = players.repeat(
        step, position, 1, early=is_early, early_count=config.first_steps
    )
    scalars["grad_norm"] = jnp.hypot(
        scalars["grad_norm/autoencoder/encoder"],
        scalars["grad_norm/autoencoder/decoder"],
    )
    scalars |= adversarial.output_alarms(*scalars.pop("moments"))
    if config.variant.has_critic:
        position, found = _critic_steps(
            config, moving, position, batch, phases, is_early
        )
        scalars |= found
    return players.advance(state, position, config.ema_decay), scalars


def _critic_steps(
    config: AaeConfig,
    moving: dict[str, Player],
    position: Position,
    batch: Batch,
    phases: list[Key],
    is_early: Array | None,
) -> tuple[Position, Scalars]:
    keys = base.sample_keys(phases[1], batch.uid, batch.slice_index)
    code = encode(config, position.params, batch.image, keys)

    def values(params: dict[str, Tree], code: Array) -> Array:
        critic = critics.CodeCritic(config.critic_hidden)
        return adversarial.apply(critic, params[CRITIC], code)

    def pair(params: dict[str, Tree], rows: Batch, keys: Array) -> tuple[Array, Array]:
        assert rows.features is not None
        return adversarial.normal(keys, code.shape[1:]), rows.features

    position, scalars = adversarial.train_critic(
        config.critic,
        config.compat,
        moving[CRITIC],
        pair,
        values,
        position,
        dataclasses.replace(batch, features=code),
        phases[2],
        accumulate_steps=config.accumulate_steps,
        away=config.compat is Compat.DENNER,
        early=is_early,
        early_count=config.first_critic_steps or config.critic.steps,
    )

    def encoder_loss(params: dict[str, Tree], rows: Batch) -> tuple:
        keys = base.sample_keys(phases[3], rows.uid, rows.slice_index)
        judged = adversarial_ops.generator_loss(
            config.critic.adversary,
            values(params, encode(config, params, rows.image, keys)),
        )
        value = losses.mean_over_valid(judged, rows.valid)
        return value, {"generator_loss": value}

    position, found = players.move(
        moving[ENCODER], encoder_loss, position, batch, config.accumulate_steps
    )
    del found["loss"]
    return position, {**scalars, **found}
