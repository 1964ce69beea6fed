"""Denoising autoencoder: remove coarse noise from slices, score clean ones.

Source: Kascenas et al. 2022, "Denoising autoencoders for unsupervised anomaly detection
in brain MRI", and the authors' released code.

Deviations: every slice is shifted by its own number of pixels (`shared_shift`), and the
noise of training and validation is keyed by volume and slice, so that the validation
loss sees the same noise at every step. The foreground is the brain mask; the released
code takes the pixels whose channels sum to more than 0.01.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from uad_jax import anomaly_scores, optim
from uad_jax.anomaly_score_config import ScoreConfig
from uad_jax.methods import base
from uad_jax.nn import dae_unet
from uad_jax.ops import corrupt, losses, residuals
from uad_jax.score_functions import Functions, Terms
from uad_jax.types import Array, Batch, Key, ModelState, Scalars, Tree

NETWORK = "denoiser"  # its name in the parameters


@dataclasses.dataclass
class DaeConfig:
    """A denoising autoencoder. The image size follows the data.

    Attributes:
      width: Channels of the U-Net's first level, doubled per level.
      num_levels: Levels of the U-Net; both sides of the image must be multiples of
        2^(num_levels - 1).
      noise_cells: Points of the coarse noise along either side of the image, whatever
        its size.
      noise_deviation: Standard deviation of the noise on these points; after
        interpolation it is two thirds of it on average.
      shared_shift: Shift the noise of all slices of a batch alike, as the released
        code does.
      score: What makes the anomaly map: the residual of the clean image, as published,
        or the gradient of its error; nothing here is random, and there is no KL.
      residual: How image and reconstruction become an anomaly map, averaged over the
        channels.
      score_chunk: Slices of a volume that are scored at once; 0 = all.
      precision: Type of the computation.
      accumulate_steps: Micro-batches per optimiser step.
      ema_decay: Decay of the averaged parameters; 0 = none.
      optimizer: The optimiser.
    """

    width: int = 64
    num_levels: int = 4
    noise_cells: int = 16
    noise_deviation: float = 0.2
    shared_shift: bool = False
    score: ScoreConfig = dataclasses.field(default_factory=ScoreConfig)
    residual: residuals.Residual = residuals.Residual.ABS
    score_chunk: int = 32
    precision: base.Precision = base.Precision.FLOAT32
    accumulate_steps: int = 1
    ema_decay: float = 0.0
    optimizer: optim.OptimizerConfig = dataclasses.field(
        default_factory=optim.OptimizerConfig
    )

    def validate(self) -> None:
        """Raises ValueError for settings that cannot work."""
        for name in ("width", "num_levels", "noise_cells"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use 1 or more.")
        if self.score_chunk < 0:
            raise ValueError(f"score_chunk is {self.score_chunk}; use 0 or more.")
        if not self.noise_deviation > 0:
            raise ValueError(
                f"noise_deviation is {self.noise_deviation}; it must be above 0: "
                "without noise the network learns to copy."
            )
        self.score.validate("dae", posterior=False, dropout=False)
        base.check_training(self.accumulate_steps, self.ema_decay)
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
        return base.Method(
            inputs=base.Inputs(),
            init=init,
            update=update,
            validate=functools.partial(validation_loss, self),
            score=anomaly_scores.scorer(
                score_functions(self), self.score, self.residual, chunk=self.score_chunk
            ),
            reconstruct=functools.partial(reconstruct, self),
        )


def network(config: DaeConfig, channels: int) -> dae_unet.DaeUNet:
    """Builds the U-Net for images of so many channels."""
    return dae_unet.DaeUNet(
        out_channels=channels,
        width=config.width,
        num_levels=config.num_levels,
        dtype=jnp.dtype(config.precision.value),
    )


def init_model(config: DaeConfig, key: Key, batch: Batch) -> ModelState:
    """Initialises {"denoiser": ...} for the batch's image shape.

    Raises:
      ValueError: If the U-Net cannot halve the image often enough.
    """
    image = jnp.zeros((1, *batch.image.shape[-3:]), jnp.float32)
    variables = network(config, image.shape[-1]).init(key, image)
    return ModelState(params={NETWORK: variables["params"]}, collections={})


def denoise(config: DaeConfig, params: dict[str, Tree], image: Array) -> Array:
    """Removes noise from slices [N, H, W, C]; float32."""
    module: Any = network(config, image.shape[-1])
    return module.apply({"params": params[NETWORK]}, image)


def noise(config: DaeConfig, batch: Batch, key: Key) -> Array:
    """The noise of a training step: coarse, shifted, 0 outside the brain.

    Args:
      config: The method.
      batch: Slices.
      key: Key of the step.

    Returns:
      [B, H, W, C] float32.
    """
    keys = base.sample_keys(key, batch.uid, batch.slice_index)
    _, *shape = batch.image.shape
    field = corrupt.coarse_noise(
        keys,
        (shape[0], shape[1], shape[2]),
        cells=config.noise_cells,
        deviation=config.noise_deviation,
        shift_key=key if config.shared_shift else None,
    )
    return jnp.where(batch.mask, field, 0.0)


def loss(
    config: DaeConfig,
    params: dict[str, Tree],
    collections: dict[str, Tree],
    batch: Batch,
    key: Key,
) -> tuple[Array, tuple[dict[str, Tree], Scalars]]:
    """Squared error inside the brain, divided by all pixels, of denoised slices.

    Args:
      config: The method.
      params: {"denoiser": ...}.
      collections: Empty; handed through.
      batch: Slices, image [B, H, W, C] float32.
      key: Key of the step.

    Returns:
      The loss [] and (collections, scalars). The scalar "noise" is the same error of
      the noisy slices themselves: what a network that does nothing would lose.
    """
    added = noise(config, batch, key)
    output = denoise(config, params, batch.image + added)
    error = jnp.where(batch.mask, output - batch.image, 0.0)

    def mean(error: Array) -> Array:
        rows = losses.per_row(jnp.square(error), losses.Reduction.MEAN)
        return losses.mean_over_valid(rows, batch.valid)

    return mean(error), (collections, {"noise": mean(added)})


def validation_loss(
    config: DaeConfig, model: ModelState, batch: Batch, key: Key
) -> Scalars:
    """The loss with the noise that follows from the key, uid and slice."""
    found = loss(config, model.params, model.collections, batch, key)
    value, (_, scalars) = found
    return {"loss": value, **scalars}


def score_functions(config: DaeConfig) -> Functions:
    """What the shared scores need of a denoising autoencoder."""

    def reconstruct(
        model: ModelState,
        image: Array,
        keys: Array | None,
        *,
        sample: bool,
        dropout: bool,
    ) -> Array:
        return reconstruct_slices(config, model, image, keys)

    def terms(
        model: ModelState, image: Array, keys: Array | None, kind: losses.PixelLoss
    ) -> Terms:
        output = reconstruct_slices(config, model, image)
        error = losses.pixels(kind, output, image)
        rows = losses.per_row(error, losses.Reduction.SUM)
        return Terms(output, rows, jnp.zeros_like(rows))

    return Functions(reconstruct, terms)


def reconstruct_slices(
    config: DaeConfig, model: ModelState, image: Array, keys: Array | None = None
) -> Array:
    """Denoises clean slices; nothing is random.

    Args:
      config: The method.
      model: The model.
      image: [N, H, W, C] float32.
      keys: Not used.

    Returns:
      [N, H, W, C] float32.
    """
    return denoise(config, model.params, image)


def reconstruct(
    config: DaeConfig,
    model: ModelState,
    image: Array,
    mask: Array,
    key: Key,
    strength: float | Array = 1.0,
) -> Array:
    """Pseudo-healthy version of slices [N, H, W, C]; the strength has no effect."""
    return reconstruct_slices(config, model, image)
