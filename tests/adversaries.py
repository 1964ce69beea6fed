"""Tiny adversarial methods for tests."""

from uad_jax import optim
from uad_jax.adversarial_config import Bottleneck, CriticConfig, NetworkConfig
from uad_jax.methods import aae, anovaegan, fanogan
from uad_jax.nn import blocks
from uad_jax.ops.adversarial import Adversary
from uad_jax.ops.residuals import Residual


def network(**changes: object) -> NetworkConfig:
    """One level of 8 channels, for slices of 16 x 16."""
    settings = {
        "latent_size": 8,
        "intermediate_resolution": 8,
        "width": 8,
        "max_width": 8,
        "dropout": 0.1,
    }
    return NetworkConfig(**{**settings, **changes})  # type: ignore[arg-type]


def optimizer(learning_rate: float = 1e-3) -> optim.OptimizerConfig:
    """A large eps: steps along gradients of rounding errors stay small.

    Biases before a normalisation have no other gradient.
    """
    return optim.OptimizerConfig(
        learning_rate=learning_rate, b1=0.5, b2=0.9, eps=3e-2, clip_norm=100.0
    )


def critic(adversary: Adversary = Adversary.WGAN_GP, steps: int = 2) -> CriticConfig:
    """Two steps for each batch."""
    return CriticConfig(adversary=adversary, steps=steps, optimizer=optimizer())


def anovaegan_config() -> anovaegan.AnoVaeGanConfig:
    """Three optimisers, a Wasserstein critic of patches, a dense Gaussian code."""
    return anovaegan.AnoVaeGanConfig(
        network=network(),
        critic=critic(),
        sample_at_test=True,
        ema_decay=0.9,
        optimizer=optimizer(),
    )


def aegan_config() -> anovaegan.AnoVaeGanConfig:
    """Two optimisers, a classifying critic of images, a spatial code."""
    return anovaegan.AnoVaeGanConfig(
        variational=False,
        bottleneck=Bottleneck.SPATIAL,
        network=network(latent_size=4),
        critic=critic(Adversary.LOG_LOSS, steps=1),
        patch_critic=False,
        joint=True,
        adversarial_weight=0.5,
        residual=Residual.POSITIVE,
        ema_decay=0.9,
        optimizer=optimizer(),
    )


def aae_config(
    variant: aae.Variant = aae.Variant.CONSTRAINED_AAE,
) -> aae.AaeConfig:
    """Three optimisers; in the first epoch two steps of the autoencoder per batch."""
    return aae.AaeConfig(
        variant=variant,
        network=network(generator_norm=blocks.Norm.NONE),
        critic=critic(),
        critic_hidden=(8,),
        first_epochs=1,
        first_steps=2,
        first_critic_steps=3,
        ema_decay=0.9,
        optimizer=optimizer(),
    )


def gan_config() -> fanogan.GanConfig:
    """The first stage: two optimisers."""
    return fanogan.GanConfig(
        network=network(), critic=critic(), ema_decay=0.9, optimizer=optimizer()
    )


def fanogan_config() -> fanogan.EncoderConfig:
    """The second stage: two of three networks frozen, scores with features."""
    return fanogan.EncoderConfig(
        network=network(), feature_score=True, ema_decay=0.9, optimizer=optimizer()
    )
