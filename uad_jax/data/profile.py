"""What the intensities of a modality look like inside the brain, whatever the unit.

A fingerprint is the shape of one image's histogram; a profile says what those of a
set are like, so that a scan of another kind can be told.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from uad_jax.data import sources

_QUANTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
_MEDIAN = _QUANTILES.index(50)
_MIN_SPREAD = 0.03  # of the fingerprint; smaller spreads count as this
_FEW = 100  # fewer voxels have no shape
_ENOUGH = 200_000  # voxels that a shape is taken from
_DIGITS = 4  # that are stored
_SAMPLE = 24  # volumes of a store that its profile is made of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """The fingerprints of a set of images.

    Attributes:
      centre: Their median, [8] float.
      spread: Their robust standard deviation, [8] float, not below 0.03.
      count: Images.
    """

    centre: np.ndarray
    spread: np.ndarray
    count: int

    def distance(self, fingerprint: np.ndarray, *, ignore: int = 0) -> float:
        """Root mean square of the deviations, in robust standard deviations.

        Args:
          fingerprint: [8] float.
          ignore: How many of the largest deviations to leave out: bright lesions of
            up to a twentieth of the brain change no more than two.
        """
        scaled = np.sort(np.abs(fingerprint - self.centre) / self.spread)
        return float(np.sqrt((scaled[: len(scaled) - ignore] ** 2).mean()))

    def to_json(self) -> dict[str, Any]:
        """Converts to plain JSON types."""
        return {
            "centre": np.round(self.centre, _DIGITS).tolist(),
            "spread": np.round(self.spread, _DIGITS).tolist(),
            "count": self.count,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Profile":
        """Inverts `to_json`, to its digits."""
        return cls(
            centre=np.array(fields["centre"]),
            spread=np.array(fields["spread"]),
            count=fields["count"],
        )


def fingerprint(values: np.ndarray) -> np.ndarray | None:
    """Finds the quantiles about the median, relative to their own range.

    Args:
      values: Voxels inside the brain, [n]; any scale and offset.

    Returns:
      [8] float; None if there are too few voxels or they are all alike.
    """
    values = values[:: max(1, values.size // _ENOUGH)]
    if values.size < _FEW:
        return None
    quantiles = np.percentile(values, _QUANTILES)
    scale = quantiles[-2] - quantiles[1]
    if not scale > 0:
        return None
    return np.delete((quantiles - quantiles[_MEDIAN]) / scale, _MEDIAN)


def of(fingerprints: Sequence[np.ndarray]) -> Profile:
    """Sums up the fingerprints of a set of one image or more."""
    table = np.stack(list(fingerprints))
    centre = np.median(table, axis=0)
    deviation = np.median(np.abs(table - centre), axis=0)
    return Profile(
        centre=centre,
        spread=np.maximum(1.4826 * deviation, _MIN_SPREAD),
        count=len(table),
    )


def of_store(
    store: sources.Store,
    volumes: Sequence[sources.VolumeInfo],
    channels: Sequence[int] | np.ndarray,
) -> dict[str, Profile]:
    """Sums up volumes of a store, on the model grid; 24 of them when there are more.

    Args:
      store: The store.
      volumes: The volumes.
      channels: Channels to sum up.

    Returns:
      Modality -> profile; a modality without any fingerprint is left out.
    """
    count = min(len(volumes), _SAMPLE)
    chosen = np.linspace(0, len(volumes) - 1, count).round().astype(int)
    found: dict[str, list[np.ndarray]] = {}
    for place in chosen:
        codes, plane = store.read_volume(volumes[place].uid)
        brain = (plane & sources.BRAIN_BIT) != 0
        for channel in channels:
            values = fingerprint(codes[..., channel][brain])
            if values is not None:
                found.setdefault(store.modalities[channel], []).append(values)
    return {modality: of(values) for modality, values in found.items()}
