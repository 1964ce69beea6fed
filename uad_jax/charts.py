"""Charts of a report, as PNG bytes: lines and dots that differ in more than colour."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from uad_jax import figures

_DASHES: tuple[Any, ...] = (
    "-",
    "--",
    "-.",
    ":",
    (0, (6, 1, 1, 1, 1, 1)),
    (0, (1, 3)),
    (0, (8, 3)),
)
_MARKERS = ("o", "D", "s", "^", "v", "P")


def curves(
    series: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
) -> bytes:
    """Draws one named line per series of (x, y); the first is the thickest."""
    figure = Figure(figsize=(5.4, 4.0), dpi=figures.DPI)
    figure.set_layout_engine("constrained")
    axis = figure.subplots()
    for index, (name, (x, y)) in enumerate(series.items()):
        dashes = _DASHES[index % len(_DASHES)]
        width = 1.3 if index else 2.4
        label = name.replace("$", r"\$")  # a name is no formula
        axis.plot(x, y, label=label, linewidth=width, linestyle=dashes)
    axis.set_title(title, fontsize=11)
    axis.set_xlabel(x_label, fontsize=10)
    axis.set_ylabel(y_label, fontsize=10)
    axis.tick_params(labelsize=9)
    axis.grid(alpha=0.25)
    if log_x:
        axis.set_xscale("log")
    if series:
        axis.legend(fontsize=8, handlelength=3.2)
    return figures.png(figure)


def volume_scores(groups: Mapping[str, Sequence[float] | np.ndarray]) -> bytes:
    """Draws one line of dots per group of volumes: how high each of them scored.

    Args:
      groups: Name -> volume scores, [n] each, such as healthy validation, healthy
        and abnormal ones; top to bottom. The bar is the median.
    """
    figure = Figure(figsize=(figures.WIDTH, 0.7 * len(groups) + 1.0), dpi=figures.DPI)
    figure.set_layout_engine("constrained")
    axis = figure.subplots()
    for row, scores in enumerate(groups.values()):
        ordered = np.sort(scores)
        spread = (np.arange(len(ordered)) * 0.382) % 0.5 - 0.25  # dots seldom overlap
        if len(ordered) > 1:
            axis.plot([np.median(ordered)] * 2, [row - 0.38, row + 0.38], "k", lw=2.5)
        axis.plot(
            ordered,
            row + spread,
            _MARKERS[row % len(_MARKERS)],
            markersize=6,
            alpha=0.7,
            markeredgewidth=0,
        )
    axis.set_yticks(
        range(len(groups)),
        [f"{name} ({len(scores)})" for name, scores in groups.items()],
        fontsize=10,
    )
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.set_xlabel("volume score (bar: median)", fontsize=10)
    axis.tick_params(axis="x", labelsize=9)
    axis.grid(axis="x", alpha=0.25)
    return figures.png(figure)
