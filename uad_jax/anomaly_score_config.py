"""Settings of the anomaly scores that the reconstruction methods share."""

import dataclasses
import enum

from uad_jax.ops import losses


class Score(enum.Enum):
    """What makes the anomaly map."""

    RESIDUAL = "residual"  # of one reconstruction
    MC_MEAN = "mc_mean"  # of the mean of several random reconstructions
    MC_VARIANCE = "mc_variance"  # how much random reconstructions differ
    RESTORATION = "restoration"  # of the image moved to where the model likes it
    GRADIENT = "gradient"  # how steeply the model's loss changes with a pixel


class SliceScore(enum.Enum):
    """What makes the score of a slice; that of a volume follows from it."""

    MAP = "map"  # mean of the map in the brain; volume: mean over all its brain voxels
    KL = "kl"  # distance of the posterior from the prior; volume: its highest slice
    ELBO = "elbo"  # reconstruction error + weighted KL; volume: its highest slice


class Smoothing(enum.Enum):
    """Whose total variation a restoration keeps small."""

    CHANGE = "change"  # of what was taken away, y - x: You et al., Chen et al.
    RESIDUAL = "residual"  # of what the model cannot rebuild: Baur et al. 2021's code


class Gradient(enum.Enum):
    """The term of the loss that is differentiated by the pixels."""

    KL = "kl"
    RECONSTRUCTION = "reconstruction"
    ELBO = "elbo"  # the reconstruction error plus the weighted KL


class GradientScale(enum.Enum):
    """How gradients are scaled before they are blurred and multiply a residual."""

    VOLUME = "volume"  # to 0 ... 1 over the brain of each volume
    NONE = "none"  # not at all: Baur et al. 2021's code


@dataclasses.dataclass
class RestorationConfig:
    """Restoration by gradient steps on error + KL + weight * total variation.

    The defaults are those that You et al. give their VAE, `you_gmvae()` those of their
    GMVAE, `denner()` those of the code of Baur et al. 2021. A CPU run wants far fewer
    steps.

    Attributes:
      num_steps: Gradient steps.
      step_size: Size of the first steps.
      late_step_size: Size from step `late_from` on.
      late_from: First step of the later size.
      clip: Largest entry of a gradient; 0 = no limit.
      masked: Change brain pixels only.
      smoothing: Whose total variation counts.
      tv_weights: Weight of the total variation; of several the maps are averaged.
      pixel_loss: Reconstruction error, summed over the pixels.
      sampled: Draw the code anew at every step; off = the posterior's mean.
    """

    num_steps: int = 500
    step_size: float = 5e-3
    late_step_size: float = 2e-3
    late_from: int = 100
    clip: float = 50.0
    masked: bool = True
    smoothing: Smoothing = Smoothing.CHANGE
    tv_weights: tuple[float, ...] = (2.2,)
    pixel_loss: losses.PixelLoss = losses.PixelLoss.L2
    sampled: bool = False

    def validate(self) -> None:
        """Raises ValueError for settings that cannot work."""
        if self.num_steps < 1:
            raise ValueError(
                f"score.restoration.num_steps is {self.num_steps}; use 1 or more."
            )
        for name in ("step_size", "late_step_size"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"score.restoration.{name} is {getattr(self, name)}; it must be "
                    "above 0."
                )
        for name in ("late_from", "clip"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"score.restoration.{name} is {getattr(self, name)}; use 0 or more."
                )
        if not self.tv_weights or min(self.tv_weights) < 0:
            raise ValueError(
                f"score.restoration.tv_weights is {self.tv_weights}; use one or more "
                "weights of 0 or more."
            )


def you_gmvae() -> RestorationConfig:
    """The restoration that You et al. give their GMVAE: a wider limit, less smooth."""
    return RestorationConfig(clip=100.0, tv_weights=(1.8,))


def denner() -> RestorationConfig:
    """The restoration in the released code of Baur et al. 2021.

    Nothing holds the image to where it came from, the background moves too, the
    gradient is not limited, and the code is drawn anew at every step.
    """
    return RestorationConfig(
        num_steps=150,
        step_size=1e-3,
        late_step_size=1e-3,
        clip=0.0,
        masked=False,
        smoothing=Smoothing.RESIDUAL,
        tv_weights=(1.8,),
        pixel_loss=losses.PixelLoss.L1,
        sampled=True,
    )


