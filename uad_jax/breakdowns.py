"""Tables of a report that look into the mean: by lesion, load, kind and subject."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from uad_jax import tables
from uad_jax.tables import Metrics, Table

_ERRORS = {
    "l1_brain": ("L1 in the brain", "mean absolute error over brain voxels", 4),
    "l1_box": ("L1 in the box", "mean absolute error over all voxels", 4),
    "ssim": ("SSIM", "structural similarity, 1 = identical", 3),
    "psnr": ("PSNR, dB", "peak signal-to-noise ratio", 1),
}
_WORDS = ("subject", "patient", "label", "kind")  # columns of the CSV
_MOST_RANKED = 50  # rows on a page; the CSV has all
_MOST_SUBJECTS = 200


def _pair(results: Mapping[str, Any]) -> dict[str, Metrics]:
    """What is evaluated and the best baseline: name -> metrics."""
    names = [results["run"]["name"], tables.best_baseline(results)]
    return {name: results["scorers"][name] for name in names if name}


def by_lesion_size(results: Mapping[str, Any]) -> Table | None:
    """Which lesions are found, by their size."""
    pair = _pair(results)
    strata = results["scorers"][results["run"]["name"]].get("by_lesion_size")
    if not strata:
        return None
    head = [("Size of the lesion", ""), ("Lesions", "connected lesions of all volumes")]
    head += [(f"Recall, {name}", "share that a finding touches") for name in pair]
    rows = []
    for name, stratum in strata.items():
        found = [one.get("by_lesion_size", {}).get(name, {}) for one in pair.values()]
        recalls = [tables.number(one.get("recall")) for one in found]
        rows.append([name, str(stratum["num_lesions"]), *recalls])
    return Table("Share of the lesions that are found, by size.", head, rows)


def by_load(results: Mapping[str, Any]) -> Table | None:
    """How well volumes are scored, by how much lesion they hold."""
    pair = _pair(results)
    strata = results["scorers"][results["run"]["name"]].get("by_load")
    if not strata:
        return None
    figures = (("ap_volume_mean", "AP"), ("dice_volume_mean", "Dice"))
    used = [
        (key, heading)
        for key, heading in figures
        if any(tables.exists(one.get(key)) for one in strata.values())
    ]
    head = [("Lesion load of the volume", ""), ("Volumes", "with this load")]
    for _, heading in used:
        head += [(f"{heading}, {name}", "mean over these volumes") for name in pair]
    rows = []
    for name, stratum in strata.items():
        cells = [name, str(stratum["num_volumes"])]
        for key, _ in used:
            cells += [
                tables.number(one.get("by_load", {}).get(name, {}).get(key))
                for one in pair.values()
            ]
        rows.append(cells)
    return Table("Volumes by all their lesion together.", head, rows)


def groups(results: Mapping[str, Any]) -> Table | None:
    """What is evaluated against the best baseline, group by group."""
    model, *others = _pair(results)
    rule = (results.get("operating") or {}).get("rule") or "healthy_fpr"
    figures = (
        ("ap_volume_mean", "AP volume mean"),
        (f"dice_{rule}_volume_mean", "Dice volume mean"),
        ("volume_auroc", "Volume AUROC"),
    )
    found = results.get("groups") or {}
    used = [
        (key, heading, name)
        for key, heading in figures
        for name in (model, *others)
        if any(tables.exists(one.get(name, {}).get(key)) for one in found.values())
    ]
    if not used:
        return None
    head = [(results["set"].get("group_by") or "group", ""), ("Lesion volumes", "")]
    head += [(f"{heading}, {name}", "") for _, heading, name in used]
    rows = []
    for group, scorers in found.items():
        cells = [group, str(scorers[model].get("num_lesion", "-"))]
        for key, _, name in used:
            cells.append(tables.with_interval(scorers.get(name, {}), key))
        rows.append(cells)
    caption = "Abnormal volumes of one kind with all healthy volumes."
    return Table(caption, head, rows)


def sham(results: Mapping[str, Any]) -> Table | None:
    """Scores inside the masks of implants and of shams."""
    found = results.get("sham")
    if not found:
        return None
    rows = []
    for name, one in _model_first(found, results["run"]["name"]):
        difference = tables.significant(one["implant_minus_sham"])
        if one.get("interval"):
            low, high = (tables.significant(bound) for bound in one["interval"])
            difference += f"\n[{low}, {high}]"
        means = [tables.significant(one[key]) for key in ("implant_mean", "sham_mean")]
        rows.append([name, str(one["num_pairs"]), *means, difference])
    head = [
        ("", ""),
        ("Pairs", "an implant and its sham"),
        ("Implant", "mean score inside the mask"),
        ("Sham", "mean score inside the mask"),
        ("Implant minus sham", "mean over pairs"),
    ]
    caption = "Mean score inside the mask of real implants and of their shams."
    return Table(caption, head, rows, marked=0)


def cases(results: Mapping[str, Any]) -> Table | None:
    """Average precision of single subjects, where a mean would say too much."""
    found = results.get("cases")
    if not found:
        return None
    names = list(results["scorers"])
    rows = [
        [subject, *(tables.number(values.get(name)) for name in names)]
        for subject, values in found.items()
    ]
    caption = "Average precision of each subject: there are too few for more than that."
    return Table(caption, [("", ""), *((name, "") for name in names)], rows)


def reconstruction(results: Mapping[str, Any]) -> Table | None:
    """Errors of the reconstruction of healthy scans."""
    found = results.get("healthy_reconstruction") or {}
    shown = [name for name in _ERRORS if tables.exists(found.get(name))]
    if not shown:
        return None
    cells = [tables.number(found[name], _ERRORS[name][2]) for name in shown]
    head = [_ERRORS[name][:2] for name in shown]
    caption = "Means over the healthy scans of this set."
    return Table(caption, head, [cells])


def ranking(subjects: Sequence[Mapping[str, Any]]) -> Table | None:
    """Volumes by their score, highest first, against healthy validation scans.

    Args:
      subjects: Rows of the per-subject CSV, of one scorer.
    """
    ranked = ranked_subjects(subjects)
    if not ranked:
        return None
    columns = {
        "subject": ("Subject", ""),
        "patient": ("Patient", ""),
        "label": ("Label", "as given; not used by the model"),
        "kind": ("Kind", "as given; not used by the model"),
        "volume_score": ("Volume score", ""),
        "healthy_percentile": (
            "Above healthy, %",
            "share of the healthy validation scans that score lower",
        ),
    }
    if all(row.get("patient") == row["subject"] for row in ranked):
        del columns["patient"]
    if all(row.get("kind") in ("", row.get("label")) for row in ranked):
        columns.pop("kind")
    keys = [key for key in columns if any(_given(row.get(key)) for row in ranked)]
    rows = [
        [str(place), *(_cell(key, row.get(key)) for key in keys)]
        for place, row in enumerate(ranked[:_MOST_RANKED], start=1)
    ]
    caption = "All volumes, highest score first."
    if len(ranked) > len(rows):
        caption = f"The {len(rows)} highest of {len(ranked)} volumes."
    words = tuple(place for place, key in enumerate(keys, start=1) if key in _WORDS)
    head = [("Rank", ""), *(columns[key] for key in keys)]
    return Table(caption, head, rows, words=words)


def subjects(found: Sequence[Mapping[str, Any]], rule: str | None) -> Table | None:
    """Every subject with its figures, the highest AP first.

    Args:
      found: Rows of the per-subject CSV, of one scorer.
      rule: Of the operating threshold.
    """
    columns = {
        "subject": ("Subject", ""),
        "kind": ("Kind", ""),
        "label": ("Label", ""),
        "lesion_ml": ("Lesion, ml", "volume of the annotated lesion"),
        "ap": ("AP", "average precision"),
        "auroc": ("AUROC", ""),
        f"dice_{rule}": ("Dice", "at the operating threshold"),
        f"found_ml_{rule}": ("Found, ml", "at the operating threshold"),
        "volume_score": ("Volume score", ""),
        "healthy_percentile": (
            "Above healthy, %",
            "share of the healthy validation scans that score lower",
        ),
    }
    keys = [key for key in columns if any(_given(row.get(key)) for row in found)]
    if not found:
        return None
    ordered = sorted(
        found,
        key=lambda row: (-_value(row.get("ap"), -1.0), -_value(row["volume_score"])),
    )
    rows = [
        [_cell(key, row.get(key)) for key in keys] for row in ordered[:_MOST_SUBJECTS]
    ]
    caption = "Highest AP first; volumes without lesion after them, by score."
    if len(ordered) > len(rows):
        caption += f" The first {len(rows)} of {len(ordered)}."
    words = tuple(place for place, key in enumerate(keys) if place and key in _WORDS)
    return Table(caption, [columns[key] for key in keys], rows, words=words)


def ranked_subjects(
    subjects: Iterable[Mapping[str, Any]],
) -> list[Mapping[str, Any]]:
    """Rows of the per-subject CSV by volume score, highest first."""
    return sorted(subjects, key=lambda row: -_value(row["volume_score"]))


def _model_first(found: Mapping[str, Any], model: str) -> list[tuple[str, Any]]:
    return sorted(found.items(), key=lambda item: item[0] != model)


def _given(value: Any) -> bool:
    return value not in ("", None)


def _value(value: Any, otherwise: float = 0.0) -> float:
    """A number of a CSV row, which may be text or missing."""
    return float(value) if _given(value) else otherwise


def _cell(key: str, value: Any) -> str:
    if not _given(value):
        return "-"
    if key in _WORDS:
        return str(value)
    if key == "volume_score":
        return tables.significant(float(value))
    digits = {"healthy_percentile": 1, "lesion_ml": 2}.get(key, 3)
    return tables.number(float(value), 2 if key.startswith("found_ml") else digits)
