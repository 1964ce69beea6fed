"""Every commit that a document names can be checked out by its reader."""

import json
import pathlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Seven or more hexadecimal digits, of both kinds; digits alone only after "commit".
_HASH = re.compile(
    r"\b(?=[a-f]*[0-9])(?=[0-9]*[a-f])[0-9a-f]{7,40}\b|(?<=commit )[0-9]{7,40}\b"
)


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _commits(value: Any) -> Iterator[str]:
    """The values of every key "commit" in JSON."""
    if isinstance(value, dict):
        if isinstance(value.get("commit"), str):
            yield value["commit"].removesuffix("+changes")
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _commits(item)


def _cited() -> dict[str, set[str]]:
    """Commit -> the files that cite it."""
    cited: dict[str, set[str]] = {}
    for path in [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/results/**/*.json")]:
        text = path.read_text(encoding="utf-8")
        found = _commits(json.loads(text)) if path.suffix == ".json" else None
        for name in _HASH.findall(text) if found is None else found:
            cited.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    return cited


def test_every_cited_commit_is_an_ancestor_of_this_one() -> None:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("no git history: a source archive, or no git")
    if _git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("the git history is shallow, or cannot be read")
    cited = _cited()
    assert len(cited) > 3
    gone = {
        name: sorted(files)
        for name, files in cited.items()
        if _git("merge-base", "--is-ancestor", name, "HEAD").returncode
    }
    assert not gone


def test_hashes_are_told_from_words_and_numbers() -> None:
    text = "commit 79001d5), defaced, 1234567, | 4f09dc9d1bf3+changes | commit 1234567."
    assert _HASH.findall(text) == ["79001d5", "4f09dc9d1bf3", "1234567"]
    stored = {"a": [{"commit": "abc1234+changes"}], "commit": "f" * 12}
    assert set(_commits(stored)) == {"abc1234", "f" * 12}
