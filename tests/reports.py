"""Results as the report gets them, and the report as a reader sees it."""

import html.parser
import io
import math
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from uad_jax import report

RULES = ("healthy_fpr", "healthy_fpr_1", "healthy_fpr_5", "healthy_fpr_10", "validated")
SCORERS = ("vae", "raw intensity", "atlas-z")
Json = dict[str, Any]


class Page(html.parser.HTMLParser):
    """What a reader sees: text, headings, tables as lists of rows, and sources."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}  # by caption
        self.facts: dict[str, str] = {}
        self.headings: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self._caption = self._term = ""
        self.feed(text)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [v or "" for k, v in attrs if k in ("src", "href", "srcset")]
        if tag in ("img", "meta"):
            return
        self._open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        elif tag == "dt":
            self._term = ""
        elif tag == "h2":
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes another element"
        if tag == "table":
            assert self._caption not in self.tables
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        if "caption" in self._open:
            self._caption += data
        elif "small" in self._open:
            self._rows[-1][-1] += f" {data}"
        elif "td" in self._open or "th" in self._open:
            self._rows[-1][-1] += data
        elif "dt" in self._open:
            self._term += data
        elif "dd" in self._open:
            self.facts[self._term] = self.facts.get(self._term, "") + data
        elif "h2" in self._open:
            self.headings[-1] += data


class _Numbers:
    """Gives every figure another value, so that none can stand for another."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def __call__(self, scale: float = 1.0) -> float:
        return float(scale * self._rng.uniform(0.01, 0.99))


def _metrics(draw: _Numbers) -> Json:
    found: Json = {"num_volumes": 36, "num_lesion": 24}
    for key in (
        "ap_pooled",
        "ap_volume_mean",
        "auroc_pooled",
        "auroc_volume_mean",
        "dice_ceiling_pooled",
        "dice_ceiling_threshold",
        "dice_ceiling_volume_mean",
        "lesion_contrast_volume_mean",
        "slice_auroc",
        "volume_auroc",
    ):
        found[key] = draw()
    found["ap_volume_mean_interval"] = sorted([draw(), draw()])
    found["ap_pooled_interval"] = sorted([draw(), draw()])
    found["prevalence_pooled"] = draw(0.02)
    for rule in RULES:
        found |= {
            f"dice_{rule}_volume_mean": draw(),
            f"dice_{rule}_volume_mean_interval": sorted([draw(), draw()]),
            f"dice_{rule}_pooled": draw(),
            f"precision_{rule}_pooled": draw(),
            f"recall_{rule}_pooled": draw(),
            f"lesion_recall_{rule}": draw(),
            f"lesion_precision_{rule}": draw(),
            f"lesion_f1_{rule}": draw(),
            f"false_positive_ml_{rule}_healthy_mean": draw(40),
            f"false_components_{rule}_healthy_mean": draw(30),
        }
    found["by_lesion_size"] = {
        "< 0.1 ml": {"num_lesions": 41, "recall": draw()},
        ">= 10 ml": {"num_lesions": 7, "recall": draw()},
    }
    found["by_load"] = {
        "< 1 ml": {
            "num_volumes": 6,
            "ap_volume_mean": draw(),
            "dice_volume_mean": draw(),
        },
        ">= 10 ml": {
            "num_volumes": 18,
            "ap_volume_mean": draw(),
            "dice_volume_mean": draw(),
        },
    }
    return found


def complete() -> Json:
    """Results with everything the schema has, each figure another number."""
    draw = _Numbers()
    return {
        "run": {
            "name": "vae",
            "source": "checkpoint",
            "method": "VaeConfig",
            "step": 12000,
            "seed": 3,
            "environment": {
                "uad_jax": "0.1",
                "commit": "abc123def456",
                "device_kind": "cpu",
                "num_devices": 8,
                "packages": {"jax": "0.10.2"},
            },
            "data_fingerprint": "fedcba9876543210" * 4,
            "config": {"name": "vae", "evaluation": {"healthy_fpr": 0.05}},
            "training": {
                "slices_seen": 192000,
                "percent_of_reference": 31.25,
                "validation_slope": -0.0123,
                "train_seconds": 4321.0,
                "undertrained": False,
            },
            "evaluation_seconds": 56.7,
            "timings": {"calibrate": 12.3, "score": 34.5, "draw": 9.9},
        },
        "set": {
            "name": "test",
            "split": "test",
            "protocol": "behrendt",
            "group_by": "kind",
            "recipe": "grid2mm",
            "modalities": ["flair"],
            "data_kind": "synthetic",
            "licences": ["a licence"],
            "num_volumes": 40,
            "num_abnormal": 24,
            "num_healthy": 12,
            "num_sham": 4,
            "num_annotated_abnormal": 23,
            "num_patients": 38,
            "fingerprint": "0123456789abcdef" * 4,
            "voxel_ml": 0.008,
        },
        "operating": {"rule": "healthy_fpr", "threshold": 0.123456},
        "pooled": "exact",
        "thresholds": [
            {
                "rule": f"healthy false-positive rate {rate} %",
                "value": draw(),
                "source": "8 healthy validation volumes, no labels",
            }
            for rate in (1, 5, 10)
        ]
        + [
            {
                "rule": "validated",
                "value": draw(),
                "source": "best pooled Dice on 12 abnormal validation scans",
            }
        ],
        "scorers": {name: _metrics(draw) for name in SCORERS},
        "unprocessed": {name: _metrics(draw) for name in SCORERS},
        "groups": {
            group: {name: _metrics(draw) for name in SCORERS}
            for group in ("ms", "tumour")
        },
        "cases": {},
        "comparison": {"best_baseline": "atlas-z"},
        "verdict": "The model does not beat the baselines.",
        "sham": {
            name: {
                "num_pairs": 4,
                "implant_mean": draw(),
                "sham_mean": draw(),
                "implant_minus_sham": draw(),
                "interval": sorted([draw(), draw()]),
            }
            for name in SCORERS
        },
        "healthy_reconstruction": {
            "l1_box": draw(0.1),
            "l1_brain": draw(0.1),
            "psnr": draw(40),
            "ssim": draw(),
        },
        "counts": {"volumes without annotation": 0, "lesion voxels": 104329},
    }


