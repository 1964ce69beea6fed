import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uad_jax.ops import patches
from uad_jax.ops.patches import Overlap

GRIDS = [
    patches.grid((8, 8), 4),
    patches.grid((7, 10), 4),  # spread, overlapping by different amounts
    patches.grid((8, 6), 4, stride=2),  # up to four boxes in a pixel
    patches.grid((5, 5), 5),
    patches.grid((3, 4), 1),
]
EACH_GRID = pytest.mark.parametrize(
    "boxes", GRIDS, ids=lambda b: f"{b.shape}-{b.patch}"
)
EACH_OVERLAP = pytest.mark.parametrize("overlap", list(Overlap))


def _images(boxes: patches.Grid, seed: int = 0, channels: int = 2) -> np.ndarray:
    shape = (3, *boxes.shape, channels)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _per_box(boxes: patches.Grid, seed: int = 0) -> np.ndarray:
    """A whole image of its own for every box, [N, K, H, W, C]."""
    shape = (3, len(boxes.corners), *boxes.shape, 2)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_papers_grid_has_four_boxes_row_by_row() -> None:
    boxes = patches.grid((96, 96), 48)
    assert boxes.corners == [(0, 0), (0, 48), (48, 0), (48, 48)]
    found = patches.masks(boxes)
    assert found.shape == (4, 96, 96, 1)
    assert found[1, :48, 48:].all()
    assert found[1].sum() == 48 * 48
    np.testing.assert_array_equal(found.sum(0), 1)


def test_boxes_that_do_not_divide_the_image_are_spread_evenly() -> None:
    assert patches.grid((96, 96), 60).rows == (0, 36)
    assert patches.grid((96, 80), 40).rows == (0, 28, 56)
    assert patches.grid((96, 80), 40).columns == (0, 40)
    assert patches.grid((7, 7), 3).rows == (0, 2, 4)


def test_strides_place_boxes_up_to_the_border() -> None:
    assert patches.grid((96, 96), 48, stride=24).rows == (0, 24, 48)
    assert patches.grid((96, 48), 48, stride=48).columns == (0,)


@pytest.mark.parametrize(
    ("patch", "stride", "message"),
    [
        (100, 0, "100 x 100 pixels, but the image is 96 x 120. Use .* 1 to 96"),
        (0, 0, "The patch is 0 x 0"),
        (48, 36, "48 pixels at a stride of 36 leave 12 of 96 pixels uncovered"),
        (20, 38, "leave 36 of 96 pixels uncovered. Use a stride of at most 20"),
        (40, 50, "leave 16 of 96 pixels uncovered"),
        (48, -1, "stride of the boxes is -1"),
    ],
)
def test_grids_that_cannot_cover_name_the_numbers(patch, stride, message) -> None:
    with pytest.raises(ValueError, match=message):
        patches.grid((96, 120), patch, stride)


@EACH_GRID
def test_every_grid_covers_every_pixel_and_stays_inside(boxes: patches.Grid) -> None:
    found = patches.masks(boxes)
    assert (found.sum(0) >= 1).all()
    np.testing.assert_array_equal(found.sum((1, 2, 3)), boxes.patch**2)


@EACH_GRID
@EACH_OVERLAP
def test_shares_lie_inside_the_boxes_and_add_up_to_one(boxes, overlap) -> None:
    share = patches.weights(boxes, overlap)
    np.testing.assert_allclose(share.sum(0), 1, atol=1e-6)
    assert (share[~patches.masks(boxes)] == 0).all()
    if overlap is not Overlap.AVERAGE:
        assert set(np.unique(share)) <= {0.0, 1.0}


