"""Writes prepared stores: a pool of processes, one TFDS data set, one rename.

A store is either whole or not there: it is written under a temporary name, synced
and renamed. Its key is the hash of the recipe and of the sources, so that a store
made by another recipe or from other files is never taken for a current one.
"""

import collections
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from uad_jax.data import encode, records, sources

Source = encode.Source

# Called with volumes finished, volumes in all, and the name of the last one.
Progress = Callable[[int, int, str], None]


def build_from(
    scans: Sequence[Source],
    store: pathlib.Path,
    *,
    recipe: Mapping[str, Any],
    recipe_hash: str,
    source_hash: str,
    workers: int | None = None,
    progress: Progress | None = None,
) -> pathlib.Path:
    """Writes a store, unless the same one is already there and undamaged.

    Args:
      scans: The scans; volumes are numbered in the order of their names.
      store: Directory to make. A store of another key there is replaced.
      recipe: Description of the preprocessing, JSON types.
      recipe_hash: Changes whenever the preprocessing does.
      source_hash: Changes whenever a source file or the manifest does.
      workers: Processes; None = all cores, 0 = this process.
      progress: Called after every scan.

    Returns:
      The store's directory.

    Raises:
      ValueError: If scans fail (all of them are listed; nothing is left behind),
        or if `store` is a directory that is not a store.
    """
    scans = sorted(scans, key=lambda scan: scan.subject)
    _check(scans, store)
    key = {"recipe_hash": recipe_hash, "source_hash": source_hash}
    if _current(store, key):
        return store
    store.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(store)
    temporary = store.parent / f".{store.name}.tmp-{socket.gethostname()}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        meta = {"schema": sources.SCHEMA_VERSION, "recipe": dict(recipe), **key}
        _write(temporary, scans, meta, workers, progress)
        _publish(temporary, store)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return store


def _check(scans: Sequence[Source], store: pathlib.Path) -> None:
    if not scans:
        raise ValueError("There is no scan to prepare. Give at least one.")
    names = collections.Counter(scan.subject for scan in scans)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(
            f"Subjects occur more than once: {', '.join(twice)}. Give every scan its "
            "own name and put the person into the column `patient`."
        )
    if not store.exists():
        return
    ours = (sources.STORE_FILE, sources.VOLUMES_FILE, sources.INDEX_FILE)
    known = [*ours, sources.RECORDS]
    if not store.is_dir() or (
        any(store.iterdir()) and not any((store / name).exists() for name in known)
    ):
        raise ValueError(
            f"{store} exists and is not a prepared store. Use another directory."
        )


def _current(store: pathlib.Path, key: Mapping[str, str]) -> bool:
    """Whether a whole, undamaged store of this key is there."""
    if not store.exists() or not any(store.iterdir()):
        return False
    try:
        meta = sources.read_meta(store)
    except sources.StoreError as error:
        logging.warning("%s Building it again.", error)
        return False
    stale = [name for name, value in key.items() if meta.get(name) != value]
    if stale:
        logging.warning(
            "%s: %s changed: building it again.", store, " and ".join(stale)
        )
        return False
    problems = sources.damage(store, meta, deep=True)
    if problems:
        logging.warning("%s: %s: building it again.", store, "; ".join(problems))
    return not problems


