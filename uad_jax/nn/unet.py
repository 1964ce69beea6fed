"""The U-Net of the diffusion methods: residual blocks that are told step and condition.

Source: Dhariwal & Nichol 2021, "Diffusion models beat GANs on image synthesis";
Behrendt et al. 2023, "Patched diffusion models for unsupervised anomaly detection in
brain MRI" and "Guided reconstruction with conditioned diffusion models for unsupervised
anomaly detection in brain MRIs". The released code names attention resolutions that
none of its levels matches, so the published networks attend in the middle only;
`attention_levels` is empty here for the same reason.

Parameters, statistics of normalisation, softmax and the step embedding are float32;
convolutions and the rest run in `dtype`.
"""

import enum
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uad_jax.nn import initialisers

GROUPS = 32
EPSILON = 1e-5  # PyTorch's; the default of Flax is 1e-6
MAX_PERIOD = 10_000.0
ZEROS = {"kernel_init": nn.initializers.zeros}


class Resample(enum.Enum):
    """What a residual block does to the sides of the image."""

    NONE = "none"
    HALVE = "halve"
    DOUBLE = "double"


def check_size(height: int, width: int, num_levels: int) -> None:
    """Raises ValueError if an image cannot be halved `num_levels - 1` times."""
    unit = 1 << (num_levels - 1)
    if height % unit == 0 and width % unit == 0 and min(height, width) > 0:
        return
    smaller = [max(unit, side // unit * unit) for side in (height, width)]
    larger = [-(-side // unit) * unit for side in (height, width)]
    raise ValueError(
        f"A U-Net of {num_levels} levels halves the image {num_levels - 1} times, so "
        f"both sides must be multiples of {unit}; the image is {height}x{width}. "
        f"Crop it to {smaller[0]}x{smaller[1]}, pad it to {larger[0]}x{larger[1]}, or "
        "use fewer levels."
    )


def embed_steps(steps: jax.Array, size: int) -> jax.Array:
    """Cosines, then sines, of the diffusion step at falling frequencies.

    Args:
      steps: Zero-based steps, [N]; not scaled by the number of steps.
      size: Features, even.

    Returns:
      [N, size] float32.
    """
    half = size // 2
    frequencies = jnp.exp(-math.log(MAX_PERIOD) * jnp.arange(half) / half)
    angles = steps.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class UNet(nn.Module):
    """Denoiser of images at a diffusion step. Its output is 0 after initialisation.

    Attributes:
      out_channels: Channels of the output.
      width: Channels of the first level; even.
      multipliers: Channels of each level in units of `width`.
      num_blocks: Residual blocks per level on the way down; one more on the way up.
      attention_levels: Levels with attention after each block; 0 = full resolution.
        The middle always attends.
      head_size: Channels per attention head.
      num_heads: Attention heads of every level; 0 = as many as `head_size` gives.
      film: Whether the embedding scales and shifts the normalised features (FiLM);
        False: it is added before the normalisation.
      conditional: Whether a condition vector is embedded beside the step.
      remat: Whether blocks are computed again in the backward pass to save memory.
      dtype: Type of the computation; parameters and output are float32.
    """

    out_channels: int = 1
    width: int = 128
    multipliers: Sequence[int] = (1, 2, 2)
    num_blocks: int = 3
    attention_levels: Sequence[int] = ()
    head_size: int = 64
    num_heads: int = 0
    film: bool = True
    conditional: bool = False
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, steps: jax.Array, condition: jax.Array | None = None
    ) -> jax.Array:
        """Denoises images.

        Args:
          x: Noisy images, [N, H, W, C].
          steps: Zero-based diffusion steps, [N] integer or float.
          condition: [N, K] if `conditional`, else None.

        Returns:
          [N, H, W, out_channels] float32.

        Raises:
          ValueError: If the sides cannot be halved at each level, or a condition is
            missing or not expected.
        """
        num_levels = len(self.multipliers)
        check_size(x.shape[1], x.shape[2], num_levels)
        embedding = self._embed(steps, condition)

        x = _conv(x.astype(self.dtype), self.width, 3, self.dtype, "stem")
        skips = [x]
        for level in range(num_levels):
            for index in range(self.num_blocks):
                x = self._block(x, embedding, level, f"down_{level}_{index}")
                skips.append(x)
            if level < num_levels - 1:
                name = f"down_{level}_halve"
                x = self._residual(x, embedding, level, name, Resample.HALVE)
                skips.append(x)

        x = self._residual(x, embedding, num_levels - 1, "middle_0")
        x = self._attend(x, "middle_attention")
        x = self._residual(x, embedding, num_levels - 1, "middle_1")

        for level in reversed(range(num_levels)):
            for index in range(self.num_blocks + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = self._block(x, embedding, level, f"up_{level}_{index}")
            if level > 0:
                name = f"up_{level}_double"
                x = self._residual(x, embedding, level, name, Resample.DOUBLE)

        x = nn.silu(_norm(x, jnp.float32, "out_norm"))
        return _conv(x, self.out_channels, 3, jnp.float32, "out_conv", zero=True)

    def _embed(self, steps: jax.Array, condition: jax.Array | None) -> jax.Array:
        """Activated embedding of step and condition, [N, E] float32."""
        if self.conditional != (condition is not None):
            found = "none" if condition is None else f"one of shape {condition.shape}"
            raise ValueError(
                f"conditional is {self.conditional}, but the condition given is "
                f"{found}. Give a condition exactly if the network is conditional."
            )
        size = 4 * self.width
        vector = _mlp(embed_steps(steps, self.width), size, "step")
        if condition is not None:
            embedded = _mlp(condition.astype(jnp.float32), size, "condition")
            vector = jnp.concatenate([vector, embedded], axis=-1)
        return nn.silu(vector)

    def _block(
        self, x: jax.Array, embedding: jax.Array, level: int, name: str
    ) -> jax.Array:
        x = self._residual(x, embedding, level, name)
        if level in self.attention_levels:
            x = self._attend(x, f"{name}_attention")
        return x

    def _residual(
        self,
        x: jax.Array,
        embedding: jax.Array,
        level: int,
        name: str,
        resample: Resample = Resample.NONE,
    ) -> jax.Array:
        module = nn.remat(ResidualBlock) if self.remat else ResidualBlock
        features = self.width * self.multipliers[level]
        block = module(features, resample, self.film, self.dtype, name=name)
        return block(x, embedding)

    def _attend(self, x: jax.Array, name: str) -> jax.Array:
        module = nn.remat(Attention) if self.remat else Attention
        size = self.head_size
        if self.num_heads:
            size = x.shape[-1] // self.num_heads
        return module(size, self.dtype, name=name)(x)


class ResidualBlock(nn.Module):
    """Two normalised convolutions around the embedding, added to the input.

    Attributes:
      features: Channels of the output.
      resample: Change of the sides, before the first convolution and on the skip.
      film: As in `UNet`.
      dtype: Type of the computation.
    """

    features: int
    resample: Resample = Resample.NONE
    film: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] and the activated embedding [N, E] to [N, h, w, features].

        Sides stay, halve or double with `resample`.
        """
        h = nn.silu(_norm(x, self.dtype, "norm_0"))
        h, x = _resample(h, self.resample), _resample(x, self.resample)
        h = _conv(h, self.features, 3, self.dtype, "conv_0")

        size = 2 * self.features if self.film else self.features
        signal = _dense(embedding, size, jnp.float32, "embed").astype(self.dtype)
        signal = signal[:, None, None, :]
        if self.film:
            scale, shift = jnp.split(signal, 2, axis=-1)
            h = _norm(h, self.dtype, "norm_1") * (1 + scale) + shift
        else:
            h = _norm(h + signal, self.dtype, "norm_1")
        h = _conv(nn.silu(h), self.features, 3, self.dtype, "conv_1", zero=True)
        if x.shape[-1] != self.features:
            x = _conv(x, self.features, 1, self.dtype, "skip")
        return x + h


class Attention(nn.Module):
    """Self-attention of all pixels, added to the input.

    The projection's channels are all queries, then all keys, then all values, each
    head by head.

    Attributes:
      head_size: Channels per head.
      dtype: Type of the computation; the softmax is float32.
    """

    head_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to the same shape.

        Raises:
          ValueError: If `head_size` does not divide C.
        """
        channels = x.shape[-1]
        if channels % self.head_size:
            raise ValueError(
                f"head_size is {self.head_size}, which does not divide the {channels} "
                f"channels where the U-Net attends. Use a divisor of {channels}."
            )
        h = _norm(x, self.dtype, "norm").reshape(x.shape[0], -1, channels)
        h = _dense(h, 3 * channels, self.dtype, "qkv")
        h = h.reshape(*h.shape[:2], 3, channels // self.head_size, self.head_size)
        h = jax.nn.dot_product_attention(h[:, :, 0], h[:, :, 1], h[:, :, 2])
        h = h.reshape(*h.shape[:2], channels)
        h = _dense(h, channels, self.dtype, "out", zero=True)
        return x + h.reshape(x.shape)


def _resample(x: jax.Array, resample: Resample) -> jax.Array:
    """Means of 2x2 pixels, or each pixel four times."""
    batch, height, width, channels = x.shape
    if resample is Resample.HALVE:
        shape = (batch, height // 2, 2, width // 2, 2, channels)
        return x.reshape(shape).mean(axis=(2, 4))
    if resample is Resample.DOUBLE:
        shape = (batch, height, 2, width, 2, channels)
        x = jnp.broadcast_to(x[:, :, None, :, None, :], shape)
        return x.reshape(batch, 2 * height, 2 * width, channels)
    return x


def _norm(x: jax.Array, dtype: Any, name: str) -> jax.Array:
    """Normalises 32 groups, or groups of 4 where those would be single channels.

    A group of one channel takes the mean off each channel, and with it an embedding
    that was added before.
    """
    channels = x.shape[-1]
    groups = math.gcd(GROUPS, channels)
    if groups == channels:
        groups = max(1, channels // 4)
    return nn.GroupNorm(groups, epsilon=EPSILON, dtype=dtype, name=name)(x)


def _mlp(x: jax.Array, size: int, name: str) -> jax.Array:
    x = nn.silu(_dense(x, size, jnp.float32, f"{name}_0"))
    return _dense(x, size, jnp.float32, f"{name}_1")


def _conv(
    x: jax.Array, features: int, size: int, dtype: Any, name: str, zero: bool = False
) -> jax.Array:
    init = ZEROS if zero else initialisers.uniform(size * size * x.shape[-1])
    return nn.Conv(features, (size, size), dtype=dtype, name=name, **init)(x)


def _dense(
    x: jax.Array, features: int, dtype: Any, name: str, zero: bool = False
) -> jax.Array:
    init = ZEROS if zero else initialisers.uniform(x.shape[-1])
    return nn.Dense(features, dtype=dtype, name=name, **init)(x)
