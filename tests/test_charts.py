import io

import numpy as np
from PIL import Image

from uad_jax import charts


def test_volume_scores_draws_a_line_for_every_group() -> None:
    healthy = charts.volume_scores({"healthy": np.array([0.1, 0.2, 0.3])})
    both = charts.volume_scores(
        {"healthy": np.array([0.1, 0.2, 0.3]), "abnormal": np.array([0.4])}
    )
    assert (
        Image.open(io.BytesIO(both)).size[1] > Image.open(io.BytesIO(healthy)).size[1]
    )


def test_curves_draws_every_series() -> None:
    x = np.linspace(0.01, 1, 20)
    one = charts.curves({"a": (x, x)}, title="t", x_label="x", y_label="y")
    two = charts.curves(
        {"a": (x, x), "b": (x, x**2)}, title="t", x_label="x", y_label="y", log_x=True
    )
    assert Image.open(io.BytesIO(one)).size == Image.open(io.BytesIO(two)).size
    assert one != two


def test_a_name_in_the_legend_is_no_formula() -> None:
    x = np.linspace(0, 1, 3)
    charts.curves({"$\\frac{$": (x, x)}, title="t", x_label="x", y_label="y")
