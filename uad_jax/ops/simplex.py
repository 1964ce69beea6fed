"""Simplex noise on the device: fields of a fixed grid, random by a permutation.

The noise is the older OpenSimplex: at every vertex of a skewed lattice stands a
pseudo-random gradient g, and a point at offset d from the vertex receives
max(0, 2 - |d|^2)^4 (g . d). A field sums octaves, each with half the wavelength and
`persistence` times the amplitude of the one before. Which vertices touch a pixel, and
how much, does not depend on the permutation, so it is worked out once on the host.

Sources: K. Spencer, OpenSimplex; its use for diffusion in Wyatt et al. 2022, "AnoDDPM".

Deviation: in three dimensions the reference leaves out some of the smallest terms at
about 3 % of the points, by at most 1e-4; here the sum is complete, hence continuous.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uad_jax.types import Array, Key

_TILE = 8  # pixels; 8 and 16 run fastest, 8 needs less memory
_SKEW = (1 / math.sqrt(3) - 1) / 2  # plane to lattice; -1/6 in space
_UNSKEW = (math.sqrt(3) - 1) / 2  # lattice to plane; 1/3 in space
_NORM = {2: 47.0, 3: 103.0}  # brings one octave to about [-1, 1]
_GRADIENT_SQUARED = {2: 5**2 + 2**2, 3: 11**2 + 4**2 + 4**2}
_CELL = {2: math.sqrt(3), 3: 2.0}  # area or volume of the plane per vertex
_SPHERE = {2: 2 * math.pi, 3: 4 * math.pi}  # circumference or surface of the unit ball


def _permuted(vertices: Iterable[tuple[int, ...]]) -> np.ndarray:
    found = {p for vertex in vertices for p in itertools.permutations(vertex)}
    return np.array(sorted(found))


# All vertices, counted from the lattice cell's own, that can touch a point of the cell.
_NEAR2 = _permuted([(-1, 1), (0, 0), (0, 1), (0, 2), (1, 1)])
_NEAR3 = _permuted(
    [
        *[(0, 0, 0), (-1, 0, 1), (0, 0, 1), (-1, 1, 1)],
        *[(1, 1, 1), (0, 1, 2), (0, 1, 1), (0, 0, 2)],
    ]
)


@dataclasses.dataclass(frozen=True)
class Octaves:
    """How octaves add up to a field.

    Attributes:
      count: Number of octaves.
      persistence: Amplitude of an octave relative to the one before.
      wavelength: Pixels per lattice unit in the first octave.
    """

    count: int = 6
    persistence: float = 0.8
    wavelength: int = 64

    def validate(self) -> None:
        """Raises ValueError for settings that cannot work."""
        if self.count < 1 or self.wavelength < 1 or self.persistence <= 0:
            raise ValueError(
                f"Simplex noise of {self.count} octaves with wavelength "
                f"{self.wavelength} and persistence {self.persistence}: use 1 or more "
                "octaves, a wavelength of 1 or more, a persistence above 0."
            )

    def variance(self, num_axes: int) -> float:
        """Variance of a field in 2 or 3 dimensions, averaged over all positions.

        Exact for gradients that are independent and uniform. A field on a small grid
        that starts at the origin varies less there and more elsewhere.
        """
        # E (g . d)^2 = |g|^2 |d|^2 / n; the integral over the ball of radius sqrt(2)
        # of (2 - |d|^2)^8 |d|^2 is a Beta function of u = |d|^2.
        half = num_axes / 2
        beta = math.gamma(half + 1) * math.gamma(9) / math.gamma(half + 10)
        ball = _SPHERE[num_axes] / 2 * 2 ** (half + 9) * beta
        gradient = _GRADIENT_SQUARED[num_axes] / num_axes / _NORM[num_axes] ** 2
        amplitudes = sum(self.persistence ** (2 * k) for k in range(self.count))
        return gradient * ball / _CELL[num_axes] * amplitudes


class Plan(NamedTuple):
    """The fixed part of a 2-D field, in square tiles of pixels.

    Attributes:
      shape: (H, W) of the field.
      vertices: Lattice coordinates modulo 256 of the vertices that touch a tile,
        [tiles, vertices, 2] int32, padded at the end.
      weights: Share of a vertex's gradient (x, y) in a pixel, all octaves together,
        [tiles, vertices, 2, pixels of a tile] float32; 0 on padding.
    """

    shape: tuple[int, int]
    vertices: np.ndarray
    weights: np.ndarray


@functools.lru_cache(maxsize=8)
def plan(shape: tuple[int, int], octaves: Octaves = Octaves()) -> Plan:
    """Works out the fixed part of 2-D fields (host; a fifth of a second for 96 x 96).

    Args:
      shape: (H, W). Pixel (row, column) lies at the point (column, row) / wavelength.
      octaves: The octaves.

    Returns:
      The plan, about 450 bytes per pixel.
    """
    octaves.validate()
    row, column = (axis.reshape(-1) for axis in np.indices(shape))
    across = -(-shape[1] // _TILE)
    tile = row // _TILE * across + column // _TILE
    pixel = row % _TILE * _TILE + column % _TILE
    codes, pixels, weights = [], [], []
    for k in range(octaves.count):
        points = np.stack([column, row], -1) / (octaves.wavelength / 2**k)
        vertices, share = _touching(points)
        touched, near = np.nonzero((share != 0).any(-1))
        x, y = (vertices[touched, near] & 255).T
        codes.append((tile[touched] * 256 + x) * 256 + y)
        pixels.append(pixel[touched])
        weights.append(share[touched, near] * octaves.persistence**k)
    code, place = np.unique(np.concatenate(codes), return_inverse=True)
    first = np.searchsorted(code // 65536, np.arange(tile.max() + 1))
    rank = np.arange(len(code)) - first[code // 65536]
    table = np.zeros((tile.max() + 1, rank.max(initial=0) + 1, 2), np.int32)
    table[code // 65536, rank] = np.stack([code // 256 % 256, code % 256], -1)
    dense = np.zeros((*table.shape[:2], _TILE**2, 2))
    where = (code // 65536)[place], rank[place], np.concatenate(pixels)
    np.add.at(dense, where, np.concatenate(weights))
    dense = np.ascontiguousarray(np.swapaxes(dense, 2, 3), np.float32)
    return Plan(shape, table, dense)


def _touching(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vertices around points [P, 2] and what they give: [P, 8, 2] int and float64."""
    cell = np.floor(points + _SKEW * points.sum(-1, keepdims=True)).astype(int)
    vertices = cell[:, None] + _NEAR2
    offset = points[:, None] - (vertices + _UNSKEW * vertices.sum(-1, keepdims=True))
    kernel = np.maximum(0, 2 - (offset**2).sum(-1, keepdims=True)) ** 4
    return vertices, kernel * offset / _NORM[2]


