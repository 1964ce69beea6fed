"""What makes a checkpoint directory trustworthy: its name and its hashes.

A step lives in `<directory>/<step>/`. Its `MANIFEST.sha256` lists every other file
in the format of `sha256sum`, so `sha256sum -c MANIFEST.sha256` checks a step by hand.
A step without a manifest is not complete.
"""

import hashlib
import os
import pathlib
import re
import shutil

from absl import logging

MANIFEST = "MANIFEST.sha256"
SAVING = ".saving"  # follows the step while it is written
_DELETING = ".deleting"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_STEP = re.compile(r"0|[1-9][0-9]*")


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


def delete(step_dir: pathlib.Path) -> None:
    """Deletes a step; a kill half-way leaves nothing that looks like a damaged one."""
    doomed = step_dir.with_name(f"{step_dir.name}{_DELETING}")
    shutil.rmtree(doomed, ignore_errors=True)
    step_dir.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clear_leftovers(directory: pathlib.Path) -> None:
    """Removes what interrupted saves and deletions left behind."""
    pattern = re.compile(rf"[0-9]+(\{SAVING}.*|\{_DELETING})")
    for path in directory.iterdir():
        if pattern.fullmatch(path.name) and path.is_dir():
            logging.info("Removing %s, left by an interrupted run.", path)
            shutil.rmtree(path, ignore_errors=True)


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