def no_lesion(labels: bool = True) -> tuple[Json, list[Json]]:
    """Results of a set without masks, and its per-subject rows as in the CSV."""
    results = complete()
    draw = _Numbers()
    auroc = draw() if labels else math.nan
    for key in ("unprocessed", "groups", "cases", "sham", "healthy_reconstruction"):
        results[key] = {}
    results["scorers"] = {
        name: {
            "num_volumes": 4,
            "num_lesion": 0,
            "slice_auroc": math.nan,
            "volume_auroc": auroc,
        }
        for name in ("vae", "atlas-z")
    }
    results["comparison"] = {"num_patients": 0}
    results["thresholds"] = results["thresholds"][:3]
    results["verdict"] = "No annotated lesions: there are no voxel figures."
    subjects = [
        {
            "scorer": "vae",
            "subject": f"scan-{number}",
            "patient": f"scan-{number}",
            "label": "abnormal" if number % 2 else "healthy",
            "kind": "",
            "volume_score": 0.1 + 0.01 * number,
            "healthy_percentile": 25.0 * number,
            "ap": "",
        }
        for number in range(4)
    ]
    return results, subjects


def from_maps() -> Json:
    """Results of maps made elsewhere."""
    results = complete()
    results["run"] |= {
        "source": "maps",
        "method": "maps made elsewhere",
        "step": None,
        "seed": None,
        "config": None,
        "training": None,
    }
    results["healthy_reconstruction"] = {}
    return results


def old() -> Json:
    """Results of the first schema."""
    results = complete()
    for key in ("operating", "pooled", "unprocessed", "sham"):
        del results[key]
    for key in ("source", "timings"):
        del results["run"][key]
    for key in ("num_sham", "fingerprint", "voxel_ml", "num_patients"):
        del results["set"][key]
    kept = (
        "ap_pooled",
        "ap_volume_mean",
        "ap_volume_mean_interval",
        "auroc_pooled",
        "dice_healthy_fpr_volume_mean",
        "dice_ceiling_pooled",
        "slice_auroc",
        "volume_auroc",
    )
    results["scorers"] = {
        name: {key: metrics[key] for key in kept}
        | {"false_positive_voxels_healthy_fpr_healthy_mean": 8655.2}
        for name, metrics in results["scorers"].items()
    }
    return results


def _picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, format="png")
    return buffer.getvalue()


FIGURES = (
    "training",
    "roc",
    "precision_recall",
    "dice",
    "cases",
    "volume_scores",
    "gallery",
)


def written(
    folder: pathlib.Path,
    results: Json,
    names: tuple[str, ...] = (),
    subjects: list[Json] | None = None,
) -> tuple[str, Page]:
    path = folder / "report.html"
    drawn = {name: _picture() for name in names}
    report.write(path, results, drawn, subjects=subjects or [])
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def table(page: Page, heading: str) -> list[list[str]]:
    """The table whose last line of headings holds a heading."""
    for rows in page.tables.values():
        if any(heading in row for row in rows[:2]):
            return rows
    raise AssertionError(f"no table with {heading!r}: {list(page.tables)}")


def cell(metrics: Json, key: str, digits: int = 3) -> str:
    text = f"{metrics[key]:.{digits}f}"
    if f"{key}_interval" in metrics:
        low, high = metrics[f"{key}_interval"]
        text += f" [{low:.{digits}f}, {high:.{digits}f}]"
    return text
