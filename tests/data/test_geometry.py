import itertools

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from uad_jax.data import geometry
from uad_jax.types import Geometry

RNG = np.random.default_rng(0)


def _affine(
    codes: str, edges: tuple[float, ...], origin: tuple[float, ...]
) -> np.ndarray:
    flip = nib.orientations.inv_ornt_aff(
        nib.orientations.axcodes2ornt(codes), (1, 1, 1)
    )
    affine = np.linalg.inv(flip)
    affine[:3, :3] *= edges
    affine[:3, 3] = origin
    return affine


@pytest.mark.parametrize(
    "codes",
    [
        "".join(axes[k] if sign else other[k] for k, sign in enumerate(signs))
        for axes, other in [("RAS", "LPI"), ("SAR", "IPL"), ("ASR", "PIL")]
        for signs in itertools.product((True, False), repeat=3)
    ],
)
def test_canonical_storage_grows_to_right_anterior_superior(codes: str) -> None:
    shape = (3, 4, 5)
    affine = _affine(codes, (1.0, 2.0, 3.0), (300.0, -500.0, 7.0))
    transform = geometry.native_to_canonical(shape, affine)
    canonical = affine @ np.linalg.inv(transform)
    assert nib.aff2axcodes(canonical) == ("R", "A", "S")
    data = RNG.random(shape)
    moved = geometry.reorder(data, transform)
    for index in np.ndindex(shape):
        target = (transform @ [*index, 1])[:3].astype(int)
        assert moved[tuple(target)] == data[index]
        np.testing.assert_allclose(canonical @ [*target, 1], affine @ [*index, 1])
    expected = nib.as_closest_canonical(nib.Nifti1Image(data, affine))
    np.testing.assert_array_equal(moved, expected.get_fdata())


@pytest.mark.parametrize(("order", "mode"), [(1, "nearest"), (3, "mirror")])
def test_axis_weights_equal_scipy(order: int, mode: str) -> None:
    line = RNG.random(17)
    positions = np.linspace(0, 16, 41)
    expected = ndimage.map_coordinates(line, [positions], order=order, mode=mode)
    weights = geometry.axis_weights(17, positions, order)
    np.testing.assert_allclose(weights @ line, expected, atol=2e-6)


def test_baur_positions_equal_scipy_zoom() -> None:
    line = RNG.random(240)
    weights = geometry.axis_weights(240, np.arange(128) * (239 / 127), 3)
    expected = ndimage.zoom(line, 128 / 240, order=3, mode="mirror")
    np.testing.assert_allclose(weights @ line, expected, atol=2e-6)


def test_axis_weights_clamp_half_a_voxel_and_read_zero_beyond() -> None:
    for order in (0, 1, 3):
        weights = geometry.axis_weights(4, np.array([-0.51, -0.5, 3.5, 3.6]), order)
        np.testing.assert_allclose(weights.sum(axis=1), [0, 1, 1, 0], atol=1e-6)


def test_nearest_takes_the_upper_neighbour_at_a_half() -> None:
    weights = geometry.axis_weights(6, np.array([0.5, 2.5, 4.49]), 0)
    assert weights.argmax(axis=1).tolist() == [1, 3, 4]


def test_sampled_masks_keep_their_volume_on_average() -> None:
    noise = ndimage.gaussian_filter(RNG.normal(size=(64, 64, 64)), 1.5)
    mask = noise > np.quantile(noise, 0.5)
    half = geometry.sample_mask(mask, (0.5,) * 3, (2.0,) * 3, (32, 32, 32), order=1)
    assert half.mean() == pytest.approx(0.5, rel=0.015)


def test_wide_linear_kernel_averages() -> None:
    alternating = np.tile([0.0, 1.0], 20)
    weights = geometry.axis_weights(40, np.arange(4.0, 36.0, 2.0), 1, width=2.0)
    np.testing.assert_allclose(weights @ alternating, 0.5, atol=1e-6)


