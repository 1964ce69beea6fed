"""Inter-slice VAE: slices of a slab are encoded alone, mixed, and decoded alone.

Source: the idea of Behrendt et al. 2022, "Capturing inter-slice dependencies of 3D
brain MRI-scans for unsupervised anomaly detection" (MIDL short paper): a VAE per slice
with recurrent networks or attention between the slices. No code was published, and the
abstract says no more than that; everything else is our proposal (docs/interslice.md).
Encoder and decoder are those of `methods.autoencoder`; without a mixer this is its VAE.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from uad_jax import autoencoding, interslice_config, optim, slab_scores
from uad_jax.anomaly_score_config import ScoreConfig
from uad_jax.interslice_config import Target
from uad_jax.methods import base
from uad_jax.nn import autoencoder, blocks, sequence
from uad_jax.nn.sequence import Mixer
from uad_jax.ops import erase as erase_lib
from uad_jax.ops import losses, residuals
from uad_jax.types import Array, Batch, Key, ModelState, Scalars, Tree


@dataclasses.dataclass
class InterSliceConfig:
    """A VAE whose slices know their neighbours. The image size follows the data.

    Attributes:
      slabs: What the model takes at once, and what it gives back.
      mixer: What connects the slices.
      latent_size: Size of the code and of the tokens that are mixed.
      intermediate_resolution: Side of the code's feature map; the image side must be
        this times a power of 2. 0 = a sixteenth (8 at 128 pixels, 6 at 96).
      width: Channels of the encoder's first and the decoder's last level.
      max_width: Most channels of a level.
      norm: Normalisation.
      dropout: Dropout on the code and in the dense decoder, while training.
      erase: Cuboids that are cut out of the input while training; the target is whole.
      pixel_loss: Distance of the reconstruction.
      reduction: Of the pixel loss over the pixels of a slice.
      kl_weight: Weight of the KL divergence, which is always summed over the latents.
        With SUM 1.0 is the VAE of Baur et al.; MEAN with 1 / (H W C) is the same.
      score: What makes the anomaly map.
      residual: How image and reconstruction become an anomaly map.
      sample_at_test: Decode a sample instead of the mean.
      precision: Type of encoder and decoder; mixers always compute in float32.
      accumulate_steps: Micro-batches per optimiser step.
      ema_decay: Decay of the averaged parameters; 0 = none.
      optimizer: The optimiser.
    """

    slabs: interslice_config.SlabConfig = dataclasses.field(
        default_factory=interslice_config.SlabConfig
    )
    mixer: interslice_config.MixerConfig = dataclasses.field(
        default_factory=interslice_config.MixerConfig
    )
    latent_size: int = 128
    intermediate_resolution: int = 0
    width: int = 32
    max_width: int = 128
    norm: blocks.Norm = blocks.Norm.NONE
    dropout: float = 0.1
    erase: erase_lib.EraseConfig = dataclasses.field(
        default_factory=erase_lib.EraseConfig
    )
    pixel_loss: losses.PixelLoss = losses.PixelLoss.L1
    reduction: losses.Reduction = losses.Reduction.SUM
    kl_weight: float = 1.0
    score: ScoreConfig = dataclasses.field(default_factory=ScoreConfig)
    residual: residuals.Residual = residuals.Residual.ABS
    sample_at_test: bool = False
    precision: base.Precision = base.Precision.FLOAT32
    accumulate_steps: int = 1
    ema_decay: float = 0.0
    optimizer: optim.OptimizerConfig = dataclasses.field(
        default_factory=optim.OptimizerConfig
    )

    def validate(self) -> None:
        """Raises ValueError for settings that cannot work."""
        autoencoding.check(
            self, ("latent_size",), ("intermediate_resolution", "kl_weight")
        )
        self.slabs.validate()
        self.mixer.validate(self.latent_size, (self.width, self.max_width))
        self.erase.validate()
        self.score.validate(
            "the inter-slice VAE",
            posterior=True,
            dropout=self.dropout > 0 or self.mixer.slice_dropout > 0,
        )
        base.check_training(self.accumulate_steps, self.ema_decay)
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
        asked = (score_functions(self), self.slabs, self.score, self.residual)
        return base.Method(
            inputs=base.Inputs(num_slices=self.slabs.num_slices),
            init=init,
            update=update,
            validate=functools.partial(validation_loss, self),
            score=slab_scores.scorer(*asked, sample=self.sample_at_test),
            host_score=slab_scores.host_scorer(*asked, sample=self.sample_at_test),
        )


def networks(
    config: InterSliceConfig, image_shape: tuple[int, ...]
) -> tuple[autoencoder.Encoder, sequence.Context | None, autoencoder.Decoder]:
    """Builds encoder, mixer (None for NONE) and decoder for images [..., H, W, C].

    Raises:
      ValueError: If the image does not fit the intermediate resolution.
    """
    height, width, channels = image_shape[-3:]
    shared = autoencoding.layers(config, image_shape)
    encoder = autoencoder.Encoder(
        latent_size=None if config.mixer.kind is Mixer.CONVGRU else config.latent_size,
        num_heads=2 if config.mixer.kind is Mixer.NONE else 1,
        **shared,
    )
    decoder = autoencoder.Decoder(image_shape=(height, width, channels), **shared)
    return encoder, config.mixer.make(config.latent_size), decoder


def init_model(config: InterSliceConfig, key: Key, batch: Batch) -> ModelState:
    """Initialises {"encoder", "context" (with a mixer), "decoder"}."""
    encoder, context, decoder = networks(config, batch.image.shape)
    size = config.slabs.num_slices
    keys = jax.random.split(key, 3)
    image = jnp.zeros((size, *batch.image.shape[-3:]), jnp.float32)
    codes, variables = encoder.init_with_output(keys[0], image)
    params = {"encoder": variables["params"]}
    if context is not None:
        valid = jnp.ones((1, size), bool)
        params["context"] = context.init(keys[1], codes[0][None], valid)["params"]
    code = jnp.zeros((1, config.latent_size))
    params["decoder"] = decoder.init(keys[2], code)["params"]
    return ModelState(params=params, collections={})


def encode(
    config: InterSliceConfig,
    params: dict[str, Tree],
    image: Array,
    valid: Array,
    hidden: Array | None = None,
) -> tuple[Array, Array]:
    """Gives every slice its posterior, in the light of the other valid slices.

    Args:
      config: The model.
      params: Of its networks.
      image: [B, S, H, W, C] float.
      valid: False on padding, [B, S] bool.
      hidden: True where the mixer must not see a slice's own token, [B, S] bool.

    Returns:
      Mean and log sigma, [B, S, latent_size] float32.
    """
    encoder, context, _ = networks(config, image.shape)
    rows = image.reshape(-1, *image.shape[2:])
    codes: Any = encoder.apply({"params": params["encoder"]}, rows)
    codes = tuple(code.reshape(*valid.shape, *code.shape[1:]) for code in codes)
    if context is None:
        return codes[0], codes[1]
    mixed: Any = context.apply({"params": params["context"]}, codes[0], valid, hidden)
    return mixed


def decode(
    config: InterSliceConfig,
    params: dict[str, Tree],
    code: Array,
    image_shape: tuple[int, ...],
    keys: Array | None = None,
) -> Array:
    """Decodes slices alone, `remat_slices` of each slab at a time.

    Args:
      config: The model.
      params: Of its networks.
      code: [B, S, latent_size] float32.
      image_shape: Shape of the images, [..., H, W, C].
      keys: Keys of the dropout, [B, S]; None = none.

    Returns:
      [B, S, H, W, C] float32.
    """
    _, _, decoder = networks(config, image_shape)

    def some(code: Array, keys: Array | None) -> Array:
        rows = code.reshape(-1, code.shape[-1])
        flat = None if keys is None else keys.reshape(-1)
        variables = {"params": params["decoder"]}
        out: Any = decoder.apply(variables, rows, dropout=config.dropout, keys=flat)
        return out.reshape(*code.shape[:2], *out.shape[1:])

    size = config.slabs.remat_slices
    if not size:
        return some(code, keys)
    again = jax.checkpoint(some)
    count = code.shape[1] // size
    parts = [
        jax.tree.map(lambda x, i=i: x[:, i * size : (i + 1) * size], (code, keys))
        for i in range(count)
    ]
    if jax.default_backend() == "cpu":
        # Convolution gradients inside lax.scan are 20 to 40 times slower on XLA:CPU.
        return jnp.concatenate([again(*part) for part in parts], axis=1)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *parts)
    out = jnp.moveaxis(jax.lax.map(lambda part: again(*part), stacked), 0, 1)
    return out.reshape(*code.shape[:2], *out.shape[3:])


def autoencode(
    config: InterSliceConfig,
    params: dict[str, Tree],
    image: Array,
    valid: Array,
    *,
    keys: Array | None = None,
    train: bool = False,
    sample: bool = True,
) -> tuple[Array, tuple[Array, Array]]:
    """Reconstructs slabs.

    Args:
      config: The model.
      params: Of its networks.
      image: [B, S, H, W, C] float.
      valid: False on padding, [B, S] bool.
      keys: One key per slice, [B, S]: a sample is decoded; None: the mean.
      train: Whether slices are hidden and dropout is on; needs keys.
      sample: False: the mean even with keys, which dropout needs.

    Returns:
      The reconstruction [B, S, H, W, C] float32 and (mu, log_sigma), each
      [B, S, latent_size] float32. Target.CENTRE: of the centre alone, [B, 1, ...].
    """
    streams: list[Array] = []
    if keys is not None:
        split = base.split_keys(keys.reshape(-1), 5)
        streams = list(split.reshape(-1, *keys.shape))
    hidden = None
    if train and config.mixer.kind is not Mixer.NONE:
        draw = jax.vmap(jax.vmap(jax.random.uniform))
        hidden = draw(streams[4]) < config.mixer.slice_dropout
    codes = encode(config, params, image, valid, hidden)
    mu, log_sigma = (centre(config, code) for code in codes)
    streams = [centre(config, keys) for keys in streams]
    if train:
        mu = _dropout(mu, config.dropout, streams[0])
        log_sigma = _dropout(log_sigma, config.dropout, streams[1])
    code = mu
    if keys is not None and sample:
        normal = jax.vmap(jax.vmap(lambda key: jax.random.normal(key, mu.shape[2:])))
        code = mu + jnp.exp(log_sigma) * normal(streams[2])
    output = decode(config, params, code, image.shape, streams[3] if train else None)
    return output, (mu, log_sigma)


def centre(config: InterSliceConfig, x: Array) -> Array:
    """What is decoded of [B, S, ...]: all of it, or [B, 1, ...] for Target.CENTRE."""
    if config.slabs.target is Target.ALL:
        return x
    return x[:, config.slabs.num_slices // 2][:, None]


def slice_keys(key: Key, batch: Batch) -> Array:
    """One key per slice of a batch of slabs, [B, S], of its volume and index alone."""
    uid = jnp.repeat(batch.uid, batch.valid.shape[1])
    keys = base.sample_keys(key, uid, batch.slice_index.reshape(-1))
    return keys.reshape(batch.valid.shape)


def loss(
    config: InterSliceConfig,
    params: dict[str, Tree],
    collections: dict[str, Tree],
    batch: Batch,
    key: Key,
    *,
    train: bool = True,
) -> tuple[Array, tuple[dict[str, Tree], Scalars]]:
    """Reconstruction error plus weighted KL divergence, averaged over valid slices.

    Args:
      config: The model.
      params: Of its networks.
      collections: Empty; handed through.
      batch: Slabs, image [B, S, H, W, C] float32.
      key: Key of the step.
      train: Whether the input is erased, slices are hidden and dropout is on. The
        code is sampled in either case.

    Returns:
      The loss [] and (collections, scalars). Scalars: "reconstruction" and "kl" as
      they enter the loss (kl before its weight), "l1" the mean absolute error.
    """
    keys = slice_keys(key, batch)
    given = batch.image
    if train:
        brain = batch.mask & batch.valid[:, :, None, None, None]
        slab_keys = base.split_keys(keys[:, 0], 6)[5]
        given = erase_lib.erase(config.erase, slab_keys, given, brain)
    output, codes = autoencode(
        config, params, given, batch.valid, keys=keys, train=train
    )
    valid = centre(config, batch.valid).reshape(-1)
    output, target, mu, log_sigma = (
        x.reshape(-1, *x.shape[2:])
        for x in (output, centre(config, batch.image), *codes)
    )
    terms = losses.pixels(config.pixel_loss, output, target)
    rows = losses.per_row(terms, config.reduction)
    l1 = losses.l1(output, target, losses.Reduction.MEAN)
    scalars = {
        "reconstruction": losses.mean_over_valid(rows, valid),
        "l1": losses.mean_over_valid(l1, valid),
        "kl": losses.mean_over_valid(losses.kl_normal(mu, log_sigma), valid),
    }
    value = scalars["reconstruction"] + config.kl_weight * scalars["kl"]
    return value, (collections, scalars)


def validation_loss(
    config: InterSliceConfig, model: ModelState, batch: Batch, key: Key
) -> Scalars:
    """The loss of whole inputs without dropout; its noise follows uid and slice."""
    value, (_, scalars) = loss(
        config, model.params, model.collections, batch, key, train=False
    )
    return {"loss": value, **scalars}


def reconstruct_slab(
    config: InterSliceConfig,
    model: ModelState,
    image: Array,
    valid: Array,
    keys: Array | None = None,
) -> Array:
    """Pseudo-healthy version of slabs.

    Args:
      config: The model.
      model: Its parameters.
      image: [B, S, H, W, C] float32.
      valid: False on padding, [B, S] bool.
      keys: One key per slice, [B, S]: from a sample of the code; None: from its mean.

    Returns:
      [B, S, H, W, C] float32; of the centre alone, [B, 1, H, W, C], for Target.CENTRE.
    """
    return autoencode(config, model.params, image, valid, keys=keys)[0]


def score_functions(config: InterSliceConfig) -> slab_scores.SlabFunctions:
    """What the shared scores need of the method."""

    def run(
        model: ModelState,
        image: Array,
        valid: Array,
        keys: Array | None,
        *,
        sample: bool,
        dropout: bool,
    ) -> tuple[Array, Array]:
        output, codes = autoencode(
            config, model.params, image, valid, keys=keys, train=dropout, sample=sample
        )
        mu, log_sigma = (x.reshape(-1, x.shape[-1]) for x in codes)
        return output, losses.kl_normal(mu, log_sigma).reshape(output.shape[:2])

    def weight(pixels: int) -> float | Array:
        # Of the loss, whose mean over the pixels the scores take as a sum.
        mean = config.reduction is losses.Reduction.MEAN
        return config.kl_weight * (pixels if mean else 1)

    return slab_scores.SlabFunctions(run, weight, config.pixel_loss)


def _dropout(x: Array, rate: float | Array, keys: Array) -> Array:
    rows = x.reshape(-1, *x.shape[2:])
    return blocks.dropout(rows, rate, keys.reshape(-1)).reshape(x.shape)
