"""Results of single volumes, made into the figures of a table.

Pooled figures and means over volumes are different things and never share a name.
Detection figures are over annotated abnormal volumes; slice- and volume-level ones
also over the healthy volumes. Slices of abnormal volumes without annotation count
nowhere: which of them hold lesion is not known. Sham implants count in no figure but
their own. Intervals resample patients. What the data do not define is absent.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uad_jax import verdict
from uad_jax.measuring import VolumeResult
from uad_jax.metrics import accumulators, lesionwise, statistics, voxel
from uad_jax.scoring import Stage

Results = Mapping[str, Sequence[VolumeResult]]  # scorer -> volumes


def summarize(
    found: Mapping[Stage, Results],
    *,
    group_by: str,
    num_samples: int,
    rule: str | None,
    undertrained: bool = False,
    missing_baselines: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Makes the tables of one evaluation.

    Args:
      found: Stage -> scorer -> results; what is evaluated comes first, then the
        baselines.
      group_by: Extra column of the manifest that splits the table.
      num_samples: Bootstrap resamplings of the patients.
      rule: Of the operating threshold; None without thresholds.
      undertrained: Whether the run saw too little to support a claim.
      missing_baselines: Baseline -> why it could not be computed.

    Returns:
      "scorers", "unprocessed", "pooled", "groups", "cases", "comparison", "verdict",
      "sham", "healthy_reconstruction" and "counts" of the results file.
    """
    processed = found[Stage.PROCESSED]
    model = next(iter(processed.values()))
    comparison = verdict.compare(processed, num_samples)
    return {
        "scorers": _table(processed, num_samples, rule),
        "unprocessed": _table(found.get(Stage.UNPROCESSED, {}), num_samples, rule),
        "pooled": "exact" if _exact(model) else "histogram",
        "groups": _groups(processed, group_by, rule),
        "cases": verdict.cases(processed),
        "comparison": comparison,
        "verdict": verdict.sentence(
            comparison, undertrained=undertrained, missing=missing_baselines
        ),
        "sham": verdict.sham(processed, num_samples),
        "healthy_reconstruction": _healthy_reconstruction(model),
        "counts": _counts(model, rule),
    }


def _table(
    found: Results, num_samples: int, rule: str | None
) -> dict[str, dict[str, Any]]:
    return {
        name: metrics(results, rule, num_samples) for name, results in found.items()
    }


def _groups(found: Results, group_by: str, rule: str | None) -> dict[str, Any]:
    model = next(iter(found.values()))
    names = sorted({_group(one, group_by) for one in model if one.abnormal})
    if len(names) < 2:
        return {}
    return {
        group: {
            name: metrics(
                [one for one in results if _belongs(one, group_by, group)], rule
            )
            for name, results in found.items()
        }
        for group in names
    }


def _group(result: VolumeResult, group_by: str) -> str:
    return result.info.extra.get(group_by, "")


def _belongs(result: VolumeResult, group_by: str, group: str) -> bool:
    return not result.abnormal or _group(result, group_by) == group


def metrics(
    results: Sequence[VolumeResult], rule: str | None, num_samples: int = 0
) -> dict[str, Any]:
    """The figures of one row; those that the data do not define are absent.

    Args:
      results: The volumes.
      rule: Of the operating threshold.
      num_samples: Bootstrap resamplings; 0 = no intervals.

    Returns:
      Name -> figure, "<name>_interval" -> [low, high], and "interval_patients": name
      -> how many patients its interval rests on.
    """
    results = [one for one in results if not one.sham]
    lesions = [one for one in results if one.has_lesion]
    row: dict[str, Any] = {"num_volumes": len(results), "num_lesion": len(lesions)}
    if lesions:
        row |= _voxel_metrics(lesions, num_samples)
        row |= _load_strata(lesions, rule)
    for name in results[0].found if results else ():
        row |= _threshold_metrics(results, lesions, name, name == rule, num_samples)
    # In an abnormal volume with an empty mask no slice is known to be healthy.
    known = [one for one in results if one.annotated and one.abnormal <= one.has_lesion]
    slices = [(one.slice_score, one.slice_lesion) for one in known]
    row |= _label_auroc("slice_auroc", known, slices, num_samples)
    volumes = [
        (np.array([one.volume_score]), np.array([one.abnormal])) for one in results
    ]
    row |= _label_auroc("volume_auroc", results, volumes, num_samples)
    return _plain(row)


