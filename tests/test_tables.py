import math
import pathlib
import re

from tests import reports
from uad_jax import report, tables


def test_detection_shows_every_figure_with_its_interval_model_first(
    tmp_path: pathlib.Path,
) -> None:
    results = reports.complete()
    _, page = reports.written(tmp_path, results)
    head, *rows = page.tables[report._caption(results)]
    assert head[1:] == [heading for _, heading, _ in tables.COLUMNS]
    assert [row[0] for row in rows] == list(reports.SCORERS)
    for name, *cells in rows:
        metrics = results["scorers"][name]
        assert cells == [reports.cell(metrics, key) for key, _, _ in tables.COLUMNS]


def test_the_figures_of_the_protocol_lead_and_the_others_follow(
    tmp_path: pathlib.Path,
) -> None:
    results = reports.complete()
    results["set"] |= {
        "headline": ["ap_pooled", "dice_ceiling_pooled"],
        "protocol": "baur",
        "steps": "brain eroded by 9 pixels (18 mm)",
        "protocol_note": "no reconstruction",
    }
    _, page = reports.written(tmp_path, results)
    head, *rows = page.tables[report._caption(results)]
    keys = ["ap_pooled", "dice_ceiling_pooled"]
    keys += [key for key, _, _ in tables.COLUMNS if key not in keys]
    named = {key: heading for key, heading, _ in tables.COLUMNS}
    assert head[1:] == [named[key] for key in keys]
    for name, *cells in rows:
        assert cells == [reports.cell(results["scorers"][name], key) for key in keys]
    facts = report._facts(results)
    assert (
        "Post-processing",
        "protocol baur: brain eroded by 9 pixels (18 mm)",
    ) in facts
    assert ("Protocol", "no reconstruction") in facts
    name, first, *_ = report.summary(results).splitlines()
    assert name == "Protocol baur"
    assert re.split(r"  +", first.strip())[:3] == [
        "AP pooled",
        "Dice ceiling, pooled",
        "AP volume mean",
    ]


def test_unprocessed_figures_stand_in_a_table_of_their_own(
    tmp_path: pathlib.Path,
) -> None:
    results = reports.complete()
    _, page = reports.written(tmp_path, results)
    (caption,) = (name for name in page.tables if name.startswith("The same scores"))
    _, *rows = page.tables[caption]
    for name, *cells in rows:
        metrics = results["unprocessed"][name]
        assert cells == [reports.cell(metrics, key) for key, _, _ in tables.COLUMNS]


def test_operating_points_show_every_figure_of_every_rule(
    tmp_path: pathlib.Path,
) -> None:
    results = reports.complete()
    _, page = reports.written(tmp_path, results)
    spans, head, *rows = reports.table(page, "Threshold from")
    model, best = results["scorers"]["vae"], results["scorers"]["atlas-z"]
    labels = [row[0] for row in rows]
    assert labels == [
        "1 % of healthy validation voxels",
        "5 % of healthy validation voxels (operating point)",
        "10 % of healthy validation voxels",
        "best Dice on validation lesions",
        "ceiling: chosen on this test set; an upper bound, no result",
    ]
    assert spans == ["", "Voxels", "Lesions", "On a healthy scan", "atlas-z"]
    assert len(head) == 12
    rules = ("healthy_fpr_1", "healthy_fpr_5", "healthy_fpr_10", "validated")
    for row, rule, threshold in zip(rows, rules, results["thresholds"], strict=False):
        assert row[1:] == [
            f"{threshold['value']:#.4g}",
            reports.cell(model, f"dice_{rule}_volume_mean"),
            reports.cell(model, f"dice_{rule}_pooled"),
            reports.cell(model, f"precision_{rule}_pooled"),
            reports.cell(model, f"recall_{rule}_pooled"),
            reports.cell(model, f"lesion_recall_{rule}"),
            reports.cell(model, f"lesion_precision_{rule}"),
            reports.cell(model, f"lesion_f1_{rule}"),
            reports.cell(model, f"false_positive_ml_{rule}_healthy_mean", 2),
            reports.cell(model, f"false_components_{rule}_healthy_mean", 1),
            f"{best[f'dice_{rule}_volume_mean']:.3f}",
        ]
    assert rows[4][1:4] == [
        f"{model['dice_ceiling_threshold']:#.4g}",
        reports.cell(model, "dice_ceiling_volume_mean"),
        reports.cell(model, "dice_ceiling_pooled"),
    ]


