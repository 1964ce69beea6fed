"""One pass through an encoder and a decoder: codes, their noise, dropout."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from uad_jax.nn import autoencoder
from uad_jax.types import Array, Key, ModelState, Tree


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
