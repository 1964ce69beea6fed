"""Tables from results of single volumes, against hand values."""

import dataclasses
import math

import numpy as np
import pytest

from tests import fresh
from tests.test_scoring import _info
from uad_jax import summary, verdict
from uad_jax.measuring import Found, VolumeResult
from uad_jax.metrics import accumulators, lesionwise, voxel
from uad_jax.scoring import Stage

RULE = "healthy_fpr"
EDGES = np.arange(0.05, 10, 0.1, dtype=np.float32)


def _mean_where(scores: list[float], lesion: list[int], wanted: int) -> float:
    chosen = [s for s, one in zip(scores, lesion, strict=True) if one == wanted]
    return float(np.mean(chosen)) if chosen else math.nan


def result(
    uid: int,
    scores: list[float],
    lesion: list[int],
    *,
    abnormal: bool = True,
    annotated: bool = True,
    kind: str = "ms",
    found: tuple[int, int, int] = (1, 1, 1),
    volume_score: float = 0.0,
    **info: object,
) -> VolumeResult:
    """A volume of a few voxels; `found` is tp, fp and fn at the operating rule."""
    voxels = voxel.VoxelScores(
        np.array(scores, np.float32), np.array(lesion, bool), 0, 0
    )
    counted = abnormal and annotated and any(lesion)
    ranking = voxel.rank(voxels)
    tp, fp, fn = found
    lesions = lesionwise.LesionCounts(
        sizes_ml=np.array([0.05, 2.0]),
        found=np.array([tp > 0, False]),
        false_components=fp,
        num_components=tp + fp,
    )
    bins, outside = accumulators.histogram(voxels, EDGES)
    extra = {"kind": kind} | info.pop("extra", {})
    return VolumeResult(
        info=dataclasses.replace(
            _info(uid),
            **{"label": "abnormal" if abnormal else "healthy", "extra": extra} | info,
        ),
        annotated=annotated,
        abnormal=abnormal,
        lesion_voxels=sum(lesion),
        outside_lesion=0,
        voxels=voxels,
        bins=bins,
        outside=outside,
        ap=voxel.average_precision(ranking) if counted else math.nan,
        auroc=voxel.auroc(ranking) if counted else math.nan,
        dice_ceiling=voxel.best_dice(ranking)[0] if counted else math.nan,
        mean_inside=_mean_where(scores, lesion, 1),
        mean_elsewhere=_mean_where(scores, lesion, 0),
        slice_score=np.array([volume_score], np.float32),
        slice_lesion=np.array([abnormal]),
        volume_score=volume_score,
        found={RULE: Found(voxel.Confusion(tp, fp, 10, fn), lesions)},
        reconstruction={"l1_brain": 0.1, "l1_box": 0.02, "ssim": 0.9, "psnr": 20.0},
    )


def summarize(found: dict, **options: object) -> dict:
    """The tables of processed maps."""
    given = {"group_by": "kind", "num_samples": 10, "rule": RULE} | options
    return summary.summarize({Stage.PROCESSED: found}, **given)


def _four() -> list[VolumeResult]:
    return [
        result(0, [3.0, 2.0, 1.0], [1, 0, 0], volume_score=4.0),
        result(1, [9.0, 8.0, 7.0], [0, 1, 0], volume_score=3.0, found=(1, 2, 1)),
        result(2, [0.1, 0.2, 0.3], [0, 0, 0], abnormal=False, volume_score=1.0),
        result(3, [0.1, 0.2, 0.3], [0, 0, 0], abnormal=False, volume_score=3.5),
    ]


def test_contrast_is_of_lesion_against_the_rest_of_each_volume() -> None:
    row = summary.metrics(_four(), RULE)
    contrasts = [3.0 / 1.5, 8.0 / 8.0]
    assert row["lesion_contrast_volume_mean"] == pytest.approx(np.mean(contrasts))
    alone = result(4, [1.0, 0.0], [1, 0])  # nothing to divide by
    row = summary.metrics([*_four(), alone], RULE)
    assert row["lesion_contrast_volume_mean"] == pytest.approx(np.mean(contrasts))
    assert summary.subject_row(alone)["lesion_contrast"] == ""
    assert summary.subject_row(_four()[0])["lesion_contrast"] == pytest.approx(2.0)
    assert "lesion_contrast_volume_mean" not in summary.metrics([alone], RULE)
    constant = result(5, [0.0, 0.0], [1, 0])
    assert summary.subject_row(constant)["lesion_contrast"] == 1.0


