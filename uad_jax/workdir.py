"""The directory of a run: who may use it, and what was promised when it began."""

import contextlib
import datetime
import fcntl
import fnmatch
import json
import os
import pathlib
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import jax
from absl import logging

from uad_jax import environment, integrity

CONFIG = "config.json"
ENSEMBLE = "ensemble.json"  # in a directory of several runs, one folder each
ENVIRONMENT = "env.json"
FINGERPRINT = "data_fingerprint.json"
PROFILE = "data_profile.json"  # which modalities the model knows, and their look
IMPORTED = "imported.json"  # which file of another program the weights are from
TV_WEIGHT = "tv_weight.json"  # how the weight of a restoration was chosen
LOCK = "lock"
CHECKPOINTS = "checkpoints"

# What may change when a run goes on; everything else would make it another run.
MAY_CHANGE = (
    "name",
    "source",
    "reference_slices",
    "total_steps",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.evaluate_every",
    "train.keep_*",
    "train.patience",
    "train.steps_per_call",
    "evaluation.*",
    "data.store",  # a store may move; its fingerprint is compared instead
    "data.placement",
    "data.device_budget_gib",
    "data.num_workers",
    "data.read_threads",
)
# These may change too, but the bits of the run then do.
_CHANGES_BITS = ("train.steps_per_call", "total_steps")


class WorkdirError(RuntimeError):
    """A workdir is in use, not writable, or belongs to another run."""


@contextlib.contextmanager
def opened(workdir: pathlib.Path) -> Iterator[None]:
    """Makes a workdir, checks that it can be written, and keeps others out.

    Only process 0 of a run takes the lock.

    Raises:
      WorkdirError: If it cannot be written, or another process trains in it.
    """
    if jax.process_index() != 0:
        yield
        return
    make_writable(workdir)
    with _locked(workdir / LOCK):
        yield


def make_writable(workdir: pathlib.Path) -> None:
    """Makes a workdir and writes a small file to it, before anything is compiled.

    Raises:
      WorkdirError: If that fails.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=workdir, prefix=".probe-") as probe:
            probe.write(bytes(4096))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise WorkdirError(
            f"{workdir} cannot be written: {error.strerror}. Use another --workdir, or "
            "mend its permissions or free space."
        ) from error


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def imported(workdir: pathlib.Path, step: int) -> dict[str, Any] | None:
    """What is known of a step whose weights another program trained; else None."""
    path = workdir / IMPORTED
    if not path.is_file():
        return None
    known = read_json(path)
    return known if known["step"] == step else None


def read_json(path: pathlib.Path) -> Any:
    """Reads a JSON file.

    Raises:
      WorkdirError: If it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WorkdirError(
            f"{path} is missing. Is {path.parent} the workdir of a run?"
        ) from error
    except ValueError as error:
        raise WorkdirError(
            f"{path} is damaged: {error}. Put a sound copy in its place."
        ) from error


def write_environment(workdir: pathlib.Path) -> None:
    """Writes `env.json`: versions, devices, XLA flags and the source commit."""
    if jax.process_index() == 0:
        write_json(workdir / ENVIRONMENT, environment.describe())


