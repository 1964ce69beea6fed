"""Writes anomaly maps as NIfTI: to look at, and to score again."""

import numpy as np

from uad_jax import maps
from uad_jax.data import geometry, nifti
from uad_jax.data.sources import VolumeInfo
from uad_jax.evaluation import Context
from uad_jax.scoring import VolumeArrays
from uad_jax.types import Geometry


def write(context: Context, info: VolumeInfo, arrays: VolumeArrays) -> None:
    """Writes the maps of one volume into `maps/<set>/`.

    `<subject>_desc-anomaly_map.nii.gz` is post-processed and on the grid of the scan,
    its header names the protocol; what `write_scores` writes lies beside it.
    """
    folder = context.workdir / "maps" / context.name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{info.subject}_desc-anomaly_map.nii.gz"
    shown_map = on_scan(arrays, info.geometry)
    said = f"{maps.NOTICE}; protocol {context.evaluation_set.protocol.value}"
    nifti.write_map(path, shown_map, info.geometry, description=said)
    write_scores(context, info, arrays)


def write_scores(context: Context, info: VolumeInfo, arrays: VolumeArrays) -> None:
    """Writes the unprocessed scores, from which all figures can be made again."""
    folder = context.workdir / "maps" / context.name
    folder.mkdir(parents=True, exist_ok=True)
    maps.write_scores(
        folder, info, arrays.scores, arrays.slice_score, arrays.volume_score
    )


def on_scan(arrays: VolumeArrays, where: Geometry) -> np.ndarray:
    """The shown map on the voxels of the scan, [X, Y, Z] float32.

    Outside the model grid it is what it is outside the brain, also where scores are
    negative.
    """
    on_grid = shown(arrays)
    outside = min(0.0, float(on_grid.min()))
    return geometry.to_native(on_grid - outside, where) + np.float32(outside)


def shown(arrays: VolumeArrays) -> np.ndarray:
    """The map with 0, or its lowest score if that is lower, outside the brain."""
    lowest = min(0.0, float(arrays.anomaly_map.min()))
    return np.where(arrays.eroded, arrays.anomaly_map, lowest).astype(np.float32)
