"""Lesions of the synthetic cohort, and the bright spots that are no lesions.

Everything is drawn in base space, before the warp that all images share.
"""

import dataclasses
import enum

import numpy as np

from uad_jax.data import anatomy, fields

SPACING_MM = anatomy.SPACING_MM
_MIN_ALPHA = 0.05  # fainter is cut to 0, so that the healthy twin is equal there
_MIN_RADIUS_MM = 1.8  # a smaller plaque could fall between the voxels


class Kind(enum.Enum):
    """What a subject has."""

    HEALTHY = "healthy"
    MS = "ms"
    TUMOUR = "tumour"
    STROKE = "stroke"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """Paint over the tissue: intensity = (1 - alpha) * tissue + alpha * paint.

    Attributes:
      alpha: Opacity, [X, Y, Z] float32 in [0, 1].
      paint: Intensity relative to white matter per modality.
    """

    alpha: np.ndarray
    paint: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Push:
    """Mass effect: tissue moves away from a centre by up to `amplitude` mm."""

    centre: np.ndarray
    radius: float
    amplitude: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lesion:
    """One subject's disease in base space.

    Attributes:
      layers: Painted in this order.
      extent: Soft lesion, [X, Y, Z] float32; above one half is the annotated lesion.
      push: Mass effect of a tumour, or None.
    """

    layers: tuple[Layer, ...]
    extent: np.ndarray
    push: Push | None = None


def draw(
    kind: Kind, base: anatomy.Template, maps: np.ndarray, rng: np.random.Generator
) -> Lesion | None:
    """Draws the lesion of a subject; None for a healthy one.

    Args:
      kind: Disease.
      base: The average brain.
      maps: The subject's soft tissue maps, [11, X, Y, Z].
      rng: The subject's lesion stream.
    """
    if kind is Kind.MS:
        return _sclerosis(base, maps, rng)
    if kind is Kind.TUMOUR:
        return _tumour(base, maps, rng)
    if kind is Kind.STROKE:
        return _stroke(base, maps, rng)
    return None


def harmless(
    base: anatomy.Template, maps: np.ndarray, rng: np.random.Generator
) -> list[Layer]:
    """Bright spots of healthy brains: caps, perivascular spaces, residual dura.

    They are drawn from the anatomy stream: a subject and its twin share them.

    Args:
      base: The average brain.
      maps: The subject's soft tissue maps, [11, X, Y, Z].
      rng: Source of randomness.

    Returns:
      Layers to paint before the lesion.
    """
    white = maps[anatomy.INDEX["wm"]]
    front = base.world[1]
    horns = np.clip((front - 18) / 8, 0, 1) + np.clip((-34 - front) / 8, 0, 1)
    strength = min(rng.gamma(1.5, 0.22), 0.9)
    width = rng.uniform(2.0, 4.5)
    rim = np.clip(1.2 - base.vent_distance / width, 0, 1) * (0.3 + 0.7 * horns)
    caps = Layer(
        alpha=_cut(strength * rim * white),
        paint={"t1": 0.85, "t2": 1.5, "flair": 1.38},
    )
    spaces = Layer(
        alpha=_cut(_perivascular(base, maps, rng)),
        paint={"t1": 0.35, "t2": 2.4, "flair": 0.75},
    )
    patch = fields.smooth_field(rng, base.shape, SPACING_MM, 12.0)
    if rng.uniform() >= 0.05:
        return [caps, spaces]
    shell = fields.step(3.0 - base.depth, 2.0) * (base.depth > 0)
    dura = Layer(
        alpha=_cut(shell * np.clip(2 * (patch - 0.4), 0, 1)),
        paint={"t1": 0.85, "t2": 0.7, "flair": 1.15},
    )
    return [caps, spaces, dura]


