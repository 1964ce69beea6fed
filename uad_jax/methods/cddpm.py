"""Conditioned diffusion model: the denoiser is told what the clean slice looks like.

A ResNet maps the clean slice to a vector, which scales and shifts the features of the
denoiser. Noise hides the local structure, so lesions, while the vector keeps the global
intensities that noise destroys too.

Source: Behrendt et al. 2023, "Guided reconstruction with conditioned diffusion models
for unsupervised anomaly detection in brain MRIs" (arXiv 2312.04215), and the released
code.

Deviations: noise is drawn per slice, not once per batch (`process.shared_noise`).
Validation slices are not augmented, and the encoder's batch normalisation takes its
running statistics there; the code augments them.
"""

import dataclasses

import jax
import jax.numpy as jnp

from uad_jax import denoising, denoising_config, noising, optim
from uad_jax.methods import base
from uad_jax.nn import resnet
from uad_jax.ops import augment as augment_lib
from uad_jax.ops import diffusion
from uad_jax.types import Array, Batch, Key, ModelState, Scalars, Tree

ENCODER = "encoder"  # its name in the parameters
_STATISTICS = "batch_stats"
_DROP_PATH = 4  # draw of a row; `noising` uses 0 to 3


@dataclasses.dataclass
class EncoderConfig:
    """The network that sees the clean slice.

    Attributes:
      features: Length of the condition vector.
      stage_sizes: Blocks of its four stages; (3, 4, 6, 3) is ResNet-50.
      width: Channels of its stem.
      drop_path: Rate at which training skips the last block; it rises linearly from 0
        at the first.
    """

    features: int = 512
    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    drop_path: float = 0.05

    def validate(self) -> None:
        """Raises ValueError for settings that cannot work."""
        if self.features < 1 or self.width < 1:
            raise ValueError(
                f"encoder.features is {self.features} and encoder.width {self.width}; "
                "use 1 or more."
            )
        resnet.check_stages("encoder.stage_sizes", self.stage_sizes)
        if not 0 <= self.drop_path < 1:
            raise ValueError(
                f"encoder.drop_path is {self.drop_path}; it must lie in [0, 1)."
            )


@dataclasses.dataclass
class CddpmConfig:
    """A conditioned denoising diffusion model.

    Attributes:
      unet: The denoiser.
      encoder: The network that sees the clean slice.
      process: How images are noised, and what the denoiser learns.
      scoring: How volumes are scored.
      augment: How training slices are changed at random, before anything sees them.
      precision: Type of the networks' computation.
      accumulate_steps: Micro-batches per optimiser step. Batch statistics are those of
        a micro-batch.
      ema_decay: Decay of the averaged parameters; 0 = none.
      optimizer: The optimiser of both networks.
    """

    unet: denoising_config.UNetConfig = dataclasses.field(
        default_factory=denoising_config.UNetConfig
    )
    encoder: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)
    process: denoising_config.ProcessConfig = dataclasses.field(
        default_factory=denoising_config.ProcessConfig
    )
    scoring: denoising_config.ScoringConfig = dataclasses.field(
        default_factory=denoising_config.ScoringConfig
    )
    augment: augment_lib.AugmentConfig = dataclasses.field(
        default_factory=augment_lib.AugmentConfig
    )
    precision: base.Precision = base.Precision.FLOAT32
    accumulate_steps: int = 1
    ema_decay: float = 0.0
    optimizer: optim.OptimizerConfig = dataclasses.field(
        default_factory=optim.OptimizerConfig
    )

    def validate(self) -> None:
        """Raises ValueError for settings that cannot work."""
        denoising.validate(self)
        self.encoder.validate()

    def make(self, run: base.RunShape) -> base.Method:
        """Builds the method. Float fields but `augment.max_blur` may be traced."""
        return denoising.method(
            self,
            run,
            init_model=init_model,
            loss=loss,
            validation_loss=validation_loss,
            reconstruct_slices=reconstruct_slices,
            reconstruct=reconstruct,
        )


