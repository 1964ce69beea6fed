"""Recipes: from a subject's scans to one volume on the model grid.

A recipe changes a scan in this order: background to 0; sample on the working grid
(if it has one); curvature flow; centre on the brain's bounding box; intensity law;
sample on the model grid. All modalities and masks of a subject share one grid.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from uad_jax.data import geometry, nifti, normalise, recipes
from uad_jax.types import Geometry

_SAME_SPACING = 1e-3  # relative difference below which nothing is interpolated
_FULL = 0.95  # a stripped image has more background than 1 - this

Law = recipes.Law
Recipe = recipes.Recipe
RECIPES = recipes.RECIPES
recipe_hash = recipes.recipe_hash


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
    subject = _gather(images, brain, lesion, ignore_affine)
    notes = list(subject.notes)
    if recipe.working_grid is None:
        frame = _place(recipe, reference, subject.brain)
    else:
        frame = _place_working_grid(
            recipe, recipe.working_grid, reference, subject.brain
        )
    _check_cropping(recipe, frame, reference, subject, notes)
    box = (frame.start, frame.step, recipe.grid)
    brain_grid = geometry.sample_mask(subject.brain, *box, recipe.mask_order)
    lesion_grid = geometry.sample_mask(subject.lesion, *box, recipe.mask_order)
    if not brain_grid.any():
        raise nifti.EmptyBrain(
            f"{reference.path}: no brain voxel is left on the {recipe.name} grid. "
            "Check the brain mask and the voxel sizes."
        )
    if subject.lesion.any() and not lesion_grid.any():
        notes.append("No lesion voxel is left on the grid.")
    channels = [
        _channel(recipe, frame, array, subject.brain, brain_grid)
        for array in subject.images
    ]
    prepared = Prepared(
        image=np.stack(channels, axis=-1),
        brain=np.ascontiguousarray(brain_grid.transpose(2, 0, 1)),
        lesion=np.ascontiguousarray(lesion_grid.transpose(2, 0, 1)),
        geometry=_geometry(reference, frame),
        notes=notes,
    )
    return _turn(prepared) if recipe.turned else prepared


def _turn(prepared: Prepared) -> Prepared:
    """Turns axial slices by 180 degrees, from axes that grow to R, A to L, P."""
    _, width, height = prepared.brain.shape
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    flip[:2, 3] = width - 1, height - 1
    placed = prepared.geometry

    def turned(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x[:, ::-1, ::-1])

    return dataclasses.replace(
        prepared,
        image=turned(prepared.image),
        brain=turned(prepared.brain),
        lesion=turned(prepared.lesion),
        geometry=dataclasses.replace(
            placed, grid_to_native=placed.grid_to_native @ flip
        ),
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


class _Subject(NamedTuple):
    """A subject's voxels on the canonical grid of the first image.

    Attributes:
      images: One [X, Y, Z] float32 per modality, background 0.
      brain: [X, Y, Z] bool.
      lesion: [X, Y, Z] bool.
      notes: What a user should know.
    """

    images: list[np.ndarray]
    brain: np.ndarray
    lesion: np.ndarray
    notes: list[str]


def _gather(
    images: dict[str, nifti.Scan],
    brain: nifti.Scan | None,
    lesion: nifti.Scan | None,
    ignore_affine: bool,
) -> _Subject:
    """Checks that all scans match, finds the brain and clears the background."""
    reference = next(iter(images.values()))
    arrays = [_matched(reference, scan, ignore_affine) for scan in images.values()]
    scans = [*images.items(), ("brain", brain), ("lesion", lesion)]
    notes = [f"{name}: {note}" for name, scan in scans if scan for note in scan.notes]
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
    stripped = [
        _strip(name, scan, array, mask, notes)
        for (name, scan), array in zip(images.items(), arrays, strict=True)
    ]
    return _Subject(stripped, mask, marked, notes)


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
    """Centres the model grid on the brain's bounding box."""
    low, high = geometry.bounding_box(brain)
    step, start = [], []
    for axis, edge in enumerate(geometry.spacing(reference.affine)):
        centre = (low[axis] + high[axis] - 1) / 2
        half = (recipe.grid[axis] - 1) / 2
        ratio = recipe.spacing[axis] / edge
        if abs(ratio - 1) < _SAME_SPACING:  # whole voxels: nothing to interpolate
            step.append(1.0)
            start.append(float(math.floor(centre - half + 0.5)))
        else:
            step.append(ratio)
            start.append(centre - ratio * half)
    return _Frame(start=_triple(start), step=_triple(step))


