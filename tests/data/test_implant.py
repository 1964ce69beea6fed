import pathlib

import numpy as np
import pytest
from scipy import ndimage

from tests.data import phantom
from uad_jax.data import anatomy, geometry, implant, nifti
from uad_jax.data.implant import Generator, Placed

BOTH = pytest.mark.parametrize("generator", list(Generator))


@pytest.fixture(scope="module")
def head() -> implant.Background:
    return phantom.background()


def _scan(mask: np.ndarray, affine: np.ndarray, root: pathlib.Path) -> nifti.Scan:
    return nifti.read_mask(
        phantom.save(root / "mask.nii.gz", mask.astype(np.uint8), affine)
    )


def _on(head: implant.Background, mask: np.ndarray) -> Placed:
    kept = mask & implant.solid_tissue(head)
    return Placed(fraction=kept.astype(float), mask=kept, lost=0.0)


def _ball(centre: tuple[float, float, float], radius: float) -> np.ndarray:
    place = phantom.world(phantom.SHAPE, phantom.AFFINE) - centre
    return (place**2).sum(-1) < radius**2


def _deep(head: implant.Background) -> Placed:
    """A large ball in white matter, so that it has an inside."""
    return _on(head, _ball((32, -16, 20), 21))


def test_a_voxel_takes_the_share_of_its_volume_that_the_mask_covers() -> None:
    # Cells of 2 units on a line of 6 unit cells, displaced by half a cell.
    weights = implant._overlaps(np.array([0.0, 2.0, 4.0, 6.0]), 6)
    np.testing.assert_allclose(weights[0], [0.25, 0.5, 0.25, 0, 0, 0])
    np.testing.assert_allclose(weights[2], [0, 0, 0, 0, 0.25, 0.5])  # half is outside


def test_a_mask_lands_where_the_boxes_of_the_brains_say(
    head: implant.Background, tmp_path: pathlib.Path
) -> None:
    frame = implant.FRAMES["mslub"]
    start, stop = geometry.bounding_box(head.tissue > 0)
    low = phantom.AFFINE[:3, 3] + (np.array(start) - 0.5) * phantom.SPACING
    high = phantom.AFFINE[:3, 3] + (np.array(stop) - 0.5) * phantom.SPACING
    centre = (30.0, -20.0, 30.0)
    scan = _scan(phantom.ball(centre, 14), phantom.MASK_AFFINE, tmp_path)
    placed = implant.place(scan, frame, head)
    place = phantom.world(phantom.SHAPE, phantom.AFFINE)
    found = np.average(place.reshape(-1, 3), axis=0, weights=placed.fraction.ravel())
    scale = (high - low)[:2] / (np.array(frame.high[:2]) - frame.low)
    expected = [low[k] + (centre[k] - frame.low[k]) * scale[k] for k in (0, 1)]
    expected.append(high[2] + (centre[2] - frame.high[2]) * scale.mean())
    np.testing.assert_allclose(found, expected, atol=0.05)
    volume = placed.fraction.sum() * phantom.SPACING**3
    stretched = scan.data.sum() * 64 * np.prod(scale) * scale.mean()
    assert volume == pytest.approx(stretched, rel=0.02)


@pytest.mark.parametrize("side", [-1, 1])
def test_left_stays_left_however_the_files_are_stored(
    head: implant.Background, tmp_path: pathlib.Path, side: int
) -> None:
    mask = phantom.ball((side * 30.0, -40.0, 20.0), 12)
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = phantom.MASK_SHAPE[0] - 1
    stored = [(mask, phantom.MASK_AFFINE), (mask[::-1], phantom.MASK_AFFINE @ flip)]
    frame = implant.FRAMES["mslub"]
    masks = [
        implant.place(_scan(data, affine, tmp_path), frame, head).mask
        for data, affine in stored
    ]
    np.testing.assert_array_equal(masks[0], masks[1])
    x = phantom.world(phantom.SHAPE, phantom.AFFINE)[masks[0]][:, 0]
    assert (np.sign(x) == side).all()


def test_the_stroke_frame_is_the_box_of_the_template() -> None:
    base = anatomy.template()
    start, stop = geometry.bounding_box(base.depth > 0)
    low = base.affine[:3, 3] + 2 * np.array(start) - 1
    high = base.affine[:3, 3] + 2 * np.array(stop) - 1
    assert implant.FRAMES["soop"] == (tuple(low[:2]), tuple(high))


def test_a_lesion_loses_what_lies_in_fluid_or_outside(
    head: implant.Background, tmp_path: pathlib.Path
) -> None:
    scan = _scan(phantom.ball((0, -14, 18), 20), phantom.MASK_AFFINE, tmp_path)
    placed = implant.place(scan, implant.FRAMES["mslub"], head)
    assert 0.2 < placed.lost < 0.8
    assert np.isin(head.tissue[placed.mask], implant.SOLID).all()
    assert (placed.fraction[~np.isin(head.tissue, implant.SOLID)] == 0).all()
    away = _scan(phantom.ball((74, 70, 80), 6), phantom.MASK_AFFINE, tmp_path)
    assert implant.place(away, implant.FRAMES["mslub"], head).lost == 1.0