def test_unknown_order_is_an_error() -> None:
    with pytest.raises(ValueError, match="use 0, 1 or 3"):
        geometry.axis_weights(4, np.zeros(1), 2)


def test_cubic_sampling_equals_map_coordinates() -> None:
    volume = RNG.random((20, 18, 16)).astype(np.float32)
    result = geometry.sample(
        volume, (0.5, 0.5, 0.5), (2.0, 2.0, 2.0), (10, 9, 8), order=3
    )
    points = np.meshgrid(*(0.5 + 2 * np.arange(n) for n in (10, 9, 8)), indexing="ij")
    expected = ndimage.map_coordinates(volume, points, order=3, mode="mirror")
    np.testing.assert_allclose(result, expected, atol=2e-6)


def test_whole_voxel_shifts_copy_bits() -> None:
    volume = RNG.random((5, 6, 7)).astype(np.float32)
    result = geometry.sample(volume, (-2.0, 1.0, 20.0), (1.0,) * 3, (9, 3, 4), order=3)
    assert not result.any()
    result = geometry.sample(volume, (-2.0, 1.0, 0.0), (1.0,) * 3, (9, 3, 7), order=3)
    expected = np.zeros((9, 3, 7), np.float32)
    expected[2:7] = volume[:, 1:4]
    np.testing.assert_array_equal(result, expected)


def test_sampled_masks_give_an_exact_half_to_the_upper_side() -> None:
    mask = np.zeros((4, 2, 2), bool)
    mask[1] = True
    start, shape = (0.5, 0.0, 0.0), (2, 2, 2)
    linear = geometry.sample_mask(mask, start, (2.0, 1.0, 1.0), shape, order=1)
    assert linear[:, 0, 0].tolist() == [True, False]
    nearest = geometry.sample_mask(mask, start, (2.0, 1.0, 1.0), shape, order=0)
    np.testing.assert_array_equal(nearest, mask[1::2])


