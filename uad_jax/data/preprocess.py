"""Recipes: from a subject's scans to one volume on the model grid.

A recipe changes a scan in this order: background to 0; sample on the working grid
(if it has one); curvature flow; centre on the brain's bounding box; intensity law;
sample on the model grid. All modalities and masks of a subject share one grid.
"""

import dataclasses
import enum
import hashlib
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from uad_jax.data import geometry, nifti, normalise
from uad_jax.types import Geometry

_VERSION = 1  # part of every hash: raise it when results change
_SAME_SPACING = 1e-3  # relative difference below which nothing is interpolated
_FULL = 0.95  # a stripped image has more background than 1 - this


class Law(enum.Enum):
    """How intensities become about [0, 1]."""

    BRAIN_PERCENTILES = "brain_percentiles"  # 1st to 99th percentile in the brain
    VOLUME_MAXIMUM = "volume_maximum"  # 0 to the 99.8th percentile of the volume


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to prepare scans.

    Attributes:
      name: Key in `RECIPES`.
      grid: Samples of the model grid, (X, Y, Z).
      spacing: Distance of grid samples in mm.
      law: Intensity law.
      working_grid: 1 mm box that the brain is centred in first, (X, Y, Z); None
        samples the scan directly.
      start: First grid sample in voxels of the working grid.
      order: Image interpolation onto the grid: 1 linear, 3 cubic B-spline.
      mask_order: Mask interpolation: 0 nearest, 1 linear (half and more is inside).
      flow_steps: Iterations of curvature flow on the working grid.
      max_cropped: Largest share of the brain's voxels that may fall outside.
    """

    name: str
    grid: geometry.Shape
    spacing: geometry.Triple
    law: Law
    working_grid: geometry.Shape | None = None
    start: geometry.Triple = (0.0, 0.0, 0.0)
    order: int = 1
    mask_order: int = 1
    flow_steps: int = 0
    max_cropped: float = 0.02


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="grid2mm",
            grid=(96, 96, 80),
            spacing=(2.0, 2.0, 2.0),
            law=Law.BRAIN_PERCENTILES,
        ),
        Recipe(
            name="behrendt",
            grid=(96, 96, 50),
            spacing=(2.0, 2.0, 2.0),
            law=Law.BRAIN_PERCENTILES,
            working_grid=(192, 192, 100),
            start=(0.5, 0.5, 0.5),
            order=3,
            mask_order=0,
            flow_steps=3,
            max_cropped=0.2,
        ),
        Recipe(
            name="baur",
            grid=(128, 128, 110),
            spacing=(239 / 127, 239 / 127, 1.0),
            law=Law.VOLUME_MAXIMUM,
            working_grid=(240, 240, 155),
            start=(0.0, 0.0, 20.0),
            order=3,
            mask_order=0,
            flow_steps=3,
            max_cropped=0.2,
        ),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A subject on the model grid.

    Attributes:
      image: [D, H, W, C] float32, about [0, 1]; channels in the order given.
      brain: [D, H, W] bool.
      lesion: [D, H, W] bool; all False without a lesion mask.
      geometry: Where the grid lies in the first image's file.
      notes: What a user should know, one sentence each.
    """

    image: np.ndarray
    brain: np.ndarray
    lesion: np.ndarray
    geometry: Geometry
    notes: list[str]


