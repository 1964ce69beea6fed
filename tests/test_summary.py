"""Tables from results of single volumes, against hand values."""

import dataclasses

import numpy as np
import pytest

from configs import smoke
from tests.test_scoring import _info
from uad_jax import config as config_lib
from uad_jax import report, summary
from uad_jax.metrics import voxel
from uad_jax.scoring import VolumeResult


def _result(
    uid: int,
    scores: list[float],
    lesion: list[int],
    *,
    abnormal: bool = True,
    annotated: bool = True,
    kind: str = "ms",
    dice: float = 0.5,
    volume_score: float = 0.0,
) -> VolumeResult:
    return VolumeResult(
        info=dataclasses.replace(_info(uid), extra={"kind": kind}),
        voxels=voxel.VoxelScores(
            np.array(scores, np.float32), np.array(lesion, bool), 0, 0
        ),
        annotated=annotated,
        abnormal=abnormal,
        slice_score=np.array([volume_score], np.float32),
        slice_lesion=np.array([abnormal]),
        volume_score=volume_score,
        dice={"healthy_fpr": dice},
        found_voxels={"healthy_fpr": 3},
        reconstruction={"l1_brain": 0.1, "l1_box": 0.02, "ssim": 0.9},
    )


def _four() -> list[VolumeResult]:
    return [
        _result(0, [3.0, 2.0, 1.0], [1, 0, 0], volume_score=4.0),
        _result(1, [9.0, 8.0, 7.0], [0, 1, 0], volume_score=3.0, dice=0.1),
        _result(2, [0.1, 0.2, 0.3], [0, 0, 0], abnormal=False, volume_score=1.0),
        _result(3, [0.1, 0.2, 0.3], [0, 0, 0], abnormal=False, volume_score=3.5),
    ]


def test_pooled_and_mean_figures_differ_and_are_right() -> None:
    row = summary.metrics(_four(), num_samples=10)
    # Per volume: lesion ranks 1st of 3 (AP 1) and 2nd of 3 (AP 1/2).
    assert row["ap_volume_mean"] == pytest.approx(0.75)
    # Pooled over 6 voxels: lesions rank 2nd and 4th: (1/2 + 2/4) / 2.
    assert row["ap_pooled"] == pytest.approx(0.5)
    assert row["dice_healthy_fpr_volume_mean"] == pytest.approx(0.3)
    assert row["volume_auroc"] == pytest.approx(3 / 4)
    assert row["slice_auroc"] == pytest.approx(3 / 4)
    assert row["false_positive_voxels_healthy_fpr_healthy_mean"] == 3
    assert "ap_volume_mean_interval" not in row  # fewer than 5 subjects


def test_fault_D1_volumes_without_truth_are_counted_not_scored() -> None:
    results = [*_four(), _result(4, [5.0], [0], annotated=False)]
    results.append(_result(5, [5.0], [0]))  # annotated, but the mask is empty
    tables = summary.summarize({"model": results}, group_by="kind", num_samples=10)
    assert tables["scorers"]["model"]["num_lesion"] == 2
    assert tables["counts"]["volumes without annotation"] == 1
    assert tables["counts"]["abnormal volumes with an empty mask"] == 1


def test_slices_without_annotation_are_not_taken_for_healthy_ones() -> None:
    unknown = _result(4, [9.0], [0], annotated=False, volume_score=9.0)
    unknown = dataclasses.replace(unknown, slice_lesion=np.array([False]))
    row = summary.metrics([*_four(), unknown], num_samples=10)
    assert row["slice_auroc"] == pytest.approx(3 / 4)  # as without it
    assert row["volume_auroc"] == pytest.approx(5 / 6)  # its label is known
    assert summary.subject_row(unknown)["dice_healthy_fpr"] == ""
    assert np.isnan(summary.metrics([unknown], num_samples=10)["slice_auroc"])


def test_fault_D11_volumes_with_neither_lesion_nor_finding_are_counted() -> None:
    results = [*_four(), _result(5, [0.1], [0], abnormal=False, dice=np.nan)]
    tables = summary.summarize({"model": results}, group_by="kind", num_samples=10)
    assert tables["counts"]["volumes with neither lesion nor finding (no Dice)"] == 1


def test_without_any_lesion_there_are_no_voxel_figures() -> None:
    healthy = [one for one in _four() if not one.abnormal]
    row = summary.metrics(healthy, num_samples=10)
    assert "ap_pooled" not in row
    assert np.isnan(row["volume_auroc"])
    assert report.table_rows({"m": row})[0][1] == "-"


def test_few_subjects_are_shown_one_by_one() -> None:
    tables = summary.summarize({"model": _four()}, group_by="kind", num_samples=10)
    assert tables["cases"] == {"sub-0": {"model": 1.0}, "sub-1": {"model": 0.5}}
    many = {"model": [_result(n, [2.0, 1.0], [1, 0]) for n in range(5)]}
    assert not summary.summarize(many, group_by="kind", num_samples=10)["cases"]


