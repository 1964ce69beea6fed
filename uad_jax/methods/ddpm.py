"""Denoising diffusion model: noise a slice, denoise it, compare.

Sources: Ho et al. 2020, "Denoising diffusion probabilistic models"; the one-step form
with simplex noise is the baseline of Behrendt et al. 2023, "Patched diffusion models
for unsupervised anomaly detection in brain MRI"; noising and the full way back are
Wyatt et al. 2022, "AnoDDPM".

Deviations: noise is drawn per slice, not once per batch (`process.shared_noise`);
further ones stand in docs/diffusion.md.
"""

import dataclasses
import enum

import jax
import jax.numpy as jnp
import numpy as np

from uad_jax import denoising, denoising_config, noising, optim
from uad_jax.methods import base
from uad_jax.ops import augment as augment_lib
from uad_jax.ops import diffusion
from uad_jax.types import Array, Batch, Key, ModelState, Scalars, Tree


class Way(enum.Enum):
    """How a noised image becomes a clean one."""

    ONE_STEP = "one_step"  # one call of the denoiser
    CHAIN = "chain"  # the reverse chain from the test step down to 0


@dataclasses.dataclass
class DdpmConfig:
    """A denoising diffusion model.

    Attributes:
      unet: The denoiser.
      process: How images are noised, and what the denoiser learns.
      scoring: How volumes are scored.
      way: How a noised image becomes a clean one.
      sampler: CHAIN: how it takes a step.
      chain_calls: CHAIN: calls of the denoiser, spread evenly; 0 = every step.
      eta: CHAIN: randomness of DDIM, from 0 to 1.
      clip: Limit estimates of the clean image to its range [0, 1].
      augment: How training slices are changed at random; not at all by default.
      precision: Type of the network's computation.
      accumulate_steps: Micro-batches per optimiser step.
      ema_decay: Decay of the averaged parameters; 0 = none.
      optimizer: The optimiser.
    """

    unet: denoising_config.UNetConfig = dataclasses.field(
        default_factory=denoising_config.UNetConfig
    )
    process: denoising_config.ProcessConfig = dataclasses.field(
        default_factory=denoising_config.ProcessConfig
    )
    scoring: denoising_config.ScoringConfig = dataclasses.field(
        default_factory=denoising_config.ScoringConfig
    )
    way: Way = Way.ONE_STEP
    sampler: diffusion.Sampler = diffusion.Sampler.DDPM
    chain_calls: int = 0
    eta: float = 0.0
    clip: bool = False
    augment: augment_lib.AugmentConfig = dataclasses.field(
        default_factory=augment_lib.none
    )
    precision: base.Precision = base.Precision.FLOAT32
    accumulate_steps: int = 1
    ema_decay: float = 0.0
    optimizer: optim.OptimizerConfig = dataclasses.field(
        default_factory=optim.OptimizerConfig
    )

    def validate(self) -> None:
        """Raises ValueError for settings that cannot work."""
        denoising.validate(self)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; it must lie in [0, 1].")
        if self.chain_calls < 0:
            raise ValueError(f"chain_calls is {self.chain_calls}; use 0 or more.")
        if self.way is Way.CHAIN:
            for t in self.scoring.test_steps:
                diffusion.chain_steps(t, self.chain_calls or None)

    def make(self, run: base.RunShape) -> base.Method:
        """Builds the method. Float fields may be traced scalars."""
        return denoising.method(
            self,
            run,
            init_model=denoising.init_model,
            loss=loss,
            reconstruct_slices=reconstruct_slices,
            reconstruct=reconstruct,
        )


def loss(
    config: DdpmConfig,
    params: dict[str, Tree],
    collections: dict[str, Tree],
    batch: Batch,
    key: Key,
) -> tuple[Array, tuple[dict[str, Tree], Scalars]]:
    """Mean error of the prediction over all pixels, at a random step for each row.

    Args:
      config: The model.
      params: {"denoiser": ...}.
      collections: Empty; handed through.
      batch: Slices, image [B, H, W, C] float32.
      key: Key of the step.

    Returns:
      The loss [] and (collections, no scalars).
    """
    denoise = denoising.denoiser(config, params, batch.image.shape)
    value = noising.mean_error(config.process, denoise, batch, key)
    return value, (collections, {})