def _crop_or_pad(line: np.ndarray, target: int) -> np.ndarray:
    """torchio's rule, written out: the larger half is at the start."""
    difference = abs(len(line) - target)
    first, last = -(-difference // 2), difference // 2
    if len(line) < target:
        return np.pad(line, (first, last))
    return line[first : len(line) - last]


@pytest.mark.parametrize("size", range(1, 14))
@pytest.mark.parametrize("target", [1, 6, 7])
def test_crop_or_pad_puts_the_odd_voxel_at_the_start(size: int, target: int) -> None:
    line = np.arange(1.0, size + 1).astype(np.float32)
    start = float(geometry.crop_or_pad_start(size, target))
    result = geometry.sample(
        line[:, None, None], (start, 0.0, 0.0), (1.0,) * 3, (target, 1, 1), order=0
    )
    np.testing.assert_array_equal(result.ravel(), _crop_or_pad(line, target))


def test_bounding_box_ignores_stray_voxels() -> None:
    mask = np.zeros((10, 10, 10), bool)
    mask[2:5, 3:7, 1:9] = True
    mask[9, 9, 9] = True
    assert geometry.bounding_box(mask) == ((2, 3, 1), (5, 7, 9))
    with pytest.raises(ValueError, match="empty"):
        geometry.bounding_box(np.zeros((2, 2, 2), bool))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR", "PIR", "ILA"])
@pytest.mark.parametrize("edges", [(1.0, 1.0, 1.0), (0.9, 1.1, 3.0)])
def test_a_marked_voxel_comes_back_to_the_same_place(
    codes: str, edges: tuple[float, float, float]
) -> None:
    shape = (24, 26, 22)
    affine = _affine(codes, edges, (4000.0, -3000.0, 900.0))
    transform = geometry.native_to_canonical(shape, affine)
    canonical_edges = geometry.spacing(affine @ np.linalg.inv(transform))
    step = tuple(2.0 / edge for edge in canonical_edges)
    grid = tuple(
        int(np.ceil(size / one)) + 2
        for size, one in zip(
            geometry.reorder(np.zeros(shape), transform).shape, step, strict=True
        )
    )
    place = Geometry(
        native_shape=shape,
        native_affine=affine,
        grid_to_native=np.linalg.inv(transform)
        @ geometry.box_transform((-0.7, -0.3, -0.1), step),
    )
    for voxel in [(3, 4, 5), (20, 3, 17), (11, 22, 9)]:
        blob = np.zeros(shape, np.float32)
        blob[voxel] = 1
        blob = ndimage.gaussian_filter(blob, [2.5 / edge for edge in edges])
        on_grid = geometry.to_grid(blob, place, grid)
        assert on_grid.shape == (grid[2], grid[0], grid[1])
        # The hottest grid sample lies within one grid step of the voxel, in mm.
        z, x, y = np.unravel_index(on_grid.argmax(), on_grid.shape)
        found = affine @ place.grid_to_native @ [x, y, z, 1]
        assert np.abs(found - affine @ [*voxel, 1])[:3].max() <= 1.01 * max(2.0, *edges)
        back = geometry.to_native(on_grid, place)
        assert back.shape == shape
        hottest = np.unravel_index(back.argmax(), shape)
        moved = (np.array(hottest) - voxel) * edges
        assert np.abs(moved).max() <= 1.01 * max(1.0, *edges)
        assert np.corrcoef(back.ravel(), blob.ravel())[0, 1] > 0.9


def test_to_native_inverts_to_grid_exactly_on_equal_voxels() -> None:
    shape = (8, 9, 7)
    affine = _affine("PIR", (2.0, 2.0, 2.0), (50.0, 60.0, 70.0))
    transform = geometry.native_to_canonical(shape, affine)
    place = Geometry(
        native_shape=shape,
        native_affine=affine,
        grid_to_native=np.linalg.inv(transform)
        @ geometry.box_transform((-2.0, -1.0, -3.0), (1.0, 1.0, 1.0)),
    )
    data = RNG.random(shape).astype(np.float32)
    on_grid = geometry.to_grid(data, place, (14, 12, 13))
    for order in (0, 1, 3):
        np.testing.assert_allclose(
            geometry.to_native(on_grid, place, order), data, atol=2e-6
        )
    mask = data > 0.5
    back = geometry.to_native(geometry.to_grid(mask, place, (14, 12, 13)), place)
    assert back.dtype == bool
    np.testing.assert_array_equal(back, mask)


def test_native_voxels_outside_the_grid_are_zero() -> None:
    place = Geometry(
        native_shape=(10, 4, 4),
        native_affine=np.eye(4),
        grid_to_native=geometry.box_transform((3.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    )
    back = geometry.to_native(np.ones((4, 5, 4), np.float32), place)
    assert back[:, 0, 0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 0, 0]


def test_wrong_shapes_and_rotated_grids_are_errors() -> None:
    rotated = np.eye(4)
    rotated[0, 1] = 0.2
    place = Geometry(
        native_shape=(4, 4, 4), native_affine=np.eye(4), grid_to_native=rotated
    )
    with pytest.raises(ValueError, match="rotated or sheared"):
        geometry.to_native(np.zeros((4, 4, 4)), place)
    with pytest.raises(ValueError, match="storage order"):
        geometry.to_grid(np.zeros((4, 4, 5)), place, (4, 4, 4))


def test_voxel_ml_is_that_of_the_grid_not_of_the_scan() -> None:
    scan = Geometry(
        native_shape=(10, 10, 10),
        native_affine=np.diag([-0.9, 0.9, 3.0, 1.0]),
        grid_to_native=geometry.box_transform((0, 0, 0), (2 / 0.9, 2 / 0.9, 2 / 3)),
    )
    assert geometry.voxel_ml(scan) == pytest.approx(0.008)
