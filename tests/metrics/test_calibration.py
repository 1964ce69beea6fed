import json
import pathlib

import numpy as np
import pytest

from tests import fresh
from uad_jax.metrics import accumulators, calibration, voxel
from uad_jax.metrics.voxel import VoxelScores


def _healthy(seed: int, outside: int = 0) -> VoxelScores:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=700).astype(np.float32)
    return VoxelScores(scores, np.zeros(700, bool), 0, outside)


def _abnormal(seed: int) -> VoxelScores:
    rng = np.random.default_rng(seed)
    lesion = rng.random(700) < 0.1
    scores = (rng.normal(size=700) + 2 * lesion).astype(np.float32)
    return VoxelScores(scores, lesion, 2, 30)


def _calibration(num_abnormal: int = 2) -> calibration.Calibration:
    return calibration.calibrate(
        [_healthy(0), _healthy(1, 50)],
        [_abnormal(seed) for seed in range(2, 2 + num_abnormal)],
        [0.4, 0.1],
    )


@pytest.mark.parametrize("decimals", [1, 6])
@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1, 0.5])
def test_healthy_thresholds_attain_the_rate_and_no_lower_score_does(
    decimals: int, rate: float
) -> None:
    volumes = [
        one._replace(scores=np.round(one.scores, decimals))
        for one in (_healthy(0), _healthy(1, 123))
    ]
    ranking = voxel.rank(voxel.pool(volumes))
    threshold = calibration.healthy_thresholds(volumes, [rate])[rate]
    found = voxel.false_positive_rate(voxel.confusion_at(ranking, threshold))
    assert found <= rate
    lower = ranking.normal[ranking.normal < np.float32(threshold)].max()
    beyond = voxel.false_positive_rate(voxel.confusion_at(ranking, lower))
    assert beyond > rate


def test_a_healthy_rate_larger_than_the_scored_share_takes_all() -> None:
    volume = VoxelScores(np.float32([1, 2]), np.zeros(2, bool), 0, 2)
    threshold = calibration.healthy_thresholds([volume], [0.5])[0.5]
    assert threshold < 1
    with pytest.raises(ValueError, match="at least one healthy scan"):
        calibration.healthy_thresholds([], [0.1])


def test_validated_threshold_is_the_best_pooled_dice_of_validation() -> None:
    found = _calibration()
    volumes = [_abnormal(2), _abnormal(3)]
    expected = voxel.best_dice(voxel.rank(voxel.pool(volumes)))
    assert (found.validated_dice, found.validated) == expected
    threshold, said = found.validated_or_healthy(0.05)
    assert threshold == found.validated
    assert "2 abnormal validation scans" in said


def test_fault_D6_without_abnormal_scans_the_healthy_threshold_is_used_and_said() -> (
    None
):
    found = _calibration(num_abnormal=0)
    assert found.validated is None
    threshold, said = found.validated_or_healthy(0.05)
    assert threshold == found.healthy_fpr[0.05]
    assert "no annotated abnormal validation scans" in said
    with pytest.raises(ValueError, match=r"rate of 0\.2"):
        found.healthy_threshold(0.2)


def test_lesions_alone_give_the_validated_threshold_and_no_healthy_one(
    tmp_path: pathlib.Path,
) -> None:
    lesions = [_abnormal(2), _abnormal(3)]
    unscored = VoxelScores(np.zeros(0, np.float32), np.zeros(0, bool), 0, 9)
    for healthy, scores in (([], []), ([unscored], [0.5])):
        found = calibration.calibrate(healthy, lesions, scores)
        assert found.validated == _calibration().validated
        assert found.healthy_fpr == {}
        assert found.healthy_volume_scores == ()
        assert (found.num_healthy, found.num_abnormal) == (0, 2)
        assert found.validated_or_healthy(0.05)[0] == found.validated
        with pytest.raises(ValueError, match="no healthy validation scans"):
            found.healthy_threshold(0.05)
        calibration.save(tmp_path / "behrendt.json", {"model": found})
        assert calibration.load(tmp_path / "behrendt.json") == {"model": found}


