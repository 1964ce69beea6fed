"""Figures of a report, as PNG bytes. Drawn without a screen."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.use("Agg")

_DPI = 110
TRUTH_COLOUR = "#21d07a"
FOUND_COLOUR = "#ff3b30"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One subject as it is shown.

    Attributes:
      title: Subject, kind and its figures.
      image: Input, [D, H, W] about [0, 1].
      reconstruction: What the model made of it, [D, H, W], or None.
      anomaly_map: Post-processed map, [D, H, W].
      found: Map above the operating threshold, [D, H, W] bool.
      lesion: Truth, [D, H, W] bool, or None without annotation.
      brain: [D, H, W] bool.
    """

    title: str
    image: np.ndarray
    reconstruction: np.ndarray | None
    anomaly_map: np.ndarray
    found: np.ndarray
    lesion: np.ndarray | None
    brain: np.ndarray


def radiological(plane: np.ndarray) -> np.ndarray:
    """Turns an axial [x, y] RAS plane for display.

    Anterior is up and the patient's right is on the left side of the picture, as
    radiologists read scans.
    """
    return plane[::-1, ::-1].T


def shown_slice(case: Case) -> int:
    """The axial slice to show: most lesion, else most found, else most brain."""
    for volume in (case.lesion, case.found, case.brain):
        if volume is not None and volume.any():
            return int(volume.sum(axis=(1, 2)).argmax())
    return case.image.shape[0] // 2


def case_panels(cases: Sequence[Case], map_limit: float) -> bytes:
    """One row per subject: input, reconstruction, map, overlay, truth.

    Args:
      cases: Subjects, top to bottom.
      map_limit: Anomaly value drawn in the brightest colour, the same in all rows.
    """
    columns = ["Input", "Reconstruction", "Anomaly map", "Found (red)", "Truth (green)"]
    rows = len(cases)
    figure = Figure(figsize=(2.45 * len(columns), 2.75 * rows + 0.3), dpi=_DPI)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for row, case in zip(axes, cases, strict=True):
        _draw_case(row, case, map_limit)
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(name, fontsize=10)
    return png(figure)


def _draw_case(row: Sequence[Axes], case: Case, map_limit: float) -> None:
    z = shown_slice(case)
    image = radiological(case.image[z])
    for axis in row:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_facecolor("black")
    gray: dict[str, Any] = {
        "cmap": "gray",
        "vmin": 0.0,
        "vmax": 1.0,
        "interpolation": "nearest",
    }
    row[0].imshow(image, **gray)
    row[0].text(2, 6, "R", color="white", fontsize=8)
    row[0].text(image.shape[1] - 7, 6, "L", color="white", fontsize=8)
    row[0].set_ylabel(f"{case.title}\nslice {z}", fontsize=8)
    if case.reconstruction is None:
        row[1].text(0.5, 0.5, "none", color="white", transform=row[1].transAxes)
    else:
        row[1].imshow(radiological(case.reconstruction[z]), **gray)
    row[2].imshow(
        radiological(case.anomaly_map[z]),
        cmap="inferno",
        vmin=min(0.0, float(case.anomaly_map.min())),
        vmax=map_limit,
        interpolation="nearest",
    )
    row[3].imshow(image, **gray)
    tint(row[3], radiological(case.found[z]), FOUND_COLOUR)
    row[4].imshow(image, **gray)
    if case.lesion is None:
        row[4].text(2, 10, "not annotated", color="white", fontsize=8)
        return
    truth = radiological(case.lesion[z])
    tint(row[4], truth, TRUTH_COLOUR)
    for axis in (row[2], row[3]):
        if truth.any():
            axis.contour(truth, levels=[0.5], colors=TRUTH_COLOUR, linewidths=0.8)


def tint(axis: Axes, mask: np.ndarray, colour: str) -> None:
    """Lays a half-transparent colour over the picture of an axis.

    Args:
      axis: Where to draw.
      mask: [height, width] bool, already turned for display.
      colour: Anything matplotlib understands, such as `FOUND_COLOUR`.
    """
    layer = np.zeros((*mask.shape, 4), np.float32)
    layer[mask] = matplotlib.colors.to_rgba(colour, 0.55)
    axis.imshow(layer, interpolation="nearest")


def curves(
    series: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
) -> bytes:
    """Draws one named line per series of (x, y)."""
    figure = Figure(figsize=(4.6, 3.5), dpi=_DPI)
    figure.set_layout_engine("constrained")
    axis = figure.subplots()
    for index, (name, (x, y)) in enumerate(series.items()):
        axis.plot(x, y, label=name, linewidth=2.0 if index == 0 else 1.0)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x_label, fontsize=9)
    axis.set_ylabel(y_label, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    if log_x:
        axis.set_xscale("log")
    if series:
        axis.legend(fontsize=7)
    return png(figure)


def png(figure: Figure) -> bytes:
    """Renders a figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
