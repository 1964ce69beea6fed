"""What is kept of one scored volume: its figures, its counts and a histogram.

Voxels are kept only where they are asked for, so that a set of any size fits in
memory; a histogram per volume stands in for them.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from uad_jax.data import geometry
from uad_jax.data.sources import VolumeInfo
from uad_jax.metrics import accumulators, lesionwise, postprocess, voxel
from uad_jax.metrics.lesionwise import LesionCounts
from uad_jax.metrics.protocols import Protocol
from uad_jax.scoring import Stage, VolumeArrays

ABNORMAL, SHAM = "abnormal", "sham"


class Scale(NamedTuple):
    """What validation scans fixed before any volume of the set is measured.

    Attributes:
      thresholds: Rule -> threshold to segment at.
      edges: Of the histogram bins, ascending, [K] float32; None = no histogram.
    """

    thresholds: Mapping[str, float]
    edges: np.ndarray | None


UNSCALED = Scale({}, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to be kept of a volume.

    Attributes:
      voxels: Whether all its scores are kept, for exact pooled figures.
      lesions: Whether single lesions are counted.
    """

    voxels: bool
    lesions: bool


class Found(NamedTuple):
    """A segmentation against the truth.

    Attributes:
      counts: Of voxels.
      lesions: Of lesions; None where they were not asked for.
    """

    counts: voxel.Confusion
    lesions: LesionCounts | None

    @property
    def num_voxels(self) -> int:
        """Voxels of the segmentation."""
        return self.counts.tp + self.counts.fp


@dataclasses.dataclass(frozen=True, kw_only=True)
class VolumeResult:
    """What is kept of one scored volume, at one stage.

    Attributes:
      info: The volume.
      annotated: Whether the truth is an annotation.
      abnormal: Volume-level label.
      lesion_voxels: Voxels of the lesion mask.
      outside_lesion: Those of them outside the eroded brain; they rank lowest.
      voxels: All scored voxels, if they were asked for; the rest of the brain, and
        lesion outside it, are counted.
      bins: Histogram of them, [2, K + 1] uint32 (normal, lesion), or None.
      outside: Voxels that are not scored, [2] int64 (normal, lesion).
      ap: Average precision; NaN without lesion, as are the next three.
      auroc: Area under the ROC curve.
      dice_ceiling: Largest Dice over all thresholds.
      mean_inside: Mean score of the mask's voxels inside the eroded brain.
      mean_elsewhere: Mean score of the other voxels of the eroded brain.
      slice_score: Of the slices with brain, [d] float32.
      slice_lesion: Which of them hold lesion, [d] bool.
      volume_score: Of the whole volume.
      found: Rule -> what is found at its threshold; small components are dropped
        if the protocol drops them.
      reconstruction: Errors of the reconstruction against the input.
    """

    info: VolumeInfo
    annotated: bool
    abnormal: bool
    lesion_voxels: int
    outside_lesion: int
    voxels: voxel.VoxelScores | None
    bins: np.ndarray | None
    outside: np.ndarray
    ap: float
    auroc: float
    dice_ceiling: float
    mean_inside: float
    mean_elsewhere: float
    slice_score: np.ndarray
    slice_lesion: np.ndarray
    volume_score: float
    found: dict[str, Found]
    reconstruction: dict[str, float]

    @property
    def sham(self) -> bool:
        """Whether the mask marks where an implant changed nothing."""
        return self.info.label == SHAM

    @property
    def healthy(self) -> bool:
        """Whether it counts as a healthy volume."""
        return not self.abnormal and not self.sham

    @property
    def has_lesion(self) -> bool:
        """Whether it has voxel figures: abnormal, annotated, mask not empty."""
        return self.abnormal and self.annotated and self.lesion_voxels > 0

    @property
    def lesion_contrast(self) -> float:
        """Mean score in the lesion over that elsewhere in the eroded brain.

        1 where both are 0; NaN without lesion there, or where only the lesion scores.
        """
        if not self.has_lesion:
            return float("nan")
        if self.mean_inside == self.mean_elsewhere:
            return 1.0
        if not self.mean_elsewhere > 0:
            return float("nan")
        return self.mean_inside / self.mean_elsewhere

    @property
    def voxel_ml(self) -> float:
        """Millilitres of a voxel of the model grid."""
        return geometry.voxel_ml(self.info.geometry)

    def dice(self, rule: str) -> float:
        """Dice at a rule's threshold; NaN if truth and segmentation are empty."""
        return voxel.dice(self.found[rule].counts)


