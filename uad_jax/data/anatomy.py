"""The base brain of the synthetic cohort: soft tissue maps, folded per subject."""

import dataclasses
import functools
import pathlib

import numpy as np
from scipy import ndimage

from uad_jax.data import fields

CLASSES = (
    *("csf", "vent", "gm", "wm", "striatum", "thal"),
    *("pall", "bstem", "cbgm", "cbwm", "hippo"),
)
INDEX = {name: number for number, name in enumerate(CLASSES)}
SPACING_MM = 2.0
_ASSET = pathlib.Path(__file__).parent / "assets" / "anatomy.npz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """The average brain and what is derived from it once.

    Attributes:
      maps: Soft tissue maps, [11, 96, 96, 80] float32; the sum is the soft brain.
      affine: Voxel index to world RAS mm, [4, 4] float64.
      world: World x, y, z in mm of every voxel, [3, 96, 96, 80] float32.
      depth: Distance in mm to the outside of the filled brain, 0 outside.
      pial_depth: Distance in mm to the next fluid or the outside.
      outward: Unit normal away from the brain's centre, [3, 96, 96, 80].
      vent_distance: Signed distance in mm to the ventricle, negative inside.
      vent_normal: Its gradient, away from the ventricle, [3, 96, 96, 80].
      refolded: Share of the cortex that is redrawn per subject, in [0, 1].
    """

    maps: np.ndarray
    affine: np.ndarray
    world: np.ndarray
    depth: np.ndarray
    pial_depth: np.ndarray
    outward: np.ndarray
    vent_distance: np.ndarray
    vent_normal: np.ndarray
    refolded: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels of the grid."""
        x, y, z = self.depth.shape
        return x, y, z


@functools.lru_cache(maxsize=1)
def template() -> Template:
    """Loads the average brain; see `assets/make_anatomy.py` for how it was made."""
    with np.load(_ASSET) as asset:
        half = asset["right_half"].astype(np.float32) / int(asset["levels"])
        origin = asset["origin_mm"]
    maps = np.concatenate([half[:, ::-1], half], axis=1)
    shape = maps.shape[1:]
    affine = np.diag([SPACING_MM] * 3 + [1.0])
    affine[:3, 3] = origin
    world = np.stack(
        np.meshgrid(
            *[
                o + SPACING_MM * np.arange(n)
                for o, n in zip(origin, shape, strict=True)
            ],
            indexing="ij",
        )
    ).astype(np.float32)

    brain = maps.sum(0) > 0.5
    hull = ndimage.binary_closing(np.pad(brain, 8), iterations=6)[8:-8, 8:-8, 8:-8]
    depth = _distance(ndimage.binary_fill_holes(hull | brain))
    smooth_depth = ndimage.gaussian_filter(depth, 2.0)
    fluid = maps[INDEX["csf"]] > 0.5
    vent = maps[INDEX["vent"]] > 0.5
    vent_distance = ndimage.gaussian_filter(_distance(~vent) - _distance(vent), 0.7)
    return Template(
        maps=maps,
        affine=affine,
        world=world,
        depth=depth,
        pial_depth=_distance(brain & ~fluid),
        outward=-_unit_gradient(smooth_depth),
        vent_distance=vent_distance,
        vent_normal=_unit_gradient(ndimage.gaussian_filter(vent_distance, 1.0)),
        refolded=_refolded_share(maps, world, depth),
    )


def refold(base: Template, rng: np.random.Generator) -> np.ndarray:
    """Redraws the folds of the cerebral cortex.

    Sulci are the zero surfaces of a smooth random field that hardly changes along the
    surface normal; grey matter is what lies near a sulcus or near the surface, down
    to a random sulcal depth. Deep structures, insula, medial wall and cerebellum keep
    the template's shape (the warp varies them).

    Args:
      base: The average brain.
      rng: Source of the folds.

    Returns:
      Soft tissue maps like `base.maps`.
    """
    shape, spacing = base.shape, SPACING_MM
    thickness = rng.normal(2.7, 0.15)
    opening = np.clip(rng.normal(0.5, 0.25), 0.1, 1.1)  # half width of a sulcus, mm
    folds = fields.smooth_field(rng, shape, spacing, 4.2)
    folds = folds - 0.75 * fields.smooth_field(rng, shape, spacing, 9.0)
    reach = 12.0 + 4.0 * fields.smooth_field(rng, shape, spacing, 12.0)
    wobble = fields.smooth_field(rng, shape, spacing, 5.0)

    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"))
    lifted = index + base.outward * (0.7 * np.minimum(base.depth, 30.0) / spacing)
    sheet = fields.pull(folds, lifted)
    slope = np.sqrt(sum(g**2 for g in np.gradient(sheet, spacing)))
    to_sheet = np.abs(sheet) / (slope + 0.02)
    below = np.maximum(base.pial_depth - np.maximum(reach, 5.0), 0)
    to_sheet = np.sqrt(to_sheet**2 + below**2)

    surface = np.maximum(base.pial_depth - 1.0, 0)
    to_fluid = np.minimum(surface, np.maximum(to_sheet - opening, 0))
    grey = fields.step(thickness * (1 + 0.12 * wobble) - to_fluid, 2.0)
    fluid = fields.step(opening - to_sheet, 2.0) * 0.9
    fluid = np.maximum(fluid, fields.step(0.6 - base.pial_depth, 2.0))

    csf, gm, wm = (INDEX[name] for name in ("csf", "gm", "wm"))
    maps = base.maps.copy()
    cortex = maps[csf] + maps[gm] + maps[wm]
    share = base.refolded
    solid = (1 - fluid) * cortex
    maps[csf] += share * (fluid * cortex - maps[csf])
    maps[gm] += share * (solid * grey - maps[gm])
    maps[wm] += share * (solid * (1 - grey) - maps[wm])
    return maps


def _refolded_share(
    maps: np.ndarray, world: np.ndarray, depth: np.ndarray
) -> np.ndarray:
    """1 in the outer cerebral cortex, falling to 0 at the deep and medial parts."""
    cerebrum = maps[INDEX["csf"]] + maps[INDEX["gm"]] + maps[INDEX["wm"]]
    cerebrum = ndimage.gaussian_filter(cerebrum, 1.0)
    other = 1 - np.minimum(maps.sum(0), 1) + cerebrum
    shallow = fields.step(20.0 - depth, 8.0)
    lateral = fields.step(np.abs(world[0]) - 9.0, 8.0)
    hind = maps[INDEX["cbgm"]] + maps[INDEX["cbwm"]] + maps[INDEX["bstem"]]
    away = 1 - np.clip(3 * ndimage.gaussian_filter(hind, 1.5), 0, 1)
    return (np.clip(other, 0, 1) * shallow * lateral * away).astype(np.float32)


def _distance(inside: np.ndarray) -> np.ndarray:
    """Distance in mm from every inside voxel to the outside."""
    distance = ndimage.distance_transform_edt(inside, sampling=SPACING_MM)
    return np.asarray(distance, np.float32)


def _unit_gradient(field: np.ndarray) -> np.ndarray:
    gradient = np.stack(np.gradient(field, SPACING_MM))
    norm = np.sqrt((gradient**2).sum(0))
    return (gradient / np.maximum(norm, 1e-3)).astype(np.float32)
