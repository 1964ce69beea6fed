"""Settings that the adversarial methods share: networks and critic."""

import dataclasses
import enum

from uad_jax import optim
from uad_jax.nn import blocks
from uad_jax.ops.adversarial import Adversary


class Bottleneck(enum.Enum):
    """Whether a code knows where in the image its entries belong."""

    DENSE = "dense"
    SPATIAL = "spatial"  # a map of `latent_size` channels


@dataclasses.dataclass
class NetworkConfig:
    """Encoder and generator (decoder). The image size follows the data.

    Attributes:
      latent_size: Size of a dense code, or channels of a spatial one.
      intermediate_resolution: Side of the code's feature map; the image side must be
        this times a power of 2. 0 = a sixteenth (8 at 128 pixels, 6 at 96).
      width: Channels of the encoder's first and the generator's last level.
      max_width: Most channels of a level.
      norm: Normalisation of the encoder.
      generator_norm: Normalisation of the generator.
      dropout: Dropout on the code and in the generator, while training.
    """

    latent_size: int = 128
    intermediate_resolution: int = 0
    width: int = 32
    max_width: int = 128
    norm: blocks.Norm = blocks.Norm.NONE
    generator_norm: blocks.Norm = blocks.Norm.LAYER
    dropout: float = 0.1

    def validate(self) -> None:
        """Raises ValueError for settings that cannot work."""
        for name in ("latent_size", "width"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"network.{name} is {getattr(self, name)}; use 1 or more."
                )
        if self.intermediate_resolution < 0:
            raise ValueError(
                f"network.intermediate_resolution is {self.intermediate_resolution}; "
                "use 0 or more."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"network.dropout is {self.dropout}; it must lie in [0, 1)."
            )
        if self.width % 8 or self.max_width % 8 or self.max_width < self.width:
            raise ValueError(
                f"network.width is {self.width} and network.max_width "
                f"{self.max_width}; use multiples of 8 with max_width >= width."
            )


@dataclasses.dataclass
class CriticConfig:
    """The critic and how it is trained.

    Attributes:
      adversary: What it maximises.
      steps: Steps of the critic for each batch.
      penalty_weight: Weight of the gradient penalty (WGAN_GP only).
      optimizer: Its optimiser.
    """

    adversary: Adversary = Adversary.WGAN_GP
    steps: int = 5
    penalty_weight: float = 10.0
    optimizer: optim.OptimizerConfig = dataclasses.field(
        default_factory=lambda: adam(1e-4)
    )

    def validate(self) -> None:
        """Raises ValueError for settings that cannot work."""
        if self.steps < 1:
            raise ValueError(f"critic.steps is {self.steps}; use 1 or more.")
        if self.penalty_weight < 0:
            raise ValueError(
                f"critic.penalty_weight is {self.penalty_weight}; use 0 or more."
            )
        self.optimizer.validate()


def adam(learning_rate: float) -> optim.OptimizerConfig:
    """Adam with the short memory of all adversarial models of the study."""
    return optim.OptimizerConfig(learning_rate=learning_rate, b1=0.5, b2=0.9)


def check_weights(**weights: float) -> None:
    """Raises ValueError for a negative weight of a term of a loss."""
    for name, value in weights.items():
        if value < 0:
            raise ValueError(f"{name} is {value}; use 0 or more.")
