"""Dense and spatial autoencoders and VAEs of Baur et al.

Sources: Baur et al. 2021, "Autoencoders for unsupervised anomaly segmentation in brain
MR images: a comparative study", and the authors' released code; the spatial VAE is of
Baur et al. 2018, "Deep autoencoding models for unsupervised anomaly segmentation in
brain MR images", of which no code was released.

Deviations: the VAE scores the decoded mean of the posterior; the released code decodes
a sample (`sample_at_test=True`). Dropout and noise are keyed by volume and slice.
"""

import dataclasses
import enum
import functools

from uad_jax import anomaly_scores, autoencoding, optim
from uad_jax.anomaly_score_config import ScoreConfig
from uad_jax.methods import base
from uad_jax.nn import autoencoder, blocks
from uad_jax.ops import losses, residuals
from uad_jax.score_functions import Functions
from uad_jax.types import Array, Batch, Key, ModelState, Scalars, Tree


class Variant(enum.Enum):
    """Which autoencoder."""

    AE = "ae"  # dense code
    AE_SPATIAL = "ae_spatial"  # the feature map is the code
    VAE = "vae"  # dense Gaussian code
    VAE_SPATIAL = "vae_spatial"  # a Gaussian code at every site of the feature map

    @property
    def spatial(self) -> bool:
        """Whether the code is a map."""
        return self in (Variant.AE_SPATIAL, Variant.VAE_SPATIAL)

    @property
    def variational(self) -> bool:
        """Whether there is a posterior."""
        return self in (Variant.VAE, Variant.VAE_SPATIAL)


@dataclasses.dataclass
class AutoencoderConfig:
    """An autoencoder. The image size follows the data.

    Attributes:
      variant: Which autoencoder.
      latent_size: Size of the dense code (not of the spatial variants).
      latent_channels: Channels of the spatial code, made and undone by 1x1
        convolutions; 0 = those of the feature map.
      intermediate_resolution: Side of the code's feature map; the image side must be
        this times a power of 2. 0 = a sixteenth (8 at 128 pixels, 6 at 96).
      width: Channels of the encoder's first and the decoder's last level.
      max_width: Most channels of a level.
      norm: Normalisation.
      dropout: Dropout on the code and in the dense decoder, while training.
      pixel_loss: Distance of the reconstruction.
      reduction: Over pixels (and latents: MEAN divides both terms by the pixels).
      kl_weight: Weight of the KL divergence (VAEs only), summed over the code.
      score: What makes the anomaly map.
      residual: How image and reconstruction become an anomaly map.
      sample_at_test: VAEs: decode a sample instead of the mean.
      score_chunk: Slices of a volume that are scored at once; 0 = all.
      precision: Type of the computation.
      accumulate_steps: Micro-batches per optimiser step.
      ema_decay: Decay of the averaged parameters; 0 = none.
      optimizer: The optimiser.
    """

    variant: Variant = Variant.VAE
    latent_size: int = 128
    latent_channels: int = 0
    intermediate_resolution: int = 0
    width: int = 32
    max_width: int = 128
    norm: blocks.Norm = blocks.Norm.NONE
    dropout: float = 0.1
    pixel_loss: losses.PixelLoss = losses.PixelLoss.L1
    reduction: losses.Reduction = losses.Reduction.SUM
    kl_weight: float = 1.0
    score: ScoreConfig = dataclasses.field(default_factory=ScoreConfig)
    residual: residuals.Residual = residuals.Residual.ABS
    sample_at_test: bool = False
    score_chunk: int = 32
    precision: base.Precision = base.Precision.FLOAT32
    accumulate_steps: int = 1
    ema_decay: float = 0.0
    optimizer: optim.OptimizerConfig = dataclasses.field(
        default_factory=optim.OptimizerConfig
    )

    def validate(self) -> None:
        """Raises ValueError for settings that cannot work."""
        autoencoding.check(
            self,
            ("latent_size",),
            ("latent_channels", "intermediate_resolution", "kl_weight", "score_chunk"),
        )
        base.check_training(self.accumulate_steps, self.ema_decay)
        self.score.validate(
            f"variant={self.variant.value}",
            posterior=self.variant.variational,
            dropout=self.dropout > 0,
        )
        self.optimizer.validate()

    def make(self, run: base.RunShape) -> base.Method:
        """Builds the method. Float fields may be traced scalars."""
        init, update = base.single_optimizer(
            functools.partial(init_model, self),
            functools.partial(loss, self),
            self.optimizer.make(run.total_steps),
            ema_decay=self.ema_decay,
            accumulate_steps=self.accumulate_steps,
        )
        functions = score_functions(self)
        return base.Method(
            inputs=base.Inputs(),
            init=init,
            update=update,
            validate=functools.partial(validation_loss, self),
            score=anomaly_scores.scorer(
                functions,
                self.score,
                self.residual,
                sample=self.sample_at_test,
                chunk=self.score_chunk,
            ),
            reconstruct=functools.partial(reconstruct, self),
            host_score=anomaly_scores.host_scorer(
                functions, self.score, self.residual, chunk=self.score_chunk
            ),
        )