class Measured(NamedTuple):
    """A result, and the segmentations it was measured on.

    Attributes:
      result: The result.
      segmentations: Rule -> [d, H, W] bool.
    """

    result: VolumeResult
    segmentations: dict[str, np.ndarray]


def measure(
    info: VolumeInfo,
    arrays: VolumeArrays,
    stage: Stage,
    protocol: Protocol,
    scale: Scale,
    wanted: Wanted,
) -> Measured:
    """Measures one volume at one stage.

    Args:
      info: The volume.
      arrays: Its scores, maps and truth.
      stage: Which map is measured.
      protocol: What was done to that map.
      scale: Thresholds and histogram edges.
      wanted: What is kept.
    """
    anomaly_map, eroded = arrays.maps[stage]
    voxels = voxel.from_map(anomaly_map, eroded, arrays.lesion, arrays.brain)
    abnormal = info.label == ABNORMAL
    annotated = info.annotated or info.label == SHAM
    lesion_voxels = int(np.count_nonzero(arrays.lesion))
    ap = auroc = ceiling = float("nan")
    if abnormal and annotated and lesion_voxels:
        ranking = voxel.rank(voxels)
        ap, auroc = voxel.average_precision(ranking), voxel.auroc(ranking)
        ceiling = voxel.best_dice(ranking)[0]
    bins = None
    outside = np.array([voxels.outside_normal, voxels.outside_lesion], np.int64)
    if scale.edges is not None:
        counted, outside = accumulators.histogram(voxels, scale.edges)
        bins = counted.astype(np.uint32)
    masks = _segment(anomaly_map, eroded, protocol, scale.thresholds)
    found = _found(masks, arrays.lesion, geometry.voxel_ml(info.geometry), wanted)
    with_brain = np.any(arrays.brain, axis=(1, 2))
    result = VolumeResult(
        info=info,
        annotated=annotated,
        abnormal=abnormal,
        lesion_voxels=lesion_voxels,
        outside_lesion=voxels.outside_lesion,
        voxels=voxels if wanted.voxels else None,
        bins=bins,
        outside=outside,
        ap=ap,
        auroc=auroc,
        dice_ceiling=ceiling,
        mean_inside=_mean(anomaly_map[arrays.lesion & eroded]),
        mean_elsewhere=_mean(anomaly_map[~arrays.lesion & eroded]),
        slice_score=arrays.slice_score[with_brain],
        slice_lesion=np.any(arrays.lesion, axis=(1, 2))[with_brain],
        volume_score=arrays.volume_score,
        found=found,
        reconstruction=arrays.errors,
    )
    return Measured(result, masks)


def _mean(scores: np.ndarray) -> float:
    return float(scores.mean(dtype=np.float64)) if scores.size else float("nan")


def _segment(
    anomaly_map: np.ndarray,
    eroded: np.ndarray,
    protocol: Protocol,
    thresholds: Mapping[str, float],
) -> dict[str, np.ndarray]:
    """Segments at each threshold; rules with one threshold share the work."""
    masks = {
        value: postprocess.predict(anomaly_map, eroded, value, protocol)
        for value in set(thresholds.values())
    }
    return {rule: masks[value] for rule, value in thresholds.items()}


def _found(
    masks: Mapping[str, np.ndarray], lesion: np.ndarray, voxel_ml: float, wanted: Wanted
) -> dict[str, Found]:
    done: dict[int, Found] = {}
    for mask in masks.values():
        if id(mask) not in done:
            done[id(mask)] = Found(
                voxel.confusion_of_masks(mask, lesion),
                lesionwise.count(mask, lesion, voxel_ml) if wanted.lesions else None,
            )
    return {rule: done[id(mask)] for rule, mask in masks.items()}
