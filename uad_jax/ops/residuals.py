"""Anomaly maps of volumes from what a reconstruction leaves of them."""

import enum

import jax
import jax.numpy as jnp

from uad_jax.ops import filters
from uad_jax.types import Array

_SIGMA = 1.0  # voxels; with the truncation of 3.5 a window of 9 x 9 x 9
_LEAST_RANGE = 1e-2  # flatter volumes count as having this range, which avoids 0 / 0


class Residual(enum.Enum):
    """How volumes and their reconstructions become anomaly maps."""

    ABS = "abs"
    POSITIVE = "positive"  # brighter than expected: lesions on FLAIR and T2
    SQUARED = "squared"
    SSIM = "ssim"  # 1 - local structural similarity in three dimensions


def anomaly_map(kind: Residual, image: Array, output: Array, valid: Array) -> Array:
    """Compares volumes with their reconstructions.

    Args:
      kind: The residual.
      image: Volumes, [B, D, H, W, C] float.
      output: Their reconstructions, the shape of `image`.
      valid: False on padded slices, which lie at the end, [B, D] bool. SSIM does not
        look at them; what the map holds there means nothing.

    Returns:
      [B, D, H, W] float32, the mean over the channels; higher = more different.
    """
    image, output = image.astype(jnp.float32), output.astype(jnp.float32)
    if kind is Residual.SSIM:
        return 1.0 - local_ssim(image, output, valid).mean(axis=-1)
    difference = image - output
    if kind is Residual.POSITIVE:
        difference = jnp.maximum(difference, 0.0)
    elif kind is Residual.SQUARED:
        difference = jnp.square(difference)
    else:
        difference = jnp.abs(difference)
    return difference.mean(axis=-1)


def local_ssim(x: Array, y: Array, valid: Array) -> Array:
    """Structural similarity around each voxel, channel by channel.

    The window is Gaussian with a standard deviation of 1 voxel, cut to 9 x 9 x 9, and
    mirrored at the border. The data range of a channel is the larger of the two
    volumes' own.

    Args:
      x: Volumes, [B, D, H, W, C] float32.
      y: Like `x`.
      valid: False on padded slices at the end, [B, D] bool.

    Returns:
      [B, D, H, W, C] float32, at most 1. A volume of one slice gives the similarity of
      images.

    Source: Wang et al. 2004; the released code of Behrendt et al. 2024, "Combining
    reconstruction-based unsupervised anomaly detection with supervised segmentation".
    """

    def one(x: Array, y: Array, valid: Array) -> Array:
        """One channel of one volume: [D, H, W] and [D]."""
        data_range = jnp.maximum(_range(x, valid), _range(y, valid))
        return filters.ssim(
            x,
            y,
            data_range=jnp.maximum(data_range, _LEAST_RANGE),
            num_axes=3,
            sigma=_SIGMA,
            return_map=True,
            num_valid=valid.sum(),
        )

    over_channels = jax.vmap(one, in_axes=(-1, -1, None), out_axes=-1)
    return jax.vmap(over_channels)(x, y, valid)


def _range(x: Array, valid: Array) -> Array:
    """Largest minus smallest value of the valid slices of [D, H, W]; -inf if none."""
    keep = valid[:, None, None]
    return jnp.where(keep, x, -jnp.inf).max() - jnp.where(keep, x, jnp.inf).min()
