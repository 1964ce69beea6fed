"""f-AnoGAN in two stages: a GAN of healthy slices, then an encoder of its codes.

Paper:     Schlegl et al. 2019, "f-AnoGAN: fast unsupervised anomaly detection with
           generative adversarial networks", in the form of Baur et al. 2021,
           "Autoencoders for unsupervised anomaly segmentation in brain MR images: a
           comparative study" (arXiv 2004.03271)
Command:   python run.py train --config=configs/fanogan.py:stage=gan,WORD \
             --config.data.store=STORE --workdir=GAN
           python run.py train --config=configs/fanogan.py:stage=encoder,gan=GAN,WORD \
             --config.data.store=STORE --workdir=DIR
           WORD, the same in both: `paper` for the settings of the study's released
           code, its gradient penalty included (slices of 128x128), `cpu` for two
           cores, none for an accelerator. The second run starts from the first one's
           best checkpoint.
Hardware:  one accelerator; `cpu`: two cores
Time:      accelerator: not yet measured; `cpu`: 300 of its 400 steps took 10 minutes
           (stage gan) and 5 (stage encoder) on one core with other work
Expected:  stage gan: a falling validation loss, the energy distance of made and real
           slices; there is nothing to evaluate. Stage encoder, `cpu`, 300 steps:
           docs/results_synthetic.md
"""

import enum
from typing import Any

from configs import _adversarial, _parts
from uad_jax import config as config_lib
from uad_jax.adversarial_config import CriticConfig, NetworkConfig, adam
from uad_jax.compat import Compat
from uad_jax.methods import base, fanogan
from uad_jax.ops import residuals


class Stage(enum.Enum):
    """Which of the two runs."""

    GAN = "gan"
    ENCODER = "encoder"


def get_config(arg: str = "") -> config_lib.ExperimentConfig:
    """Builds the experiment; `arg` as described above."""
    given = _parts.parse(arg, ("paper", "cpu"), {"stage": Stage, "gan": str})
    stage = given.values.get("stage", Stage.GAN)
    word = _adversarial.one_word(given.words, "'paper' and 'cpu'")
    if (stage is Stage.ENCODER) != ("gan" in given.values):
        raise ValueError(
            "Config argument: stage=encoder needs gan=WORKDIR, the run of stage=gan "
            "whose generator it uses, and stage=gan takes none."
        )
    config = _paper(stage) if word == "paper" else _modern(stage)
    if word == "cpu":
        _adversarial.shrink(config, total_steps=400)
        config.name += "_cpu"
    if stage is Stage.ENCODER:
        config.train.warm_start += [
            config_lib.WarmStart(
                workdir=given.values["gan"],
                source_prefix=network,
                target_prefix=network,
            )
            for network in ("generator", "critic")
        ]
    return config


def _modern(stage: Stage) -> config_lib.ExperimentConfig:
    """The correct penalty, averaged weights, a longer schedule."""
    shared: dict[str, Any] = {
        "precision": base.Precision.BFLOAT16,
        "ema_decay": 0.999,
        "optimizer": _adversarial.scheduled(2e-4 if stage is Stage.GAN else 5e-4),
    }
    method: base.MethodConfig = fanogan.EncoderConfig(**shared)
    if stage is Stage.GAN:
        critic = CriticConfig(optimizer=_adversarial.scheduled(2e-4))
        method = fanogan.GanConfig(critic=critic, **shared)
    return _adversarial.modern(f"fanogan_{stage.value}", method)


def _paper(stage: Stage) -> config_lib.ExperimentConfig:
    """The settings of the released script; both stages are equally long there."""
    network = NetworkConfig(intermediate_resolution=16)
    method: base.MethodConfig = fanogan.EncoderConfig(
        network=network,
        residual=residuals.Residual.POSITIVE,
        optimizer=adam(1e-3),
    )
    if stage is Stage.GAN:
        method = fanogan.GanConfig(
            network=network,
            critic=CriticConfig(optimizer=adam(1e-3)),
            compat=Compat.DENNER,
            optimizer=adam(1e-3),
        )
    return _adversarial.published(
        f"fanogan_{stage.value}_paper",
        method,
        batch_size=8,
        patience=5 if stage is Stage.ENCODER else 0,
    )