def test_a_rate_of_its_own_has_a_row_of_its_own(tmp_path: pathlib.Path) -> None:
    results = reports.complete()
    results["run"]["config"]["evaluation"]["healthy_fpr"] = 0.02
    _, page = reports.written(tmp_path, results)
    _, _, *rows = reports.table(page, "Threshold from")
    assert rows[3][:3] == [
        "healthy validation voxels, at the operating rate (operating point)",
        "0.1235",
        reports.cell(results["scorers"]["vae"], "dice_healthy_fpr_volume_mean"),
    ]


def test_captions_say_on_how_many_patients_intervals_rest(
    tmp_path: pathlib.Path,
) -> None:
    results = reports.complete()
    rate, recall = "false_positive_ml_healthy_fpr_healthy_mean", "healthy_fpr_5"
    model = results["scorers"]["vae"]
    model["volume_auroc_interval"] = [0.25, 0.75]
    model[f"lesion_recall_{recall}_interval"] = [0.125, 0.875]
    model["interval_patients"] = {
        "ap_pooled": 24,
        "ap_volume_mean": 24,
        "volume_auroc": 36,
        f"lesion_recall_{recall}": 23,
        rate: 12,  # not at the operating row's own rule: not said
    }
    _, page = reports.written(tmp_path, results)
    caption = report._caption(results)
    assert caption.endswith(
        "over patients: 24 for AP pooled / AP volume mean; 36 for Volume AUROC."
    )
    assert "[0.250, 0.750]" in page.tables[caption][1][-1]
    (operating,) = (name for name in page.tables if name.startswith("Thresholds were"))
    assert operating.endswith("over patients: 23 for Recall (lesions).")
    assert "[0.125, 0.875]" in " ".join(page.tables[operating][3])


def test_the_rate_of_the_evaluation_goes_before_that_of_the_config() -> None:
    results = reports.from_maps()  # without a config
    assert tables.healthy_rate(results) is None
    results["operating"]["healthy_fpr"] = 0.1
    assert tables.healthy_rate(results) == 0.1
    table = tables.operating_points(results)
    assert table is not None
    assert table.marked is not None
    marked = table.rows[table.marked][0]
    assert marked == "10 % of healthy validation voxels (operating point)"
    results = reports.complete()
    assert tables.healthy_rate(results) == 0.05
    results["operating"]["healthy_fpr"] = 0.1
    assert tables.healthy_rate(results) == 0.1


def test_numbers_that_do_not_exist_are_dashes() -> None:
    assert [tables.number(x) for x in (None, math.nan, math.inf)] == ["-", "-", "-"]
    assert tables.number(0.0) == "0.000"
    assert tables.significant(None) == "-"
    assert tables.significant(0.3) == "0.3000"
    assert tables.table_rows({"m": {"volume_auroc": math.nan}})[0][1:] == ["-"] * 9


def test_the_best_baseline_has_the_highest_ap_unless_it_is_named() -> None:
    results = reports.complete()
    assert tables.best_baseline(results) == "atlas-z"
    results["comparison"] = {}
    results["scorers"]["raw intensity"]["ap_volume_mean"] = 0.999
    assert tables.best_baseline(results) == "raw intensity"
    del results["scorers"]["raw intensity"], results["scorers"]["atlas-z"]
    assert tables.best_baseline(results) is None
    assert tables.operating_points(results) is not None


def test_a_baseline_with_the_rate_of_the_config_only_stands_in_its_row(
    tmp_path: pathlib.Path,
) -> None:
    results = reports.complete()
    best = results["scorers"]["atlas-z"]
    for rate in (1, 5, 10):
        del best[f"dice_healthy_fpr_{rate}_volume_mean"]
    _, page = reports.written(tmp_path, results)
    _, _, *rows = reports.table(page, "Threshold from")
    dice = f"{best['dice_healthy_fpr_volume_mean']:.3f}"
    assert [row[-1] for row in rows[:3]] == ["-", dice, "-"]