def test_pooled_and_mean_figures_differ_and_are_right() -> None:
    row = summary.metrics(_four(), RULE, num_samples=10)
    # Per volume: lesion ranks 1st of 3 (AP 1) and 2nd of 3 (AP 1/2).
    assert row["ap_volume_mean"] == pytest.approx(0.75)
    # Pooled over 6 voxels: lesions rank 2nd and 4th: (1/2 + 2/4) / 2.
    assert row["ap_pooled"] == pytest.approx(0.5)
    assert row["dice_healthy_fpr_volume_mean"] == pytest.approx((1 / 2 + 2 / 5) / 2)
    assert row["dice_healthy_fpr_pooled"] == pytest.approx(4 / 9)
    assert row["precision_healthy_fpr_pooled"] == pytest.approx(2 / 5)
    assert row["recall_healthy_fpr_pooled"] == pytest.approx(2 / 4)
    assert row["volume_auroc"] == pytest.approx(3 / 4)
    assert row["slice_auroc"] == pytest.approx(3 / 4)
    millilitres = _info(0).geometry
    edge = abs(
        np.linalg.det((millilitres.native_affine @ millilitres.grid_to_native)[:3, :3])
    )
    expected = 2 * edge / 1000  # one true and one false voxel each
    assert row["false_positive_ml_healthy_fpr_healthy_mean"] == pytest.approx(expected)
    assert row["false_components_healthy_fpr_healthy_mean"] == 2
    assert "ap_volume_mean_interval" not in row  # fewer than 5 subjects


def test_fault_D1_volumes_without_truth_are_counted_not_scored() -> None:
    results = [*_four(), result(4, [5.0], [0], annotated=False)]
    results.append(result(5, [5.0], [0]))  # annotated, but the mask is empty
    tables = summarize({"model": results})
    assert tables["scorers"]["model"]["num_lesion"] == 2
    assert tables["counts"]["volumes without annotation"] == 1
    assert tables["counts"]["abnormal volumes with an empty mask"] == 1


def test_slices_without_annotation_are_not_taken_for_healthy_ones() -> None:
    unknown = result(4, [9.0], [0], annotated=False, volume_score=9.0)
    unknown = dataclasses.replace(unknown, slice_lesion=np.array([False]))
    row = summary.metrics([*_four(), unknown], RULE, num_samples=10)
    assert row["slice_auroc"] == pytest.approx(3 / 4)  # as without it
    assert row["volume_auroc"] == pytest.approx(5 / 6)  # its label is known
    assert summary.subject_row(unknown)["dice_healthy_fpr"] == ""
    assert "slice_auroc" not in summary.metrics([unknown], RULE, num_samples=10)


def test_fault_D11_volumes_with_neither_lesion_nor_finding_are_counted() -> None:
    results = [*_four(), result(5, [0.1], [0], abnormal=False, found=(0, 0, 0))]
    tables = summarize({"model": results})
    assert tables["counts"]["volumes with neither lesion nor finding (no Dice)"] == 1


def test_without_any_lesion_there_are_no_voxel_figures() -> None:
    healthy = [one for one in _four() if not one.abnormal]
    row = summary.metrics(healthy, RULE, num_samples=10)
    assert "ap_pooled" not in row
    assert "volume_auroc" not in row
    assert "lesion_precision_healthy_fpr" not in row


def test_what_the_data_do_not_define_is_absent() -> None:
    silent = [
        dataclasses.replace(
            result(n, [2.0, 1.0], [1, 0]),
            found={
                RULE: Found(
                    voxel.Confusion(0, 0, 10, 1),
                    lesionwise.LesionCounts(np.array([0.1]), np.array([False]), 0, 0),
                )
            },
            slice_lesion=np.array([True]),
            reconstruction={"l1_brain": 0.1, "psnr": math.nan},
        )
        for n in range(6)
    ]
    row = summary.metrics(silent, RULE, num_samples=10)
    assert row["lesion_recall_healthy_fpr"] == 0  # defined, and 0
    for name in (
        "precision_healthy_fpr_pooled",
        "lesion_precision_healthy_fpr",
        "slice_auroc",
        "volume_auroc",
        "volume_auroc_interval",
    ):
        assert name not in row, name
    assert not any(isinstance(v, float) and math.isnan(v) for v in row.values())
    healthy = result(9, [1.0], [0], abnormal=False)
    healthy = dataclasses.replace(healthy, reconstruction=silent[0].reconstruction)
    tables = summarize({"model": [*silent, healthy]})
    assert tables["healthy_reconstruction"] == {"l1_brain": 0.1}


