"""Scores batches of volumes with a method or a baseline, and post-processes them."""

import dataclasses
import enum
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uad_jax import mesh as mesh_lib
from uad_jax.methods.base import Method
from uad_jax.metrics import postprocess, protocols
from uad_jax.metrics.protocols import Protocol
from uad_jax.ops import filters, intensity
from uad_jax.types import Key, Labels, ModelState, Scores, Volumes

Program = Callable[[ModelState, Volumes, Key], Scores]  # a jitted `Method.score`

# A baseline: (image [D, H, W] float32, brain [D, H, W] bool) -> map [D, H, W] float32.
Baseline = Callable[[np.ndarray, np.ndarray], np.ndarray]


class PretrainingStage(ValueError):
    """The method has no scores; another method starts from it."""


class Stage(enum.Enum):
    """Which maps are measured; the values name their tables in the results."""

    PROCESSED = "scorers"  # by the set's protocol
    # As the method made them, inside the brain mask; where the protocol keeps what is
    # brighter than the reconstruction, that of them.
    UNPROCESSED = "unprocessed"


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

    def protocol_of(self, stage: Stage) -> Protocol:
        """What is done to its maps at a stage."""
        return self.protocol if stage is Stage.PROCESSED else Protocol.NONE


class VolumeArrays(NamedTuple):
    """One scored volume on the host; valid slices only.

    Attributes:
      image: [d, H, W, C], or None where only the maps were asked for.
      brain: [d, H, W] bool.
      lesion: [d, H, W] bool.
      scores: The unprocessed map, [d, H, W].
      slice_score: [d] float32.
      volume_score: Of the whole volume.
      maps: Stage -> post-processed map, [d, H, W], and its eroded brain, bool.
      reconstruction: [d, H, W, C], or None.
      errors: Figures of the reconstruction; empty without one.
    """

    image: np.ndarray | None
    brain: np.ndarray
    lesion: np.ndarray
    scores: np.ndarray
    slice_score: np.ndarray
    volume_score: float
    maps: dict[Stage, tuple[np.ndarray, np.ndarray]]
    reconstruction: np.ndarray | None
    errors: dict[str, float]

    @property
    def anomaly_map(self) -> np.ndarray:
        """The post-processed map, [d, H, W]."""
        return self.maps[Stage.PROCESSED][0]

    @property
    def eroded(self) -> np.ndarray:
        """The brain in which it counts, [d, H, W] bool."""
        return self.maps[Stage.PROCESSED][1]


def program(name: str, method: Method, mesh: jax.sharding.Mesh) -> Program:
    """Compiles a method's score once for all checkpoints of a run.

    On a CPU a method's `host_score` is taken, where it has one.

    Raises:
      PretrainingStage: If the method has no scores.
    """
    if method.score is None:
        raise PretrainingStage(
            f"{name} is a pretraining stage and scores nothing. Train the method that "
            "starts from it (warm_start) and evaluate that."
        )
    sharding = mesh_lib.batch_sharded(mesh)
    driven = driven_by_host(method)
    if driven is not None:
        return lambda *given: jax.device_put(driven(*given), sharding)
    return jax.jit(method.score, out_shardings=sharding)


def driven_by_host(method: Method) -> Program | None:
    """The score that drives programs of its own, where it is what is run."""
    return method.host_score if jax.default_backend() == "cpu" else None


def method_scorer(
    name: str,
    method: Method,
    compiled: Program,
    model: ModelState,
    key: Key,
    protocol: Protocol,
) -> Scorer:
    """Wraps one checkpoint of a method; `compiled` is its `program`."""
    if method.filters_inside:
        protocol = Protocol.NONE
    return Scorer(name, lambda volumes: compiled(model, volumes, key), protocol)


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
    count: int,
    stages: Sequence[Stage] = (Stage.PROCESSED,),
    *,
    pictures: bool = True,
) -> Iterator[VolumeArrays]:
    """Scores and post-processes one batch.

    Args:
      scorer: What to score with.
      volumes: Decoded volumes, padding included.
      labels: Their truth.
      count: Volumes that are not padding; they come first.
      stages: Which maps to make.
      pictures: Whether images and reconstructions are wanted too.

    Yields:
      The arrays of each volume that is not padding.
    """
    scores = _kept(scorer, volumes)
    mask, image = volumes.mask[..., 0], volumes.image[..., 0]
    filtered = [
        postprocess.postprocess(
            scores.anomaly_map, mask, volumes.valid, scorer.protocol_of(stage), image
        )
        for stage in stages
    ]
    errors = _errors(volumes, scores)
    if not pictures:
        scores = dataclasses.replace(scores, reconstruction=None)
    masks, valids, scores, filtered, errors = jax.device_get(
        (volumes.mask, volumes.valid, scores, filtered, errors)
    )
    images = jax.device_get(volumes.image) if pictures else None
    reconstructions = scores.reconstruction
    for row in range(count):
        valid = valids[row]
        yield VolumeArrays(
            image=None if images is None else images[row][valid],
            brain=masks[row][valid, ..., 0],
            lesion=labels.lesion[row, valid],
            scores=scores.anomaly_map[row, valid],
            slice_score=scores.slice_score[row, : np.count_nonzero(valid)],
            volume_score=float(scores.volume_score[row]),
            maps={
                stage: (anomaly_map[row, valid], eroded[row, valid])
                for stage, (anomaly_map, eroded) in zip(stages, filtered, strict=True)
            },
            reconstruction=None
            if reconstructions is None
            else reconstructions[row][valid],
            errors={name: float(value[row]) for name, value in errors.items()},
        )


def _kept(scorer: Scorer, volumes: Volumes) -> Scores:
    """Scores volumes; of the map what the protocol keeps by the reconstruction."""
    scores = scorer.score(volumes)
    keeps = protocols.steps(scorer.protocol).keep_positive
    if not keeps or scores.reconstruction is None:
        return scores
    kept = postprocess.keep_positive(
        scores.anomaly_map,
        volumes.image,
        scores.reconstruction,
        volumes.mask[..., 0],
        volumes.valid,
    )
    return dataclasses.replace(scores, anomaly_map=kept)


def _errors(volumes: Volumes, scores: Scores) -> dict[str, jax.Array]:
    if scores.reconstruction is None:
        return {}
    return _reconstruction_errors(volumes, scores.reconstruction)


@jax.jit
def _reconstruction_errors(
    volumes: Volumes, reconstruction: jax.Array
) -> dict[str, jax.Array]:
    """L1 in the brain and in the whole box, SSIM and PSNR, each [B].

    SSIM is the mean over slices with brain (2-D, Gaussian 11 x 11, sigma 1.5, data
    range 1). PSNR in dB is of all pixels of these slices, data range 1; infinite for
    a perfect reconstruction.
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
    square = jnp.sum(jnp.square(error) * counted[:, :, None, None, None], axis=axes)
    pixels = jnp.sum(counted, axis=1) * error[0, 0].size
    return {
        "l1_brain": in_brain / jnp.maximum(jnp.sum(brain, axis=axes) * channels, 1),
        "l1_box": jnp.sum(error, axis=axes) / jnp.maximum(box_size, 1),
        "ssim": jnp.sum(ssim * counted, axis=1)
        / jnp.maximum(jnp.sum(counted, axis=1), 1),
        "psnr": -10.0 * jnp.log10(square / jnp.maximum(pixels, 1)),
    }
