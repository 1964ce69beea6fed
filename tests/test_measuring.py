"""Measuring: which voxels count and what is kept of a volume."""

import dataclasses
import itertools

import numpy as np
import pytest
import scipy.ndimage

from tests import fresh
from tests.test_scoring import GRID, _info
from uad_jax import measuring
from uad_jax.measuring import Scale, Wanted
from uad_jax.metrics import baselines, postprocess, voxel
from uad_jax.metrics.protocols import Protocol
from uad_jax.scoring import Stage, VolumeArrays

ALL = Wanted(voxels=True, lesions=True)
PROCESSED = Stage.PROCESSED


def _arrays(*, constant: bool = False) -> VolumeArrays:
    rng = fresh.rng()
    shape = GRID[:3]
    brain = np.zeros(shape, bool)
    brain[:, 4:-4, 4:-4] = True
    eroded = np.zeros(shape, bool)
    eroded[:, 6:-6, 6:-6] = True
    lesion = np.zeros(shape, bool)
    lesion[1:4, 5:10, 8:12] = True  # one row of it lies in the rim
    scores = np.zeros(shape) if constant else rng.random(shape) + lesion
    scores = scores.astype(np.float32)
    return VolumeArrays(
        image=None,
        brain=brain,
        lesion=lesion,
        scores=scores,
        slice_score=scores.mean(axis=(1, 2)),
        volume_score=2.5,
        maps={PROCESSED: (scores, eroded), Stage.UNPROCESSED: (scores, brain)},
        reconstruction=None,
        errors={"ssim": 0.5},
    )


def _measure(
    arrays: VolumeArrays, scale: Scale, **fields: object
) -> measuring.Measured:
    info = dataclasses.replace(_info(1), **fields)
    return measuring.measure(info, arrays, PROCESSED, Protocol.BEHRENDT, scale, ALL)


def test_the_rim_of_the_brain_ranks_lowest_and_its_lesion_costs_recall() -> None:
    arrays = _arrays()
    result, masks = _measure(arrays, Scale({"rule": -1.0}, None))
    rim = arrays.brain & ~arrays.eroded
    lost = (rim & arrays.lesion).sum()
    assert lost
    assert result.outside_lesion == lost
    assert result.outside.tolist() == [rim.sum() - lost, lost]
    assert len(result.voxels.scores) == arrays.eroded.sum()
    np.testing.assert_array_equal(masks["rule"], arrays.eroded)
    inside = arrays.eroded & arrays.lesion
    overlap = 2 * inside.sum() / (arrays.eroded.sum() + arrays.lesion.sum())
    assert result.dice("rule") == pytest.approx(overlap)
    assert result.mean_inside == pytest.approx(arrays.scores[inside].mean())
    others = arrays.eroded & ~arrays.lesion
    assert result.mean_elsewhere == pytest.approx(arrays.scores[others].mean())


def test_each_stage_is_measured_on_its_own_map() -> None:
    arrays = _arrays()
    whole = measuring.measure(
        _info(1), arrays, Stage.UNPROCESSED, Protocol.NONE, measuring.UNSCALED, ALL
    ).result
    assert whole.outside_lesion == 0
    assert len(whole.voxels.scores) == arrays.brain.sum()
    ranking = voxel.rank(whole.voxels)
    assert whole.ap == voxel.average_precision(ranking)
    assert whole.auroc == voxel.auroc(ranking)
    assert whole.dice_ceiling == voxel.best_dice(ranking)[0]


def test_fault_D2_a_constant_map_scores_the_prevalence() -> None:
    arrays = _arrays(constant=True)
    result = measuring.measure(
        _info(1), arrays, Stage.UNPROCESSED, Protocol.NONE, measuring.UNSCALED, ALL
    ).result
    assert result.ap == pytest.approx(arrays.lesion.sum() / arrays.brain.sum())
    assert result.auroc == 0.5


def _blob(rng: np.random.Generator, shape: tuple[int, ...], share: float) -> np.ndarray:
    """This share of the voxels: a column with a random edge, bool."""
    field = scipy.ndimage.gaussian_filter(rng.normal(size=shape), 1.5)
    _, y, x = np.indices(shape) - (np.array(shape) / 2)[:, None, None, None]
    far = np.hypot(y, x) + 3 * field / field.std()
    return far < np.quantile(far, share)


