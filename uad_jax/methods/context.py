"""Context encoder (CE) and context-encoding VAE (ceVAE): fill in hidden squares.

Sources: Zimmerer et al. 2018, "Context-encoding variational autoencoder for
unsupervised anomaly detection"; Baur et al. 2021, "Autoencoders for unsupervised
anomaly segmentation in brain MR images: a comparative study", and the authors' released
code, whose networks, squares and absolute error these are.

Deviations from the released code, which `compat=denner` follows: every slice has its
own squares, where the released code hides those of the last slice in all of the batch;
and the filled-in image of the ceVAE is compared with the clean one, where the released
code compares it with the hidden one, so that there is nothing to fill in.

Further deviations: the validation loss hides squares too, always the same ones; a
square larger than the brain is cut to the brain's box, not left out; the ceVAE scores
the mean of the posterior (`sample_at_test=True`: a sample).
"""

import dataclasses
import enum
import functools

import jax.numpy as jnp

from uad_jax import anomaly_scores, autoencoding, optim
from uad_jax.anomaly_score_config import GradientConfig, Score, ScoreConfig
from uad_jax.compat import Compat
from uad_jax.methods import base
from uad_jax.nn import autoencoder, blocks
from uad_jax.ops import corrupt, losses, residuals
from uad_jax.score_functions import Functions
from uad_jax.types import Array, Batch, Key, ModelState, Scalars, Tree


class Variant(enum.Enum):
    """Which context encoder."""

    CE = "ce"  # an autoencoder that sees the hidden image only
    CEVAE = "cevae"  # a VAE of the whole image, whose mean also fills in hidden ones


class Weighting(enum.Enum):
    """How the ceVAE weighs its two tasks."""

    EQUAL = "equal"  # reconstruction + KL + context: Baur et al.
    SHARE = "share"  # (1 - f) (reconstruction + KL) + f context: Zimmerer et al.


def combined_score() -> ScoreConfig:
    """The ceVAE's own score: the residual times the blurred gradient of the KL."""
    return ScoreConfig(
        kind=Score.GRADIENT, gradient=GradientConfig(times_residual=True)
    )


@dataclasses.dataclass
class ContextConfig:
    """A context encoder. The image size follows the data.

    Attributes:
      variant: Which context encoder.
      max_squares: 1 to so many squares are hidden in each slice.
      square_side: Side of a square in pixels; 0 = 20 of 128 pixels, scaled with the
        shorter side of the image (15 at 96).
      compat: Whose squares and, of the ceVAE, whose target.
      weighting: CEVAE: how the two tasks are weighed.
      context_weight: CEVAE, SHARE: weight f of the context task, from 0 to 1.
      latent_size: Size of the dense code.
      intermediate_resolution: Side of the code's feature map; the image side must be
        this times a power of 2. 0 = a sixteenth (8 at 128 pixels, 6 at 96).
      width: Channels of the encoder's first and the decoder's last level.
      max_width: Most channels of a level.
      norm: Normalisation.
      dropout: Dropout on the code and in the decoder, while training.
      pixel_loss: Distance of the reconstruction.
      reduction: Over pixels (and latents: MEAN divides both terms by the pixels).
      kl_weight: CEVAE: weight of the KL divergence.
      score: What makes the anomaly map. A CE has no KL: it takes the residual, or the
        gradient of the reconstruction error.
      residual: How image and reconstruction become an anomaly map.
      sample_at_test: CEVAE: decode a sample instead of the mean.
      score_chunk: Slices of a volume that are scored at once; 0 = all.
      precision: Type of the computation.
      accumulate_steps: Micro-batches per optimiser step.
      ema_decay: Decay of the averaged parameters; 0 = none.
      optimizer: The optimiser.
    """

    variant: Variant = Variant.CEVAE
    max_squares: int = 3
    square_side: int = 0
    compat: Compat = Compat.NONE
    weighting: Weighting = Weighting.EQUAL
    context_weight: float = 0.5
    latent_size: int = 128
    intermediate_resolution: int = 0
    width: int = 32
    max_width: int = 128
    norm: blocks.Norm = blocks.Norm.NONE
    dropout: float = 0.1
    pixel_loss: losses.PixelLoss = losses.PixelLoss.L1
    reduction: losses.Reduction = losses.Reduction.SUM
    kl_weight: float = 1.0
    score: ScoreConfig = dataclasses.field(default_factory=combined_score)
    residual: residuals.Residual = residuals.Residual.ABS
    sample_at_test: bool = False
    score_chunk: int = 32
    precision: base.Precision = base.Precision.FLOAT32
    accumulate_steps: int = 1
    ema_decay: float = 0.0
    optimizer: optim.OptimizerConfig = dataclasses.field(
        default_factory=optim.OptimizerConfig
    )

    def validate(self) -> None:
        """Raises ValueError for settings that cannot work."""
        autoencoding.check(
            self,
            ("max_squares", "latent_size"),
            ("square_side", "intermediate_resolution", "kl_weight", "score_chunk"),
        )
        if not 0 <= self.context_weight <= 1:
            raise ValueError(
                f"context_weight is {self.context_weight}; it must lie in [0, 1]."
            )
        base.check_training(self.accumulate_steps, self.ema_decay)
        self.score.validate(
            self.variant.value,
            posterior=self.variant is Variant.CEVAE,
            dropout=self.dropout > 0,
        )
        self.optimizer.validate()

    def make(self, run: base.RunShape) -> base.Method:
        """Builds the method. Float fields may be traced scalars."""
        init, update = base.single_optimizer(
            functools.partial(init_model, self),
            functools.partial(loss, self),
            self.optimizer.make(run.total_steps),
            ema_decay=self.ema_decay,
            accumulate_steps=self.accumulate_steps,
        )
        functions = score_functions(self)
        return base.Method(
            inputs=base.Inputs(),
            init=init,
            update=update,
            validate=functools.partial(validation_loss, self),
            score=anomaly_scores.scorer(
                functions,
                self.score,
                self.residual,
                sample=self.sample_at_test,
                chunk=self.score_chunk,
            ),
            reconstruct=functools.partial(reconstruct, self),
            host_score=anomaly_scores.host_scorer(
                functions, self.score, self.residual, chunk=self.score_chunk
            ),
        )


