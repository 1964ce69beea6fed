"""A run made ready for new scans: its model and what it carries. Opens no store.

The recipe, the modalities and their look, the threshold and the licences of the
training data lie in the workdir, so a run predicts wherever it is copied to.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
from absl import logging

from uad_jax import config as config_lib
from uad_jax import evaluation, lineage, saved_run, scoring
from uad_jax import workdir as workdir_lib
from uad_jax.config import EvaluationSet, ExperimentConfig, ThresholdRule
from uad_jax.data import preprocess, profile, recipes
from uad_jax.metrics import calibration
from uad_jax.metrics.calibration import Calibration


@dataclasses.dataclass(frozen=True, kw_only=True)
class Threshold:
    """At what scores are called abnormal.

    Attributes:
      value: The threshold.
      rule: Name of the rule that gave it.
      source: A sentence on where it comes from.
    """

    value: float
    rule: str
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictor:
    """All that a run carries to predict.

    Attributes:
      config: The run's config.
      step: The checkpoint.
      scorer: Its model.
      recipe: How scans are prepared.
      modalities: Channels of the model.
      profiles: Modality -> look of the training scans; empty in old runs.
      licences: Of the training data; empty for imported weights.
      seen: Content of the training scans, as a store has it; empty for imported ones.
      imported: What is known of weights that another program trained; else None.
      commit: Of the code that trained it.
      calibrated: Calibration on validation scans.
      threshold: At what scores are called abnormal.
      mesh: Devices.
    """

    config: ExperimentConfig
    step: int
    scorer: scoring.Scorer
    recipe: recipes.Recipe
    modalities: tuple[str, ...]
    profiles: dict[str, profile.Profile]
    licences: tuple[str, ...]
    seen: frozenset[str]
    imported: dict[str, Any] | None
    commit: str
    calibrated: Calibration
    threshold: Threshold
    mesh: jax.sharding.Mesh


def restore(
    config: ExperimentConfig,
    workdir: pathlib.Path,
    step: int | None,
    mesh: jax.sharding.Mesh,
    modality: str = "",
) -> Predictor:
    """Restores the model of a run with all that it carries; opens no store.

    Args:
      config: The run's config.
      workdir: The run.
      step: Checkpoint; None = the best, or the latest.
      mesh: Devices.
      modality: Modalities of a run that did not note its own, comma-separated.

    Raises:
      ValueError: The run cannot predict; says what it lacks.
    """
    config_lib.validate(config)
    workdir_lib.refuse_another_config(
        workdir,
        config_lib.to_dict(config),
        functools.partial(config_lib.completed, config),
    )
    data = workdir_lib.read_json(workdir / workdir_lib.FINGERPRINT)
    known = _known(config, workdir, modality)
    recipe = _recipe(workdir, data["recipe"], known["recipe_hash"])
    name, chosen = _evaluation_set(config)
    with saved_run.opened(config, workdir, mesh) as run:
        step = run.default_step() if step is None else step
        model, identity = run.model(step), run.identity(step)
        compiled = scoring.program(config.name, run.method, mesh)
        scorer = scoring.method_scorer(
            config.name,
            run.method,
            compiled,
            model,
            jax.random.key(config.seed),
            chosen.protocol,
        )
    calibrated = _calibrated(config, workdir, step, name, chosen, identity)
    profiles = known["profiles"].items()
    imported = workdir_lib.imported(workdir, step)
    # The store of the run is not what imported weights have seen.
    seen = lineage.Seen(frozenset(), frozenset()) if imported else lineage.seen(workdir)
    return Predictor(
        config=config,
        step=step,
        scorer=scorer,
        recipe=recipe,
        modalities=tuple(known["modalities"]),
        profiles={key: profile.Profile.from_json(one) for key, one in profiles},
        licences=tuple(sorted(seen.licences)),
        seen=seen.contents,
        imported=imported,
        commit=workdir_lib.read_json(workdir / workdir_lib.ENVIRONMENT)["commit"],
        calibrated=calibrated,
        threshold=_threshold(config, chosen, calibrated),
        mesh=mesh,
    )


def _known(
    config: ExperimentConfig, workdir: pathlib.Path, modality: str
) -> dict[str, Any]:
    """What the run noted of its modalities; of an old run, what the user says."""
    path = workdir / workdir_lib.PROFILE
    if path.is_file():
        return workdir_lib.read_json(path)
    names = [name for name in (config.data.modalities or modality).split(",") if name]
    if not names:
        raise ValueError(
            f"{workdir} does not say on which modality it was trained: an older "
            "version made it. Say it: --modality=flair, for example."
        )
    logging.warning("%s is of an older version: nothing checks intensities.", workdir)
    return {"modalities": names, "recipe_hash": None, "profiles": {}}


def _recipe(
    workdir: pathlib.Path, description: dict[str, Any], stored_hash: str | None
) -> recipes.Recipe:
    """The recipe of the training, or a ValueError: no other one is ever used."""
    try:
        recipe = recipes.from_json(description)
    except ValueError as error:
        raise ValueError(
            f"{workdir} was trained on a store that `run.py prepare` cannot make of "
            f"NIfTI files, so there is nothing to predict on. {error}"
        ) from error
    if stored_hash not in (None, preprocess.recipe_hash(recipe)):
        raise ValueError(
            f"{workdir}: this version of the code carries out the recipe "
            f"{recipe.name} in another way than the one that prepared the training "
            "data. Use that version, or prepare the store and train again."
        )
    return recipe


def _evaluation_set(config: ExperimentConfig) -> tuple[str, EvaluationSet]:
    """The set whose threshold is used: the one of the reports, or the first."""
    sets = evaluation.sets(config)
    name = (
        evaluation.DEFAULT_SET if evaluation.DEFAULT_SET in sets else next(iter(sets))
    )
    return name, sets[name]


def _calibrated(
    config: ExperimentConfig,
    workdir: pathlib.Path,
    step: int,
    name: str,
    chosen: EvaluationSet,
    identity: str,
) -> Calibration:
    """The stored calibration of a checkpoint.

    Raises:
      ValueError: There is none; says which command makes it.
    """
    own = name if chosen.store else ""
    command = f"run.py evaluate --workdir={workdir} --step={step}"
    if chosen.protocol is not EvaluationSet().protocol:
        command += f" --protocol={chosen.protocol.value}"
    path = calibration.file_path(workdir, step, chosen.protocol.value, own)
    entries = {}
    if path.is_file():
        entries = calibration.load(path)
        if calibration.load_origin(path).get("checkpoint") != identity:
            raise ValueError(
                f"{path} holds the thresholds of another checkpoint of step {step}. "
                f"`{command}` makes them anew."
            )
    if config.name not in entries:
        raise ValueError(
            f"{path} holds no threshold for {config.name}, so nothing can be called "
            "abnormal. `run.py train` makes it for the best checkpoint when it ends, "
            f"`{command}` for this one; both need validation scans, healthy ones or "
            "with annotated lesions."
        )
    return entries[config.name]


def _threshold(
    config: ExperimentConfig, chosen: EvaluationSet, calibrated: Calibration
) -> Threshold:
    rate = config.evaluation.healthy_fpr
    rule = chosen.threshold_from
    if rule is ThresholdRule.VALIDATED:
        value, text = calibrated.validated_or_healthy(rate)
        if calibrated.validated is None:
            rule = ThresholdRule.HEALTHY_FPR
    else:
        value = calibrated.healthy_threshold(rate)
        text = (
            f"{100 * rate:g} % false positives on {calibrated.num_healthy} healthy "
            "validation scans, no labels"
        )
    return Threshold(value=value, rule=rule.value, source=text)
