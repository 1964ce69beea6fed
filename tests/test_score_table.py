"""Scores that a tool gives beside its maps: read strictly, written exactly."""

import itertools
import json
import pathlib

import numpy as np
import pytest

from tests import stores
from uad_jax import score_table
from uad_jax.data.sources import Store

SPLITS = {"train": 1, "test": 2}
GRID = (5, 8, 8, 1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Subjects test-0, test-1 and train-0 of five slices."""
    folder = tmp_path_factory.mktemp("score_table")
    return Store.open(stores.tiny_store(folder, SPLITS, grid=GRID))


def test_a_folder_without_a_table_gives_nothing(
    tmp_path: pathlib.Path, store: Store
) -> None:
    given = score_table.read(tmp_path, store.volumes, store)
    assert set(given.values()) == {score_table.Given(None, None)}
    assert len(given) == 3


def test_scores_come_back_to_the_last_bit(tmp_path: pathlib.Path, store: Store) -> None:
    rng = np.random.default_rng(0)
    written = {}
    for info, _ in itertools.product(store.volumes, range(2)):  # the second replaces
        slices = np.exp(rng.normal(0, 20, info.depth)).astype(np.float32)
        written[info.subject] = -slices.max() / np.float32(3), slices
        score_table.add(tmp_path, info.subject, *written[info.subject])
    given = score_table.read(tmp_path, store.volumes, store)
    for subject, (whole, slices) in written.items():
        assert given[subject].volume_score == whole
        np.testing.assert_array_equal(given[subject].slice_score, slices)
    assert [path.name for path in tmp_path.iterdir()] == [score_table.NAME]


def test_names_that_the_store_does_not_know_are_a_warning(
    tmp_path: pathlib.Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["test-0", "test-1", "nobody"]
    table = {name: {"volume_score": 1} for name in names}
    (tmp_path / "scores.json").write_text(json.dumps(table))
    infos = [info for info in store.volumes if info.split == "test"]
    given = score_table.read(tmp_path, infos, store)
    assert [one.volume_score for one in given.values()] == [1.0, 1.0]
    assert "1 names are no subjects" in caplog.text
    assert "nobody" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[1]", "holds a list"),
        ('{"test-0": 3}', "test-0: found 3; expected volume_score"),
        ('{"test-0": {"score": 3}}', "test-0: found score; expected volume_score"),
        ('{"test-0": {"volume_score": NaN}}', "test-0: volume_score holds 1 NaN"),
        ('{"test-0": {"volume_score": 1e300}}', "test-0: volume_score holds 1 NaN"),
        ('{"test-0": {"volume_score": "a"}}', "volume_score is not one number"),
        ('{"test-0": {"slice_score": [1, 2]}}', r"shape \(2,\).*5 numbers"),
        ('{"test-0": {"slice_score": [1, [2]]}}', "slice_score is not 5 numbers"),
        ('{"test-0": {"volume_score": 1}}', "not for test-1, train-0"),
    ],
)
def test_scores_that_cannot_be_used_are_an_error(
    tmp_path: pathlib.Path, store: Store, content: str, message: str
) -> None:
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        score_table.read(tmp_path, store.volumes, store)


def test_all_that_is_wrong_is_listed_at_once(
    tmp_path: pathlib.Path, store: Store
) -> None:
    table = {"test-0": {"volume_score": "a"}, "test-1": {"slice_score": []}}
    (tmp_path / "scores.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r"2 problem\(s\)"):
        score_table.read(tmp_path, store.volumes, store)
