"""Every protocol against the steps of its study in NumPy and SciPy, on new inputs."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from tests import fresh
from uad_jax.metrics import baselines, postprocess, protocols, voxel
from uad_jax.metrics.protocols import Protocol

SHAPE = (7, 40, 36)  # baur: 4 iterations; kascenas: a square of 3 x 3
_CROSS = scipy.ndimage.generate_binary_structure(2, 1)


def _volumes(
    rng: np.random.Generator, shape: tuple[int, int, int] = SHAPE
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image, its reconstruction, and a brain mask with holes; 0 outside it."""
    axes = [np.linspace(-1, 1, size) for size in shape]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    brain = (z / 1.4) ** 2 + y**2 + x**2 < rng.uniform(0.7, 0.95)
    brain &= rng.random(shape) < 0.999
    image, output = (
        0.5
        + scipy.ndimage.gaussian_filter(rng.normal(size=shape), 2).astype(np.float32)
        for _ in range(2)
    )
    return np.where(brain, image, 0).astype(np.float32), output, brain


def _processed(
    protocol: Protocol, scores: np.ndarray, brain: np.ndarray, image: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    valid = jnp.ones((1, len(scores)), bool)
    found = postprocess.postprocess(
        jnp.asarray(scores[None]), brain[None], valid, protocol, image[None]
    )
    return tuple(np.asarray(one)[0] for one in found)


def _kept(
    scores: np.ndarray, image: np.ndarray, output: np.ndarray, brain: np.ndarray
) -> np.ndarray:
    found = postprocess.keep_positive(
        jnp.asarray(scores[None]),
        image[None, ..., None],
        output[None, ..., None],
        brain[None],
        jnp.ones((1, len(scores)), bool),
    )
    return np.asarray(found)[0]


def _within(brain: np.ndarray, distance: int) -> np.ndarray:
    """Pixels farther than this from every background pixel, counted in steps."""
    found = np.zeros_like(brain)
    for z, mask in enumerate(brain):
        padded = np.pad(mask, distance + 1)
        steps = scipy.ndimage.distance_transform_cdt(padded, metric="taxicab")
        inner = slice(distance + 1, -distance - 1)
        found[z] = (steps > distance)[inner, inner]
    return found


def test_baur_equals_the_steps_of_the_study() -> None:
    rng = fresh.rng()
    image, output, brain = _volumes(rng)
    eroded = _within(brain, 4)
    residual = np.maximum(image - output, 0) * eroded
    residual[image < np.quantile(image, 0.9)] = 0
    expected = scipy.ndimage.median_filter(residual, size=5) * eroded

    scores = _kept(np.abs(image - output), image, output, brain)
    found, mask = _processed(Protocol.BAUR, scores, brain, image)
    np.testing.assert_array_equal(mask, eroded)
    assert eroded.any()
    assert (expected > 0).any()
    np.testing.assert_array_equal(found, expected)


def test_baur_sees_the_image_without_what_lies_outside_the_brain() -> None:
    image, output, brain = _volumes(fresh.rng())
    scores = np.abs(image - output)
    expected, _ = _processed(Protocol.BAUR, scores, brain, image)
    skull = np.where(brain, image, 9).astype(np.float32)
    found, _ = _processed(Protocol.BAUR, scores, brain, skull)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("size", [11, 70, 101, 1001])
def test_the_prior_keeps_what_is_not_below_the_quantile_of_numpy(size: int) -> None:
    rng = fresh.rng()
    image = np.round(rng.normal(size=(1, 1, size)), 1).astype(np.float32)  # ties
    brain = np.ones(image.shape, bool)
    steps = protocols.steps(Protocol.BAUR)
    valid = jnp.ones(1, bool)
    found = postprocess._bright(jnp.asarray(image), brain, valid, steps)
    quantile = np.quantile(image.astype(np.float64), 0.9)
    np.testing.assert_array_equal(found, image >= quantile)


def test_a_wider_field_of_view_lowers_the_prior() -> None:
    rng = fresh.rng()
    image, output, brain = _volumes(rng)
    scores = np.abs(image - output)
    wide = [(2, 2), (30, 30), (30, 30)]
    steps = protocols.steps(Protocol.BAUR)
    kept = [
        np.count_nonzero(
            postprocess._bright(one, mask, jnp.ones(len(one), bool), steps)
        )
        for one, mask in (
            (jnp.asarray(image), brain),
            (jnp.asarray(np.pad(image, wide)), np.pad(brain, wide)),
        )
    ]
    assert kept[1] > kept[0] >= np.count_nonzero(scores) // 10


def test_kascenas_equals_the_steps_of_the_study() -> None:
    rng = fresh.rng()
    shape = (5, 64, 128)  # the longer side gives the square: 5 x 5
    image, output, brain = _volumes(rng, shape)
    share = scipy.ndimage.uniform_filter(
        brain.astype(np.float64), size=(1, 5, 5), mode="constant"
    )
    eroded = (share > 0.95) & brain
    output[tuple(np.argwhere(eroded)[3])] = image[tuple(np.argwhere(eroded)[3])]
    residual = np.abs(image - output)
    expected = scipy.ndimage.median_filter(
        residual * eroded, size=(1, 5, 5), mode="mirror"
    )
    found, mask = _processed(Protocol.KASCENAS, residual, brain, image)
    np.testing.assert_array_equal(mask, eroded)
    lost = brain & ~eroded
    assert 0 < lost.sum() < eroded.sum()
    np.testing.assert_array_equal(found, expected * eroded)


def test_a_pixel_of_background_in_the_square_is_too_little_to_erode() -> None:
    brain = np.ones((1, 128, 128), bool)
    brain[0, 60, 60] = brain[0, 90, 90] = brain[0, 90, 91] = False
    scores = np.zeros(brain.shape, np.float32)
    _, mask = _processed(Protocol.KASCENAS, scores, brain, scores)
    assert mask[0, 60, 61]
    assert not mask[0, 60, 60]
    assert not mask[0, 91, 90]
    assert not mask[0, :2].any()  # outside the picture is background


def test_thresh_scores_the_equalised_intensity_as_it_is() -> None:
    image, _, brain = _volumes(fresh.rng())
    scores = baselines.thresh(image, brain)
    found, mask = _processed(Protocol.THRESH, scores, brain, image)
    np.testing.assert_array_equal(mask, brain)
    np.testing.assert_array_equal(found[brain], scores[brain])
    order = np.argsort(image[brain], kind="stable")
    assert (np.diff(found[brain][order]) >= 0).all()


def _thresholds(scores: np.ndarray, number: int) -> Iterator[float]:
    yield from np.linspace(0, scores.max(), number, endpoint=False)


@pytest.mark.parametrize("number", [100, 1000])
def test_exact_ceiling_is_no_lower_than_that_of_the_thresholds(number: int) -> None:
    rng = fresh.rng()
    image, output, brain = _volumes(rng)
    lesion = brain & (scipy.ndimage.gaussian_filter(rng.normal(size=SHAPE), 2) > 0.1)
    scores = (np.abs(image - output) * (1 + lesion)).astype(np.float32)
    found, mask = _processed(Protocol.KASCENAS, scores, brain, image)
    ranking = voxel.rank(voxel.from_map(found, mask, lesion, brain))
    exact, _ = voxel.best_dice(ranking)
    dices = [
        voxel.dice(voxel.confusion_of_masks((found > level) & mask, lesion))
        for level in _thresholds(found, number)
    ]
    assert max(dices) <= exact + 1e-12
    assert exact < max(dices) + 0.05


@pytest.mark.parametrize(
    ("protocol", "dropped"),
    [
        (Protocol.BEHRENDT, 7),
        (Protocol.BAUR, 7),
        (Protocol.KASCENAS, 20),
        (Protocol.THRESH, 20),
        (Protocol.NONE, 0),
    ],
)
def test_small_components_are_dropped_as_scipy_counts_them(
    protocol: Protocol, dropped: int
) -> None:
    rng = fresh.rng()
    scores = scipy.ndimage.gaussian_filter(rng.normal(size=(12, 30, 30)), 0.7)
    scores = scores.astype(np.float32)
    inside = np.ones(scores.shape, bool)
    level = float(np.quantile(scores, 0.93))
    labels, _ = scipy.ndimage.label(scores > level, np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel())
    expected = (labels > 0) & (sizes[labels] > dropped)
    found = postprocess.predict(scores, inside, level, protocol)
    np.testing.assert_array_equal(found, expected)


def test_a_hollow_component_counts_without_its_hole() -> None:
    # The only case in which the studies' filled size is another: 18 voxels around a
    # hole are 19 when filled.
    shell = np.ones((3, 3, 3), bool)
    shell[1, 1, 1] = False
    shell[::2, ::2, ::2] = False
    binary = np.pad(shell, 2)
    assert postprocess.remove_small_components(binary, 18).sum() == 0
    assert postprocess.remove_small_components(binary, 17).sum() == 18


@pytest.mark.parametrize(
    ("protocol", "size", "pixels"),
    [
        (Protocol.BAUR, (128, 128), 12),
        (Protocol.BAUR, (96, 96), 9),
        (Protocol.BAUR, (64, 64), 6),
        (Protocol.BAUR, (100, 128), 12),
        (Protocol.BEHRENDT, (96, 96), 3),
        (Protocol.BEHRENDT, (128, 128), 5),
        (Protocol.BEHRENDT, (128, 96), 3),
        (Protocol.KASCENAS, (128, 128), 2),
        (Protocol.KASCENAS, (96, 96), 2),
        (Protocol.KASCENAS, (64, 64), 1),
        (Protocol.KASCENAS, (256, 256), 4),
        (Protocol.THRESH, (128, 128), 0),
        (Protocol.NONE, (128, 128), 0),
    ],
)
def test_erosion_scales_with_the_resolution(
    protocol: Protocol, size: tuple[int, int], pixels: int
) -> None:
    assert protocols.steps(protocol).erosion_pixels(*size) == pixels


def test_keep_positive_leaves_a_positive_map_and_the_order_of_any() -> None:
    image, output, brain = _volumes(fresh.rng())
    positive = np.maximum(image - output, 0)
    np.testing.assert_array_equal(_kept(positive, image, output, brain), positive)
    scores = fresh.rng().normal(size=SHAPE).astype(np.float32)
    found = _kept(scores, image, output, brain)
    brighter = image > output
    np.testing.assert_array_equal(found[brighter], scores[brighter])
    assert (found[~brighter] == scores[brain].min()).all()


def test_under_baur_the_lowest_score_is_that_of_all_volumes() -> None:
    # Else a threshold at the lowest score of one volume would find all of another.
    image, output, brain = _volumes(fresh.rng())
    for least in (0.25, 0.5):
        scores = np.abs(image - output) + np.float32(least)
        kept = _kept(scores, image, output, brain)
        assert kept.min() == 0
        for each in (scores, kept):
            found, mask = _processed(Protocol.BAUR, each, brain, image)
            assert found[mask].min() == 0
            assert found[~mask].max() == 0
    negative = -np.abs(image - output)
    found, mask = _processed(Protocol.BAUR, negative, brain, image)
    assert found[~mask].max() == negative[mask].min() < 0


def test_keep_positive_hides_no_nan() -> None:
    image, output, brain = _volumes(fresh.rng())
    scores = np.abs(image - output)
    place = tuple(np.argwhere(brain & (image < output))[0])
    scores[place] = np.nan
    assert np.isnan(_kept(scores, image, output, brain)[place])


def test_a_protocol_with_a_prior_needs_the_image() -> None:
    scores, valid = jnp.zeros((1, *SHAPE)), jnp.ones((1, SHAPE[0]), bool)
    brain = jnp.ones((1, *SHAPE), bool)
    with pytest.raises(ValueError, match=r"baur.*no image"):
        postprocess.postprocess(scores, brain, valid, Protocol.BAUR)
    with pytest.raises(ValueError, match=r"an image where the protocol needs one"):
        postprocess.postprocess(scores, brain, valid, Protocol.BAUR, scores[0])


def test_steps_are_described_in_pixels_and_mm() -> None:
    said = protocols.describe(Protocol.BAUR, 96, 96, (2.0, 2.0))
    assert "eroded by 9 pixels (18 mm)" in said
    assert "0.9-quantile" in said
    said = protocols.describe(Protocol.KASCENAS, 128, 128, (1.88, 1.88))
    assert "5 x 5 pixels are brain (radius 3.76 mm); median 5 x 5;" in said
    assert "20 voxels or fewer" in said
    assert protocols.describe(Protocol.BEHRENDT, 96, 96, (2, 1)).startswith(
        "brain eroded by 3 pixels (3 x 6 mm); median 5 x 5 x 5; findings of 7"
    )
    assert protocols.describe(Protocol.NONE, 96, 96, (2.0, 2.0)) == "nothing"


def test_medians_of_slices_equal_scipy_also_where_slices_are_small() -> None:
    rng = fresh.rng()
    for shape in ((3, 9, 8), (2, 3, 5)):
        volume = rng.normal(size=shape).astype(np.float32)
        found = jax.jit(postprocess.filters.median5_slices)(volume)
        expected = scipy.ndimage.median_filter(volume, size=(1, 5, 5), mode="mirror")
        np.testing.assert_array_equal(found, expected)
        torch_like = np.pad(volume, [(0, 0), (2, 2), (2, 2)], mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(torch_like, (5, 5), (1, 2))
        np.testing.assert_array_equal(found, np.median(windows, axis=(3, 4)))
