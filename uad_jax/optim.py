"""Optimisers and learning-rate schedules."""

import dataclasses
import enum

import jax.numpy as jnp
import optax

from uad_jax.types import Array


class Schedule(enum.Enum):
    """Shape of the learning rate over the run, after the warm-up."""

    CONSTANT = "constant"
    COSINE = "cosine"
    LINEAR = "linear"
    COSINE_PERIODIC = "cosine_periodic"  # down, up again, and so on


@dataclasses.dataclass
class OptimizerConfig:
    """Adam(W) with clipping, warm-up and decay.

    Float fields may be traced scalars. A traced `clip_norm`, `l2` or `weight_decay` is
    never "off", whatever its value. The order is clipping, `l2`, moments,
    `weight_decay`, learning rate.

    Attributes:
      learning_rate: Peak learning rate.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      weight_decay: Decoupled weight decay (AdamW); 0 = none.
      l2: Coupled decay: this times the parameter is added to the clipped gradient
        and enters the moments (`weight_decay` of PyTorch's Adam); 0 = none.
      clip_norm: Global gradient norm limit; 0 = none.
      amsgrad: Divide by the largest second moment so far, as PyTorch does: the
        maximum is taken of the raw moment and corrected for its bias afterwards.
        (optax by itself takes the maximum of the corrected moment, so that the noisy
        first gradients may damp the whole run.)
      schedule: Shape after the warm-up.
      warmup_steps: Linear warm-up from 0.
      end_factor: Lowest learning rate as a share of the peak (not for CONSTANT).
      half_period: COSINE_PERIODIC: steps from the peak to the lowest rate, and back;
        0 = the run after the warm-up, which is COSINE.
    """

    learning_rate: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    l2: float = 0.0
    clip_norm: float = 0.0
    amsgrad: bool = False
    schedule: Schedule = Schedule.CONSTANT
    warmup_steps: int = 0
    end_factor: float = 0.0
    half_period: int = 0

    def validate(self) -> None:
        """Raises ValueError for values that cannot train."""
        if not self.learning_rate > 0:
            raise ValueError(
                f"learning_rate is {self.learning_rate}; it must be above 0."
            )
        for name in (
            "weight_decay",
            "l2",
            "clip_norm",
            "warmup_steps",
            "end_factor",
            "half_period",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; use 0 or more.")

    def make(self, total_steps: int | Array) -> optax.GradientTransformation:
        """Builds the transformation for a run of `total_steps` steps."""
        parts = []
        if not _is_off(self.clip_norm):
            parts.append(optax.clip_by_global_norm(self.clip_norm))
        if not _is_off(self.l2):
            parts.append(optax.add_decayed_weights(self.l2))
        parts += self._moments()
        if not _is_off(self.weight_decay):
            parts.append(optax.add_decayed_weights(self.weight_decay))
        parts.append(optax.scale_by_learning_rate(self._learning_rate(total_steps)))
        return optax.chain(*parts)

    def _moments(self) -> list[optax.GradientTransformation]:
        rates = {"b1": self.b1, "b2": self.b2, "eps": self.eps}
        if not self.amsgrad:
            return [optax.scale_by_adam(**rates)]

        def correction(step: Array) -> Array:
            return jnp.sqrt(1.0 - self.b2 ** (step + 1.0))

        return [
            optax.scale_by_amsgrad(**rates, bias_correction_nu=False),
            optax.scale_by_schedule(correction),
        ]

    def _learning_rate(self, total_steps: int | Array) -> optax.Schedule:
        def rate(step: Array) -> Array:
            decay_steps = jnp.maximum(total_steps - self.warmup_steps, 1)
            warmup = 1.0
            if self.warmup_steps:
                warmup = optax.linear_schedule(0.0, 1.0, self.warmup_steps)(step)
            after = jnp.maximum(step - self.warmup_steps, 0)
            progress = jnp.minimum(after / decay_steps, 1.0)
            shape = jnp.ones_like(progress)
            if self.schedule is Schedule.COSINE:
                shape = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
            elif self.schedule is Schedule.COSINE_PERIODIC:
                phase = jnp.pi * after / (self.half_period or decay_steps)
                shape = 0.5 * (1.0 + jnp.cos(phase))
            elif self.schedule is Schedule.LINEAR:
                shape = 1.0 - progress
            shape = self.end_factor + (1.0 - self.end_factor) * shape
            return self.learning_rate * warmup * shape

        return rate


def _is_off(value: float | Array) -> bool:
    return isinstance(value, float | int) and value == 0