def test_overlaps_are_cut_in_the_middle_kept_or_averaged() -> None:
    boxes = patches.Grid((6, 10), 6, (0,), (0, 4))  # pixels 4 and 5 are in both
    for overlap, expected in {
        Overlap.CUT: [1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        Overlap.FIRST: [1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
        Overlap.AVERAGE: [1, 1, 1, 1, 0.5, 0.5, 0, 0, 0, 0],
    }.items():
        assert patches.weights(boxes, overlap)[0, 3, :, 0].tolist() == expected
    # The reference's cut of patches of 60: boxes at 0 and 36, border at 60.
    share = patches.weights(patches.grid((96, 96), 60), Overlap.FIRST)
    assert share[0, :, 0, 0].sum() == 60
    share = patches.weights(patches.grid((96, 96), 60), Overlap.CUT)
    assert share[0, :, 0, 0].sum() == 48


@EACH_GRID
@EACH_OVERLAP
def test_stitch_inverts_extract(boxes: patches.Grid, overlap: Overlap) -> None:
    images = _images(boxes)
    parts = patches.extract(jnp.asarray(images), boxes)
    assert parts.shape == (3, len(boxes.corners), boxes.patch, boxes.patch, 2)
    found = patches.stitch(parts, boxes, overlap)
    np.testing.assert_allclose(found, images, atol=1e-6)


@EACH_OVERLAP
def test_blend_equals_a_loop_over_pixels(overlap: Overlap) -> None:
    boxes = patches.grid((7, 10), 4, stride=3)
    images = _per_box(boxes)
    found = jax.jit(lambda x: patches.blend(x, boxes, overlap))(images)
    for y, x in itertools.product(range(7), range(10)):
        inside = [
            k
            for k, (r, c) in enumerate(boxes.corners)
            if r <= y < r + 4 and c <= x < c + 4
        ]
        if overlap is Overlap.AVERAGE:
            expected = images[:, inside, y, x].mean(1)
        elif overlap is Overlap.FIRST:
            expected = images[:, inside[0], y, x]
        else:  # the nearest centre; the later box where both are equally near
            distance = [
                (abs(boxes.corners[k][0] + 1.5 - y), abs(boxes.corners[k][1] + 1.5 - x))
                for k in inside
            ]
            nearest = min(reversed(range(len(inside))), key=lambda i: distance[i])
            expected = images[:, inside[nearest], y, x]
        np.testing.assert_allclose(found[:, y, x], expected, atol=1e-6)


@EACH_OVERLAP
def test_blend_and_stitch_agree_and_ignore_what_lies_outside(overlap) -> None:
    boxes = patches.grid((7, 10), 4)
    images = _per_box(boxes)
    inside = patches.masks(boxes)[None]
    wild = jnp.asarray(np.where(inside, images, np.nan))
    side = boxes.patch
    parts = np.stack(
        [
            images[:, k, r : r + side, c : c + side]
            for k, (r, c) in enumerate(boxes.corners)
        ],
        axis=1,
    )
    blended = patches.blend(wild, boxes, overlap)
    np.testing.assert_allclose(
        blended, patches.stitch(jnp.asarray(parts), boxes, overlap), atol=1e-6
    )


@EACH_OVERLAP
def test_the_order_of_the_boxes_is_irrelevant(overlap: Overlap) -> None:
    boxes = patches.grid((7, 10), 4)
    images = _per_box(boxes)
    order = np.random.default_rng(3).permutation(len(boxes.corners))
    share = patches.weights(boxes, overlap)[order]
    shuffled = (images[:, order] * share).sum(1)
    np.testing.assert_allclose(
        shuffled, patches.blend(jnp.asarray(images), boxes, overlap), atol=1e-6
    )


def test_random_boxes_of_a_grid_are_all_alike_likely() -> None:
    boxes = patches.grid((6, 4), 2)
    keys = jax.random.split(jax.random.key(0), 600)
    picked = np.asarray(jax.jit(lambda k: patches.random_masks(k, boxes))(keys))
    assert picked.shape == (600, 6, 4, 1)
    assert picked.dtype == bool
    counts = [(picked == mask).all((1, 2, 3)).sum() for mask in patches.masks(boxes)]
    assert sum(counts) == 600
    assert min(counts) > 60


@pytest.mark.parametrize("cut", [False, True])
def test_random_boxes_lie_anywhere_and_are_cut_only_if_asked(cut: bool) -> None:
    keys = jax.random.split(jax.random.key(0), 400)
    make = jax.jit(lambda k: patches.random_boxes(k, (5, 7), 3, cut=cut))
    found = np.asarray(make(keys))
    assert found.shape == (400, 5, 7, 1)
    corners = set()
    for mask in found[..., 0]:
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        row, column = int(rows[0]), int(columns[0])
        corners.add((row, column))
        expected = np.zeros((5, 7), bool)
        expected[row : row + 3, column : column + 3] = True
        np.testing.assert_array_equal(mask, expected)
        assert cut or mask.sum() == 9
    first = (range(5), range(7)) if cut else (range(3), range(5))
    assert corners == set(itertools.product(*first))
    order = np.random.default_rng(0).permutation(400)
    np.testing.assert_array_equal(make(keys[order]), found[order])
    with pytest.raises(ValueError, match="6 x 6 pixels, but the image is 5 x 7"):
        patches.random_boxes(keys, (5, 7), 6)
