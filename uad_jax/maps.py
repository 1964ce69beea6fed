"""Anomaly maps in files: those of any other tool to score, and our own to pass on.

A map is a NIfTI file on the voxels of the scan, or on the model grid. How its axes are
stored does not matter; where its voxels lie in the world does.
"""

import dataclasses
import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence

import jax
import numpy as np
import tqdm
from absl import logging

from uad_jax import mesh as mesh_lib
from uad_jax import score_table
from uad_jax.data import alignment, examine, geometry, manifest, nifti
from uad_jax.data.alignment import Voxels
from uad_jax.data.sources import Store, VolumeInfo
from uad_jax.methods import lifting
from uad_jax.metrics.protocols import Protocol
from uad_jax.scoring import Scorer
from uad_jax.types import Array, Geometry, Scores, Volumes

SUFFIX = "_space-model_desc-score_map"  # of a name: a map on the model grid, as made
NOTICE = "uad_jax, research only, not a medical device"  # in the header of every map

_NIFTI = (".nii", ".nii.gz")
_NO_MAPS = ("_mask", "_reconstruction")  # ends of names
_OUR_RECONSTRUCTION = "_desc-reconstruction_"  # what `predict` calls them
_DEFAULT = examine.Reading()


def find(
    folder: pathlib.Path, infos: Sequence[VolumeInfo], others: Collection[str] = ()
) -> dict[str, pathlib.Path]:
    """Finds the map of every volume by its name.

    A subject's map is `<subject>_space-model_desc-score_map.nii.gz`, else the single
    NIfTI file whose name begins with the subject, else the single one in a folder
    `<subject>/`. After the subject a name ends or goes on with something that is
    neither letter nor digit, and a file belongs to the longest subject that fits.
    Masks (`*_mask`) and reconstructions (`*_reconstruction`, and those of `predict`)
    are no maps.

    Args:
      folder: Where the maps are.
      infos: The volumes that need a map.
      others: Names of further subjects; their files are not taken for anyone else's.

    Returns:
      Subject -> file.

    Raises:
      ValueError: Lists every subject without a map or with several.
    """
    candidates = _candidates(folder, {*others, *(info.subject for info in infos)})
    found: dict[str, pathlib.Path] = {}
    missing: list[str] = []
    problems: list[str] = []
    for info in infos:
        paths = candidates.get(info.subject, [])
        if not paths:
            missing.append(info.subject)
        elif len(paths) > 1:
            names = ", ".join(str(path.relative_to(folder)) for path in paths)
            problems.append(
                f"{info.subject}: {len(paths)} files could be its map: {names}. Leave "
                "one of them there."
            )
        else:
            found[info.subject] = paths[0]
    if missing:
        problems.append(
            f"no map of {len(missing)} of {len(infos)} subjects: {', '.join(missing)}. "
            f"Name it like {missing[0]}.nii.gz or {missing[0]}_anomaly.nii.gz, or put "
            f"it into a folder {missing[0]}/."
        )
    manifest.fail(folder, problems)
    return found


def available(
    folder: pathlib.Path, infos: Sequence[VolumeInfo], others: Collection[str] = ()
) -> list[VolumeInfo]:
    """The volumes that have at least one map; arguments as in `find`."""
    candidates = _candidates(folder, {*others, *(info.subject for info in infos)})
    return [info for info in infos if info.subject in candidates]


def place(
    path: pathlib.Path,
    info: VolumeInfo,
    store: Store,
    reading: examine.Reading = _DEFAULT,
) -> np.ndarray:
    """Reads a map and puts it onto the model grid.

    A map on the model grid is taken as it is. One on the voxels of the scan is
    sampled like the scan: linear, averaged where the grid is coarser.

    Args:
      path: The file.
      info: The volume.
      store: Its store.
      reading: `ignore_affine` takes an array of the shape of scan or model grid for
        it although its affine differs.

    Returns:
      [d, H, W] float32, finite, d the slices of the volume.

    Raises:
      nifti.NiftiError: It cannot be read, has NaN or infinite voxels, or lies
        elsewhere.
    """
    scan = nifti.read_image(
        path, reading.nan_to_zero, assume_orientation=reading.assume_orientation
    )
    stored = geometry.reorder(scan.data, np.linalg.inv(scan.native_to_canonical))
    found = Voxels(str(path), scan.native_shape, scan.native_affine)
    where = info.geometry
    _, height, width, _ = store.grid
    box = (height, width, info.depth)
    model = Voxels("model grid", box, where.native_affine @ where.grid_to_native)
    native = Voxels(
        f"scan of {info.subject}", tuple(where.native_shape), where.native_affine
    )
    for target in (model, native):
        turn, distance = alignment.fit(found, target)
        if distance <= alignment.TOLERANCE:
            data = geometry.reorder(stored, turn)
            break
    else:
        fitting = [grid for grid in (native, model) if grid.shape == stored.shape]
        if not (reading.ignore_affine and fitting):
            raise nifti.GridMismatch(alignment.mismatch(found, (native, model)))
        data, target = stored, fitting[0]
    if target is model:
        return np.ascontiguousarray(data.transpose(2, 0, 1))
    return geometry.to_grid(data, where, box)


