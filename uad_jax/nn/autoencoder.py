"""Encoder and decoder shared by the autoencoders of Baur et al. (2021).

Source: Baur et al. 2021, "Autoencoders for unsupervised anomaly segmentation in brain
MR images: a comparative study", and the authors' released code. Parameter counts of
the published sizes are tested to the unit.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uad_jax.nn import blocks


class Encoder(nn.Module):
    """Strided convolutions, then a dense code, a spatial one, or none.

    Attributes:
      num_levels: Number of halvings.
      latent_size: Size of a dense code; None = the code is spatial.
      latent_channels: Channels of a spatial code; 0 = those of the feature map, which
        is the code itself if there is one head.
      num_heads: Codes that leave the encoder (2 = mean and log sigma).
      width: Channels of the first level, doubled per level.
      max_width: Most channels of any level.
      norm: Normalisation after each convolution.
      dtype: Type of the computation; parameters and codes are float32.
    """

    num_levels: int
    latent_size: int | None
    num_heads: int = 1
    latent_channels: int = 0
    width: int = 32
    max_width: int = 128
    norm: blocks.Norm = blocks.Norm.NONE
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        image: jax.Array,
        *,
        dropout: float | jax.Array = 0.0,
        keys: Sequence[jax.Array] | None = None,
    ) -> tuple[jax.Array, ...]:
        """Encodes slices.

        Args:
          image: [N, H, W, C].
          dropout: Rate of dropout on the codes.
          keys: Per head the keys of the rows, [N] each; None = no dropout.

        Returns:
          One code per head, [N, latent_size] or [N, h, w, channels], float32.
        """
        x = image.astype(self.dtype)
        for level in range(self.num_levels):
            features = min(self.max_width, self.width << level)
            x = nn.Conv(
                features,
                (5, 5),
                (2, 2),
                kernel_init=blocks.glorot_uniform(),
                dtype=self.dtype,
            )(x)
            x = blocks.leaky_relu(blocks.normalise(x, self.norm, self.dtype))
        count = range(self.num_heads)
        if self.latent_size is not None:
            x = _conv1x1(x.shape[-1] // 8, self.dtype)(x)
            x = x.reshape(x.shape[0], -1)
            codes = [_dense(self.latent_size, self.dtype)(x) for _ in count]
        elif self.latent_channels or self.num_heads > 1:
            channels = self.latent_channels or x.shape[-1]
            codes = [_conv1x1(channels, self.dtype)(x) for _ in count]
        else:
            codes = [x]
        if keys is not None:
            codes = [
                blocks.dropout(c, dropout, k) for c, k in zip(codes, keys, strict=True)
            ]
        return tuple(code.astype(jnp.float32) for code in codes)


class Decoder(nn.Module):
    """Maps a code back to an image; identity at the output.

    Attributes:
      num_levels: Number of doublings.
      image_shape: (H, W, C) of the image.
      width: Fewest channels of any level.
      max_width: Channels of the first level, halved per level.
      widen: Whether a 1x1 convolution gives a spatial code the encoder's channels.
      norm: Normalisation before the first and after each transposed convolution.
      dtype: Type of the computation; parameters and image are float32.
    """

    num_levels: int
    image_shape: tuple[int, int, int]
    width: int = 32
    max_width: int = 128
    widen: bool = False
    norm: blocks.Norm = blocks.Norm.NONE
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        code: jax.Array,
        *,
        dropout: float | jax.Array = 0.0,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Decodes codes.

        Args:
          code: Dense [N, latent_size], or spatial [N, h, w, channels].
          dropout: Rate of dropout on the output of the dense layer.
          keys: Keys of the rows, [N]; None = no dropout.

        Returns:
          [N, H, W, C] float32.
        """
        height, width, channels = self.image_shape
        x = code.astype(self.dtype)
        # The encoder's last width, so that both feature maps are of one shape.
        features = min(self.max_width, self.width << (self.num_levels - 1))
        if code.ndim == 2:
            shape = (height >> self.num_levels, width >> self.num_levels, features // 8)
            x = _dense(shape[0] * shape[1] * shape[2], self.dtype)(x)
            x = blocks.dropout(x, dropout, keys).reshape(-1, *shape)
        if code.ndim == 2 or self.widen:
            x = _conv1x1(features, self.dtype)(x)
        x = nn.relu(blocks.normalise(x, self.norm, self.dtype))
        for level in range(self.num_levels):
            features = max(self.width, self.max_width >> level)
            x = blocks.ConvTranspose(features, dtype=self.dtype)(x)
            x = blocks.leaky_relu(blocks.normalise(x, self.norm, self.dtype))
        return _conv1x1(channels, jnp.float32)(x.astype(jnp.float32))


def _conv1x1(features: int, dtype: Any) -> nn.Conv:
    return nn.Conv(features, (1, 1), kernel_init=blocks.glorot_uniform(), dtype=dtype)


def _dense(features: int, dtype: Any) -> nn.Dense:
    return nn.Dense(features, kernel_init=blocks.glorot_uniform(), dtype=dtype)
