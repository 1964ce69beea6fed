"""Collects results of runs and renders the tables of the docs from them.

    python docs/render_results.py --add=synthetic runs/study/*/     # collect
    python docs/render_results.py --pairs=diffusion_t2 COMPARE_DIR  # of run.py compare
    python docs/render_results.py                                   # render only

Collected JSON files lie in `docs/results/<family>/` and are committed. Tables stand
between `<!-- table: family -->` and `<!-- end -->` in `docs/results_<family>.md`.
"""

import argparse
import functools
import json
import pathlib
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

DOCS = pathlib.Path(__file__).resolve().parent
KEPT = ("scorers", "groups", "comparison", "healthy_reconstruction", "counts", "set")
KEPT += ("unprocessed", "cases", "sham", "operating", "pooled")
_RENAMED = {"prevalence": "constant map"}  # the erosion lifts it above the prevalence


def collect(family: str, workdirs: list[pathlib.Path]) -> None:
    """Copies what the tables need from the results of runs."""
    folder = DOCS / "results" / family
    folder.mkdir(parents=True, exist_ok=True)
    for workdir in workdirs:
        for path in sorted((workdir / "results").glob("*.json")):
            results = json.loads(path.read_text(encoding="utf-8"))
            run = results["run"]
            slim = _renamed({key: results[key] for key in KEPT if key in results})
            slim["run"] = {
                key: run.get(key)
                for key in ("name", "seed", "step", "training", "imported")
            } | {
                "commit": run["environment"]["commit"],
                "device": run["environment"]["device_kind"],
                # Of runs that it starts from the name, not the place on one machine.
                "source": re.sub(r"=[^,=]*/", "=", run["config"]["source"]),
                "batch_size": run["config"]["batch_size"],
                "data_fingerprint": run["data_fingerprint"],
            }
            name = f"{workdir.name}_{path.name}"
            text = json.dumps(_rounded(slim), indent=1, sort_keys=True)
            (folder / name).write_text(text + "\n", encoding="utf-8")


