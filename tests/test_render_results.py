"""The tables of the docs keep to the rules of results."""

import copy
import importlib.util
import json
import pathlib
import types
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def render() -> types.ModuleType:
    path = ROOT / "docs" / "render_results.py"
    spec = importlib.util.spec_from_file_location("render_results", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(seed: int, low: float = 0.01, subjects: int = 24, **facts: Any) -> dict:
    row = {
        "ap_volume_mean": 0.3 + 0.1 * seed,
        "ap_pooled": 0.2,
        "auroc_pooled": 0.9,
        "dice_healthy_fpr_volume_mean": 0.1,
        "dice_ceiling_pooled": 0.4,
    }
    comparison = {"num_subjects": subjects, "ap_volume_mean_difference": 0.1}
    if subjects >= 5:
        comparison["interval"] = [low, 0.2]
    return {
        "scorers": {"atlas-z": row, "raw": row, "vae": row},  # as in files: sorted
        "groups": {"ms": {"atlas-z": row, "raw": row, "vae": row}},
        "comparison": comparison,
        "healthy_reconstruction": {"l1_brain": 0.05, "ssim": 0.9},
        "set": {
            "modalities": ["flair"],
            "num_annotated_abnormal": subjects,
            "num_healthy": 8,
            "num_volumes": subjects + 8,
            "data_kind": "synthetic",
            "protocol": "behrendt",
            "split": "test",
            "recipe": "grid2mm",
            **facts,
        },
        "run": {
            "name": "vae",
            "seed": seed,
            "commit": "abc",
            "training": {
                "slices_seen": 6400 + 640 * seed,
                "percent_of_reference": 1.0,
                "validation_slope": -0.1,
                "train_seconds": 60.0,
                "undertrained": True,
            },
        },
    }


def _cells(table: str, name: str) -> dict[str, str]:
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    head = next(line for line in lines if "AP pooled" in line)
    row = next(line for line in lines if line[0] == name)
    return dict(zip(head[-len(row) + 1 :], row[1:], strict=True))


def test_every_row_says_how_far_the_model_was_trained(
    render: types.ModuleType,
) -> None:
    table = render.detection_tables([_run(seed) for seed in range(3)])
    cells = _cells(table, "vae")
    assert cells["AP volume mean"] == "0.400 ± 0.100"
    assert cells["seeds beating the best baseline"] == "3 of 3"
    assert cells["trained"] == (
        "6,400 to 7,680 slices (1.0 % of the budget), slope -0.100 ± 0.000, "
        "**undertrained**"
    )


def test_all_baselines_have_a_row_and_the_model_has_one(
    render: types.ModuleType,
) -> None:
    table = render.detection_tables([_run(0), _run(1)])
    names = [line.split("|")[1].strip() for line in table.splitlines()[4:]]
    assert names == ["vae", "atlas-z", "raw"]


def test_too_few_subjects_beat_nothing(render: types.ModuleType) -> None:
    for subjects, said in ((19, "above in 1 of 1"), (4, "too few patients")):
        table = render.detection_tables([_run(0, subjects=subjects)])
        assert said in table
        assert "1 of 1 |" not in table.replace("above in 1 of 1", "")
    lost = render.detection_tables([_run(0, low=-0.01), _run(1)])
    assert _cells(lost, "vae")["seeds beating the best baseline"] == "1 of 2"


@pytest.mark.parametrize(
    ("what", "value"),
    [("protocol", "none"), ("data_kind", "real"), ("split", "val")],
)
def test_results_that_do_not_compare_are_refused(
    render: types.ModuleType, what: str, value: str
) -> None:
    runs = [_run(0), _run(1, **{what: value})]
    with pytest.raises(ValueError, match=f"{what} is"):
        render.detection_tables(runs)


def test_cases_and_shams_of_two_protocols_are_refused(
    render: types.ModuleType,
) -> None:
    runs = [_run(0), _run(1, protocol="baur")]
    sham = {"num_pairs": 1, "interval": None}
    sham |= dict.fromkeys(("implant_mean", "sham_mean", "implant_minus_sham"), 0.5)
    for run in runs:
        run["cases"], run["sham"] = {"a": {"vae": 0.5}}, {"vae": sham}
    for table in (render.case_table, render.sham_table):
        table(runs[:1])
        with pytest.raises(ValueError, match="protocol is baur and behrendt"):
            table(runs)


def test_the_figures_of_the_protocol_lead(render: types.ModuleType) -> None:
    leading = ["ap_pooled", "dice_ceiling_pooled"]
    runs = [_run(0, protocol="baur", headline=leading)]
    table = render.detection_tables(runs)
    assert "protocol `baur`" in table
    head, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:6]]
        for line in table.splitlines()[2:]
    )
    first, *others = ("AP pooled", "Dice ceiling (labels)", "AP volume mean")
    assert head == ["", first, *others, "AUROC pooled"]
    assert [row[0] for row in rows] == ["vae", "atlas-z", "raw"]
    for row in rows:
        assert row[1:3] == ["0.200", "0.400"]