def recipe_hash(recipe: Recipe) -> str:
    """Identifies a recipe by everything that changes its result (16 hex digits)."""
    fields = dataclasses.asdict(recipe) | {"law": recipe.law.value}
    text = json.dumps([_VERSION, fields], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def apply(
    recipe: Recipe,
    images: dict[str, nifti.Scan],
    brain: nifti.Scan | None = None,
    lesion: nifti.Scan | None = None,
    *,
    ignore_affine: bool = False,
) -> Prepared:
    """Prepares one subject.

    Args:
      recipe: One of `RECIPES`, or your own.
      images: Modality to image, all on the same voxels; the first one is the
        reference for the geometry.
      brain: Brain mask; None takes every voxel that is not 0 in some modality.
      lesion: Lesion mask, or None.
      ignore_affine: Whether scans of the same stored shape are taken to match
        although their affines differ.

    Returns:
      The subject on the grid.

    Raises:
      nifti.GridMismatch: The scans lie on different voxels.
      nifti.EmptyBrain: There is no brain, or a modality is 0 all over it.
      nifti.NiftiError: The image has no background, or too much of the brain would
        be cropped.
    """
    if not images:
        raise ValueError("No image was given; expected at least one modality.")
    reference = next(iter(images.values()))
    names = list(images)
    arrays = [_matched(reference, scan, ignore_affine) for scan in images.values()]
    notes = [
        f"{name}: {note}"
        for name, scan in [*images.items(), ("brain", brain), ("lesion", lesion)]
        if scan is not None
        for note in scan.notes
    ]
    if brain is None:
        mask = _nonzero(reference, arrays)
    else:
        mask = _as_mask(_matched(reference, brain, ignore_affine), brain)
    if not mask.any():
        path = reference.path if brain is None else brain.path
        raise nifti.EmptyBrain(f"{path}: no voxel is brain. Check or replace the file.")
    marked = np.zeros_like(mask)
    if lesion is not None:
        marked = _as_mask(_matched(reference, lesion, ignore_affine), lesion)
    arrays = [
        _strip(name, images[name], array, mask, notes)
        for name, array in zip(names, arrays, strict=True)
    ]

    frame = _place(recipe, reference, mask)
    _check_cropping(recipe, frame, reference, mask, marked, notes)
    channels = []
    brain_grid, lesion_grid = (
        geometry.sample_mask(
            volume, frame.start, frame.step, recipe.grid, recipe.mask_order
        )
        for volume in (mask, marked)
    )
    for array in arrays:
        if recipe.working_grid is None:
            box = (frame.start, frame.step, recipe.grid)
            image = geometry.sample(array, *box, recipe.order)
            image = _scaled(recipe, image, brain_grid)
            image[~brain_grid] = 0
        else:
            image = _through_working_grid(recipe, frame, array, mask)
        channels.append(image.transpose(2, 0, 1))
    return Prepared(
        image=np.stack(channels, axis=-1),
        brain=np.ascontiguousarray(brain_grid.transpose(2, 0, 1)),
        lesion=np.ascontiguousarray(lesion_grid.transpose(2, 0, 1)),
        geometry=_geometry(reference, frame),
        notes=notes,
    )


class _Frame(NamedTuple):
    """Where a grid lies, in voxels of the canonical scan.

    Attributes:
      start: First sample of the model grid.
      step: Distance of its samples.
      box_start: First sample of the brain's box on the working grid.
      box_step: Distance of working samples.
      box_shape: Working samples of the brain's box.
      crop: First box sample of the working grid (negative where it is padded).
    """

    start: geometry.Triple
    step: geometry.Triple
    box_start: geometry.Triple = (0.0, 0.0, 0.0)
    box_step: geometry.Triple = (1.0, 1.0, 1.0)
    box_shape: geometry.Shape = (0, 0, 0)
    crop: geometry.Shape = (0, 0, 0)


def _matched(
    reference: nifti.Scan, scan: nifti.Scan, ignore_affine: bool
) -> np.ndarray:
    """The voxels of a scan in the order of the reference, or GridMismatch."""
    if scan is reference:
        return scan.data
    nifti.check_same_grid(reference, scan, ignore_affine)
    return nifti.on_grid_of(reference, scan).data if ignore_affine else scan.data


def _as_mask(data: np.ndarray, scan: nifti.Scan) -> np.ndarray:
    return data if data.dtype == bool else nifti.binarise(data, scan.path)[0]


def _nonzero(reference: nifti.Scan, arrays: list[np.ndarray]) -> np.ndarray:
    """The brain of a skull-stripped subject: not 0 in some modality."""
    mask = arrays[0] != 0
    for array in arrays[1:]:
        mask |= array != 0
    if mask.mean() > _FULL:
        raise nifti.BadVoxels(
            f"{reference.path}: {mask.mean():.0%} of the voxels differ from 0, so the "
            "image is not skull-stripped. Give a brain mask, or strip it first."
        )
    return mask


def _strip(
    name: str, scan: nifti.Scan, array: np.ndarray, brain: np.ndarray, notes: list[str]
) -> np.ndarray:
    """Sets the background to 0 and makes 0 no more than the brain's dark end."""
    values = array[brain]
    if not values.any():
        raise nifti.EmptyBrain(
            f"{scan.path}: every voxel of the brain is 0. Check or replace the file."
        )
    if values.min() == values.max():
        notes.append(f"{name}: constant inside the brain; set to 0.")
        return np.zeros_like(array)
    floor = np.float32(min(np.percentile(values, 1), 0.0))
    if floor < 0:
        notes.append(
            f"{name}: shifted up by {-floor:.4g}, its 1st percentile was negative."
        )
    return np.where(brain, array - floor, np.float32(0))


def _place(recipe: Recipe, reference: nifti.Scan, brain: np.ndarray) -> _Frame:
    """Centres the grids on the brain's bounding box."""
    edges = geometry.spacing(reference.affine)
    if recipe.working_grid is None:
        low, high = geometry.bounding_box(brain)
        step, start = [], []
        for axis in range(3):
            ratio = recipe.spacing[axis] / edges[axis]
            first = (low[axis] + high[axis] - 1) / 2
            if abs(ratio - 1) < _SAME_SPACING:
                ratio = 1.0
                first = math.floor(first - (recipe.grid[axis] - 1) / 2 + 0.5)
            else:
                first -= ratio * (recipe.grid[axis] - 1) / 2
            step.append(ratio)
            start.append(float(first))
        return _Frame(start=_triple(start), step=_triple(step))

    work_step = [
        1.0 if abs(1 / edge - 1) < _SAME_SPACING else 1 / edge for edge in edges
    ]
    work_start = [(step - 1) / 2 for step in work_step]
    work_shape = [
        max(round(size / step), 1)
        for size, step in zip(brain.shape, work_step, strict=True)
    ]
    at_1mm = geometry.sample_mask(
        brain,
        _triple(work_start),
        _triple(work_step),
        _whole(work_shape),
        recipe.mask_order,
    )
    low, high = geometry.bounding_box(at_1mm)
    shape = [high[axis] - low[axis] for axis in range(3)]
    crop = [
        geometry.crop_or_pad_start(size, target)
        for size, target in zip(shape, recipe.working_grid, strict=True)
    ]
    box = [work_start[k] + work_step[k] * low[k] for k in range(3)]
    start = [box[k] + work_step[k] * (crop[k] + recipe.start[k]) for k in range(3)]
    step = [work_step[k] * recipe.spacing[k] for k in range(3)]
    return _Frame(
        start=_triple(start),
        step=_triple(step),
        box_start=_triple(box),
        box_step=_triple(work_step),
        box_shape=_whole(shape),
        crop=_whole(crop),
    )


def _triple(values: Sequence[float]) -> geometry.Triple:
    return float(values[0]), float(values[1]), float(values[2])


def _whole(values: Sequence[int]) -> geometry.Shape:
    return int(values[0]), int(values[1]), int(values[2])


def _through_working_grid(
    recipe: Recipe, frame: _Frame, array: np.ndarray, brain: np.ndarray
) -> np.ndarray:
    """Denoises, crops and scales at 1 mm, then samples on the model grid."""
    assert recipe.working_grid is not None
    unit = (1.0, 1.0, 1.0)
    box = (frame.box_start, frame.box_step, frame.box_shape)
    image = geometry.sample(array, *box, 3)
    image = normalise.curvature_flow(image, recipe.flow_steps)
    inside = geometry.sample_mask(brain, *box, recipe.mask_order)
    crop = _triple(frame.crop)
    image = geometry.sample(image, crop, unit, recipe.working_grid, 0)
    inside = geometry.sample_mask(inside, crop, unit, recipe.working_grid, 0)
    image = _scaled(recipe, image, inside)
    return geometry.sample(
        image, recipe.start, recipe.spacing, recipe.grid, recipe.order
    )


def _scaled(recipe: Recipe, image: np.ndarray, brain: np.ndarray) -> np.ndarray:
    if recipe.law is Law.BRAIN_PERCENTILES:
        return normalise.scale_by_brain_percentiles(image, brain)
    return normalise.scale_by_maximum(np.where(brain, image, np.float32(0)))


def _check_cropping(
    recipe: Recipe,
    frame: _Frame,
    reference: nifti.Scan,
    brain: np.ndarray,
    lesion: np.ndarray,
    notes: list[str],
) -> None:
    """Notes what falls outside the grid; too much of the brain is an error."""
    window = []
    for axis, (start, step, size) in enumerate(
        zip(frame.start, frame.step, recipe.grid, strict=True)
    ):
        low = math.ceil(start - step / 2)
        high = math.floor(start + step * (size - 0.5))
        window.append(slice(max(low, 0), max(high + 1, 0)))
        missing = max(-low, 0) + max(high + 1 - brain.shape[axis], 0)
        if missing > 0.25 * (high + 1 - low):
            notes.append(f"The scan covers only part of the grid along {'xyz'[axis]}.")
    region = tuple(window)
    cropped = 1 - np.count_nonzero(brain[region]) / np.count_nonzero(brain)
    if cropped > recipe.max_cropped:
        raise nifti.NiftiError(
            f"{reference.path}: {cropped:.1%} of the brain falls outside the "
            f"{recipe.name} grid (allowed: {recipe.max_cropped:.1%}). Check the voxel "
            "sizes and the brain mask, or raise max_cropped in the recipe."
        )
    if cropped > 0:
        notes.append(f"{cropped:.2%} of the brain falls outside the grid.")
    total = np.count_nonzero(lesion)
    if total:
        outside = 1 - np.count_nonzero(lesion & brain) / total
        lost = 1 - np.count_nonzero(lesion[region]) / total
        if outside > 0:
            notes.append(f"{outside:.2%} of the lesion lies outside the brain mask.")
        if lost > 0:
            notes.append(f"{lost:.2%} of the lesion falls outside the grid.")


def _geometry(reference: nifti.Scan, frame: _Frame) -> Geometry:
    to_canonical = geometry.box_transform(frame.start, frame.step)
    return Geometry(
        native_shape=reference.native_shape,
        native_affine=reference.native_affine,
        grid_to_native=np.linalg.inv(reference.native_to_canonical) @ to_canonical,
    )
