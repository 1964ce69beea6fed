import jax
import jax.numpy as jnp
import numpy as np

from uad_jax.ops import restoration
from uad_jax.types import Array

IMAGE = jax.random.uniform(jax.random.key(0), (3, 4, 4, 1))
MASK = (jnp.arange(4) > 0).reshape(1, 1, 4, 1) & jnp.ones((3, 4, 4, 1), bool)


def _towards_half(x: Array, y: Array, weight: Array, keys: Array | None) -> Array:
    return weight * jnp.square(x - 0.5).sum(axis=(1, 2, 3))


def _steps(*sizes: float, clip: float = 0.0, masked: bool = False) -> restoration.Steps:
    return restoration.Steps(jnp.array(sizes), clip, masked)


def test_total_variation_by_hand() -> None:
    image = jnp.array([[1.0, 3.0], [0.0, 7.0]]).reshape(1, 2, 2, 1)
    both = jnp.concatenate([image, 2 * image], axis=-1)
    np.testing.assert_allclose(restoration.total_variation(image), [1 + 4 + 2 + 7])
    np.testing.assert_allclose(restoration.total_variation(both), [3 * 14])


def test_the_total_variation_of_a_flat_image_has_no_slope() -> None:
    image = jnp.array([[1.0, 1.0], [1.0, 3.0]]).reshape(1, 2, 2, 1)
    slope = jax.grad(lambda x: restoration.total_variation(x).sum())(image)
    np.testing.assert_allclose(slope[0, ..., 0], [[0, -1], [-1, 2]])


def test_one_step_by_hand() -> None:
    found = restoration.restore(_towards_half, IMAGE, MASK, 2.0, _steps(0.1))
    expected = IMAGE - 0.1 * 2.0 * 2.0 * (IMAGE - 0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_gradients_are_limited_and_kept_in_the_brain() -> None:
    steps = _steps(0.1, clip=0.01, masked=True)
    found = restoration.restore(_towards_half, IMAGE, MASK, 2.0, steps)
    expected = IMAGE - 0.1 * jnp.clip(4 * (IMAGE - 0.5), -0.01, 0.01) * MASK
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(found[:, :, 0], IMAGE[:, :, 0])


def test_every_step_has_its_own_size() -> None:
    two = restoration.restore(_towards_half, IMAGE, MASK, 1.0, _steps(0.1, 0.3))
    first = restoration.restore(_towards_half, IMAGE, MASK, 1.0, _steps(0.1))
    second = restoration.restore(_towards_half, first, MASK, 1.0, _steps(0.3))
    np.testing.assert_allclose(two, second, rtol=1e-6)


def test_every_step_and_image_draws_anew_from_its_own_key() -> None:
    def noisy(x: Array, y: Array, weight: Array, keys: Array | None) -> Array:
        assert keys is not None
        slope = jax.vmap(jax.random.normal)(keys)
        return slope * x.sum(axis=(1, 2, 3))

    keys = jax.random.split(jax.random.key(1), 3)
    found = restoration.restore(noisy, IMAGE, MASK, 0.0, _steps(1.0, 1.0), keys)
    draws = [
        [jax.random.normal(jax.random.fold_in(key, step)) for step in (0, 1)]
        for key in keys
    ]
    expected = IMAGE - jnp.array(draws).sum(axis=1)[:, None, None, None]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_sweep_is_one_restoration_per_weight() -> None:
    steps = _steps(0.1, 0.1)
    found = restoration.sweep(_towards_half, IMAGE, MASK, jnp.array([0.5, 2.0]), steps)
    for row, weight in zip(found, (0.5, 2.0), strict=True):
        alone = restoration.restore(_towards_half, IMAGE, MASK, weight, steps)
        np.testing.assert_allclose(row, alone, rtol=1e-6)
