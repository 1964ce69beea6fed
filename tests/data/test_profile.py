import json
import pathlib

import numpy as np
import pytest

from tests import stores
from uad_jax.data import profile, sources

TWO = ("t1", "t2")


def _values(seed: int, gamma: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.1, 1, 5000) ** gamma


def _print(values: np.ndarray) -> np.ndarray:
    found = profile.fingerprint(values)
    assert found is not None
    return found


def test_fingerprint_of_a_ramp_is_its_quantiles() -> None:
    expected = (np.array([1, 5, 10, 25, 75, 90, 95, 99]) - 50) / 90
    np.testing.assert_allclose(_print(np.arange(101.0)), expected, atol=1e-12)


def test_unit_and_offset_do_not_count() -> None:
    values = _values(0)
    np.testing.assert_allclose(_print(values), _print(900 * values - 7), atol=1e-9)


def test_few_or_equal_voxels_have_no_fingerprint() -> None:
    assert profile.fingerprint(np.arange(99.0)) is None
    assert profile.fingerprint(np.ones(500)) is None


def test_distance_is_in_spreads_and_tells_another_histogram() -> None:
    usual = profile.of([_print(_values(seed)) for seed in range(5)])
    assert usual.count == 5
    np.testing.assert_allclose(usual.spread, 0.03)  # the least there is
    assert usual.distance(usual.centre + 0.06) == pytest.approx(2.0)
    assert usual.distance(_print(_values(9))) < 1
    assert usual.distance(_print(_values(9, gamma=8.0))) > 5


def test_a_bright_lesion_moves_two_quantiles_at_most() -> None:
    usual = profile.of([_print(_values(seed)) for seed in range(5)])
    values = _values(9)
    values[:200] = 2.0  # 4 % of the brain
    assert usual.distance(_print(values)) > 5
    assert usual.distance(_print(values), ignore=2) < 1
    assert usual.distance(_print(_values(9, gamma=8.0)), ignore=2) > 5


def test_a_profile_comes_back_from_json() -> None:
    usual = profile.of([_print(_values(seed)) for seed in range(3)])
    back = profile.Profile.from_json(json.loads(json.dumps(usual.to_json())))
    np.testing.assert_allclose(back.centre, usual.centre, atol=5e-5)
    np.testing.assert_allclose(back.spread, usual.spread, atol=5e-5)
    assert back.count == 3


def test_the_profile_of_a_store_is_that_of_its_brains(tmp_path: pathlib.Path) -> None:
    path = stores.tiny_store(
        tmp_path, {"train": 30}, grid=(6, 32, 32, 2), modalities=TWO
    )
    store = sources.Store.open(path)
    found = profile.of_store(store, store.volumes[:2], [1])
    assert list(found) == ["t2"]
    prints = []
    for volume in store.volumes[:2]:
        codes, plane = store.read_volume(volume.uid)
        prints.append(_print(codes[..., 1][plane == sources.BRAIN_BIT]))
    np.testing.assert_allclose(found["t2"].centre, np.mean(prints, axis=0))
    many = profile.of_store(store, store.volumes, [0, 1])
    assert many["t1"].count == many["t2"].count == 24  # a sample of the 30
