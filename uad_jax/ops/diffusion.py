"""Gaussian diffusion: noising, conversions, reverse steps, chains.

Steps are zero-based: t in [0, T) names the image x_t with signal share abar_t, and
t = -1 the clean image x0. Nothing here knows a network: a denoiser is any function
`(xt [N, H, W, C], t [N]) -> prediction [N, H, W, C]`.

Sources: Ho et al. 2020, "Denoising diffusion probabilistic models" (DDPM); Song et al.
2021, "Denoising diffusion implicit models" (DDIM); Salimans and Ho 2022, "Progressive
distillation for fast sampling of diffusion models" (v).
"""

import enum
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uad_jax.ops import schedules
from uad_jax.types import Array, Key

Denoiser = Callable[[Array, Array], Array]  # (xt [N, H, W, C], t [N]) -> [N, H, W, C]
NoiseFn = Callable[[Key, Array], Array]  # (keys [N] or [], t [N]) -> [N, H, W, C]


class Prediction(enum.Enum):
    """What a denoiser predicts."""

    X0 = "x0"
    EPS = "eps"
    V = "v"


class Sampler(enum.Enum):
    """How a chain takes one step back."""

    DDPM = "ddpm"  # ancestral, variance of the posterior q(x_s | x_t, x0)
    DDPM_BETA = "ddpm_beta"  # ancestral, variance beta (AnoDDPM)
    DDIM = "ddim"  # eta between 0 (deterministic) and 1 (equals DDPM)


class Chain(NamedTuple):
    """How to come from noised images to clean ones.

    Attributes:
      schedule: Noise schedule.
      kind: What the denoiser predicts.
      steps: Falling steps, [S] int32, as from `chain_steps`; may be traced.
      sampler: How to take a step.
      eta: Randomness of DDIM in [0, 1]; other samplers ignore it.
      clip: Limits every estimate of x0 to [-clip, clip], and eps follows it; None =
        no limit.
    """

    schedule: schedules.Schedule
    kind: Prediction
    steps: Array | np.ndarray
    sampler: Sampler = Sampler.DDPM
    eta: float | Array = 0.0
    clip: float | None = None


def q_sample(schedule: schedules.Schedule, x0: Array, t: Array, eps: Array) -> Array:
    """Noises images to diffusion step t in closed form.

    Args:
      schedule: Noise schedule with T steps.
      x0: Images, [N, H, W, C] float32 in [-1, 1].
      t: Zero-based steps in [0, T), [N] int32.
      eps: Noise of the shape of x0.

    Returns:
      sqrt(abar_t) * x0 + sqrt(1 - abar_t) * eps, [N, H, W, C] float32.

    Raises:
      ValueError: If a step whose value is known (outside `jit`) is out of range.

    Source: Ho et al. 2020, eq. 4.
    """
    _check_steps("A diffusion step", t, schedule.num_steps)
    signal, noise = _shares(schedule, t, x0.ndim)
    return signal * x0 + noise * eps


def from_x0(
    schedule: schedules.Schedule, kind: Prediction, x0: Array, xt: Array, t: Array
) -> Array:
    """Expresses the pair (x0, xt) as the quantity that a denoiser predicts.

    Training targets are `from_x0(schedule, kind, x0, q_sample(...), t)`, or `eps`
    itself for EPS, which this recovers to rounding only.

    Args:
      schedule: Noise schedule.
      kind: The quantity.
      x0: Clean images, [N, H, W, C].
      xt: Noised images, [N, H, W, C].
      t: Steps, [N].

    Returns:
      x0, eps = (xt - sqrt(abar) x0) / sqrt(1 - abar), or v = sqrt(abar) eps -
      sqrt(1 - abar) x0, [N, H, W, C].
    """
    if kind is Prediction.X0:
        return x0
    signal, noise = _shares(schedule, t, x0.ndim)
    eps = (xt - signal * x0) / noise
    return eps if kind is Prediction.EPS else signal * eps - noise * x0


