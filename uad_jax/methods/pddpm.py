"""Patched diffusion model: noise one box of a slice, denoise it from its surroundings.

The denoiser sees the whole slice, clean but for one noised box. Each box is denoised in
turn, and the boxes join to the reconstruction.

Source: Behrendt et al. 2023, "Patched diffusion models for unsupervised anomaly
detection in brain MRI", and the released code.

Deviations: the loss is the mean over the pixels of the box. The code averages over the
whole slice, where all other pixels count 0, so its loss is this one times the box's
share of the slice, 1/4 for 48 x 48 of 96 x 96. Adam does not see a constant factor;
curves, clipping and sums with other losses do. With RANDOM_CUT the factor is no
constant: the code weighs a row by what the border leaves of its box. Noise is drawn per
slice, not once per batch (`process.shared_noise`).
"""

import dataclasses
import enum
import functools

import jax.numpy as jnp

from uad_jax import denoising, denoising_config, noising, optim
from uad_jax.methods import base
from uad_jax.ops import augment as augment_lib
from uad_jax.ops import diffusion, patches
from uad_jax.types import Array, Batch, Key, ModelState, Scalars, Tree


class Boxes(enum.Enum):
    """Which box of a slice is noised in training."""

    GRID = "grid"  # one of the boxes of the test
    RANDOM = "random"  # anywhere, all of it inside the slice
    RANDOM_CUT = "random_cut"  # anywhere, cut off at the border: the released code


@dataclasses.dataclass
class PddpmConfig:
    """A patched denoising diffusion model.

    Attributes:
      unet: The denoiser.
      process: How boxes are noised, and what the denoiser learns.
      scoring: How volumes are scored.
      patch: Side of a box in pixels.
      stride: Pixels from box to box of the grid; 0 = as few boxes as cover the slice.
      boxes: Which box is noised in training.
      overlap: Which box a pixel comes from where boxes of the grid overlap.
      augment: How training slices are changed at random; not at all by default.
      precision: Type of the network's computation.
      accumulate_steps: Micro-batches per optimiser step.
      ema_decay: Decay of the averaged parameters; 0 = none.
      optimizer: The optimiser.
    """

    unet: denoising_config.UNetConfig = dataclasses.field(
        default_factory=denoising_config.UNetConfig
    )
    process: denoising_config.ProcessConfig = dataclasses.field(
        default_factory=denoising_config.ProcessConfig
    )
    scoring: denoising_config.ScoringConfig = dataclasses.field(
        default_factory=denoising_config.ScoringConfig
    )
    patch: int = 48
    stride: int = 0
    boxes: Boxes = Boxes.GRID
    overlap: patches.Overlap = patches.Overlap.AVERAGE
    augment: augment_lib.AugmentConfig = dataclasses.field(
        default_factory=augment_lib.none
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
        if self.patch < 1 or self.stride < 0:
            raise ValueError(
                f"patch is {self.patch} and stride {self.stride}; use a patch of 1 or "
                "more pixels and a stride of 0 or more."
            )

    def make(self, run: base.RunShape) -> base.Method:
        """Builds the method. Float fields may be traced scalars."""
        return denoising.method(
            self,
            run,
            init_model=init_model,
            loss=loss,
            reconstruct_slices=reconstruct_slices,
            reconstruct=reconstruct,
        )


def grid(config: PddpmConfig, shape: tuple[int, ...]) -> patches.Grid:
    """Lays the boxes over images [..., H, W, C].

    Raises:
      ValueError: If a box does not fit or pixels are left uncovered.
    """
    return patches.grid((shape[-3], shape[-2]), config.patch, config.stride)


def init_model(config: PddpmConfig, key: Key, batch: Batch) -> ModelState:
    """Initialises {"denoiser": ...} for the batch's image shape."""
    grid(config, batch.image.shape)  # refuses images that it cannot cover
    return denoising.init_model(config, key, batch)


def loss(
    config: PddpmConfig,
    params: dict[str, Tree],
    collections: dict[str, Tree],
    batch: Batch,
    key: Key,
) -> tuple[Array, tuple[dict[str, Tree], Scalars]]:
    """Mean error of the prediction inside one random box of each row.

    Args:
      config: The model.
      params: {"denoiser": ...}.
      collections: Empty; handed through.
      batch: Slices, image [B, H, W, C] float32.
      key: Key of the step.

    Returns:
      The loss [] and (collections, no scalars).
    """
    denoise = denoising.denoiser(config, params, batch.image.shape)
    region = functools.partial(training_boxes, config)
    value = noising.mean_error(config.process, denoise, batch, key, region)
    return value, (collections, {})


def training_boxes(config: PddpmConfig, keys: Array, shape: tuple[int, ...]) -> Array:
    """Draws a box per key for images [..., H, W, C]: [N, H, W, 1] bool."""
    if config.boxes is Boxes.GRID:
        return patches.random_masks(keys, grid(config, shape))
    size = shape[-3], shape[-2]
    cut = config.boxes is Boxes.RANDOM_CUT
    return patches.random_boxes(keys, size, config.patch, cut)


def denoise_box(
    config: PddpmConfig,
    params: dict[str, Tree],
    image: Array,
    inside: Array,
    t: Array,
    eps: Array,
) -> Array:
    """Noises and denoises one box of each image.

    Args:
      config: The model.
      params: {"denoiser": ...}.
      image: [N, H, W, C] float32 of about [0, 1].
      inside: The box, [N, H, W, 1] bool.
      t: Steps, [N] int32.
      eps: Noise, [N, H, W, C].

    Returns:
      The image with its box reconstructed, [N, H, W, C] float32; outside the box it is
      the image to the bit.
    """
    schedule, kind = config.process.make_schedule(), config.process.prediction
    x0 = noising.to_signed(image)
    seen = jnp.where(inside, diffusion.q_sample(schedule, x0, t, eps), x0)
    denoise = denoising.denoiser(config, params, image.shape)
    clean = diffusion.to_x0(schedule, kind, denoise(seen, t), seen, t)
    return jnp.where(inside, noising.from_signed(clean), image)


def reconstruct_from(
    config: PddpmConfig, model: ModelState, image: Array, keys: Array, steps: Array
) -> Array:
    """Reconstructs images from all their steps, all boxes in one call.

    Args:
      config: The model.
      model: Its parameters.
      image: [N, H, W, C] float32.
      keys: [N]; all boxes of an image share the noise of a step.
      steps: [N, E] int32.

    Returns:
      [N, E, H, W, C] float32.
    """
    boxes = grid(config, image.shape)
    ensemble, count = steps.shape[1], len(boxes.corners)
    rows, t, eps = noising.for_each_step(config.process, image, keys, steps)

    def each_box(x: Array) -> Array:
        return jnp.repeat(x, count, axis=0)

    inside = jnp.tile(jnp.asarray(patches.masks(boxes)), (len(rows), 1, 1, 1))
    outputs = denoise_box(
        config, model.params, each_box(rows), inside, each_box(t), each_box(eps)
    )
    outputs = outputs.reshape(-1, count, *image.shape[1:])
    joined = patches.blend(outputs, boxes, config.overlap)
    return joined.reshape(-1, ensemble, *image.shape[1:])


reconstruct_slices, reconstruct = denoising.reconstruct_by(reconstruct_from)
