"""Gaussian-mixture VAE, dense and spatial.

The code z of a slice comes from one of C Gaussians, whose means and precisions depend
on a context w: p(w) = N(0, I), p(c) = 1 / C, p(z | w, c). Posteriors of z and w are
Gaussian; that of c follows from z and w.

Sources: You et al. 2019, "Unsupervised lesion detection via image restoration with a
normative prior"; Baur et al. 2021, "Autoencoders for unsupervised anomaly segmentation
in brain MR images: a comparative study", and the authors' released code, whose sizes
and absolute error these are.

Deviations from the released code, which `compat=denner` follows: the log-density of the
components has the sign and factor of a Gaussian; the spatial form decodes z, where the
released one decodes the encoder's features, past z. Further: the score decodes the mean
of the posterior, not a sample (`sample_at_test=True`); log precisions are kept within
+-10, against overflow.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from uad_jax import anomaly_scores, autoencoding, optim
from uad_jax.anomaly_score_config import ScoreConfig, mixture_score
from uad_jax.compat import Compat
from uad_jax.methods import base
from uad_jax.nn import autoencoder, blocks
from uad_jax.nn import gmvae as networks_lib
from uad_jax.ops import diffusion, losses, mixture, residuals
from uad_jax.score_functions import Functions, Terms
from uad_jax.types import Array, Batch, Key, ModelState, Scalars, Tree


@dataclasses.dataclass
class GmvaeConfig:
    """A Gaussian-mixture VAE. The image size follows the data.

    Attributes:
      spatial: A code at every site of the feature map; False: one per slice.
      latent_size: Size of z, at every site if spatial.
      context_size: Size of w, likewise.
      num_components: Gaussians of the mixture.
      prior_width: Hidden units between w and the mixture; 0 = none.
      free_bits: Least divergence of c, in nats per slice or site: below it there is no
        gradient.
      intermediate_resolution: Side of the code's feature map; the image side must be
        this times a power of 2. 0 = a sixteenth (8 at 128 pixels, 6 at 96).
      width: Channels of the encoder's first and the decoder's last level.
      max_width: Most channels of a level.
      norm: Normalisation.
      dropout: Dropout on the posteriors and in the dense decoder, while training.
      pixel_loss: Distance of the reconstruction.
      reduction: Over pixels (and latents: MEAN divides all terms by the pixels).
      kl_weight: Weight of the three divergences together, summed over the codes.
      compat: Whose log-density and, if spatial, whose decoder.
      score: What makes the anomaly map.
      residual: How image and reconstruction become an anomaly map.
      sample_at_test: Decode a sample instead of the mean.
      score_chunk: Slices of a volume that are scored at once; 0 = all.
      precision: Type of the computation; the mixture's is float32.
      accumulate_steps: Micro-batches per optimiser step.
      ema_decay: Decay of the averaged parameters; 0 = none.
      optimizer: The optimiser.
    """

    spatial: bool = False
    latent_size: int = 128
    context_size: int = 1
    num_components: int = 9
    prior_width: int = 0
    free_bits: float = 1.0
    intermediate_resolution: int = 0
    width: int = 32
    max_width: int = 128
    norm: blocks.Norm = blocks.Norm.NONE
    dropout: float = 0.1
    pixel_loss: losses.PixelLoss = losses.PixelLoss.L1
    reduction: losses.Reduction = losses.Reduction.SUM
    kl_weight: float = 1.0
    compat: Compat = Compat.NONE
    score: ScoreConfig = dataclasses.field(default_factory=mixture_score)
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
            ("latent_size", "context_size", "num_components"),
            (
                "prior_width",
                "free_bits",
                "intermediate_resolution",
                "kl_weight",
                "score_chunk",
            ),
        )
        base.check_training(self.accumulate_steps, self.ema_decay)
        self.score.validate("gmvae", posterior=True, dropout=self.dropout > 0)
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


class Networks(NamedTuple):
    """The modules; their parameters bear these names."""

    encoder: autoencoder.Encoder
    heads: networks_lib.Heads
    prior: networks_lib.Prior
    decoder: autoencoder.Decoder


class Latents(NamedTuple):
    """Posteriors and what was drawn from them, float32.

    Attributes:
      mu: Mean of z, [N, (h, w,) Z].
      log_sigma: Of z, the same shape.
      context_mu: Mean of w, [N, (h, w,) W].
      context_log_sigma: Of w, the same shape.
      z: The code that is decoded, a sample or the mean.
      context: The context that shapes the mixture, a sample or the mean.
    """

    mu: Array
    log_sigma: Array
    context_mu: Array
    context_log_sigma: Array
    z: Array
    context: Array


class Divergences(NamedTuple):
    """The three divergences, summed over the codes, [N] float32 each.

    Attributes:
      code: Of z from the mixture, expected under the posterior of c.
      context: Of w from N(0, I).
      component: Of c from the uniform distribution, no less than the free bits.
    """

    code: Array
    context: Array
    component: Array

    @property
    def total(self) -> Array:
        """Their sum."""
        return self.code + self.context + self.component


def networks(config: GmvaeConfig, image_shape: tuple[int, ...]) -> Networks:
    """Builds the networks for images of shape (..., H, W, C).

    Raises:
      ValueError: If the image does not fit the intermediate resolution.
    """
    height, width, channels = image_shape[-3:]
    shared = autoencoding.layers(config, image_shape)
    return Networks(
        encoder=autoencoder.Encoder(latent_size=None, **shared),
        heads=networks_lib.Heads(
            config.latent_size, config.context_size, config.spatial, shared["dtype"]
        ),
        prior=networks_lib.Prior(
            config.latent_size, config.num_components, config.prior_width
        ),
        decoder=autoencoder.Decoder(
            image_shape=(height, width, channels),
            widen=config.spatial and not _bypasses(config),
            **shared,
        ),
    )


def _bypasses(config: GmvaeConfig) -> bool:
    """Whether the decoder reads the encoder's features instead of z."""
    return config.spatial and config.compat is Compat.DENNER


