"""Paired tests are right, and say no more than the patients allow."""

import dataclasses
import itertools
import math
import pathlib
from typing import Any

import numpy as np
import pytest

from tests.fake_runs import fake_run
from tests.test_summary import result
from uad_jax import entries, pairs, verdict
from uad_jax.entries import Entry
from uad_jax.measuring import VolumeResult

SIX = [0.40, 0.50, 0.30, 0.70, 0.20, 0.60]
BETTER = [0.55, 0.58, 0.33, 0.69, 0.31, 0.72]


def named(values: list[float]) -> dict[str, float]:
    return {f"s{number:02d}": value for number, value in enumerate(values)}


def read(tmp_path: pathlib.Path, **runs: dict[str, Any]) -> list[Entry]:
    folders = []
    for name, options in runs.items():
        options = {"learning_rate": len(folders), **options}
        folders.append(fake_run(tmp_path / name, **options))
    return entries.read(folders)


def ap_tests(
    found: list[Entry], num_rounds: int = 10_000, metric: str = "ap"
) -> list[dict[str, Any]]:
    sides = {entry.name: [entry] for entry in found}
    tests = pairs.compare_all(sides, num_samples=200, num_rounds=num_rounds)
    return [test for test in tests if test["metric"] == metric]


def exhaustive(first: list[float], second: list[float]) -> float:
    """Two-sided p by trying every assignment of signs, one after the other."""
    differences = np.subtract(first, second)
    observed = abs(differences.sum())
    sums = [
        abs(float(np.dot(signs, differences)))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    return sum(one >= observed - 1e-12 for one in sums) / len(sums)


def test_p_equals_trying_every_sign(tmp_path: pathlib.Path) -> None:
    found = read(tmp_path, one={"ap": named(BETTER)}, two={"ap": named(SIX)})
    (test,) = ap_tests(found)
    assert test["p"] == pytest.approx(exhaustive(BETTER, SIX))
    assert test["p"] == pytest.approx(4 / 64)  # all but one differ in one direction
    assert test["difference"] == pytest.approx(np.mean(BETTER) - np.mean(SIX))
    assert test["num_patients"] == 6
    assert (test["first"], test["second"]) == ("one", "two")


def test_signs_are_flipped_per_patient(tmp_path: pathlib.Path) -> None:
    patients = {f"s{number:02d}": f"p{number // 2}" for number in range(12)}
    first = [x + y for x in BETTER for y in (-0.05, 0.05)]
    second = [x + y for x in SIX for y in (0.1, -0.1)]
    found = read(
        tmp_path,
        one={"ap": named(first), "patients": patients},
        two={"ap": named(second), "patients": patients},
    )
    (test,) = ap_tests(found)
    assert test["num_patients"] == 6
    assert test["p"] == pytest.approx(exhaustive(BETTER, SIX))
    assert pairs.volume_values(found[:1], "ap").patients == patients


def unequal() -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """One patient has 15 of 20 volumes; there the first is better, elsewhere worse."""
    rng = np.random.default_rng(0)
    patients = {f"sub-{n}": "big" if n < 15 else f"p{n}" for n in range(20)}
    second = {name: float(rng.uniform(0.3, 0.5)) for name in patients}
    first = {
        name: second[name] + (0.1 if patient == "big" else -0.1) + 0.01 * rng.normal()
        for name, patient in patients.items()
    }
    return first, second, patients


def in_a_report(
    values: dict[str, float], patients: dict[str, str]
) -> list[VolumeResult]:
    found = [result(n, [2.0, 1.0], [1, 0]) for n in range(len(values))]
    return [
        dataclasses.replace(
            one,
            ap=values[one.info.subject],
            info=dataclasses.replace(one.info, patient=patients[one.info.subject]),
        )
        for one in found
    ]


def test_report_and_comparison_answer_alike_with_unequal_patients(
    tmp_path: pathlib.Path,
) -> None:
    first, second, patients = unequal()
    reported = verdict.compare(
        {"m": in_a_report(first, patients), "raw": in_a_report(second, patients)}, 200
    )
    options = {"patients": patients}
    found = read(
        tmp_path,
        one={"ap": first, "baselines": {"raw": second}, **options},
        two={"ap": second, **options},
    )
    (test,) = ap_tests(found)
    above = pairs.against_baselines(found[:1], {"raw": second}, 200)
    difference = reported["ap_volume_mean_difference"]
    assert difference == pytest.approx(
        np.mean(list(first.values())) - np.mean(list(second.values()))
    )
    assert difference > 0.04  # the mean over patients is below 0
    for one in (above, test):
        assert one["difference"] == pytest.approx(difference)
        assert one["interval"] == pytest.approx(reported["interval"])
        assert one["interval"][0] <= one["difference"] <= one["interval"][1]
        assert one["num_patients"] == 6
    assert test["first_mean"] - test["second_mean"] == pytest.approx(difference)
    sums = {name: 0.0 for name in patients.values()}
    for name, patient in patients.items():
        sums[patient] += first[name] - second[name]
    assert test["p"] == pytest.approx(exhaustive(list(sums.values()), [0.0] * 6))


def test_dice_is_tested_at_each_run_s_own_rule(tmp_path: pathlib.Path) -> None:
    found = read(
        tmp_path,
        one={"ap": named(SIX), "dice": named(BETTER), "rule": "validated"},
        two={"ap": named(SIX), "dice": named(SIX)},
    )
    (test,) = ap_tests(found, metric="dice")
    assert test["p"] == pytest.approx(exhaustive(BETTER, SIX))
    assert "operating rules differ" in test["notes"]
    assert ap_tests(found)[0]["verdict"] == "equal"


def test_reconstruction_is_tested_on_healthy_patients_and_less_is_better(
    tmp_path: pathlib.Path,
) -> None:
    rng = np.random.default_rng(3)
    good = rng.uniform(0.1, 0.2, 24).tolist()
    bad = [error + 0.05 + 0.01 * rng.normal() for error in good]
    healthy = [{f"h{n}": value for n, value in enumerate(x)} for x in (good, bad)]
    found = read(
        tmp_path,
        one={"ap": named(SIX), "healthy": healthy[0]},
        two={"ap": named(SIX), "healthy": healthy[1]},
    )
    (test,) = ap_tests(found, metric="l1")
    assert test["num_patients"] == 24
    assert test["difference"] == pytest.approx(np.mean(good) - np.mean(bad))
    assert test["verdict"] == "beats"
    assert [t["verdict"] for t in ap_tests(found[::-1], metric="l1")] == [
        "is beaten by"
    ]
    assert not ap_tests(found, metric="ssim")  # these runs have none


def test_reconstructions_of_few_patients_are_better_or_worse(
    tmp_path: pathlib.Path,
) -> None:
    healthy = [{f"h{n}": 0.1 * (n + k) for n in range(6)} for k in (1, 2)]
    found = read(
        tmp_path,
        one={"ap": named(SIX), "healthy": healthy[0]},
        two={"ap": named(SIX), "healthy": healthy[1]},
        bad={"ap": named(SIX), "healthy": {**healthy[1], "h0": math.nan}},
        restored={"ap": named(SIX), "healthy": healthy[0]},
    )
    for chosen, said in ((found[:2], "better than"), (found[1::-1], "worse than")):
        (test,) = ap_tests(chosen, metric="l1")
        assert test["verdict"] == said
    assert not ap_tests([found[0], found[2]], metric="l1")  # one of them has none
    assert ap_tests([found[0], found[2]])  # nothing else is lost
    found[3].results["run"]["config"]["method"]["score"] = {"kind": "restoration"}
    assert not ap_tests([found[0], found[3]], metric="l1")  # it began with the image


def test_holm_corrects_over_the_pairs_of_one_figure(tmp_path: pathlib.Path) -> None:
    third = [x - 0.01 * i for i, x in enumerate(SIX)]
    found = read(
        tmp_path,
        one={"ap": named(BETTER)},
        two={"ap": named(SIX)},
        three={"ap": named(third)},
    )
    tests = ap_tests(found)
    p = sorted(test["p"] for test in tests)
    expected = np.minimum(np.maximum.accumulate(np.multiply(p, [3, 2, 1])), 1.0)
    assert sorted(test["p_holm"] for test in tests) == pytest.approx(list(expected))
    assert [(test["first"], test["second"]) for test in tests] == [
        ("one", "two"),
        ("one", "three"),
        ("two", "three"),
    ]


def many(count: int) -> tuple[dict[str, float], dict[str, float]]:
    """Values of two runs, the first clearly better on nearly every subject."""
    rng = np.random.default_rng(count)
    low = rng.uniform(0.2, 0.5, count)
    return named(list(low + rng.uniform(0.02, 0.2, count))), named(list(low))


@pytest.mark.parametrize(
    ("count", "verdicts"),
    [
        (4, ("single cases, no ranking", "single cases, no ranking")),
        (5, ("above", "below")),
        (19, ("above", "below")),
        (20, ("beats", "is beaten by")),
    ],
)
def test_verdicts_are_as_strong_as_the_patients_are_many(
    count: int, verdicts: tuple[str, str], tmp_path: pathlib.Path
) -> None:
    better, worse = many(count)
    found = read(tmp_path, one={"ap": better}, two={"ap": worse})
    assert (ap_tests(found)[0]["verdict"], ap_tests(found[::-1])[0]["verdict"]) == (
        verdicts
    )


def test_cases_stand_alone_below_five_patients(tmp_path: pathlib.Path) -> None:
    better, worse = many(4)
    found = read(tmp_path, one={"ap": better}, two={"ap": worse})
    (test,) = ap_tests(found)
    assert [test[k] for k in ("p", "p_holm", "interval", "difference")] == [None] * 4
    table = pairs.cases(found)
    assert table["ap"]["s02"] == {"one": better["s02"], "two": worse["s02"]}
    better, worse = many(5)
    found = read(tmp_path / "more", one={"ap": better}, two={"ap": worse})
    assert pairs.cases(found) == {}


def test_a_difference_that_may_be_chance_beats_nothing(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, 24)
    first, second = named(list(0.5 + noise)), named([0.5 + noise.mean() - 0.001] * 24)
    found = read(tmp_path, one={"ap": first}, two={"ap": second})
    assert ap_tests(found)[0]["verdict"] == "no difference shown"


def test_unequal_training_is_said(tmp_path: pathlib.Path) -> None:
    found = read(
        tmp_path,
        one={"ap": named(SIX), "slices": 1000},
        close={"ap": named(SIX), "slices": 1009},
        far={"ap": named(SIX), "slices": 1011, "undertrained": True},
        maps={"ap": named(SIX), "slices": None},
    )
    notes = {(t["first"], t["second"]): t["notes"] for t in ap_tests(found)}
    assert notes["one", "close"] == []
    assert notes["one", "far"] == [
        "slices seen differ (1000 to 1011)",
        "undertrained: no claim about the method",
    ]
    assert notes["one", "maps"] == []


def test_runs_that_differ_in_seed_or_fold_are_one_group(
    tmp_path: pathlib.Path,
) -> None:
    ap = named(SIX)
    found = read(
        tmp_path,
        a0={"ap": ap, "seed": 0, "learning_rate": 1},
        a1={"ap": ap, "seed": 1, "learning_rate": 1},
        a2={"ap": ap, "seed": 1, "fold": 1, "learning_rate": 1},
        again={"ap": ap, "seed": 1, "learning_rate": 1},
        other={"ap": ap, "seed": 0, "learning_rate": 2},
        maps={"ap": ap, "slices": None, "learning_rate": 1},
        more_maps={"ap": ap, "slices": None, "learning_rate": 1},
    )
    grouped = {
        label: [entry.name for entry in members]
        for label, members in pairs.groups(found).items()
    }
    assert grouped == {
        "ae (3 runs)": ["a0", "a1", "a2"],
        "again": ["again"],
        "other": ["other"],
        "maps": ["maps"],
        "more_maps": ["more_maps"],
    }


def test_runs_from_the_pretraining_of_their_seed_are_one_group(
    tmp_path: pathlib.Path,
) -> None:
    options = {
        name: {"ap": named(SIX), "seed": seed, "learning_rate": 1}
        for name, seed in (("a0", 0), ("a1", 1), ("b1", 1))
    }
    found = read(tmp_path, **options)
    origins = ("runs/spark-0", "runs/spark-1/", "runs/other-1")
    for entry, origin in zip(found, origins, strict=True):
        config = entry.results["run"]["config"]
        start = {
            "workdir": origin,
            "step": -1,
            "source_prefix": "",
            "target_prefix": "",
        }
        config["train"] = {**config.get("train", {}), "warm_start": [start]}
    grouped = pairs.groups(found)
    assert [[one.name for one in members] for members in grouped.values()] == [
        ["a0", "a1"],
        ["b1"],
    ]


def test_two_groups_of_one_method_have_names_of_their_own(
    tmp_path: pathlib.Path,
) -> None:
    found = read(
        tmp_path,
        **{
            f"r{rate}s{seed}": {"ap": named(SIX), "seed": seed, "learning_rate": rate}
            for rate in (1, 2)
            for seed in (0, 1)
        },
    )
    assert list(pairs.groups(found)) == ["ae (2 runs)", "r2s0, r2s1"]


def test_a_group_is_tested_on_the_mean_over_its_members(
    tmp_path: pathlib.Path,
) -> None:
    low = [x - 0.1 for x in BETTER]
    high = [x + 0.1 for x in BETTER]
    found = read(
        tmp_path,
        a={"ap": named(low), "seed": 0, "learning_rate": 1},
        b={"ap": named(high), "seed": 1, "learning_rate": 1},
        c={"ap": named(SIX), "learning_rate": 2},
    )
    tests = pairs.compare_all(pairs.groups(found), num_samples=50, num_rounds=10_000)
    test = next(test for test in tests if test["metric"] == "ap")
    assert test["first"] == "ae (2 runs)"
    assert test["p"] == pytest.approx(exhaustive(BETTER, SIX))
    assert test["first_mean"] == pytest.approx(np.mean(BETTER))


def test_the_baseline_with_the_highest_ap_is_the_one_to_beat(
    tmp_path: pathlib.Path,
) -> None:
    (entry, _) = read(tmp_path, one={"ap": named(BETTER)}, two={"ap": named(SIX)})
    baselines = {"low": named([0.1] * 6), "high": named([0.2] * 6)}
    above = pairs.against_baselines([entry], baselines, 100)
    assert above["baseline"] == "high"
    assert above["difference"] == pytest.approx(np.mean(BETTER) - 0.2)
    assert above["interval"][0] > 0
    assert pairs.against_baselines([entry], {}, 100) == {}


@pytest.mark.parametrize(
    ("count", "seeds", "undertrained", "words"),
    [
        (20, 3, False, "2 of 3 runs above the best baseline (interval > 0): beats"),
        (20, 2, False, "1 of 2 runs above the best baseline (interval > 0); fewer"),
        (19, 3, False, "19 patients are too few"),
        (20, 3, True, "undertrained: no claim"),
    ],
)
def test_a_claim_needs_patients_seeds_and_training(
    count: int, seeds: int, undertrained: bool, words: str, tmp_path: pathlib.Path
) -> None:
    better, worse = many(count)
    options = {"learning_rate": 1, "undertrained": undertrained}
    found = read(
        tmp_path,
        **{
            f"s{seed}": {"ap": worse if seed == 0 else better, "seed": seed, **options}
            for seed in range(seeds)
        },
    )
    above = [pairs.against_baselines([e], {"raw": worse}, 100) for e in found]
    assert words in pairs.claim(found, above)


def test_a_value_that_only_one_member_has_is_refused(tmp_path: pathlib.Path) -> None:
    found = read(tmp_path, a={"ap": named(SIX)}, b={"ap": named(SIX)})
    rows = found[1].rows["ae"]
    rows["s01"]["ap"] = ""
    with pytest.raises(entries.CompareError, match="s01: only some of a, b"):
        pairs.volume_values(found, "ap")


def test_no_lesions_no_tests(tmp_path: pathlib.Path) -> None:
    options: dict[str, Any] = {"ap": {}, "dice": {"x": math.nan}, "healthy": ["x", "y"]}
    found = read(tmp_path, a=options, b=options)
    assert (
        pairs.compare_all(
            {entry.name: [entry] for entry in found}, num_samples=10, num_rounds=10
        )
        == []
    )
