"""Scores volumes with a method or a baseline and keeps what metrics need."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uad_jax import mesh as mesh_lib
from uad_jax.data.sources import VolumeInfo
from uad_jax.methods.base import Method
from uad_jax.metrics import postprocess, voxel
from uad_jax.metrics.postprocess import Protocol
from uad_jax.ops import filters, intensity
from uad_jax.types import Key, Labels, ModelState, Scores, Volumes

# A baseline: (image [D, H, W] float32, brain [D, H, W] bool) -> map [D, H, W] float32.
Baseline = Callable[[np.ndarray, np.ndarray], np.ndarray]


class PretrainingStage(ValueError):
    """The method has no scores; another method starts from it."""


class Scorer(NamedTuple):
    """Anything that maps volumes to scores.

    Attributes:
      name: For tables.
      score: Takes decoded volumes.
      protocol: Post-processing of its map.
    """

    name: str
    score: Callable[[Volumes], Scores]
    protocol: Protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class VolumeResult:
    """What is kept of one scored volume.

    Attributes:
      info: The volume.
      voxels: Post-processed scores inside the eroded brain, and their truth; the
        rest of the brain, and lesion outside it, rank lowest.
      annotated: Whether the truth is an annotation.
      abnormal: Volume-level label.
      slice_score: Of the slices with brain, [d] float32.
      slice_lesion: Which of them hold lesion, [d] bool.
      volume_score: Of the whole volume.
      dice: Dice at each threshold, after removal of small components if the protocol
        has it; NaN if truth and prediction are both empty.
      found_voxels: Voxels of the prediction at each threshold.
      reconstruction: Errors of the reconstruction against the input.
    """

    info: VolumeInfo
    voxels: voxel.VoxelScores
    annotated: bool
    abnormal: bool
    slice_score: np.ndarray
    slice_lesion: np.ndarray
    volume_score: float
    dice: dict[str, float]
    found_voxels: dict[str, int]
    reconstruction: dict[str, float]


class VolumeArrays(NamedTuple):
    """The arrays of one scored volume, for maps and figures; valid slices only."""

    image: np.ndarray  # [d, H, W, C]
    brain: np.ndarray  # [d, H, W] bool
    lesion: np.ndarray  # [d, H, W] bool
    anomaly_map: np.ndarray  # post-processed, [d, H, W]
    eroded: np.ndarray  # [d, H, W] bool
    reconstruction: np.ndarray | None  # [d, H, W, C]


def method_scorer(
    name: str,
    method: Method,
    model: ModelState,
    key: Key,
    protocol: Protocol,
    mesh: jax.sharding.Mesh,
) -> Scorer:
    """Wraps a trained method.

    Raises:
      PretrainingStage: If the method has no scores.
    """
    if method.score is None:
        raise PretrainingStage(
            f"{name} is a pretraining stage and scores nothing. Train the method that "
            "starts from it (warm_start) and evaluate that."
        )
    score = jax.jit(method.score, out_shardings=mesh_lib.batch_sharded(mesh))
    if method.filters_inside:
        protocol = Protocol.NONE
    return Scorer(name, lambda volumes: score(model, volumes, key), protocol)


def baseline_scorer(name: str, baseline: Baseline, protocol: Protocol) -> Scorer:
    """Wraps a baseline; of several channels it sees the first."""

    def score(volumes: Volumes) -> Scores:
        images = np.asarray(volumes.image)[..., 0]
        brains = np.asarray(volumes.mask)[..., 0]
        maps = np.zeros(images.shape, np.float32)
        for row, valid in enumerate(np.asarray(volumes.valid)):
            if valid.any():
                maps[row, valid] = baseline(images[row, valid], brains[row, valid])
        weights = np.where(brains & np.asarray(volumes.valid)[..., None, None], 1.0, 0)
        total = (maps * weights).sum(axis=(2, 3))
        voxels = weights.sum(axis=(2, 3))
        return Scores(
            anomaly_map=jax.device_put(maps, volumes.mask.sharding),
            slice_score=total / np.maximum(voxels, 1.0),
            volume_score=total.sum(axis=1) / np.maximum(voxels.sum(axis=1), 1.0),
        )

    return Scorer(name, score, protocol)


@jax.jit
def decode(volumes: Volumes) -> Volumes:
    """Decodes the images of volumes to float32."""
    return dataclasses.replace(volumes, image=intensity.decode(volumes.image))


def score_volumes(
    scorer: Scorer,
    volumes: Volumes,
    labels: Labels,
    infos: list[VolumeInfo],
    thresholds: Mapping[str, float],
) -> Iterator[tuple[VolumeResult, VolumeArrays]]:
    """Scores, post-processes and measures one batch.

    Args:
      scorer: What to score with.
      volumes: Decoded volumes, padding included.
      labels: Their truth.
      infos: The volumes that are not padding, in order.
      thresholds: Name -> threshold to segment at.

    Yields:
      One result and its arrays per volume that is not padding.
    """
    scores = scorer.score(volumes)
    filtered, eroded = postprocess.postprocess(
        scores.anomaly_map, volumes.mask[..., 0], volumes.valid, scorer.protocol
    )
    errors = _errors(volumes, scores)
    host = jax.device_get((volumes, scores, filtered, eroded, errors))
    volumes, scores, filtered, eroded, errors = host
    for row, info in enumerate(infos):
        valid = np.asarray(volumes.valid[row])
        arrays = VolumeArrays(
            image=np.asarray(volumes.image[row])[valid],
            brain=np.asarray(volumes.mask[row])[valid, ..., 0],
            lesion=labels.lesion[row, valid],
            anomaly_map=filtered[row, valid],
            eroded=eroded[row, valid],
            reconstruction=None
            if scores.reconstruction is None
            else np.asarray(scores.reconstruction[row])[valid],
        )
        found = {
            name: postprocess.predict(
                arrays.anomaly_map, arrays.eroded, threshold, scorer.protocol
            )
            for name, threshold in thresholds.items()
        }
        yield _result(row, info, scores, labels, arrays, found, errors), arrays


def _result(
    row: int,
    info: VolumeInfo,
    scores: Scores,
    labels: Labels,
    arrays: VolumeArrays,
    found: Mapping[str, np.ndarray],
    errors: Mapping[str, np.ndarray],
) -> VolumeResult:
    shown = np.any(arrays.brain, axis=(1, 2))
    slice_score = np.asarray(scores.slice_score[row])[: len(shown)]
    return VolumeResult(
        info=info,
        voxels=voxel.from_map(
            arrays.anomaly_map, arrays.eroded, arrays.lesion, arrays.brain
        ),
        annotated=bool(labels.annotated[row]),
        abnormal=bool(labels.abnormal[row]),
        slice_score=slice_score[shown],
        slice_lesion=np.any(arrays.lesion, axis=(1, 2))[shown],
        volume_score=float(scores.volume_score[row]),
        dice={
            name: voxel.dice(voxel.confusion_of_masks(mask, arrays.lesion))
            for name, mask in found.items()
        },
        found_voxels={name: int(mask.sum()) for name, mask in found.items()},
        reconstruction={name: float(value[row]) for name, value in errors.items()},
    )


def _errors(volumes: Volumes, scores: Scores) -> dict[str, jax.Array]:
    if scores.reconstruction is None:
        return {}
    return _reconstruction_errors(volumes, scores.reconstruction)


@jax.jit
def _reconstruction_errors(
    volumes: Volumes, reconstruction: jax.Array
) -> dict[str, jax.Array]:
    """L1 in the brain and in the whole box, and SSIM, each [B].

    SSIM is the mean over slices with brain (2-D, Gaussian 11 x 11, sigma 1.5, data
    range 1).
    """
    valid = volumes.valid[:, :, None, None, None]
    error = jnp.abs(volumes.image - reconstruction) * valid
    brain = volumes.mask & valid
    axes = (1, 2, 3, 4)
    channels = volumes.image.shape[-1]
    box_size = jnp.sum(volumes.valid, axis=1) * error[0, 0].size
    in_brain = jnp.sum(error * brain, axis=axes)
    flat = (-1, *volumes.image.shape[2:4])
    pairs = (
        jnp.moveaxis(volumes.image, -1, 2).reshape(flat),
        jnp.moveaxis(reconstruction, -1, 2).reshape(flat),
    )
    ssim = filters.ssim(*pairs, data_range=1.0)
    ssim = ssim.reshape(*volumes.valid.shape, channels).mean(axis=-1)
    counted = volumes.valid & jnp.any(brain, axis=(2, 3, 4))
    return {
        "l1_brain": in_brain / jnp.maximum(jnp.sum(brain, axis=axes) * channels, 1),
        "l1_box": jnp.sum(error, axis=axes) / jnp.maximum(box_size, 1),
        "ssim": jnp.sum(ssim * counted, axis=1)
        / jnp.maximum(jnp.sum(counted, axis=1), 1),
    }