def test_without_a_healthy_voxel_and_a_lesion_there_is_nothing_to_calibrate() -> None:
    unscored = VoxelScores(np.zeros(0, np.float32), np.zeros(0, bool), 0, 9)
    empty_mask = _healthy(9)
    for healthy, lesions in (([], []), ([unscored], []), ([], [empty_mask])):
        assert not calibration.can_calibrate(healthy, lesions)
        with pytest.raises(ValueError, match="no validation voxels"):
            calibration.calibrate(healthy, lesions, [0.1] * len(healthy))


def test_fault_B32_abnormal_scans_with_an_empty_mask_are_not_counted() -> None:
    empty = _healthy(9)
    found = calibration.calibrate([_healthy(0)], [empty, _abnormal(2)], [0.1])
    assert found.num_abnormal == 1
    assert calibration.calibrate([_healthy(0)], [empty], [0.1]).validated is None


def test_score_edges_ascend_and_reach_into_the_tail() -> None:
    volumes = [_healthy(seed) for seed in range(20)]
    edges = np.array(calibration.score_edges(volumes, 512))
    scores = np.concatenate([one.scores for one in volumes])
    assert (np.diff(edges) > 0).all()
    assert len(edges) <= 512
    inside = edges[(edges >= scores.min()) & (edges <= scores.max())]
    assert set(inside) <= set(scores.astype(float))
    assert inside[0] == scores.min()
    assert inside[-1] == scores.max()
    top = np.sort(scores)[-100:]
    assert np.isin(top.astype(float), edges).mean() > 0.5
    constant = VoxelScores(np.full(9, 2, np.float32), np.zeros(9, bool))
    assert 2.0 in calibration.score_edges([constant])


def test_fault_D4_lesions_far_above_all_healthy_scores_are_still_ranked() -> None:
    rng = fresh.rng()
    healthy = [
        VoxelScores(rng.normal(0, 1, 5000).astype(np.float32), np.zeros(5000, bool))
    ]
    edges = np.array(calibration.score_edges(healthy), np.float32)
    lesion = rng.random(20_000) < 0.05
    scores = rng.normal(0, 1, 20_000) + lesion * rng.uniform(0, 500, 20_000)
    scores += ~lesion * (rng.random(20_000) < 0.02) * rng.uniform(0, 500, 20_000)
    one = VoxelScores(scores.astype(np.float32), lesion)
    exact = voxel.average_precision(voxel.rank(one))
    counted = accumulators.average_precision(*accumulators.histogram(one, edges))
    assert counted == pytest.approx(exact, abs=0.01)


def test_a_file_gives_back_the_same_calibration(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "calibration" / "100" / "behrendt.json"
    entries = {"model": _calibration(), "raw": _calibration(0)}
    calibration.save(path, entries)
    assert calibration.load(path) == entries
    assert calibration.load_origin(path) == {}
    calibration.save(path, entries, {"checkpoint": "abc"})
    assert calibration.load(path) == entries
    assert calibration.load_origin(path) == {"checkpoint": "abc"}
    assert [file.name for file in path.parent.iterdir()] == ["behrendt.json"]


def test_a_changed_or_torn_file_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "behrendt.json"
    calibration.save(path, {"model": _calibration()})
    text = path.read_text()
    content = json.loads(text)
    content["entries"]["model"]["validated"] += 0.1
    path.write_text(json.dumps(content))
    with pytest.raises(calibration.CalibrationError, match="own hash"):
        calibration.load(path)
    path.write_text(text[: len(text) // 2])
    with pytest.raises(calibration.CalibrationError, match="not a whole"):
        calibration.load(path)
    path.write_text(text.replace('"version": 2', '"version": 0'))
    with pytest.raises(calibration.CalibrationError, match="version 0"):
        calibration.load(path)