@dataclasses.dataclass
class GradientConfig:
    """Gradient of the loss with respect to the pixels, in absolute value.

    Attributes:
      of: What is differentiated.
      times_residual: Multiply by the residual: the "combi" score of ceVAE.
      scale: With `times_residual`: how the gradient is scaled first.
      smoothing: Standard deviation of the Gaussian that blurs the gradient, in pixels,
        cut at one deviation (3: a kernel of 7 x 7); 0 = none.
      samples: Draws of the code over which gradients are averaged; 0 = the
        posterior's mean.
      pixel_loss: Reconstruction error, summed over the pixels.
    """

    of: Gradient = Gradient.KL
    times_residual: bool = False
    scale: GradientScale = GradientScale.VOLUME
    smoothing: int = 3
    samples: int = 0
    pixel_loss: losses.PixelLoss = losses.PixelLoss.L1

    def validate(self) -> None:
        """Raises ValueError for settings that cannot work."""
        for name in ("smoothing", "samples"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"score.gradient.{name} is {getattr(self, name)}; use 0 or more."
                )


@dataclasses.dataclass
class ScoreConfig:
    """What a trained model is asked. It does not change the training.

    Attributes:
      kind: What makes the anomaly map.
      slice_score: What makes the scores of slices and volumes.
      passes: MC_MEAN, MC_VARIANCE: random reconstructions.
      mc_dropout: They drop units.
      mc_samples: They decode samples of the posterior, where there is one.
      restoration: RESTORATION: how.
      gradient: GRADIENT: of what.
    """

    kind: Score = Score.RESIDUAL
    slice_score: SliceScore = SliceScore.MAP
    passes: int = 10
    mc_dropout: bool = True
    mc_samples: bool = True
    restoration: RestorationConfig = dataclasses.field(
        default_factory=RestorationConfig
    )
    gradient: GradientConfig = dataclasses.field(default_factory=GradientConfig)

    def validate(self, method: str, *, posterior: bool, dropout: bool) -> None:
        """Raises ValueError for settings that cannot work.

        Args:
          method: Its name, for the message.
          posterior: Whether the method has a posterior of its code, hence a KL.
          dropout: Whether units are dropped in training.
        """
        self.restoration.validate()
        self.gradient.validate()
        kinds = possible(posterior=posterior, dropout=dropout)
        if self.kind not in kinds:
            raise ValueError(
                f"score.kind is {self.kind.value}, which {method} cannot give"
                + ("." if posterior else ": it has no posterior or no dropout.")
                + f" Use one of {', '.join(kind.value for kind in kinds)}."
            )
        if not posterior and self.slice_score is not SliceScore.MAP:
            raise ValueError(
                f"score.slice_score is {self.slice_score.value}, but {method} has no "
                "posterior. Use map."
            )
        if self.kind is Score.GRADIENT and not posterior:
            self._check_plain_gradient(method)
        if self.kind in (Score.MC_MEAN, Score.MC_VARIANCE):
            self._check_passes(method, posterior=posterior, dropout=dropout)

    def _check_plain_gradient(self, method: str) -> None:
        """Raises ValueError if the gradient needs a posterior."""
        of = self.gradient.of
        if of is not Gradient.RECONSTRUCTION:
            raise ValueError(
                f"score.gradient.of is {of.value}, but {method} has no posterior. "
                "Use reconstruction."
            )
        if self.gradient.samples:
            raise ValueError(
                f"score.gradient.samples is {self.gradient.samples}, but {method} has "
                "no posterior to draw from. Use 0."
            )

    def _check_passes(self, method: str, *, posterior: bool, dropout: bool) -> None:
        """Raises ValueError if the random passes are too few or not random."""
        if self.passes < 2:
            raise ValueError(f"score.passes is {self.passes}; use 2 or more.")
        if (self.mc_dropout and dropout) or (self.mc_samples and posterior):
            return
        has = {"mc_dropout": dropout, "mc_samples": posterior}
        useful = " or ".join(f"score.{name}" for name, value in has.items() if value)
        raise ValueError(
            f"score.kind is {self.kind.value}, but nothing is random in {method}: "
            f"score.mc_dropout is {self.mc_dropout}, score.mc_samples is "
            f"{self.mc_samples}. Switch on {useful}."
        )


def mixture_score() -> ScoreConfig:
    """The scores of a GMVAE, whose restoration has settings of its own."""
    return ScoreConfig(restoration=you_gmvae())


def possible(*, posterior: bool, dropout: bool) -> list[Score]:
    """The scores that make sense for a method with or without posterior, dropout."""
    kinds = [Score.RESIDUAL]
    if posterior or dropout:
        kinds += [Score.MC_MEAN, Score.MC_VARIANCE]
    if posterior:
        kinds.append(Score.RESTORATION)
    return [*kinds, Score.GRADIENT]