def to_x0(
    schedule: schedules.Schedule,
    kind: Prediction,
    prediction: Array,
    xt: Array,
    t: Array,
    clip: float | None = None,
) -> Array:
    """Reads the clean image off a prediction.

    Args:
      schedule: Noise schedule.
      kind: What was predicted.
      prediction: Output of the denoiser, [N, H, W, C] float.
      xt: Its input, [N, H, W, C] float32.
      t: Its steps, [N].
      clip: Limits the image to [-clip, clip]; None = no limit. For eps the division
        by sqrt(abar) amplifies errors without bound as abar goes to 0.

    Returns:
      x0, [N, H, W, C] float32.
    """
    x0 = prediction.astype(jnp.float32)
    if kind is not Prediction.X0:
        signal, noise = _shares(schedule, t, xt.ndim)
        if kind is Prediction.EPS:
            x0 = (xt - noise * x0) / signal
        else:
            x0 = signal * xt - noise * x0
    return x0 if clip is None else jnp.clip(x0, -clip, clip)


def denoise_once(
    denoise: Denoiser,
    schedule: schedules.Schedule,
    kind: Prediction,
    x0: Array,
    t: Array,
    eps: Array,
    clip: float | None = None,
) -> Array:
    """Noises images to step t and reconstructs them by one call of the denoiser.

    Args:
      denoise: (xt [N, H, W, C], t [N]) -> prediction.
      schedule: Noise schedule.
      kind: What the denoiser predicts.
      x0: Images, [N, H, W, C] float32.
      t: Steps, [N] int32.
      eps: Noise of the shape of x0.
      clip: Limits the reconstruction to [-clip, clip].

    Returns:
      Estimate of x0, [N, H, W, C] float32.
    """
    xt = q_sample(schedule, x0, t, eps)
    return to_x0(schedule, kind, denoise(xt, t), xt, t, clip)


def posterior(
    schedule: schedules.Schedule, x0: Array, xt: Array, t: Array, s: Array
) -> tuple[Array, Array]:
    """Mean and variance of q(x_s | x_t, x0) for s < t, neighbours or not.

    Args:
      schedule: Noise schedule.
      x0: Clean images, [N, H, W, C] float32.
      xt: Images at step t, [N, H, W, C] float32.
      t: Steps, [N] int32.
      s: Earlier steps, [N] int32; -1 is the clean image.

    Returns:
      The mean, [N, H, W, C], and the variance, [N].

    Source: Ho et al. 2020, eq. 6 and 7, for s = t - 1.
    """
    ratio, beta = _between(schedule, t, s)
    abar_s, noise_s = _at(schedule.abar, s, 1.0), _at(schedule.one_minus_abar, s, 0.0)
    noise_t = _at(schedule.one_minus_abar, t, 0.0)
    of_x0 = _rows(jnp.sqrt(abar_s) * beta / noise_t, x0.ndim)
    of_xt = _rows(jnp.sqrt(ratio) * noise_s / noise_t, x0.ndim)
    return of_x0 * x0 + of_xt * xt, noise_s / noise_t * beta


def ddpm_step(
    schedule: schedules.Schedule,
    x0: Array,
    xt: Array,
    t: Array,
    s: Array,
    noise: Array,
    posterior_variance: bool = True,
) -> Array:
    """Ancestral step from t to s.

    Args:
      schedule: Noise schedule.
      x0: Estimate of the clean images, [N, H, W, C] float32.
      xt: Images at step t, [N, H, W, C] float32.
      t: Steps, [N] int32.
      s: Earlier steps, [N] int32; -1 returns the mean, which is x0.
      noise: Noise of the shape of x0.
      posterior_variance: The variance of the posterior; False takes beta, the larger
        choice of Ho et al., as AnoDDPM does.

    Returns:
      Images at step s, [N, H, W, C] float32.
    """
    mean, variance = posterior(schedule, x0, xt, t, s)
    if not posterior_variance:
        variance = jnp.where(s < 0, 0.0, _between(schedule, t, s)[1])
    return mean + _rows(jnp.sqrt(variance), x0.ndim) * noise


