import io

import numpy as np
from PIL import Image

from uad_jax import figures


def _case(*, lesion: bool = True, reconstruction: bool = True) -> figures.Case:
    rng = np.random.default_rng()
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


def test_shown_slice_is_the_one_with_most_lesion() -> None:
    assert figures.shown_slice(_case()) == 4


def test_shown_slice_without_truth_falls_back_to_findings_then_brain() -> None:
    case = _case(lesion=False)
    assert figures.shown_slice(case) == 0  # the brain is the same everywhere
    case.found[2] = True
    assert figures.shown_slice(case) == 2


def test_case_panels_draws_a_picture_for_every_kind_of_case() -> None:
    cases = [_case(), _case(lesion=False), _case(reconstruction=False)]
    picture = Image.open(io.BytesIO(figures.case_panels(cases, map_limit=1.0)))
    assert picture.format == "PNG"
    assert picture.size[0] > 800
    assert np.asarray(picture.convert("L")).std() > 20


def test_curves_draws_every_series() -> None:
    x = np.linspace(0.01, 1, 20)
    one = figures.curves({"a": (x, x)}, title="t", x_label="x", y_label="y")
    two = figures.curves(
        {"a": (x, x), "b": (x, x**2)}, title="t", x_label="x", y_label="y", log_x=True
    )
    assert Image.open(io.BytesIO(one)).size == Image.open(io.BytesIO(two)).size
    assert one != two
