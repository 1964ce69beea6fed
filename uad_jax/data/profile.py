"""What the intensities of a modality look like inside the brain, whatever the unit.

A fingerprint is the shape of one image's histogram; a profile says what those of a
set are like, so that a scan of another kind can be told.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

_QUANTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
_MEDIAN = _QUANTILES.index(50)
_MIN_SPREAD = 0.03  # of the fingerprint; smaller spreads count as this
_FEW = 100  # fewer voxels have no shape
_ENOUGH = 200_000  # voxels that a shape is taken from
_DIGITS = 4  # that are stored


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

    def distance(self, fingerprint: np.ndarray) -> float:
        """Root mean square of the deviations, in robust standard deviations."""
        scaled = (fingerprint - self.centre) / self.spread
        return float(np.sqrt((scaled**2).mean()))

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
