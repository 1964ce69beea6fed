"""The pictures of a comparison: segmentations side by side, and curves."""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from uad_jax import figures, segmentations
from uad_jax.data import sources
from uad_jax.entries import Entry, lesion_values, value
from uad_jax.metrics import statistics
from uad_jax.ops import intensity

_COLUMNS = 5  # pictures side by side
_WIDTH = 12.0  # inches
_DPI = 110
_CURVES = {
    "ap": "AP, volume mean",
    "dice": "Dice at the operating threshold",
    "volume_auroc": "Volume AUROC",
    "validation_loss": "Validation loss (own to each method)",
}
AXES = {"step": "training step", "train_seconds": "seconds of training"}
_DASHES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One subject with the segmentations of several runs.

    Attributes:
      title: The subject.
      why: Why it is shown.
      case: Image, truth and brain; found is what any run found.
      found: Run -> what it found at its own threshold, [D, H, W] bool.
      captions: Run -> its figures.
    """

    title: str
    why: str
    case: figures.Case
    found: Mapping[str, np.ndarray]
    captions: Mapping[str, str]


def choose(entries: Sequence[Entry]) -> tuple[list[Panel], list[str]]:
    """Reads the subjects that show most of a comparison.

    The best, the median and the worst by the mean AP over the runs, and the one where
    the runs' Dice is farthest apart; without lesion masks by volume score.

    Returns:
      The panels, and notes on what cannot be shown. The notes stand in pages that are
      passed on: they name no folder of the machine, which the log does.
    """
    drawable = [entry for entry in entries if entry.found is not None]
    if not drawable:
        return [], ["No run has stored segmentations: there are no pictures."]
    chosen = chosen_subjects(entries)
    found, notes = _read_found(drawable, chosen)
    readable = [entry for entry in drawable if entry.name in found]
    if not readable:
        return [], [*notes, "There are no pictures."]
    try:
        store = _open_store(readable)
        panels = [
            _panel(store, readable, found, subject, why)
            for subject, why in chosen.items()
        ]
    except _NoPicturesError as error:
        return [], [*notes, f"There are no pictures: {error}"]
    return panels, notes


class _NoPicturesError(ValueError):
    """Why there are none, without a path."""


def _read_found(
    entries: Sequence[Entry], subjects: Collection[str]
) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """Run -> subject -> segmentation, of the files that can be read, and notes."""
    found: dict[str, dict[str, np.ndarray]] = {}
    notes = []
    for entry in entries:
        masks: Mapping[str, np.ndarray] = entry.found or {}
        try:
            found[entry.name] = {
                name: masks[name] for name in subjects if name in masks
            }
        except segmentations.SegmentationsError as error:
            logging.warning("There are no pictures of %s: %s", entry.name, error)
            notes.append(
                f"The stored segmentations of {entry.name} are damaged: there are no "
                "pictures of it. Evaluate the run again."
            )
    return found, notes


def chosen_subjects(entries: Sequence[Entry]) -> dict[str, str]:
    """Subject -> why it is shown."""
    ranks, by = _mean_ap(entries), "mean AP over the runs"
    words = ("best", "median", "worst")
    if not ranks:
        ranks, by = _mean_rank(entries), "mean rank of the volume score"
        words = ("highest", "median", "lowest")
    order = sorted(ranks, key=lambda name: (-ranks[name], name))
    places = {len(order) - 1: words[2], len(order) // 2: words[1], 0: words[0]}
    if len(order) == 2:  # one of two is no median
        places = {1: words[2], 0: words[0]}
    chosen = {
        order[place]: f"{places[place]} by {by} ({ranks[order[place]]:.2f})"
        for place in sorted(places)
        if order
    }
    spread = _dice_range(entries)
    if spread:
        apart = max(sorted(spread), key=lambda name: spread[name])
        if spread[apart] > 0:
            why = f"the runs' Dice is farthest apart ({spread[apart]:.2f})"
            chosen[apart] = f"{chosen[apart]}; {why}" if apart in chosen else why
    return chosen


def draw(panel: Panel) -> bytes:
    """Draws one subject: image, truth, and one segmentation per run, as PNG."""
    case = panel.case
    z = figures.shown_slice(case)
    look = figures.common_look([case], map_limit=1.0)

    def turned(volume: np.ndarray) -> np.ndarray:
        return figures.radiological(volume[z][look.view], case.geometry)

    image = turned(case.image)
    truth = None
    if case.lesion is not None:
        truth = turned(case.lesion)
    names = ["Image", "Truth", *panel.found]
    figure, axes = _grid(len(names), image.shape)
    for name, axis in zip(names, axes, strict=True):
        figures.draw_scan(axis, image, case, **look.gray)
        axis.set_title(name, fontsize=9, parse_math=False)
        if name in panel.found:
            found = turned(panel.found[name])
            figures.tint(axis, found, figures.FOUND_COLOUR)
            axis.set_xlabel(panel.captions[name], fontsize=8, parse_math=False)
        if truth is not None and name != "Image":
            figures.outline(axis, truth, figures.TRUTH_COLOUR)
    figures.mark_sides(axes[0], case)
    if truth is None:
        axes[1].set_xlabel("not annotated", fontsize=8)
    axes[0].set_xlabel(figures.slice_caption(case, z), fontsize=8)
    return figures.png(figure)


def draw_curves(curves: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes]:
    """Draws figures over steps and over seconds of training.

    Args:
      curves: Run -> {"points": [...], "validation": [...]}; every item has "step",
        "train_seconds" and figures, None or NaN where there is none. Maps made by
        another tool have no step: they are a level line.

    Returns:
      "step" and "train_seconds" -> PNG; empty without anything to draw.
    """
    drawn = {}
    for axis_name in AXES:
        series = {
            name: dict(_series(curves, name, axis_name))
            for name in _CURVES
            if any(len(x) for _, (x, _) in _series(curves, name, axis_name))
        }
        if series:
            drawn[axis_name] = _draw_curves(series, curves, axis_name)
    return drawn


def _draw_curves(
    series: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]],
    curves: Mapping[str, Mapping[str, Any]],
    axis_name: str,
) -> bytes:
    figure = Figure(figsize=(_WIDTH, 3.6 * -(-len(series) // 2)), dpi=_DPI)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(-(-len(series) // 2), 2, squeeze=False).ravel()
    for axis, (name, lines) in zip(axes, series.items(), strict=False):
        for run, (x, y) in lines.items():
            number = list(curves).index(run)  # a run looks the same in every picture
            style: dict[str, Any] = {
                "color": f"C{number % 10}",
                "linestyle": _DASHES[number % len(_DASHES)],
                "label": run,
            }
            if len(x):
                marker = _MARKERS[number % len(_MARKERS)]
                axis.plot(x, y, marker=marker, markersize=4, **style)
            elif (level := _level(curves[run], name)) is not None:
                axis.axhline(level, linewidth=1.2, **style)
        axis.set_title(_CURVES[name], fontsize=10)
        axis.set_xlabel(AXES[axis_name], fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, handlelength=3.0)
    for axis in axes[len(series) :]:
        axis.set_axis_off()
    return figures.png(figure)


def _series(
    curves: Mapping[str, Mapping[str, Any]], name: str, axis_name: str
) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    part = "validation" if name == "validation_loss" else "points"
    for run, curve in curves.items():
        points = [(item.get(axis_name), item.get(name)) for item in curve[part]]
        known = [point for point in points if None not in point]
        x, y = np.array(known, np.float64).reshape(-1, 2).T
        finite = np.isfinite(x) & np.isfinite(y)
        if finite.any() or _level(curve, name) is not None:
            yield run, (x[finite], y[finite])


def _level(curve: Mapping[str, Any], name: str) -> float | None:
    """The figure of maps, which have no step."""
    points = curve["points"]
    level = points[0].get(name) if points and points[0]["step"] is None else None
    return None if level is None or math.isnan(level) else float(level)


def _grid(count: int, shape: tuple[int, ...]) -> tuple[Figure, Sequence[Axes]]:
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    height = _WIDTH / columns * shape[0] / shape[1] + 0.5
    figure = Figure(figsize=(_WIDTH, rows * height), dpi=_DPI)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, list(axes[:count])


def _mean_ap(entries: Sequence[Entry]) -> dict[str, float]:
    found = [lesion_values(entry.subjects, "ap")[0] for entry in entries]
    shared = set.intersection(*(set(one) for one in found))
    return {name: math.fsum(one[name] for one in found) / len(found) for name in shared}


def _mean_rank(entries: Sequence[Entry]) -> dict[str, float]:
    """Share of the volumes with a lower score, mean over runs: scores have no unit."""
    total: dict[str, list[float]] = {}
    for entry in entries:
        scores = {n: value(row, "volume_score") for n, row in entry.subjects.items()}
        ordered = np.sort(list(scores.values()))
        for name, score in scores.items():
            share = float(np.searchsorted(ordered, score)) / len(ordered)
            total.setdefault(name, []).append(share)
    return {name: statistics.summarize(shares).mean for name, shares in total.items()}


def _dice_range(entries: Sequence[Entry]) -> dict[str, float]:
    found = []
    for entry in entries:
        values, _ = lesion_values(entry.subjects, f"dice_{entry.operating[0]}")
        found.append({n: v for n, v in values.items() if not math.isnan(v)})
    found = [one for one in found if one]
    if len(found) < 2:
        return {}
    shared = set.intersection(*(set(one) for one in found))
    return {
        name: max(one[name] for one in found) - min(one[name] for one in found)
        for name in shared
    }


def _open_store(entries: Sequence[Entry]) -> sources.Store:
    """The store of the images, wherever one of the runs still finds it."""
    for entry in entries:
        if entry.store:
            try:
                return sources.Store.open(entry.store)
            except (sources.StoreError, OSError):
                continue
    raise _NoPicturesError(
        "the store of the images is gone or damaged. Put it back where the evaluation "
        "found it, or evaluate the runs on it again."
    )


def _panel(
    store: sources.Store,
    entries: Sequence[Entry],
    masks: Mapping[str, Mapping[str, np.ndarray]],
    subject: str,
    why: str,
) -> Panel:
    infos = {info.subject: info for info in store.volumes}
    if subject not in infos:
        raise _NoPicturesError(f"the store has no subject {subject!r} any more.")
    info = infos[subject]
    try:
        codes, plane = store.read_volume(info.uid)
    except (sources.StoreError, OSError) as error:
        logging.warning("There are no pictures: %s", error)
        raise _NoPicturesError(
            f"the store {store.path.name!r} of the images is damaged at {subject!r}. "
            "Prepare it again."
        ) from error
    found = {
        entry.name: masks[entry.name][subject]
        for entry in entries
        if subject in masks[entry.name]
    }
    odd = [name for name, mask in found.items() if mask.shape != plane.shape]
    if odd:
        raise _NoPicturesError(
            f"the store's {subject!r} has the shape {plane.shape}, but the "
            f"segmentation of {odd[0]} is {found[odd[0]].shape}."
        )
    modality = (entries[0].results["set"].get("modalities") or store.modalities)[0]
    channel = store.modalities.index(modality) if modality in store.modalities else 0
    annotated = info.annotated and info.label != "sham"
    lesion = (plane & sources.LESION_BIT) > 0
    anything = np.logical_or.reduce([np.zeros(plane.shape, bool), *found.values()])
    case = figures.Case(
        title=subject,
        image=np.asarray(intensity.decode(jnp.asarray(codes[..., channel]))),
        reconstruction=None,
        anomaly_map=anything.astype(np.float32),
        found=anything,
        lesion=lesion if annotated else None,
        brain=(plane & sources.BRAIN_BIT) > 0,
        geometry=info.geometry,
    )
    captions = {e.name: _caption(e, subject) for e in entries if e.name in found}
    return Panel(title=subject, why=why, case=case, found=found, captions=captions)


def _caption(entry: Entry, subject: str) -> str:
    rule, threshold = entry.operating
    row = entry.subjects[subject]
    parts = []
    for word, column in (("Dice", f"dice_{rule}"), ("AP", "ap")):
        number = value(row, column)
        parts += [] if math.isnan(number) else [f"{word} {number:.2f}"]
    if threshold is not None:
        parts.append(f"above {threshold:.3g}")
    return ", ".join(parts)
