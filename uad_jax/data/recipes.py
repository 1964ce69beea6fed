"""The named ways to prepare scans; `preprocess.apply` carries them out."""

import dataclasses
import enum
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from uad_jax.data import geometry

_VERSION = 1  # part of every hash: raise it when results change


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
      turned: Whether axes grow to L, P, S instead of R, A, S: axial slices are turned
        by 180 degrees.
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
    turned: bool = False


# Behrendt et al. 2023 (pDDPM), load-time transform of the authors' code. The brain box
# keeps its last voxel. Registration to SRI24 and N4 are not done: give scans that have
# them.
_BEHRENDT = Recipe(
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
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        # The default for mixed data: the whole brain, averaged where the scan is finer.
        Recipe(
            name="grid2mm",
            grid=(96, 96, 80),
            spacing=(2.0, 2.0, 2.0),
            law=Law.BRAIN_PERCENTILES,
        ),
        _BEHRENDT,
        # The authors' own axes, for weights that were trained with their code.
        dataclasses.replace(_BEHRENDT, name="behrendt_lps", turned=True),
        # Baur et al. 2021 (comparative study), as on the 240 x 240 x 155 SRI24 grid
        # with the brain in its middle; masks are nearest, not cubic.
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


def to_json(recipe: Recipe) -> dict[str, Any]:
    """Converts a recipe to plain JSON types; `turned` only if it is set.

    Recipes, and so their hashes, stay those of stores made before the field existed.
    """
    fields = dataclasses.asdict(recipe) | {"law": recipe.law.value}
    if not recipe.turned:
        del fields["turned"]
    return fields


def from_json(fields: Mapping[str, Any]) -> Recipe:
    """Inverts `to_json`.

    Raises:
      ValueError: If this is not the description of a recipe of this version.
    """
    known = {field.name for field in dataclasses.fields(Recipe)}
    if set(fields) | {"turned"} != known:
        raise ValueError(
            f"The recipe {fields.get('name', '')!r} has the fields "
            f"{', '.join(sorted(fields))}; expected {', '.join(sorted(known))}. It "
            "was not made by this version of the code."
        )
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in fields.items()
    }
    return Recipe(**values | {"law": Law(fields["law"])})


def recipe_hash(recipe: Recipe) -> str:
    """Identifies a recipe by everything that changes its result (16 hex digits)."""
    text = json.dumps([_VERSION, to_json(recipe)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