def networks(
    config: ContextConfig, image_shape: tuple[int, ...]
) -> autoencoding.Networks:
    """Builds encoder and decoder for images of shape (..., H, W, C).

    Raises:
      ValueError: If the image does not fit the intermediate resolution, or a square
        does not fit into it.
    """
    height, width, channels = image_shape[-3:]
    corrupt.square_side(height, width, config.square_side)
    shared = autoencoding.layers(config, image_shape)
    return autoencoding.Networks(
        autoencoder.Encoder(
            latent_size=config.latent_size,
            num_heads=2 if config.variant is Variant.CEVAE else 1,
            **shared,
        ),
        autoencoder.Decoder(image_shape=(height, width, channels), **shared),
    )


def init_model(config: ContextConfig, key: Key, batch: Batch) -> ModelState:
    """Initialises {"encoder": ..., "decoder": ...} for the batch's image shape."""
    shape = batch.image.shape
    return autoencoding.init_model(networks(config, shape), key, shape)


def hide(config: ContextConfig, batch: Batch, keys: Array) -> Array:
    """Hides squares of the slices.

    Args:
      config: The method.
      batch: Slices, image [B, H, W, C] float32.
      keys: One key per slice, [B].

    Returns:
      The images, 0 in the squares, [B, H, W, C] float32.
    """
    height, width = batch.image.shape[1:3]
    side = corrupt.square_side(height, width, config.square_side)
    hidden = corrupt.hidden_squares(keys, batch.mask, side, config.max_squares)
    if config.compat is Compat.DENNER:
        last = jnp.max(jnp.where(batch.valid, jnp.arange(len(hidden)), 0))
        hidden = jnp.broadcast_to(hidden[last][None], hidden.shape)
    return jnp.where(hidden, 0.0, batch.image)


