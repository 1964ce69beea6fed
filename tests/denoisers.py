"""Tiny diffusion methods for tests."""

import jax
import jax.numpy as jnp

from uad_jax import denoising_config, optim, types
from uad_jax.methods import cddpm, ddpm, pddpm, spark
from uad_jax.ops import augment, diffusion, losses, noise, residuals

SIZE = 16
NO_AUGMENT = augment.none()


def unet() -> denoising_config.UNetConfig:
    """A network of one level that compiles in seconds."""
    return denoising_config.UNetConfig(
        width=8, multipliers=(1,), num_blocks=0, head_size=8
    )


def ddpm_config() -> ddpm.DdpmConfig:
    """One step, Gaussian noise, an ensemble of two, averaged parameters."""
    return ddpm.DdpmConfig(
        unet=unet(),
        process=denoising_config.ProcessConfig(noise=noise.Noise.GAUSSIAN),
        scoring=denoising_config.ScoringConfig(test_steps=(249, 499)),
        ema_decay=0.9,
        optimizer=optim.OptimizerConfig(learning_rate=1e-3, clip_norm=100.0),
    )


def anoddpm_config() -> ddpm.DdpmConfig:
    """A chain of four calls over 20 steps with 3-D simplex noise."""
    return ddpm.DdpmConfig(
        unet=unet(),
        process=denoising_config.ProcessConfig(
            num_steps=20,
            schedule=denoising_config.NoiseSchedule.LINEAR,
            prediction=diffusion.Prediction.EPS,
            pixel_loss=losses.PixelLoss.L2,
            noise=noise.Noise.SIMPLEX_3D,
            train_steps=16,
        ),
        scoring=denoising_config.ScoringConfig(
            test_steps=(4,), residual=residuals.Residual.SQUARED
        ),
        way=ddpm.Way.CHAIN,
        sampler=diffusion.Sampler.DDPM_BETA,
        chain_calls=4,
        ema_decay=0.9,
        optimizer=optim.OptimizerConfig(learning_rate=1e-3, clip_norm=1.0),
    )


def pddpm_config() -> pddpm.PddpmConfig:
    """Four boxes of 8 x 8, simplex noise."""
    return pddpm.PddpmConfig(
        unet=unet(),
        process=denoising_config.ProcessConfig(),
        patch=8,
        ema_decay=0.9,
        optimizer=optim.OptimizerConfig(learning_rate=1e-3, clip_norm=100.0),
    )


def encoder() -> cddpm.EncoderConfig:
    """A ResNet of four blocks."""
    return cddpm.EncoderConfig(
        features=8, stage_sizes=(1, 1, 1, 1), width=4, drop_path=0.5
    )


def cddpm_config() -> cddpm.CddpmConfig:
    """Gaussian noise, an ensemble of two, every random part switched on."""
    return cddpm.CddpmConfig(
        unet=unet(),
        encoder=encoder(),
        process=denoising_config.ProcessConfig(noise=noise.Noise.GAUSSIAN),
        scoring=denoising_config.ScoringConfig(test_steps=(249, 499)),
        ema_decay=0.9,
        optimizer=optim.OptimizerConfig(learning_rate=1e-3, clip_norm=100.0),
    )


def spark_config() -> spark.SparkConfig:
    """A ResNet of four blocks, for slices of 64 x 64."""
    return spark.SparkConfig(
        stage_sizes=(1, 1, 1, 1),
        width=4,
        decoder_width=32,
        drop_path=0.5,
        ema_decay=0.9,
        # A larger eps: steps along gradients of rounding errors stay small.
        optimizer=optim.OptimizerConfig(
            learning_rate=1e-3, eps=1e-3, weight_decay=0.05
        ),
    )


def batch(rows: int = 4, channels: int = 1) -> types.Batch:
    """Random slices of different volumes."""
    shape = (rows, SIZE, SIZE, channels)
    return types.Batch(
        image=jax.random.uniform(jax.random.key(0), shape),
        mask=jnp.ones((rows, SIZE, SIZE, 1), bool),
        valid=jnp.ones(rows, bool),
        uid=jnp.arange(rows),
        slice_index=jnp.arange(rows) + 2,
    )


def volumes(count: int = 2, depth: int = 3) -> types.Volumes:
    """Random volumes."""
    shape = (count, depth, SIZE, SIZE, 1)
    return types.Volumes(
        image=jax.random.uniform(jax.random.key(1), shape),
        mask=jnp.ones(shape, bool),
        valid=jnp.ones((count, depth), bool),
        uid=jnp.arange(count) + 5,
    )
