import pathlib

from tests import reports


def test_strata_show_recall_and_precision_beside_the_best_baseline(
    tmp_path: pathlib.Path,
) -> None:
    results = reports.complete()
    _, page = reports.written(tmp_path, results)
    model, best = results["scorers"]["vae"], results["scorers"]["atlas-z"]
    head, *rows = reports.table(page, "Size of the lesion")
    assert head[2:] == ["Recall, vae", "Recall, atlas-z"]
    assert rows == [
        [
            name,
            str(one["num_lesions"]),
            reports.cell(one, "recall"),
            reports.cell(other, "recall"),
        ]
        for (name, one), other in zip(
            model["by_lesion_size"].items(),
            best["by_lesion_size"].values(),
            strict=True,
        )
    ]
    _, *rows = reports.table(page, "Lesion load of the volume")
    assert rows == [
        [
            name,
            str(one["num_volumes"]),
            reports.cell(one, "ap_volume_mean"),
            reports.cell(best["by_load"][name], "ap_volume_mean"),
            reports.cell(one, "dice_volume_mean"),
            reports.cell(best["by_load"][name], "dice_volume_mean"),
        ]
        for name, one in model["by_load"].items()
    ]


def test_groups_sham_and_reconstruction_show_the_figures_given(
    tmp_path: pathlib.Path,
) -> None:
    results = reports.complete()
    _, page = reports.written(tmp_path, results)
    _, *rows = reports.table(page, "Lesion volumes")
    for group, *cells in rows:
        scorers = results["groups"][group]
        keys = ("ap_volume_mean", "dice_healthy_fpr_volume_mean", "volume_auroc")
        expected = [
            reports.cell(scorers[name], key)
            for key in keys
            for name in ("vae", "atlas-z")
        ]
        assert cells == ["24", *expected]
    _, *rows = reports.table(page, "Sham")
    for name, *cells in rows:
        one = results["sham"][name]
        low, high = one["interval"]
        assert cells == [
            "4",
            f"{one['implant_mean']:#.4g}",
            f"{one['sham_mean']:#.4g}",
            f"{one['implant_minus_sham']:#.4g} [{low:#.4g}, {high:#.4g}]",
        ]
    assert "found the seam of the implantation, not the lesion" in page.text
    found = results["healthy_reconstruction"]
    assert reports.table(page, "PSNR, dB") == [
        ["L1 in the brain", "L1 in the box", "SSIM", "PSNR, dB"],
        [
            f"{found['l1_brain']:.4f}",
            f"{found['l1_box']:.4f}",
            f"{found['ssim']:.3f}",
            f"{found['psnr']:.1f}",
        ],
    ]


def test_a_long_ranking_is_cut_and_says_so(tmp_path: pathlib.Path) -> None:
    results, subjects = reports.no_lesion()
    many = [{**subjects[0], "subject": f"s{n}", "volume_score": n} for n in range(70)]
    _, page = reports.written(tmp_path, results, (), many)
    rows = page.tables["The 50 highest of 70 volumes."]
    assert rows[1][1] == "s69"
    assert rows[1][2] == "scan-0"  # patient and subject differ: both are shown
    assert len(rows) == 51


def test_every_subject_is_listed_with_its_figures(tmp_path: pathlib.Path) -> None:
    row = {
        "subject": "a",
        "kind": "ms",
        "label": "abnormal",
        "lesion_ml": 1.25,
        "ap": "0.5",  # as read from the CSV
        "auroc": 0.75,
        "dice_healthy_fpr": 0.25,
        "found_ml_healthy_fpr": 3.5,
        "volume_score": 0.125,
        "healthy_percentile": 87.5,
    }
    empty = {"lesion_ml": "", "ap": "", "auroc": "", "dice_healthy_fpr": ""}
    others = [
        {**row, **empty, "subject": "b", "label": "healthy", "volume_score": 0.5},
        {**row, "subject": "c", "ap": 0.75},
        {**row, **empty, "subject": "d", "volume_score": 0.75},
    ]
    _, page = reports.written(tmp_path, reports.complete(), (), [row, *others])
    _, *rows = reports.table(page, "Lesion, ml")
    numbers = ["1.25", "0.500", "0.750", "0.250", "3.50", "0.1250", "87.5"]
    assert [cells[0] for cells in rows] == ["c", "a", "d", "b"]
    assert rows[1] == ["a", "ms", "abnormal", *numbers]
    assert rows[3][3:7] == ["-", "-", "-", "-"]


def test_single_cases_have_a_table(tmp_path: pathlib.Path) -> None:
    results = reports.complete()
    values = {name: 0.1 * place for place, name in enumerate(reports.SCORERS)}
    results["cases"] = {"one": values}
    results["scorers"]["vae"].pop("ap_volume_mean_interval")
    text, page = reports.written(tmp_path, results)
    (caption,) = (one for one in page.tables if one.startswith("Average precision"))
    assert page.tables[caption] == [
        ["", *reports.SCORERS],
        ["one", "0.000", "0.100", "0.200"],
    ]
    assert "<td>one</td><td>0.000</td>" in text
