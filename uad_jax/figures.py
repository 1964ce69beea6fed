"""Figures of a report, as PNG bytes. Drawn without a screen.

Axial slices are shown as radiologists read them (`radiological`), all of one figure
with one window, one field of view and one colour scale. Nothing is told by colour
alone: findings are filled, the truth is outlined.
"""

import dataclasses
import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from uad_jax.types import Geometry

matplotlib.use("Agg")

# Apart for readers who cannot tell red from green (Okabe and Ito).
TRUTH_COLOUR = "#3fc1ff"
FOUND_COLOUR = "#ff5a1f"

DPI = 110
WIDTH = 12.0  # inches, of a figure over the whole page
_BAR = 0.75  # inches of height for the colour bar
_MARGIN = 3  # voxels around the brain
_GALLERY_COLUMNS = 3
_WHITE: dict[str, Any] = {"color": "white", "fontsize": 9, "fontweight": "bold"}


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
      geometry: Where the slices lie in the scan, for positions and scale in mm.
    """

    title: str
    image: np.ndarray
    reconstruction: np.ndarray | None
    anomaly_map: np.ndarray
    found: np.ndarray
    lesion: np.ndarray | None
    brain: np.ndarray
    geometry: Geometry | None = None


class Look(NamedTuple):
    """What all pictures of a figure share."""

    view: tuple[slice, slice]  # the [x, y] box around every brain
    gray: dict[str, Any]  # how scans are drawn
    scale: dict[str, Any]  # how maps are drawn


def radiological(plane: np.ndarray, geometry: Geometry | None = None) -> np.ndarray:
    """Turns an axial [x, y] plane for display.

    Anterior is up and the patient's right is on the left side of the picture, as
    radiologists read scans. Without a geometry the axes grow to the right and front.
    """
    if geometry is not None:
        to_world = geometry.native_affine @ geometry.grid_to_native
        x, y = (1 if to_world[axis, axis] > 0 else -1 for axis in (0, 1))
        plane = plane[::x, ::y]
    return plane[::-1, ::-1].T


def shown_slice(case: Case) -> int:
    """The axial slice to show: most lesion, else most found, else the highest scores.

    The last is the slice with most of the brain's highest-scoring hundredth.
    """
    for volume in (case.lesion, case.found):
        if volume is not None and volume.any():
            return int(volume.sum(axis=(1, 2)).argmax())
    if not case.brain.any():
        return case.image.shape[0] // 2
    limit = np.quantile(case.anomaly_map[case.brain], 0.99)
    high = case.brain & (case.anomaly_map >= limit)
    return int(high.sum(axis=(1, 2)).argmax())


def slice_caption(case: Case, z: int) -> str:
    """Says which slice is shown, such as "slice 41 of 80, z = -12 mm".

    The position is the scanner's, in the middle of the slice.
    """
    depth, width, height = case.image.shape
    if depth == 1:
        return ""
    caption = f"slice {z + 1} of {depth}"
    if case.geometry is None:
        return caption
    middle = np.array([(width - 1) / 2, (height - 1) / 2, z, 1.0])
    to_world = case.geometry.native_affine @ case.geometry.grid_to_native
    return f"{caption}, z = {round(float((to_world @ middle)[2]))} mm"


def case_panels(
    cases: Sequence[Case], map_limit: float, *, threshold: float | None = None
) -> bytes:
    """One row per subject: input, reconstruction, map, overlay, truth.

    A column that no subject fills is left out.

    Args:
      cases: Subjects, top to bottom.
      map_limit: Anomaly value drawn in the last colour, the same in all rows.
      threshold: Operating threshold, marked on the colour bar.
    """
    columns = ["Input", "Reconstruction", "Anomaly map", "Found (filled)"]
    if all(case.reconstruction is None for case in cases):
        columns.remove("Reconstruction")
    if any(case.lesion is not None for case in cases):
        columns.append("Truth (outlined)")
    look = common_look(cases, map_limit)
    figure, parts = _page(len(cases), 1, len(columns), look, threshold)
    for part, case in zip(parts, cases, strict=True):
        row = part.subplots(1, len(columns), squeeze=False)[0]
        _draw_case(dict(zip(columns, row, strict=True)), case, look)
        words = [*case.title.split("\n"), slice_caption(case, shown_slice(case))]
        caption = " · ".join(word for word in words if word)
        caption = textwrap.fill(caption, 130)
        _caption(part, caption, fontsize=11, fontweight="bold")
    return png(figure)


def _draw_case(
    panels: Mapping[str, Axes],
    case: Case,
    look: Look,
) -> None:
    z = shown_slice(case)

    def turned(volume: np.ndarray) -> np.ndarray:
        return radiological(volume[z][look.view], case.geometry)

    def show(name: str, volume: np.ndarray, **style: Any) -> None:
        draw_scan(panels[name], turned(volume), case, **style)

    for name, axis in panels.items():
        axis.set_title(name, fontsize=9)
        if name not in ("Reconstruction", "Anomaly map"):
            show(name, case.image, **look.gray)
    mark_sides(panels["Input"], case)
    show("Anomaly map", case.anomaly_map, **look.scale)
    tint(panels["Found (filled)"], turned(case.found), FOUND_COLOUR)
    if case.reconstruction is not None:
        show("Reconstruction", case.reconstruction, **look.gray)
    elif "Reconstruction" in panels:
        _say(panels["Reconstruction"], "none")
    if case.lesion is not None:
        for name in ("Truth (outlined)", "Found (filled)", "Anomaly map"):
            outline(panels[name], turned(case.lesion), TRUTH_COLOUR)
    elif "Truth (outlined)" in panels:
        _say(panels["Truth (outlined)"], "not annotated")


def gallery(
    cases: Sequence[Case], map_limit: float, *, threshold: float | None = None
) -> bytes:
    """Volumes by their score, highest first: each its input and the map laid over it.

    Args:
      cases: Ranked subjects; `Case.title` says the rank, who it is, and how high the
        score is.
      map_limit: Anomaly value drawn in the last colour, the same for all.
      threshold: Operating threshold, marked on the colour bar; what is found at it
        is outlined.
    """
    look = common_look(cases, map_limit)
    figure, parts = _page(
        -(-len(cases) // _GALLERY_COLUMNS), _GALLERY_COLUMNS, 2, look, threshold
    )
    for part, case in zip(parts, cases, strict=False):
        _draw_ranked(part.subplots(1, 2), case, look)
        lines = [*case.title.split("\n"), slice_caption(case, shown_slice(case))]
        wrapped = (textwrap.fill(line, 54) for line in lines if line)
        _caption(part, "\n".join(wrapped), fontsize=9)
    return png(figure)


def _draw_ranked(
    pair: Sequence[Axes],
    case: Case,
    look: Look,
) -> None:
    z = shown_slice(case)
    image, values, found = (
        radiological(volume[z][look.view], case.geometry)
        for volume in (case.image, case.anomaly_map, case.found)
    )
    for axis in pair:
        draw_scan(axis, image, case, **look.gray)
    mark_sides(pair[0], case)
    lowest, highest = look.scale["vmin"], look.scale["vmax"]
    share = (values - lowest) / (highest - lowest)
    opacity = np.clip(1.5 * share - 0.3, 0.0, 0.7)  # low scores hide nothing
    draw_scan(pair[1], values, case, **look.scale, alpha=opacity)
    outline(pair[1], found, FOUND_COLOUR)


def _caption(part: SubFigure, text: str, **style: Any) -> None:
    """Writes above the pictures; a subject's name is no formula."""
    part.suptitle(text, x=0.008, ha="left", parse_math=False, **style)


