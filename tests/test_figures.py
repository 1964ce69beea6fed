import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from uad_jax import figures
from uad_jax.types import Geometry

TWO_MM = np.diag([2.0, 2.0, 2.0, 1.0])


def _case(*, lesion: bool = True, reconstruction: bool = True) -> figures.Case:
    rng = np.random.default_rng(0)
    shape = (6, 12, 10)
    truth = np.zeros(shape, bool)
    truth[4, 3:5, 6:8] = True
    return figures.Case(
        title="sub-1",
        image=rng.random(shape, np.float32),
        reconstruction=rng.random(shape, np.float32) if reconstruction else None,
        anomaly_map=rng.random(shape, np.float32),
        found=np.zeros(shape, bool),
        lesion=truth if lesion else None,
        brain=np.ones(shape, bool),
    )


def test_radiological_puts_anterior_up_and_the_right_side_left() -> None:
    plane = np.zeros((4, 6))  # [x, y] in RAS
    plane[3, 5] = 1.0  # the patient's right, anterior
    shown = figures.radiological(plane)
    assert shown.shape == (6, 4)
    assert shown[0, 0] == 1.0  # top left of the picture
    geometry = Geometry(
        native_shape=(4, 6, 1),
        native_affine=np.diag([-2.0, 2.0, 2.0, 1.0]),  # a file that is LAS
        grid_to_native=np.diag([-1.0, 1.0, 1.0, 1.0]),
    )
    np.testing.assert_array_equal(figures.radiological(plane, geometry), shown)
    lps = dataclasses.replace(geometry, grid_to_native=np.diag([1.0, -1.0, 1.0, 1.0]))
    turned = figures.radiological(plane[::-1, ::-1], lps)
    np.testing.assert_array_equal(turned, shown)


def test_shown_slice_is_the_one_with_most_lesion() -> None:
    assert figures.shown_slice(_case()) == 4


def test_shown_slice_without_truth_falls_back_to_findings_then_scores() -> None:
    case = _case(lesion=False)
    case.anomaly_map[3, 2:6, 2:6] = 5.0
    assert figures.shown_slice(case) == 3
    case.found[2] = True
    assert figures.shown_slice(case) == 2


def test_shown_slice_takes_no_score_from_outside_the_brain() -> None:
    case = _case(lesion=False)
    case.brain[5] = False
    case.anomaly_map[5] = 9.0
    case.anomaly_map[1, 4, :8] = 5.0
    assert figures.shown_slice(case) == 1


def test_slice_caption_counts_from_one_and_gives_the_scanner_position() -> None:
    case = _case()
    assert figures.slice_caption(case, 4) == "slice 5 of 6"
    affine = np.diag([-1.0, 1.0, 1.0, 1.0])
    affine[2, 3] = -30.0
    geometry = Geometry(
        native_shape=(24, 20, 12), native_affine=affine, grid_to_native=TWO_MM
    )
    placed = dataclasses.replace(case, geometry=geometry)
    assert figures.slice_caption(placed, 4) == "slice 5 of 6, z = -22 mm"


def _size(picture: bytes) -> tuple[int, int]:
    opened = Image.open(io.BytesIO(picture))
    assert opened.format == "PNG"
    assert np.asarray(opened.convert("L")).std() > 20
    return opened.size


def test_case_panels_draws_a_picture_for_every_kind_of_case() -> None:
    cases = [_case(), _case(lesion=False), _case(reconstruction=False)]
    picture = figures.case_panels(cases, map_limit=1.0, threshold=0.5)
    assert _size(picture)[0] > 800


def test_case_panels_leaves_out_columns_that_no_subject_fills() -> None:
    bare = [_case(lesion=False, reconstruction=False)]
    full = _size(figures.case_panels([_case()], map_limit=1.0))
    few = _size(figures.case_panels(bare, map_limit=1.0))
    assert few[0] == full[0]
    assert few[1] > full[1]  # three pictures across instead of five: larger ones


def test_gallery_draws_a_row_for_every_three_volumes() -> None:
    cases = [_case(lesion=False, reconstruction=False)] * 4
    one = _size(figures.gallery(cases[:3], map_limit=1.0))
    two = _size(figures.gallery(cases, map_limit=1.0, threshold=0.5))
    assert one[0] == two[0]
    assert two[1] > 1.5 * one[1]


def test_pictures_of_a_figure_share_window_scale_and_field_of_view() -> None:
    dim, bright = _case(), _case()
    bright.image[2, 4:8, 4:8] = 1.4
    bright.anomaly_map[:] -= 2.0
    bright.brain[:, :, 0] = dim.brain[:, :, 0] = False
    look = figures.common_look([dim, bright], map_limit=0.8)
    assert look.gray["vmax"] == pytest.approx(1.4, abs=0.01)
    assert look.scale["vmin"] == bright.anomaly_map.min()
    assert look.scale["vmax"] == 0.8
    assert look.view == (slice(0, 12), slice(0, 10))


def test_names_are_no_formulas() -> None:
    odd = dataclasses.replace(_case(), title="sub_$1\n$\\frac{$")
    figures.case_panels([odd], map_limit=1.0)
    figures.gallery([odd], map_limit=1.0)


def test_outline_runs_along_the_voxels() -> None:
    axis = figures.Figure().subplots()
    mask = np.zeros((6, 8), bool)
    mask[2:4, 3:6] = True
    figures.outline(axis, mask, "white")
    (drawn,) = axis.collections
    points = np.concatenate([path.vertices for path in drawn.get_paths()])
    np.testing.assert_allclose(points.min(axis=0), [2.5, 1.5], atol=0.13)
    np.testing.assert_allclose(points.max(axis=0), [5.5, 3.5], atol=0.13)