def _label_auroc(
    name: str,
    results: Sequence[VolumeResult],
    labelled: Sequence[tuple[np.ndarray, np.ndarray]],
    num_samples: int,
) -> dict[str, Any]:
    """AUROC of the scores and labels that each volume has."""
    scores = np.concatenate([np.zeros(0, np.float32), *(one for one, _ in labelled)])
    labels = np.concatenate([np.zeros(0, bool), *(one for _, one in labelled)])
    patients = np.array(
        [
            one.info.patient
            for one, (own, _) in zip(results, labelled, strict=True)
            for _ in own
        ],
        str,
    )
    row: dict[str, Any] = {name: voxel.label_auroc(scores, labels)}
    fewest = min(len(np.unique(patients[labels == kind])) for kind in (True, False))
    if num_samples and fewest >= verdict.MIN_PATIENTS_TO_RANK:
        row[f"{name}_interval"] = statistics.bootstrap_auroc(
            scores, labels, patients.tolist(), num_samples=num_samples
        )
    return row


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Drops what is undefined, and makes intervals plain values."""
    plain: dict[str, Any] = {}
    patients: dict[str, int] = {}
    for key, value in row.items():
        if isinstance(value, statistics.Interval):
            if not math.isnan(value.low):
                plain[key] = [value.low, value.high]
                patients[key.removesuffix("_interval")] = value.num_subjects
        elif not (isinstance(value, float) and math.isnan(value)):
            plain[key] = value
    return plain | ({"interval_patients": patients} if patients else {})


def _exact(results: Sequence[VolumeResult]) -> bool:
    return all(one.voxels is not None for one in results)


def _voxel_metrics(lesions: Sequence[VolumeResult], num_samples: int) -> dict[str, Any]:
    row: dict[str, Any] = _pooled(lesions) | _reach(lesions)
    row |= {
        "ap_volume_mean": _mean([one.ap for one in lesions]),
        "auroc_volume_mean": _mean([one.auroc for one in lesions]),
        "dice_ceiling_volume_mean": _mean([one.dice_ceiling for one in lesions]),
        "lesion_contrast_volume_mean": _known_mean(
            [one.lesion_contrast for one in lesions]
        ),
    }
    if not num_samples or _too_few(lesions):
        return row
    row["ap_volume_mean_interval"] = verdict.interval(
        lesions, [one.ap for one in lesions], num_samples
    )
    histograms = [(one.bins, one.outside) for one in lesions if one.bins is not None]
    if len(histograms) == len(lesions):
        bins, outside = statistics.sum_by_unit(
            np.stack([bins for bins, _ in histograms]),
            np.stack([outside for _, outside in histograms]),
            [one.info.patient for one in lesions],
        )
        for name, metric in statistics.POOLED.items():
            row[f"{name}_interval"] = statistics.bootstrap_histograms(
                metric, bins, outside, num_samples=num_samples
            )
    return row


def _reach(lesions: Sequence[VolumeResult]) -> dict[str, float]:
    """What brain mask and erosion leave to be found, by a perfect map.

    Such a map finds every lesion voxel within the eroded brain and nothing else.
    """
    total = sum(one.lesion_voxels for one in lesions)
    outside = sum(one.outside_lesion for one in lesions)
    return {
        "out_of_reach_percent_pooled": 100 * outside / total,
        "dice_reachable_pooled": 2 * (total - outside) / (2 * total - outside),
    }


def _pooled(lesions: Sequence[VolumeResult]) -> dict[str, float]:
    """Figures of all voxels together: exact, or of the summed histograms."""
    voxels = [one.voxels for one in lesions if one.voxels is not None]
    if len(voxels) == len(lesions):
        ranking = voxel.rank(voxel.pool(voxels))
        ceiling, threshold = voxel.best_dice(ranking)
        total = ranking.num_lesion + ranking.num_normal
        return {
            "ap_pooled": voxel.average_precision(ranking),
            "auroc_pooled": voxel.auroc(ranking),
            "dice_ceiling_pooled": ceiling,
            "dice_ceiling_threshold": threshold,
            "prevalence_pooled": ranking.num_lesion / total,
        }
    bins, outside = summed_histograms(lesions)
    both = bins.sum(axis=1) + outside
    return {
        "ap_pooled": float(accumulators.average_precision(bins, outside)),
        "auroc_pooled": float(accumulators.auroc(bins, outside)),
        "dice_ceiling_pooled": accumulators.best_dice(bins, outside)[0],
        "prevalence_pooled": float(both[1] / both.sum()),
    }


def summed_histograms(
    results: Sequence[VolumeResult],
) -> tuple[np.ndarray, np.ndarray]:
    """Adds the histograms of volumes that have one: bins [2, K + 1], outside [2]."""
    bins = np.stack([one.bins for one in results if one.bins is not None])
    outside = np.stack([one.outside for one in results if one.bins is not None])
    return bins.sum(axis=0, dtype=np.int64), outside.sum(axis=0)


def _load_strata(lesions: Sequence[VolumeResult], rule: str | None) -> dict[str, Any]:
    """Volumes grouped by their whole lesion load."""
    strata: dict[str, list[VolumeResult]] = {
        name: [] for name in lesionwise.stratum_names(lesionwise.LOAD_STRATA)
    }
    for one in lesions:
        load = one.lesion_voxels * one.voxel_ml
        strata[lesionwise.stratum(load, lesionwise.LOAD_STRATA)].append(one)
    return {
        "by_load": {
            name: {
                "num_volumes": len(members),
                "ap_volume_mean": _mean([one.ap for one in members]),
            }
            | (
                {"dice_volume_mean": _mean([m.dice(rule) for m in members])}
                if rule
                else {}
            )
            for name, members in strata.items()
            if members
        }
    }


def _threshold_metrics(
    results: Sequence[VolumeResult],
    lesions: Sequence[VolumeResult],
    rule: str,
    operating: bool,
    num_samples: int,
) -> dict[str, Any]:
    """Figures of the segmentations at one rule's threshold."""
    row: dict[str, Any] = {}
    if lesions:
        values = [one.dice(rule) for one in lesions]
        row[f"dice_{rule}_volume_mean"] = _mean(values)
        if num_samples and not _too_few(lesions):
            row[f"dice_{rule}_volume_mean_interval"] = verdict.interval(
                lesions, values, num_samples
            )
        pooled = voxel.Confusion(
            *np.sum([one.found[rule].counts for one in lesions], axis=0).tolist()
        )
        row[f"dice_{rule}_pooled"] = voxel.dice(pooled)
        row[f"precision_{rule}_pooled"] = voxel.precision(pooled)
        row[f"recall_{rule}_pooled"] = voxel.recall(pooled)
        row |= _lesion_metrics(lesions, rule, operating, num_samples)
    healthy = [one for one in results if one.healthy]
    if healthy:
        found = [one.found[rule].num_voxels * one.voxel_ml for one in healthy]
        row[f"false_positive_ml_{rule}_healthy_mean"] = _mean(found)
        if num_samples and not _too_few(healthy):
            row[f"false_positive_ml_{rule}_healthy_mean_interval"] = verdict.interval(
                healthy, found, num_samples
            )
        counts = [one.found[rule].lesions for one in healthy]
        components = [one.num_components for one in counts if one is not None]
        if components:
            row[f"false_components_{rule}_healthy_mean"] = _mean(components)
    return row


