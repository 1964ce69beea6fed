"""What a table allows to be said: the model against the best baseline, and shams."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uad_jax.measuring import VolumeResult
from uad_jax.metrics import statistics

MIN_PATIENTS_TO_BEAT = 20  # fewer: "above" or "below", no more
MIN_PATIENTS_TO_RANK = 5  # fewer: no interval, no ranking

Results = Mapping[str, Sequence[VolumeResult]]


def interval(
    results: Sequence[VolumeResult], values: Sequence[float], num_samples: int
) -> statistics.Interval:
    """Interval of the mean over volumes; patients, the statistical unit, are drawn."""
    return statistics.bootstrap_volumes(
        {one.info.subject: value for one, value in zip(results, values, strict=True)},
        {one.info.subject: one.info.patient for one in results},
        num_samples=num_samples,
    )


def num_patients(results: Sequence[VolumeResult]) -> int:
    """How many patients the volumes are of."""
    return len({one.info.patient for one in results})


def _lesions(results: Sequence[VolumeResult]) -> list[VolumeResult]:
    return [one for one in results if one.has_lesion]


def cases(found: Results) -> dict[str, dict[str, float]]:
    """Subject -> scorer -> AP, where there are too few patients for a mean."""
    rows: dict[str, dict[str, float]] = {}
    for name, results in found.items():
        lesions = _lesions(results)
        if num_patients(lesions) < MIN_PATIENTS_TO_RANK:
            for one in lesions:
                rows.setdefault(one.info.subject, {})[name] = one.ap
    return rows


def compare(found: Results, num_samples: int) -> dict[str, Any]:
    """The model's AP against the best baseline's, paired by volume."""
    lesions = {name: _lesions(results) for name, results in found.items()}
    model, *others = lesions
    own = lesions[model]
    if not others or num_patients(own) < MIN_PATIENTS_TO_RANK:
        return {"num_patients": num_patients(own)}
    precisions = {name: np.array([x.ap for x in one]) for name, one in lesions.items()}
    best = max(others, key=lambda name: precisions[name].mean())
    gaps = precisions[model] - precisions[best]
    found_interval = interval(own, gaps.tolist(), num_samples)
    return {
        "num_patients": num_patients(own),
        "num_volumes": len(own),
        "model": model,
        "best_baseline": best,
        "ap_volume_mean_difference": found_interval.estimate,
        "interval": [found_interval.low, found_interval.high],
    }


def sentence(
    comparison: Mapping[str, Any],
    *,
    undertrained: bool = False,
    missing: Mapping[str, str] | None = None,
) -> str:
    """Puts a comparison into words, no stronger than the numbers allow.

    Args:
      comparison: From `compare`.
      undertrained: Whether the run saw too little to support a claim.
      missing: Baseline -> why it could not be computed.
    """
    text = with_missing(_compared(comparison), missing or {})
    if undertrained and "interval" in comparison:
        text += " It is undertrained, so this says nothing about the method."
    return text


def with_missing(text: str, missing: Mapping[str, str]) -> str:
    """Weakens what is said of baselines by those that could not be computed.

    Args:
      text: A verdict; what was weakened already, or names no baseline, stays.
      missing: Baseline -> why it could not be computed.
    """
    listed = "; ".join(f"{name} is missing: {why}" for name, why in missing.items())
    if not missing or listed in text or "baseline" not in text:
        return text
    text = text.replace("the baselines", "the baselines that could be computed")
    return f"{text.removesuffix('.')}; {listed}{'.' if text.endswith('.') else ''}"


def _compared(comparison: Mapping[str, Any]) -> str:
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
        implants = [one for one, _ in pairs]
        gaps = np.subtract(real, fake)
        bounds = None
        if num_patients(implants) >= MIN_PATIENTS_TO_RANK:
            drawn = interval(implants, gaps.tolist(), num_samples)
            bounds = [drawn.low, drawn.high]
        table[name] = {
            "num_pairs": len(pairs),
            "implant_mean": float(np.mean(real)),
            "sham_mean": float(np.mean(fake)),
            "implant_minus_sham": float(gaps.mean()),
            "interval": bounds,
        }
    return table