def test_few_subjects_are_shown_one_by_one() -> None:
    tables = summarize({"model": _four()})
    assert tables["cases"] == {"sub-0": {"model": 1.0}, "sub-1": {"model": 0.5}}
    many = {"model": [result(n, [2.0, 1.0], [1, 0]) for n in range(5)]}
    assert not summarize(many)["cases"]


def test_groups_keep_the_healthy_volumes() -> None:
    results = _four()
    results[1] = dataclasses.replace(
        results[1], info=dataclasses.replace(results[1].info, extra={"kind": "stroke"})
    )
    tables = summarize({"model": results})
    assert set(tables["groups"]) == {"ms", "stroke"}
    assert tables["groups"]["ms"]["model"]["num_volumes"] == 3
    assert tables["groups"]["stroke"]["model"]["ap_pooled"] == pytest.approx(0.5)


def test_healthy_scans_alone_have_no_ranking() -> None:
    healthy = [result(n, [1.0, 2.0], [0, 0], abnormal=False) for n in range(3)]
    found = {"model": healthy, "raw": healthy}
    tables = summarize(found)
    assert tables["verdict"].startswith("No annotated lesions")


def test_verdict_needs_twenty_subjects_to_say_beats() -> None:
    good = [result(n, [3.0, 2.0, 1.0], [1, 0, 0]) for n in range(20)]
    poor = [result(n, [1.0, 2.0, 3.0], [1, 0, 0]) for n in range(20)]

    def words(count: int) -> str:
        found = {"model": good[:count], "raw": poor[:count]}
        return summarize(found, num_samples=50)["verdict"]

    assert "beats the baselines" in words(20)
    assert words(19).endswith(
        "is above this baseline; fewer than 20 patients allow no stronger statement."
    )
    assert "no ranking" in words(4)
    swapped = summarize({"model": poor, "raw": good}, num_samples=50)
    assert "worse than this baseline" in swapped["verdict"]


def test_a_missing_baseline_weakens_the_verdict() -> None:
    found = {
        "model": [result(n, [3.0, 2.0, 1.0], [1, 0, 0]) for n in range(20)],
        "raw": [result(n, [1.0, 2.0, 3.0], [1, 0, 0]) for n in range(20)],
    }
    missing = {"atlas-z": "fewer than 2 healthy training scans"}
    text = summarize(found, num_samples=50, missing_baselines=missing)["verdict"]
    assert text.endswith(
        "In this run the model beats the baselines that could be computed (one seed); "
        "atlas-z is missing: fewer than 2 healthy training scans."
    )
    assert verdict.with_missing(text, missing) == text  # said once
    assert verdict.with_missing("No annotated lesions.", missing) == (
        "No annotated lesions."
    )
    whole = summarize(found, num_samples=50, missing_baselines={})["verdict"]
    assert whole.endswith("beats the baselines (one seed).")
    late = summarize(
        found, num_samples=50, missing_baselines=missing, undertrained=True
    )["verdict"]
    assert late.endswith("It is undertrained, so this says nothing about the method.")


def test_subject_rows_have_one_set_of_columns() -> None:
    rows = [summary.subject_row(one) for one in _four()]
    assert len({tuple(row) for row in rows}) == 1
    assert rows[0]["ap"] == 1.0
    assert rows[2]["ap"] == ""


def test_volumes_of_one_patient_count_as_one() -> None:
    good = [
        result(n, [3.0, 2.0, 1.0], [1, 0, 0], patient=f"p{n % 4}") for n in range(20)
    ]
    poor = [
        result(n, [1.0, 2.0, 3.0], [1, 0, 0], patient=f"p{n % 4}") for n in range(20)
    ]
    tables = summarize({"model": good, "raw": poor})
    assert tables["verdict"].startswith("4 patients with annotated lesions")
    assert set(tables["cases"]) == {f"sub-{n}" for n in range(20)}
    assert "ap_volume_mean_interval" not in tables["scorers"]["model"]
    five = [
        dataclasses.replace(
            one, info=dataclasses.replace(one.info, patient=f"p{n % 5}")
        )
        for n, one in enumerate(good)
    ]
    assert "ap_volume_mean_interval" in summarize({"model": five})["scorers"]["model"]


