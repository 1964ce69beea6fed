import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uad_jax.nn import dae_unet

SMALL = dae_unet.DaeUNet(out_channels=2, width=4, num_levels=2)


@pytest.mark.parametrize(("channels", "expected"), [(1, 7_701_825), (4, 7_703_748)])
def test_parameter_counts_of_the_published_sizes(channels: int, expected: int) -> None:
    image = jnp.zeros((1, 128, 128, channels))
    variables = jax.eval_shape(
        dae_unet.DaeUNet(channels).init, jax.random.key(0), image
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == expected


def test_groups_are_the_middle_divisors() -> None:
    found = [dae_unet.num_groups(n) for n in (64, 128, 256, 512, 16, 1)]
    assert found == [8, 16, 16, 32, 4, 1]


def test_standardised_filters_have_mean_0_and_unbiased_deviation_1() -> None:
    kernel = 3.0 + 0.1 * jax.random.normal(jax.random.key(0), (3, 3, 5, 7))
    found = np.asarray(dae_unet.standardise(kernel)).reshape(45, 7)
    np.testing.assert_allclose(found.mean(axis=0), 0.0, atol=1e-5)
    np.testing.assert_allclose(found.std(axis=0, ddof=1), 1.0, rtol=1e-3)


def test_the_border_is_mirrored_without_repeating_its_edge() -> None:
    image = jax.random.normal(jax.random.key(0), (1, 4, 5, 1))
    layer = dae_unet.StandardisedConv(1)
    variables = layer.init(jax.random.key(1), image)
    kernel = np.asarray(dae_unet.standardise(variables["params"]["kernel"]))[..., 0, 0]
    bias = np.asarray(variables["params"]["bias"])
    padded = np.pad(np.asarray(image)[0, ..., 0], 1, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
    expected = (windows * kernel).sum(axis=(2, 3)) + bias
    np.testing.assert_allclose(
        layer.apply(variables, image)[0, ..., 0], expected, rtol=1e-4, atol=1e-5
    )


def test_doubling_equals_a_transposed_convolution() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    layer = dae_unet.Double(6)
    variables = layer.init(jax.random.key(1), x)
    kernel = variables["params"]["kernel"]
    bias = variables["params"]["bias"].reshape(1, 1, 1, -1)
    found = layer.apply(variables, x)
    # PyTorch's order of the taps, which is that of lax with the kernel turned round.
    expected = jax.lax.conv_transpose(x, kernel[::-1, ::-1], (2, 2), "SAME")
    np.testing.assert_allclose(found, expected + bias, rtol=1e-4, atol=1e-5)
    for a in (0, 1):
        for b in (0, 1):
            pixels = jnp.einsum("nhwc,cf->nhwf", x, kernel[a, b]) + bias
            np.testing.assert_allclose(
                found[:, a::2, b::2], pixels, rtol=1e-4, atol=1e-5
            )


def test_a_block_normalises_after_the_activation() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    out, _ = jax.jit(dae_unet.Block(16).init_with_output)(jax.random.key(1), x)
    groups = np.asarray(out).reshape(2, 64, 4, 4)  # 4 groups of 4 channels
    np.testing.assert_allclose(groups.mean(axis=(1, 3)), 0.0, atol=1e-4)
    np.testing.assert_allclose(groups.std(axis=(1, 3)), 1.0, rtol=1e-2)


@pytest.mark.parametrize("shape", [(1, 36, 32, 1), (1, 20, 15, 1)])
def test_sides_that_cannot_be_halved_name_the_allowed_ones(
    shape: tuple[int, ...],
) -> None:
    with pytest.raises(ValueError, match=r"multiples of 8; the image is"):
        dae_unet.DaeUNet(1).init(jax.random.key(0), jnp.zeros(shape))


def test_an_image_too_small_to_be_mirrored_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"at least 16; the image is 8x16"):
        dae_unet.DaeUNet(1).init(jax.random.key(0), jnp.zeros((1, 8, 16, 1)))


def test_bfloat16_keeps_float32_parameters_and_output() -> None:
    image = jax.random.uniform(jax.random.key(0), (2, 16, 12, 2))
    exact, variables = jax.jit(SMALL.init_with_output)(jax.random.key(1), image)
    assert exact.shape == image.shape
    fast = SMALL.copy(dtype=jnp.bfloat16)
    close = jax.jit(fast.apply)(variables, image)
    assert close.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {
        jnp.dtype(jnp.float32)
    }
    assert 0 < jnp.abs(close - exact).max() < 0.1 * jnp.abs(exact).max()
