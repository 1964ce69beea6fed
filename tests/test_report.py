import json
import pathlib
import re
from typing import Any

import jinja2
import pytest

from tests import reports
from uad_jax import report


def test_head_training_and_provenance_show_the_facts_given(
    tmp_path: pathlib.Path,
) -> None:
    results = reports.complete()
    _, page = reports.written(tmp_path, results)
    facts = page.facts
    assert facts["Method"] == "VaeConfig, checkpoint of step 12,000, seed 3"
    assert facts["Data"] == "synthetic"
    assert facts["Volumes"] == (
        "40 of 38 patients: 24 abnormal, 12 healthy, 4 sham implants; "
        "lesion masks of 23"
    )
    assert facts["Pooled figures"].startswith("exact")
    assert facts["Slices seen"] == "192,000"
    assert facts["Share of the paper's budget"] == "31.2 %"
    assert facts["Training"] == "4,321 s"
    assert facts["Change of the validation loss over the last fifth"] == "-0.012"
    assert facts["uad_jax"] == "0.1, commit abc123def456"
    assert facts["Data fingerprint"] == "fedcba9876543210"
    assert facts["Set fingerprint"] == "0123456789abcdef"
    assert (
        facts["Evaluated in"] == "56.7 s (calibrate 12.3 s, score 34.5 s, draw 9.9 s)"
    )
    assert facts["Data licences"] == "a licence"
    config = json.dumps(results["run"]["config"], indent=2)
    assert " ".join(config.split()) in page.text
    prevalence = results["scorers"]["vae"]["prevalence_pooled"]
    assert f"Prevalence: {prevalence:.4f} of the brain voxels" in page.text
    thresholds = reports.table(page, "Chosen on")[1:]
    assert thresholds == [
        [row["rule"], f"{row['value']:#.4g}", row["source"]]
        for row in results["thresholds"]
    ]


def test_every_figure_given_is_shown_and_no_other(tmp_path: pathlib.Path) -> None:
    for names in ((), reports.FIGURES, ("roc",)):
        _, page = reports.written(tmp_path, reports.complete(), names)
        assert page.tags.count("img") == len(names)
        assert all(s.startswith("data:image/png;base64,") for s in page.sources)
    _, page = reports.written(tmp_path, reports.complete(), ())
    assert "Curves" not in page.headings
    assert "Subjects" not in page.headings


