"""AnoVAEGAN and its plain form, AE-GAN: a critic makes reconstructions look real.

Sources: Baur et al. 2018, "Deep autoencoding models for unsupervised anomaly
segmentation in brain MR images" (a classifying critic in the same step as the VAE);
Baur et al. 2021, "Autoencoders for unsupervised anomaly segmentation in brain MR
images: a comparative study", and the authors' released code (a Wasserstein critic of
patches, and a step of the generator of its own).

Deviations: no code of 2018 was released, so its form here follows the abstract and
the later code. The gradient penalty is that of Gulrajani et al. 2017; the released
code takes the slope of each image column (`compat=denner`). The score decodes the mean
of the posterior, not a sample (`sample_at_test=True`). The critic's steps on one batch
share the codes of the encoder, which does not move meanwhile; noise and dropout of the
generator are drawn anew.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from uad_jax import adversarial, optim, players
from uad_jax.adversarial import CRITIC
from uad_jax.adversarial_config import (
    Bottleneck,
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

ENCODER, GENERATOR = "encoder", "generator"


@dataclasses.dataclass
class AnoVaeGanConfig:
    """An autoencoder with a critic. The image size follows the data.

    Attributes:
      variational: Gaussian codes (AnoVAEGAN); False: plain ones (AE-GAN).
      bottleneck: Dense or spatial code.
      network: Encoder and generator.
      critic: The critic and its optimiser.
      patch_critic: The critic judges every site of its last feature map; False: the
        whole image.
      critic_norm: Normalisation of the critic.
      joint: The generator learns from the critic in the same step as from the image;
        False: in a step of its own, with a third optimiser.
      pixel_loss: Distance of the reconstruction.
      reduction: Over pixels (and latents: MEAN divides both terms by the pixels).
      kl_weight: Weight of the KL divergence (variational only).
      adversarial_weight: Weight of the critic's judgement. Without `joint` it only
        scales a loss whose optimiser ignores scale.
      compat: Whose gradient penalty.
      score: What makes the anomaly map.
      residual: How image and reconstruction become an anomaly map.
      sample_at_test: Decode a sample instead of the mean (variational only).
      score_chunk: Slices of a volume that are scored at once; 0 = all.
      precision: Type of encoder and generator; the critic's is float32.
      accumulate_steps: Micro-batches per optimiser step.
      ema_decay: Decay of the averaged encoder and generator; 0 = none.
      optimizer: The optimiser of encoder and generator.
    """

    variational: bool = True
    bottleneck: Bottleneck = Bottleneck.DENSE
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    critic: CriticConfig = dataclasses.field(default_factory=CriticConfig)
    patch_critic: bool = True
    critic_norm: blocks.Norm = blocks.Norm.LAYER
    joint: bool = False
    pixel_loss: losses.PixelLoss = losses.PixelLoss.L1
    reduction: losses.Reduction = losses.Reduction.SUM
    kl_weight: float = 1.0
    adversarial_weight: float = 1.0
    compat: Compat = Compat.NONE
    score: ScoreConfig = dataclasses.field(default_factory=ScoreConfig)
    residual: residuals.Residual = residuals.Residual.ABS
    sample_at_test: bool = False
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
            kl_weight=self.kl_weight,
            adversarial_weight=self.adversarial_weight,
            score_chunk=self.score_chunk,
        )
        base.check_training(self.accumulate_steps, self.ema_decay)
        self.score.validate(
            f"variational={self.variational}",
            posterior=self.variational,
            dropout=self.network.dropout > 0,
        )
        self.optimizer.validate()

    def make(self, run: base.RunShape) -> base.Method:
        """Builds the method. Float fields may be traced scalars."""
        moving, functions = _players(self, run), score_functions(self)
        return base.Method(
            inputs=base.Inputs(),
            init=functools.partial(_init, self, moving),
            update=functools.partial(_update, self, moving),
            validate=functools.partial(validation_loss, self),
            reconstruct=functools.partial(reconstruct, self),
            **adversarial.scores(functions, self, sample=self.sample_at_test),
        )


def networks(
    config: AnoVaeGanConfig, image_shape: tuple[int, ...]
) -> tuple[autoencoder.Encoder, autoencoder.Decoder, critics.ConvCritic]:
    """Builds encoder, generator and critic for images of shape (..., H, W, C).

    Raises:
      ValueError: If the image does not fit the intermediate resolution.
    """
    encoder, generator = adversarial.networks(
        config.network,
        config.precision,
        image_shape,
        bottleneck=config.bottleneck,
        num_heads=2 if config.variational else 1,
    )
    critic = adversarial.image_critic(
        config.network, image_shape, config.critic_norm, config.patch_critic
    )
    return encoder, generator, critic


def init_model(config: AnoVaeGanConfig, key: Key, batch: Batch) -> ModelState:
    """Initialises {"encoder", "generator", "critic"} for the batch's image shape."""
    encoder, generator, critic = networks(config, batch.image.shape)
    image = jnp.zeros((1, *batch.image.shape[-3:]), jnp.float32)
    code = jax.eval_shape(encoder.init_with_output, key, image)[0][0]
    return adversarial.init_networks(
        {ENCODER: encoder, GENERATOR: generator, CRITIC: critic},
        {ENCODER: image, GENERATOR: jnp.zeros(code.shape), CRITIC: image},
        key,
    )


