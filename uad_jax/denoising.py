"""What the diffusion methods share: network, reconstruction, score."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from uad_jax import noising, optim
from uad_jax.denoising_config import (
    Average,
    ProcessConfig,
    ScoringConfig,
    UNetConfig,
)
from uad_jax.methods import base, lifting
from uad_jax.nn import unet
from uad_jax.ops import diffusion, residuals
from uad_jax.ops.augment import AugmentConfig
from uad_jax.types import (
    Array,
    Batch,
    Key,
    ModelState,
    Scalars,
    Scores,
    Tree,
    Volumes,
)

NETWORK = "denoiser"  # its name in the parameters
# (config, params, collections, batch, key) -> (loss, (collections, scalars))
Loss = Callable[..., tuple[Array, tuple[dict[str, Tree], Scalars]]]


class MethodConfig(Protocol):
    """The fields that the configs of all diffusion methods have."""

    unet: UNetConfig
    process: ProcessConfig
    scoring: ScoringConfig
    augment: AugmentConfig
    precision: base.Precision
    accumulate_steps: int
    ema_decay: float
    optimizer: optim.OptimizerConfig


def validate(config: MethodConfig) -> None:
    """Raises ValueError for shared settings that cannot work."""
    config.unet.validate()
    config.process.validate()
    config.scoring.validate(config.process.num_steps)
    config.augment.validate()
    config.optimizer.validate()
    base.check_training(config.accumulate_steps, config.ema_decay)


def method(
    config: MethodConfig,
    run: base.RunShape,
    *,
    init_model: Callable[..., ModelState],
    loss: Loss,
    reconstruct_slices: Callable[..., Array],
    reconstruct: Callable[..., Array],
    validation_loss: Loss | None = None,
) -> base.Method:
    """Puts a diffusion method together; its functions take the config first.

    Args:
      config: The method's config. Float fields may be traced scalars.
      run: What schedules depend on.
      init_model: (config, key, batch) -> model.
      loss: (config, params, collections, batch, key) -> (loss, (collections,
        scalars)). In training its batch is augmented.
      reconstruct_slices: (config, model, image, mask, keys) -> [N, E, H, W, C], as in
        `scorer`.
      reconstruct: (config, model, image, mask, key, strength) -> image.
      validation_loss: Like `loss`, without what belongs to training alone; None = the
        same. It gets one fixed key.
    """

    def training_loss(
        params: dict[str, Tree], collections: dict[str, Tree], batch: Batch, key: Key
    ) -> tuple[Array, tuple[dict[str, Tree], Scalars]]:
        batch = noising.augmented(config.augment, batch, key)
        return loss(config, params, collections, batch, key)

    init, update = base.single_optimizer(
        functools.partial(init_model, config),
        training_loss,
        config.optimizer.make(run.total_steps),
        ema_decay=config.ema_decay,
        accumulate_steps=config.accumulate_steps,
    )

    checked = validation_loss or loss

    def validate(model: ModelState, batch: Batch, key: Key) -> Scalars:
        found = checked(config, model.params, model.collections, batch, key)
        value, (_, scalars) = found
        return {"loss": value, **scalars}

    return base.Method(
        inputs=base.Inputs(),
        init=init,
        update=update,
        validate=validate,
        score=scorer(
            config.process,
            config.scoring,
            functools.partial(reconstruct_slices, config),
        ),
        reconstruct=functools.partial(reconstruct, config),
    )


def network(
    config: MethodConfig, shape: tuple[int, ...], conditional: bool = False
) -> unet.UNet:
    """Builds the denoiser for images [..., H, W, C]."""
    settings: dict[str, Any] = dataclasses.asdict(config.unet)
    return unet.UNet(
        out_channels=shape[-1],
        conditional=conditional,
        dtype=jnp.dtype(config.precision.value),
        **settings,
    )


def init_model(
    config: MethodConfig, key: Key, batch: Batch, condition: Array | None = None
) -> ModelState:
    """Initialises a denoiser for the batch's image shape.

    Args:
      config: The method.
      key: Key of the parameters.
      batch: Only its shapes matter.
      condition: [1, K] for a denoiser that is told a condition of K numbers.

    Raises:
      ValueError: If the network cannot halve the image often enough.
    """
    shape = batch.image.shape
    image, t = jnp.zeros((1, *shape[-3:])), jnp.zeros(1, jnp.int32)
    module = network(config, shape, conditional=condition is not None)
    variables = module.init(key, image, t, condition)
    return ModelState(params={NETWORK: variables["params"]}, collections={})


def denoiser(
    config: MethodConfig,
    params: dict[str, Tree],
    shape: tuple[int, ...],
    condition: Array | None = None,
) -> diffusion.Denoiser:
    """Binds a denoiser of images [N, H, W, C] to its parameters and a condition.

    Args:
      config: The method.
      params: {"denoiser": ...}.
      shape: Of the images.
      condition: [N, K], or None if the denoiser takes none.
    """
    module = network(config, shape, conditional=condition is not None)

    def denoise(xt: Array, t: Array) -> Any:
        return module.apply({"params": params[NETWORK]}, xt, t, condition)

    return denoise


def reconstruct_once(
    process: ProcessConfig,
    denoise: diffusion.Denoiser,
    image: Array,
    keys: Array,
    steps: Array,
    clip: float | None = None,
) -> Array:
    """Reconstructs images from all their steps in one call of the denoiser.

    Args:
      process: The diffusion process.
      denoise: The denoiser of N * E images, those of an image side by side.
      image: [N, H, W, C] float32 of about [0, 1].
      keys: [N].
      steps: [N, E] int32.
      clip: Limits estimates to [-clip, clip], where [-1, 1] is the image's range.

    Returns:
      [N, E, H, W, C] float32.
    """
    rows, t, eps = noising.for_each_step(process, image, keys, steps)
    clean = diffusion.denoise_once(
        denoise,
        process.make_schedule(),
        process.prediction,
        noising.to_signed(rows),
        t,
        eps,
        clip,
    )
    return noising.from_signed(clean).reshape(-1, steps.shape[1], *image.shape[1:])


def reconstruct_by(
    from_steps: Callable[..., Array],
) -> tuple[Callable[..., Array], Callable[..., Array]]:
    """Makes what `method` takes of one function.

    Args:
      from_steps: (config, model, image [N, H, W, C], keys [N], steps [N, E]) ->
        [N, E, H, W, C].

    Returns:
      `reconstruct_slices` (config, model, image, mask, keys): from the test steps, the
      noise of each keyed by key and step; and `reconstruct` (config, model, image,
      mask, key, strength): the pseudo-healthy image [N, H, W, C], from the share
      `strength` of the schedule, in (0, 1], [] or [N], or from the test steps, whose
      mean it is; its key is [], or one per slice [N]. It raises ValueError if a
      strength whose value is known is out of range. Neither uses the mask.
    """

    def reconstruct_slices(
        config: Any, model: ModelState, image: Array, mask: Array, keys: Array
    ) -> Array:
        steps = noising.noise_steps(config.process, config.scoring, len(image))
        return from_steps(config, model, image, keys, steps)

    def reconstruct(
        config: Any,
        model: ModelState,
        image: Array,
        mask: Array,
        key: Key,
        strength: float | Array | None = None,
    ) -> Array:
        keys = noising.image_keys(config.process, key, len(image))
        steps = noising.noise_steps(
            config.process, config.scoring, len(image), strength
        )
        return from_steps(config, model, image, keys, steps).mean(axis=1)

    return reconstruct_slices, reconstruct


def scorer(
    process: ProcessConfig,
    scoring: ScoringConfig,
    reconstruct_slices: Callable[[ModelState, Array, Array, Array], Array],
) -> Callable[[ModelState, Volumes, Key], Scores]:
    """Builds the `score` of a method.

    Args:
      process: Says whether the slices of a volume share their noise.
      scoring: How reconstructions are compared.
      reconstruct_slices: (model, image [N, H, W, C], mask [N, H, W, 1], keys [N]) ->
        reconstructions [N, E, H, W, C], one per test step.

    Returns:
      (model, volumes, key) -> Scores; the reconstruction is the mean over the ensemble.
    """
    lifted = lifting.over_slices(
        reconstruct_slices, scoring.chunk, key_per_volume=process.shared_noise
    )

    def score(model: ModelState, volumes: Volumes, key: Key) -> Scores:
        outputs = lifted(model, volumes, key)  # [B, D, E, H, W, C]
        mean = outputs.mean(axis=2)

        def compare(output: Array) -> Array:
            return residuals.anomaly_map(
                scoring.residual, volumes.image, output, volumes.valid
            )

        if scoring.average is Average.MAPS:
            anomaly_map = jax.vmap(compare, in_axes=2)(outputs).mean(axis=0)
        else:
            anomaly_map = compare(mean)
        return lifting.summarise(anomaly_map, mean, volumes)

    return score
