"""The five baselines of every table, and what they got.

That is the same for every model of the same scans, so it can be kept.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

from absl import logging

from uad_jax import calibrating, evaluation, scoring
from uad_jax.calibrating import Calibrations
from uad_jax.evaluation import Context
from uad_jax.measuring import VolumeResult
from uad_jax.metrics import baselines
from uad_jax.scoring import Scorer, Stage

_MOST_SETS = 4  # the results of a set may hold all its voxels


def fitted(context: Context) -> tuple[list[Scorer], dict[str, str]]:
    """The five baselines of every table; the atlas sees healthy training scans.

    Returns:
      The baselines, and name -> reason of those that there cannot be.
    """
    protocol = context.evaluation_set.protocol
    store = context.training_store
    healthy = calibrating.healthy(context.select(store, "train"))
    functions: dict[str, scoring.Baseline] = dict(baselines.UNFITTED)
    scored = [*context.test, *calibrating.volumes(context)]
    depths = {info.depth for info in [*healthy, *scored]}
    missing = {}
    if len(healthy) < baselines.ATLAS_VOLUMES:
        missing["atlas-z"] = (
            f"fewer than {baselines.ATLAS_VOLUMES} healthy training scans"
        )
    elif len(depths) > 1:
        numbers = " or ".join(map(str, sorted(depths)))
        missing["atlas-z"] = f"volumes of {numbers} slices are not on one grid"
    else:
        atlas = baselines.fit_atlas(evaluation.images(context, store, healthy))
        functions["atlas-z"] = functools.partial(baselines.atlas_z, atlas)
    for name, reason in missing.items():
        logging.warning("The table has no %s: %s.", name, reason)
    found = [
        scoring.baseline_scorer(name, function, protocol)
        for name, function in functions.items()
    ]
    return found, missing


class Baselines(NamedTuple):
    """The baselines of one set.

    Attributes:
      calibrations: (baseline, stage) -> calibration.
      found: Stage -> baseline -> results.
      missing: Baseline -> why there is none.
    """

    calibrations: Calibrations
    found: Mapping[Stage, Mapping[str, list[VolumeResult]]]
    missing: Mapping[str, str]


class BaselineMemory:
    """The baselines of the last four sets, for evaluations of several models in a row.

    Each set may hold `exact_voxels` scores in memory (`evaluation.exact_voxels`). Sets
    without validation scans, and so without thresholds, are not kept.
    """

    def __init__(self) -> None:
        self._sets: dict[tuple, Baselines] = {}

    def recall(self, context: Context) -> Baselines | None:
        """The baselines of the same scans, measured in the same way; None if new."""
        return self._sets.get(_key(context))

    def keep(self, context: Context, got: Baselines) -> None:
        """Keeps the baselines of a set, and forgets the oldest of too many."""
        self._sets[_key(context)] = got
        for oldest in list(self._sets)[:-_MOST_SETS]:
            del self._sets[oldest]


def _key(context: Context) -> tuple:
    """All that the baselines' results follow from."""
    train = calibrating.healthy(context.select(context.training_store, "train"))
    scored = [*context.test, *calibrating.volumes(context)]
    return (
        context.data.modalities,
        context.evaluation_set.split,
        context.settings.healthy_fpr,
        context.settings.exact_voxels,
        context.validation,
        context.fingerprint(context.test),
        context.fingerprint(calibrating.volumes(context)),
        context.fingerprint(train),
        # Figures follow from these too, and fingerprints do not hold them.
        repr([(info.annotated, sorted(info.extra.items())) for info in scored]),
        repr([info.geometry for info in scored]),
    )
