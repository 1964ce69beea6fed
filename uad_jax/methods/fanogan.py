"""f-AnoGAN: a GAN of healthy slices, then an encoder that finds its codes.

Two stages are two runs. `GanConfig` trains generator and critic and has no score;
`EncoderConfig` takes both by a warm start, keeps them as they are, and trains the
encoder so that the generator rebuilds a slice and the critic sees the same features in
it (the "izi_f" training).

Sources: Schlegl et al. 2019, "f-AnoGAN: fast unsupervised anomaly detection with
generative adversarial networks"; networks and settings are those of the released code
of Baur et al. 2021, "Autoencoders for unsupervised anomaly segmentation in brain MR
images: a comparative study".

Deviations: the gradient penalty is that of Gulrajani et al. 2017; the released code
takes the slope of each image column (`compat=denner`). The frozen generator has no
dropout while the encoder is trained. Codes come from a tanh, so those outside [-1, 1],
which the generator was trained on too, cannot be found: as published.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from uad_jax import adversarial, anomaly_scores, optim, players
from uad_jax.adversarial import CRITIC
from uad_jax.adversarial_config import (
    CriticConfig,
    NetworkConfig,
    adam,
    check_weights,
)
from uad_jax.anomaly_score_config import ScoreConfig
from uad_jax.compat import Compat
from uad_jax.methods import base, lifting
from uad_jax.nn import autoencoder, blocks, critics
from uad_jax.ops import adversarial as adversarial_ops
from uad_jax.ops import losses, residuals
from uad_jax.players import Player, Position
from uad_jax.score_functions import Functions, Terms
from uad_jax.types import (
    Array,
    Batch,
    Key,
    ModelState,
    Scalars,
    Scores,
    TrainState,
    Tree,
    Volumes,
)

ENCODER, GENERATOR = "encoder", "generator"


@dataclasses.dataclass
class GanConfig:
    """The first stage: a generator of slices and its critic.

    The validation loss is the energy distance of made and real slices, which no
    training step minimises.

    Attributes:
      network: The generator (and the second stage's encoder).
      critic: The critic and its optimiser.
      critic_norm: Normalisation of the critic.
      compat: Whose gradient penalty.
      precision: Type of the generator; the critic's is float32.
      accumulate_steps: Micro-batches per optimiser step.
      ema_decay: Decay of the averaged generator; 0 = none.
      optimizer: The optimiser of the generator.
    """

    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    critic: CriticConfig = dataclasses.field(default_factory=CriticConfig)
    critic_norm: blocks.Norm = blocks.Norm.LAYER
    compat: Compat = Compat.NONE
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
        base.check_training(self.accumulate_steps, self.ema_decay)
        self.optimizer.validate()

    def make(self, run: base.RunShape) -> base.Method:
        """Builds the method. Float fields may be traced scalars."""
        generator_tx = self.optimizer.make(run.total_steps)
        critic_tx = self.critic.optimizer.make(run.total_steps * self.critic.steps)
        moving = {
            GENERATOR: Player(GENERATOR, (GENERATOR,), generator_tx),
            CRITIC: Player(CRITIC, (CRITIC,), critic_tx),
        }

        def init(key: Key, batch: Batch) -> TrainState:
            model = init_model(self, (GENERATOR, CRITIC), key, batch)
            return players.start(
                model, list(moving.values()), (GENERATOR,), self.ema_decay
            )

        return base.Method(
            inputs=base.Inputs(),
            init=init,
            update=functools.partial(_update_gan, self, moving),
            validate=functools.partial(gan_validation_loss, self),
            score=None,
        )


@dataclasses.dataclass
class EncoderConfig:
    """The second stage: the encoder of a frozen generator.

    Attributes:
      network: Encoder and generator; the same as in the first stage.
      critic_norm: Normalisation of the critic; the same as in the first stage.
      feature_weight: Weight of the distance between the critic's features.
      feature_score: A slice's score is the published A(x), image error plus weighted
        feature error, and that of a volume its highest slice; False: as `score` says.
      score: What makes the anomaly map.
      residual: How image and reconstruction become an anomaly map.
      score_chunk: Slices of a volume that are scored at once; 0 = all.
      precision: Type of encoder and generator; the critic's is float32.
      accumulate_steps: Micro-batches per optimiser step.
      ema_decay: Decay of the averaged encoder; 0 = none.
      optimizer: The optimiser of the encoder.
    """

    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    critic_norm: blocks.Norm = blocks.Norm.LAYER
    feature_weight: float = 1.0
    feature_score: bool = False
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
        check_weights(feature_weight=self.feature_weight, score_chunk=self.score_chunk)
        self.score.validate(
            "f-AnoGAN", posterior=False, dropout=self.network.dropout > 0
        )
        base.check_training(self.accumulate_steps, self.ema_decay)
        self.optimizer.validate()

    def make(self, run: base.RunShape) -> base.Method:
        """Builds the method. Float fields may be traced scalars."""
        init, step = base.single_optimizer(
            functools.partial(init_model, self, (ENCODER, GENERATOR, CRITIC)),
            functools.partial(loss, self),
            self.optimizer.make(run.total_steps),
            trainable=(ENCODER,),
            ema_decay=self.ema_decay,
            accumulate_steps=self.accumulate_steps,
        )

        def update(state: TrainState, batch: Batch, key: Key) -> tuple:
            state, scalars = step(state, batch, key)
            alarms = adversarial.output_alarms(*scalars.pop("moments"))
            return state, {**scalars, **alarms}

        return base.Method(
            inputs=base.Inputs(),
            init=init,
            update=update,
            validate=functools.partial(validation_loss, self),
            reconstruct=functools.partial(reconstruct, self),
            **_scores(self),
        )


def networks(
    config: GanConfig | EncoderConfig, image_shape: tuple[int, ...]
) -> tuple[autoencoder.Encoder, autoencoder.Decoder, critics.ConvCritic]:
    """Builds encoder, generator and critic for images of shape (..., H, W, C)."""
    encoder, generator = adversarial.networks(
        config.network, config.precision, image_shape
    )
    critic = adversarial.image_critic(config.network, image_shape, config.critic_norm)
    return encoder, generator, critic


def init_model(
    config: GanConfig | EncoderConfig, names: tuple[str, ...], key: Key, batch: Batch
) -> ModelState:
    """Initialises the networks with these names for the batch's image shape."""
    shape = batch.image.shape
    modules = dict(
        zip((ENCODER, GENERATOR, CRITIC), networks(config, shape), strict=True)
    )
    image = jnp.zeros((1, *shape[-3:]))
    code = jnp.zeros((1, config.network.latent_size))
    inputs = {ENCODER: image, GENERATOR: code, CRITIC: image}
    return adversarial.init_networks(
        {name: modules[name] for name in names}, inputs, key
    )


def encode(
    config: EncoderConfig, params: dict[str, Tree], image: Array, keys: Array | None
) -> Array:
    """Codes in [-1, 1] of slices, [N, latent_size]; keys [N] switch dropout on."""
    (code,) = adversarial.apply(
        networks(config, image.shape)[0],
        params[ENCODER],
        image,
        dropout=config.network.dropout,
        keys=None if keys is None else [keys],
    )
    return jnp.tanh(code)


def generate(
    config: GanConfig | EncoderConfig,
    params: dict[str, Tree],
    code: Array,
    image_shape: tuple[int, ...],
    keys: Array | None = None,
) -> Array:
    """Slices in [0, 1] of codes [N, latent_size]; keys [N] switch dropout on."""
    output = adversarial.apply(
        networks(config, image_shape)[1],
        params[GENERATOR],
        code,
        dropout=config.network.dropout,
        keys=keys,
    )
    return jax.nn.sigmoid(output)


def judge(
    config: GanConfig | EncoderConfig, params: dict[str, Tree], image: Array
) -> tuple[Array, Array]:
    """The critic's values [N, S] and features [N, h, w, channels] of slices."""
    return adversarial.apply(networks(config, image.shape)[2], params[CRITIC], image)


def draw(
    config: GanConfig,
    params: dict[str, Tree],
    image_shape: tuple[int, ...],
    keys: Array,
) -> Array:
    """Random slices [N, H, W, C], one for each key [N], with dropout."""
    first, second = adversarial.split_keys(keys, 2)
    code = adversarial.normal(first, (config.network.latent_size,))
    return generate(config, params, code, image_shape, second)


def gan_validation_loss(
    config: GanConfig, model: ModelState, batch: Batch, key: Key
) -> Scalars:
    """Energy distance of made and real slices; see `ops.adversarial`."""
    keys = base.sample_keys(key, batch.uid, batch.slice_index)
    code = adversarial.normal(keys, (config.network.latent_size,))
    fake = generate(config, model.params, code, batch.image.shape)
    value = adversarial_ops.energy_distance(fake, batch.image, batch.valid)
    return {"loss": value}


def loss(
    config: EncoderConfig,
    params: dict[str, Tree],
    collections: dict[str, Tree],
    batch: Batch,
    key: Key,
    *,
    train: bool = True,
) -> tuple[Array, tuple[dict[str, Tree], dict[str, Any]]]:
    """Squared error of the rebuilt slice plus that of its weighted features.

    Args and returns are those of every loss; `train` switches the encoder's dropout
    on. Scalars: "reconstruction" and "features" (before the weight), means over pixels
    or features, "l1", and "moments" of reconstructions and images.
    """
    keys = base.sample_keys(key, batch.uid, batch.slice_index) if train else None
    output = generate(
        config,
        params,
        encode(config, params, batch.image, keys),
        batch.image.shape,
    )
    scalars = adversarial.reconstruction_terms(
        losses.PixelLoss.L2, losses.Reduction.MEAN, output, batch
    )
    features = _feature_error(config, params, batch.image, output)
    scalars["features"] = losses.mean_over_valid(features, batch.valid)
    value = scalars["reconstruction"] + config.feature_weight * scalars["features"]
    return value, (collections, scalars)


def validation_loss(
    config: EncoderConfig, model: ModelState, batch: Batch, key: Key
) -> Scalars:
    """The loss without dropout."""
    value, (_, scalars) = loss(
        config, model.params, model.collections, batch, key, train=False
    )
    del scalars["moments"]
    return {"loss": value, **scalars}


def reconstruct_slices(
    config: EncoderConfig,
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
      dropout: Drop units where there are keys, on the code.

    Returns:
      [N, H, W, C] float32 in [0, 1].
    """
    code = encode(config, model.params, image, keys if dropout else None)
    return generate(config, model.params, code, image.shape)


def score_functions(config: EncoderConfig) -> Functions:
    """What the shared scores need of the model."""

    def own_terms(
        model: ModelState, image: Array, keys: Array | None, kind: losses.PixelLoss
    ) -> Terms:
        output = reconstruct_slices(config, model, image, None)
        return adversarial.terms(image, output, kind)

    return Functions(functools.partial(reconstruct_slices, config), own_terms)


def reconstruct(
    config: EncoderConfig,
    model: ModelState,
    image: Array,
    mask: Array,
    key: Key,
    strength: float | Array = 1.0,
) -> Array:
    """Pseudo-healthy version of slices [N, H, W, C]; key and strength do nothing."""
    return reconstruct_slices(config, model, image, None)


def _feature_error(
    config: EncoderConfig, params: dict[str, Tree], image: Array, output: Array
) -> Array:
    """Mean squared error of the critic's features, [N]."""
    features = [judge(config, params, x)[1] for x in (output, image)]
    return losses.l2(features[0], features[1], losses.Reduction.MEAN)


def _scores(config: EncoderConfig) -> dict[str, Any]:
    """The shared scores, with the published scores of slices where asked for."""
    found = adversarial.scores(score_functions(config), config)
    if not config.feature_score:
        return found

    def published(model: ModelState, image: Array, mask: Array, keys: Array) -> Array:
        output = reconstruct_slices(config, model, image, None)
        features = _feature_error(config, model.params, image, output)
        error = losses.l2(output, image, losses.Reduction.MEAN)
        return error + config.feature_weight * features

    # Compiled, as it also stands beside a score that runs on the host.
    rate = jax.jit(lifting.over_slices(published, config.score_chunk))

    def with_features(score: Callable[..., Scores]) -> Callable[..., Scores]:
        def scored(model: ModelState, volumes: Volumes, key: Key) -> Scores:
            slices = rate(model, volumes, key)
            scores = score(model, volumes, key)
            return anomaly_scores.with_slice_score(scores, slices, volumes)

        return scored

    return {
        name: with_features(score) if score else None for name, score in found.items()
    }


def _update_gan(
    config: GanConfig,
    moving: dict[str, Player],
    state: TrainState,
    batch: Batch,
    key: Key,
) -> tuple[TrainState, Scalars]:
    """One step of the generator, then several of the critic on the same slices."""
    position = Position(state.model.params, state.opt_state)
    first, second = jax.random.split(key)
    shape = batch.image.shape

    def generator_loss(params: dict[str, Tree], rows: Batch) -> tuple:
        keys = base.sample_keys(first, rows.uid, rows.slice_index)
        fake = draw(config, params, shape, keys)
        judged = adversarial_ops.generator_loss(
            config.critic.adversary, judge(config, params, fake)[0]
        )
        value = losses.mean_over_valid(judged, rows.valid)
        pair = tuple(adversarial_ops.moments(x, rows.valid) for x in (fake, rows.image))
        return value, {"generator_loss": value, "moments": pair}

    def pair(params: dict[str, Tree], rows: Batch, keys: Array) -> tuple[Array, Array]:
        return rows.image, draw(config, params, shape, keys)

    position, scalars = players.move(
        moving[GENERATOR], generator_loss, position, batch, config.accumulate_steps
    )
    scalars["grad_norm"] = scalars["grad_norm/generator/generator"]
    scalars |= adversarial.output_alarms(*scalars.pop("moments"))
    position, found = adversarial.train_critic(
        config.critic,
        config.compat,
        moving[CRITIC],
        pair,
        lambda params, image: judge(config, params, image)[0],
        position,
        batch,
        second,
        accumulate_steps=config.accumulate_steps,
    )
    return players.advance(state, position, config.ema_decay), {**scalars, **found}
