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
      vicinity: Within 14 mm of the brain, bool.
      pial_depth: Distance in mm to the next fluid or the outside.
      outward: Unit normal away from the brain's centre, [3, 96, 96, 80].
      vent_distance: Signed distance in mm to the ventricle, negative inside.
      vent_normal: Its gradient, away from the ventricle, [3, 96, 96, 80].
      vent_growth: How tissue moves when the ventricles grow by 1 mm, smooth, the
        same shape.
      refolded: Share of the cortex that is redrawn per subject, in [0, 1].
    """

    maps: np.ndarray
    affine: np.ndarray
    world: np.ndarray
    depth: np.ndarray
    vicinity: np.ndarray
    pial_depth: np.ndarray
    outward: np.ndarray
    vent_distance: np.ndarray
    vent_normal: np.ndarray
    vent_growth: np.ndarray
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
    vent_normal = _unit_gradient(ndimage.gaussian_filter(vent_distance, 1.0))
    # Between two horns the normal flips; unsmoothed, the warp would tear there.
    growth = vent_normal * np.exp(-np.abs(vent_distance) / 14)
    growth = ndimage.gaussian_filter(growth, (0, 2.0, 2.0, 2.0))
    return Template(
        maps=maps,
        affine=affine,
        world=world,
        depth=depth,
        vicinity=_distance(depth == 0) < 14,
        pial_depth=_distance(brain & ~fluid),
        outward=-_unit_gradient(smooth_depth),
        vent_distance=vent_distance,
        vent_normal=vent_normal,
        vent_growth=growth,
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
    thickness = rng.normal(3.0, 0.15)
    opening = np.clip(rng.normal(0.7, 0.3), 0.2, 1.4)  # half width of a sulcus, mm
    folds = fields.smooth_field(rng, shape, spacing, 5.6)
    folds = folds - 0.5 * fields.smooth_field(rng, shape, spacing, 12.0)
    reach = 14.0 + 5.0 * fields.smooth_field(rng, shape, spacing, 12.0)
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
    _add_folia(base, maps, wobble)
    cortex = maps[csf] + maps[gm] + maps[wm]
    share = base.refolded
    solid = (1 - fluid) * cortex
    maps[csf] += share * (fluid * cortex - maps[csf])
    maps[gm] += share * (solid * grey - maps[gm])
    maps[wm] += share * (solid * (1 - grey) - maps[wm])
    return maps


def strip_skull(brain: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What an imperfect skull stripping keeps of a soft brain: one piece, no holes.

    Args:
      brain: Soft brain in the subject's space, [X, Y, Z] float32 in [0, 1].
      rng: Source of the imperfection.

    Returns:
      Brain mask, [X, Y, Z] bool.
    """
    edge = 0.5 + 0.12 * fields.smooth_field(rng, brain.shape, SPACING_MM, 9.0)
    mask = ndimage.binary_opening(ndimage.gaussian_filter(brain, 0.5) > edge)
    pieces, _ = ndimage.label(mask)
    largest = pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])
    return np.asarray(ndimage.binary_fill_holes(largest))


def _add_folia(base: Template, maps: np.ndarray, wobble: np.ndarray) -> None:
    """Cuts leaves into the cerebellar cortex, fanned about the fourth ventricle."""
    _, front, height = base.world
    angle = np.arctan2(height + 34, -(front + 44))
    wave = np.cos(34 * angle + 1.2 * wobble)
    shallow = fields.step(9.0 - base.pial_depth, 8.0)
    csf, gm, wm = (INDEX[name] for name in ("csf", "cbgm", "cbwm"))
    cut = 0.45 * np.maximum(wave, 0) ** 2 * shallow * maps[gm]
    core = 0.45 * np.maximum(-wave, 0) ** 2 * fields.step(base.pial_depth - 4, 6.0)
    core = core * maps[gm]
    maps[csf] += cut
    maps[wm] += core
    maps[gm] -= cut + core


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
