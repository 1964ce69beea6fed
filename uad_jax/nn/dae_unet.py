"""The U-Net of the denoising autoencoder: standardised weights, no bottleneck.

Source: Kascenas et al. 2022, "Denoising autoencoders for unsupervised anomaly detection
in brain MRI", and the authors' released code. The parameter counts of the published
sizes are tested to the unit.

Parameters, their standardisation and the statistics of normalisation are float32; the
rest runs in `dtype`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uad_jax.nn import initialisers, unet

_EPSILON = 1e-5  # of the standardisation and of group normalisation


def num_groups(channels: int) -> int:
    """Middle divisor of the channels: 8, 16, 16, 32 for 64, 128, 256, 512."""
    divisors = [n for n in range(1, channels + 1) if channels % n == 0]
    return divisors[len(divisors) // 2]


def check_size(height: int, width: int, num_levels: int) -> None:
    """Raises ValueError for images that the U-Net cannot halve and mirror."""
    unet.check_size(height, width, num_levels)
    least = 1 << num_levels
    if min(height, width) < least:
        raise ValueError(
            f"A U-Net of {num_levels} levels mirrors the border of its smallest map, "
            f"so both sides must be at least {least}; the image is {height}x{width}. "
            "Pad it, or use fewer levels."
        )


def standardise(kernel: jax.Array) -> jax.Array:
    """Gives each output filter the mean 0 and the standard deviation 1.

    Args:
      kernel: [3, 3, Cin, Cout] float32.

    Returns:
      Like `kernel`: minus its mean, over its unbiased standard deviation + 1e-5.
    """
    axes = tuple(range(kernel.ndim - 1))
    mean = kernel.mean(axes, keepdims=True)
    deviation = kernel.std(axes, keepdims=True, ddof=1)
    return (kernel - mean) / (deviation + _EPSILON)


class StandardisedConv(nn.Module):
    """A 3x3 convolution with standardised weights and a mirrored border."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, Cin] to [N, H, W, features]; H and W are at least 2."""
        channels = x.shape[-1]
        init = initialisers.uniform(9 * channels)
        kernel = self.param(
            "kernel", init["kernel_init"], (3, 3, channels, self.features), jnp.float32
        )
        bias = self.param("bias", init["bias_init"], (self.features,), jnp.float32)
        x = jnp.pad(x.astype(self.dtype), [(0, 0), (1, 1), (1, 1), (0, 0)], "reflect")
        x = jax.lax.conv_general_dilated(
            x,
            standardise(kernel).astype(self.dtype),
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return x + bias.astype(self.dtype).reshape(1, 1, 1, -1)


class Block(nn.Module):
    """Twice a convolution, Swish, and then the normalisation."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, Cin] to [N, H, W, features]."""
        for _ in range(2):
            x = nn.swish(StandardisedConv(self.features, self.dtype)(x))
            x = nn.GroupNorm(
                num_groups=num_groups(self.features), epsilon=_EPSILON, dtype=self.dtype
            )(x)
        return x


class Double(nn.Module):
    """Transposed 2x2 convolution of stride 2: one matrix product per pixel."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, Cin] to [N, 2 H, 2 W, features]."""
        batch, height, width, channels = x.shape
        init = initialisers.uniform(4 * self.features)  # PyTorch counts the outputs
        kernel = self.param(
            "kernel", init["kernel_init"], (2, 2, channels, self.features), jnp.float32
        )
        bias = self.param("bias", init["bias_init"], (self.features,), jnp.float32)
        x = jnp.einsum("nhwc,abcf->nhawbf", x, kernel.astype(self.dtype))
        x = x.reshape(batch, 2 * height, 2 * width, self.features)
        return x + bias.astype(self.dtype).reshape(1, 1, 1, -1)


class DaeUNet(nn.Module):
    """Maps an image to an image; there is no bottleneck but the halvings.

    Attributes:
      out_channels: Channels of the output.
      width: Channels of the first level, doubled per level.
      num_levels: Levels; the image is halved one time less.
      dtype: Type of the computation; parameters and output are float32.
    """

    out_channels: int = 1
    width: int = 64
    num_levels: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Denoises images.

        Args:
          x: [N, H, W, C].

        Returns:
          [N, H, W, out_channels] float32, not limited to any range.

        Raises:
          ValueError: If the sides cannot be halved at each level, or are too small.
        """
        check_size(x.shape[1], x.shape[2], self.num_levels)
        x = x.astype(self.dtype)
        skips = []
        for level in range(self.num_levels):
            if level:
                x = nn.avg_pool(x, (2, 2), (2, 2))
            x = self._block(x, level, "down")
            skips.append(x)
        skips.pop()
        for level in reversed(range(self.num_levels - 1)):
            features = self.width << level
            x = Double(features, self.dtype, name=f"double_{level}")(x)
            x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = self._block(x, level, "up")
        init = initialisers.uniform(x.shape[-1])
        return nn.Conv(self.out_channels, (1, 1), name="out", **init)(
            x.astype(jnp.float32)
        )

    def _block(self, x: jax.Array, level: int, way: str) -> jax.Array:
        features = self.width << level
        return Block(features, self.dtype, name=f"{way}_{level}")(x)