def init_model(config: GmvaeConfig, key: Key, batch: Batch) -> ModelState:
    """Initialises the four networks for the batch's image shape."""
    modules = networks(config, batch.image.shape)
    image = jnp.zeros((1, *batch.image.shape[-3:]), jnp.float32)
    keys = jax.random.split(key, 4)
    (features,), encoder = modules.encoder.init_with_output(keys[0], image)
    codes, heads = modules.heads.init_with_output(keys[1], features)
    inputs = {
        "prior": codes[2],
        "decoder": features if _bypasses(config) else codes[0],
    }
    prior = modules.prior.init(keys[2], inputs["prior"])
    decoder = modules.decoder.init(keys[3], inputs["decoder"])
    variables = {"encoder": encoder, "heads": heads, "prior": prior, "decoder": decoder}
    return ModelState(
        params={name: tree["params"] for name, tree in variables.items()},
        collections={},
    )


def autoencode(
    config: GmvaeConfig,
    params: dict[str, Tree],
    image: Array,
    *,
    keys: Array | None = None,
    train: bool = False,
    sample: bool = True,
) -> tuple[Array, Latents]:
    """Reconstructs slices.

    Args:
      config: The model.
      params: {"encoder": ..., "heads": ..., "prior": ..., "decoder": ...}.
      image: [N, H, W, C] float.
      keys: One key per slice, [N]: z and w are samples; None: the means.
      train: Whether dropout is on; needs keys.
      sample: False: the means even with keys, which dropout needs.

    Returns:
      The reconstruction [N, H, W, C] float32 and the latent variables.
    """
    modules = networks(config, image.shape)

    def stream(index: int) -> Array | None:
        return None if keys is None else diffusion.fold_in(keys, index)

    def draw(mu: Array, log_sigma: Array, index: int) -> Array:
        if keys is None or not sample:
            return mu
        normal = jax.vmap(lambda key: jax.random.normal(key, mu.shape[1:]))
        return mu + jnp.exp(log_sigma) * normal(stream(index))

    (features,) = _apply(modules.encoder, params["encoder"], image)
    mu, log_sigma, context_mu, context_log_sigma = _apply(
        modules.heads,
        params["heads"],
        features,
        dropout=config.dropout,
        keys=[stream(index) for index in range(4)] if train else None,
    )
    z = draw(mu, log_sigma, 4)
    context = draw(context_mu, context_log_sigma, 5)
    output = _apply(
        modules.decoder,
        params["decoder"],
        features if _bypasses(config) else z,
        dropout=config.dropout,
        keys=stream(6) if train else None,
    )
    latents = Latents(mu, log_sigma, context_mu, context_log_sigma, z, context)
    return output, latents