def _remove_leftovers(store: pathlib.Path) -> None:
    """Removes what killed builds of this host left behind."""
    prefix = f".{store.name}."
    for path in store.parent.glob(f"{prefix}*-{socket.gethostname()}-*"):
        kind = path.name.removeprefix(prefix).split("-")[0]
        process = path.name.rsplit("-", 1)[-1]
        if kind in ("tmp", "old") and process.isdigit() and not _alive(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _write(
    directory: pathlib.Path,
    scans: Sequence[Source],
    meta: dict[str, Any],
    workers: int | None,
    progress: Progress | None,
) -> None:
    """Writes all files of a store; raises if any scan failed."""
    modalities = tuple(dict.fromkeys(m for scan in scans for m in scan.modalities))
    volumes: list[sources.VolumeInfo] = []
    failures: list[str] = []
    finished = _prepared(scans, modalities, workers, failures, progress)
    first = next(finished, None)  # tells the shape of a record
    if first is not None:
        height, width, channels = first[1].codes.shape[1:]
        shape, dtype = (height, width, channels), first[1].codes.dtype
        everything = itertools.chain([first], finished)
        slices = _slices(everything, shape, dtype, volumes, failures)
        records.write(directory, shape, dtype, slices)
    if first is None or failures:
        raise ValueError(
            f"{len(failures)} of {len(scans)} scans cannot be prepared; nothing was "
            "written:\n  " + "\n  ".join(failures)
        )
    meta["modalities"] = list(modalities)
    meta["grid"] = [max(volume.depth for volume in volumes), *shape]
    meta["dtype"] = str(dtype)
    _write_tables(directory, volumes, meta)


def _slices(
    finished: Iterable[tuple[Source, encode.Encoded]],
    shape: tuple[int, int, int],
    dtype: np.dtype,
    volumes: list[sources.VolumeInfo],
    failures: list[str],
) -> Iterator[dict[str, Any]]:
    """Yields the records; appends to `volumes`, or to `failures` what cannot join."""
    for scan, encoded in finished:
        if (encoded.codes.shape[1:], encoded.codes.dtype) != (shape, dtype):
            failures.append(
                f"{scan.subject}: slices are {encoded.codes.dtype} "
                f"{encoded.codes.shape[1:]}, those of the first scan are {dtype} "
                f"{shape}. Use one recipe and one kind of image."
            )
            continue
        uid = len(volumes)
        volumes.append(_info(uid, scan, encoded))
        for z in range(len(encoded.codes)):
            yield {
                "image": encoded.codes[z],
                "plane": encoded.plane[z],
                "uid": uid,
                "z": z,
            }


def _write_tables(
    directory: pathlib.Path, volumes: list[sources.VolumeInfo], meta: dict[str, Any]
) -> None:
    """Writes index.npz, volumes.json and, last, store.json."""
    meta["shards"], index = records.read_index(directory)
    slices = sum(volume.depth for volume in volumes)
    if len(index["uid"]) != slices:
        raise RuntimeError(
            f"{directory}: {len(index['uid'])} records were written, expected {slices}."
        )
    np.savez(
        directory / sources.INDEX_FILE,
        uid=index["uid"],
        z=index["z"],
        record=index["record"],
    )
    rows = [volume.to_json() for volume in volumes]
    _write_json(directory / sources.VOLUMES_FILE, rows)
    meta["fingerprint"] = _fingerprint(meta, volumes)
    meta["files"] = {
        path.relative_to(directory).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": sources.sha256(path),
        }
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    meta["digest"] = sources.digest(meta)
    _write_json(directory / sources.STORE_FILE, meta)


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _fingerprint(meta: Mapping[str, Any], volumes: list[sources.VolumeInfo]) -> str:
    content = {name: meta[name] for name in ("recipe_hash", "modalities", "dtype")}
    content["volumes"] = [
        [v.uid, v.subject, v.patient, v.split, v.fold, v.label, v.annotated, v.content]
        for v in volumes
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _info(uid: int, scan: Source, encoded: encode.Encoded) -> sources.VolumeInfo:
    brain = (encoded.plane & sources.BRAIN_BIT).astype(bool)
    return sources.VolumeInfo(
        uid=uid,
        subject=scan.subject,
        patient=scan.patient or scan.subject,
        split=scan.split,
        fold=scan.fold,
        label=scan.label,
        annotated=scan.annotated,
        licence=scan.licence,
        modalities=scan.modalities,
        geometry=encoded.geometry,
        brain_voxels=[int(n) for n in brain.sum(axis=(1, 2))],
        clipped=encoded.clipped,
        content=encoded.content,
        notes=encoded.notes,
        extra=dict(scan.extra),
    )


def _prepared(
    scans: Sequence[Source],
    modalities: tuple[str, ...],
    workers: int | None,
    failures: list[str],
    progress: Progress | None,
) -> Iterator[tuple[Source, encode.Encoded]]:
    """Yields the scans in order; appends to `failures` those that raised."""
    results = encode.encode_all(scans, modalities, workers)
    for done, (scan, result) in enumerate(zip(scans, results, strict=True), start=1):
        if isinstance(result, str):
            failures.append(f"{scan.subject}: {result}")
        if progress is not None:
            progress(done, len(scans), scan.subject)
        if isinstance(result, encode.Encoded):
            yield scan, result


def _publish(temporary: pathlib.Path, store: pathlib.Path) -> None:
    """Puts a finished directory in its place so that a kill never halves it."""
    for path in (*temporary.rglob("*"), temporary):
        _sync(path)
    old = store.parent / f".{store.name}.old-{socket.gethostname()}-{os.getpid()}"
    if store.exists():
        shutil.rmtree(old, ignore_errors=True)
        store.rename(old)
    temporary.rename(store)
    _sync(store.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