def ddim_step(
    schedule: schedules.Schedule,
    x0: Array,
    eps: Array,
    t: Array,
    s: Array,
    noise: Array,
    eta: float | Array,
) -> Array:
    """DDIM step from t to s.

    Args:
      schedule: Noise schedule.
      x0: Estimate of the clean images, [N, H, W, C] float32.
      eps: Estimate of the noise, [N, H, W, C] float32.
      t: Steps, [N] int32.
      s: Earlier steps, [N] int32; -1 returns x0.
      noise: Noise of the shape of x0; for eta = 0 a [] zero will do.
      eta: From 0, deterministic, to 1, the ancestral step.

    Returns:
      Images at step s, [N, H, W, C] float32.

    Source: Song et al. 2021, eq. 12 and 16.
    """
    ratio, beta = _between(schedule, t, s)
    abar_s, noise_s = _at(schedule.abar, s, 1.0), _at(schedule.one_minus_abar, s, 0.0)
    noise_t = _at(schedule.one_minus_abar, t, 0.0)
    # The variance that is left for eps, 1 - abar_s - sigma^2, without cancellation:
    # beta / noise_t and ratio * noise_s / noise_t add up to 1.
    left = noise_s * ((1.0 - eta**2) + eta**2 * ratio * noise_s / noise_t)
    xs = _rows(jnp.sqrt(abar_s), x0.ndim) * x0 + _rows(jnp.sqrt(left), x0.ndim) * eps
    sigma = eta * jnp.sqrt(noise_s * beta / noise_t)
    return xs + _rows(sigma, x0.ndim) * noise


def chain_steps(start: int, num_calls: int | None = None) -> np.ndarray:
    """Lists the steps of a chain, evenly spread from `start` down to 0.

    Args:
      start: First step, >= 0: T - 1 for samples from noise; 249 for "noise to
        t = 250 and denoise back".
      num_calls: Calls of the denoiser; None = start + 1, every step. One call starts
        at `start` and goes straight to the clean image.

    Returns:
      Falling steps, [num_calls] int32.

    Raises:
      ValueError: If there are fewer steps than calls.
    """
    num_calls = start + 1 if num_calls is None else num_calls
    if start < 0 or not 1 <= num_calls <= start + 1:
        raise ValueError(
            f"A chain from t = {start} cannot make {num_calls} calls of the denoiser. "
            f"Use a start of 0 or more and 1 to start + 1 = {start + 1} calls."
        )
    return np.rint(np.linspace(start, 0, num_calls)).astype(np.int32)


