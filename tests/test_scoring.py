"""Scoring: which voxels count, what is kept, and what padding changes."""

import jax
import numpy as np
import pytest
import skimage.metrics

from tests import stores
from uad_jax import mesh as mesh_lib
from uad_jax import scoring
from uad_jax.data import sources
from uad_jax.methods import base
from uad_jax.metrics import voxel
from uad_jax.metrics.postprocess import Protocol
from uad_jax.types import Labels, ModelState, Scores, Volumes

GRID = (5, 26, 26, 1)


def _info(uid: int, depth: int = GRID[0]) -> sources.VolumeInfo:
    return sources.VolumeInfo(
        uid=uid,
        subject=f"sub-{uid}",
        patient=f"sub-{uid}",
        split="test",
        fold=None,
        label="abnormal",
        annotated=True,
        licence="",
        modalities=("t1",),
        geometry=stores.phantom(0, GRID).geometry,
        brain_voxels=[1] * depth,
        content="",
        clipped=0,
    )


def _batch(mesh: jax.sharding.Mesh) -> tuple[Volumes, Labels]:
    """Two phantoms with a lesion; the second has a padded slice."""
    scans = [stores.phantom(number, GRID, lesion=True) for number in (1, 2)]
    valid = np.ones((2, GRID[0]), bool)
    valid[1, -1] = False
    volumes = Volumes(
        image=np.stack([scan.image for scan in scans]),
        mask=np.stack([scan.brain for scan in scans])[..., None],
        valid=valid,
        uid=np.array([1, 2], np.int32),
    )
    labels = Labels(
        lesion=np.stack([scan.lesion for scan in scans]),
        annotated=np.ones(2, bool),
        abnormal=np.ones(2, bool),
    )
    return mesh_lib.to_global(volumes, mesh), labels


def _identity(name: str = "raw") -> scoring.Scorer:
    return scoring.baseline_scorer(
        name, lambda image, brain: np.where(brain, image, 0.0), Protocol.NONE
    )


def test_results_hold_the_brain_and_leave_out_padding(
    mesh1: jax.sharding.Mesh,
) -> None:
    volumes, labels = _batch(mesh1)
    infos = [_info(1), _info(2, depth=4)]
    rows = list(
        scoring.score_volumes(_identity(), volumes, labels, infos, {"rule": 0.7})
    )
    for row, (result, arrays) in enumerate(rows):
        depth = 5 - row
        brain = np.asarray(volumes.mask)[row, :depth, ..., 0]
        lesion = labels.lesion[row, :depth]
        assert arrays.image.shape == (depth, 26, 26, 1)
        scored = np.asarray(volumes.image)[row, :depth, ..., 0][brain]
        np.testing.assert_array_equal(np.sort(result.voxels.scores), np.sort(scored))
        assert result.voxels.lesion.sum() == lesion.sum()
        assert result.voxels.outside_normal == 0
        found = (np.asarray(volumes.image)[row, :depth, ..., 0] > 0.7) & brain
        overlap = 2 * (found & lesion).sum() / (found.sum() + lesion.sum())
        assert result.dice["rule"] == pytest.approx(overlap)
        assert result.found_voxels["rule"] == found.sum()  # no component is dropped
        assert len(result.slice_score) == depth


def test_erosion_ranks_the_rim_of_the_brain_lowest(mesh1: jax.sharding.Mesh) -> None:
    volumes, labels = _batch(mesh1)
    eroding = _identity()._replace(protocol=Protocol.BEHRENDT)
    result, arrays = next(
        scoring.score_volumes(eroding, volumes, labels, [_info(1)], {})
    )
    rim = arrays.brain & ~arrays.eroded
    assert rim.any()
    lost = (rim & arrays.lesion).sum()
    assert result.voxels.outside_lesion == lost
    assert result.voxels.outside_normal == rim.sum() - lost
    assert len(result.voxels.scores) == arrays.eroded.sum()


def test_reconstruction_errors_equal_a_loop_over_slices(
    mesh1: jax.sharding.Mesh,
) -> None:
    volumes, labels = _batch(mesh1)
    rng = np.random.default_rng()
    shift = rng.normal(0, 0.05, volumes.image.shape).astype(np.float32)

    def score(model: ModelState, volumes: Volumes, key: jax.Array) -> Scores:
        error = jax.numpy.abs(shift[..., 0])
        return Scores(
            anomaly_map=error,
            slice_score=error.mean((2, 3)),
            volume_score=error.mean((1, 2, 3)),
            reconstruction=volumes.image + shift,
        )

    method = base.Method(
        inputs=base.Inputs(), init=None, update=None, validate=None, score=score
    )
    scorer = scoring.method_scorer(
        "shifted",
        method,
        ModelState(params={}, collections={}),
        jax.random.key(0),
        Protocol.NONE,
        mesh1,
    )
    infos = [_info(1), _info(2, depth=4)]
    rows = list(scoring.score_volumes(scorer, volumes, labels, infos, {}))
    for row, (result, arrays) in enumerate(rows):
        moved = shift[row, : 5 - row]
        expected = np.abs(moved)[arrays.brain].mean()
        assert result.reconstruction["l1_brain"] == pytest.approx(expected, rel=1e-4)
        expected = np.abs(moved).mean()
        assert result.reconstruction["l1_box"] == pytest.approx(expected, rel=1e-4)
        values = [
            skimage.metrics.structural_similarity(
                image[..., 0].astype(np.float64),
                (image + error)[..., 0].astype(np.float64),
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                data_range=1.0,
            )
            for image, error in zip(arrays.image, moved, strict=True)
        ]
        assert result.reconstruction["ssim"] == pytest.approx(np.mean(values), abs=1e-3)


def test_a_pretraining_stage_is_refused_with_the_remedy(
    mesh1: jax.sharding.Mesh,
) -> None:
    stage = base.Method(
        inputs=base.Inputs(), init=None, update=None, validate=None, score=None
    )
    model = ModelState(params={}, collections={})
    with pytest.raises(ValueError, match=r"pretraining stage.*warm_start"):
        scoring.method_scorer(
            "spark", stage, model, jax.random.key(0), Protocol.NONE, mesh1
        )


def test_a_method_that_filters_inside_is_not_filtered_again(
    mesh1: jax.sharding.Mesh,
) -> None:
    method = base.Method(
        inputs=base.Inputs(),
        init=None,
        update=None,
        validate=None,
        score=lambda model, volumes, key: None,
        filters_inside=True,
    )
    model = ModelState(params={}, collections={})
    scorer = scoring.method_scorer(
        "sadm", method, model, jax.random.key(0), Protocol.BEHRENDT, mesh1
    )
    assert scorer.protocol is Protocol.NONE


def test_constant_baseline_scores_the_prevalence(mesh1: jax.sharding.Mesh) -> None:
    volumes, labels = _batch(mesh1)
    constant = scoring.baseline_scorer(
        "prevalence", lambda image, brain: np.zeros(image.shape), Protocol.NONE
    )
    result, arrays = next(
        scoring.score_volumes(constant, volumes, labels, [_info(1)], {})
    )
    prevalence = arrays.lesion.sum() / arrays.brain.sum()
    ranking = voxel.rank(result.voxels)
    assert voxel.average_precision(ranking) == pytest.approx(prevalence)
    assert voxel.auroc(ranking) == 0.5