def _lesion_metrics(
    lesions: Sequence[VolumeResult], rule: str, operating: bool, num_samples: int
) -> dict[str, Any]:
    found = [one.found[rule].lesions for one in lesions]
    counts = [one for one in found if one is not None]
    if len(counts) < len(lesions):
        return {}
    pooled = lesionwise.pool(counts)
    row = {
        f"{name}_{rule}": pooled[name]
        for name in ("lesion_recall", "lesion_precision", "lesion_f1")
    }
    if num_samples and not _too_few(lesions):
        row[f"lesion_recall_{rule}_interval"] = statistics.bootstrap_ratio(
            [int(one.found.sum()) for one in counts],
            [len(one.found) for one in counts],
            [one.info.patient for one in lesions],
            num_samples=num_samples,
        )
    return row | ({"by_lesion_size": pooled["by_size"]} if operating else {})


def _too_few(results: Sequence[VolumeResult]) -> bool:
    return verdict.num_patients(results) < verdict.MIN_PATIENTS_TO_RANK


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _known_mean(values: Sequence[float]) -> float:
    """Mean of the values that exist; NaN without any."""
    return _mean([value for value in values if not math.isnan(value)])


def _healthy_reconstruction(results: Sequence[VolumeResult]) -> dict[str, float]:
    healthy = [one.reconstruction for one in results if one.healthy]
    if not healthy or not healthy[0]:
        return {}
    means = {name: _mean([errors[name] for errors in healthy]) for name in healthy[0]}
    return {name: mean for name, mean in means.items() if not math.isnan(mean)}


