"""AnoVAEGAN and AE-GAN: autoencoders with a critic of their reconstructions.

Paper:     Baur et al. 2018, "Deep autoencoding models for unsupervised anomaly
           segmentation in brain MR images" (arXiv 1804.04488); Baur et al. 2021,
           "Autoencoders for unsupervised anomaly segmentation in brain MR images: a
           comparative study" (arXiv 2004.03271)
Command:   python run.py train --config=configs/anovaegan.py:WORDS \
             --config.data.store=STORE --workdir=DIR
           WORDS: variant = aegan | anovaegan, bottleneck = dense | spatial, and one of
           `baur2020` (or `paper`): the settings of the study's released code, its
           gradient penalty included (slices of 128x128; it has only the dense
           AnoVAEGAN); `baur2018`: a reconstruction of the 2018 paper from its abstract
           and the authors' later defaults, since no code of it was released (slices of
           128x128 or 256x256); `cpu` for two cores; no word for an accelerator.
Hardware:  one accelerator; `cpu`: two cores
Time:      accelerator: not yet measured; `cpu`: 300 of its 400 steps took 5
           minutes on one core (AE-GAN)
Expected:  `cpu`, 300 steps: docs/results_synthetic.md and docs/results_real.md
"""

import dataclasses

from configs import _adversarial, _parts
from uad_jax import config as config_lib
from uad_jax import optim
from uad_jax.adversarial_config import Bottleneck, CriticConfig, NetworkConfig
from uad_jax.compat import Compat
from uad_jax.methods import anovaegan, base
from uad_jax.ops import losses, residuals
from uad_jax.ops.adversarial import Adversary


def get_config(arg: str = "") -> config_lib.ExperimentConfig:
    """Builds the experiment; `arg` as described above."""
    given = _parts.parse(
        arg,
        ("paper", "cpu", "baur2018", "baur2020"),
        {"variant": _is_variational, "bottleneck": Bottleneck},
    )
    word = _adversarial.one_word(
        given.words, "'paper' and 'cpu', 'baur2018', 'baur2020'"
    )
    variational = given.values.get("variant", True)
    bottleneck = given.values.get("bottleneck", Bottleneck.DENSE)
    build = {
        "": _modern,
        "cpu": _cpu,
        "baur2018": _baur2018,
        "baur2020": _baur2020,
        "paper": _baur2020,
    }[word]
    config = build(variational, bottleneck)
    name = "anovaegan" if variational else "aegan"
    if bottleneck is Bottleneck.SPATIAL:
        name += "_spatial"
    config.name = f"{name}_{word}" if word else name
    return config


def _is_variational(text: str) -> bool:
    if text not in ("aegan", "anovaegan"):
        raise ValueError("expected one of aegan, anovaegan")
    return text == "anovaegan"


def _network(bottleneck: Bottleneck, resolution: int = 0) -> NetworkConfig:
    """Dense codes of 128 numbers, spatial ones of 64 channels."""
    dense = bottleneck is Bottleneck.DENSE
    return NetworkConfig(
        latent_size=128 if dense else 64, intermediate_resolution=resolution
    )


def _modern(variational: bool, bottleneck: Bottleneck) -> config_lib.ExperimentConfig:
    """A Wasserstein critic with the correct penalty, in the step of the autoencoder.

    At 96x96 a critic of slope 1 with the weight 10 pulls a tenth as hard as the summed
    absolute error.
    """
    return _adversarial.modern(
        "anovaegan",
        anovaegan.AnoVaeGanConfig(
            variational=variational,
            bottleneck=bottleneck,
            network=_network(bottleneck),
            joint=True,
            adversarial_weight=10.0,
            precision=base.Precision.BFLOAT16,
            ema_decay=0.999,
            critic=CriticConfig(optimizer=_adversarial.scheduled(2e-4)),
            optimizer=_adversarial.scheduled(5e-4),
        ),
    )


def _cpu(variational: bool, bottleneck: Bottleneck) -> config_lib.ExperimentConfig:
    """Two cores, some 5 minutes at 96x96: one step of the critic per batch."""
    config = _modern(variational, bottleneck)
    _adversarial.shrink(config, total_steps=400)
    return config


def _baur2020(variational: bool, bottleneck: Bottleneck) -> config_lib.ExperimentConfig:
    """The released settings, faults included."""
    method = anovaegan.AnoVaeGanConfig(
        variational=variational,
        bottleneck=bottleneck,
        network=_network(bottleneck, 8),
        compat=Compat.DENNER,
        residual=residuals.Residual.POSITIVE,
        sample_at_test=True,
    )
    return _adversarial.published("anovaegan", method, batch_size=128)


def _baur2018(variational: bool, bottleneck: Bottleneck) -> config_lib.ExperimentConfig:
    """A reconstruction, not the authors' settings: their layer tables are unknown.

    The blocks of the later study with a 16x16 map; a critic of whole images trained
    by the log loss; reconstruction and KL terms divided by the pixels.
    """
    optimizer = optim.OptimizerConfig(learning_rate=1e-4, b1=0.5, b2=0.999)
    method = anovaegan.AnoVaeGanConfig(
        variational=variational,
        bottleneck=bottleneck,
        network=_network(bottleneck, 16),
        critic=CriticConfig(adversary=Adversary.LOG_LOSS, steps=1, optimizer=optimizer),
        optimizer=dataclasses.replace(optimizer),
        patch_critic=False,
        joint=True,
        reduction=losses.Reduction.MEAN,
        adversarial_weight=1e-2,
        residual=residuals.Residual.POSITIVE,
    )
    return _adversarial.published("anovaegan", method, batch_size=8)
