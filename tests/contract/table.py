"""The table of the contract: tiny configurations of every method, and their data."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs import smoke
from tests import adversaries, denoisers, slabs
from uad_jax import anomaly_score_config, denoising_config, optim, types
from uad_jax.anomaly_score_config import (
    Gradient,
    GradientConfig,
    RestorationConfig,
    Score,
    ScoreConfig,
    SliceScore,
)
from uad_jax.interslice_config import Target
from uad_jax.methods import aae, base, context, dae, gmvae
from uad_jax.methods.autoencoder import Variant
from uad_jax.nn import blocks
from uad_jax.nn.sequence import Mixer, Positions
from uad_jax.ops import losses, noise

ROWS = 8
RUN = base.RunShape(total_steps=300, steps_per_epoch=10, global_batch=ROWS)


class Row(NamedTuple):
    """One method in the table.

    Attributes:
      config: Tiny, with every random part switched on.
      overfit: Changes for the overfit claim (no dropout, a larger learning rate).
      reconstruction: Scalar that must fall to 5 % (`overfit_bound`) when overfitting.
      float_fields: Float fields that may be vmapped, as paths, with two values; the
        first is the config's own.
      size: Side of the slices.
      ragged: Whether slabs have padded slices (methods of slabs only).
      batch_statistics: Whether rows depend on each other through batch normalisation.
      overfit_bound: What "falls to 5 %" is where 5 % cannot be reached.
      slow: Whether all claims run by hand only: for variants that share their code
        with a row that does not.
    """

    config: base.MethodConfig
    overfit: dict[str, Any]
    reconstruction: str
    float_fields: dict[str, tuple[float, float]]
    size: int = 16
    ragged: bool = True
    batch_statistics: bool = False
    overfit_bound: float = 0.05
    slow: bool = False


def _autoencoder(variant: Variant) -> Row:
    fields = {
        "optimizer.learning_rate": (1e-3, 3e-3),
        "optimizer.clip_norm": (100.0, 1.0),
        "dropout": (0.1, 0.3),
    }
    if variant.variational:
        fields["kl_weight"] = (1.0, 10.0)
    return Row(
        config=smoke.get_config(f"variant={variant.value}").method,
        # The KL term of a VAE is the price of every bit it stores: with the weight 1
        # it will not memorise a batch, so the overfit claim takes a small one.
        overfit={
            "dropout": 0.0,
            "kl_weight": 1e-3,
            "width": 32,
            "max_width": 64,
            "intermediate_resolution": 4,
            "latent_size": 32,
            "ema_decay": 0.0,
            "optimizer": optim.OptimizerConfig(
                learning_rate=2e-3, schedule=optim.Schedule.COSINE
            ),
        },
        reconstruction="reconstruction",
        float_fields=fields,
        slow=variant is Variant.VAE_SPATIAL,
    )


def _scored_by(score: anomaly_score_config.ScoreConfig) -> Row:
    """A VAE with another score."""
    row = _autoencoder(Variant.VAE)
    config: Any = row.config
    return row._replace(config=dataclasses.replace(config, score=score), slow=True)


def _gmvae(spatial: bool) -> Row:
    """A Gaussian-mixture VAE; the spatial one restores."""
    like: Any = _autoencoder(Variant.VAE)
    common = {
        name: getattr(like.config, name)
        for name in ("width", "max_width", "ema_decay", "optimizer")
    }
    kind = Score.RESTORATION if spatial else Score.RESIDUAL
    return like._replace(
        config=gmvae.GmvaeConfig(
            spatial=spatial,
            latent_size=2 if spatial else 8,
            num_components=3,
            prior_width=4 if spatial else 0,
            free_bits=0.1,
            sample_at_test=True,
            score=anomaly_score_config.ScoreConfig(
                kind=kind, restoration=RestorationConfig(num_steps=3, sampled=True)
            ),
            **common,
        ),
        float_fields={**like.float_fields, "free_bits": (0.1, 1.0)},
        slow=spatial,
    )


def _diffusion(
    config: Any,
    *,
    overfit: dict[str, Any] | None = None,
    float_fields: dict[str, tuple[float, float]] | None = None,
    batch_statistics: bool = False,
    **process: Any,
) -> Row:
    """A diffusion method; `process` makes the overfit claim possible.

    Heavily noised slices cannot be told apart, so it trains on lightly noised ones.
    """
    changes = {"pixel_loss": losses.PixelLoss.L2, **process}
    return Row(
        config=config,
        overfit={
            **(overfit or {}),
            "unet": denoising_config.UNetConfig(
                width=16, multipliers=(1,), num_blocks=0, head_size=16
            ),
            "process": dataclasses.replace(config.process, **changes),
            "ema_decay": 0.0,
            "optimizer": optim.OptimizerConfig(
                learning_rate=5e-3, schedule=optim.Schedule.COSINE
            ),
        },
        reconstruction="loss",
        float_fields={
            "optimizer.learning_rate": (1e-3, 3e-3),
            "optimizer.clip_norm": (config.optimizer.clip_norm, 0.1),
            "ema_decay": (0.9, 0.5),
            **(float_fields or {}),
        },
        batch_statistics=batch_statistics,
    )


def _spark() -> Row:
    """Masked pretraining; filling in more than it sees cannot be overfitted."""
    config = denoisers.spark_config()
    return Row(
        config=config,
        overfit={
            "mask_ratio": 0.25,
            "drop_path": 0.0,
            "width": 8,
            "ema_decay": 0.0,
            "optimizer": optim.OptimizerConfig(
                learning_rate=5e-3, schedule=optim.Schedule.COSINE
            ),
        },
        reconstruction="loss",
        float_fields={
            "optimizer.learning_rate": (1e-3, 3e-3),
            "optimizer.weight_decay": (0.05, 0.5),
            "drop_path": (0.5, 0.1),
        },
        size=64,
        batch_statistics=True,
    )


def _context(variant: context.Variant) -> Row:
    """A context encoder; it memorises what lies under small squares."""
    cevae = variant is context.Variant.CEVAE
    fields = {
        "optimizer.learning_rate": (1e-3, 3e-3),
        "optimizer.clip_norm": (100.0, 1.0),
        "dropout": (0.1, 0.3),
    }
    if cevae:
        fields |= {"kl_weight": (1.0, 10.0), "context_weight": (0.5, 0.9)}
    return Row(
        config=context.ContextConfig(
            variant=variant,
            weighting=context.Weighting.SHARE,
            latent_size=8,
            width=8,
            max_width=16,
            ema_decay=0.9,
            score=context.combined_score() if cevae else ScoreConfig(),
            optimizer=optim.OptimizerConfig(learning_rate=1e-3, clip_norm=100.0),
        ),
        overfit={
            **_autoencoder(Variant.VAE).overfit,
            "max_squares": 1,
            "square_side": 2,
        },
        reconstruction="context",
        float_fields=fields,
        slow=not cevae,
    )


def _dae() -> Row:
    """A denoising autoencoder; noise it has never seen cannot be overfitted."""
    return Row(
        config=dae.DaeConfig(
            width=4,
            num_levels=2,
            noise_cells=4,
            ema_decay=0.9,
            optimizer=optim.OptimizerConfig(
                learning_rate=1e-3, clip_norm=100.0, l2=1e-5, amsgrad=True
            ),
        ),
        overfit={
            "width": 8,
            "ema_decay": 0.0,
            "optimizer": optim.OptimizerConfig(
                learning_rate=5e-3, schedule=optim.Schedule.COSINE
            ),
        },
        reconstruction="loss",
        float_fields={
            "optimizer.learning_rate": (1e-3, 3e-3),
            "optimizer.clip_norm": (100.0, 0.1),
            "optimizer.l2": (1e-5, 1e-2),
            "noise_deviation": (0.2, 0.4),
            "ema_decay": (0.9, 0.5),
        },
    )


def _adversarial(
    config: Any,
    *,
    overfit: dict[str, Any] | None = None,
    float_fields: dict[str, tuple[float, float]] | None = None,
    overfit_bound: float = 0.05,
    slow: bool = False,
) -> Row:
    """A method with a critic, which goes on judging while a batch is overfitted.

    Of the critic's steps, which tests/test_adversarial.py counts, one is enough here.
    """
    if hasattr(config, "critic"):
        critic = dataclasses.replace(config.critic, steps=1)
        config = dataclasses.replace(config, critic=critic)
    optimizer = optim.OptimizerConfig(
        learning_rate=5e-3, b1=0.5, b2=0.9, schedule=optim.Schedule.COSINE
    )
    return Row(
        config=config,
        overfit={
            "network": adversaries.network(
                dropout=0.0, latent_size=32, width=16, max_width=16
            ),
            "ema_decay": 0.0,
            "optimizer": optimizer,
            **(overfit or {}),
        },
        reconstruction="loss",
        float_fields={
            "optimizer.learning_rate": (1e-3, 3e-3),
            "network.dropout": (0.1, 0.3),
            **(float_fields or {}),
        },
        overfit_bound=overfit_bound,
        slow=slow,
    )


def _interslice(kind: Mixer, *, slow: bool = True, **changes: Any) -> Row:
    """A VAE over slabs, one row per path through its code; most by hand only."""
    config = slabs.config(kind, **changes)
    fields = {
        "optimizer.learning_rate": (1e-3, 3e-3),
        "optimizer.clip_norm": (100.0, 1.0),
        "dropout": (0.1, 0.3),
        "kl_weight": (1.0, 10.0),
        "erase.probability": (0.5, 0.9),
        "erase.max_share": (0.4, 0.9),
    }
    if kind is not Mixer.NONE:
        fields["mixer.slice_dropout"] = (0.2, 0.5)
    return Row(
        config=config,
        overfit={
            "dropout": 0.0,
            "kl_weight": 1e-3,
            "mixer": dataclasses.replace(config.mixer, slice_dropout=0.0),
            "erase": dataclasses.replace(config.erase, probability=0.0),
            "width": 32,
            "max_width": 64,
            "intermediate_resolution": 4,
            "latent_size": 64,
            "ema_decay": 0.0,
            "optimizer": optim.OptimizerConfig(
                learning_rate=3e-3, schedule=optim.Schedule.COSINE
            ),
        },
        reconstruction="reconstruction",
        float_fields=fields,
        ragged=config.slabs.target is Target.ALL,
        slow=slow,
    )


def _score_of(name: str) -> ScoreConfig:
    config: Any = TABLE[name].config
    return config.score


TABLE = {variant.value: _autoencoder(variant) for variant in Variant}
TABLE |= {f"interslice_{kind.value}": _interslice(kind) for kind in Mixer}
TABLE["interslice_gru"] = _interslice(
    Mixer.GRU,
    slow=False,
    slabs={"overlap": 1},
    score=ScoreConfig(kind=Score.MC_MEAN, slice_score=SliceScore.ELBO, passes=2),
)
TABLE["interslice_centre"] = _interslice(
    Mixer.TRANSFORMER,
    slabs={"target": Target.CENTRE},
    mixer={"positions": Positions.SINUSOIDAL},
)
TABLE["vae_restoration"] = _scored_by(
    anomaly_score_config.ScoreConfig(
        kind=Score.RESTORATION,
        slice_score=SliceScore.ELBO,
        restoration=RestorationConfig(
            num_steps=3, late_from=1, tv_weights=(0.5, 2.0), sampled=True
        ),
    )
)
TABLE["vae_gradient"] = _scored_by(
    anomaly_score_config.ScoreConfig(
        kind=Score.GRADIENT,
        slice_score=SliceScore.KL,
        gradient=GradientConfig(
            of=Gradient.ELBO, times_residual=True, smoothing=1, samples=2
        ),
    )
)
TABLE["vae_mc"] = _scored_by(
    anomaly_score_config.ScoreConfig(kind=Score.MC_VARIANCE, passes=3)
)
# The same two of slabs, and of windows.
TABLE["interslice_restoration"] = _interslice(
    Mixer.GRU, slabs={"overlap": 1}, score=_score_of("vae_restoration")
)
TABLE["interslice_gradient"] = _interslice(
    Mixer.CONVGRU, slabs={"overlap": 1}, score=_score_of("vae_gradient")
)
TABLE["interslice_centre_restoration"] = _interslice(
    Mixer.GRU, slabs={"target": Target.CENTRE}, score=_score_of("vae_restoration")
)
TABLE["gmvae"] = _gmvae(spatial=False)
TABLE["gmvae_spatial"] = _gmvae(spatial=True)
TABLE["ddpm"] = _diffusion(denoisers.ddpm_config(), train_steps=100)
TABLE["anoddpm"] = _diffusion(denoisers.anoddpm_config(), noise=noise.Noise.GAUSSIAN)
TABLE["pddpm"] = _diffusion(denoisers.pddpm_config(), train_steps=100)
# One noise field for a batch and for a volume, as published.
_shared = denoisers.pddpm_config()
_shared.process.shared_noise = True
TABLE["pddpm_shared"] = _diffusion(_shared, train_steps=100)._replace(slow=True)
TABLE["cddpm"] = _diffusion(
    denoisers.cddpm_config(),
    overfit={
        "encoder": dataclasses.replace(denoisers.encoder(), drop_path=0.0),
        "augment": denoisers.NO_AUGMENT,
    },
    float_fields={
        "encoder.drop_path": (0.5, 0.1),
        "augment.gamma_probability": (0.5, 1.0),
    },
    batch_statistics=True,
    train_steps=100,
)
TABLE["spark"] = _spark()
TABLE["dae"] = _dae()
# The critic asks for what the reconstruction error does not, so 5 % is out of reach.
_wasserstein = {
    "critic.optimizer.learning_rate": (1e-3, 3e-3),
    "critic.penalty_weight": (10.0, 1.0),
}
TABLE["anovaegan"] = _adversarial(
    adversaries.anovaegan_config(),
    overfit={"kl_weight": 1e-3},
    float_fields={"kl_weight": (1.0, 10.0), **_wasserstein},
    overfit_bound=0.15,
)
TABLE["aegan"] = _adversarial(
    adversaries.aegan_config(),
    float_fields={"adversarial_weight": (0.5, 5.0)},
    overfit_bound=0.15,
    slow=True,
)
for context_variant in context.Variant:
    TABLE[context_variant.value] = _context(context_variant)
TABLE["constrained_aae"] = _adversarial(
    adversaries.aae_config(),
    # Three steps of the autoencoder for each that the encoder takes for the critic.
    overfit={
        "network": adversaries.network(
            dropout=0.0,
            latent_size=32,
            width=16,
            max_width=32,
            intermediate_resolution=4,
            generator_norm=blocks.Norm.NONE,
        ),
        "constraint_weight": 0.1,
        "first_epochs": RUN.total_steps // RUN.steps_per_epoch,
        "first_steps": 3,
        "first_critic_steps": 1,
        "pixel_loss": losses.PixelLoss.L1,
        "reduction": losses.Reduction.SUM,
        "optimizer": optim.OptimizerConfig(
            learning_rate=1e-3, schedule=optim.Schedule.COSINE
        ),
    },
    float_fields={"constraint_weight": (1.0, 10.0), **_wasserstein},
    # Critic and constraint pull the codes two ways: 0.11 to 0.23 are found, by rounding
    # alone. Without the one or the other, and twice this rate, it was 0.01.
    overfit_bound=0.35,
)
for _variant in (aae.Variant.AAE, aae.Variant.CONSTRAINED_AE):
    TABLE[_variant.value] = TABLE["constrained_aae"]._replace(
        config=adversaries.aae_config(_variant), overfit_bound=0.2, slow=True
    )
# Nothing pulls a generator towards one image, so a batch is not memorised: its
# distribution is only met better, within 300 steps to 0.47 of the distance.
TABLE["fanogan_gan"] = _adversarial(
    adversaries.gan_config(),
    overfit={
        "optimizer": optim.OptimizerConfig(
            learning_rate=2e-3, b1=0.5, b2=0.9, schedule=optim.Schedule.COSINE
        )
    },
    float_fields=_wasserstein,
    overfit_bound=0.6,
)
# The frozen generator of this row is random: it cannot make the images of the batch.
# The best code leaves 0.67 to 0.69 of the error, whatever the learning rate.
TABLE["fanogan"] = _adversarial(
    adversaries.fanogan_config(),
    float_fields={"feature_weight": (1.0, 10.0)},
    overfit_bound=0.8,
)


def _brains(rows: int, size: int) -> jax.Array:
    """Smooth blobs on black, [rows, size, size, 1] in [0, 1]."""
    rng = np.random.default_rng(0)
    centre = rng.uniform(5, 11, (rows, 2, 1, 1)) * size / 16
    radius = rng.uniform(3, 6, (rows, 1, 1)) * size / 16
    y, x = np.mgrid[:size, :size]
    distance = np.hypot(y - centre[:, 0], x - centre[:, 1])
    image = np.clip(1.5 - distance / radius, 0, 1) * rng.uniform(0.6, 1, (rows, 1, 1))
    return jnp.asarray(image[..., None], jnp.float32)


@functools.cache
def _batch_of(size: int) -> types.Batch:
    image = _brains(ROWS, size)
    return types.Batch(
        image=image,
        mask=image > 0,
        valid=jnp.ones(ROWS, bool),
        uid=jnp.arange(ROWS) // 2,
        slice_index=jnp.arange(ROWS) % 2 + 3,
    )


@functools.cache
def _volumes_of(size: int) -> types.Volumes:
    image = _brains(ROWS * 3, size).reshape(ROWS, 3, size, size, 1)
    return types.Volumes(
        image=image,
        mask=image > 0,
        valid=jnp.ones((ROWS, 3), bool),
        uid=jnp.arange(ROWS),
    )


@functools.cache
def _slabs_of(size: int, length: int, ragged: bool) -> types.Batch:
    """Slabs of one brain each, darker slice by slice; one of them ends too early."""
    image = _fading(size, length)
    first = jnp.arange(ROWS) % 2 + 3
    valid = jnp.ones((ROWS, length), bool)
    return types.Batch(
        image=image,
        mask=image > 0,
        valid=valid.at[5, -1].set(not ragged),
        uid=jnp.arange(ROWS) // 2,
        slice_index=first[:, None] + jnp.arange(length)[None],
    )


@functools.cache
def _deep_volumes_of(size: int, length: int) -> types.Volumes:
    """Volumes whose depth is no multiple of the slab; the last is thinner than one."""
    depth = 2 * length - 1
    image = _fading(size, depth)
    valid = jnp.ones((ROWS, depth), bool).at[-1, length - 1 :].set(False)
    return types.Volumes(
        image=image * valid[..., None, None, None],
        mask=(image > 0) & valid[..., None, None, None],
        valid=valid,
        uid=jnp.arange(ROWS),
    )


def _fading(size: int, depth: int) -> jax.Array:
    shade = jnp.linspace(1.0, 0.5, depth).reshape(1, depth, 1, 1, 1)
    return _brains(ROWS, size)[:, None] * shade


def slab_length(name: str) -> int | None:
    """Slices of a slab, None for methods of slices."""
    return TABLE[name].config.make(RUN).inputs.num_slices


def batch(name: str) -> types.Batch:
    row, length = TABLE[name], slab_length(name)
    if length is not None:
        return _slabs_of(row.size, length, row.ragged)
    return _batch_of(row.size)


def volumes(name: str) -> types.Volumes:
    length = slab_length(name)
    if length is not None:
        return _deep_volumes_of(TABLE[name].size, length)
    return _volumes_of(TABLE[name].size)


def only(batch: types.Batch, rows: jax.Array) -> types.Batch:
    """Makes all rows but those padding; rows [B] bool."""
    keep = rows.reshape(-1, *[1] * (batch.valid.ndim - 1))
    return dataclasses.replace(batch, valid=batch.valid & keep)