def networks(
    config: AutoencoderConfig, image_shape: tuple[int, ...]
) -> autoencoding.Networks:
    """Builds encoder and decoder for images of shape (..., H, W, C).

    Raises:
      ValueError: If the image does not fit the intermediate resolution.
    """
    height, width, channels = image_shape[-3:]
    variant = config.variant
    shared = autoencoding.layers(config, image_shape)
    return autoencoding.Networks(
        autoencoder.Encoder(
            latent_size=None if variant.spatial else config.latent_size,
            num_heads=2 if variant.variational else 1,
            latent_channels=config.latent_channels,
            **shared,
        ),
        autoencoder.Decoder(
            image_shape=(height, width, channels),
            widen=variant.spatial and config.latent_channels > 0,
            **shared,
        ),
    )


def init_model(config: AutoencoderConfig, key: Key, batch: Batch) -> ModelState:
    """Initialises {"encoder": ..., "decoder": ...} for the batch's image shape."""
    shape = batch.image.shape
    return autoencoding.init_model(networks(config, shape), key, shape)


def loss(
    config: AutoencoderConfig,
    params: dict[str, Tree],
    collections: dict[str, Tree],
    batch: Batch,
    key: Key,
    *,
    train: bool = True,
) -> tuple[Array, tuple[dict[str, Tree], Scalars]]:
    """Reconstruction error, plus the weighted KL divergence of a VAE.

    Args:
      config: The autoencoder.
      params: {"encoder": ..., "decoder": ...}.
      collections: Empty; handed through.
      batch: Slices, image [B, H, W, C] float32.
      key: Key of the step.
      train: Whether dropout is on. A VAE samples in either case.

    Returns:
      The loss [] and (collections, scalars). Scalars: "reconstruction" and "kl" as
      they enter the loss (kl before its weight), "l1" the mean absolute error.
    """
    keys = base.sample_keys(key, batch.uid, batch.slice_index)
    output, codes = autoencoding.autoencode(
        networks(config, batch.image.shape),
        params,
        batch.image,
        keys=keys,
        dropout=config.dropout if train else None,
    )
    terms = losses.pixels(config.pixel_loss, output, batch.image)
    rows = losses.per_row(terms, config.reduction)
    l1 = losses.l1(output, batch.image, losses.Reduction.MEAN)
    scalars = {
        "reconstruction": losses.mean_over_valid(rows, batch.valid),
        "l1": losses.mean_over_valid(l1, batch.valid),
    }
    value = scalars["reconstruction"]
    if config.variant.variational:
        kl = losses.kl_normal(codes[0], codes[1])
        if config.reduction is losses.Reduction.MEAN:
            kl = kl / (output.size // output.shape[0])
        scalars["kl"] = losses.mean_over_valid(kl, batch.valid)
        value = value + config.kl_weight * scalars["kl"]
    return value, (collections, scalars)


def validation_loss(
    config: AutoencoderConfig, model: ModelState, batch: Batch, key: Key
) -> Scalars:
    """The loss without dropout; a VAE's noise follows from the key, uid and slice."""
    value, (_, scalars) = loss(
        config, model.params, model.collections, batch, key, train=False
    )
    return {"loss": value, **scalars}


def score_functions(config: AutoencoderConfig) -> Functions:
    """What the shared scores need of an autoencoder."""
    return autoencoding.score_functions(
        functools.partial(networks, config),
        config.dropout,
        config.kl_weight,
        config.pixel_loss,
    )


def reconstruct(
    config: AutoencoderConfig,
    model: ModelState,
    image: Array,
    mask: Array,
    key: Key,
    strength: float | Array = 1.0,
) -> Array:
    """Pseudo-healthy version of slices [N, H, W, C]; the strength has no effect."""
    keys = base.row_keys(key, image.shape[0]) if config.sample_at_test else None
    return autoencoding.autoencode(
        networks(config, image.shape), model.params, image, keys=keys
    )[0]