def test_validation_and_test_scans_have_rows_of_their_own(
    render: types.ModuleType,
) -> None:
    other = copy.deepcopy(_run(0, split="val"))
    other["healthy_reconstruction"]["l1_brain"] = 0.07
    table = render.training_table([_run(0), other])
    assert "| vae | test | 1 |" in table
    assert "| vae | val | 1 |" in table
    assert "0.0700" in table


def test_pairs_are_collected_and_shown_with_their_relative_difference(
    render: types.ModuleType, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "DOCS", tmp_path / "docs")
    pair = {
        "first": "pddpm (3 runs)",
        "second": "ddpm (3 runs)",
        "heading": "AP",
        "first_mean": 0.15,
        "second_mean": 0.12,
        "difference": 0.03,
        "interval": [0.01, 0.05],
        "p_holm": 0.02,
        "num_patients": 24,
        "verdict": "above",
        "notes": ["undertrained: no claim about the method"],
    }
    facts = {"modalities": ["t2"], "data_kind": "synthetic", "split": "test"}
    found = {
        "group_pairs": [pair],
        "set": {**facts, "protocol": "behrendt"},
        "notes": [],
        "groups": {"pddpm (3 runs)": {"members": ["a", "b", "c"], "metrics": {}}},
    }
    (tmp_path / "compare.json").write_text(json.dumps(found))
    render.collect_pairs("one", tmp_path)
    table = render.pair_table("one")
    assert "T2, synthetic, split test, protocol `behrendt`" in table
    row = "| pddpm (3 runs) | ddpm (3 runs) | AP | 0.150 | 0.120 | +0.030 | +25 % |"
    assert f"{row} [+0.010, +0.050] | 0.0200 | 24 | above; undertrained" in table


def test_scorers_of_older_results_get_the_names_of_today(
    render: types.ModuleType, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "DOCS", tmp_path / "docs")
    found = _run(0)
    found["scorers"]["prevalence"] = found["scorers"]["raw"] | {
        "prevalence_pooled": 0.1
    }
    found["cases"] = {"one": {"prevalence": 0.2}}
    found["run"] |= {
        "step": 1,
        "environment": {"commit": "abc", "device_kind": "cpu"},
        "config": {"source": "", "batch_size": 1},
        "data_fingerprint": "",
    }
    (tmp_path / "run" / "results").mkdir(parents=True)
    (tmp_path / "run" / "results" / "test.json").write_text(json.dumps(found))
    render.collect("some", [tmp_path / "run"])
    (kept,) = render.load("some")
    assert set(kept["scorers"]) == {"atlas-z", "raw", "vae", "constant map"}
    assert kept["scorers"]["constant map"]["prevalence_pooled"] == 0.1
    assert kept["cases"] == {"one": {"constant map": 0.2}}


def test_the_committed_results_know_no_scorer_called_prevalence() -> None:
    paths = list((ROOT / "docs" / "results").rglob("*.json"))
    assert paths
    old = [path.name for path in paths if '"prevalence"' in path.read_text()]
    assert old == []
