"""Workdirs of evaluations that never ran, with figures chosen by the test."""

import csv
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uad_jax import segmentations

FINGERPRINT = "f1" * 32


def fake_run(
    folder: pathlib.Path,
    ap: Mapping[str, float],
    dice: Mapping[str, float] | None = None,
    *,
    name: str = "ae",
    seed: int = 0,
    fold: int = 0,
    learning_rate: float = 0.1,
    set_name: str = "test",
    fingerprint: str = FINGERPRINT,
    protocol: str = "behrendt",
    patients: Mapping[str, str] | None = None,
    healthy: Sequence[str] | Mapping[str, float] = (),
    baselines: Mapping[str, Mapping[str, float]] | None = None,
    metrics: Mapping[str, Any] | None = None,
    slices: int | None = 1000,
    undertrained: bool = False,
    rule: str = "healthy_fpr",
    by_step: Sequence[Mapping[str, Any]] = (),
    losses: Mapping[int, float] | None = None,
    masks: Mapping[str, np.ndarray] | None = None,
    store: str = "",
    found_fingerprint: str = "",
) -> pathlib.Path:
    """Writes one; `slices` None makes it maps of another tool.

    Args:
      folder: The workdir.
      ap: Subject with a lesion -> AP.
      dice: The same for Dice at the operating threshold; default: the AP.
      name: Of the scorer.
      seed: Of the config.
      fold: Of the config.
      learning_rate: Of the config.
      set_name: The set.
      fingerprint: Of the set.
      protocol: Of the set.
      patients: Subject -> patient; default: the subject.
      healthy: Subjects without a lesion; a mapping gives their L1 error too.
      baselines: Name -> subject -> AP.
      metrics: Added to the figures of the model.
      slices: Slices seen.
      undertrained: Of the training state.
      rule: Operating rule.
      by_step: Lines of by_step.csv.
      losses: Step -> validation loss; a step takes half a second.
      masks: Subject -> segmentation.
      store: Where the images are.
      found_fingerprint: Of the segmentations; default: that of the set.

    Returns:
      The folder.
    """
    results = folder / "results"
    results.mkdir(parents=True)
    scorers = {name: ap, **(baselines or {})}
    figures = {
        scorer: {
            "num_lesion": len(values),
            "ap_pooled": float(np.mean(list(values.values()) or [0])),
            "ap_volume_mean": float(np.mean(list(values.values()) or [0])),
        }
        for scorer, values in scorers.items()
    }
    dice = ap if dice is None else dice
    figures[name][f"dice_{rule}_volume_mean"] = float(np.mean(list(dice.values())))
    figures[name] |= metrics or {}
    config = {
        "seed": seed,
        "name": name,
        "data": {"fold": fold, "store": folder.name},
        "train": {"log_every": seed + 1},
        "method": {"learning_rate": learning_rate},
        "evaluation": {"healthy_fpr": 0.05},
    }
    trained = slices is not None
    training = {
        "slices_seen": slices,
        "percent_of_reference": 10.0,
        "train_seconds": 50.0,
        "undertrained": undertrained,
    }
    _dump(
        results / f"{set_name}.json",
        {
            "run": {
                "name": name,
                "source": "checkpoint" if trained else "maps",
                "method": "Method" if trained else "",
                "step": 100 if trained else None,
                "seed": seed if trained else None,
                "config": config if trained else None,
                "data_fingerprint": "d",
                "training": training if trained else None,
                "evaluation_seconds": 3.5,
            },
            "set": {
                "name": set_name,
                "protocol": protocol,
                "fingerprint": fingerprint,
                "modalities": ["t1"],
                "data_kind": "synthetic",
                "num_volumes": len(ap) + len(healthy),
                "num_abnormal": len(ap),
                "num_healthy": len(healthy),
                "num_annotated_abnormal": len(ap),
            },
            "operating": {"rule": rule, "threshold": 0.5},
            "pooled": "exact",
            "scorers": figures,
        },
    )
    errors = healthy if isinstance(healthy, Mapping) else {}
    rows = [
        {
            "scorer": scorer,
            "subject": subject,
            "patient": (patients or {}).get(subject, subject),
            "label": "abnormal" if subject in values else "healthy",
            "annotated": 1,
            "volume_score": values.get(subject, 0.0),
            "ap": values.get(subject, ""),
            f"dice_{rule}": dice.get(subject, "") if scorer == name else 0.1,
            "l1_brain": errors.get(subject, ""),
        }
        for scorer, values in scorers.items()
        for subject in [*values, *healthy]
    ]
    _table(results / f"{set_name}_subjects.csv", rows)
    if by_step:
        _table(results / "by_step.csv", by_step)
    if losses:
        lines = [
            {"step": step, "perf/train_seconds": step / 2, "validation/loss": loss}
            for step, loss in losses.items()
        ]
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text)
    if masks is not None:
        facts = {"fingerprint": found_fingerprint or fingerprint, "store": store}
        segmentations.save(results / f"{set_name}_found.npz", masks, facts)
    return folder


def _dump(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, sort_keys=True))


def _table(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]))
        table.writeheader()
        table.writerows(rows)
