"""Building blocks of the unified autoencoder of Baur et al. (2021).

The defaults follow the authors' Keras code and differ from Flax: LeakyReLU slope
0.3, Glorot uniform kernels, normalisation epsilon 1e-3.
"""

import enum
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

LEAKY_SLOPE = 0.3
EPSILON = 1e-3

glorot_uniform = nn.initializers.glorot_uniform


class Norm(enum.Enum):
    """Normalisation after a convolution."""

    NONE = "none"  # the published results
    CHANNEL_AFFINE = "channel_affine"  # what "batch norm" is in the released code
    GROUP = "group"
    LAYER = "layer"  # over the pixels of each channel; scale and shift per pixel


class ChannelAffine(nn.Module):
    """Scale and shift per channel, divided by sqrt(1 + 1e-3).

    The released code builds batch normalisation that never leaves inference mode:
    its moving mean stays 0 and its moving variance 1.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to the same shape."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        scale = (scale / math.sqrt(1.0 + EPSILON)).astype(self.dtype)
        shape = (1,) * (x.ndim - 1) + (channels,)
        return x * scale.reshape(shape) + bias.astype(self.dtype).reshape(shape)


def normalise(x: jax.Array, norm: Norm, dtype: Any) -> jax.Array:
    """Applies the chosen normalisation inside a compact module."""
    if norm is Norm.CHANNEL_AFFINE:
        return ChannelAffine(dtype=dtype)(x)
    if norm is Norm.GROUP:
        groups = math.gcd(8, x.shape[-1])
        return nn.GroupNorm(num_groups=groups, epsilon=EPSILON, dtype=dtype)(x)
    if norm is Norm.LAYER:
        # The released code's LayerNormalization([1, 2]): parameters are [H, W].
        axes = (1, 2)
        return nn.LayerNorm(
            reduction_axes=axes, feature_axes=axes, epsilon=EPSILON, dtype=dtype
        )(x)
    return x


def leaky_relu(x: jax.Array) -> jax.Array:
    """LeakyReLU with the Keras slope of 0.3."""
    return nn.leaky_relu(x, LEAKY_SLOPE)


class ConvTranspose(nn.Module):
    """Transposed 5x5 convolution of stride 2, SAME, in sub-pixel form.

    Parameters and result are those of `nn.ConvTranspose(features, (5, 5), (2, 2))`.
    Each of the four output phases is a 3x3 convolution of the small input, so one
    3x3 convolution and a depth-to-space replace the dilated one, whose kernel
    gradient is an order of magnitude slower on XLA:CPU.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, Cin] to [N, 2 H, 2 W, features]."""
        shape = (5, 5, x.shape[-1], self.features)
        kernel = self.param("kernel", glorot_uniform(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = conv_transpose(x.astype(self.dtype), kernel.astype(self.dtype))
        return x + bias.astype(self.dtype).reshape(1, 1, 1, -1)


def conv_transpose(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Equals `lax.conv_transpose(x, kernel, (2, 2), "SAME")` for 5x5 kernels.

    Output 2 m + 1 reads taps 0, 2, 4 at inputs m - 1, m, m + 1, and output 2 m
    reads taps 1, 3 at m - 1, m: tap k belongs to offset k // 2 and phase 1 - k % 2.

    Args:
      x: [N, H, W, Cin].
      kernel: [5, 5, Cin, Cout].

    Returns:
      [N, 2 H, 2 W, Cout].
    """
    taps = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))
    taps = taps.reshape(3, 2, 3, 2, *kernel.shape[2:])[:, ::-1, :, ::-1]
    return double(x, taps)


def double(x: jax.Array, taps: jax.Array) -> jax.Array:
    """A transposed convolution of stride 2 as one convolution and depth-to-space.

    Args:
      x: [N, H, W, Cin].
      taps: What output 2 m + phase reads of input m - 1 + offset, [3 offsets, 2
        phases, 3 offsets, 2 phases, Cin, Cout].

    Returns:
      [N, 2 H, 2 W, Cout].
    """
    batch, height, width, channels = x.shape
    features = taps.shape[-1]
    taps = taps.transpose(0, 2, 4, 1, 3, 5).reshape(3, 3, channels, 4 * features)
    x = jax.lax.conv_general_dilated(
        x, taps, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = x.reshape(batch, height, width, 2, 2, features).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, 2 * height, 2 * width, features)