def test_fluid_that_the_tissue_map_calls_cortex_is_not_solid(
    head: implant.Background,
) -> None:
    image = head.image.copy()
    wrong = tuple(np.argwhere(head.tissue == implant.CORTEX)[0])
    image[wrong] = 350
    solid = implant.solid_tissue(
        implant.Background(image=image, tissue=head.tissue, affine=head.affine)
    )
    assert not solid[wrong]
    assert solid[head.tissue == implant.CORTEX].mean() > 0.95
    assert not solid[head.tissue == implant.VENTRICLE].any()


def test_rotated_masks_are_refused(
    head: implant.Background, tmp_path: pathlib.Path
) -> None:
    turned = phantom.MASK_AFFINE.copy()
    turned[0, 1] = 0.4
    scan = _scan(phantom.ball((30, 0, 20), 12), turned, tmp_path)
    with pytest.raises(ValueError, match="is rotated; expected axes parallel"):
        implant.place(scan, implant.FRAMES["mslub"], head)


@BOTH
@pytest.mark.parametrize("ratio", [0.8, implant.SHAM_RATIO])
def test_the_mean_over_the_mask_is_the_ratio_times_the_tissue(
    head: implant.Background, generator: Generator, ratio: float
) -> None:
    placed = _deep(head)
    made = implant.implant(head, placed, generator, ratio, seed=3)
    tissue = head.image[placed.mask].mean()
    assert made[placed.mask].mean() / tissue == pytest.approx(ratio, abs=0.01)


@BOTH
def test_nothing_changes_away_from_the_mask_or_in_fluid(
    head: implant.Background, generator: Generator
) -> None:
    placed = _on(head, _ball((14, -16, 20), 16))  # touches the ventricle
    near = ndimage.binary_dilation(placed.mask, iterations=4)
    for ratio in (0.8, implant.SHAM_RATIO):
        made = implant.implant(head, placed, generator, ratio, seed=3)
        assert made.dtype == np.int16
        same = made == head.image
        assert same[~near].all()
        assert same[~implant.solid_tissue(head)].all()
        assert not same[placed.mask].all()
        np.testing.assert_array_equal(made > 0, head.image > 0)


@BOTH
def test_an_implant_is_a_function_of_its_seed(
    head: implant.Background, generator: Generator
) -> None:
    placed = _deep(head)
    first, again, other = (
        implant.implant(head, placed, generator, 0.8, seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other)[placed.mask].mean() > 0.5


def test_the_generators_differ_in_blending_and_in_how_bright_lesions_are(
    head: implant.Background,
) -> None:
    # Two lesions: TRAIN gives them one contrast, TEST each its own.
    one, two = _ball((34, -40, 20), 13), _ball((-34, -40, 20), 13)
    placed = _on(head, one | two)
    contrast = {}
    reach = {}
    for generator in Generator:
        made = implant.implant(head, placed, generator, 0.8, seed=3)
        means = [made[part].mean() / head.image[part].mean() for part in (one, two)]
        contrast[generator] = abs(means[0] - means[1])
        reach[generator] = int(((made != head.image) & ~placed.mask).sum())
    assert contrast[Generator.TEST] > 0.02 > contrast[Generator.TRAIN]
    assert reach[Generator.TEST] < reach[Generator.TRAIN]
    drawn = {g: [implant.draw_ratio(g, seed) for seed in range(400)] for g in Generator}
    low, high = implant.RATIOS
    assert all(low <= ratio <= high for ratios in drawn.values() for ratio in ratios)
    assert np.std(drawn[Generator.TEST]) < 0.8 * np.std(drawn[Generator.TRAIN])


def _roughness(image: np.ndarray, where: np.ndarray) -> float:
    """Root mean square of the second differences along the three axes."""
    squares = []
    for axis in range(3):
        second = np.diff(image.astype(float), n=2, axis=axis)
        inside = np.moveaxis(where, axis, 0)
        inside = np.moveaxis(inside[:-2] & inside[1:-1] & inside[2:], 0, axis)
        squares.append(second[inside] ** 2)
    return float(np.sqrt(np.concatenate(squares).mean()))


@BOTH
def test_an_implant_is_as_rough_as_the_tissue_it_lies_in(
    head: implant.Background, generator: Generator
) -> None:
    placed = _deep(head)
    inside = ndimage.binary_erosion(placed.mask, iterations=2)  # past the ramp
    expected = _roughness(head.image, inside)
    for ratio in (implant.SHAM_RATIO, 0.8):
        made = [
            implant.implant(head, placed, generator, ratio, seed) for seed in range(4)
        ]
        found = np.mean([_roughness(image, inside) for image in made])
        assert found / expected == pytest.approx(1, abs=0.2)


@BOTH
def test_thin_lesions_stay_visible_and_no_voxel_becomes_black(
    head: implant.Background, generator: Generator
) -> None:
    thin = np.zeros(phantom.SHAPE, bool)
    thin[24:26, 16:24, 22] = True
    placed = _on(head, thin)
    made = implant.implant(head, placed, generator, 0.8, seed=3)
    assert made[thin].mean() / head.image[thin].mean() < 0.9
    assert made[thin].min() > 500


def test_empty_masks_and_odd_ratios_are_errors(head: implant.Background) -> None:
    nothing = _on(head, np.zeros(phantom.SHAPE, bool))
    with pytest.raises(ValueError, match="found 0 voxels"):
        implant.implant(head, nothing, Generator.TEST, 0.8, seed=1)
    with pytest.raises(ValueError, match=r"and 1\.2"):
        implant.implant(head, _deep(head), Generator.TEST, 1.2, seed=1)
