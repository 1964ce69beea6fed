"""What is written of one prediction: maps on the scan's own voxels, and a JSON file."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uad_jax import export
from uad_jax import workdir as workdir_lib
from uad_jax.data import geometry, nifti
from uad_jax.metrics import postprocess
from uad_jax.scoring import VolumeArrays
from uad_jax.types import Geometry

NOTICE = (
    "For research only. Not a medical device. Nothing in this file or in the maps "
    "beside it may be used for a diagnosis or for a decision about a patient."
)
_IN_HEADER = "uad_jax, research only, not a medical device"  # of every NIfTI file
_SHOWN = 10  # components that are described
_RECONSTRUCTION = (
    "In the model's normalised intensity (see `recipe`), not in the unit of the scan; "
    "0 outside the brain."
)
_MASK = (
    "The segmentation of the model grid that evaluation measures, each voxel of the "
    "scan taking its nearest sample."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """One prediction as it was written.

    Attributes:
      subject: Name of the subject.
      volume_score: Of the whole scan.
      healthy_percentile: Share of the healthy validation scans with a lower score,
        0 to 100.
      found_ml: Volume of the segmentation on the model grid.
      num_components: Components of it.
      warnings: What a user must know, one sentence each.
      files: Kind of file -> where it is.
    """

    subject: str
    volume_score: float
    healthy_percentile: float
    found_ml: float
    num_components: int
    warnings: tuple[str, ...]
    files: dict[str, pathlib.Path]


def components(found: np.ndarray, anomaly_map: np.ndarray, where: Geometry) -> Any:
    """Describes what was found, the largest first.

    Args:
      found: Segmentation, [D, H, W] bool.
      anomaly_map: [D, H, W] float32.
      where: How the grid sits in the scan.

    Returns:
      Number of components, and of the 10 largest the volume in ml, the centre in mm
      (world of the file's affine, RAS) and the highest score; plain JSON types.
    """
    labels, count = postprocess.components(found)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    to_world = where.native_affine @ where.grid_to_native
    largest = []
    for place in np.argsort(-sizes, kind="stable")[:_SHOWN]:
        inside = labels == place + 1
        z, x, y = (axis.mean() for axis in np.nonzero(inside))
        centre = to_world @ [x, y, z, 1]
        largest.append(
            {
                "ml": _rounded(sizes[place] * geometry.voxel_ml(where)),
                "centre_mm": [_rounded(value, 1) for value in centre[:3]],
                "highest_score": float(anomaly_map[inside].max()),
            }
        )
    return {"count": count, "largest": largest}


def write(
    folder: pathlib.Path,
    subject: str,
    arrays: VolumeArrays,
    found: np.ndarray,
    where: Geometry,
    modalities: Sequence[str],
    scan: pathlib.Path,
    facts: Mapping[str, Any],
    warnings: Sequence[str],
) -> Prediction:
    """Writes the files of one subject; the JSON file comes last and means all is well.

    Args:
      folder: Where to write.
      subject: Name of the subject.
      arrays: Its scores.
      found: Segmentation on the model grid, [D, H, W] bool.
      where: How the grid sits in the scan.
      modalities: Names of the channels.
      scan: The file whose voxels the maps are written on.
      facts: What else the JSON file says; `score` must be among it.
      warnings: What a user must know.

    Raises:
      nifti.NiftiError: A map is not finite (then nothing is written), or the place
        cannot be written.
    """
    header, _ = nifti.read_header(scan)
    native = _native_maps(arrays, found, where, modalities)
    paths = {
        kind: folder / f"{subject}_desc-{name}.nii.gz"
        for kind, name in (
            ("anomaly_map", "anomaly_map"),
            ("anomaly_mask", "anomaly_mask"),
            *((kind, kind) for kind in native if kind.startswith("reconstruction_")),
        )
    }
    _refuse_not_finite(subject, arrays.volume_score, native)
    report = folder / f"{subject}_prediction.json"
    report.unlink(missing_ok=True)  # of an earlier prediction; what follows is not its
    for kind, path in paths.items():
        nifti.write_map(
            path, native[kind], where, header=header, description=_IN_HEADER
        )
    inside = components(found, arrays.anomaly_map, where)
    found_ml = _rounded(np.count_nonzero(found) * geometry.voxel_ml(where))
    edges = where.native_affine[:3, :3]
    mask_ml = np.count_nonzero(native["anomaly_mask"]) * abs(np.linalg.det(edges)) / 1e3
    content = {
        "notice": NOTICE,
        "subject": subject,
        **facts,
        "found": {"ml": found_ml, "ml_of_the_mask_file": _rounded(mask_ml), **inside},
        "files": {kind: path.name for kind, path in paths.items()},
        "about_the_files": {"reconstruction": _RECONSTRUCTION, "mask": _MASK},
        "warnings": list(warnings),
    }
    workdir_lib.write_json(report, content)
    return Prediction(
        subject=subject,
        volume_score=arrays.volume_score,
        healthy_percentile=facts["score"]["healthy_percentile"],
        found_ml=found_ml,
        num_components=inside["count"],
        warnings=tuple(warnings),
        files={**paths, "report": report},
    )


def _native_maps(
    arrays: VolumeArrays,
    found: np.ndarray,
    where: Geometry,
    modalities: Sequence[str],
) -> dict[str, np.ndarray]:
    """Kind -> array on the scan's own voxels, 0 outside the model grid.

    The mask is the segmentation itself, nearest sample by nearest sample, not the
    map's interpolation cut at the threshold: that would find other voxels than those
    whose errors evaluation measured, and bring back components that were dropped.
    """
    maps = {
        "anomaly_map": export.on_scan(arrays, where),
        "anomaly_mask": geometry.to_native(found, where),
    }
    if arrays.reconstruction is not None:
        for channel, modality in enumerate(modalities):
            image = np.asarray(arrays.reconstruction[..., channel], np.float32)
            image = np.where(arrays.brain, image, np.float32(0))
            maps[f"reconstruction_{modality}"] = geometry.to_native(image, where)
    return maps


def _refuse_not_finite(
    subject: str, volume_score: float, maps: Mapping[str, np.ndarray]
) -> None:
    bad = [kind for kind, values in maps.items() if not np.isfinite(values).all()]
    if not np.isfinite(volume_score):
        bad.append("volume score")
    if bad:
        raise nifti.BadVoxels(
            f"{subject}: the model gives NaN or infinite values ({', '.join(bad)}), so "
            "nothing was written for it. Look at the image, or use another checkpoint."
        )


def render(predictions: Sequence[Prediction], folder: pathlib.Path) -> str:
    """One line per scan, then what must be known of single ones.

    Args:
      predictions: What `predict` returned.
      folder: Where the files are.

    Returns:
      Text of several lines.
    """
    width = max([len("subject"), *(len(one.subject) for one in predictions)])
    lines = [
        f"{'subject':{width}}  {'score':>9}  {'healthy below':>13}  {'found':>9}  parts"
    ]
    for one in predictions:
        mark = "  see below" if one.warnings else ""
        lines.append(
            f"{one.subject:{width}}  {one.volume_score:9.4g}  "
            f"{one.healthy_percentile:11.0f} %  {one.found_ml:6.2f} ml  "
            f"{one.num_components:5d}{mark}"
        )
    for one in predictions:
        lines += [f"WARNING {one.subject}: {warning}" for warning in one.warnings]
    lines.append(f"Maps, masks and JSON files: {folder}")
    lines.append("For research only, not a medical device.")
    return "\n".join(lines)


def _rounded(value: float, digits: int = 3) -> float:
    return round(float(value), digits) + 0.0  # no -0.0