class StridedConv(nn.Module):
    """5x5 convolution of stride 2, SAME, in space-to-depth form: for critics.

    Parameters and result are those of `nn.Conv(features, (5, 5), (2, 2))`. A gradient
    penalty differentiates the slope of a critic by its kernels. Of a strided
    convolution that is a dilated one, which XLA:CPU computes 10 to 20 times slower
    than here, where all derivatives have stride 1. First derivatives are a little
    slower here, so encoders have `nn.Conv`.
    """

    features: int
    dtype: Any = jnp.float32
    precision: jax.lax.Precision | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, 2 H, 2 W, Cin] to [N, H, W, features]."""
        shape = (5, 5, x.shape[-1], self.features)
        kernel = self.param("kernel", glorot_uniform(), shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = conv_stride2(x.astype(self.dtype), kernel, self.precision)
        return x + bias.astype(self.dtype).reshape(1, 1, 1, -1)


def conv_stride2(
    x: jax.Array, kernel: jax.Array, precision: jax.lax.Precision | None = None
) -> jax.Array:
    """Equals `lax.conv(x, kernel, (2, 2), "SAME")` for 5x5 kernels and even sides.

    Output m reads tap k at input 2 m - 1 + k. With one more tap, 0, in front, it reads
    three blocks of two: tap k belongs to block m - 1 + (k + 1) // 2.

    Args:
      x: [N, 2 H, 2 W, Cin].
      kernel: [5, 5, Cin, Cout].
      precision: Of the products.

    Returns:
      [N, H, W, Cout].
    """
    batch, height, width, channels = x.shape
    blocks = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    blocks = blocks.transpose(0, 1, 3, 2, 4, 5)
    taps = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0)))
    taps = taps.reshape(3, 2, 3, 2, *kernel.shape[2:]).transpose(0, 2, 1, 3, 4, 5)
    return jax.lax.conv_general_dilated(
        blocks.reshape(batch, height // 2, width // 2, 4 * channels),
        taps.reshape(3, 3, 4 * channels, -1),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )


def dropout(x: jax.Array, rate: float | jax.Array, keys: jax.Array | None) -> jax.Array:
    """Drops entries of each row with that row's own key.

    Args:
      x: [N, ...].
      rate: Share of dropped entries in [0, 1); may be a traced scalar.
      keys: One key per row, [N]; None switches dropout off.

    Returns:
      x / (1 - rate) where kept, else 0, so that the mean is unchanged.
    """
    if keys is None or (isinstance(rate, float) and rate == 0.0):
        return x
    draw = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:]))(keys)
    return jnp.where(draw >= rate, x / jnp.asarray(1.0 - rate, x.dtype), 0)


def num_levels(height: int, width: int, resolution: int) -> int:
    """Number of halvings from the image down to the code.

    Args:
      height: Image height in pixels.
      width: Image width in pixels.
      resolution: Side of the code along the shorter image side; 0 = a sixteenth.

    Returns:
      n with min(height, width) = resolution * 2^n.

    Raises:
      ValueError: If no such n exists, or the longer side is no multiple of 2^n. (The
        released code rounds instead: 96 pixels and resolution 8 give a 12x12 code.)
    """
    side = min(height, width)
    allowed = {
        side >> n: n
        for n in range(1, side.bit_length())
        if height % (1 << n) == 0 and width % (1 << n) == 0
    }
    wanted = resolution or side // 16
    if wanted in allowed:
        return allowed[wanted]
    raise ValueError(
        f"intermediate_resolution is {resolution or f'0 (= {side} / 16)'}, which does "
        f"not reach an image of {height}x{width} by doubling. "
        + (f"Use one of {list(allowed)}." if allowed else "Pad to even sides.")
    )