def encode(
    config: AnoVaeGanConfig,
    params: dict[str, Tree],
    image: Array,
    keys: Array | None = None,
) -> tuple[Array, ...]:
    """Encodes slices [N, H, W, C]; keys, one per slice, [N], switch dropout on.

    Returns (code,) or (mu, log_sigma), [N, latent_size] or [N, h, w, latent_size]
    float32.
    """
    encoder = networks(config, image.shape)[0]
    return adversarial.apply(
        encoder,
        params[ENCODER],
        image,
        dropout=config.network.dropout,
        keys=None if keys is None else adversarial.split_keys(keys, encoder.num_heads),
    )


def decode(
    config: AnoVaeGanConfig,
    params: dict[str, Tree],
    codes: tuple[Array, ...],
    image_shape: tuple[int, ...],
    keys: Array | None = None,
    *,
    train: bool = False,
    sample: bool = True,
) -> Array:
    """Draws from the codes and generates slices.

    Args:
      config: The model.
      params: {"generator": ...}.
      codes: What `encode` returned.
      image_shape: (..., H, W, C).
      keys: One key per slice, [N]: a sample is decoded; None: the mean.
      train: Whether dropout is on; needs keys.
      sample: False: the mean even with keys.

    Returns:
      [N, H, W, C] float32.
    """
    generator = networks(config, image_shape)[1]
    code, drop = codes[0], None
    if keys is not None:
        noise, drop = adversarial.split_keys(keys, 2)
        if config.variational and sample:
            draw = adversarial.normal(noise, code.shape[1:])
            code = code + jnp.exp(codes[1]) * draw
    return adversarial.apply(
        generator,
        params[GENERATOR],
        code,
        dropout=config.network.dropout,
        keys=drop if train else None,
    )


