"""Scoring: which voxels count, what is kept, and what padding changes."""

import dataclasses

import jax
import numpy as np
import pytest
import skimage.metrics

from tests import fresh, stores
from uad_jax import mesh as mesh_lib
from uad_jax import scoring
from uad_jax.data import sources
from uad_jax.methods import base, lifting
from uad_jax.metrics.protocols import Protocol
from uad_jax.scoring import Stage
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


def test_arrays_leave_out_padding_and_hold_both_stages(
    mesh1: jax.sharding.Mesh,
) -> None:
    volumes, labels = _batch(mesh1)
    eroding = _identity()._replace(protocol=Protocol.BEHRENDT)
    rows = list(scoring.score_volumes(eroding, volumes, labels, 2, tuple(Stage)))
    for row, arrays in enumerate(rows):
        depth = 5 - row
        image = np.asarray(volumes.image)[row, :depth, ..., 0]
        assert arrays.image.shape == (depth, 26, 26, 1)
        assert len(arrays.slice_score) == depth
        np.testing.assert_array_equal(arrays.lesion, labels.lesion[row, :depth])
        np.testing.assert_array_equal(arrays.scores[arrays.brain], image[arrays.brain])
        unprocessed, brain = arrays.maps[Stage.UNPROCESSED]
        np.testing.assert_array_equal(brain, arrays.brain)
        np.testing.assert_array_equal(unprocessed[brain], image[brain])
        assert arrays.eroded.sum() < brain.sum()
        assert not np.array_equal(
            arrays.anomaly_map[arrays.eroded], image[arrays.eroded]
        )
    one = next(scoring.score_volumes(eroding, volumes, labels, 1, pictures=False))
    assert one.image is None
    np.testing.assert_array_equal(one.anomaly_map, rows[0].anomaly_map)


def test_reconstruction_errors_equal_a_loop_over_slices(
    mesh1: jax.sharding.Mesh,
) -> None:
    volumes, labels = _batch(mesh1)
    rng = fresh.rng()
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
        scoring.program("shifted", method, mesh1),
        ModelState(params={}, collections={}),
        jax.random.key(0),
        Protocol.NONE,
    )
    for row, arrays in enumerate(scoring.score_volumes(scorer, volumes, labels, 2)):
        moved = shift[row, : 5 - row]
        expected = np.abs(moved)[arrays.brain].mean()
        assert arrays.errors["l1_brain"] == pytest.approx(expected, rel=1e-4)
        expected = np.abs(moved).mean()
        assert arrays.errors["l1_box"] == pytest.approx(expected, rel=1e-4)
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
        assert arrays.errors["ssim"] == pytest.approx(np.mean(values), abs=1e-3)
        with_brain = arrays.brain.any(axis=(1, 2))
        expected = skimage.metrics.peak_signal_noise_ratio(
            arrays.image[with_brain], (arrays.image + moved)[with_brain], data_range=1
        )
        assert arrays.errors["psnr"] == pytest.approx(expected, abs=1e-3)


def _darker_and_brighter(mesh: jax.sharding.Mesh) -> scoring.Scorer:
    """Reconstructs every volume shifted by noise; its map is the absolute error."""
    noise = fresh.rng().normal(0, 0.1, (2, *GRID)).astype(np.float32)

    def score(model: ModelState, volumes: Volumes, key: jax.Array) -> Scores:
        error = jax.numpy.abs(noise[..., 0])
        scores = lifting.summarise(error, None, volumes)
        return dataclasses.replace(scores, reconstruction=volumes.image + noise)

    method = base.Method(
        inputs=base.Inputs(), init=None, update=None, validate=None, score=score
    )
    model = ModelState(params={}, collections={})
    compiled = scoring.program("noise", method, mesh)
    key = jax.random.key(0)
    return scoring.method_scorer("noise", method, compiled, model, key, Protocol.BAUR)


def test_baur_keeps_what_is_brighter_than_the_reconstruction_in_both_tables(
    mesh1: jax.sharding.Mesh,
) -> None:
    volumes, labels = _batch(mesh1)
    scorer = _darker_and_brighter(mesh1)
    plain = scorer._replace(protocol=Protocol.BEHRENDT)
    for kept, all_ in zip(
        scoring.score_volumes(scorer, volumes, labels, 2, tuple(Stage)),
        scoring.score_volumes(plain, volumes, labels, 2, tuple(Stage)),
        strict=True,
    ):
        brain, error = kept.brain, kept.image[..., 0] - kept.reconstruction[..., 0]
        expected = np.where(error > 0, all_.scores, 0)
        np.testing.assert_array_equal(kept.scores, expected)
        unprocessed, _ = kept.maps[Stage.UNPROCESSED]
        np.testing.assert_array_equal(unprocessed[brain], expected[brain])
        assert (error[brain] < 0).any()
        assert kept.volume_score == all_.volume_score  # the method's own
        assert kept.eroded.sum() < all_.eroded.sum()


def test_a_map_without_reconstruction_is_what_it_was_under_baur(
    mesh1: jax.sharding.Mesh,
) -> None:
    volumes, labels = _batch(mesh1)
    scorer = _identity()._replace(protocol=Protocol.BAUR)
    for arrays in scoring.score_volumes(scorer, volumes, labels, 2):
        image = arrays.image[..., 0]
        np.testing.assert_array_equal(arrays.scores[arrays.brain], image[arrays.brain])


def test_a_pretraining_stage_is_refused_with_the_remedy(
    mesh1: jax.sharding.Mesh,
) -> None:
    stage = base.Method(
        inputs=base.Inputs(), init=None, update=None, validate=None, score=None
    )
    with pytest.raises(ValueError, match=r"pretraining stage.*warm_start"):
        scoring.program("spark", stage, mesh1)


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
        "sadm",
        method,
        scoring.program("sadm", method, mesh1),
        model,
        jax.random.key(0),
        Protocol.BEHRENDT,
    )
    assert scorer.protocol_of(Stage.PROCESSED) is Protocol.NONE


def test_one_program_serves_many_checkpoints(mesh1: jax.sharding.Mesh) -> None:
    volumes, labels = _batch(mesh1)
    traced = []

    def score(model: ModelState, volumes: Volumes, key: jax.Array) -> Scores:
        traced.append(key)
        scaled = volumes.image[..., 0] * model.params["net"]
        return lifting.summarise(scaled, None, volumes)

    method = base.Method(
        inputs=base.Inputs(), init=None, update=None, validate=None, score=score
    )
    compiled = scoring.program("scaled", method, mesh1)
    found = []
    for factor in (1.0, 2.0, 3.0):
        model = ModelState(params={"net": jax.numpy.float32(factor)}, collections={})
        scorer = scoring.method_scorer(
            "scaled", method, compiled, model, jax.random.key(0), Protocol.NONE
        )
        (arrays,) = scoring.score_volumes(scorer, volumes, labels, 1)
        found.append(arrays.volume_score)
    assert len(traced) == 1
    np.testing.assert_allclose(np.divide(found, found[0]), [1, 2, 3], rtol=1e-6)