def _counts(results: Sequence[VolumeResult], rule: str | None) -> dict[str, int]:
    abnormal = [one for one in results if one.abnormal]
    return {
        "volumes without annotation": sum(not one.annotated for one in results),
        "abnormal volumes with an empty mask": sum(
            one.annotated and not one.lesion_voxels for one in abnormal
        ),
        "volumes with neither lesion nor finding (no Dice)": sum(
            rule is not None and one.annotated and bool(np.isnan(one.dice(rule)))
            for one in results
        ),
        "lesion voxels outside the eroded brain": sum(
            one.outside_lesion for one in abnormal
        ),
        "lesion voxels": sum(one.lesion_voxels for one in abnormal),
    }


def subject_row(
    result: VolumeResult, healthy_scores: Sequence[float] = ()
) -> dict[str, Any]:
    """One line of the per-subject table.

    Args:
      result: The volume.
      healthy_scores: Volume scores of healthy validation scans, for the percentile.
    """
    millilitres = result.lesion_voxels * result.voxel_ml
    row: dict[str, Any] = {
        "subject": result.info.subject,
        "patient": result.info.patient,
        "label": result.info.label,
        "kind": result.info.extra.get("kind", ""),
        "annotated": int(result.annotated),
        "volume_score": result.volume_score,
        "healthy_percentile": percentile(result.volume_score, healthy_scores),
        "lesion_ml": round(millilitres, 6) if result.annotated else "",
        "lesion_voxels": result.lesion_voxels,
        "lesion_voxels_outside_brain": result.outside_lesion,
    }
    for name in ("ap", "auroc", "dice_ceiling", "lesion_contrast"):
        value = getattr(result, name)
        row[name] = value if result.has_lesion and not math.isnan(value) else ""
    for rule, found in result.found.items():
        value = result.dice(rule)
        unknown = np.isnan(value) or not result.annotated or result.sham
        row[f"dice_{rule}"] = "" if unknown else value
        row[f"found_ml_{rule}"] = round(found.num_voxels * result.voxel_ml, 6)
    for name in ("l1_brain", "l1_box", "ssim", "psnr"):
        row[name] = result.reconstruction.get(name, "")
    return row


def percentile(score: float, healthy_scores: Sequence[float]) -> float | str:
    """Share of healthy scores below a score, in per cent; "" without any."""
    if not len(healthy_scores):
        return ""
    return round(100.0 * float(np.mean(np.asarray(healthy_scores) < score)), 2)