def init_model(config: CddpmConfig, key: Key, batch: Batch) -> ModelState:
    """Initialises {"denoiser": ..., "encoder": ...} for the batch's image shape."""
    keys = jax.random.split(key)
    image = jnp.zeros((1, *batch.image.shape[-3:]))
    variables = _encoder(config).init(keys[0], image)
    condition = jnp.zeros((1, config.encoder.features))
    model = denoising.init_model(config, keys[1], batch, condition)
    return ModelState(
        params={**model.params, ENCODER: variables["params"]},
        collections={ENCODER: {_STATISTICS: variables[_STATISTICS]}},
    )


def loss(
    config: CddpmConfig,
    params: dict[str, Tree],
    collections: dict[str, Tree],
    batch: Batch,
    key: Key,
) -> tuple[Array, tuple[dict[str, Tree], Scalars]]:
    """Mean error of the prediction, given the condition, at a random step for each row.

    Args:
      config: The model.
      params: {"denoiser": ..., "encoder": ...}.
      collections: {"encoder": {"batch_stats": ...}}.
      batch: Slices, image [B, H, W, C] float32.
      key: Key of the step.

    Returns:
      The loss [] and (changed collections, no scalars).
    """
    keys = base.sample_keys(key, batch.uid, batch.slice_index)
    condition, updates = _encoder(config).apply(
        {"params": params[ENCODER], **collections[ENCODER]},
        batch.image,
        train=True,
        valid=batch.valid,
        drop_path=config.encoder.drop_path,
        keys=diffusion.fold_in(keys, _DROP_PATH),
        mutable=[_STATISTICS],
    )
    denoise = denoising.denoiser(config, params, batch.image.shape, condition)
    value = noising.mean_error(config.process, denoise, batch, key)
    return value, ({ENCODER: dict(updates)}, {})


def validation_loss(
    config: CddpmConfig,
    params: dict[str, Tree],
    collections: dict[str, Tree],
    batch: Batch,
    key: Key,
) -> tuple[Array, tuple[dict[str, Tree], Scalars]]:
    """Like `loss`, with the encoder's running statistics and no skipped blocks."""
    model = ModelState(params=params, collections=collections)
    condition = encode(config, model, batch.image)
    denoise = denoising.denoiser(config, params, batch.image.shape, condition)
    value = noising.mean_error(config.process, denoise, batch, key)
    return value, (collections, {})


def encode(config: CddpmConfig, model: ModelState, image: Array) -> Array:
    """Condition vectors of images, [N, H, W, C] of about [0, 1] to [N, K] float32."""
    variables = {"params": model.params[ENCODER], **model.collections[ENCODER]}
    return jnp.asarray(_encoder(config).apply(variables, image))


def reconstruct_from(
    config: CddpmConfig, model: ModelState, image: Array, keys: Array, steps: Array
) -> Array:
    """Reconstructs images from all their steps in one call.

    Args:
      config: The model.
      model: Its parameters and statistics.
      image: [N, H, W, C] float32.
      keys: [N].
      steps: [N, E] int32.

    Returns:
      [N, E, H, W, C] float32.
    """
    # Once per image: all its steps share the condition.
    condition = jnp.repeat(encode(config, model, image), steps.shape[1], axis=0)
    denoise = denoising.denoiser(config, model.params, image.shape, condition)
    return denoising.reconstruct_once(config.process, denoise, image, keys, steps)


reconstruct_slices, reconstruct = denoising.reconstruct_by(reconstruct_from)


def _encoder(config: CddpmConfig) -> resnet.ConditionEncoder:
    return resnet.ConditionEncoder(
        features=config.encoder.features,
        stage_sizes=config.encoder.stage_sizes,
        width=config.encoder.width,
        dtype=jnp.dtype(config.precision.value),
    )
