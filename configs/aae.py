"""Adversarial autoencoder, constrained adversarial autoencoder, constrained AE.

Paper:     Chen and Konukoglu 2018, "Unsupervised detection of lesions in brain MRI
           using constrained adversarial auto-encoders" (arXiv 1806.04972), in the form
           of Baur et al. 2021, "Autoencoders for unsupervised anomaly segmentation in
           brain MR images: a comparative study" (arXiv 2004.03271)
Command:   python run.py train --config=configs/aae.py:variant=constrained_aae \
             --config.data.store=STORE --workdir=DIR
           variant = aae | constrained_aae | constrained_ae. Words: `paper` for the
           settings of the study's released code, its extrapolated gradient penalty
           included (slices of 128x128), `cpu` for two cores, no word for an
           accelerator.
Hardware:  one accelerator; `cpu`: two cores
Time:      accelerator: not yet measured; `cpu`: 300 of its 400 steps took 5 to 7
           minutes on one core with other work (constrained AE: 2)
Expected:  `cpu`, 300 steps: docs/results_synthetic.md
"""

from configs import _adversarial, _parts
from uad_jax import config as config_lib
from uad_jax.adversarial_config import CriticConfig, NetworkConfig, adam
from uad_jax.compat import Compat
from uad_jax.methods import aae, base
from uad_jax.methods.aae import Variant
from uad_jax.nn import blocks
from uad_jax.ops import losses, residuals


def get_config(arg: str = "") -> config_lib.ExperimentConfig:
    """Builds the experiment; `arg` as described above."""
    given = _parts.parse(arg, ("paper", "cpu"), {"variant": Variant})
    variant = given.values.get("variant", Variant.AAE)
    word = _adversarial.one_word(given.words, "'paper' and 'cpu'")
    if word == "paper":
        return _paper(variant)
    config = _modern(variant)
    if word == "cpu":
        _adversarial.shrink(config, total_steps=400, critic_steps=5)
        config.name += "_cpu"
    return config


def _modern(variant: Variant) -> config_lib.ExperimentConfig:
    """Absolute errors summed over the pixels, one step of the autoencoder throughout.

    With a summed error the constraint counts per pixel too.
    """
    return _adversarial.modern(
        variant.value,
        aae.AaeConfig(
            variant=variant,
            network=_network(),
            critic=CriticConfig(steps=5, optimizer=_adversarial.scheduled(2e-4)),
            critic_hidden=_hidden(variant),
            constraint_weight=100.0,
            first_epochs=0,
            pixel_loss=losses.PixelLoss.L1,
            reduction=losses.Reduction.SUM,
            precision=base.Precision.BFLOAT16,
            ema_decay=0.999,
            optimizer=_adversarial.scheduled(5e-4),
        ),
    )


def _paper(variant: Variant) -> config_lib.ExperimentConfig:
    """The settings of the released scripts, which differ between the variants."""
    plain = variant is Variant.AAE
    network = _network(16)
    optimizer = adam(1e-4 if plain else 1e-3)
    critic = CriticConfig(
        steps=20, penalty_weight=10.0 if plain else 1.0, optimizer=adam(1e-3)
    )
    critic.optimizer.learning_rate = optimizer.learning_rate
    if variant is Variant.CONSTRAINED_AE:
        network.latent_size = 1024
        optimizer.b2 = 0.999
    method = aae.AaeConfig(
        variant=variant,
        network=network,
        critic=critic,
        critic_hidden=_hidden(variant),
        first_epochs=6 if variant.has_critic else 0,
        compat=Compat.DENNER,
        residual=residuals.Residual.POSITIVE,
        optimizer=optimizer,
    )
    return _adversarial.published(
        f"{variant.value}_paper", method, batch_size=128 if plain else 8
    )


def _network(resolution: int = 0) -> NetworkConfig:
    return NetworkConfig(
        intermediate_resolution=resolution, generator_norm=blocks.Norm.NONE
    )


def _hidden(variant: Variant) -> tuple[int, ...]:
    return (50, 50) if variant is Variant.AAE else (100, 50)