def _page(
    rows: int, columns: int, pictures: int, look: Look, threshold: float | None
) -> tuple[Figure, list[SubFigure]]:
    """An empty figure of rows x columns parts of some pictures, over a colour bar."""
    wide, high = (side.stop - side.start for side in look.view)
    height = WIDTH / (columns * pictures) * high / wide + 0.62  # captions
    figure = Figure(figsize=(WIDTH, rows * height + _BAR), dpi=DPI)
    figure.set_layout_engine("constrained")
    heights = [rows * height, _BAR]
    halves = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)
    above, below = halves[:, 0]
    _colour_bar(below, look, threshold)
    return figure, list(above.subfigures(rows, columns, squeeze=False).ravel())


def _colour_bar(part: SubFigure, look: Look, threshold: float | None) -> None:
    lowest, highest = look.scale["vmin"], look.scale["vmax"]
    bar = part.colorbar(
        matplotlib.cm.ScalarMappable(
            matplotlib.colors.Normalize(lowest, highest), look.scale["cmap"]
        ),
        cax=part.subplots(),
        orientation="horizontal",
        extend="max",
    )
    text = f"anomaly score of all maps; all scans: window 0 to {look.gray['vmax']:.2f}"
    if threshold is not None and lowest <= threshold <= highest:
        bar.ax.axvline(threshold, color="white", linewidth=4)
        bar.ax.axvline(threshold, color="black", linewidth=1.5)
        text += f"; mark: operating threshold {threshold:.3g}"
    bar.set_label(text, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def draw_scan(axis: Axes, plane: np.ndarray, case: Case, **style: Any) -> None:
    """Draws a plane that is turned for display; an image smooth, a map as it is."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_facecolor("black")
    aspect = 1.0
    if case.geometry is not None:
        across, along = _voxel_mm(case.geometry)
        aspect = along / across
    axis.imshow(plane, aspect=aspect, **{"interpolation": "nearest", **style})


def mark_sides(axis: Axes, case: Case) -> None:
    """Says which side is the patient's right, and how long 5 cm are."""
    if case.image.shape[0] == 1:
        return  # a picture, which may lie anyhow
    for x, side in ((0.03, "R"), (0.97, "L")):
        axis.text(
            x,
            0.97,
            side,
            transform=axis.transAxes,
            **_WHITE,
            va="top",
            ha="left" if x < 0.5 else "right",
        )
    if case.geometry is None:
        return
    length = 50.0 / _voxel_mm(case.geometry)[0]
    left, right = axis.get_xlim()
    bottom, top = axis.get_ylim()
    x, y = left + 0.04 * (right - left), bottom + 0.035 * (top - bottom)
    axis.plot([x, x + length], [y, y], color="white", linewidth=2)
    axis.text(x, y + 0.02 * (top - bottom), "5 cm", **_WHITE)


def _say(axis: Axes, text: str) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_facecolor("black")
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", **_WHITE)


def common_look(cases: Sequence[Case], map_limit: float) -> Look:
    """The field of view, window and colour scale that pictures side by side share."""
    inside = np.zeros(cases[0].image.shape[1:], bool)
    lowest, brightest = 0.0, 1.0
    for case in cases:
        inside |= case.brain.any(axis=0)
        lowest = min(lowest, float(case.anomaly_map.min()))
        if case.brain.any():  # a bright lesion must not drown in white
            bright = np.quantile(case.image[case.brain], 0.999)
            brightest = max(brightest, float(bright))
    sides = []
    for axis in (0, 1):
        size = int(inside.shape[axis])
        places = np.flatnonzero(inside.any(axis=1 - axis))
        first, last = (places[0], places[-1]) if len(places) else (0, size)
        start, stop = max(int(first) - _MARGIN, 0), min(int(last) + _MARGIN + 1, size)
        sides.append(slice(start, stop))
    highest = map_limit if map_limit > lowest else lowest + 1.0
    gray = {"cmap": "gray", "vmin": 0.0, "vmax": brightest}
    return Look(
        view=(sides[0], sides[1]),
        gray={**gray, "interpolation": "bilinear"},
        scale={"cmap": "inferno", "vmin": lowest, "vmax": highest},
    )


def _voxel_mm(geometry: Geometry) -> tuple[float, float]:
    """Edges of a voxel of the model grid along x and y."""
    to_world = geometry.native_affine @ geometry.grid_to_native
    across, along = np.linalg.norm(to_world[:3, :2], axis=0)
    return float(across), float(along)


def tint(axis: Axes, mask: np.ndarray, colour: str) -> None:
    """Lays a half-transparent colour over the picture of an axis.

    Args:
      axis: Where to draw.
      mask: [height, width] bool, already turned for display.
      colour: Anything matplotlib understands, such as `FOUND_COLOUR`.
    """
    layer = np.zeros((*mask.shape, 4), np.float32)
    layer[mask] = matplotlib.colors.to_rgba(colour, 0.55)
    axis.imshow(layer, interpolation="nearest", aspect=axis.get_aspect())


def outline(axis: Axes, mask: np.ndarray, colour: str) -> None:
    """Draws the border of a mask along its voxels; nothing for an empty mask.

    Args:
      axis: Where to draw.
      mask: [height, width] bool, already turned for display.
      colour: Anything matplotlib understands, such as `TRUTH_COLOUR`.
    """
    if not mask.any():
        return
    fine = np.kron(np.pad(mask, 1), np.ones((4, 4)))  # so that corners stay square
    height, width = fine.shape
    axis.contour(
        (np.arange(width) + 0.5) / 4 - 1.5,
        (np.arange(height) + 0.5) / 4 - 1.5,
        fine,
        levels=[0.5],
        colors=colour,
        linewidths=1.1,
    )


def png(figure: Figure) -> bytes:
    """Renders a figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