def _place_working_grid(
    recipe: Recipe, working_grid: geometry.Shape, scan: nifti.Scan, brain: np.ndarray
) -> _Frame:
    """Cuts the brain's box at 1 mm and crops or pads it to the working grid."""
    edges = geometry.spacing(scan.affine)
    ones = [1.0 if abs(edge - 1) < _SAME_SPACING else 1 / edge for edge in edges]
    first = [(one - 1) / 2 for one in ones]
    size = [max(round(n / one), 1) for n, one in zip(brain.shape, ones, strict=True)]
    at_1mm = geometry.sample_mask(
        brain, _triple(first), _triple(ones), _whole(size), recipe.mask_order
    )
    low, high = geometry.bounding_box(at_1mm)
    shape = [high[axis] - low[axis] for axis in range(3)]
    crop = [
        geometry.crop_or_pad_start(length, target)
        for length, target in zip(shape, working_grid, strict=True)
    ]
    box = [first[k] + ones[k] * low[k] for k in range(3)]
    start = [box[k] + ones[k] * (crop[k] + recipe.start[k]) for k in range(3)]
    return _Frame(
        start=_triple(start),
        step=_triple([ones[k] * recipe.spacing[k] for k in range(3)]),
        box_start=_triple(box),
        box_step=_triple(ones),
        box_shape=_whole(shape),
        crop=_whole(crop),
    )


def _triple(values: Sequence[float]) -> geometry.Triple:
    return float(values[0]), float(values[1]), float(values[2])


def _whole(values: Sequence[int]) -> geometry.Shape:
    return int(values[0]), int(values[1]), int(values[2])


def _channel(
    recipe: Recipe,
    frame: _Frame,
    array: np.ndarray,
    brain: np.ndarray,
    brain_grid: np.ndarray,
) -> np.ndarray:
    """Makes one modality: [D, H, W] float32 on the model grid."""
    if recipe.working_grid is None:
        image = geometry.sample(
            array, frame.start, frame.step, recipe.grid, recipe.order
        )
        image = _scaled(recipe, image, brain_grid)
        image[~brain_grid] = 0
    else:
        image = _through_working_grid(recipe, recipe.working_grid, frame, array, brain)
    return image.transpose(2, 0, 1)


def _through_working_grid(
    recipe: Recipe,
    working_grid: geometry.Shape,
    frame: _Frame,
    array: np.ndarray,
    brain: np.ndarray,
) -> np.ndarray:
    """Denoises, crops and scales at 1 mm, then samples on the model grid."""
    unit = (1.0, 1.0, 1.0)
    box = (frame.box_start, frame.box_step, frame.box_shape)
    image = geometry.sample(array, *box, 3)
    image = normalise.curvature_flow(image, recipe.flow_steps)
    inside = geometry.sample_mask(brain, *box, recipe.mask_order)
    crop = _triple(frame.crop)
    image = geometry.sample(image, crop, unit, working_grid, 0)
    inside = geometry.sample_mask(inside, crop, unit, working_grid, 0)
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
    subject: _Subject,
    notes: list[str],
) -> None:
    """Notes what falls outside the grid; too much of the brain is an error."""
    brain, lesion = subject.brain, subject.lesion
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
