"""Detection of whole lesions, not of voxels.

A lesion is a 26-connected component of the reference, a finding one of the
prediction (`postprocess.components`, the same rule that drops small findings).
A lesion is found if the prediction overlaps it in at least one voxel; a finding is
false if it overlaps no lesion. One finding may so find several lesions, and several
findings in one lesion are all true: recall counts lesions, precision findings.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from uad_jax.metrics import postprocess

# Inner bounds of strata in ml; a stratum holds its lower bound.
SIZE_STRATA = (0.1, 1.0, 10.0)  # of one lesion
LOAD_STRATA = (1.0, 10.0)  # of all lesions of a volume together


class LesionCounts(NamedTuple):
    """Lesions and findings of one volume.

    Attributes:
      sizes_ml: Size of each reference lesion in ml, [n] float64.
      found: Whether the prediction found it, [n] bool.
      false_components: Components of the prediction that overlap no lesion.
      num_components: Components of the prediction.
    """

    sizes_ml: np.ndarray
    found: np.ndarray
    false_components: int
    num_components: int


def count(
    prediction: np.ndarray,
    lesion: np.ndarray,
    voxel_ml: float,
    *,
    min_overlap: float = 0.0,
) -> LesionCounts:
    """Matches the findings of one volume with its lesions.

    Args:
      prediction: [D, H, W] bool.
      lesion: Reference, [D, H, W] bool.
      voxel_ml: Volume of a voxel in ml, > 0.
      min_overlap: Share of a lesion's voxels, in [0, 1], that the prediction must
        cover for the lesion to be found; always at least one voxel. What makes a
        finding false does not depend on it.

    Returns:
      The counts; lesions in the order of `postprocess.components`.

    Raises:
      ValueError: If the shapes differ, or `voxel_ml` or `min_overlap` is out of range.
    """
    if prediction.shape != lesion.shape:
        raise ValueError(
            f"The prediction is {prediction.shape}, the reference {lesion.shape}. "
            "Bring both onto one grid."
        )
    if not 0 < voxel_ml < math.inf or not 0 <= min_overlap <= 1:
        raise ValueError(
            "Expected voxel_ml above 0 and min_overlap in [0, 1], found "
            f"{voxel_ml} and {min_overlap}."
        )
    lesions, num_lesions = postprocess.components(lesion)
    findings, num_findings = postprocess.components(prediction)
    sizes = np.bincount(lesions.ravel(), minlength=num_lesions + 1)[1:]
    covered = np.bincount(lesions[findings > 0], minlength=num_lesions + 1)[1:]
    touching = np.unique(findings[lesions > 0])
    num_true = int(np.count_nonzero(touching))
    return LesionCounts(
        sizes_ml=sizes * voxel_ml,
        found=(covered > 0) & (covered / sizes >= min_overlap),
        false_components=num_findings - num_true,
        num_components=num_findings,
    )


def pool(counts: Sequence[LesionCounts]) -> dict[str, Any]:
    """Pools the lesions and findings of several volumes.

    Returns:
      "num_lesions", "num_components"; "lesion_recall", found lesions of all lesions
      (NaN without lesions); "lesion_precision", true components of all components
      (NaN without components); "lesion_f1", their harmonic mean (0 if either is 0
      or only one of them exists, NaN if neither does); "by_size", stratum of
      `SIZE_STRATA` -> {"num_lesions", "recall"}, in the order of size, strata
      without lesions left out.
    """
    sizes = [float(size) for one in counts for size in one.sizes_ml]
    found = [bool(value) for one in counts for value in one.found]
    num_components = sum(one.num_components for one in counts)
    num_true = num_components - sum(one.false_components for one in counts)
    recall, precision = _share(sum(found), len(found)), _share(num_true, num_components)
    strata: dict[str, list[bool]] = {name: [] for name in stratum_names(SIZE_STRATA)}
    for size, hit in zip(sizes, found, strict=True):
        strata[stratum(size, SIZE_STRATA)].append(hit)
    return {
        "num_lesions": len(sizes),
        "num_components": num_components,
        "lesion_recall": recall,
        "lesion_precision": precision,
        "lesion_f1": _harmonic_mean(recall, precision),
        "by_size": {
            name: {"num_lesions": len(hits), "recall": sum(hits) / len(hits)}
            for name, hits in strata.items()
            if hits
        },
    }


def stratum_names(strata: Sequence[float]) -> tuple[str, ...]:
    """Names the strata between bounds, in the order of size.

    Args:
      strata: Inner bounds in ml, ascending.

    Returns:
      One name more than bounds: "<0.1 ml", "0.1-1 ml", ">=1 ml" of (0.1, 1).
    """
    between = [f"{low:g}-{high:g} ml" for low, high in itertools.pairwise(strata)]
    return (f"<{strata[0]:g} ml", *between, f">={strata[-1]:g} ml")


def stratum(ml: float, strata: Sequence[float]) -> str:
    """Names the stratum of a volume; a bound belongs to the stratum above it.

    Args:
      ml: Volume in ml, >= 0.
      strata: Inner bounds in ml, ascending: `SIZE_STRATA` or `LOAD_STRATA`.

    Raises:
      ValueError: If the volume is negative or NaN.
    """
    if not ml >= 0:
        raise ValueError(f"Expected a volume of 0 ml or more, found {ml}.")
    return stratum_names(strata)[int(np.searchsorted(strata, ml, side="right"))]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _harmonic_mean(recall: float, precision: float) -> float:
    if math.isnan(recall) and math.isnan(precision):
        return math.nan
    if not recall > 0 or not precision > 0:
        return 0.0
    return 2 * recall * precision / (recall + precision)
