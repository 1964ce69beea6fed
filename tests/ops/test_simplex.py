"""Simplex noise against the reference's values and a brute-force sum.

The permutation of a seed and the pinned values follow the reference implementation;
the brute-force sums visit every lattice vertex in a wide neighbourhood.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uad_jax.ops import simplex

SIX = simplex.Octaves()


def _reference_permutation(seed: int) -> np.ndarray:
    """Permutation of OpenSimplex: a 64-bit congruential shuffle."""

    def advance(state: int) -> int:
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        return state - 2**64 if state >= 2**63 else state

    for _ in range(3):
        seed = advance(seed)
    left, permutation = list(range(256)), [0] * 256
    for i in reversed(range(256)):
        seed = advance(seed)
        chosen = (seed + 31) % (i + 1)
        permutation[i] = left[chosen]
        left[chosen] = left[i]
    return np.array(permutation)


PERM = _reference_permutation(3)


def _brute2(x: float, y: float, perm: np.ndarray = PERM) -> float:
    """One octave at a point, all vertices within 4 cells."""
    table = [(5, 2), (2, 5), (-5, 2), (-2, 5), (5, -2), (2, -5), (-5, -2), (-2, -5)]
    skew, unskew = -0.211324865405187, 0.366025403784439
    cell = np.floor(np.array([x, y]) + skew * (x + y)).astype(int)
    total = 0.0
    for shift in itertools.product(range(-4, 5), repeat=2):
        i, j = cell + shift
        d = np.array([x - i - unskew * (i + j), y - j - unskew * (i + j)])
        if d @ d < 2:
            code = perm[(perm[i & 255] + j) & 255]
            total += (2 - d @ d) ** 4 * (d @ table[(code & 14) // 2])
    return total / 47


def _brute3(point: np.ndarray, perm: np.ndarray = PERM) -> float:
    """The same in space."""
    table = []
    for z, y, x in itertools.product((1, -1), (1, -1), (-1, 1)):
        sign = np.array([x, y, z])
        table += [sign * (11, 4, 4), sign * (4, 11, 4), sign * (4, 4, 11)]
    cell = np.floor(point - point.sum() / 6).astype(int)
    total = 0.0
    for shift in itertools.product(range(-3, 4), repeat=3):
        vertex = cell + shift
        d = point - vertex - vertex.sum() / 3
        if d @ d < 2:
            code = 0
            for axis in vertex:
                code = perm[(code + axis) & 255]
            total += (2 - d @ d) ** 4 * (d @ table[code % 24])
    return total / 103


@functools.cache
def _fields(shape: tuple[int, int], octaves: simplex.Octaves = SIX) -> np.ndarray:
    fixed = simplex.plan(shape, octaves)
    perms = jnp.asarray(np.stack([PERM, PERM[::-1]]))
    return np.asarray(jax.jit(lambda p: simplex.field2(fixed, p))(perms))


def test_the_brute_force_sum_and_its_permutation_are_those_of_the_reference() -> None:
    assert PERM[:10].tolist() == [164, 187, 231, 144, 104, 73, 108, 29, 15, 238]
    assert sorted(PERM) == list(range(256))
    assert abs(_brute2(0.3, 0.7) - -0.6491465369) < 1e-9
    assert abs(_brute2(12.25, -3.5) - -0.6834544950) < 1e-9
    assert abs(_brute3(np.array([0.3, 0.7, 0.2])) - 0.4483508687) < 1e-9
    assert abs(_brute3(np.array([12.25, -3.5, 7.75])) - -0.3380913102) < 1e-9


def test_a_field_has_the_values_of_the_reference() -> None:
    field = _fields((96, 96))[0]
    known = {(10, 20): -0.0495136463, (20, 10): -1.2505331129, (95, 95): -1.3901336547}
    for (row, column), value in known.items():
        assert abs(field[row, column] - value) < 1e-5
    assert field[0, 0] == 0
    assert abs(field.mean() - -0.2157743670) < 1e-5
    assert abs(field.std() - 0.5539841515) < 1e-5


@pytest.mark.parametrize(
    ("shape", "octaves"),
    [
        ((11, 21), SIX),
        ((8, 3), simplex.Octaves(3, 0.5, 5)),
        ((1, 1), simplex.Octaves(1, 1.0, 1)),
    ],
)
def test_fields_of_any_shape_equal_the_brute_force_sum(shape, octaves) -> None:
    for perm, field in zip((PERM, PERM[::-1]), _fields(shape, octaves), strict=True):
        assert field.shape == shape
        for row, column in np.ndindex(shape):
            if (row + 3 * column) % 7:
                continue
            total = 0.0
            for k in range(octaves.count):
                wave = octaves.wavelength / 2**k
                value = _brute2(column / wave, row / wave, perm)
                total += octaves.persistence**k * value
            assert abs(field[row, column] - total) < 1e-5


def test_a_smaller_grid_is_a_corner_of_a_larger_one() -> None:
    whole = _fields((96, 96))
    np.testing.assert_allclose(_fields((11, 21)), whole[:, :11, :21], atol=1e-5)


def test_octaves_touch_the_known_numbers_of_vertices() -> None:
    counts = []
    for k in range(6):
        fixed = simplex.plan((96, 96), simplex.Octaves(1, 0.8, 64 >> k))
        touched = (fixed.weights != 0).any((2, 3))
        counts.append(len(np.unique(fixed.vertices[touched], axis=0)))
    assert counts == [10, 17, 43, 122, 405, 1459]


def _permutations(count: int, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(np.stack([rng.permutation(256) for _ in range(count)]))


def test_plane_fields_have_mean_zero_and_the_computed_variance() -> None:
    fixed = simplex.plan((96, 96), SIX)
    fields = jax.jit(lambda p: simplex.field2(fixed, p))(_permutations(200))
    assert abs(float(fields.mean())) < 0.05
    assert abs(float(jnp.sqrt(jnp.mean(fields**2))) - 0.591) < 0.02
    assert abs(SIX.variance(2) ** 0.5 - 0.5920) < 1e-4
    np.testing.assert_array_equal(fields[:, 0, 0], 0)


def test_space_fields_have_the_values_of_the_reference() -> None:
    perms = jnp.asarray(np.stack([PERM, PERM]))
    fields = jax.jit(lambda p, z: simplex.field3((24, 24), SIX, p, z))(
        perms, jnp.array([249, 0])
    )
    # The reference leaves out terms of up to 1e-4 per octave.
    known = [
        [-1.2222802987, -0.4382499840, -1.4997508212, -0.6381427717, -0.8588063942],
        [0.0, 0.4264802444, 1.0970687664, 0.6611751826, 0.6603430925],
    ]
    for field, (first, second, third, last, mean) in zip(fields, known, strict=True):
        found = [field[0, 0], field[10, 20], field[20, 10], field[23, 23]]
        np.testing.assert_allclose(found, [first, second, third, last], atol=3e-4)
        assert abs(field.mean() - mean) < 1e-5


def test_space_fields_equal_the_brute_force_sum_at_each_depth() -> None:
    octaves = simplex.Octaves(3, 0.8, 8)
    depths = np.array([0, 13, 999, -5])
    make = jax.jit(lambda p, z: simplex.field3((7, 12), octaves, p, z))
    perms = np.stack([PERM, PERM[::-1], PERM, PERM])
    fields = make(jnp.asarray(perms), jnp.asarray(depths))
    for field, perm, depth in zip(fields, perms, depths, strict=True):
        for row, column in itertools.product(range(0, 7, 2), range(0, 12, 3)):
            total = 0.0
            for k, wave in enumerate((8, 4, 2)):
                point = np.array([column, row, depth]) / wave
                total += 0.8**k * _brute3(point, perm)
            assert abs(field[row, column] - total) < 1e-5


def test_space_fields_change_smoothly_with_depth_and_have_their_variance() -> None:
    octaves = simplex.Octaves(2, 0.5, 32)
    perms = _permutations(60, seed=1)
    make = jax.jit(lambda p, z: simplex.field3((32, 32), octaves, p, z))
    depth = jnp.arange(60) * 16
    fields, after = make(perms, depth), make(perms, depth + 1)
    assert 0 < float(jnp.abs(fields - after).max()) < 0.4
    std = float(jnp.sqrt(jnp.mean(fields**2)))
    assert abs(std / octaves.variance(3) ** 0.5 - 1) < 0.1


def test_permutations_are_permutations_and_differ_between_keys() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    found = np.asarray(simplex.permutations(keys))
    np.testing.assert_array_equal(np.sort(found), np.tile(np.arange(256), (3, 1)))
    assert len({row.tobytes() for row in found}) == 3


def test_octaves_that_cannot_work_are_named() -> None:
    with pytest.raises(ValueError, match="Simplex noise of 0 octaves"):
        simplex.plan((8, 8), simplex.Octaves(count=0))
    with pytest.raises(ValueError, match="the wavelength 12 / 8 pixels"):
        simplex.field3(
            (8, 8), simplex.Octaves(4, 0.8, 12), _permutations(1), jnp.zeros(1)
        )
