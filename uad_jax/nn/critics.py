"""Critics of images and of codes.

Source: Baur et al. 2021, "Autoencoders for unsupervised anomaly segmentation in brain
MR images: a comparative study", and the authors' released code. Parameter counts of
the published sizes are tested to the unit. Critics compute in float32: their gradient
penalty differentiates twice. No layer mixes the rows of a batch.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uad_jax.nn import blocks

_LEAKY_SLOPE = 0.2  # of the critics of codes; images have 0.3 like the autoencoders
# True float32: by default recent GPUs multiply float32 in TF32.
_PRECISION = jax.lax.Precision.HIGHEST
_EXACT: dict[str, Any] = {
    "kernel_init": blocks.glorot_uniform(),
    "precision": _PRECISION,
}


class ConvCritic(nn.Module):
    """The encoder's convolutions, then one value per site or per image.

    Attributes:
      num_levels: Number of halvings.
      patch: A value for each site of the last feature map; False: one per image, of
        the mean over the sites.
      width: Channels of the first level, doubled per level.
      max_width: Most channels of any level.
      norm: Normalisation after each convolution.
    """

    num_levels: int
    patch: bool = True
    width: int = 32
    max_width: int = 128
    norm: blocks.Norm = blocks.Norm.LAYER

    @nn.compact
    def __call__(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Judges images.

        Args:
          image: [N, H, W, C].

        Returns:
          Values [N, sites] (or [N, 1]) and the last feature map [N, h, w, channels],
          float32.
        """
        x = image.astype(jnp.float32)
        for level in range(self.num_levels):
            features = min(self.max_width, self.width << level)
            conv = blocks.StridedConv(
                features, precision=_PRECISION, name=f"Conv_{level}"
            )
            x = conv(x)
            x = blocks.leaky_relu(blocks.normalise(x, self.norm, jnp.float32))
        value = nn.Dense(1, **_EXACT)
        sites = x if self.patch else x.mean(axis=(1, 2))
        return value(sites).reshape(len(x), -1), x


class CodeCritic(nn.Module):
    """A perceptron that judges codes.

    Attributes:
      hidden: Units of the hidden layers.
    """

    hidden: tuple[int, ...] = (50, 50)

    @nn.compact
    def __call__(self, code: jax.Array) -> jax.Array:
        """Maps codes [N, ...] to values [N, 1] float32."""
        x = code.reshape(len(code), -1).astype(jnp.float32)
        for units in self.hidden:
            x = nn.Dense(units, **_EXACT)(x)
            x = nn.leaky_relu(x, _LEAKY_SLOPE)
        return nn.Dense(1, **_EXACT)(x)