def scorer(
    name: str,
    folder: pathlib.Path,
    store: Store,
    infos: Sequence[VolumeInfo],
    protocol: Protocol,
    mesh: jax.sharding.Mesh,
    *,
    reading: examine.Reading = _DEFAULT,
    progress: bool = True,
) -> Scorer:
    """Makes a folder of maps a scorer like any method; every map is checked at once.

    Slice and volume scores are the mean of the map in the brain, unless the folder
    has a `scores.json`. A map is read when its volume is scored, so memory does not
    grow with the set.

    Args:
      name: For tables.
      folder: The maps.
      store: Holds the scans that they were made from.
      infos: All volumes of this store that will be scored.
      protocol: Post-processing of the maps.
      mesh: Devices of the volumes.
      reading: How the files are read.
      progress: Whether to show a progress bar of the check.

    Raises:
      ValueError: Lists every map that is missing, ambiguous, damaged, not finite or
        on other voxels, and everything wrong in `scores.json`.
    """
    files = find(folder, infos, [info.subject for info in store.volumes])
    _check(folder, files, infos, store, reading, progress)
    given = score_table.read(folder, infos, store)
    known = {info.uid: info for info in infos}
    sharding = mesh_lib.batch_sharded(mesh)

    def score(volumes: Volumes) -> Scores:
        uids = np.asarray(volumes.uid).tolist()
        rows = {row: known[uid] for row, uid in enumerate(uids) if uid >= 0}
        maps = np.zeros(volumes.image.shape[:-1], np.float32)
        for row, info in rows.items():
            with examine.quiet():  # its notes were logged by the check
                placed = place(files[info.subject], info, store, reading)
            maps[row, : info.depth] = placed
        scores = _summarise(jax.device_put(maps, sharding), volumes)
        chosen = {row: given[info.subject] for row, info in rows.items()}
        return _replace(scores, chosen, sharding)

    return Scorer(name, score, protocol)


def write_scores(
    folder: pathlib.Path,
    info: VolumeInfo,
    anomaly_map: np.ndarray,
    slice_score: np.ndarray,
    volume_score: float,
) -> None:
    """Writes the scores of one volume so that `scorer` gives the same bits again.

    Writes `<subject>_space-model_desc-score_map.nii.gz` and an entry of `scores.json`
    beside it; both are replaced if they are there.

    Args:
      folder: Is made if need be.
      info: The volume.
      anomaly_map: Before any post-processing, [d, H, W] float32, finite.
      slice_score: [d] float32.
      volume_score: Of the whole volume.

    Raises:
      nifti.NiftiError: The map is not finite, or cannot be written.
      ValueError: `scores.json` is there and damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    where = info.geometry
    data = np.asarray(anomaly_map, np.float32).transpose(1, 2, 0)
    x, y, z = data.shape
    grid = Geometry(
        native_shape=(x, y, z),
        native_affine=where.native_affine @ where.grid_to_native,
        grid_to_native=np.eye(4),
    )
    path = folder / f"{info.subject}{SUFFIX}.nii.gz"
    nifti.write_map(path, data, grid, description=NOTICE)
    score_table.add(folder, info.subject, volume_score, slice_score)


def _candidates(
    folder: pathlib.Path, names: Collection[str]
) -> dict[str, list[pathlib.Path]]:
    """Subject -> the files that could be its map; subjects without any are absent."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no folder of that name with maps.")
    known = set(names)
    named: dict[str, list[pathlib.Path]] = {}
    strangers = []
    for path in _maps_in(folder.iterdir()):
        subject = _owner(manifest.stem(path), known)
        if subject:
            named.setdefault(subject, []).append(path)
        else:
            strangers.append(path.name)
    if strangers:
        logging.warning(
            "%s: %d files belong to no subject and are not read: %s",
            folder,
            len(strangers),
            ", ".join(strangers[:10]) + (", ..." if len(strangers) > 10 else ""),
        )
    for subject in known - named.keys():
        inside = folder / subject
        if inside.is_dir():
            named[subject] = _maps_in(inside.rglob("*"))
    return {
        subject: [path for path in paths if _is_export(path, subject)] or paths
        for subject, paths in named.items()
        if paths
    }


def _maps_in(paths: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    return sorted(
        path
        for path in paths
        if path.name.endswith(_NIFTI)
        and not path.name.startswith(".")
        and not manifest.stem(path).endswith(_NO_MAPS)
        and _OUR_RECONSTRUCTION not in path.name
        and path.is_file()
    )


def _is_export(path: pathlib.Path, subject: str) -> bool:
    return manifest.stem(path) == subject + SUFFIX


def _owner(stem: str, names: Collection[str]) -> str:
    """The longest of the names that a file's name begins with, or ""."""
    for end in range(len(stem), 0, -1):
        goes_on = end < len(stem) and stem[end].isalnum()
        if stem[:end] in names and not goes_on:
            return stem[:end]
    return ""


def _check(
    folder: pathlib.Path,
    files: Mapping[str, pathlib.Path],
    infos: Sequence[VolumeInfo],
    store: Store,
    reading: examine.Reading,
    progress: bool,
) -> None:
    """Places every map once; a set of 500 shall not fail at its 400th."""
    problems = []
    for info in tqdm.tqdm(
        infos, desc="Checking maps", unit="map", disable=None if progress else True
    ):
        try:
            place(files[info.subject], info, store, reading)
        except nifti.NiftiError as error:
            problems.append(str(error))
    manifest.fail(folder, problems)


@jax.jit
def _summarise(maps: Array, volumes: Volumes) -> Scores:
    return lifting.summarise(maps, None, volumes)


def _replace(
    scores: Scores,
    chosen: Mapping[int, score_table.Given],
    sharding: jax.sharding.Sharding,
) -> Scores:
    """Puts the tool's own scores in the place of the means."""
    slices, volumes = np.array(scores.slice_score), np.array(scores.volume_score)
    for row, given in chosen.items():
        if given.volume_score is not None:
            volumes[row] = given.volume_score
        if given.slice_score is not None:
            slices[row, : len(given.slice_score)] = given.slice_score
    slices, volumes = jax.device_put((slices, volumes), sharding)
    return dataclasses.replace(scores, slice_score=slices, volume_score=volumes)
