"""Random contrast, bias field, blur and ghosting, on the device and keyed per sample.

Each follows the transform of that name in TorchIO 0.18, which the code of the
conditioned diffusion models applies in this order. Images are slices [N, H, W, C] or
volumes [N, D, H, W, C] of about [0, 1].

Source: Perez-Garcia et al. 2021, "TorchIO".

Deviations on single slices, where the reference augments the volume and then takes a
slice: the bias field is the volume's at a uniform height, blur stays in the plane, and
ghosts run along one of the two axes of the plane.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from uad_jax.ops import filters
from uad_jax.types import Array, Key

_ORDER = 3  # of the bias field's polynomial
_MONOMIALS = np.array([e for e in np.ndindex(4, 4, 4) if sum(e) <= _ORDER])
_TRUNCATE = 4.0  # radius of the blur in standard deviations
_GHOSTS = (4, 10)  # fewest and most


@dataclasses.dataclass
class AugmentConfig:
    """How often and how strongly images are changed.

    The defaults are those of the conditioned diffusion models at 2 mm. Probabilities
    are per sample; 0 leaves a change out.

    Attributes:
      gamma_probability: Of a new contrast, sign(x) |x|^g.
      max_log_gamma: log g is uniform in [-max_log_gamma, max_log_gamma].
      bias_probability: Of a bias field, the exponential of a cubic polynomial.
      max_bias: Its coefficients are uniform in [-max_bias, max_bias].
      blur_probability: Of a Gaussian blur.
      max_blur: Its standard deviation in voxels is uniform in [0, max_blur], for each
        axis anew. Fixes the size of the kernel, so it may not be traced.
      ghost_probability: Of 4 to 10 ghosts along one axis.
      min_ghost: Least strength of the ghosts.
      max_ghost: Greatest strength; 1 removes the planes from k-space.
    """

    gamma_probability: float = 0.5
    max_log_gamma: float = 0.3
    bias_probability: float = 0.25
    max_bias: float = 0.5
    blur_probability: float = 0.25
    max_blur: float = 1.0
    ghost_probability: float = 0.5
    min_ghost: float = 0.5
    max_ghost: float = 1.0

    def validate(self) -> None:
        """Raises ValueError for settings that cannot work."""
        for name, value in vars(self).items():
            if name.endswith("probability") and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; it must lie in [0, 1].")
            if value < 0:
                raise ValueError(f"{name} is {value}; use 0 or more.")
        if self.min_ghost > self.max_ghost:
            raise ValueError(
                f"min_ghost is {self.min_ghost}, above max_ghost = {self.max_ghost}."
            )


def none() -> AugmentConfig:
    """Settings that change nothing."""
    return AugmentConfig(
        gamma_probability=0.0,
        bias_probability=0.0,
        blur_probability=0.0,
        ghost_probability=0.0,
    )


def augment(config: AugmentConfig, keys: Key, images: Array) -> Array:
    """Changes images at random.

    Args:
      config: How often and how strongly.
      keys: One key per sample, [N].
      images: [N, H, W, C] or [N, D, H, W, C] float32.

    Returns:
      Changed images. A sample that no change hits keeps its bits; any other depends on
      its key and its own voxels only.
    """
    changes = (
        (config.gamma_probability, _random_gamma, 1),
        (config.bias_probability, _random_bias, len(_MONOMIALS) + 1),
        (config.blur_probability, _random_blur, 3),
        (config.ghost_probability, _random_ghosts, 3),
    )

    def one(key: Key, image: Array) -> Array:
        # All numbers are drawn at once, whatever is used: one draw compiles fast, and
        # leaving one change out does not alter the others.
        total = sum(1 + count for _, _, count in changes)
        drawn = jax.random.uniform(key, (total,))
        start = 0
        for probability, change, count in changes:
            gate, numbers = drawn[start], drawn[start + 1 : start + 1 + count]
            start += 1 + count
            if isinstance(probability, float | int) and probability == 0:
                continue
            changed = change(config, numbers, image)
            image = jnp.where(gate < probability, changed, image)
        return image

    return jax.vmap(one)(keys, images.astype(jnp.float32))


def gamma(image: Array, exponent: Array | float) -> Array:
    """Raises magnitudes to a power and keeps signs: sign(x) |x|^g."""
    return jnp.sign(image) * jnp.abs(image) ** exponent


def bias_field(
    shape: tuple[int, ...], coefficients: Array, height: Array | float = 0.0
) -> Array:
    """Evaluates a bias field.

    Args:
      shape: (H, W) or (D, H, W).
      coefficients: Of x^i y^j z^k with i + j + k <= 3, in the order of rising (i, j,
        k), [20] float32. Coordinates run from -1 to 1 over each axis; x, y, z are the
        axes H, W, D.
      height: Place of a slice along z, in [-1, 1].

    Returns:
      exp(polynomial), shape `shape`.
    """
    axes = [_coordinate(size) for size in shape]
    if len(shape) == 2:
        axes = [jnp.asarray(height, jnp.float32).reshape(1), *axes]
    z, x, y = (axis[:, None] ** np.arange(_ORDER + 1)[None] for axis in axes)
    cube = jnp.zeros((_ORDER + 1,) * 3).at[tuple(_MONOMIALS.T)].set(coefficients)
    field = jnp.einsum("ijk,xi,yj,zk->zxy", cube, x, y, z)
    return jnp.exp(field).reshape(shape)


def _coordinate(size: int) -> Array:
    return jnp.linspace(-1.0, 1.0, size) if size > 1 else jnp.zeros(1)


def blur(image: Array, sigma: Array, max_sigma: float) -> Array:
    """Blurs each spatial axis by a Gaussian of its own width.

    Args:
      image: [H, W, C] or [D, H, W, C] float32.
      sigma: Standard deviation in voxels for each spatial axis, [2] or [3], at most
        `max_sigma`; may be traced.
      max_sigma: Fixes the size of the kernel.

    Returns:
      Like `image`, equal to `scipy.ndimage.gaussian_filter` to float32 rounding.
    """
    radius = int(_TRUNCATE * max_sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    for axis, width in enumerate(sigma):
        size = image.shape[axis]
        kernel = jnp.exp(-0.5 * (offsets / jnp.maximum(width, 1e-6)) ** 2)
        inside = jnp.abs(offsets) <= jnp.floor(_TRUNCATE * width + 0.5)
        kernel = jnp.where(inside, kernel, 0.0)
        kernel = kernel / kernel.sum()
        index = filters.reflect_index(size, size, radius)
        padded = jnp.take(image, index, axis=axis)
        shifted = [
            jax.lax.slice_in_dim(padded, start, start + size, axis=axis)
            for start in range(2 * radius + 1)
        ]
        image = sum(k * part for k, part in zip(kernel, shifted, strict=True))
    return image


def ghosts(image: Array, count: Array, strength: Array, axis: int) -> Array:
    """Adds ghosts along an axis by weakening planes of k-space.

    Of the spectrum with frequency 0 at index n // 2, every `count`-th plane from
    index 0 on is multiplied by 1 - strength, except that of frequency 0. The result
    is the real part.

    Args:
      image: [H, W, C] or [D, H, W, C] float32.
      count: Number of ghosts, [] int32; may be traced.
      strength: Their strength in [0, 1], [] float32; may be traced.
      axis: The spatial axis.

    Returns:
      Like `image`.
    """
    size = image.shape[axis]
    plane = (np.arange(size) + size // 2) % size  # of frequency 0, 1, ...
    gain = jnp.where(plane % count == 0, 1.0 - strength, 1.0).at[0].set(1.0)
    # The real part keeps what is even in the frequency, and the Hartley transform
    # turns an even gain into a product. Unlike an FFT it splits over devices.
    gain = 0.5 * (gain + gain[-np.arange(size)])
    turns = np.outer(np.arange(size), np.arange(size)) % size / size
    hartley = np.cos(2 * np.pi * turns) + np.sin(2 * np.pi * turns)
    hartley = (hartley / np.sqrt(size)).astype(np.float32)

    def transform(x: Array) -> Array:
        return jnp.einsum("fs,s...->f...", hartley, x, precision="highest")

    moved = jnp.moveaxis(image, axis, 0)
    spectrum = transform(moved) * gain.reshape(-1, *(1,) * (image.ndim - 1))
    return jnp.moveaxis(transform(spectrum), 0, axis)


def _random_gamma(config: AugmentConfig, numbers: Array, image: Array) -> Array:
    return gamma(image, jnp.exp(config.max_log_gamma * (2.0 * numbers[0] - 1.0)))


def _random_bias(config: AugmentConfig, numbers: Array, image: Array) -> Array:
    numbers = 2.0 * numbers - 1.0
    field = bias_field(image.shape[:-1], config.max_bias * numbers[:-1], numbers[-1])
    return image * field[..., None]


def _random_blur(config: AugmentConfig, numbers: Array, image: Array) -> Array:
    sigma = config.max_blur * numbers[: image.ndim - 1]
    return blur(image, sigma, config.max_blur)


def _random_ghosts(config: AugmentConfig, numbers: Array, image: Array) -> Array:
    count = _integer(numbers[0], *_GHOSTS)
    chosen = _integer(numbers[1], 0, image.ndim - 2)
    strength = config.min_ghost + (config.max_ghost - config.min_ghost) * numbers[2]
    found = image
    for axis in range(image.ndim - 1):
        changed = ghosts(image, count, strength, axis)
        found = jnp.where(chosen == axis, changed, found)
    return found


def _integer(number: Array, lowest: int, highest: int) -> Array:
    """Turns a uniform number in [0, 1) into an integer, all alike likely."""
    return lowest + jnp.floor(number * (highest - lowest + 1)).astype(jnp.int32)
