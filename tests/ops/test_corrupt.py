import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from uad_jax.ops import corrupt


def _keys(count: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


def _ellipse(height: int = 128, width: int = 128) -> np.ndarray:
    """One off-centre brain whose box is rows 20 to 99 and columns 40 to 109."""
    y, x = np.mgrid[:height, :width]
    return ((y - 59.5) / 40) ** 2 + ((x - 74.5) / 35) ** 2 <= 1


@pytest.fixture(scope="module")
def squares() -> np.ndarray:
    brain = jnp.broadcast_to(
        jnp.asarray(_ellipse())[None, ..., None], (300, 128, 128, 1)
    )
    return np.asarray(
        jax.jit(corrupt.hidden_squares, static_argnums=2)(_keys(300), brain, 20)
    )[..., 0]


def test_squares_differ_across_the_batch_and_lie_in_the_box(
    squares: np.ndarray,
) -> None:
    assert len({hidden.tobytes() for hidden in squares}) > 290
    rows, columns = np.nonzero(squares.any(axis=0))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (20, 99, 40, 109)


def test_there_are_one_to_three_squares_of_20_pixels(squares: np.ndarray) -> None:
    sizes = squares.sum(axis=(1, 2))
    assert sizes.min() == 400
    assert sizes.max() == 1200
    # Unions of 20x20 squares are what opening by a 20x20 square leaves unchanged.
    for hidden in squares[:20]:
        opened = ndimage.binary_opening(hidden, np.ones((20, 20)))
        np.testing.assert_array_equal(opened, hidden)
    apart = [ndimage.label(hidden)[1] for hidden in squares]
    assert set(apart) == {1, 2, 3}
    np.testing.assert_allclose((sizes == 400).mean(), 1 / 3, atol=0.09)


def test_a_sample_depends_on_its_key_and_mask_alone() -> None:
    brain = jnp.asarray(_ellipse())[None, ..., None]
    both = jnp.concatenate([brain, jnp.ones_like(brain)])
    keys = _keys(2)
    together = corrupt.hidden_squares(keys, both, 20)
    alone = corrupt.hidden_squares(keys[1:], both[1:], 20)
    np.testing.assert_array_equal(together[1:], alone)


def test_a_brain_smaller_than_a_square_bounds_it_and_no_brain_has_none() -> None:
    brain = np.zeros((3, 32, 32, 1), bool)
    brain[0, 10:14, 5:8] = True
    brain[1, 31, 31] = True
    hidden = np.asarray(corrupt.hidden_squares(_keys(3), jnp.asarray(brain), 8))
    np.testing.assert_array_equal(hidden[:2], brain[:2])
    assert not hidden[2].any()


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(128, 128, 20), (96, 96, 15), (256, 192, 30), (2, 9, 1)],
)
def test_squares_grow_with_the_image(height: int, width: int, expected: int) -> None:
    assert corrupt.square_side(height, width) == expected
    assert corrupt.square_side(height, width, 2) == 2


def test_a_square_larger_than_the_image_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"40 pixels.*32x64.*from 1 to 32"):
        corrupt.hidden_squares(_keys(1), jnp.ones((1, 32, 64, 1), bool), 40)


@pytest.mark.parametrize(("size", "cells"), [(128, 16), (96, 16), (16, 16), (7, 3)])
def test_interpolation_equals_scipy(size: int, cells: int) -> None:
    grid = np.random.default_rng(0).normal(size=(cells, cells))
    matrix = corrupt.align_corners(size, cells)
    theirs = ndimage.zoom(grid, size / cells, order=1, mode="nearest")
    np.testing.assert_allclose(matrix @ grid @ matrix.T, theirs, atol=1e-5)


def test_interpolation_of_one_point_is_constant() -> None:
    np.testing.assert_array_equal(corrupt.align_corners(4, 1), np.ones((4, 1)))
    np.testing.assert_array_equal(corrupt.align_corners(1, 3), [[1, 0, 0]])


def test_interpolation_lowers_the_deviation_as_published() -> None:
    # Of a field that is not shifted: the deviation differs from place to place.
    along = np.sqrt((corrupt.align_corners(128, 16) ** 2).sum(axis=1))
    deviation = 0.2 * np.outer(along, along)
    np.testing.assert_allclose(deviation.mean(), 0.134, rtol=0.02)
    np.testing.assert_allclose(deviation.min(), 0.100, atol=0.005)
    np.testing.assert_allclose(deviation.max(), 0.200, atol=0.005)


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    draw = jax.jit(lambda keys: corrupt.coarse_noise(keys, (128, 128, 2)))
    return np.asarray(draw(_keys(400)))


def test_shifted_noise_has_the_same_statistics_everywhere(noise: np.ndarray) -> None:
    assert noise.shape == (400, 128, 128, 2)
    assert abs(noise.mean()) < 3e-3
    # The root of the mean of the squares of the deviations above.
    along = (corrupt.align_corners(128, 16) ** 2).sum(axis=1).mean()
    np.testing.assert_allclose(noise.std(), 0.2 * along, rtol=0.02)
    np.testing.assert_allclose(noise.std(), 0.134, rtol=0.02)
    by_place = noise.std(axis=(0, 3))
    assert 0.096 < by_place.min() < by_place.max() < 0.204 - 0.03
    between = np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]
    assert abs(between) < 0.03


def _seams(noise: np.ndarray) -> np.ndarray:
    """Where the largest jumps between neighbouring rows and columns lie, [N, 2]."""
    jumps = []
    for axis in (1, 2):
        step = np.abs(noise - np.roll(noise, 1, axis)).mean(axis=(3 - axis, 3))
        jumps.append(step.argmax(axis=1))
    return np.stack(jumps, -1)


def test_each_sample_is_shifted_by_its_own_number_of_pixels(
    noise: np.ndarray,
) -> None:
    # A wrapped field is torn where its two ends meet.
    seams = _seams(noise)
    assert len(np.unique(seams[:, 0])) > 60
    assert len(np.unique(seams[:, 1])) > 60
    shared = corrupt.coarse_noise(_keys(30), (128, 128, 1), shift_key=jax.random.key(5))
    assert len(np.unique(_seams(np.asarray(shared)), axis=0)) == 1
    assert (shared[0] != shared[1]).any()


def test_noise_of_a_sample_equals_numpy_and_scipy_step_by_step() -> None:
    key = jax.random.key(3)
    found = corrupt.coarse_noise(key[None], (48, 64, 2), cells=8, deviation=0.5)[0]
    field_key, shift_key = jax.random.split(key)
    grid = np.asarray(jax.random.normal(field_key, (8, 8, 2)))
    shift = np.floor(np.asarray(jax.random.uniform(shift_key, (2,))) * [48, 64])
    large = ndimage.zoom(grid, (6, 8, 1), order=1, mode="nearest")
    rolled = np.roll(large, shift.astype(int), axis=(0, 1))
    assert shift.any()
    np.testing.assert_allclose(found, 0.5 * rolled, atol=1e-5)


def test_deviation_may_be_traced() -> None:
    draw = jax.vmap(lambda d: corrupt.coarse_noise(_keys(2), (16, 16, 1), deviation=d))(
        jnp.array([0.1, 0.2])
    )
    np.testing.assert_allclose(2 * draw[0], draw[1], rtol=1e-6)
