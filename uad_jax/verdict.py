"""What a table allows to be said: the model against the best baseline, and shams."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uad_jax.measuring import VolumeResult
from uad_jax.metrics import statistics

MIN_PATIENTS_TO_BEAT = 20  # fewer: "above" or "below", no more
MIN_PATIENTS_TO_RANK = 5  # fewer: no interval, no ranking

Results = Mapping[str, Sequence[VolumeResult]]


def by_patient(
    results: Sequence[VolumeResult], values: Sequence[float]
) -> dict[str, float]:
    """Averages values of volumes over their patients, the statistical unit."""
    named = {
        one.info.subject: value for one, value in zip(results, values, strict=True)
    }
    return statistics.by_unit(
        named, {one.info.subject: one.info.patient for one in results}
    )


def _lesions(results: Sequence[VolumeResult]) -> list[VolumeResult]:
    return [one for one in results if one.has_lesion]


def cases(found: Results) -> dict[str, dict[str, float]]:
    """Subject -> scorer -> AP, where there are too few patients for a mean."""
    rows: dict[str, dict[str, float]] = {}
    for name, results in found.items():
        lesions = _lesions(results)
        if len({one.info.patient for one in lesions}) < MIN_PATIENTS_TO_RANK:
            for one in lesions:
                rows.setdefault(one.info.subject, {})[name] = one.ap
    return rows


def compare(found: Results, num_samples: int) -> dict[str, Any]:
    """The model's AP against the best baseline's, paired by patient."""
    values = {
        name: by_patient(_lesions(results), [one.ap for one in _lesions(results)])
        for name, results in found.items()
    }
    (model, own), *others = values.items()
    if not others or len(own) < MIN_PATIENTS_TO_RANK:
        return {"num_patients": len(own)}
    best, baseline = max(others, key=lambda item: np.mean(list(item[1].values())))
    difference = statistics.paired_bootstrap(own, baseline, num_samples=num_samples)
    return {
        "num_patients": len(own),
        "num_volumes": len(_lesions(found[model])),
        "model": model,
        "best_baseline": best,
        "ap_volume_mean_difference": difference.estimate,
        "interval": [difference.low, difference.high],
    }


def sentence(comparison: Mapping[str, Any]) -> str:
    """Puts a comparison into words, no stronger than the numbers allow."""
    count = comparison["num_patients"]
    if not count:
        return "No annotated lesions: there are no voxel figures."
    if "interval" not in comparison:
        patients = "1 patient" if count == 1 else f"{count} patients"
        return f"{patients} with annotated lesions: single cases, no ranking."
    low, high = comparison["interval"]
    difference = comparison["ap_volume_mean_difference"]
    volumes = ""
    if comparison["num_volumes"] != count:
        volumes = f" ({comparison['num_volumes']} volumes)"
    text = (
        f"AP (volume mean) minus that of the best baseline, "
        f"{comparison['best_baseline']}: {difference:+.3f}, 95 % interval "
        f"[{low:+.3f}, {high:+.3f}] over {count} patients{volumes}. "
    )
    if count < MIN_PATIENTS_TO_BEAT:
        side = "above" if difference > 0 else "below"
        return (
            f"{text}The model is {side} this baseline; fewer than "
            f"{MIN_PATIENTS_TO_BEAT} patients allow no stronger statement."
        )
    if low > 0:
        return text + "In this run the model beats the baselines (one seed)."
    if high < 0:
        return text + "The model is worse than this baseline."
    return text + "The model does not beat the baselines."


def sham(found: Results, num_samples: int) -> dict[str, dict[str, Any]]:
    """Mean score inside the mask of implants against that of their shams.

    A sham has the mask and the blending of its implant, but the intensity of the
    tissue itself: what scores alike in both is the blending, not the lesion.

    Returns:
      Scorer -> pairs, both means, their difference and its interval over patients
      (None with too few); empty without shams.
    """
    table = {}
    for name, results in found.items():
        named = {one.info.subject: one for one in results}
        pairs = [
            (named[one.info.extra["sham_of"]], one)
            for one in results
            if one.sham and one.info.extra.get("sham_of") in named
        ]
        pairs = [
            pair for pair in pairs if not any(np.isnan(one.mean_inside) for one in pair)
        ]
        if not pairs:
            continue
        real = [one.mean_inside for one, _ in pairs]
        fake = [one.mean_inside for _, one in pairs]
        gaps = by_patient([one for one, _ in pairs], np.subtract(real, fake).tolist())
        interval = None
        if len(gaps) >= MIN_PATIENTS_TO_RANK:
            bounds = statistics.bootstrap_mean(gaps, num_samples=num_samples)
            interval = [bounds.low, bounds.high]
        table[name] = {
            "num_pairs": len(pairs),
            "implant_mean": float(np.mean(real)),
            "sham_mean": float(np.mean(fake)),
            "implant_minus_sham": float(np.mean(np.subtract(real, fake))),
            "interval": interval,
        }
    return table
