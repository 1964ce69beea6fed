import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from uad_jax.nn import autoencoder, blocks, critics
from uad_jax.nn.blocks import Norm


def _count(module: nn.Module, *shape: int) -> int:
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape))
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


def _critic(size: int, resolution: int, norm: Norm = Norm.NONE) -> int:
    levels = blocks.num_levels(size, size, resolution)
    return _count(critics.ConvCritic(levels, norm=norm), 1, size, size, 1)


@pytest.mark.parametrize(
    ("size", "resolution", "expected"),
    [
        (128, 8, 666_881),
        (128, 16, 257_153),
        (256, 8, 1_076_609),
        (256, 16, 666_881),
        (96, 6, 666_881),
    ],
)
def test_parameter_counts_of_the_published_critics(
    size: int, resolution: int, expected: int
) -> None:
    assert _critic(size, resolution) == expected


def test_layer_norm_has_a_parameter_pair_per_pixel() -> None:
    assert _critic(128, 8, Norm.LAYER) - _critic(128, 8) == 10_880
    sizes = [
        _count(autoencoder.Decoder(4, (128, 128, 1), norm=norm), 1, 128)
        for norm in (Norm.LAYER, Norm.NONE)
    ]
    assert sizes[0] - sizes[1] == 43_648


@pytest.mark.parametrize(
    ("hidden", "expected"), [((50, 50), 9_051), ((100, 50), 18_001)]
)
def test_parameter_counts_of_the_critics_of_codes(
    hidden: tuple[int, ...], expected: int
) -> None:
    assert _count(critics.CodeCritic(hidden), 1, 128) == expected


def test_layer_norm_is_over_the_pixels_of_each_row_and_channel() -> None:
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return blocks.normalise(x, Norm.LAYER, jnp.float32)

    x = 3 + jax.random.normal(jax.random.key(0), (2, 4, 5, 3))
    y, variables = Layer().init_with_output(jax.random.key(1), x)
    assert {leaf.shape for leaf in jax.tree.leaves(variables)} == {(4, 5)}
    mean, variance = x.mean(axis=(1, 2)), x.var(axis=(1, 2))
    expected = (x - mean[:, None, None]) / np.sqrt(variance + 1e-3)[:, None, None]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_a_patch_critic_judges_sites_whose_mean_is_the_whole_image() -> None:
    image = jax.random.uniform(jax.random.key(0), (3, 16, 16, 1))
    patches = critics.ConvCritic(2, width=8, max_width=8)
    whole = critics.ConvCritic(2, patch=False, width=8, max_width=8)
    variables = patches.init(jax.random.key(1), image)
    sites, features = patches.apply(variables, image)
    assert sites.shape == (3, 16)
    assert features.shape == (3, 4, 4, 8)
    value = whole.apply(variables, image)[0]
    np.testing.assert_allclose(value, sites.mean(1, keepdims=True), rtol=1e-4)


def test_rows_do_not_see_each_other() -> None:
    image = jax.random.uniform(jax.random.key(0), (3, 16, 16, 1))
    critic = critics.ConvCritic(2, width=8, max_width=8)
    variables = critic.init(jax.random.key(1), image)
    alone = critic.apply(variables, image[:1])[0]
    np.testing.assert_allclose(alone, critic.apply(variables, image)[0][:1], rtol=1e-4)
