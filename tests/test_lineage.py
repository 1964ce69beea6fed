import logging
import pathlib
import types
from typing import Any

import pytest

from uad_jax import lineage, workdir


def _run(folder: pathlib.Path, *subjects: str, licence: str = "CC0") -> pathlib.Path:
    """The notes of a run that was trained on some subjects."""
    (folder / "checkpoints").mkdir(parents=True)
    described = {
        "licences": ["", licence],
        "subjects": {name: f"hash-{name}" for name in subjects},
    }
    workdir.write_json(folder / workdir.FINGERPRINT, described)
    return folder


def _scans(*subjects: str) -> list[Any]:
    return [types.SimpleNamespace(subject=s, content=f"hash-{s}") for s in subjects]


def test_a_run_from_scratch_has_seen_its_own_scans(tmp_path: pathlib.Path) -> None:
    run = _run(tmp_path / "run", "a", "b")
    lineage.write(run, [])
    assert not (run / lineage.ORIGINS).exists()
    assert lineage.seen(run) == ({"hash-a", "hash-b"}, {"CC0"})
    lineage.check_validation(run, "store", _scans("a"))  # the splits' own business


def test_what_trained_earlier_stages_counts_through_all_of_them(
    tmp_path: pathlib.Path,
) -> None:
    first = _run(tmp_path / "first", "a", licence="CC BY")
    second = _run(tmp_path / "second", "b")
    lineage.write(second, [first, first])
    third = _run(tmp_path / "third", "c")
    lineage.write(third, [second / "checkpoints"])
    assert lineage.seen(third).contents == {"hash-a", "hash-b", "hash-c"}
    assert lineage.seen(third).licences == {"CC BY", "CC0"}
    with pytest.raises(ValueError, match=r"2 validation scans.*\(a, b\).*same fold"):
        lineage.check_validation(third, "store", _scans("a", "b", "c"))
    lineage.write(third, [])  # begun again without
    assert lineage.seen(third).contents == {"hash-c"}


def test_a_source_that_says_nothing_is_named(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    imported = _run(tmp_path / "imported", "a")
    workdir.write_json(imported / workdir.IMPORTED, {"step": 1})
    run = _run(tmp_path / "run", "b")
    with caplog.at_level(logging.WARNING):
        lineage.write(run, [bare, imported])
    assert lineage.seen(run).contents == {"hash-b"}
    assert "bare does not say" in caplog.text
    assert "imported does not say" in caplog.text