VARIANTS = {
    "complete": lambda: (reports.complete(), []),
    "old": lambda: (reports.old(), []),
    "no lesion": reports.no_lesion,
    "no lesion, one label": lambda: reports.no_lesion(labels=False),
    "maps": lambda: (reports.from_maps(), []),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_page_is_whole_loads_nothing_and_says_nothing_undefined(
    variant: str, tmp_path: pathlib.Path
) -> None:
    results, subjects = VARIANTS[variant]()
    text, page = reports.written(tmp_path, results, reports.FIGURES, subjects)
    assert "For research only. Not a medical device." in page.text
    assert not re.search(r"\b(nan|none|null|undefined|inf)\b", page.text.lower())
    assert "http" not in text
    assert "<script" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert str(tmp_path) not in text
    assert not re.search(r"[\s\"'>]/(home|tmp|usr|root|work|mnt)\b", text)
    assert all(heading.strip() for heading in page.headings)
    for rows in page.tables.values():
        assert len({len(row) for row in rows[-2:]}) == 1
        assert all(any(cell not in ("", "-") for cell in row[1:]) for row in rows[1:])
    assert not list(tmp_path.glob("*.tmp"))


def test_blocks_without_content_are_absent(tmp_path: pathlib.Path) -> None:
    _, whole = reports.written(tmp_path, reports.complete(), reports.FIGURES)
    assert {"Sham implants", "By group", "By size", "Training"} <= set(whole.headings)
    _, page = reports.written(tmp_path, reports.old(), ())
    kept = {"Detection", "Operating points", "By group", "Thresholds", "Training"}
    assert kept <= set(page.headings)
    assert not set(page.headings) & {
        "Sham implants",
        "By size",
        "Without post-processing",
        "Curves",
        "Subjects",
        "The highest scores",
    }
    assert "at the healthy threshold: 8655 voxels" in page.text


def test_without_lesions_there_are_ranks_and_no_voxel_figures(
    tmp_path: pathlib.Path,
) -> None:
    results, subjects = reports.no_lesion()
    _, page = reports.written(tmp_path, results, ("gallery", "volume_scores"), subjects)
    assert page.headings[:2] == ["Volumes by score", "The highest scores"]
    auroc = f"{results['scorers']['vae']['volume_auroc']:.3f}"
    assert reports.table(page, "Volume AUROC") == [
        ["", "Volume AUROC"],
        ["vae", auroc],
        ["atlas-z", auroc],
    ]
    assert reports.table(page, "Rank") == [
        ["Rank", "Subject", "Label", "Volume score", "Above healthy, %"],
        ["1", "scan-3", "abnormal", "0.1300", "75.0"],
        ["2", "scan-2", "healthy", "0.1200", "50.0"],
        ["3", "scan-1", "abnormal", "0.1100", "25.0"],
        ["4", "scan-0", "healthy", "0.1000", "0.0"],
    ]
    for word in ("AP", "Dice", "Prevalence", "Operating points", "pooled", "lesion in"):
        assert not re.search(rf"\b{word}\b", page.text), word
    results, subjects = reports.no_lesion(labels=False)
    _, page = reports.written(tmp_path, results, (), subjects)
    assert "AUROC" not in page.text


def test_maps_made_elsewhere_say_so_and_have_no_training(
    tmp_path: pathlib.Path,
) -> None:
    _, page = reports.written(tmp_path, reports.from_maps(), reports.FIGURES[1:])
    assert "Maps made by another tool, scored here." in page.text
    assert page.facts["Method"] == "maps made elsewhere"
    assert not {"Training", "Reconstruction of healthy scans"} & set(page.headings)
    assert "Config" not in page.text
    _, page = reports.written(tmp_path, reports.complete())
    assert "another tool" not in page.text


def test_lesion_that_the_mask_loses_is_a_share_with_its_dice(
    tmp_path: pathlib.Path,
) -> None:
    results = reports.complete()
    _, page = reports.written(tmp_path, results)
    assert "Out of reach" not in page.facts
    results["scorers"]["vae"] |= {
        "out_of_reach_percent_pooled": 12.34,
        "dice_reachable_pooled": 0.9344,
    }
    _, page = reports.written(tmp_path, results)
    assert page.facts["Out of reach"] == (
        "12.3 % of the lesion voxels lie outside the eroded brain mask; a perfect map "
        "would have a pooled Dice of 0.934"
    )


def test_missing_baselines_and_another_rule_are_said_at_the_head(
    tmp_path: pathlib.Path,
) -> None:
    results = reports.complete()
    _, page = reports.written(tmp_path, results)
    assert not {"Missing baselines", "Operating threshold"} & page.facts.keys()
    results["verdict"] = "In this run the model beats the baselines (one seed)."
    results["missing_baselines"] = {"atlas-z": "no training scans"}
    results["operating"]["note"] = "Shown at the validated threshold."
    _, page = reports.written(tmp_path, results)
    assert page.facts["Missing baselines"] == "atlas-z: no training scans"
    assert page.facts["Operating threshold"] == "Shown at the validated threshold."
    weaker = (
        "beats the baselines that could be computed (one seed); atlas-z is missing: "
        "no training scans."
    )
    assert weaker in page.text
    text = " ".join(report.summary(results).split())
    assert weaker in text
    assert text.endswith("Operating threshold: Shown at the validated threshold.")


def test_banners_appear_where_they_are_due(tmp_path: pathlib.Path) -> None:
    results = reports.complete()
    _, page = reports.written(tmp_path, results)
    assert "Undertrained" not in page.text
    assert "Automatic truth" not in page.text
    results["run"]["training"]["undertrained"] = True
    results["set"]["data_kind"] = "real, automatic truth"
    _, page = reports.written(tmp_path, results)
    assert "Undertrained." in page.text
    assert "Automatic truth." in page.text
    assert page.text.index("Undertrained.") < page.text.index("Detection")


def test_pooled_figures_from_histograms_are_called_approximate(
    tmp_path: pathlib.Path,
) -> None:
    _, page = reports.written(tmp_path, reports.complete() | {"pooled": "histogram"})
    assert "approximate" in page.facts["Pooled figures"]


def test_names_are_escaped(tmp_path: pathlib.Path) -> None:
    text = json.dumps(reports.complete()).replace('"vae"', '"<b>vae</b>"')
    results = json.loads(text.replace("ms", "<i>ms</i>"))
    results["set"]["name"] = "<u>&"
    _, subjects = reports.no_lesion()
    subjects[0]["subject"] = "<s>x</s>"
    page_text, page = reports.written(tmp_path, results, (), subjects)
    assert not {"i", "u", "s"} & set(page.tags)
    assert "<b>vae" not in page_text
    assert "<s>x</s>" in page.text  # as text


def test_results_read_from_their_file_put_the_model_first(
    tmp_path: pathlib.Path,
) -> None:
    results = json.loads(json.dumps(reports.complete(), sort_keys=True))
    assert next(iter(results["scorers"])) != "vae"
    _, page = reports.written(tmp_path, results)
    first = [
        rows[1][0] for rows in page.tables.values() if rows[1][0] in reports.SCORERS
    ]
    assert set(first) == {"vae"}


def test_summary_is_short_and_ends_with_the_verdict() -> None:
    text = report.summary(reports.complete())
    name, head = (" ".join(line.split()) for line in text.splitlines()[:2])
    assert name == "Protocol behrendt"
    assert head == "AP pooled AP volume mean Dice, healthy threshold"
    assert text.index("vae") < text.index("raw intensity")
    assert text.endswith("The model does not beat the baselines.")
    assert report.summary(reports.from_maps()).startswith("Maps made by another tool")


def test_summary_without_lesions_lists_the_highest_scores() -> None:
    results, subjects = reports.no_lesion()
    many = [{**subjects[0], "subject": f"s{n}", "volume_score": n} for n in range(9)]
    text = report.summary(results, many)
    assert "Volume AUROC" in text
    assert "AP" not in text
    assert "s8" in text
    assert "s4" in text
    assert "s3" not in text  # five are enough
    alone = report.summary(reports.no_lesion(labels=False)[0])
    assert alone == "No annotated lesions: there are no voxel figures."


def test_text_table_lines_up_its_columns() -> None:
    text = report.text_table(["", "AP"], [["model", "0.5"], ["raw intensity", "0.125"]])
    lines = text.splitlines()
    assert lines[2] == "model            0.5"
    assert len(lines[1]) == len(lines[3])


def test_a_name_that_the_template_does_not_know_is_an_error(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = report._content

    def without_title(*given: Any) -> reports.Json:
        return {k: v for k, v in content(*given).items() if k != "title"}

    monkeypatch.setattr(report, "_content", without_title)
    with pytest.raises(jinja2.UndefinedError):
        reports.written(tmp_path, reports.complete())
