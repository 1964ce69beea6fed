"""What methods of an encoder and a decoder share: sizes, one pass, scores."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from uad_jax.nn import autoencoder, blocks
from uad_jax.ops import losses
from uad_jax.score_functions import Functions, Terms
from uad_jax.types import Array, Key, ModelState, Tree


class Sizes(Protocol):
    """Fields that the configs of these methods have in common."""

    intermediate_resolution: int
    width: int
    max_width: int
    norm: blocks.Norm
    dropout: float
    precision: Any


def check(config: Sizes, positive: Sequence[str], not_negative: Sequence[str]) -> None:
    """Refuses sizes that cannot work.

    Args:
      config: The config.
      positive: Fields that must be 1 or more.
      not_negative: Fields that must be 0 or more.

    Raises:
      ValueError: If a field is out of its range.
    """
    for least, names in ((1, positive), (0, not_negative)):
        for name in names:
            if getattr(config, name) < least:
                raise ValueError(
                    f"{name} is {getattr(config, name)}; use {least} or more."
                )
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout is {config.dropout}; it must lie in [0, 1).")
    if config.width < 8 or config.width % 8:
        raise ValueError(f"width is {config.width}; use a multiple of 8.")
    if config.max_width < config.width or config.max_width % 8:
        raise ValueError(
            f"max_width is {config.max_width}; use a multiple of 8 that is at least "
            f"width = {config.width}."
        )


def layers(config: Sizes, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """The fields that encoder and decoder share, for images of shape (..., H, W, C).

    Raises:
      ValueError: If the image does not fit the intermediate resolution.
    """
    height, width = image_shape[-3:-1]
    return {
        "num_levels": blocks.num_levels(height, width, config.intermediate_resolution),
        "width": config.width,
        "max_width": config.max_width,
        "norm": config.norm,
        "dtype": jnp.dtype(config.precision.value),
    }


class Networks(NamedTuple):
    """The modules; their parameters bear these names.

    Attributes:
      encoder: Two heads are the mean and the log sigma of a Gaussian code.
      decoder: Maps a code back to an image.
    """

    encoder: autoencoder.Encoder
    decoder: autoencoder.Decoder


def init_model(
    networks: Networks, key: Key, image_shape: tuple[int, ...]
) -> ModelState:
    """Initialises {"encoder": ..., "decoder": ...} for images of shape (..., H, W, C).

    Args:
      networks: The modules.
      key: Key of the parameters.
      image_shape: Shape of the images.
    """
    image = jnp.zeros((1, *image_shape[-3:]), jnp.float32)
    encoder_key, decoder_key = jax.random.split(key)
    codes, encoder_variables = networks.encoder.init_with_output(encoder_key, image)
    decoder_variables = networks.decoder.init(decoder_key, codes[0])
    return ModelState(
        params={
            "encoder": encoder_variables.get("params", {}),
            "decoder": decoder_variables["params"],
        },
        collections={},
    )


def autoencode(
    networks: Networks,
    params: dict[str, Tree],
    image: Array,
    *,
    keys: Array | None = None,
    dropout: float | Array | None = None,
    sampled: bool | Array = True,
) -> tuple[Array, tuple[Array, ...]]:
    """Reconstructs slices.

    Args:
      networks: The modules.
      params: {"encoder": ..., "decoder": ...}.
      image: [N, H, W, C] float.
      keys: One key per slice, [N]; None: nothing is random.
      dropout: Rate of dropout on the codes and in a dense decoder; needs keys. None =
        off.
      sampled: Whether a Gaussian code is drawn, for all slices or for each, [N] bool;
        elsewhere it is the mean. Needs keys.

    Returns:
      The reconstruction [N, H, W, C] float32 and the codes: (code,), or (mu,
      log_sigma), float32.
    """
    encoder, decoder = networks
    streams = [None] * 4 if keys is None else list(split(keys, 4))
    drops = dropout is not None and keys is not None
    rate = dropout if dropout is not None else 0.0
    codes = _apply(
        encoder,
        params["encoder"],
        image,
        dropout=rate,
        keys=streams[: encoder.num_heads] if drops else None,
    )
    code = codes[0]
    if encoder.num_heads == 2 and keys is not None and sampled is not False:
        draw = jax.vmap(lambda key: jax.random.normal(key, code.shape[1:]))
        noise = jnp.exp(codes[1]) * draw(streams[2])
        if sampled is not True:
            rows = jnp.asarray(sampled).reshape(-1, *[1] * (code.ndim - 1))
            noise = jnp.where(rows, noise, 0.0)
        code = code + noise
    reconstruction = _apply(
        decoder,
        params["decoder"],
        code,
        dropout=rate,
        keys=streams[3] if drops else None,
    )
    return reconstruction, codes


def _apply(module: nn.Module, params: Tree, x: Array, **kwargs: Any) -> Any:
    return module.apply({"params": params}, x, **kwargs)


def split(keys: Array, count: int) -> Array:
    """Splits the keys of the rows [N] into `count` independent sets [count, N]."""
    return jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, count))(keys), 1, 0)


def score_functions(
    build: Callable[[tuple[int, ...]], Networks],
    dropout: float | Array,
    kl_weight: float | Array = 0.0,
    pixel_loss: losses.PixelLoss = losses.PixelLoss.L1,
) -> Functions:
    """What the shared scores need of a method of one encoder and one decoder.

    Args:
      build: Shape of the images -> the modules.
      dropout: Rate, where a score drops units.
      kl_weight: Of the divergence of a Gaussian code, summed over the code.
      pixel_loss: The error of the method's own loss.
    """

    def reconstruct(
        model: ModelState,
        image: Array,
        keys: Array | None,
        *,
        sample: bool,
        dropout: bool,
    ) -> Array:
        return autoencode(
            build(image.shape),
            model.params,
            image,
            keys=keys,
            dropout=rate if dropout else None,
            sampled=sample,
        )[0]

    def terms(
        model: ModelState, image: Array, keys: Array | None, kind: losses.PixelLoss
    ) -> Terms:
        networks = build(image.shape)
        output, codes = autoencode(networks, model.params, image, keys=keys)
        error = losses.pixels(kind, output, image)
        rows = losses.per_row(error, losses.Reduction.SUM)
        gaussian = networks.encoder.num_heads == 2
        kl = losses.kl_normal(codes[0], codes[1]) if gaussian else jnp.zeros_like(rows)
        return Terms(output, rows, kl)

    rate = dropout
    return Functions(reconstruct, terms, kl_weight, pixel_loss)