def sample(
    denoise: Denoiser,
    chain: Chain,
    x_start: Array,
    keys: Key | None = None,
    noise: NoiseFn | None = None,
) -> Array:
    """Runs a reverse chain from noised images to clean ones.

    The chain is one `lax.scan`: one trace of the denoiser and memory that does not
    depend on the number of steps.

    Args:
      denoise: (xt [N, H, W, C], t [N] int32) -> prediction [N, H, W, C].
      chain: The chain.
      x_start: Images at step chain.steps[0], [N, H, W, C]: pure noise for T - 1, or
        `q_sample` of an image.
      keys: [N] keys, one per sample, or one [] key whose noise all samples share.
        Step t uses the key folded with t. Not needed for DDIM with eta = 0.
      noise: Makes the noise of a step, `(keys, t [N]) -> [N, H, W, C]`, like those of
        `noise.make`. Not needed for DDIM with eta = 0.

    Returns:
      Clean images, [N, H, W, C] float32.

    Raises:
      ValueError: If a random chain has no keys or no noise, or for steps or an eta
        that are out of range (unless they are traced).
    """
    _check_chain(chain)
    schedule, kind, ddim = chain.schedule, chain.kind, chain.sampler is Sampler.DDIM
    if (keys is None or noise is None) and not (ddim and _is_zero(chain.eta)):
        raise ValueError(
            f"The chain ({chain.sampler.value}, eta = {chain.eta}) is random. Pass "
            "keys and noise, or use DDIM with eta = 0."
        )

    def draw(t: Array) -> Array:
        if keys is None or noise is None or (ddim and _is_zero(chain.eta)):
            return jnp.zeros((), jnp.float32)
        return noise(fold_in(keys, t[0]), t).astype(jnp.float32)

    def one(xt: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        t, s = (jnp.broadcast_to(step, xt.shape[:1]) for step in pair)
        prediction = denoise(xt, t)
        x0 = to_x0(schedule, kind, prediction, xt, t, chain.clip)
        if not ddim:
            small = chain.sampler is Sampler.DDPM
            return ddpm_step(schedule, x0, xt, t, s, draw(t), small), None
        if kind is Prediction.EPS and chain.clip is None:
            eps = prediction.astype(jnp.float32)
        else:
            eps = from_x0(schedule, Prediction.EPS, x0, xt, t)
        return ddim_step(schedule, x0, eps, t, s, draw(t), chain.eta), None

    steps = jnp.asarray(chain.steps, jnp.int32)
    following = jnp.concatenate([steps[1:], jnp.full((1,), -1, jnp.int32)])
    clean, _ = jax.lax.scan(one, x_start.astype(jnp.float32), (steps, following))
    return clean


def restore(
    denoise: Denoiser, chain: Chain, x0: Array, keys: Key, noise: NoiseFn
) -> Array:
    """Noises images to the first step of a chain and denoises them back.

    Args:
      denoise: (xt [N, H, W, C], t [N] int32) -> prediction [N, H, W, C].
      chain: The chain; AnoDDPM's starts at step 249 and makes 250 calls.
      x0: Images, [N, H, W, C] float32 in [-1, 1].
      keys: Like that of `sample`; also keys the noise that is added first.
      noise: Like that of `sample`.

    Returns:
      Restored images, [N, H, W, C] float32.

    Source: Wyatt et al. 2022, "AnoDDPM".
    """
    start = jnp.broadcast_to(jnp.asarray(chain.steps, jnp.int32)[0], x0.shape[:1])
    # Steps of a chain lie below T, so nothing else uses this key.
    eps = noise(fold_in(keys, chain.schedule.num_steps), start)
    xt = q_sample(chain.schedule, x0, start, eps)
    return sample(denoise, chain, xt, keys, noise)


def fold_in(keys: Key, data: int | Array) -> Key:
    """Folds one number into one [] key or each of [N] keys."""
    if keys.ndim == 0:
        return jax.random.fold_in(keys, data)
    return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)


def _is_zero(eta: float | Array) -> bool:
    return isinstance(eta, float | int) and eta == 0


def _check_chain(chain: Chain) -> None:
    if isinstance(chain.eta, float | int) and not 0 <= chain.eta <= 1:
        raise ValueError(f"eta is {chain.eta}; it must lie in [0, 1].")
    _check_steps("A step of the chain", chain.steps, chain.schedule.num_steps)
    if isinstance(chain.steps, jax.core.Tracer):
        return
    steps = np.asarray(chain.steps)
    if (np.diff(steps) >= 0).any():
        raise ValueError(f"The steps of a chain must fall, found {steps.tolist()}.")


def _check_steps(name: str, t: Array | np.ndarray, num_steps: int) -> None:
    if not isinstance(t, jax.core.Tracer) and np.size(t):
        for step in (np.max(t), np.min(t)):
            schedules.check_t(name, int(step), num_steps)


def _between(schedule: schedules.Schedule, t: Array, s: Array) -> tuple[Array, Array]:
    """abar_t / abar_s and 1 minus it: share of the signal and noise since step s."""
    log = _at(schedule.log_abar, t, 0.0) - _at(schedule.log_abar, s, 0.0)
    return jnp.exp(log), -jnp.expm1(log)


def _shares(schedule: schedules.Schedule, t: Array, ndim: int) -> tuple[Array, Array]:
    """sqrt(abar) and sqrt(1 - abar), shaped to multiply images."""
    signal = jnp.sqrt(_at(schedule.abar, t, 1.0))
    noise = jnp.sqrt(_at(schedule.one_minus_abar, t, 0.0))
    return _rows(signal, ndim), _rows(noise, ndim)


def _at(values: Array | np.ndarray, t: Array, clean: float) -> Array:
    """Entries of a schedule; `clean` for t = -1."""
    return jnp.where(t < 0, clean, jnp.asarray(values)[jnp.maximum(t, 0)])


def _rows(values: Array, ndim: int) -> Array:
    return values.reshape(values.shape + (1,) * (ndim - values.ndim))