def test_intervals_hold_their_estimates_and_resample_patients() -> None:
    rng = fresh.rng()
    volumes = [
        result(n, list(rng.random(40)), [1] * 8 + [0] * 32, patient=f"p{n // 2}")
        for n in range(16)
    ]
    row = summary.metrics(volumes, RULE, num_samples=300)
    for name in ("ap_volume_mean", "ap_pooled", "dice_healthy_fpr_volume_mean"):
        low, high = row[f"{name}_interval"]
        assert low <= row[name] + 0.02
        assert row[name] - 0.02 <= high
    doubled = summary.metrics(
        [
            *volumes,
            *(
                dataclasses.replace(
                    one,
                    info=dataclasses.replace(one.info, subject=f"{one.info.subject}b"),
                )
                for one in volumes
            ),
        ],
        RULE,
        num_samples=300,
    )
    # Twice the volumes of the same patients say nothing more about patients.
    assert doubled["ap_volume_mean_interval"] == pytest.approx(
        row["ap_volume_mean_interval"]
    )
    assert doubled["ap_pooled_interval"] == pytest.approx(row["ap_pooled_interval"])


def _scanned(num_abnormal: int, num_healthy: int) -> list[VolumeResult]:
    """Two volumes of each patient, abnormal or healthy."""
    rng = np.random.default_rng(0)
    kinds = [True] * num_abnormal + [False] * num_healthy
    return [
        result(
            2 * n + i,
            list(rng.random(9)),
            [int(abnormal), *[0] * 8],
            abnormal=abnormal,
            patient=f"p{n:02d}",
            volume_score=float(rng.random() + 0.5 * abnormal),
            found=(int(rng.integers(2)) * abnormal, int(rng.integers(1, 9)), 1),
        )
        for n, abnormal in enumerate(kinds)
        for i in range(2)
    ]


SURE = (
    "volume_auroc",
    "slice_auroc",
    "ap_pooled",
    "auroc_pooled",
    "lesion_recall_healthy_fpr",
    "false_positive_ml_healthy_fpr_healthy_mean",
)


def test_figures_of_scans_and_lesions_have_intervals_and_say_of_how_many() -> None:
    row = summary.metrics(_scanned(8, 6), RULE, num_samples=200)
    for name in SURE:
        low, high = row[f"{name}_interval"]
        assert low <= row[name] <= high, name
        assert low < high, name
    counts = row["interval_patients"]
    assert counts["volume_auroc"] == counts["slice_auroc"] == 14
    assert counts["lesion_recall_healthy_fpr"] == counts["auroc_pooled"] == 8
    assert counts["false_positive_ml_healthy_fpr_healthy_mean"] == 6
    doubled = [
        *_scanned(8, 6),
        *(
            dataclasses.replace(
                one, info=dataclasses.replace(one.info, subject=f"{one.info.subject}b")
            )
            for one in _scanned(8, 6)
        ),
    ]
    again = summary.metrics(doubled, RULE, num_samples=200)
    for name in SURE:  # the same patients say nothing more
        assert again[f"{name}_interval"] == pytest.approx(row[f"{name}_interval"])


def test_fewer_than_five_patients_of_either_kind_have_no_interval() -> None:
    few = summary.metrics(_scanned(8, 4), RULE, num_samples=50)
    assert "volume_auroc" in few
    assert "volume_auroc_interval" not in few
    assert "false_positive_ml_healthy_fpr_healthy_mean_interval" not in few
    assert "lesion_recall_healthy_fpr_interval" in few
    few = summary.metrics(_scanned(4, 8), RULE, num_samples=50)
    assert not {f"{name}_interval" for name in SURE[:5]} & few.keys()
    assert few["interval_patients"] == {"false_positive_ml_healthy_fpr_healthy_mean": 8}
    assert "interval_patients" not in summary.metrics(_scanned(8, 6), RULE)