def permutations(keys: Key) -> Array:
    """Draws a permutation of 0 to 255 for each of [N] keys, [N, 256] int32."""
    return jax.vmap(lambda key: jax.random.permutation(key, 256))(keys)


def field2(fixed: Plan, permutation: Array) -> Array:
    """Makes 2-D fields.

    Args:
      fixed: The fixed part.
      permutation: A permutation of 0 to 255 per field, [N, 256] int32.

    Returns:
      [N, H, W] float32 of mean 0 and variance `Octaves.variance(2)`.
    """
    height, width = fixed.shape
    vertices, weights = jnp.asarray(fixed.vertices), jnp.asarray(fixed.weights)

    def gradients(perm: Array) -> Array:
        return _gradient2(perm[(perm[vertices[..., 0]] + vertices[..., 1]) & 255])

    # Full float32: accelerators round the factors of products by default.
    tiles = jnp.einsum(
        "ntvc,tvcp->ntp",
        jax.vmap(gradients)(permutation),
        weights,
        precision=jax.lax.Precision.HIGHEST,
    )
    down, across = -(-height // _TILE), -(-width // _TILE)
    tiles = tiles.reshape(-1, down, across, _TILE, _TILE).transpose(0, 1, 3, 2, 4)
    return tiles.reshape(-1, down * _TILE, across * _TILE)[:, :height, :width]


def _gradient2(code: Array) -> Array:
    """Gradients [..., 2] of codes: bit 1 swaps (5, 2), bits 2 and 3 are signs."""
    x = jnp.where(code & 2, 2.0, 5.0)
    y = 7.0 - x
    return jnp.stack([jnp.where(code & 4, -x, x), jnp.where(code & 8, -y, y)], -1)


def field3(
    shape: tuple[int, int], octaves: Octaves, permutation: Array, depth: Array
) -> Array:
    """Makes slices of 3-D fields.

    Args:
      shape: (H, W). Pixel (row, column) of a slice lies at the point (column, row,
        depth) / wavelength.
      octaves: The octaves; every wavelength must be a whole number of pixels.
      permutation: A permutation of 0 to 255 per field, [N, 256] int32.
      depth: Position of the slice, [N] int32.

    Returns:
      [N, H, W] float32 of mean 0 and variance `Octaves.variance(3)`.

    Raises:
      ValueError: If a wavelength is no whole number.
    """
    octaves.validate()
    if octaves.wavelength % 2 ** (octaves.count - 1):
        raise ValueError(
            f"The last of {octaves.count} octaves of 3-D noise has the wavelength "
            f"{octaves.wavelength} / {2 ** (octaves.count - 1)} pixels. Use whole "
            "numbers: fewer octaves or a power of 2."
        )
    scale = jnp.array([octaves.wavelength >> k for k in range(octaves.count)])
    amplitude = jnp.array([octaves.persistence**k for k in range(octaves.count)])
    one = functools.partial(_slice3, shape, scale[:, None, None])
    total = jax.vmap(one)(permutation, depth.astype(jnp.int32))
    return jnp.einsum(
        "nkhw,k->nhw",
        total,
        amplitude / _NORM[3],
        precision=jax.lax.Precision.HIGHEST,
    )


def _slice3(shape: tuple[int, int], scale: Array, perm: Array, depth: Array) -> Array:
    """Sums the vertices of each octave apart, [octaves, H, W].

    The lattice is rational in space, and points often lie exactly between two cells.
    Whole numbers keep them on one side, and round each offset only once.
    """
    row, column = np.indices((1, *shape))[1:]
    point = [jnp.broadcast_to(axis, (len(scale), *shape)) for axis in (column, row)]
    point.append(jnp.broadcast_to(depth, point[0].shape))
    total = point[0] + point[1] + point[2]
    cell = [(6 * axis - total) // (6 * scale) for axis in point]
    corner = cell[0] + cell[1] + cell[2]
    # 3 * scale * (point - cell's own vertex), a whole number.
    inside = [
        3 * p - scale * (3 * c + corner) for p, c in zip(point, cell, strict=True)
    ]

    def add(value: Array, vertex: Array) -> tuple[Array, None]:
        shift = 3 * vertex + vertex.sum()
        x, y, z = (
            (inside[axis] - scale * shift[axis]).astype(jnp.float32) / (3 * scale)
            for axis in range(3)
        )
        code = perm[(cell[0] + vertex[0]) & 255]
        code = perm[(code + cell[1] + vertex[1]) & 255]
        code = perm[(code + cell[2] + vertex[2]) & 255]
        kernel = jnp.maximum(0.0, 2.0 - x * x - y * y - z * z)
        kernel = kernel * kernel
        return value + kernel * kernel * _dot3(code % 24, x, y, z), None

    value, _ = jax.lax.scan(add, jnp.zeros(total.shape), jnp.asarray(_NEAR3))
    return value


def _dot3(code: Array, x: Array, y: Array, z: Array) -> Array:
    """Products with the gradients of codes below 24: one 11, two 4, signs by eighth."""
    long, sign = code % 3, code // 3
    x, y, z = (
        jnp.where(sign & 1, x, -x),
        jnp.where(sign & 2, -y, y),
        jnp.where(sign & 4, -z, z),
    )
    return 4.0 * (x + y + z) + 7.0 * jnp.where(long == 0, x, jnp.where(long == 1, y, z))
