import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import skimage.metrics

from uad_jax.ops import filters

_gaussian = jax.jit(filters.gaussian, static_argnames=("sigma", "num_axes"))
_ssim = jax.jit(filters.ssim, static_argnames=("num_axes", "return_map"))


def _random(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_float_keys_keep_the_order_and_invert() -> None:
    tiny = np.float32(1e-38)
    values = np.array([-np.inf, -3e38, -1, -tiny, 0, tiny, 0.5, 3e38], np.float32)
    keys = np.asarray(filters.float_to_key(jnp.asarray(values)))
    assert (np.diff(keys.astype(np.int64)) > 0).all()
    np.testing.assert_array_equal(filters.key_to_float(jnp.asarray(keys)), values)


def test_minus_zero_has_the_key_of_zero() -> None:
    keys = filters.float_to_key(jnp.array([-0.0, 0.0], jnp.float32))
    assert keys[0] == keys[1]


@pytest.mark.parametrize("shape", [(7, 9, 8), (5, 5, 5), (1, 6, 7), (2, 3, 4)])
def test_median_equals_scipy_to_the_bit(shape: tuple[int, ...]) -> None:
    volume = _random(shape) * np.float32(1e3)
    expected = scipy.ndimage.median_filter(volume, size=5)
    np.testing.assert_array_equal(jax.jit(filters.median5)(volume), expected)


@pytest.mark.parametrize("kind", ["ties", "non_negative", "negative", "wide"])
def test_median_equals_scipy_for_every_kind_of_value(kind: str) -> None:
    normal = _random((6, 8, 7), seed=3)
    volume = {
        "ties": np.round(normal),
        "non_negative": np.maximum(normal, 0),
        "negative": -np.abs(normal) - 100,
        "wide": normal * 10.0 ** _random((6, 8, 7), seed=4) * 1e20,
    }[kind].astype(np.float32)
    expected = scipy.ndimage.median_filter(volume, size=5)
    np.testing.assert_array_equal(jax.jit(filters.median5)(volume), expected)


@pytest.mark.parametrize("valid", [1, 2, 3, 6, 9])
def test_median_ends_at_the_last_valid_slice(valid: int) -> None:
    volume = _random((9, 6, 6))
    found = jax.jit(filters.median5)(volume, jnp.int32(valid))
    expected = scipy.ndimage.median_filter(volume[:valid], size=5)
    np.testing.assert_array_equal(found[:valid], expected)


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_erosion_equals_scipy_slice_by_slice(iterations: int) -> None:
    mask = np.random.default_rng(1).random((4, 15, 17)) < 0.9
    mask[0] = True  # reaches the border
    cross = scipy.ndimage.generate_binary_structure(2, 1)
    expected = mask.copy()
    for z in range(4 if iterations else 0):
        expected[z] = scipy.ndimage.binary_erosion(mask[z], cross, iterations)
    found = filters.erode_slices(jnp.asarray(mask), iterations)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("sigma", "num_axes"), [(0.7, 2), (1.5, 3), (3.0, 2)])
def test_gaussian_equals_scipy(sigma: float, num_axes: int) -> None:
    image = _random((5, 13, 11))
    axes = tuple(range(3 - num_axes, 3))
    expected = scipy.ndimage.gaussian_filter(image, sigma, axes=axes)
    found = _gaussian(image, sigma=sigma, num_axes=num_axes)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_gaussian_ends_where_the_volume_ends_whatever_lies_behind() -> None:
    image = _random((7, 13, 11))
    expected = scipy.ndimage.gaussian_filter(image[:4], 1.5)
    image[4:] = np.nan
    found = jax.jit(functools.partial(filters.gaussian, sigma=1.5, num_axes=3))(
        image, num_valid=jnp.int32(4)
    )
    np.testing.assert_allclose(found[:4], expected, atol=2e-6)


def test_ssim_maps_do_not_know_what_lies_behind_the_end() -> None:
    x, y = _random((7, 13, 11)), _random((7, 13, 11), seed=1)
    ssim = functools.partial(_ssim, data_range=4.0, num_axes=3, return_map=True)
    expected = ssim(jnp.asarray(x[:4]), jnp.asarray(y[:4]))
    x[4:], y[4:] = np.nan, 1e3
    found = ssim(jnp.asarray(x), jnp.asarray(y), num_valid=jnp.int32(4))
    np.testing.assert_allclose(found[:4], expected, atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_ssim_equals_scikit_image_on_slices(offset: float) -> None:
    x = np.clip(_random((3, 24, 20)) * 0.2 + 0.4, 0, 1) + np.float32(offset)
    y = x + _random((3, 24, 20), seed=1) * np.float32(0.1)
    found = _ssim(jnp.asarray(x), jnp.asarray(y), data_range=1.0)
    local = _ssim(jnp.asarray(x), jnp.asarray(y), data_range=1.0, return_map=True)
    assert found.shape == (3,)
    for n in range(3):
        expected, image = skimage.metrics.structural_similarity(
            x[n].astype(np.float64),
            y[n].astype(np.float64),
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )
        np.testing.assert_allclose(found[n], expected, atol=1e-5)
        np.testing.assert_allclose(local[n], image, atol=1e-4)


def test_ssim_equals_scikit_image_on_volumes_with_their_own_range() -> None:
    x = _random((2, 12, 14, 13))
    y = x + np.float32(0.3) * _random((2, 12, 14, 13), seed=1)
    found = _ssim(
        jnp.asarray(x), jnp.asarray(y), data_range=jnp.array([4.0, 7.0]), num_axes=3
    )
    for n, data_range in enumerate((4.0, 7.0)):
        expected = skimage.metrics.structural_similarity(
            x[n].astype(np.float64),
            y[n].astype(np.float64),
            data_range=data_range,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        np.testing.assert_allclose(found[n], expected, atol=1e-5)


def test_ssim_of_equal_images_is_one_and_small_images_are_refused() -> None:
    x = jnp.asarray(_random((12, 12)))
    np.testing.assert_allclose(_ssim(x, x, data_range=1.0), 1.0, atol=1e-6)
    with pytest.raises(ValueError, match="window spans 11"):
        _ssim(x[:10], x[:10], data_range=1.0)
    with pytest.raises(ValueError, match="one shape"):
        _ssim(x, x[:11], data_range=1.0)