def test_groups_keep_the_healthy_volumes() -> None:
    results = _four()
    results[1] = dataclasses.replace(
        results[1], info=dataclasses.replace(results[1].info, extra={"kind": "stroke"})
    )
    tables = summary.summarize({"model": results}, group_by="kind", num_samples=10)
    assert set(tables["groups"]) == {"ms", "stroke"}
    assert tables["groups"]["ms"]["model"]["num_volumes"] == 3
    assert tables["groups"]["stroke"]["model"]["ap_pooled"] == pytest.approx(0.5)


def test_healthy_scans_alone_have_no_ranking() -> None:
    healthy = [_result(n, [1.0, 2.0], [0, 0], abnormal=False) for n in range(3)]
    found = {"model": healthy, "raw": healthy}
    tables = summary.summarize(found, group_by="kind", num_samples=10)
    assert tables["verdict"].startswith("No annotated lesions")


def test_verdict_needs_twenty_subjects_to_say_beats() -> None:
    good = [_result(n, [3.0, 2.0, 1.0], [1, 0, 0]) for n in range(20)]
    poor = [_result(n, [1.0, 2.0, 3.0], [1, 0, 0]) for n in range(20)]

    def verdict(count: int) -> str:
        found = {"model": good[:count], "raw": poor[:count]}
        return summary.summarize(found, group_by="kind", num_samples=50)["verdict"]

    assert "beats the baselines" in verdict(20)
    assert verdict(19).endswith(
        "is above this baseline; fewer than 20 subjects allow no stronger statement."
    )
    assert "no ranking" in verdict(4)
    swapped = summary.summarize(
        {"model": poor, "raw": good}, group_by="kind", num_samples=50
    )
    assert "worse than this baseline" in swapped["verdict"]


def test_training_state_marks_a_short_falling_run_as_undertrained() -> None:
    config = smoke.get_config()
    config.batch_size, config.reference_slices = 10, 10_000
    lines = [
        {
            "step": step,
            "validation/loss": 200.0 - step,
            "perf/train_seconds": 0.1 * step,
        }
        for step in range(10, 101, 10)
    ]
    state = summary.training_state(config, 100, lines)
    assert state["slices_seen"] == 1000
    assert state["percent_of_reference"] == 10.0
    assert state["validation_slope"] == pytest.approx(-20 / 110)
    assert state["train_seconds"] == pytest.approx(10.0)
    assert state["undertrained"]
    config.reference_slices = 2000
    assert not summary.training_state(config, 100, lines)["undertrained"]


def test_training_state_ends_at_the_checkpoint() -> None:
    config = smoke.get_config()
    lines = [{"step": n, "validation/loss": float(n)} for n in (8, 9, 10, 11, 12)]
    assert summary.training_state(config, 10, lines)["validation_slope"] > 0
    assert summary.training_state(config, 7, lines)["validation_slope"] is None


def test_training_state_of_a_run_that_validates_rarely_is_not_passed_over() -> None:
    config = smoke.get_config()
    config.batch_size, config.reference_slices = 10, 100_000
    lines = [{"step": n, "validation/loss": 500.0 - n} for n in (100, 200, 300, 400)]
    state = summary.training_state(config, 400, lines)  # one value in the last fifth
    assert state["validation_slope"] == pytest.approx(-100 / 150)
    assert state["undertrained"]
    assert summary.training_state(config, 400, [])["undertrained"]
    rising = [{"step": n, "validation/loss": float(n)} for n in (100, 200)]
    assert not summary.training_state(config, 200, rising)["undertrained"]


def test_shown_subjects_are_ordered_by_ap_or_else_by_score() -> None:
    third = _result(9, [3.0, 2.0, 1.0], [0, 0, 1])

    def shown(results: list[VolumeResult]) -> dict[str, str]:
        chosen = summary.shown_subjects(results)
        return {caption.split(":")[0]: caption.split("\n")[1] for caption in chosen}

    assert shown([third, *_four()]) == {
        "best": "AP 1.00",
        "median": "AP 0.50",
        "worst": "AP 0.33",
    }
    assert set(shown(_four())) == {"best", "worst"}
    assert set(shown([third])) == {"only"}
    healthy = [*_four()[2:], _result(7, [0.0], [0], abnormal=False)]
    assert shown(healthy) == {
        "highest": "score 3.5",
        "median": "score 1",
        "lowest": "score 0",
    }


def test_subject_rows_have_one_set_of_columns() -> None:
    rows = [summary.subject_row(one) for one in _four()]
    assert len({tuple(row) for row in rows}) == 1
    assert rows[0]["ap"] == 1.0
    assert rows[2]["ap"] == ""


def test_text_table_aligns_columns() -> None:
    text = report.text_table(["", "AP"], [["model", "0.5"], ["raw intensity", "0.125"]])
    lines = text.splitlines()
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[2].endswith("0.5")


def test_config_of_the_smoke_run_is_valid() -> None:
    config_lib.validate(smoke.get_config())