def collect_pairs(name: str, folder: pathlib.Path) -> None:
    """Copies the paired comparisons of methods that `run.py compare` wrote."""
    found = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    slim = {key: found[key] for key in ("group_pairs", "set", "notes")}
    slim["members"] = {key: one["members"] for key, one in found["groups"].items()}
    target = DOCS / "results" / "pairs"
    target.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded(slim), indent=1, sort_keys=True)
    (target / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def _renamed(value: Any) -> Any:
    """Gives the scorers of older results the names that they have today."""
    if isinstance(value, dict):
        return {_RENAMED.get(key, key): _renamed(one) for key, one in value.items()}
    return [_renamed(one) for one in value] if isinstance(value, list) else value


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value


def load(family: str, set_name: str = "") -> list[dict[str, Any]]:
    """Reads the collected results of one family; of one set, if it is named."""
    paths = sorted((DOCS / "results" / family).glob("*.json"))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return [one for one in found if not set_name or one["set"]["name"] == set_name]


def detection_tables(results: list[dict[str, Any]]) -> str:
    """One table per modality: models over seeds, then the baselines."""
    parts = []
    for modality, runs in _grouped(results, _modality).items():
        _check_comparable(runs)
        facts = runs[0]["set"]
        kinds = sorted(runs[0]["groups"])
        keys = _led_by(facts.get("headline") or (), _FIGURES)
        head = ["", *(_FIGURES[key] for key in keys)]
        head += [f"AP {kind}" for kind in kinds]
        head += ["seeds beating the best baseline", "trained"]
        rows = [
            _detection_row(name, members, keys, kinds)
            for name, members in _grouped(runs, lambda run: run["run"]["name"]).items()
        ]
        own = runs[0]["run"]["name"]  # by name: the keys of the files are sorted
        for baseline in runs[0]["scorers"]:
            if baseline != own:
                rows.append(_baseline_row(baseline, runs, keys, kinds))
        caption = (
            f"**{modality.upper()}**, {facts['num_annotated_abnormal']} lesion and "
            f"{facts['num_healthy']} healthy test volumes ({facts['data_kind']}), "
            f"protocol `{facts['protocol']}`. Models: mean ± sd over seeds."
        )
        parts.append(caption + "\n\n" + _markdown(head, rows))
    return "\n\n".join(parts)


def _check_comparable(runs: list[dict[str, Any]]) -> None:
    """Figures of other data, splits, protocols or subjects never share a table."""
    for what in ("protocol", "data_kind", "split", "recipe", "num_volumes"):
        found = sorted({str(run["set"][what]) for run in runs})
        if len(found) > 1:
            names = ", ".join(run["run"]["name"] for run in runs)
            raise ValueError(
                f"One table would hold results of several kinds ({names}): {what} is "
                f"{' and '.join(found)}. Collect them into another family."
            )


def _wins(runs: list[dict[str, Any]]) -> str:
    """How many seeds beat the best baseline, where the rules let that be said."""
    comparisons = [run["comparison"] for run in runs]
    if any("interval" not in one for one in comparisons):
        return "too few patients"
    if any(_patients(one) < 20 for one in comparisons):
        above = sum(one["ap_volume_mean_difference"] > 0 for one in comparisons)
        return f"above in {above} of {len(runs)} (too few patients to beat)"
    return f"{sum(one['interval'][0] > 0 for one in comparisons)} of {len(runs)}"


def _patients(comparison: dict[str, Any]) -> int:
    """Patients compared; in older results, where each had one scan, subjects."""
    return comparison.get("num_patients", comparison.get("num_subjects"))


def _state(runs: list[dict[str, Any]]) -> str:
    """Slices seen, share of the reference budget, slope, and what follows."""
    if any(run["run"].get("imported") for run in runs):
        files = {run["run"]["imported"]["file"] for run in runs}
        return f"imported weights ({', '.join(sorted(files))}), training unknown"
    states = [run["run"]["training"] for run in runs]
    share = states[0]["percent_of_reference"]
    text = f"{_slices(states)} slices"
    text += "" if share is None else f" ({_number(share, 1)} % of the budget)"
    text += f", slope {_spread([state['validation_slope'] for state in states])}"
    undertrained = any(state["undertrained"] for state in states)
    return text + (", **undertrained**" if undertrained else "")


def _slices(states: list[dict[str, Any]]) -> str:
    seen = [state["slices_seen"] for state in states]
    low, high = min(seen), max(seen)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _detection_row(
    name: str, runs: list[dict[str, Any]], keys: list[str], kinds: list[str]
) -> list:
    scores = [run["scorers"][run["run"]["name"]] for run in runs]
    groups = [run["groups"] for run in runs]
    cells = [name]
    cells += [_spread([score.get(key) for score in scores]) for key in keys]
    for kind in kinds:
        values = [group[kind][name]["ap_volume_mean"] for group in groups]
        cells.append(_spread(values))
    return [*cells, _wins(runs), _state(runs)]


def _baseline_row(
    name: str, runs: list[dict[str, Any]], keys: list[str], kinds: list[str]
) -> list[str]:
    """The same in every run; older results lack some figures."""
    scores = [run["scorers"][name] for run in runs if name in run["scorers"]]
    cells = [name]
    for key in keys:
        found = (score[key] for score in scores if key in score)
        cells.append(_number(next(found, None)))
    groups = runs[0]["groups"]
    cells += [_number(groups[kind][name]["ap_volume_mean"]) for kind in kinds]
    return [*cells, "", ""]


_FIGURES = {
    "ap_volume_mean": "AP volume mean",
    "ap_pooled": "AP pooled",
    "auroc_pooled": "AUROC pooled",
    "dice_healthy_fpr_volume_mean": "Dice healthy threshold",
    "dice_validated_volume_mean": "Dice validated",
    "dice_ceiling_pooled": "Dice ceiling (labels)",
    "lesion_contrast_volume_mean": "lesion contrast",
}


def _led_by(headline: Any, keys: Any) -> list[str]:
    """The keys, those first that the results' protocol puts first."""
    return [*(key for key in headline if key in keys)] + [
        key for key in keys if key not in headline
    ]


def case_table(results: list[dict[str, Any]]) -> str:
    """Single cases: no mean, no interval, no ranking."""
    parts = []
    for subject in sorted({name for run in results for name in run["cases"]}):
        runs = [run for run in results if subject in run["cases"]]
        _check_comparable(runs)
        facts = runs[0]["set"]
        head = ["", "AP", "AUROC", "Dice healthy threshold", "Dice ceiling (labels)"]
        head += ["lesions found", "trained"]
        rows = []
        for name, members in _grouped(runs, lambda run: run["run"]["name"]).items():
            rows.append([*_case_row(name, members), _state(members)])
        own = runs[0]["run"]["name"]
        rows += [
            [*_case_row(name, runs[:1], name), ""]
            for name in runs[0]["scorers"]
            if name != own
        ]
        caption = f"**{subject}**, {_modality(runs[0]).upper()} ({facts['data_kind']})"
        parts.append(
            f"{caption}, protocol `{facts['protocol']}`.\n\n" + _markdown(head, rows)
        )
    return "\n\n".join(parts)


def _case_row(name: str, runs: list[dict[str, Any]], scorer: str = "") -> list[str]:
    scores = [run["scorers"][scorer or run["run"]["name"]] for run in runs]
    keys = ("ap_pooled", "auroc_pooled", "dice_healthy_fpr_volume_mean")
    keys += ("dice_ceiling_pooled", "lesion_recall_healthy_fpr")
    return [name, *(_spread([score.get(key) for score in scores]) for key in keys)]


def pair_table(name: str) -> str:
    """Paired differences between methods, over patients, each the mean of its runs."""
    path = DOCS / "results" / "pairs" / f"{name}.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    facts = found["set"]
    head = ["first", "second", "figure", "first mean", "second mean", "difference"]
    head += ["relative", "95 % interval", "p (Holm)", "patients", "verdict"]
    rows = []
    for pair in found["group_pairs"]:
        low, high = pair["interval"] or (None, None)
        relative = pair["difference"] / pair["second_mean"]
        cells = [pair["first"], pair["second"], pair["heading"]]
        cells += [_number(pair[key]) for key in ("first_mean", "second_mean")]
        cells += [f"{pair['difference']:+.3f}", f"{100 * relative:+.0f} %"]
        cells += ["-" if low is None else f"[{low:+.3f}, {high:+.3f}]"]
        cells += [_number(pair["p_holm"], 4), str(pair["num_patients"])]
        rows.append([*cells, "; ".join([pair["verdict"], *pair["notes"]])])
    caption = (
        f"{'+'.join(facts['modalities']).upper()}, {facts['data_kind']}, split "
        f"{facts['split']}, protocol `{facts['protocol']}`: paired over patients, "
        "permutation test; Holm's p is over the tests of one figure."
    )
    return caption + "\n\n" + _markdown(head, rows)


def sham_table(results: list[dict[str, Any]]) -> str:
    """Mean score inside the mask, implants against their shams."""
    _check_comparable(results)
    head = ["", "pairs", "implant", "sham", "difference", "95 % interval"]
    rows = []
    for name, runs in _grouped(results, lambda run: run["run"]["name"]).items():
        rows.append(_sham_row(name, [run["sham"][name] for run in runs]))
    own = {run["run"]["name"] for run in results}
    for name, row in results[0]["sham"].items():
        if name not in own and name != "constant map":
            rows.append(_sham_row(name, [row]))
    return _markdown(head, rows)


def _sham_row(name: str, found: list[dict[str, Any]]) -> list[str]:
    interval = "-"
    if len(found) == 1 and found[0]["interval"]:
        low, high = found[0]["interval"]
        interval = f"[{low:.4f}, {high:.4f}]"
    cells = [
        _spread([one[key] for one in found], 4)
        for key in ("implant_mean", "sham_mean", "implant_minus_sham")
    ]
    return [name, str(found[0]["num_pairs"]), *cells, interval]


def training_table(results: list[dict[str, Any]]) -> str:
    """How far every model was trained, and how well it reconstructs healthy scans."""
    head = ["modality", "method", "split", "seeds", "slices seen"]
    head += ["% of reference budget"]
    head += ["slope of validation loss, last 20 %", "state", "training s"]
    head += ["healthy L1 (brain)", "healthy SSIM", "healthy PSNR, dB", "commit"]
    rows = []
    for (modality, name, split), runs in _grouped(
        results,
        lambda run: (_modality(run), run["run"]["name"], run["set"]["split"]),
    ).items():
        if any(run["run"].get("imported") for run in runs):
            continue  # how they were trained is not known
        states = [run["run"]["training"] for run in runs]
        healthy = [run["healthy_reconstruction"] for run in runs]
        undertrained = any(state["undertrained"] for state in states)
        rows.append(
            [
                modality,
                name,
                split,
                str(len(runs)),
                _slices(states),
                _number(states[0]["percent_of_reference"], 1),
                _spread([state["validation_slope"] for state in states]),
                "**undertrained**" if undertrained else "",
                _spread([state["train_seconds"] for state in states], 0),
                _spread([one.get("l1_brain") for one in healthy], 4),
                _spread([one.get("ssim") for one in healthy]),
                _spread([one.get("psnr") for one in healthy], 1),
                ", ".join(sorted({run["run"]["commit"] for run in runs})),
            ]
        )
    return _markdown(head, rows)


def _modality(run: dict[str, Any]) -> str:
    return "+".join(run["set"]["modalities"])


def _grouped(runs: list[dict[str, Any]], key: Any) -> dict[Any, list[dict[str, Any]]]:
    groups = defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return dict(sorted(groups.items()))


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _spread(values: list[float | None], digits: int = 3) -> str:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"  # a mean over some of the seeds would look like one over all
    if len(known) == 1:
        return _number(known[0], digits)
    mean, sd = np.mean(known), np.std(known, ddof=1)
    return f"{mean:.{digits}f} ± {sd:.{digits}f}"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


TABLES: dict[str, Callable[[], str]] = {
    "synthetic-detection": lambda: detection_tables(load("synthetic")),
    "synthetic-training": lambda: training_table(load("synthetic")),
    "real-training": lambda: training_table(
        [*load("real", "val"), *load("real", "test")]
    ),
    "real-implants": lambda: detection_tables(load("real", "test")),
    "real-shams": lambda: sham_table(load("real", "test")),
    "real-mslub": lambda: case_table(load("real", "mslub")),
    "real-tcga": lambda: case_table(load("real", "tcga")),
}


def tables() -> dict[str, Callable[[], str]]:
    """All tables by name; every collected comparison is one of pairs."""
    names = [path.stem for path in (DOCS / "results" / "pairs").glob("*.json")]
    return TABLES | {
        f"{name.replace('_', '-')}-pairs": functools.partial(pair_table, name)
        for name in sorted(names)
    }


def render() -> None:
    """Fills the tables of every results page."""
    for page in sorted(DOCS.glob("results_*.md")):
        text = page.read_text(encoding="utf-8")
        for name, table in tables().items():
            pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
            if re.search(pattern, text, re.S):
                body = table()
                text = re.sub(
                    pattern,
                    lambda found, body=body: f"{found[1]}{body}\n{found[2]}",
                    text,
                    flags=re.S,
                )
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--add", metavar="FAMILY", help="synthetic or real")
    parser.add_argument("--pairs", metavar="NAME", help="of a folder of run.py compare")
    parser.add_argument("workdirs", nargs="*", type=pathlib.Path)
    arguments = parser.parse_args()
    if arguments.add:
        collect(arguments.add, arguments.workdirs)
    if arguments.pairs:
        collect_pairs(arguments.pairs, *arguments.workdirs)
    render()
