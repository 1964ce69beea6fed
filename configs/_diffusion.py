"""The three sizes of the diffusion experiments and what they share."""

import enum
from typing import Any

from uad_jax import config as config_lib
from uad_jax import denoising_config, optim
from uad_jax.data import config as data_config
from uad_jax.methods import base

# 1600 epochs of 12 batches of 32 slices: the budget of DDPM and pDDPM.
REFERENCE_SLICES = 614_400
# 1200 such epochs: the budget of cDDPM and of its pretraining.
CONDITIONED_SLICES = 460_800


class Size(enum.Enum):
    """How much is trained, and where."""

    MODERN = ""  # one accelerator, our settings
    PAPER = "paper"  # one accelerator, the published settings
    CPU = "cpu"  # two cores, minutes


def size(words: frozenset[str]) -> Size:
    """Reads the size off the words of the config argument."""
    if words >= {"paper", "cpu"}:
        raise ValueError("Config argument: use only one of 'paper' and 'cpu'.")
    return next((size for size in Size if size.value in words), Size.MODERN)


def training(size: Size) -> dict[str, Any]:
    """The method's fields that say how it trains."""
    if size is Size.PAPER:
        return {"optimizer": optim.OptimizerConfig(learning_rate=1e-4)}
    if size is Size.CPU:
        return {
            "unet": denoising_config.UNetConfig(
                width=16, multipliers=(1, 1, 2, 4), num_blocks=0, head_size=32
            ),
            "ema_decay": 0.98,
            "optimizer": optim.OptimizerConfig(
                learning_rate=2e-3,
                schedule=optim.Schedule.COSINE,
                warmup_steps=20,
                clip_norm=1.0,
            ),
        }
    return {
        "precision": base.Precision.BFLOAT16,
        "ema_decay": 0.999,
        "optimizer": optim.OptimizerConfig(
            learning_rate=2e-4,
            schedule=optim.Schedule.COSINE,
            warmup_steps=200,
            clip_norm=1.0,
        ),
    }


def scoring(size: Size, **settings: Any) -> denoising_config.ScoringConfig:
    """How volumes are scored; on two cores a few slices at a time."""
    chunk = 8 if size is Size.CPU else 0
    return denoising_config.ScoringConfig(chunk=chunk, **settings)


def backbone(size: Size) -> dict[str, Any]:
    """Sizes of the ResNet that SparK pretrains for cDDPM."""
    if size is Size.CPU:
        return {"stage_sizes": (1, 1, 1, 1), "width": 16}
    return {}


def experiment(
    name: str,
    method: base.MethodConfig,
    size: Size,
    volumes: int,
    reference_slices: int = REFERENCE_SLICES,
) -> config_lib.ExperimentConfig:
    """Puts an experiment together.

    Args:
      name: Its name, to which the size is added.
      method: The method.
      size: How much is trained.
      volumes: Volumes that an accelerator scores at once.
      reference_slices: The published budget, which an accelerator trains for.
    """
    train = config_lib.TrainConfig(
        steps_per_call=10, log_every=40, eval_every=480, save_every=480
    )
    batch_size = 128
    data = data_config.DataConfig()
    if size is Size.PAPER:
        train = config_lib.TrainConfig(
            steps_per_call=12, log_every=120, eval_every=240, save_every=960
        )
        batch_size = 32
        data.sampling = data_config.Sampling.ONE_PER_VOLUME
    elif size is Size.CPU:
        train = config_lib.TrainConfig(
            log_every=20, eval_every=100, save_every=100, validation_slices=128
        )
        batch_size = 16
    steps = reference_slices // batch_size
    return config_lib.ExperimentConfig(
        name="_".join(filter(None, (name, size.value))),
        method=method,
        data=data,
        train=train,
        evaluation=config_lib.EvaluationConfig(
            batch_size=2 if size is Size.CPU else volumes
        ),
        batch_size=batch_size,
        total_steps=400 if size is Size.CPU else steps - steps % train.steps_per_call,
        reference_slices=reference_slices,
    )