def divergences(
    config: GmvaeConfig, params: dict[str, Tree], latents: Latents
) -> Divergences:
    """The three divergences of the loss.

    Args:
      config: The model.
      params: Of them "prior".
      latents: As `autoencode` returns them.
    """
    prior = networks_lib.Prior(
        config.latent_size, config.num_components, config.prior_width
    )
    mean, log_precision = _apply(prior, params["prior"], latents.context)
    released = config.compat is Compat.DENNER
    density = mixture.released_log_density if released else mixture.log_density
    log_weights = mixture.log_responsibilities(
        density(latents.z[..., None, :], mean, log_precision)
    )
    each = mixture.kl_normals(
        latents.mu[..., None, :], latents.log_sigma[..., None, :], mean, log_precision
    )
    component = jnp.maximum(mixture.kl_uniform(log_weights), config.free_bits)

    def total(x: Array) -> Array:
        return losses.per_row(x, losses.Reduction.SUM)

    return Divergences(
        code=total(jnp.exp(log_weights) * each),
        context=losses.kl_normal(latents.context_mu, latents.context_log_sigma),
        component=total(component),
    )


def loss(
    config: GmvaeConfig,
    params: dict[str, Tree],
    collections: dict[str, Tree],
    batch: Batch,
    key: Key,
    *,
    train: bool = True,
) -> tuple[Array, tuple[dict[str, Tree], Scalars]]:
    """Reconstruction error plus the weighted divergences.

    Args:
      config: The model.
      params: As in `autoencode`.
      collections: Empty; handed through.
      batch: Slices, image [B, H, W, C] float32.
      key: Key of the step.
      train: Whether dropout is on. z and w are samples in either case.

    Returns:
      The loss [] and (collections, scalars). Scalars: "reconstruction", "kl_code",
      "kl_context", "kl_component" and their sum "kl" as they enter the loss (before
      the weight), "l1" the mean absolute error.
    """
    keys = base.sample_keys(key, batch.uid, batch.slice_index)
    output, latents = autoencode(config, params, batch.image, keys=keys, train=train)
    terms = losses.pixels(config.pixel_loss, output, batch.image)
    found = divergences(config, params, latents)
    pixels = 1
    if config.reduction is losses.Reduction.MEAN:
        pixels = output.size // output.shape[0]
    rows = {
        "reconstruction": losses.per_row(terms, config.reduction),
        "l1": losses.l1(output, batch.image, losses.Reduction.MEAN),
        "kl_code": found.code / pixels,
        "kl_context": found.context / pixels,
        "kl_component": found.component / pixels,
        "kl": found.total / pixels,
    }
    scalars = {
        name: losses.mean_over_valid(value, batch.valid) for name, value in rows.items()
    }
    value = scalars["reconstruction"] + config.kl_weight * scalars["kl"]
    return value, (collections, scalars)


def validation_loss(
    config: GmvaeConfig, model: ModelState, batch: Batch, key: Key
) -> Scalars:
    """The loss without dropout; its noise follows from the key, uid and slice."""
    value, (_, scalars) = loss(
        config, model.params, model.collections, batch, key, train=False
    )
    return {"loss": value, **scalars}


def score_functions(config: GmvaeConfig) -> Functions:
    """What the shared scores need of the model."""

    def reconstruct(
        model: ModelState,
        image: Array,
        keys: Array | None,
        *,
        sample: bool,
        dropout: bool,
    ) -> Array:
        return autoencode(
            config, model.params, image, keys=keys, train=dropout, sample=sample
        )[0]

    def terms(
        model: ModelState, image: Array, keys: Array | None, kind: losses.PixelLoss
    ) -> Terms:
        output, latents = autoencode(config, model.params, image, keys=keys)
        error = losses.pixels(kind, output, image)
        return Terms(
            output=output,
            reconstruction=losses.per_row(error, losses.Reduction.SUM),
            kl=divergences(config, model.params, latents).total,
        )

    return Functions(reconstruct, terms, config.kl_weight, config.pixel_loss)


def reconstruct(
    config: GmvaeConfig,
    model: ModelState,
    image: Array,
    mask: Array,
    key: Key,
    strength: float | Array = 1.0,
) -> Array:
    """Pseudo-healthy version of slices [N, H, W, C]; the strength has no effect."""
    keys = base.row_keys(key, image.shape[0]) if config.sample_at_test else None
    return autoencode(config, model.params, image, keys=keys)[0]


def _apply(module: nn.Module, params: Tree, x: Array, **kwargs: Any) -> Any:
    return module.apply({"params": params}, x, **kwargs)
