import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uad_jax.nn import autoencoder, blocks
from uad_jax.types import Tree


def _shapes(
    size: tuple[int, int],
    resolution: int,
    latent_size: int | None,
    heads: int = 1,
    channels: int = 1,
    norm: blocks.Norm = blocks.Norm.NONE,
    latent_channels: int = 0,
) -> tuple[Tree, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    levels = blocks.num_levels(*size, resolution)
    encoder = autoencoder.Encoder(
        levels, latent_size, heads, latent_channels, norm=norm
    )
    widen = latent_channels > 0
    decoder = autoencoder.Decoder(levels, (*size, channels), widen=widen, norm=norm)

    def init(image: jax.Array) -> tuple:
        codes, first = encoder.init_with_output(jax.random.key(0), image)
        out, second = decoder.init_with_output(jax.random.key(0), codes[0])
        return (first, second), codes[0], out

    return jax.eval_shape(init, jnp.zeros((2, *size, channels)))


def _count(*args: object, **kwargs: object) -> int:
    variables = _shapes(*args, **kwargs)[0]
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize(
    ("size", "resolution", "dense", "vae", "spatial"),
    [
        (128, 8, 1_625_777, 1_756_977, 1_358_241),
        (128, 16, 1_979_921, 2_504_337, 922_881),
        (256, 8, 2_061_137, 2_192_337, 1_793_601),
        (256, 16, 2_415_281, 2_939_697, 1_358_241),
        (96, 6, 1_510_641, 1_584_497, 1_358_241),
        (96, 12, 1_519_377, 1_814_417, 922_881),
    ],
)
def test_parameter_counts_of_the_published_sizes(
    size: int, resolution: int, dense: int, vae: int, spatial: int
) -> None:
    assert _count((size, size), resolution, 128) == dense
    assert _count((size, size), resolution, 128, heads=2) == vae
    assert _count((size, size), resolution, None) == spatial


@pytest.mark.parametrize(
    ("heads", "latent_channels", "extra"),
    [
        (2, 0, 2 * (128 * 128 + 128)),
        (1, 64, 128 * 64 + 64 + 64 * 128 + 128),
        (2, 64, 2 * (128 * 64 + 64) + 64 * 128 + 128),
    ],
)
def test_a_spatial_code_costs_its_1x1_convolutions(
    heads: int, latent_channels: int, extra: int
) -> None:
    size = (128, 128)
    plain = _count(size, 16, None)
    count = _count(size, 16, None, heads, latent_channels=latent_channels)
    assert count == plain + extra
    codes = _shapes(size, 16, None, heads, latent_channels=latent_channels)[1]
    assert codes.shape == (2, 16, 16, latent_channels or 128)


@pytest.mark.parametrize("heads", [1, 2])
def test_channel_affine_adds_1472_parameters(heads: int) -> None:
    plain = _count((128, 128), 8, 128, heads)
    affine = _count((128, 128), 8, 128, heads, norm=blocks.Norm.CHANNEL_AFFINE)
    group = _count((128, 128), 8, 128, heads, norm=blocks.Norm.GROUP)
    assert affine - plain == group - plain == 1472


@pytest.mark.parametrize(("latent", "code"), [(None, (2, 6, 5, 128)), (7, (2, 7))])
def test_shapes_of_a_rectangular_image_with_two_channels(
    latent: int | None, code: tuple[int, ...]
) -> None:
    _, codes, image = _shapes((96, 80), 5, latent, channels=2)
    assert codes.shape == code
    assert image.shape == (2, 96, 80, 2)


def test_bfloat16_keeps_float32_parameters_codes_and_image() -> None:
    encoder = autoencoder.Encoder(2, 8, width=8, max_width=16, dtype=jnp.bfloat16)
    decoder = autoencoder.Decoder(
        2, (16, 16, 1), width=8, max_width=16, dtype=jnp.bfloat16
    )
    image = jax.random.uniform(jax.random.key(0), (2, 16, 16, 1))
    codes, first = encoder.init_with_output(jax.random.key(1), image)
    out, second = decoder.init_with_output(jax.random.key(2), codes[0])
    leaves = jax.tree.leaves((first, second, codes, out))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
    exact = autoencoder.Encoder(2, 8, width=8, max_width=16)
    difference = jnp.abs(exact.apply(first, image)[0] - codes[0]).max()
    assert 0 < difference < 0.05


def test_strided_convolutions_lie_as_in_tensorflow() -> None:
    # SAME with 5 taps and stride 2 pads 1 pixel before and 2 after: output m reads the
    # inputs 2 m - 1 to 2 m + 3. (PyTorch's padding of 2 would begin at 2 m - 2.)
    encoder = autoencoder.Encoder(1, None, width=8, max_width=8)
    image = jnp.zeros((1, 16, 16, 1)).at[0, 7, 7, 0].set(1.0)
    variables = encoder.init(jax.random.key(0), image)
    (code,) = encoder.apply(variables, image)
    (kernel,) = (x for x in jax.tree.leaves(variables) if x.ndim == 4)
    for m in range(8):
        tap = 7 - (2 * m - 1)
        expected = kernel[tap, tap, 0] if 0 <= tap < 5 else jnp.zeros(8)
        found = code[0, m, m]
        np.testing.assert_allclose(found, blocks.leaky_relu(expected), atol=1e-6)
