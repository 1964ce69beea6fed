"""Post-processing and metrics of one volume beside scipy and scikit-learn.

    python -m benchmarks.metrics [--repeats=9] [--seed=0]

One synthetic FLAIR scan of 96 x 96 x 80 voxels with MS lesions; its map is the
residual to its own blurred image. Both sides start from the same host arrays and do:
erosion (3 iterations), outside to the lowest score, 5 x 5 x 5 median, AP, AUROC and
best Dice of the brain's voxels, the segmentation at that Dice without components of 7
voxels or fewer, and its Dice. Ours includes the transfers to and from the device;
compile time is reported apart. The reference is `scipy.ndimage.binary_erosion`,
`median_filter` and `label`, and scikit-learn's `average_precision_score`,
`roc_auc_score` and `precision_recall_curve`. The two alternate in one process and
must agree: arrays to the bit, figures to 1e-9. Prints one JSON line of medians.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.metrics
from absl import app, flags
from scipy import ndimage

from uad_jax import runtime
from uad_jax.data import cohort, lesions
from uad_jax.metrics import postprocess, protocols, voxel

_REPEATS = flags.DEFINE_integer("repeats", 9, "Rounds; medians are printed.", 7)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the synthetic subject.")


class Volume(NamedTuple):
    """What both sides start from, [80, 96, 96] each."""

    scores: np.ndarray  # float32
    brain: np.ndarray  # bool
    lesion: np.ndarray  # bool


class Found(NamedTuple):
    """What both sides find."""

    anomaly_map: np.ndarray  # post-processed
    segmentation: np.ndarray
    figures: tuple[float, float, float, float]  # AP, AUROC, best Dice, Dice


class Lap(NamedTuple):
    """Seconds of one round by stage."""

    filters: float
    ranking: float
    components: float

    @property
    def total(self) -> float:
        """All stages."""
        return sum(self)


def _volume(seed: int) -> Volume:
    subject = cohort.make_subject(seed, lesions.Kind.MS, ("flair",))
    image, brain, lesion = (
        np.ascontiguousarray(array.transpose(2, 0, 1))
        for array in (subject.images["flair"], subject.brain, subject.lesion)
    )
    image = np.where(brain, image / np.percentile(image[brain], 99), 0.0)
    residual = (image - ndimage.gaussian_filter(image, 3.0)) * brain
    return Volume(residual.astype(np.float32), brain, lesion)


def ours(volume: Volume) -> tuple[Found, Lap]:
    """The package's path: filters on the device, figures from one host sort."""
    times = [time.perf_counter()]
    filtered, eroded = jax.device_get(
        postprocess.postprocess(
            jnp.asarray(volume.scores[None]),
            jnp.asarray(volume.brain[None]),
            jnp.ones((1, len(volume.brain)), bool),
            protocols.Protocol.BEHRENDT,
        )
    )
    filtered, eroded = filtered[0], eroded[0]
    times.append(time.perf_counter())
    ranking = voxel.rank(voxel.from_map(filtered, eroded, volume.lesion, volume.brain))
    best, threshold = voxel.best_dice(ranking)
    precision, area = voxel.average_precision(ranking), voxel.auroc(ranking)
    times.append(time.perf_counter())
    segmentation = postprocess.predict(filtered, eroded, threshold)
    dice = voxel.dice(voxel.confusion_of_masks(segmentation, volume.lesion))
    times.append(time.perf_counter())
    return Found(filtered, segmentation, (precision, area, best, dice)), _lap(times)


def reference(volume: Volume) -> tuple[Found, Lap]:
    """The vectorised scipy and scikit-learn path."""
    times = [time.perf_counter()]
    cross = ndimage.generate_binary_structure(2, 1)[None]
    eroded = ndimage.binary_erosion(volume.brain, cross, iterations=3)
    lowest = volume.scores[eroded].min()
    filtered = ndimage.median_filter(np.where(eroded, volume.scores, lowest), size=5)
    filtered = np.where(eroded, filtered, lowest)
    times.append(time.perf_counter())
    counted = volume.brain | volume.lesion
    below = filtered[eroded].min() - 1  # of what is not scored
    scores = np.where(eroded, filtered, below)[counted]
    truth = volume.lesion[counted]
    average = sklearn.metrics.average_precision_score(truth, scores)
    area = sklearn.metrics.roc_auc_score(truth, scores)
    precision, recall, levels = sklearn.metrics.precision_recall_curve(truth, scores)
    total = np.maximum(precision + recall, 1e-300)
    dice = (2 * precision * recall / total)[:-1]  # the last one predicts nothing
    dice[levels <= below] = 0.0  # what is not scored is never predicted
    level = levels[len(dice) - 1 - np.argmax(dice[::-1])]  # of equal Dice the highest
    times.append(time.perf_counter())
    binary = (filtered >= level) & eroded
    labels, _ = ndimage.label(binary, np.ones((3, 3, 3)))
    keep = np.bincount(labels.ravel()) > 7
    keep[0] = False
    segmentation = keep[labels]
    both = np.count_nonzero(segmentation & volume.lesion)
    either = np.count_nonzero(segmentation) + np.count_nonzero(volume.lesion)
    times.append(time.perf_counter())
    figures = (float(average), float(area), float(dice.max()), 2 * both / either)
    return Found(filtered, segmentation, figures), _lap(times)


def _lap(times: Sequence[float]) -> Lap:
    return Lap(*np.diff(times).tolist())


def _check(first: Found, second: Found) -> None:
    np.testing.assert_array_equal(first.anomaly_map, second.anomaly_map)
    np.testing.assert_array_equal(first.segmentation, second.segmentation)
    np.testing.assert_allclose(first.figures, second.figures, rtol=1e-9)


def compare(volume: Volume, repeats: int) -> dict[str, dict[str, float]]:
    """Times both sides in turns.

    Returns:
      Side -> "filters_ms", "ranking_ms", "components_ms" and "total_ms", medians.
    """
    sides: dict[str, Callable[[Volume], tuple[Found, Lap]]] = {
        "ours": ours,
        "scipy_sklearn": reference,
    }
    laps: dict[str, list[Lap]] = {name: [] for name in sides}
    for _ in range(repeats):
        results = {name: side(volume) for name, side in sides.items()}
        for name, (_, lap) in results.items():
            laps[name].append(lap)
        _check(*(found for found, _ in results.values()))
    return {name: _medians(rows) for name, rows in laps.items()}


def _medians(laps: Sequence[Lap]) -> dict[str, float]:
    stages = np.median([(*lap, lap.total) for lap in laps], axis=0)
    names = [f"{stage}_ms" for stage in (*Lap._fields, "total")]
    return dict(zip(names, np.round(1e3 * stages, 2).tolist(), strict=True))


def main(argv: Sequence[str]) -> None:
    """Prints the comparison."""
    del argv
    runtime.setup()
    volume = _volume(_SEED.value)
    begin = time.perf_counter()
    _check(ours(volume)[0], reference(volume)[0])
    first = time.perf_counter() - begin
    medians = compare(volume, _REPEATS.value)
    row = {
        **medians,
        "ratio": round(
            medians["scipy_sklearn"]["total_ms"] / medians["ours"]["total_ms"], 2
        ),
        "first_call_seconds": round(first, 2),
        "repeats": _REPEATS.value,
        "voxels": volume.scores.shape,
        "brain_voxels": int(volume.brain.sum()),
        "lesion_voxels": int(volume.lesion.sum()),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    app.run(main)