def test_fault_D2_erosion_lifts_a_constant_map_above_the_prevalence() -> None:
    rng = fresh.rng()
    shape = (GRID[0], 56, 56)  # two iterations of erosion
    lesion = _blob(rng, shape, 0.03)
    brain = _blob(rng, shape, 0.5) | lesion
    lesion |= brain & (rng.random(shape) < 0.005)  # a little of it in the rim
    processed, eroded = postprocess.postprocess(
        baselines.constant(rng.random(shape), brain)[None],
        brain[None],
        np.ones((1, shape[0]), bool),
        Protocol.BEHRENDT,
    )
    arrays = _arrays()._replace(
        brain=brain,
        lesion=lesion,
        maps={PROCESSED: (np.asarray(processed[0]), np.asarray(eroded[0]))},
    )
    found = measuring.measure(
        _info(1), arrays, PROCESSED, Protocol.BEHRENDT, measuring.UNSCALED, ALL
    ).result

    # Two levels of score: what the erosion leaves, and below it the rim.
    cross = scipy.ndimage.generate_binary_structure(2, 1)
    inner = np.stack([scipy.ndimage.binary_erosion(one, cross, 2) for one in brain])
    rim = brain & ~inner
    prevalence = lesion.sum() / brain.sum()
    share_inside = lesion[inner].mean()  # the precision of the upper level
    recall = lesion[inner].sum() / lesion.sum()
    assert found.ap == pytest.approx(recall * share_inside + (1 - recall) * prevalence)
    healthier = rim[~lesion].sum() / (brain & ~lesion).sum()
    assert found.auroc == pytest.approx((1 + recall - (1 - healthier)) / 2)
    # The rim is healthier than the rest, and that is all the map has.
    assert lesion[rim].mean() < share_inside
    assert found.ap > prevalence
    assert found.auroc > 0.5


def test_histogram_counts_the_scored_voxels_once() -> None:
    arrays = _arrays()
    edges = np.array([0.25, 0.5, 1.2], np.float32)
    result = _measure(arrays, Scale({}, edges)).result
    scores = arrays.scores[arrays.eroded]
    lesion = arrays.lesion[arrays.eroded]
    for kind, chosen in enumerate((scores[~lesion], scores[lesion])):
        limits = [-np.inf, *edges, np.inf]
        pairs = itertools.pairwise(limits)
        expected = [((chosen > low) & (chosen <= high)).sum() for low, high in pairs]
        assert result.bins[kind].tolist() == expected


def test_rules_with_one_threshold_share_one_segmentation() -> None:
    result, masks = _measure(_arrays(), Scale({"a": 1.0, "b": 1.0, "c": 1.5}, None))
    assert masks["a"] is masks["b"]
    assert masks["c"].sum() < masks["a"].sum()
    assert result.found["a"].num_voxels == masks["a"].sum()
    assert result.found["a"].lesions.found.tolist() == [True]


def test_what_is_not_wanted_is_not_kept() -> None:
    result = measuring.measure(
        _info(1),
        _arrays(),
        PROCESSED,
        Protocol.BEHRENDT,
        Scale({"rule": 1.0}, None),
        Wanted(voxels=False, lesions=False),
    ).result
    assert result.voxels is None
    assert result.bins is None
    assert result.found["rule"].lesions is None


def test_labels_decide_what_a_volume_counts_as() -> None:
    def kinds(label: str) -> tuple[bool, bool, bool, bool]:
        one = _measure(_arrays(), measuring.UNSCALED, label=label).result
        return one.abnormal, one.healthy, one.sham, one.has_lesion

    assert kinds("abnormal") == (True, False, False, True)
    assert kinds("healthy") == (False, True, False, False)
    assert kinds("sham") == (False, False, True, False)
    sham = _measure(_arrays(), measuring.UNSCALED, label="sham").result
    assert np.isnan(sham.ap)
    assert sham.mean_inside > 0