def loss(
    config: ContextConfig,
    params: dict[str, Tree],
    collections: dict[str, Tree],
    batch: Batch,
    key: Key,
    *,
    train: bool = True,
) -> tuple[Array, tuple[dict[str, Tree], Scalars]]:
    """Error of the filled-in image; for the ceVAE plus the loss of a VAE.

    Args:
      config: The method.
      params: {"encoder": ..., "decoder": ...}.
      collections: Empty; handed through.
      batch: Slices, image [B, H, W, C] float32.
      key: Key of the step.
      train: Whether dropout is on. Squares are hidden, and the VAE samples, in either
        case.

    Returns:
      The loss [] and (collections, scalars). Scalars: "context", the error of the
      filled-in image; of the ceVAE "reconstruction", that of the VAE, and "kl" before
      its weight; "l1", the mean absolute error of the image in "reconstruction" (CE:
      in "context").
    """
    keys = base.sample_keys(key, batch.uid, batch.slice_index)
    square_keys, *branch_keys = autoencoding.split(keys, 3)
    seen, clean = hide(config, batch, square_keys), batch.image
    dropout = config.dropout if train else None
    if config.variant is Variant.CE:
        filled, _ = autoencoding.autoencode(
            networks(config, clean.shape),
            params,
            seen,
            keys=branch_keys[0],
            dropout=dropout,
        )
        context, scalars = _errors(config, filled, clean, batch)
        return context, (collections, {**scalars, "context": context})
    output, filled, codes = _both(config, params, clean, seen, branch_keys, dropout)
    target = seen if config.compat is Compat.DENNER else clean
    context, _ = _errors(config, filled, target, batch)
    reconstruction, scalars = _errors(config, output, clean, batch)
    kl = losses.kl_normal(*codes)
    if config.reduction is losses.Reduction.MEAN:
        kl = kl / (output.size // output.shape[0])
    scalars |= {
        "context": context,
        "reconstruction": reconstruction,
        "kl": losses.mean_over_valid(kl, batch.valid),
    }
    whole = reconstruction + config.kl_weight * scalars["kl"]
    if config.weighting is Weighting.EQUAL:
        return whole + context, (collections, scalars)
    share = config.context_weight
    return (1.0 - share) * whole + share * context, (collections, scalars)


def _both(
    config: ContextConfig,
    params: dict[str, Tree],
    clean: Array,
    seen: Array,
    branch_keys: list[Array],
    dropout: float | Array | None,
) -> tuple[Array, Array, tuple[Array, Array]]:
    """Both branches of the ceVAE in one pass, their rows side by side.

    Returns:
      Reconstruction of the whole image from a sample, of the hidden one from the mean,
      [B, H, W, C] each, and the whole image's (mu, log_sigma).
    """
    rows = clean.shape[0]

    def merge(whole: Array, hidden: Array) -> Array:
        pair = jnp.stack([whole, hidden], axis=1)  # the sharded axis stays in front
        return pair.reshape(2 * rows, *whole.shape[1:])

    def part(x: Array, branch: int) -> Array:
        return x.reshape(rows, 2, *x.shape[1:])[:, branch]

    outputs, codes = autoencoding.autoencode(
        networks(config, clean.shape),
        params,
        merge(clean, seen),
        keys=merge(*branch_keys),
        dropout=dropout,
        sampled=jnp.arange(2 * rows) % 2 == 0,
    )
    mu, log_sigma = (part(code, 0) for code in codes)
    return part(outputs, 0), part(outputs, 1), (mu, log_sigma)


def _errors(
    config: ContextConfig, output: Array, target: Array, batch: Batch
) -> tuple[Array, Scalars]:
    """Mean over the valid rows of the loss of pixels, and {"l1": ...}."""
    terms = losses.pixels(config.pixel_loss, output, target)
    rows = losses.per_row(terms, config.reduction)
    l1 = losses.l1(output, target, losses.Reduction.MEAN)
    value = losses.mean_over_valid(rows, batch.valid)
    return value, {"l1": losses.mean_over_valid(l1, batch.valid)}


def validation_loss(
    config: ContextConfig, model: ModelState, batch: Batch, key: Key
) -> Scalars:
    """The loss without dropout; squares and noise follow from key, uid and slice."""
    value, (_, scalars) = loss(
        config, model.params, model.collections, batch, key, train=False
    )
    return {"loss": value, **scalars}


def score_functions(config: ContextConfig) -> Functions:
    """What the shared scores need of a context encoder; nothing is hidden."""
    return autoencoding.score_functions(
        functools.partial(networks, config),
        config.dropout,
        config.kl_weight,
        config.pixel_loss,
    )


def reconstruct(
    config: ContextConfig,
    model: ModelState,
    image: Array,
    mask: Array,
    key: Key,
    strength: float | Array = 1.0,
) -> Array:
    """Pseudo-healthy version of slices [N, H, W, C]; the strength has no effect."""
    keys = base.row_keys(key, image.shape[0]) if config.sample_at_test else None
    return autoencoding.autoencode(
        networks(config, image.shape), model.params, image, keys=keys
    )[0]