def reconstruct_slices(
    config: DdpmConfig, model: ModelState, image: Array, mask: Array, keys: Array
) -> Array:
    """Reconstructs slices once from each test step.

    The noise of a test step follows from the key and the step, so that an ensemble
    contains what each of its steps gives alone.

    Args:
      config: The model.
      model: Its parameters.
      image: [N, H, W, C] float32.
      mask: [N, H, W, 1] bool; not used, the evaluator masks.
      keys: One key per slice, [N].

    Returns:
      [N, E, H, W, C] float32 for E test steps.
    """
    if config.way is Way.CHAIN:
        starts = config.scoring.test_steps
        outputs = [_chain(config, model, image, keys, start) for start in starts]
        return jnp.stack(outputs, axis=1)
    steps = noising.noise_steps(config.process, config.scoring, len(image))
    return _one_step(config, model, image, keys, steps)


def reconstruct(
    config: DdpmConfig,
    model: ModelState,
    image: Array,
    mask: Array,
    key: Key,
    strength: float | Array | None = None,
) -> Array:
    """Pseudo-healthy version of slices.

    Args:
      config: The model.
      model: Its parameters.
      image: [N, H, W, C] float32.
      mask: [N, H, W, 1] bool; not used.
      key: Key of the noise, [], or one per slice [N].
      strength: Share of the schedule to noise to, in (0, 1], [] or [N] (a chain takes
        known number only, and shortens `chain_calls` to the steps there are); None =
        as in scoring, the mean over the ensemble.

    Returns:
      [N, H, W, C] float32.

    Raises:
      ValueError: If a strength that is a number is out of range.
      TypeError: If a chain is given an array.
    """
    keys = noising.image_keys(config.process, key, len(image))
    if strength is None:
        return reconstruct_slices(config, model, image, mask, keys).mean(axis=1)
    if config.way is Way.ONE_STEP:
        args = config.process, config.scoring, len(image), strength
        steps = noising.noise_steps(*args)
        return _one_step(config, model, image, keys, steps)[:, 0]
    if isinstance(strength, jax.core.Tracer) or np.ndim(strength):
        raise TypeError(
            f"strength is a {type(strength).__name__}, but the length of a chain must "
            "be known when it is compiled. Pass a number."
        )
    start = noising.strength_step(config.process, float(strength))
    return _chain(config, model, image, keys, start)


def _one_step(
    config: DdpmConfig, model: ModelState, image: Array, keys: Array, steps: Array
) -> Array:
    """Reconstructs [N, H, W, C] from steps [N, E] in one call: [N, E, H, W, C]."""
    denoise = denoising.denoiser(config, model.params, image.shape)
    return denoising.reconstruct_once(
        config.process, denoise, image, keys, steps, _limit(config)
    )


def _chain(
    config: DdpmConfig, model: ModelState, image: Array, keys: Array, start: int
) -> Array:
    """Noises [N, H, W, C] to one step and runs the chain back: [N, H, W, C]."""
    calls = min(config.chain_calls or start + 1, start + 1)
    chain = diffusion.Chain(
        schedule=config.process.make_schedule(),
        kind=config.process.prediction,
        steps=diffusion.chain_steps(start, calls),
        sampler=config.sampler,
        eta=config.eta,
        clip=_limit(config),
    )
    clean = diffusion.restore(
        denoising.denoiser(config, model.params, image.shape),
        chain,
        noising.to_signed(image),
        diffusion.fold_in(keys, start),
        config.process.make_noise(image.shape),
    )
    return noising.from_signed(clean)


def _limit(config: DdpmConfig) -> float | None:
    return 1.0 if config.clip else None
