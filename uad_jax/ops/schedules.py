"""Noise schedules of diffusion models.

Steps are zero-based: t in [0, T) names the image x_t with signal share abar_t.

Sources: Ho et al. 2020, "Denoising diffusion probabilistic models" (linear); Nichol
and Dhariwal 2021, "Improved denoising diffusion probabilistic models" (cosine).
"""

import dataclasses

import jax
import numpy as np

from uad_jax.types import Array

_MAX_BETA = 0.999


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """A noise schedule of T steps; all arrays [T] float32, made in float64.

    Attributes:
      beta: Variance added by step t.
      abar: Product of 1 - beta up to and with step t: the share of the signal.
      one_minus_abar: 1 - abar, not rounded where abar is nearly 1.
      log_abar: Natural logarithm of abar, for ratios of neighbours.
    """

    beta: Array | np.ndarray
    abar: Array | np.ndarray
    one_minus_abar: Array | np.ndarray
    log_abar: Array | np.ndarray

    @property
    def num_steps(self) -> int:
        """Number of steps T."""
        return self.beta.shape[0]


def from_betas(beta: np.ndarray) -> Schedule:
    """Makes a schedule of any betas, [T] float64 in (0, 1)."""
    beta = np.asarray(beta, np.float64)
    if beta.ndim != 1 or not beta.size or beta.min() <= 0 or beta.max() >= 1:
        raise ValueError(
            f"Expected a list of betas in (0, 1), found shape {beta.shape}"
            + (f" from {beta.min():g} to {beta.max():g}." if beta.size else ".")
        )
    log_abar = np.cumsum(np.log1p(-beta))
    return Schedule(
        beta=beta.astype(np.float32),
        abar=np.exp(log_abar).astype(np.float32),
        one_minus_abar=(-np.expm1(log_abar)).astype(np.float32),
        log_abar=log_abar.astype(np.float32),
    )


def cosine(num_steps: int = 1000, offset: float = 0.008) -> Schedule:
    """The cosine schedule, betas clipped at 0.999 (Nichol and Dhariwal, eq. 17)."""
    _check_length(num_steps)
    position = np.arange(num_steps + 1) / num_steps
    signal = np.cos((position + offset) / (1 + offset) * np.pi / 2) ** 2
    return from_betas(np.minimum(1 - signal[1:] / signal[:-1], _MAX_BETA))


def linear(num_steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Schedule:
    """Betas on a line from `first` to `last` (Ho et al.).

    The betas hold for 1000 steps; for other numbers they are scaled by
    1000 / num_steps, as usual, and clipped at 0.999.
    """
    _check_length(num_steps)
    beta = np.linspace(first, last, num_steps) * (1000 / num_steps)
    return from_betas(np.minimum(beta, _MAX_BETA))


def check_t(name: str, t: int, num_steps: int) -> None:
    """Raises ValueError if t is no step of a schedule of `num_steps` (host only)."""
    if not 0 <= t < num_steps:
        raise ValueError(
            f"{name} is {t}, but the schedule has T = {num_steps} steps, counted from "
            f"0. Use a t from 0 to {num_steps - 1}."
        )


def _check_length(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"The schedule has {num_steps} steps; use 1 or more.")