def test_the_reach_of_a_perfect_map_is_stated() -> None:
    volumes = [
        dataclasses.replace(one, lesion_voxels=n, outside_lesion=lost)
        for one, n, lost in zip(_four(), (10, 30, 0, 0), (4, 6, 0, 0), strict=True)
    ]
    row = summary.metrics(volumes, RULE)
    assert row["out_of_reach_percent_pooled"] == pytest.approx(25)
    # 30 of 40 voxels found, nothing else: 2 * 30 / (30 + 40).
    assert row["dice_reachable_pooled"] == pytest.approx(6 / 7)


def test_histograms_stand_in_for_voxels_that_are_not_kept() -> None:
    rng = fresh.rng()
    volumes = [
        result(n, list(np.round(rng.random(200) * 10, 1)), [1] * 20 + [0] * 180)
        for n in range(6)
    ]
    exact = summarize({"model": volumes})
    streamed = [dataclasses.replace(one, voxels=None) for one in volumes]
    counted = summarize({"model": streamed})
    assert (exact["pooled"], counted["pooled"]) == ("exact", "histogram")
    for name in (
        "ap_pooled",
        "auroc_pooled",
        "dice_ceiling_pooled",
        "prevalence_pooled",
    ):
        found = counted["scorers"]["model"][name]  # a bin per distinct score
        assert found == pytest.approx(exact["scorers"]["model"][name], abs=1e-9)


def test_strata_hold_each_volume_and_each_lesion_once() -> None:
    row = summary.metrics(_four(), RULE)
    (load,) = row["by_load"].values()  # both lesions are below 1 ml
    assert load["num_volumes"] == 2
    assert load["ap_volume_mean"] == pytest.approx(0.75)
    assert load["dice_volume_mean"] == pytest.approx(0.45)
    sizes = row["by_lesion_size"].values()
    assert sum(one["num_lesions"] for one in sizes) == 4
    assert {one["recall"] for one in sizes} == {0.0, 1.0}
    assert row["lesion_recall_healthy_fpr"] == 0.5
    assert row["lesion_precision_healthy_fpr"] == pytest.approx(2 / 5)


def _with_shams(scale: float) -> list[VolumeResult]:
    real = [result(n, [scale * n, 1.0], [1, 0], patient=f"p{n}") for n in range(6)]
    shams = [
        result(
            10 + n,
            [0.5 * scale * n, 1.0],
            [1, 0],
            abnormal=False,
            label="sham",
            patient=f"p{n}",
            extra={"sham_of": f"sub-{n}"},
        )
        for n in range(6)
    ]
    return [*real, *shams]


def test_shams_count_in_no_figure_but_their_own() -> None:
    volumes = _with_shams(2.0)
    tables = summarize({"model": volumes})
    alone = summarize({"model": volumes[:6]})
    for name in ("ap_pooled", "ap_volume_mean", "dice_healthy_fpr_pooled"):
        assert tables["scorers"]["model"][name] == alone["scorers"]["model"][name]
    assert tables["scorers"]["model"]["num_volumes"] == 6
    assert tables["healthy_reconstruction"] == {}
    row = tables["sham"]["model"]
    assert row["num_pairs"] == 6
    means = [2.0 * n for n in range(6)], [1.0 * n for n in range(6)]
    assert row["implant_mean"] == pytest.approx(np.mean(means[0]))
    assert row["sham_mean"] == pytest.approx(np.mean(means[1]))
    assert row["implant_minus_sham"] == pytest.approx(
        np.mean(means[0]) - np.mean(means[1])
    )
    assert row["interval"][0] <= row["implant_minus_sham"] <= row["interval"][1]
    assert alone["sham"] == {}


def test_without_thresholds_there_are_threshold_free_figures_only() -> None:
    volumes = [dataclasses.replace(one, found={}) for one in _four()]
    row = summarize({"model": volumes}, rule=None)["scorers"]["model"]
    assert row["ap_pooled"] == pytest.approx(0.5)
    assert not [name for name in row if name.startswith(("dice_healthy", "lesion_rec"))]


def test_percentile_is_the_share_of_healthy_scans_below() -> None:
    assert summary.percentile(2.5, [1.0, 2.0, 3.0, 4.0]) == 50.0
    assert summary.percentile(0.0, [1.0]) == 0.0
    assert summary.percentile(9.0, []) == ""