def _perivascular(
    base: anatomy.Template, maps: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Opacity of short thin tubes in deep white matter and below the putamen."""
    white = maps[anatomy.INDEX["wm"]] > 0.8
    deep = maps[anatomy.INDEX["striatum"]] > 0.6
    height = base.world[2]
    where = np.argwhere(
        (white & (base.depth > 14) & (height > 0)) | (deep & (height < 2))
    )
    count = int(rng.poisson(14))
    starts = where[rng.integers(len(where), size=count)].astype(np.float32)
    directions = rng.standard_normal((count, 3))
    directions[:, 2] += 1.5  # rather upwards
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    lengths = rng.uniform(2, 6, count) / SPACING_MM
    along = np.linspace(-0.5, 0.5, 7)
    points = (
        starts[:, None] + (lengths[:, None] * along)[..., None] * directions[:, None]
    )
    strength = np.repeat(rng.uniform(0.05, 0.12, count), len(along))
    alpha = np.zeros(base.shape, np.float32)
    np.add.at(alpha, tuple(np.rint(points).astype(int).reshape(-1, 3).T), strength)
    return np.minimum(alpha, 0.4)


def _sclerosis(
    base: anatomy.Template, maps: np.ndarray, rng: np.random.Generator
) -> Lesion:
    """Many small plaques, dense around the ventricles."""
    white = maps[anatomy.INDEX["wm"]]
    solid = _solid(maps)
    count = int(np.clip(np.rint(22 * np.exp(0.55 * rng.standard_normal())), 3, 90))
    candidates = np.flatnonzero((white > 0.5) & (base.depth > 5))
    away = np.maximum(base.vent_distance.ravel()[candidates], 0)
    density = 0.62 * np.exp(-away / 7) + 0.30 * np.exp(-away / 22) + 0.10
    chosen = rng.choice(candidates, count, p=density / density.sum())
    wobble = fields.smooth_field(rng, base.shape, SPACING_MM, 3.0)
    burden = np.exp(rng.normal(0.08, 0.18))  # some have confluent, large plaques

    alpha = np.zeros(base.shape, np.float32)
    extent = np.zeros(base.shape, np.float32)
    for flat in chosen:
        centre = np.unravel_index(flat, base.shape)
        near = base.vent_distance[centre] < 8
        radius = 2.3 * burden * np.exp(0.5 * rng.standard_normal())
        radius = np.clip(radius, 1.1, 8.0) * (1.25 if near else 1.0)
        longer, peak = rng.uniform(1, 2), rng.uniform(0.45, 1.0)
        box = _box(centre, 2.2 * radius + 4, base.shape)
        offset = base.world[(slice(None), *box)] - _column(base.world, centre)
        normal = base.vent_normal[(slice(None), *centre)]
        along = np.tensordot(normal, offset, 1)
        square = (offset**2).sum(0) - along**2 * (1 - 1 / longer**2)
        size = np.maximum(radius * (1 + 0.28 * wobble[box]), _MIN_RADIUS_MM)
        signed = size - np.sqrt(np.maximum(square, 0))
        inside = fields.step(signed, 2.0) * solid[box]
        if inside.max() < 0.9:
            continue  # mostly in fluid: it would be painted but not annotated
        alpha[box] = np.maximum(alpha[box], peak * inside)
        # A plaque between voxels keeps a quarter of its height: annotate it too.
        annotated = inside * (2 if radius < 2.5 else 1)
        extent[box] = np.maximum(extent[box], annotated)
    paint = {
        "t1": rng.normal(0.72, 0.10),
        "t2": rng.normal(1.85, 0.25),
        "flair": rng.normal(1.50, 0.10),
    }
    return Lesion(layers=(Layer(alpha=_cut(alpha), paint=paint),), extent=extent)


def _tumour(
    base: anatomy.Template, maps: np.ndarray, rng: np.random.Generator
) -> Lesion:
    """A mass with a necrotic core, oedema along the white matter, and mass effect."""
    radius = rng.uniform(9, 22)
    white = maps[anatomy.INDEX["wm"]]
    place = (white > 0.6) & (np.abs(base.world[0]) > 14)
    place &= (base.depth > 0.55 * radius + 4) & (base.world[2] > -25)
    where = np.argwhere(place)
    centre = tuple(where[rng.integers(len(where))])
    middle = _column(base.world, centre)
    wobble = 0.22 * fields.smooth_field(rng, base.shape, SPACING_MM, 0.8 * radius)
    wobble += 0.08 * fields.smooth_field(rng, base.shape, SPACING_MM, 4.0)
    slowness = fields.smooth_field(rng, base.shape, SPACING_MM, 8.0)
    distance = np.sqrt(((base.world - middle) ** 2).sum(0)) + radius * wobble
    solid = _solid(maps)
    core = fields.step(radius - distance, 2.5) * solid
    necrosis = fields.step(rng.uniform(0.35, 0.65) * radius - distance, 2.5) * core

    reach = rng.uniform(0.5, 1.3) * radius
    fluid = 1 - solid
    cost = white + 5 * (1 - white - fluid) + 9 * fluid
    box = _box(centre, 2.4 * radius + reach + 6, base.shape)
    arrival = np.full(base.shape, np.inf, np.float32)
    arrival[box] = _travel(
        core[box] > 0.5, (cost * np.exp(0.35 * slowness))[box], limit=reach
    )
    edge = np.maximum(reach - arrival, -10.0)
    oedema = fields.step(edge, 5.0) * solid
    oedema = np.maximum(oedema, core)
    layers = (
        Layer(alpha=_cut(0.9 * oedema), paint={"t1": 0.80, "t2": 2.0, "flair": 1.55}),
        Layer(alpha=_cut(core), paint={"t1": 0.72, "t2": 1.75, "flair": 1.30}),
        Layer(alpha=_cut(necrosis), paint={"t1": 0.42, "t2": 2.6, "flair": 0.80}),
    )
    push = Push(
        centre=middle.ravel(),
        radius=radius,
        amplitude=rng.uniform(0.18, 0.42) * radius,
    )
    return Lesion(layers=layers, extent=np.maximum(core, oedema), push=push)


def _stroke(
    base: anatomy.Template, maps: np.ndarray, rng: np.random.Generator
) -> Lesion:
    """An infarct: a wobbled cone from deep inside one hemisphere to its cortex."""
    side = rng.choice([-1.0, 1.0])
    apex = np.array(
        [side * rng.uniform(16, 30), rng.uniform(-45, 22), rng.uniform(-2, 22)]
    ).reshape(3, 1, 1, 1)
    axis = np.array(
        [side * rng.uniform(0.6, 1.4), rng.normal(0, 0.6), rng.normal(0.2, 0.5)]
    )
    axis /= np.linalg.norm(axis)
    half_angle = np.deg2rad(rng.uniform(16, 42))
    wobble = fields.smooth_field(rng, base.shape, SPACING_MM, 9.0)
    rough = fields.smooth_field(rng, base.shape, SPACING_MM, 4.0)
    offset = base.world - apex
    length = np.sqrt((offset**2).sum(0))
    along = np.tensordot(axis, offset, 1)
    angle = np.arccos(np.clip(along / np.maximum(length, 1e-3), -1, 1))
    signed = (half_angle - angle) * length + 4.0 * wobble + 1.5 * rough
    signed = np.minimum(signed, along)
    signed = np.minimum(signed, side * base.world[0] - 4)
    hind = sum(maps[anatomy.INDEX[name]] for name in ("cbgm", "cbwm", "bstem"))
    allowed = _solid(maps) * (1 - hind)
    body = (fields.step(signed, 4.0) * allowed).astype(np.float32)
    if rng.uniform() < 0.5:
        acute = {"t1": 0.86, "t2": 1.65, "flair": 1.38}
        return Lesion(layers=(Layer(alpha=_cut(0.9 * body), paint=acute),), extent=body)
    cavity = (fields.step(signed - 4.0, 3.0) * allowed).astype(np.float32)
    layers = (
        Layer(alpha=_cut(0.8 * body), paint={"t1": 0.75, "t2": 1.6, "flair": 1.35}),
        Layer(alpha=_cut(cavity), paint={"t1": 0.42, "t2": 2.5, "flair": 0.55}),
    )
    return Lesion(layers=layers, extent=body)


def _travel(seed: np.ndarray, cost: np.ndarray, limit: float) -> np.ndarray:
    """Travel time in mm of unit cost from the seed, by relaxing 18 neighbours."""
    time = np.where(seed, 0, np.inf).astype(np.float32)
    steps = [s for s in np.ndindex(3, 3, 3) if 1 <= sum(abs(v - 1) for v in s) <= 2]
    for _ in range(int(np.ceil(limit / SPACING_MM)) + 1):
        padded = np.pad(time, 1, constant_values=np.inf)
        for s in steps:
            length = SPACING_MM * np.sqrt(sum(abs(v - 1) for v in s))
            window = tuple(slice(v, v + n) for v, n in zip(s, time.shape, strict=True))
            np.minimum(time, padded[window] + length * cost, out=time)
    return time


def _solid(maps: np.ndarray) -> np.ndarray:
    """Share of tissue that is not fluid; 0 outside the brain."""
    fluid = maps[anatomy.INDEX["csf"]] + maps[anatomy.INDEX["vent"]]
    return np.clip(maps.sum(0) - fluid, 0, 1)


def _cut(alpha: np.ndarray) -> np.ndarray:
    return np.where(alpha < _MIN_ALPHA, 0, np.minimum(alpha, 1)).astype(np.float32)


def _box(
    centre: tuple[np.ndarray, ...], reach: float, shape: tuple[int, int, int]
) -> tuple[slice, ...]:
    """Voxels within `reach` mm of a centre, clipped to the grid."""
    half = int(np.ceil(reach / SPACING_MM))
    return tuple(
        slice(max(int(c) - half, 0), min(int(c) + half + 1, n))
        for c, n in zip(centre, shape, strict=True)
    )


def _column(world: np.ndarray, centre: tuple[np.ndarray, ...]) -> np.ndarray:
    """World position of a voxel, shaped to subtract from `world`."""
    x, y, z = centre
    return world[:, x, y, z].reshape(3, 1, 1, 1)