def loss(
    config: AnoVaeGanConfig,
    params: dict[str, Tree],
    collections: dict[str, Tree],
    batch: Batch,
    key: Key,
    *,
    train: bool = True,
) -> tuple[Array, tuple[dict[str, Tree], dict[str, Any]]]:
    """Reconstruction error, weighted KL divergence and, if joint, the judgement.

    Args:
      config: The model.
      params: {"encoder", "generator", "critic"}.
      collections: Empty; handed through.
      batch: Slices, image [B, H, W, C] float32.
      key: Key of the step.
      train: Whether dropout is on. Gaussian codes are sampled in either case.

    Returns:
      The loss [] and (collections, scalars). Scalars: "reconstruction" and "kl" as
      they enter the loss (kl before its weight), "l1" the mean absolute error,
      "generator_loss" (joint), and "moments": those of reconstructions and images.
    """
    rows = base.sample_keys(key, batch.uid, batch.slice_index)
    first, second = adversarial.split_keys(rows, 2)
    codes = encode(config, params, batch.image, first if train else None)
    output = decode(config, params, codes, batch.image.shape, second, train=train)
    scalars = adversarial.reconstruction_terms(
        config.pixel_loss, config.reduction, output, batch
    )
    value = scalars["reconstruction"]
    if config.variational:
        kl = losses.kl_normal(codes[0], codes[1])
        if config.reduction is losses.Reduction.MEAN:
            kl = kl / (output.size // output.shape[0])
        scalars["kl"] = losses.mean_over_valid(kl, batch.valid)
        value = value + config.kl_weight * scalars["kl"]
    if config.joint:
        judged = _judgement(config, params, output)
        scalars["generator_loss"] = losses.mean_over_valid(judged, batch.valid)
        value = value + config.adversarial_weight * scalars["generator_loss"]
    return value, (collections, scalars)


def validation_loss(
    config: AnoVaeGanConfig, model: ModelState, batch: Batch, key: Key
) -> Scalars:
    """The reconstruction error without dropout; what the critic says has no scale.

    Noise follows from the key, uid and slice.
    """
    plain = dataclasses.replace(config, joint=False)
    _, (_, scalars) = loss(
        plain, model.params, model.collections, batch, key, train=False
    )
    del scalars["moments"]
    return {"loss": scalars["reconstruction"], **scalars}


def reconstruct_slices(
    config: AnoVaeGanConfig,
    model: ModelState,
    image: Array,
    keys: Array | None,
    *,
    sample: bool = True,
    dropout: bool = False,
) -> Array:
    """Reconstructs slices.

    Args:
      config: The model.
      model: Its parameters.
      image: [N, H, W, C] float32.
      keys: One key per slice, [N]; None: nothing is random.
      sample: Decode a sample of the posterior (variational only).
      dropout: Drop units.

    Returns:
      [N, H, W, C] float32.
    """
    first, second = None, keys
    if keys is not None and dropout:
        first, second = adversarial.split_keys(keys, 2)
    codes = encode(config, model.params, image, first)
    return decode(
        config,
        model.params,
        codes,
        image.shape,
        second,
        train=dropout,
        sample=sample,
    )


def score_functions(config: AnoVaeGanConfig) -> Functions:
    """What the shared scores need of the model."""

    def own_terms(
        model: ModelState, image: Array, keys: Array | None, kind: losses.PixelLoss
    ) -> Terms:
        codes = encode(config, model.params, image)
        output = decode(config, model.params, codes, image.shape, keys)
        kl = losses.kl_normal(codes[0], codes[1]) if config.variational else None
        return adversarial.terms(image, output, kind, kl)

    reconstruct_by = functools.partial(reconstruct_slices, config)
    return Functions(reconstruct_by, own_terms, config.kl_weight, config.pixel_loss)


def reconstruct(
    config: AnoVaeGanConfig,
    model: ModelState,
    image: Array,
    mask: Array,
    key: Key,
    strength: float | Array = 1.0,
) -> Array:
    """Pseudo-healthy version of slices [N, H, W, C]; the strength has no effect."""
    keys = base.row_keys(key, image.shape[0]) if config.sample_at_test else None
    return reconstruct_slices(config, model, image, keys)


def _players(config: AnoVaeGanConfig, run: base.RunShape) -> dict[str, Player]:
    tx = config.optimizer.make(run.total_steps)
    critic_updates = run.total_steps * config.critic.steps
    moving = [
        Player("vae", (ENCODER, GENERATOR), tx),
        Player(CRITIC, (CRITIC,), config.critic.optimizer.make(critic_updates)),
    ]
    if not config.joint:
        moving.insert(1, Player(GENERATOR, (GENERATOR,), tx))
    return {player.name: player for player in moving}


def _init(
    config: AnoVaeGanConfig, moving: dict[str, Player], key: Key, batch: Batch
) -> TrainState:
    model = init_model(config, key, batch)
    averaged = (ENCODER, GENERATOR)
    return players.start(model, list(moving.values()), averaged, config.ema_decay)


def _update(
    config: AnoVaeGanConfig,
    moving: dict[str, Player],
    state: TrainState,
    batch: Batch,
    key: Key,
) -> tuple[TrainState, Scalars]:
    """One step of the autoencoder, one of the generator, several of the critic."""
    position = Position(state.model.params, state.opt_state)
    parts = config.accumulate_steps

    def vae_loss(params: dict[str, Tree], rows: Batch) -> tuple:
        value, (_, scalars) = loss(config, params, {}, rows, _phase(key, 0))
        return value, scalars

    position, scalars = players.move(moving["vae"], vae_loss, position, batch, parts)
    scalars["grad_norm"] = jnp.hypot(
        scalars["grad_norm/vae/encoder"], scalars["grad_norm/vae/generator"]
    )
    if not config.joint:
        judged = functools.partial(_judged_loss, config, key=_phase(key, 1))
        position, found = players.move(
            moving[GENERATOR], judged, position, batch, parts
        )
        scalars |= {name: x for name, x in found.items() if name != "loss"}
    # The encoder runs once for all steps of the critic: it does not move meanwhile.
    keys = base.sample_keys(_phase(key, 2), batch.uid, batch.slice_index)
    codes: Any = encode(config, position.params, batch.image, keys)

    def pair(params: dict[str, Tree], rows: Batch, keys: Array) -> tuple[Array, Array]:
        codes: Any = rows.features
        return rows.image, decode(
            config, params, codes, rows.image.shape, keys, train=True
        )

    position, found = adversarial.train_critic(
        config.critic,
        config.compat,
        moving[CRITIC],
        pair,
        functools.partial(_values, config),
        position,
        dataclasses.replace(batch, features=codes),
        _phase(key, 3),
        accumulate_steps=parts,
    )
    scalars |= found | adversarial.output_alarms(*scalars.pop("moments"))
    return players.advance(state, position, config.ema_decay), scalars


def _judged_loss(
    config: AnoVaeGanConfig, params: dict[str, Tree], rows: Batch, key: Key
) -> tuple[Array, Scalars]:
    """What the generator minimises in a step of its own."""
    keys = base.sample_keys(key, rows.uid, rows.slice_index)
    first, second = adversarial.split_keys(keys, 2)
    codes = encode(config, params, rows.image, first)
    output = decode(config, params, codes, rows.image.shape, second, train=True)
    value = losses.mean_over_valid(_judgement(config, params, output), rows.valid)
    return config.adversarial_weight * value, {"generator_loss": value}


def _judgement(
    config: AnoVaeGanConfig, params: dict[str, Tree], output: Array
) -> Array:
    values = _values(config, params, output)
    return adversarial_ops.generator_loss(config.critic.adversary, values)


def _values(config: AnoVaeGanConfig, params: dict[str, Tree], image: Array) -> Array:
    """Critic values of images, [N, H, W, C] to [N, S]."""
    critic = networks(config, image.shape)[2]
    return adversarial.apply(critic, params[CRITIC], image)[0]


def _phase(key: Key, number: int) -> Key:
    return jax.random.fold_in(key, number)
