"""What the experiments of the adversarial methods share."""

from collections.abc import Collection
from typing import Any

from uad_jax import config as config_lib
from uad_jax import optim
from uad_jax.adversarial_config import adam
from uad_jax.methods import base

# The budget of configs/autoencoder.py.
REFERENCE_SLICES = 614_400


def one_word(words: Collection[str], known: str) -> str:
    """The only word, or "".

    Raises:
      ValueError: If there are several.
    """
    if len(words) > 1:
        raise ValueError(f"Config argument: use only one of {known}.")
    return next(iter(words), "")


def scheduled(learning_rate: float, warmup_steps: int = 200) -> optim.OptimizerConfig:
    """Adam with a warm-up and a cosine decay."""
    optimizer = adam(learning_rate)
    optimizer.schedule = optim.Schedule.COSINE
    optimizer.warmup_steps = warmup_steps
    return optimizer


def modern(name: str, method: base.MethodConfig) -> config_lib.ExperimentConfig:
    """A run on an accelerator."""
    return config_lib.ExperimentConfig(
        name=name,
        method=method,
        train=config_lib.TrainConfig(
            steps_per_call=10, log_every=100, eval_every=1000, save_every=1000
        ),
        evaluation=config_lib.EvaluationConfig(batch_size=8),
        batch_size=128,
        total_steps=20_000,
        reference_slices=REFERENCE_SLICES,
    )


def published(
    name: str, method: base.MethodConfig, batch_size: int, patience: int = 5
) -> config_lib.ExperimentConfig:
    """A run with released settings.

    The code stops after 5 epochs without a better validation loss and evaluates the
    last weights; here the run has a fixed length with the patience in validations.
    """
    return config_lib.ExperimentConfig(
        name=name,
        method=method,
        train=config_lib.TrainConfig(
            eval_every=1000, save_every=1000, patience=patience
        ),
        batch_size=batch_size,
        total_steps=100_000,
    )


def shrink(
    config: config_lib.ExperimentConfig, total_steps: int, critic_steps: int = 1
) -> None:
    """Makes a modern run one for two cores, some 5 minutes at 96x96."""
    method: Any = config.method
    method.precision = base.Precision.FLOAT32
    method.ema_decay = 0.99
    warmup_steps = total_steps // 20
    method.optimizer = scheduled(1e-3, warmup_steps)
    if hasattr(method, "critic"):
        method.critic.steps = critic_steps
        method.critic.optimizer = scheduled(1e-3, warmup_steps)
    every = total_steps // 10
    config.train = config_lib.TrainConfig(
        log_every=20, eval_every=every, save_every=every
    )
    config.evaluation = config_lib.EvaluationConfig()
    config.batch_size = 16
    config.total_steps = total_steps
