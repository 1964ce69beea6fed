import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from uad_jax.ops import augment
from uad_jax.ops.augment import AugmentConfig

NOTHING = AugmentConfig(
    gamma_probability=0.0,
    bias_probability=0.0,
    blur_probability=0.0,
    ghost_probability=0.0,
)
CHANGES = ("gamma", "bias", "blur", "ghost")


def _images(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.1, 1.1, shape).astype(np.float32)


def _keys(count: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


@jax.jit
def _run(probabilities: jax.Array, keys: jax.Array, images: jax.Array) -> jax.Array:
    """One program for all tests: the probabilities are traced."""
    names = [f"{change}_probability" for change in CHANGES]
    config = dataclasses.replace(
        NOTHING, **dict(zip(names, probabilities, strict=True))
    )
    return augment.augment(config, keys, images)


def _augment(keys: jax.Array, images: np.ndarray, **probability: float) -> np.ndarray:
    chances = jnp.array([probability.get(change, 0.0) for change in CHANGES])
    return np.asarray(_run(chances, keys, jnp.asarray(images)))


ALL = dict.fromkeys(CHANGES, 1.0)
SLICES = (300, 8, 6, 1)


def test_gamma_raises_magnitudes_and_keeps_signs() -> None:
    found = augment.gamma(jnp.array([-0.25, 0.0, 0.25, 1.0]), 0.5)
    np.testing.assert_allclose(found, [-0.5, 0.0, 0.5, 1.0], atol=1e-7)


@pytest.mark.parametrize("shape", [(5, 6, 4), (1, 7, 1)])
def test_bias_field_equals_the_polynomial_term_by_term(shape) -> None:
    coefficients = np.random.default_rng(0).uniform(-0.5, 0.5, 20)
    x, y, z = (
        np.linspace(-1, 1, n) if n > 1 else np.zeros(1)
        for n in (shape[1], shape[2], shape[0])
    )
    total, used = np.zeros(shape), iter(coefficients)
    for i, j, k in itertools.product(range(4), repeat=3):
        if i + j + k <= 3:
            term = x[None, :, None] ** i * y[None, None] ** j * z[:, None, None] ** k
            total += next(used) * term
    assert next(used, None) is None
    found = augment.bias_field(shape, jnp.asarray(coefficients, jnp.float32))
    np.testing.assert_allclose(found, np.exp(total), rtol=1e-5)


def test_bias_field_of_a_slice_is_that_of_the_volume_at_its_height() -> None:
    coefficients = jnp.asarray(_images((20,)))
    volume = augment.bias_field((5, 6, 4), coefficients)
    for z, height in enumerate(np.linspace(-1, 1, 5)):
        found = augment.bias_field((6, 4), coefficients, height)
        np.testing.assert_allclose(found, volume[z], rtol=1e-5)


@pytest.mark.parametrize("sigma", [(0.0, 0.1), (1.0, 0.4), (0.13, 0.9)])
def test_blur_equals_scipy_on_slices(sigma: tuple[float, ...]) -> None:
    image = _images((9, 11, 2))
    blur = jax.jit(augment.blur, static_argnums=2)
    found = blur(image, jnp.array(sigma), 1.0)
    expected = scipy.ndimage.gaussian_filter(image, (*sigma, 0))
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_blur_equals_scipy_on_volumes_and_with_wider_kernels() -> None:
    image, sigma = _images((12, 9, 11, 1)), (1.7, 0.2, 0.6)
    found = augment.blur(jnp.asarray(image), jnp.array(sigma), 2.0)
    expected = scipy.ndimage.gaussian_filter(image, (*sigma, 0))
    np.testing.assert_allclose(found, expected, atol=2e-6)


def _ghosts_by_fft(image: np.ndarray, count: int, strength: float, axis: int):
    """TorchIO's definition: planes of the shifted spectrum, real part."""
    spectrum = np.fft.fftshift(np.fft.fft(image, axis=axis), axes=axis)
    planes = np.moveaxis(spectrum, axis, 0)
    centre = planes[len(planes) // 2].copy()
    planes[::count] *= 1 - strength
    planes[len(planes) // 2] = centre
    return np.fft.ifft(np.fft.ifftshift(spectrum, axes=axis), axis=axis).real


@pytest.mark.parametrize("shape", [(16, 13, 2), (5, 12, 9, 1)])
def test_ghosts_equal_the_weakened_planes_of_k_space(shape) -> None:
    image = _images(shape)
    make = jax.jit(augment.ghosts, static_argnums=3)
    for axis in range(len(shape) - 1):
        for count, strength in ((4, 0.7), (5, 1.0), (10, 0.5)):
            found = make(image, count, strength, axis)
            expected = _ghosts_by_fft(image, count, strength, axis)
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_point_has_its_ghosts_where_the_closed_form_says() -> None:
    # 16 pixels and 4 ghosts: planes 0, 4, 8, 12 are frequencies 0, 4, 8, 12, and 0 is
    # restored. What is lost is (4 images of the point, minus the mean) / 4 ... / 16.
    point = jnp.zeros((16, 1, 1)).at[3].set(1.0)
    found = augment.ghosts(point, jnp.int32(4), jnp.float32(1.0), 0)[:, 0, 0]
    lost = np.zeros(16)
    lost[3::4] = 1 / 4
    np.testing.assert_allclose(
        found, np.asarray(point)[:, 0, 0] - lost + 1 / 16, atol=1e-6
    )


def test_without_changes_every_bit_stays() -> None:
    images = _images(SLICES)
    np.testing.assert_array_equal(_augment(_keys(300), images), images)
    found = augment.augment(NOTHING, _keys(300), jnp.asarray(images))
    np.testing.assert_array_equal(found, images)


@pytest.mark.parametrize("change", CHANGES)
def test_the_gate_opens_for_the_asked_share_of_samples(change: str) -> None:
    images, keys = _images(SLICES), _keys(300)
    found = _augment(keys, images, **{change: 0.25})
    same = (found == images).all((1, 2, 3))
    assert 0.17 < 1 - same.mean() < 0.33
    everywhere = _augment(keys, images, **{change: 1.0})
    # Blur of less than an eighth of a voxel along both axes changes nothing.
    assert (everywhere == images).all((1, 2, 3)).mean() < 0.04
    np.testing.assert_array_equal(found[~same], everywhere[~same])


def test_gates_open_independently() -> None:
    images, keys = _images(SLICES), _keys(300)
    gates = [
        (_augment(keys, images, **{change: 0.5}) != images).any((1, 2, 3))
        for change in CHANGES
    ]
    assert np.abs(np.corrcoef(gates) - np.eye(4)).max() < 0.2


def test_changes_come_in_the_order_of_the_reference() -> None:
    images, keys = _images(SLICES), _keys(300)
    expected = images
    for change in CHANGES:
        expected = _augment(keys, expected, **{change: 1.0})
    np.testing.assert_allclose(_augment(keys, images, **ALL), expected, atol=1e-5)


def test_a_sample_depends_on_its_key_and_itself_alone() -> None:
    images, keys = _images(SLICES), _keys(300)
    found = _augment(keys, images, **ALL)
    order = np.random.default_rng(0).permutation(300)
    again = _augment(keys[order], images[order], **ALL)
    np.testing.assert_array_equal(again, found[order])
    same = _augment(keys, np.broadcast_to(images[:1], SLICES), **ALL)
    assert len({image.tobytes() for image in same}) == 300


def test_random_exponents_have_the_asked_range() -> None:
    found = _augment(_keys(300), np.full(SLICES, 0.5, np.float32), gamma=1.0)
    log_exponent = np.log(np.log(found[:, 0, 0, 0]) / np.log(0.5))
    assert -0.301 < log_exponent.min() < -0.28
    assert 0.28 < log_exponent.max() < 0.301
    assert abs(log_exponent.mean()) < 0.04


def test_random_bias_fields_are_exponentials_of_bounded_cubics() -> None:
    found = _augment(_keys(300), np.ones(SLICES, np.float32), bias=1.0)[..., 0]
    x, y = np.linspace(-1, 1, 8)[:, None], np.linspace(-1, 1, 6)[None]
    terms = [x**i * y**j for i in range(4) for j in range(4 - i)]
    matrix = np.stack([term.ravel() for term in terms], 1)
    log = np.log(found).reshape(300, -1).T
    fitted, _, rank, _ = np.linalg.lstsq(matrix, log, rcond=None)
    assert rank == 10
    np.testing.assert_allclose(matrix @ fitted, log, atol=1e-4)
    # x^3 has one coefficient, the constant the four of 1, z, z^2, z^3.
    cubic, constant = fitted[-1], fitted[0]
    assert -0.501 < cubic.min() < -0.45
    assert 0.45 < cubic.max() < 0.501
    assert 0.5 < np.abs(constant).max() < 2.0


def _explain(found: np.ndarray, image: np.ndarray) -> list[tuple[int, int, float]]:
    """Which (axis, count, strength) of ghosts makes an image out of another."""
    matches = []
    for axis, count in itertools.product(range(image.ndim - 1), range(4, 11)):
        full = _ghosts_by_fft(image, count, 1.0, axis) - image
        strength = float((found - image).ravel() @ full.ravel() / (full**2).sum())
        if np.allclose(found, image + strength * full, atol=1e-5):
            matches.append((axis, count, strength))
    return matches


def test_random_ghosts_have_every_axis_number_and_strength() -> None:
    images = _images((100, 24, 23, 1))  # sizes that tell all ghosts apart
    found = _augment(_keys(100), images, ghost=1.0)
    seen = [_explain(*pair) for pair in zip(found, images, strict=True)]
    assert {len(matches) for matches in seen} == {1}
    axes, counts, strengths = zip(*(matches[0] for matches in seen), strict=True)
    assert set(axes) == {0, 1}
    assert set(counts) == set(range(4, 11))
    assert 0.5 <= min(strengths) < 0.55
    assert 0.95 < max(strengths) <= 1.0


def test_volumes_are_changed_along_all_three_axes() -> None:
    volumes, keys = _images((12, 16, 14, 15, 1)), _keys(12)
    found = _augment(keys, volumes, ghost=1.0)
    seen = [_explain(*pair) for pair in zip(found, volumes, strict=True)]
    assert {matches[0][0] for matches in seen} == {0, 1, 2}
    every = _augment(keys, volumes, **ALL)
    assert every.shape == volumes.shape
    assert np.isfinite(every).all()


def test_new_keys_and_probabilities_reuse_the_program() -> None:
    images = _images(SLICES)
    _augment(_keys(300), images, **ALL)
    before = _run._cache_size()
    _augment(_keys(300, seed=1), images[::-1], blur=0.3)
    assert _run._cache_size() == before


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("blur_probability", 1.5, "blur_probability is 1.5"),
        ("max_bias", -0.1, "max_bias is -0.1"),
        ("min_ghost", 1.2, "min_ghost is 1.2, above max_ghost = 1.0"),
    ],
)
def test_settings_that_cannot_work_are_named(field, value, message) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(AugmentConfig(), **{field: value}).validate()
    AugmentConfig().validate()
