"""A comparison of runs: its table, its files and its words."""

import copy
import csv
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests import stores
from tests.fake_runs import fake_run
from uad_jax import compare, compare_table, entries

AP = {"test-1": 0.40, "test-3": 0.50, "test-5": 0.30, "test-7": 0.70, "test-9": 0.20}
BETTER = {"test-1": 0.55, "test-3": 0.58, "test-5": 0.33, "test-7": 0.8, "test-9": 0.31}
BASELINES = {"raw": dict.fromkeys(AP, 0.1), "atlas-z": dict.fromkeys(AP, 0.25)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("compare")
    return stores.tiny_store(folder, {"train": 1, "test": 10})


def four(folder: pathlib.Path, store: pathlib.Path) -> list[pathlib.Path]:
    """Two seeds of one method, another method, and maps of another tool."""
    mask = np.zeros((6, 32, 32), bool)
    mask[2:4, 8:20, 8:20] = True
    by_step = [
        {
            "set": "test",
            "step": step,
            "train_seconds": step / 2,
            "ap_volume_mean": step / 200,
            "fingerprint": "f1" * 32,
        }
        for step in (50, 100)
    ]
    shared: dict[str, Any] = {
        "masks": dict.fromkeys(AP, mask),
        "store": str(store),
        "healthy": ["test-0", "test-2"],
        "losses": {50: 0.5, 100: 0.25},
    }
    vae = {**shared, "name": "vae", "learning_rate": 1, "baselines": BASELINES}
    return [
        fake_run(folder / "v0", BETTER, by_step=by_step, **vae),
        fake_run(folder / "v1", AP, seed=1, **vae),
        fake_run(
            folder / "ae",
            AP,
            **{**shared, "slices": 2000},
            undertrained=True,
            metrics={
                "dice_ceiling_pooled": 0.625,
                "lesion_recall_healthy_fpr": 0.75,
                "false_positive_ml_healthy_fpr_healthy_mean": 12.5,
            },
        ),
        fake_run(folder / "tool" / "maps", AP, **{**shared, "slices": None}),
    ]


@pytest.fixture(scope="module")
def compared(
    tmp_path_factory: pytest.TempPathFactory, store: pathlib.Path
) -> tuple[dict[str, Any], pathlib.Path]:
    folder = tmp_path_factory.mktemp("runs")
    result = compare.compare(four(folder, store), folder / "out", num_samples=100)
    return result, folder / "out"


def table(output: pathlib.Path) -> dict[str, dict[str, str]]:
    with (output / "compare.csv").open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def test_one_table_holds_runs_groups_and_each_baseline_once(
    compared: tuple[dict[str, Any], pathlib.Path],
) -> None:
    rows = table(compared[1])
    assert list(rows) == ["v0", "v1", "ae", "maps", "vae (2 runs)", "atlas-z", "raw"]
    assert [row["role"] for row in rows.values()] == [
        *["run"] * 3,
        "maps",
        "group",
        *["baseline"] * 2,
    ]
    assert float(rows["v0"]["ap_volume_mean"]) == pytest.approx(0.514)
    assert float(rows["ae"]["lesion_recall_healthy_fpr"]) == 0.75
    assert rows["maps"]["slices_seen"] == ""
    assert rows["ae"]["remark"] == "undertrained"
    assert float(rows["raw"]["ap_pooled"]) == pytest.approx(0.1)


def test_a_group_has_mean_and_spread_of_its_runs(
    compared: tuple[dict[str, Any], pathlib.Path],
) -> None:
    group = compared[0]["groups"]["vae (2 runs)"]
    assert group["members"] == ["v0", "v1"]
    assert group["num_runs"] == 2
    assert group["num_patients"] == 5
    metrics = group["metrics"]
    assert metrics["ap_volume_mean"] == pytest.approx((0.514 + 0.42) / 2)
    assert metrics["ap_volume_mean_sd"] == pytest.approx(0.094 / np.sqrt(2))
    low, high = metrics["ap_volume_mean_interval"]
    assert low < 0.467 < high
    assert group["training"]["slices_seen"] == 1000


def test_the_interval_of_a_group_holds_its_estimate_when_patients_are_unequal(
    tmp_path: pathlib.Path,
) -> None:
    values = {f"s{n:02d}": 0.2 if n < 15 else 0.9 - 0.05 * (n - 15) for n in range(20)}
    patients = {name: "big" if name < "s15" else name for name in values}
    folders = [
        fake_run(tmp_path / f"s{seed}", values, seed=seed, patients=patients)
        for seed in (0, 1)
    ]
    result = compare.compare(folders, tmp_path / "out", num_samples=200)
    for group in result["groups"].values():
        estimate = group["metrics"]["ap_volume_mean"]
        low, high = group["metrics"]["ap_volume_mean_interval"]
        assert estimate == pytest.approx(np.mean(list(values.values())))
        assert low <= estimate <= high
        assert low < 0.3  # the big patient alone; over patients it starts above
        assert group["num_patients"] == 6


def test_every_run_is_held_against_the_best_baseline(
    compared: tuple[dict[str, Any], pathlib.Path],
) -> None:
    for run in compared[0]["runs"].values():
        assert run["against_baselines"]["baseline"] == "atlas-z"
    found = compared[0]["runs"]["v0"]["against_baselines"]
    assert found["difference"] == pytest.approx(0.514 - 0.25)


def test_every_two_runs_are_tested(
    compared: tuple[dict[str, Any], pathlib.Path],
) -> None:
    tests = [test for test in compared[0]["pairs"] if test["metric"] == "ap"]
    assert len(tests) == 6
    assert len(compared[0]["pairs"]) == 12
    first = tests[0]
    # Of the 32 sign patterns only the observed one and its opposite are as extreme.
    assert first["p"] == pytest.approx(2 / 32)
    assert first["difference"] == pytest.approx(0.094)
    assert first["verdict"] == "above"
    assert first["notes"] == ["only the seed or the fold differs"]
    groups = {(t["first"], t["second"]) for t in compared[0]["group_pairs"]}
    assert ("vae (2 runs)", "ae") in groups


def test_unequal_slices_are_noted(
    compared: tuple[dict[str, Any], pathlib.Path],
) -> None:
    notes = " ".join(compared[0]["notes"])
    assert "Slices seen differ: v0 1000, v1 1000, ae 2000." in notes


def test_curves_take_every_checkpoint_that_was_evaluated(
    compared: tuple[dict[str, Any], pathlib.Path],
) -> None:
    curves = compared[0]["curves"]
    points = curves["v0"]["points"]
    assert [(p["step"], p["train_seconds"], p["ap"]) for p in points] == [
        (50, 25, 0.25),
        (100, 50, 0.5),
    ]
    (only,) = curves["v1"]["points"]
    assert (only["step"], only["train_seconds"]) == (100, 50)
    assert only["ap"] == pytest.approx(0.42)
    assert curves["maps"]["points"][0]["step"] is None
    assert curves["v1"]["validation"] == [
        {"step": 50, "train_seconds": 25.0, "validation_loss": 0.5},
        {"step": 100, "train_seconds": 50.0, "validation_loss": 0.25},
    ]


def test_json_is_the_result_without_nan(
    compared: tuple[dict[str, Any], pathlib.Path],
) -> None:
    result, output = compared

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    stored = json.loads((output / "compare.json").read_text(), parse_constant=refuse)
    assert stored["pairs"] == result["pairs"]
    assert stored["groups"]["vae (2 runs)"]["members"] == ["v0", "v1"]
    assert stored["runs"].keys() == result["runs"].keys()


def test_the_page_stands_alone(
    compared: tuple[dict[str, Any], pathlib.Path], store: pathlib.Path
) -> None:
    result, output = compared
    page = (output / "compare.html").read_text()
    assert "For research only. Not a medical device." in page
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == len(result["panels"]) + 2  # curves over steps and seconds
    assert all(source.startswith("data:image/png") for source in sources)
    assert str(store) not in page
    assert str(output.parent) not in page
    for word in ("v0 above v1", "Ceiling: chosen on this test set", "0.625", "12.5"):
        assert word in page
    assert [one["subject"] for one in result["panels"]] == [
        "test-7",
        "test-1",
        "test-9",
    ]


def test_the_terminal_shows_table_groups_and_notes(
    compared: tuple[dict[str, Any], pathlib.Path],
) -> None:
    text = compare.render(compared[0])
    assert "ae (undertrained)" in text
    assert "AP: vae (2 runs) above ae" in text
    assert "vae (2 runs): 2 of 2 runs above the best baseline" in text.replace(
        "\n", " "
    )
    assert "Note: Slices seen differ" in text
    assert "Ceiling" not in text


def test_the_figures_of_the_protocol_lead_with_the_ceiling_called_one(
    compared: tuple[dict[str, Any], pathlib.Path],
) -> None:
    result = copy.deepcopy(compared[0])
    result["set"]["headline"] = ["ap_pooled", "dice_ceiling_pooled"]
    assert "Dice pooled (ceiling)" in compare.render(result)
    lines = compare_table.rows(result)
    leading = compare_table.figures_table(lines, result["set"]["headline"])
    usual = compare_table.figures_table(lines)
    detection = dict(usual.groups)[compare_table.DETECTION]
    assert leading.groups[1:3] == (
        (compare_table.DETECTION, detection),
        (compare_table.CEILING, 1),
    )
    assert leading.groups != usual.groups
    assert leading.head[1][0] == "AP pooled"
    assert leading.head[detection + 1][0] == "Dice pooled"
    assert sorted(leading.head) == sorted(usual.head)


def test_nothing_is_written_when_the_runs_do_not_fit(tmp_path: pathlib.Path) -> None:
    one = fake_run(tmp_path / "one", AP)
    two = fake_run(tmp_path / "two", {"test-1": 0.5})
    with pytest.raises(entries.CompareError, match="only in one"):
        compare.compare([one, two], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_few_patients_get_a_row_each(tmp_path: pathlib.Path) -> None:
    few = {"p": 0.5, "q": 0.25}
    folders = [fake_run(tmp_path / name, few) for name in ("one", "two")]
    result = compare.compare(folders, tmp_path / "out")
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "of each patient: there are too few" in page
    assert "single cases, no tests, no ranking" in page
    assert "p (Holm)" not in page
    assert result["cases"]["ap"] == {
        "p": {"one": 0.5, "two": 0.5},
        "q": {"one": 0.25, "two": 0.25},
    }
    text = compare.render(result)
    assert "AP of each patient: there are too few" in text
    assert "p (Holm)" not in text


def test_without_lesion_masks_there_is_still_a_comparison(
    tmp_path: pathlib.Path,
) -> None:
    folders = [
        fake_run(
            tmp_path / name,
            {},
            {"x": 0.0},
            healthy=["x", "y"],
            metrics={"volume_auroc": 0.75},
        )
        for name in ("one", "two")
    ]
    result = compare.compare(folders, tmp_path / "out")
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "no annotated lesions" in page
    assert "0.750" in page
    assert result["pairs"] == []
    assert compare.render(result)


def _change(folder: pathlib.Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edits the results of a run."""
    path = folder / "results" / "test.json"
    results = json.loads(path.read_text())
    change(results)
    path.write_text(json.dumps(results))


def test_rows_say_undertrained_and_how_the_loss_still_falls(
    tmp_path: pathlib.Path,
) -> None:
    folders = []
    for seed in range(3):
        folder = fake_run(
            tmp_path / f"s{seed}",
            AP,
            seed=seed % 2,
            learning_rate=1 + seed // 2,
            undertrained=seed == 1,
        )
        slope = {"validation_slope": -0.25 * (seed + 1)}
        _change(folder, lambda one, slope=slope: one["run"]["training"].update(slope))
        folders.append(folder)
    result = compare.compare(folders, tmp_path / "out")
    rows = table(tmp_path / "out")
    (group,) = (name for name, row in rows.items() if row["role"] == "group")
    remarks = {name: row["remark"] for name, row in rows.items()}
    assert remarks == {
        "s0": "",
        "s1": "undertrained",
        "s2": "",
        group: "undertrained",
    }
    assert float(rows["s2"]["validation_slope"]) == -0.75
    assert float(rows[group]["validation_slope"]) == pytest.approx(-0.375)
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "Loss slope" in page
    assert "-0.750" in page
    assert f"{group} (undertrained)" in compare.render(result)


def test_a_missing_baseline_weakens_claims_and_is_noted(tmp_path: pathlib.Path) -> None:
    values = {f"s{n:02d}": 0.5 + 0.01 * n for n in range(20)}
    raw = {"raw": dict.fromkeys(values, 0.1)}
    reason = {"atlas-z": "fewer than 2 healthy training scans"}
    folders = [
        fake_run(tmp_path / f"s{n}", values, seed=n, baselines=raw) for n in range(3)
    ]
    for folder in folders:
        _change(folder, lambda one: one.update(missing_baselines=reason))
    result = compare.compare(folders, tmp_path / "out", num_samples=50, num_rounds=50)
    (group,) = result["groups"].values()
    assert group["claim"].endswith(
        "beats the baselines that could be computed; "
        "atlas-z is missing: fewer than 2 healthy training scans"
    )
    note = "The baseline atlas-z is missing: fewer than 2 healthy training scans."
    assert note in result["notes"]
    assert note in (tmp_path / "out" / "compare.html").read_text()
    # Another run has it, on the same volumes: all are held against it.
    other = fake_run(
        tmp_path / "other",
        values,
        learning_rate=9,
        baselines={"atlas-z": dict.fromkeys(values, 0.2)},
    )
    result = compare.compare(
        [*folders, other], tmp_path / "out2", num_samples=50, num_rounds=50
    )
    assert note not in result["notes"]
    for run in result["runs"].values():
        assert run["against_baselines"]["baseline"] == "atlas-z"
    assert all("missing" not in one["claim"] for one in result["groups"].values())


def test_runs_and_maps_at_other_operating_rates_are_noted(
    tmp_path: pathlib.Path,
) -> None:
    run = fake_run(tmp_path / "run", AP)  # 0.05 by its config
    maps = fake_run(tmp_path / "maps", AP, slices=None)
    alike = compare.compare([run, maps], tmp_path / "out")
    assert not any("rates" in note for note in alike["notes"])
    operating = {"healthy_fpr": 0.02, "note": "Shown at another threshold."}
    _change(maps, lambda one: one["operating"].update(operating))
    result = compare.compare([run, maps], tmp_path / "out")
    assert (
        "Operating rates on healthy scans differ: run 0.05, maps 0.02."
        in (result["notes"])
    )
    assert "maps: Shown at another threshold." in result["notes"]
    notes = {test["metric"]: test["notes"] for test in result["pairs"]}
    assert notes == {"ap": [], "dice": ["operating rates on healthy scans differ"]}


def test_baselines_that_differ_between_runs_are_said(tmp_path: pathlib.Path) -> None:
    one = fake_run(tmp_path / "one", AP, baselines=BASELINES)
    two = fake_run(tmp_path / "two", AP, baselines={"raw": dict.fromkeys(AP, 0.3)})
    result = compare.compare([one, two], tmp_path / "out")
    assert any("baseline raw of two has another AP" in n for n in result["notes"])
    assert result["baselines"]["raw"]["ap_pooled"] == pytest.approx(0.1)


def test_imported_weights_are_no_seed_of_a_method_trained_here(
    tmp_path: pathlib.Path,
) -> None:
    values = {f"s{n:02d}": 0.5 + 0.01 * n for n in range(20)}
    raw = {"raw": dict.fromkeys(values, 0.1)}
    folders = [
        fake_run(tmp_path / f"r{seed}", values, baselines=raw, seed=seed)
        for seed in range(4)
    ]
    known = {"step": 1, "file": "theirs.ckpt", "sha256": "1", "note": ""}
    for folder in folders[2:]:
        _change(folder, lambda one: one["run"].update(imported=known, training=None))
    result = compare.compare(folders, tmp_path / "out")
    members = [group["members"] for group in result["groups"].values()]
    assert members == [["r0", "r1"], ["r2", "r3"]]
    (claim,) = (
        group["claim"]
        for group in result["groups"].values()
        if group["members"] == ["r2", "r3"]
    )
    assert "imported weights, training unknown: no claim" in claim
    rows = table(tmp_path / "out")
    assert rows["r0"]["remark"] == ""
    assert rows["r2"]["remark"] == "imported weights, training unknown"
    assert result["runs"]["r2"]["device"] == ""  # that of the training is not known
