"""The linear code that stores image intensities as integers.

uint16 codes cover [-0.5, 1.5]: normalised scans lie in [0, 1], and interpolation
overshoots a little. The rounding error is at most 1.6e-5. uint8 codes (RGB
pictures) cover [0, 1].
"""

import jax
import jax.numpy as jnp
import numpy as np

LOW, HIGH = -0.5, 1.5
_UINT16_STEP = (HIGH - LOW) / 65535.0


def encode(image: np.ndarray) -> tuple[np.ndarray, int]:
    """Encodes float images as uint16.

    Args:
      image: Finite float array of any shape, about [0, 1].

    Returns:
      The codes (uint16, same shape) and the number of values that were clipped.
    """
    clipped = int(np.count_nonzero((image < LOW) | (image > HIGH)))
    codes = np.rint((np.clip(image, LOW, HIGH) - LOW) / _UINT16_STEP)
    return codes.astype(np.uint16), clipped


def decode(codes: jax.Array) -> jax.Array:
    """Decodes uint16 or uint8 codes to float32; float arrays become float32."""
    if codes.dtype == jnp.uint16:
        return codes.astype(jnp.float32) * _UINT16_STEP + LOW
    if codes.dtype == jnp.uint8:
        return codes.astype(jnp.float32) / 255.0
    return codes.astype(jnp.float32)
