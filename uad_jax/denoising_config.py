"""Settings that the diffusion methods share: network, noising, scoring."""

import dataclasses
import enum

from uad_jax.ops import diffusion, losses, residuals, schedules
from uad_jax.ops import noise as noise_lib


class NoiseSchedule(enum.Enum):
    """How the share of noise grows with the step."""

    COSINE = "cosine"
    LINEAR = "linear"


class Average(enum.Enum):
    """What is averaged over the test steps of an ensemble."""

    RECONSTRUCTIONS = "reconstructions"  # the published form
    MAPS = "maps"


@dataclasses.dataclass
class UNetConfig:
    """The denoiser. The image size follows the data.

    Attributes:
      width: Channels of the first level.
      multipliers: Channels of each level in units of `width`; each level but the first
        halves the image.
      num_blocks: Residual blocks per level on the way down, 0 or more; one more on the
        way up.
      attention_levels: Levels with attention, 0 = full resolution. The middle always
        attends.
      head_size: Channels per attention head.
      num_heads: Attention heads of every level; 0 = as many as `head_size` gives.
      film: Whether the step scales and shifts the features; False: it is added.
      remat: Compute blocks again in the backward pass to save memory.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2)
    num_blocks: int = 3
    attention_levels: tuple[int, ...] = ()
    head_size: int = 64
    num_heads: int = 0
    film: bool = True
    remat: bool = False

    def validate(self) -> None:
        """Raises ValueError for settings that cannot work."""
        if self.width < 2 or self.width % 2:
            raise ValueError(f"unet.width is {self.width}; use an even number.")
        if not self.multipliers or min(self.multipliers) < 1 or self.num_blocks < 0:
            raise ValueError(
                f"unet.multipliers is {self.multipliers} and unet.num_blocks "
                f"{self.num_blocks}; use a whole number of 1 or more for each level, "
                "and 0 blocks or more."
            )
        last = len(self.multipliers) - 1
        for level in (*self.attention_levels, last):
            if not 0 <= level <= last:
                raise ValueError(
                    f"unet.attention_levels has {level}, but the levels are 0 to "
                    f"{last}."
                )
            channels = self.width * self.multipliers[level]
            if self.num_heads < 0 or (self.num_heads and channels % self.num_heads):
                raise ValueError(
                    f"unet.num_heads is {self.num_heads}, which does not divide the "
                    f"{channels} channels of level {level}, where the U-Net attends; "
                    "0 leaves the choice to head_size."
                )
            if self.num_heads:
                continue
            if self.head_size < 1 or channels % self.head_size:
                raise ValueError(
                    f"unet.head_size is {self.head_size}, which does not divide the "
                    f"{channels} channels of level {level}, where the U-Net attends."
                )


@dataclasses.dataclass
class ProcessConfig:
    """How images are noised, and what the denoiser learns.

    Attributes:
      num_steps: Steps T of the schedule.
      schedule: How the share of noise grows.
      prediction: What the denoiser predicts.
      pixel_loss: Distance of the prediction.
      noise: Kind of noise.
      unit_variance: Divide simplex noise by its standard deviation (0.59 in two
        dimensions, 0.50 in three); False: as published.
      shared_noise: The published code's form: one field for all samples of a batch, and
        in scoring for all slices of a volume. False: a field per slice.
      train_steps: Training draws t below this; 0 = num_steps.
    """

    num_steps: int = 1000
    schedule: NoiseSchedule = NoiseSchedule.COSINE
    prediction: diffusion.Prediction = diffusion.Prediction.X0
    pixel_loss: losses.PixelLoss = losses.PixelLoss.L1
    noise: noise_lib.Noise = noise_lib.Noise.SIMPLEX
    unit_variance: bool = False
    shared_noise: bool = False
    train_steps: int = 0

    def validate(self) -> None:
        """Raises ValueError for settings that cannot work."""
        self.make_schedule()
        self.make_noise((1, 1, 1))
        if not 0 <= self.train_steps <= self.num_steps:
            raise ValueError(
                f"process.train_steps is {self.train_steps}; use 0 to num_steps = "
                f"{self.num_steps}."
            )

    def make_schedule(self) -> schedules.Schedule:
        """Builds the schedule."""
        linear = self.schedule is NoiseSchedule.LINEAR
        return (schedules.linear if linear else schedules.cosine)(self.num_steps)

    def make_noise(self, shape: tuple[int, ...]) -> diffusion.NoiseFn:
        """Builds the noise function for images [..., H, W, C]."""
        height, width, channels = shape[-3:]
        return noise_lib.make(
            self.noise, (height, width, channels), unit_variance=self.unit_variance
        )


@dataclasses.dataclass
class ScoringConfig:
    """How volumes are noised, reconstructed and compared with what comes back.

    Attributes:
      test_steps: Steps t to which images are noised; several make an ensemble.
      average: What is averaged over the ensemble.
      residual: How image and reconstruction become an anomaly map.
      chunk: Slices of a volume that are denoised in one call; 0 = all.
    """

    test_steps: tuple[int, ...] = (499,)
    average: Average = Average.RECONSTRUCTIONS
    residual: residuals.Residual = residuals.Residual.ABS
    chunk: int = 0

    def validate(self, num_steps: int) -> None:
        """Raises ValueError for settings that cannot work with T = `num_steps`."""
        if not self.test_steps or len(set(self.test_steps)) < len(self.test_steps):
            raise ValueError(
                f"scoring.test_steps is {self.test_steps}; use one or more different "
                "steps."
            )
        for t in self.test_steps:
            schedules.check_t("scoring.test_steps", t, num_steps)
        if self.chunk < 0:
            raise ValueError(f"scoring.chunk is {self.chunk}; use 0 or more.")
