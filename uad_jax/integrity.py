"""What makes a checkpoint directory trustworthy: names, hashes and leaf tables.

A step lives in `<directory>/<step>/`. Its `MANIFEST.sha256` lists every other file
in the format of `sha256sum`, so `sha256sum -c MANIFEST.sha256` checks a step by hand.
A step without a manifest is not complete.
"""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax

from uad_jax.types import Tree

MANIFEST = "MANIFEST.sha256"
META = "meta.json"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_STEP = re.compile(r"0|[1-9][0-9]*")

LeafTable = dict[str, tuple[tuple[int, ...], str]]  # path -> (shape, dtype)


def step_dirs(directory: pathlib.Path) -> list[int]:
    """Steps that have a directory, sound or not, oldest first; the rest is foreign."""
    if not directory.is_dir():
        return []
    return sorted(
        int(path.name)
        for path in directory.iterdir()
        if path.is_dir() and _STEP.fullmatch(path.name)
    )


def quarantined(directory: pathlib.Path) -> list[str]:
    """Names of the step directories that were moved aside as damaged."""
    pattern = re.compile(r"[0-9]+\.bad(\.[0-9]+)?")
    if not directory.is_dir():
        return []
    return sorted(p.name for p in directory.iterdir() if pattern.fullmatch(p.name))


def quarantine(step_dir: pathlib.Path) -> pathlib.Path:
    """Renames a damaged step to `<step>.bad` and keeps it as evidence."""
    target = step_dir.with_name(f"{step_dir.name}.bad")
    count = 1
    while target.exists():
        target = step_dir.with_name(f"{step_dir.name}.bad.{count}")
        count += 1
    step_dir.rename(target)
    return target


def write_manifest(step_dir: pathlib.Path) -> None:
    """Hashes every file of a step; the manifest reaches the disk before this returns.

    Raises:
      OSError: If a file cannot be read or the manifest not be written.
    """
    lines = [
        f"{_sha256(step_dir / name)}  {name}\n" for name in sorted(_files(step_dir))
    ]
    with open(step_dir / MANIFEST, "w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(step_dir)


def sync_directory(directory: pathlib.Path) -> None:
    """Makes created and renamed entries of a directory survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_complete(step_dir: pathlib.Path) -> bool:
    """Whether a step has a readable manifest and exactly its files (no hashing)."""
    try:
        return _read_manifest(step_dir).keys() == _files(step_dir)
    except (OSError, ValueError):
        return False


def problems(step_dir: pathlib.Path) -> list[str]:
    """Compares every file of a step with its hash.

    Returns:
      One line per missing, unexpected or changed file; empty if the step is sound.
    """
    try:
        listed = _read_manifest(step_dir)
    except FileNotFoundError:
        return [f"{MANIFEST} is missing (the save never finished, or was damaged)"]
    except (OSError, ValueError) as error:
        return [f"{MANIFEST} is damaged: {error}"]
    present = _files(step_dir)
    found = [f"{name} is missing" for name in sorted(listed.keys() - present)]
    found += [
        f"{name} is not in {MANIFEST}" for name in sorted(present - listed.keys())
    ]
    for name in sorted(present & listed.keys()):
        try:
            changed = _sha256(step_dir / name) != listed[name]
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror}")
            continue
        if changed:
            found.append(f"{name} has changed since it was saved")
    return found


def read_meta(step_dir: pathlib.Path) -> dict[str, Any]:
    """Reads what was noted beside the arrays: step, metrics and leaf table.

    Raises:
      OSError, ValueError: If the file cannot be read or is not what was written.
    """
    meta = json.loads((step_dir / META).read_text(encoding="utf-8"))
    if not isinstance(meta, dict) or {"step", "metrics", "leaves"} - meta.keys():
        raise ValueError(f"{META} is not the note of a checkpoint.")
    return meta


def flatten(tree: Tree) -> dict[str, Any]:
    """Flattens a tree to {"model/params/encoder/kernel": leaf}."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }


def leaf_table(leaves: Mapping[str, Any]) -> LeafTable:
    """Shape and dtype of every leaf of a flattened tree."""
    return {path: (tuple(x.shape), str(x.dtype)) for path, x in leaves.items()}


def stored_table(meta: dict[str, Any]) -> LeafTable:
    """The leaf table of a step, as read back from its note."""
    return {
        path: (tuple(shape), dtype) for path, (shape, dtype) in meta["leaves"].items()
    }


def differences(
    expected: LeafTable, found: LeafTable, *, allow_cast: bool = False
) -> list[str]:
    """Lists every leaf in which a checkpoint differs from what is asked of it.

    Args:
      expected: The leaves that the model has.
      found: The leaves that the checkpoint has.
      allow_cast: Whether another dtype is acceptable.

    Returns:
      One line per leaf: "path: expected (64,) float32, found (96,) float32".
    """
    lines = []
    for path in sorted(expected.keys() | found.keys()):
        wanted, stored = expected.get(path), found.get(path)
        if wanted is None:
            lines.append(f"{path}: not in the model, found {_spell(stored)}")
        elif stored is None:
            lines.append(f"{path}: expected {_spell(wanted)}, not in the checkpoint")
        elif wanted[0] != stored[0] or (wanted[1] != stored[1] and not allow_cast):
            lines.append(f"{path}: expected {_spell(wanted)}, found {_spell(stored)}")
    return lines


def _spell(leaf: tuple[tuple[int, ...], str] | None) -> str:
    assert leaf is not None
    return f"{leaf[0]} {leaf[1]}"


def _files(step_dir: pathlib.Path) -> set[str]:
    return {
        path.relative_to(step_dir).as_posix()
        for path in step_dir.rglob("*")
        if not path.is_dir() and path != step_dir / MANIFEST
    }


def _read_manifest(step_dir: pathlib.Path) -> dict[str, str]:
    listed = {}
    data = (step_dir / MANIFEST).read_bytes()
    if not data.endswith(b"\n"):
        raise ValueError("its last line is torn")
    for line in data.decode("utf-8").split("\n")[:-1]:
        match = _LINE.fullmatch(line)
        if not match:
            raise ValueError(f"unreadable line {line!r}")
        listed[match[2]] = match[1]
    return listed


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