def check_config(
    workdir: pathlib.Path,
    config: Mapping[str, Any],
    completed: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> dict[str, str]:
    """Compares a config with the one the run began with, and stores it.

    A run begins with its first checkpoint; until then any config will do.

    Args:
      workdir: The run.
      config: The config as plain JSON types (`config.to_dict`).
      completed: Adds to the stored config what newer code has (`config.completed`).

    Returns:
      The allowed changes, name -> "old -> new"; empty for a new run.

    Raises:
      WorkdirError: Lists every change that would make it another run.
    """
    refuse_ensemble(workdir, "Give --ensemble too, or another --workdir")
    path = workdir / CONFIG
    changes = {}
    begun = has_begun(workdir)
    if begun:
        changes = refuse_another_config(workdir, config, completed)
        for name, change in changes.items():
            note = ""
            if name in _CHANGES_BITS:
                note = " (the run is then no longer bit-equal to an unchanged one)"
            logging.warning(
                "The config of the run changes: %s: %s%s", name, change, note
            )
    if jax.process_index() == 0 and (changes or not begun):
        write_json(path, config)
    return changes


def refuse_another_config(
    workdir: pathlib.Path,
    config: Mapping[str, Any],
    completed: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> dict[str, str]:
    """Compares a config with the stored one; changes nothing.

    Args:
      workdir: The run.
      config: The config as plain JSON types.
      completed: As in `check_config`.

    Returns:
      The allowed changes, name -> "old -> new".

    Raises:
      WorkdirError: Lists every change that would make it another run.
    """
    refuse_ensemble(workdir, f"Name one of them: {workdir}/MEMBER")
    stored = read_json(workdir / CONFIG)
    changes = difference(completed(stored) if completed else stored, config)
    refused = {k: v for k, v in changes.items() if not _may_change(k)}
    if refused:
        raise WorkdirError(
            f"{workdir} was begun with another config:\n  "
            + "\n  ".join(f"{name}: {change}" for name, change in refused.items())
            + "\nUse the stored values, or another --workdir."
        )
    return changes


def refuse_ensemble(workdir: pathlib.Path, remedy: str) -> None:
    """Makes sure that a directory is not that of an ensemble.

    Args:
      workdir: The directory.
      remedy: What to do, for the error.

    Raises:
      WorkdirError: If it is.
    """
    if (workdir / ENSEMBLE).is_file():
        raise WorkdirError(
            f"{workdir} holds an ensemble, not a single run: its members are the "
            f"folders {', '.join(read_json(workdir / ENSEMBLE)['members'])} in it. "
            f"{remedy}."
        )


def refuse_another_recipe(workdir: pathlib.Path, recipe: Mapping[str, Any]) -> None:
    """Compares the recipe of a store with the one the run was trained on.

    Raises:
      WorkdirError: Lists every difference.
    """
    stored = read_json(workdir / FINGERPRINT)["recipe"]
    changes = difference(stored, recipe)
    if changes:
        raise WorkdirError(
            f"{workdir} was trained on slices of another recipe:\n  "
            + "\n  ".join(f"{name}: {change}" for name, change in changes.items())
            + "\nPrepare the store with the recipe of the training."
        )


def check_fingerprint(
    workdir: pathlib.Path,
    fingerprint: Mapping[str, Any],
    *,
    accept_change: bool = False,
) -> dict[str, str]:
    """Compares the training data with those the run began with, and stores them.

    A run begins with its first checkpoint; until then any data will do.

    Args:
      workdir: The run.
      fingerprint: What the data are, as plain JSON types: subject ids, hashes, seed.
      accept_change: Go on with other data, which are then the stored ones.

    Returns:
      The accepted changes, name -> "old -> new".

    Raises:
      WorkdirError: Lists every difference, unless the change is accepted.
    """
    path = workdir / FINGERPRINT
    changes = {}
    begun = has_begun(workdir)
    if begun:
        changes = difference(read_json(path), fingerprint)
        lines = "\n  ".join(f"{name}: {change}" for name, change in changes.items())
        if changes and not accept_change:
            raise WorkdirError(
                f"{workdir}: the training data are not those the run began with:\n  "
                f"{lines}\nBring the old data back, or pass --accept_data_change."
            )
        if changes:
            logging.warning("The training data of the run change:\n  %s", lines)
    if jax.process_index() == 0 and (changes or not begun):
        write_json(path, fingerprint)
    return changes


def has_begun(workdir: pathlib.Path) -> bool:
    """Whether a run has a checkpoint, sound or not, and so can go on."""
    checkpoints = workdir / CHECKPOINTS
    return bool(integrity.step_dirs(checkpoints) or integrity.quarantined(checkpoints))


def difference(old: Any, new: Any) -> dict[str, str]:
    """Lists in what two JSON-like values differ.

    Returns:
      Dotted name -> "old -> new"; of a list, what is gone and what is added.
    """
    # Both sides as JSON would give them back: tuples are lists, keys are strings.
    return _difference("", json.loads(json.dumps(old)), json.loads(json.dumps(new)))


def _difference(name: str, old: Any, new: Any) -> dict[str, str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = {}
        for key in sorted(old.keys() | new.keys()):
            path = f"{name}.{key}" if name else key
            if key not in old:
                found[path] = f"(absent) -> {_spell(new[key])}"
            elif key not in new:
                found[path] = f"{_spell(old[key])} -> (absent)"
            else:
                found |= _difference(path, old[key], new[key])
        return found
    # NaN differs from itself, but not its text.
    if old == new or json.dumps(old) == json.dumps(new):
        return {}
    if isinstance(old, list) and isinstance(new, list):
        return {name: _list_difference(old, new)}
    return {name: f"{_spell(old)} -> {_spell(new)}"}


def _list_difference(old: list[Any], new: list[Any]) -> str:
    gone = [item for item in old if item not in new]
    added = [item for item in new if item not in old]
    if not gone and not added:
        return f"the same {len(old)} entries in another order or number"
    parts = [f"{len(old)} -> {len(new)} entries"]
    parts += [f"gone: {_spell(gone)}"] if gone else []
    parts += [f"added: {_spell(added)}"] if added else []
    return "; ".join(parts)


def _spell(value: Any, limit: int = 200) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else text[: limit - 4] + " ..."


def _may_change(name: str) -> bool:
    return any(
        fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")
        for pattern in MAY_CHANGE
    )


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Holds a lock that the kernel releases when the process dies, however it dies."""
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WorkdirError(
                f"{path.parent} is in use by {_holder(file)}. Wait until it has "
                "finished, stop it, or use another --workdir."
            ) from error
        except OSError as error:  # some network file systems
            logging.warning("%s cannot be locked (%s).", path, error.strerror)
        holder = _holder(file)
        if holder:
            logging.warning("The lock of %s, which is gone, is taken over.", holder)
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        note = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
        file.truncate(0)
        file.write(json.dumps(note))
        file.flush()
        try:
            yield
        finally:
            # The file stays: to remove it would let two others lock two files.
            file.truncate(0)


def _holder(file: TextIO) -> str:
    file.seek(0)
    text = file.read()
    try:
        note = json.loads(text)
        return f"process {note['pid']} on {note['host']} since {note['since']}"
    except (ValueError, KeyError, TypeError):
        return f"an unknown process ({text!r})" if text else ""
