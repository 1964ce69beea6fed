"""Thresholds and score scales, fixed on validation scans before any test scan is seen.

Stored beside the checkpoint they belong to, with their own hash: predictions and
exports need them, and a file that was edited or torn must not pass for a calibration.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uad_jax.metrics import voxel
from uad_jax.metrics.voxel import VoxelScores

HEALTHY_RATES = (0.01, 0.05, 0.1)
_VERSION = 2


class CalibrationError(ValueError):
    """A calibration file that cannot be trusted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What validation scans say about the scores of one detector.

    All thresholds are used as `score > threshold`, on post-processed maps.

    Attributes:
      healthy_fpr: Voxel false-positive rate on healthy scans -> threshold; empty if
        there were none.
      validated: Threshold of the best pooled Dice on annotated abnormal scans; None
        if there were none.
      validated_dice: That Dice, of the scans it was chosen on; None like `validated`.
      score_edges: Ascending distinct scores, edges of histogram bins
        (`metrics.accumulators`).
      healthy_volume_scores: Volume scores of the healthy scans, ascending.
      num_healthy: Healthy scans used.
      num_abnormal: Annotated abnormal scans used.
    """

    healthy_fpr: dict[float, float]
    validated: float | None
    validated_dice: float | None
    score_edges: tuple[float, ...]
    healthy_volume_scores: tuple[float, ...]
    num_healthy: int
    num_abnormal: int

    def validated_or_healthy(self, rate: float) -> tuple[float, str]:
        """Gives the validated threshold or, without one, the healthy one.

        Args:
          rate: Healthy false-positive rate to fall back to.

        Returns:
          The threshold and a sentence that says which it is.
        """
        if self.validated is not None:
            return self.validated, (
                f"best pooled Dice on {self.num_abnormal} abnormal validation scans"
            )
        return self.healthy_threshold(rate), (
            f"{100 * rate:g} % false positives on {self.num_healthy} healthy "
            "validation scans, since there are no annotated abnormal validation scans"
        )

    def healthy_threshold(self, rate: float) -> float:
        """Looks up the threshold of a healthy false-positive rate.

        Raises:
          ValueError: If the rate was not calibrated.
        """
        if not self.healthy_fpr:
            raise ValueError(
                f"No threshold for a healthy false-positive rate of {rate}: there were "
                "no healthy validation scans. Give the validation split some, or take "
                "the validated threshold (threshold_from)."
            )
        if rate not in self.healthy_fpr:
            raise ValueError(
                f"No threshold for a healthy false-positive rate of {rate}; there are "
                f"{sorted(self.healthy_fpr)}. Evaluate again with this rate."
            )
        return self.healthy_fpr[rate]


def healthy_thresholds(
    healthy: Sequence[VoxelScores], rates: Sequence[float] = HEALTHY_RATES
) -> dict[float, float]:
    """Finds thresholds by their share of false positives on healthy scans; no labels.

    Args:
      healthy: Voxels of healthy scans, pooled here. The rate counts all their normal
        voxels, those outside the eroded brain included, as
        `voxel.false_positive_rate` does.
      rates: Largest allowed shares, each in (0, 1).

    Returns:
      Rate -> the lowest score t at which `score > t` holds for no larger share.

    Raises:
      ValueError: If there are no scored voxels.
    """
    ranking = voxel.rank(voxel.pool(healthy)) if healthy else None
    if ranking is None or not len(ranking.normal):
        raise ValueError(
            "There are no healthy validation voxels to set a threshold on. Give the "
            "validation split at least one healthy scan."
        )
    scores = ranking.normal
    thresholds = {}
    for rate in rates:
        allowed = int(np.floor(rate * ranking.num_normal))
        # scores[place] itself is not above the threshold; those after it may be.
        place = max(len(scores) - 1 - allowed, 0)
        level = scores[place]
        if allowed >= len(scores):
            level = np.nextafter(level, level.dtype.type(-np.inf))
        thresholds[float(rate)] = float(level)
    return thresholds


def score_edges(
    volumes: Sequence[VoxelScores], num_edges: int = 4096
) -> tuple[float, ...]:
    """Chooses histogram edges for scores that are still to come.

    Three eighths are evenly spaced quantiles of these scores and three eighths crowd
    towards the largest, where precision is decided when lesions are rare. The others
    lie beyond: lesions may score far above anything in healthy scans. They move away
    geometrically, to 1,000 times the spread of these scores above and below.

    Returns:
      At most `num_edges` distinct ascending scores, float32 values.
    """
    scores = np.sort(np.concatenate([volume.scores for volume in volumes]))
    if not len(scores):
        raise ValueError("There are no scored validation voxels to choose edges from.")
    beyond = num_edges // 8
    inside = num_edges - 2 * beyond
    even = np.linspace(0, 1, inside - inside // 2)
    tail = 1 - np.geomspace(0.1, 0.5 / len(scores), inside // 2)
    places = np.rint(np.concatenate([even, tail]) * (len(scores) - 1))
    spread = float(scores[-1]) - float(scores[0])
    away = max(spread, 1e-6) * np.geomspace(1e-3, 1e3, beyond)
    edges = [scores[places.astype(np.int64)], scores[-1] + away, scores[0] - away]
    return tuple(np.unique(np.concatenate(edges).astype(np.float32)).tolist())


def with_lesion(abnormal: Sequence[VoxelScores]) -> list[VoxelScores]:
    """Those whose lesion mask is not empty."""
    return [one for one in abnormal if one.lesion.any() or one.outside_lesion]


def can_calibrate(
    healthy: Sequence[VoxelScores], abnormal: Sequence[VoxelScores]
) -> bool:
    """Whether there is a healthy scan, or one with a lesion, that has scores."""
    return _scored(healthy) or _scored(with_lesion(abnormal))


def _scored(volumes: Sequence[VoxelScores]) -> bool:
    return any(len(volume.scores) for volume in volumes)


def calibrate(
    healthy: Sequence[VoxelScores],
    abnormal: Sequence[VoxelScores],
    healthy_volume_scores: Sequence[float],
    *,
    rates: Sequence[float] = HEALTHY_RATES,
    num_edges: int = 4096,
) -> Calibration:
    """Calibrates one detector on validation scans, healthy ones or lesions or both.

    Args:
      healthy: Voxels of every healthy validation scan. Without any, or without a
        voxel in them, there are no healthy thresholds.
      abnormal: Voxels of every annotated abnormal validation scan; may be empty.
        Scans whose lesion mask is empty are left out.
      healthy_volume_scores: Volume scores of the healthy scans.
      rates: Healthy false-positive rates to find thresholds for.
      num_edges: Histogram edges to keep.

    Raises:
      ValueError: If there is nothing to set a threshold on.
    """
    if not can_calibrate(healthy, abnormal):
        raise ValueError(
            "There are no validation voxels to set a threshold on. Give the validation "
            "split a healthy scan, or one with a lesion mask."
        )
    if not _scored(healthy):
        healthy, healthy_volume_scores = [], []
    labelled = with_lesion(abnormal)
    validated = validated_dice = None
    if labelled:
        validated_dice, validated = voxel.best_dice(voxel.rank(voxel.pool(labelled)))
    return Calibration(
        healthy_fpr=healthy_thresholds(healthy, rates) if healthy else {},
        validated=validated,
        validated_dice=validated_dice,
        score_edges=score_edges([*healthy, *labelled], num_edges),
        healthy_volume_scores=tuple(sorted(float(s) for s in healthy_volume_scores)),
        num_healthy=len(healthy),
        num_abnormal=len(labelled),
    )


def file_path(
    workdir: pathlib.Path, step: int | None, protocol: str, set_name: str = ""
) -> pathlib.Path:
    """Where the calibrations of one checkpoint under one protocol are.

    Args:
      workdir: The run, or where results of maps go.
      step: The checkpoint; None for maps made elsewhere.
      protocol: Its name, or what it is called if maps are not processed.
      set_name: Of a set with a store of its own, whose lesions may have their share
        in the thresholds.
    """
    suffix = f"_{set_name}" if set_name else ""
    folder = "maps" if step is None else str(step)
    return workdir / "calibration" / folder / f"{protocol}{suffix}.json"


def save(
    path: pathlib.Path,
    entries: Mapping[str, Calibration],
    origin: Mapping[str, str] | None = None,
) -> None:
    """Writes the calibrations of one checkpoint under one protocol, atomically.

    Args:
      path: The file, see `file_path`.
      entries: Detector -> calibration.
      origin: What they were made of, such as the hash of the checkpoint.
    """
    plain = {name: _to_plain(entry) for name, entry in entries.items()}
    made_of = dict(origin or {})
    content = {
        "version": _VERSION,
        "sha256": _digest([plain, made_of]),
        "origin": made_of,
        "entries": plain,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, sort_keys=True, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load(path: pathlib.Path) -> dict[str, Calibration]:
    """Reads what `save` wrote.

    Raises:
      FileNotFoundError: If there is no such file.
      CalibrationError: If the file is torn, was edited, or is of another version.
    """
    return {name: _from_plain(entry) for name, entry in _read(path)["entries"].items()}


def load_origin(path: pathlib.Path) -> dict[str, str]:
    """Reads what the calibrations of a file were made of; see `load`."""
    return _read(path)["origin"]


def _read(path: pathlib.Path) -> dict[str, Any]:
    remedy = "Delete it and run evaluate again."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, digest = content["version"], content["sha256"]
        signed = [content["entries"], content.get("origin")]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CalibrationError(
            f"{path.name} is not a whole calibration file ({error}). {remedy}"
        ) from error
    if version != _VERSION:
        raise CalibrationError(
            f"{path.name} has version {version}, expected {_VERSION}. {remedy}"
        )
    if _digest(signed) != digest:
        raise CalibrationError(
            f"{path.name} does not match its own hash: it was changed after it was "
            f"written. {remedy}"
        )
    return content


def _digest(plain: Any) -> str:
    text = json.dumps(plain, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _to_plain(entry: Calibration) -> dict[str, Any]:
    plain = dataclasses.asdict(entry)
    plain["healthy_fpr"] = {str(rate): t for rate, t in entry.healthy_fpr.items()}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in plain.items()
    }


def _from_plain(plain: Mapping[str, Any]) -> Calibration:
    rates = {float(rate): t for rate, t in plain["healthy_fpr"].items()}
    return Calibration(
        healthy_fpr=rates,
        validated=plain["validated"],
        validated_dice=plain["validated_dice"],
        score_edges=tuple(plain["score_edges"]),
        healthy_volume_scores=tuple(plain["healthy_volume_scores"]),
        num_healthy=plain["num_healthy"],
        num_abnormal=plain["num_abnormal"],
    )
