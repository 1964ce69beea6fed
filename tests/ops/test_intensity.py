import jax
import jax.numpy as jnp
import numpy as np

from tests import fresh
from uad_jax.ops import intensity


def test_decode_inverts_encode_to_half_a_step() -> None:
    image = fresh.rng().uniform(-0.5, 1.5, (5, 7)).astype(np.float32)
    codes, clipped = intensity.encode(image)
    assert codes.dtype == np.uint16
    assert clipped == 0
    np.testing.assert_allclose(
        jax.jit(intensity.decode)(codes), image, atol=1.01 / 65535
    )


def test_encode_counts_clipped_values() -> None:
    codes, clipped = intensity.encode(np.array([-0.6, -0.5, 0.0, 1.5, 1.7, 9.0]))
    assert clipped == 3
    assert codes.tolist() == [0, 0, 16384, 65535, 65535, 65535]


def test_decode_reads_pictures_and_floats() -> None:
    assert intensity.decode(jnp.array([0, 255], jnp.uint8)).tolist() == [0.0, 1.0]
    floats = jnp.array([0.25], jnp.bfloat16)
    assert intensity.decode(floats).dtype == jnp.float32
