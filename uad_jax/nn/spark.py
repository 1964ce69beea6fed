"""SparK: a masked ResNet-50 that learns to fill in what it did not see.

Source: Tian et al. 2023, "Designing BERT for convolutional networks: sparse and
hierarchical masked modeling", with the light decoder and the sizes that Behrendt et al.
2023 ("Guided reconstruction with conditioned diffusion models") pretrain cDDPM's
encoder with.

Deviations: the transposed convolutions are written in sub-pixel form (the same
parameters and numbers), as the dilated one has a slow kernel gradient on XLA:CPU.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uad_jax.nn import blocks, initialisers, resnet

SPREAD = 0.02  # deviation of fresh kernels and mask tokens


class SparK(nn.Module):
    """Reconstructs images from some of their 32x32 cells.

    The backbone's parameters and statistics, under "backbone", are what a
    `resnet.ConditionEncoder` starts from.

    Attributes:
      channels: Channels of the image.
      stage_sizes: Blocks per stage of the backbone.
      width: Channels of the backbone's stem.
      decoder_width: Channels of the decoder's first stage, halved per stage.
      dtype: Type of the computation; parameters, statistics and output are float32.
    """

    channels: int = 1
    stage_sizes: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    decoder_width: int = 512
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        image: jax.Array,
        active: jax.Array,
        *,
        train: bool = False,
        valid: jax.Array | None = None,
        drop_path: float | jax.Array = 0.0,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Fills in the cells that are not active.

        Args:
          image: [N, H, W, C], sides multiples of 32.
          active: Cells that are seen, [N, H / 32, W / 32] bool.
          train: Whether batch statistics are used and stored.
          valid: Rows that count in the batch statistics, [N] bool; None = all.
          drop_path: Rate at which blocks are skipped, as in `ResNet`.
          keys: Keys of the rows, [N]; None = no block is skipped.

        Returns:
          [N, H, W, channels] float32, of the active cells too.

        Raises:
          ValueError: If `active` does not fit the image.
        """
        backbone = resnet.ResNet(
            self.stage_sizes, self.width, self.width, self.dtype, name="backbone"
        )
        stages = backbone(
            image,
            train=train,
            active=active,
            valid=valid,
            drop_path=drop_path,
            keys=keys,
        )
        filled = []
        for index, stage in enumerate(reversed(stages)):
            features, size = self.decoder_width >> index, 1 if index == 0 else 3
            fill = Densify(features, size, self.dtype, name=f"densify_{index}")
            filled.append(fill(stage, active, train, valid))
        x = filled[0]
        for index in range(resnet.STRIDE.bit_length() - 1):
            if 0 < index < len(filled):
                x = x + filled[index]
            features = self.decoder_width >> index
            decode = DecoderStage(features, self.dtype, name=f"decode_{index}")
            x = decode(x, train, valid)
        return nn.Conv(
            self.channels,
            (1, 1),
            kernel_init=nn.initializers.normal(SPREAD),
            name="out",
        )(x.astype(jnp.float32))


class Densify(nn.Module):
    """Puts a learned token where nothing was seen, and maps to the decoder's width.

    Attributes:
      features: Channels of the output.
      size: Side of the convolution.
      dtype: Type of the computation.
    """

    features: int
    size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        active: jax.Array,
        train: bool,
        valid: jax.Array | None,
    ) -> jax.Array:
        """Maps [N, H, W, C] to [N, H, W, features]; arguments as in `SparK`."""
        channels = x.shape[-1]
        x = resnet.batch_norm(x, self.dtype, "norm", train, active, valid)
        init = nn.initializers.truncated_normal(SPREAD, lower=-1.0, upper=1.0)
        token = self.param("token", init, (channels,)).astype(self.dtype)
        token = jnp.broadcast_to(token.reshape(1, 1, 1, channels), x.shape)
        x = jnp.where(resnet.cells_at(x, active), x, token)
        if channels == self.features and self.size == 1:
            return x
        return nn.Conv(
            self.features,
            (self.size, self.size),
            dtype=self.dtype,
            name="conv",
            **initialisers.uniform(self.size**2 * channels),
        )(x)


class DecoderStage(nn.Module):
    """Doubles the sides, then two normalised convolutions that halve the channels.

    Attributes:
      features: Channels of the input; the output has half.
      dtype: Type of the computation.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, valid: jax.Array | None) -> jax.Array:
        """Maps [N, H, W, features] to [N, 2 H, 2 W, features / 2]."""
        dtype = self.dtype
        kernel = self.param(
            "up_kernel",
            nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            (4, 4, self.features, self.features),
        )
        bias = self.param("up_bias", nn.initializers.zeros, (self.features,))
        x = conv_transpose(x.astype(dtype), kernel.astype(dtype))
        x = x + bias.astype(dtype).reshape(1, 1, 1, -1)
        x = _conv(x, self.features, dtype, "conv_0")
        x = resnet.batch_norm(x, dtype, "norm_0", train, None, valid)
        x = _conv(nn.relu6(x), self.features // 2, dtype, "conv_1")
        return resnet.batch_norm(x, dtype, "norm_1", train, None, valid)


def conv_transpose(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """PyTorch's ConvTranspose2d of size 4, stride 2 and padding 1.

    Output 2 m reads tap 1 at input m and tap 3 at m - 1, output 2 m + 1 tap 2 at m and
    tap 0 at m + 1. So one 3x3 convolution gives the four outputs of each input pixel.

    Args:
      x: [N, H, W, Cin].
      kernel: [4, 4, Cin, Cout], PyTorch's weight with its axes moved to (2, 3, 0, 1).

    Returns:
      [N, 2 H, 2 W, Cout].
    """
    # Taps by (input m - 1, m, m + 1) x (output 2 m, 2 m + 1); tap 4 is zero.
    order = jnp.array([3, 4, 1, 2, 4, 0])
    taps = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))[order][:, order]
    return blocks.double(x, taps.reshape(3, 2, 3, 2, *kernel.shape[2:]))


def _conv(x: jax.Array, features: int, dtype: Any, name: str) -> jax.Array:
    return nn.Conv(
        features,
        (3, 3),
        use_bias=False,
        kernel_init=nn.initializers.normal(SPREAD),
        dtype=dtype,
        name=name,
    )(x)
