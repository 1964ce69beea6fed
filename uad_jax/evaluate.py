"""Evaluates a checkpoint: scores, thresholds, metrics, baselines, maps, report."""

import contextlib
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import logging

from uad_jax import (
    baseline_scorers,
    calibrating,
    drawing,
    evaluation,
    export,
    lineage,
    saved_run,
    scoring,
    segmentations,
    summary,
)
from uad_jax import mesh as mesh_lib
from uad_jax import results as results_lib
from uad_jax import workdir as workdir_lib
from uad_jax.baseline_scorers import BaselineMemory, Baselines
from uad_jax.calibrating import Calibrations
from uad_jax.config import ExperimentConfig
from uad_jax.data.sources import VolumeInfo
from uad_jax.evaluation import Context, Scales
from uad_jax.measuring import VolumeResult
from uad_jax.saved_run import SavedRun
from uad_jax.scoring import Program, Scorer, Stage


def evaluate(
    config: ExperimentConfig,
    workdir: pathlib.Path,
    *,
    step: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
    memory: BaselineMemory | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluates one checkpoint on every configured set; the run is not changed.

    Args:
      config: The run's config.
      workdir: The run. Gets `calibration/<step>/`, `results/<set>.json`,
        `results/<set>_subjects.csv`, `results/<set>_found.npz`, `report.html` (of
        sets other than "test": `report_<set>.html`) and, if asked for, `maps/<set>/`.
      step: Checkpoint; None = the best, or the latest of a run without validation.
      mesh: Devices; None = all.
      progress: Whether to show a progress bar.
      memory: Results of the baselines, for evaluations of several runs in a row.

    Returns:
      Set name -> results, as in the JSON file (where NaN is null).

    Raises:
      ValueError: If a set is empty, its store does not fit the model, or it holds
        scans that the model was trained on.
      workdir.WorkdirError: If config or recipe are not those of the training.
    """
    evaluation.refuse_several_processes()
    mesh = mesh_lib.make_mesh() if mesh is None else mesh
    with saved_run.opened(config, workdir, mesh) as run:
        step = run.default_step() if step is None else step
        identity = run.identity(step)
        found = evaluation.contexts(config, workdir, step, mesh, progress, identity)
        model = model_scorer(run, step, program(run, mesh))
        results = {}
        known: calibrating.Known = {}
        for context in found:
            logging.info("Evaluating step %d on %s.", step, context.name)
            scorer = model(context)
            results[context.name] = evaluate_set(
                context, scorer, known=known, memory=memory
            )
        return results


def program(run: SavedRun, mesh: jax.sharding.Mesh) -> Program:
    """Compiles the run's score, once for all its checkpoints."""
    return scoring.program(run.config.name, run.method, mesh)


def model_scorer(
    run: SavedRun, step: int, compiled: Program
) -> Callable[[Context], Scorer]:
    """Restores one checkpoint; returns a function from context to scorer."""
    model = run.model(step)
    key = jax.random.key(run.config.seed)

    def scorer(context: Context) -> Scorer:
        protocol = context.evaluation_set.protocol
        return scoring.method_scorer(
            run.config.name, run.method, compiled, model, key, protocol
        )

    return scorer


def figures_of_step(
    config: ExperimentConfig, workdir: pathlib.Path, step: int
) -> dict[str, float]:
    """Evaluates a checkpoint while training goes on; writes no results.

    Returns:
      The model's own figures, "SET/METRIC" -> value, those that are defined.
    """
    mesh = mesh_lib.make_mesh()
    figures = {}
    with saved_run.opened(config, workdir, mesh) as run:
        identity = run.identity(step)
        scorer = model_scorer(run, step, program(run, mesh))
        for context in evaluation.contexts(
            config, workdir, step, mesh, False, identity
        ):
            found = evaluate_set(context, scorer(context), alone=True)
            for metric, value in found["scorers"][config.name].items():
                if isinstance(value, float) and math.isfinite(value):
                    figures[f"{context.name}/{metric}"] = value
    return figures


def calibrate(
    config: ExperimentConfig, workdir: pathlib.Path, *, progress: bool = True
) -> bool:
    """Fixes the thresholds of the best checkpoint, at the end of training.

    Returns:
      False, with one line that says why, if the method is a pretraining stage, there
      are no validation scans for thresholds, or several processes share the devices.
    """
    if jax.process_count() > 1:
        if jax.process_index() == 0:
            logging.warning(
                "Several processes train, one evaluates: no thresholds yet. `run.py "
                "evaluate --workdir=%s` in one process makes them.",
                workdir,
            )
        return False
    mesh = mesh_lib.make_mesh()
    with saved_run.opened(config, workdir, mesh) as run:
        try:
            compiled = program(run, mesh)
        except scoring.PretrainingStage:
            logging.info("A pretraining stage scores nothing: there are no thresholds.")
            return False
        step = run.default_step()
        scorer = model_scorer(run, step, compiled)
        identity = run.identity(step)
        for context in evaluation.contexts(
            config, workdir, step, mesh, progress, identity
        ):
            if calibrating.is_current(context, Stage.PROCESSED):
                continue  # fixed before, perhaps with baselines
            if not calibrating.calibrate(context, [scorer(context)]):
                return False
    return True


def evaluate_set(
    context: Context,
    scorer: Scorer,
    *,
    alone: bool = False,
    known: calibrating.Known | None = None,
    memory: BaselineMemory | None = None,
) -> dict[str, Any]:
    """Evaluates one scorer on one set and writes what it found.

    Args:
      context: The evaluation.
      scorer: The model, or maps made elsewhere.
      alone: Without baselines, unprocessed maps, pictures and files: the figures of
        one of many checkpoints.
      known: Calibrations of sets before this one, to be shared.
      memory: Results of the baselines from evaluations before this one, to be shared.

    Returns:
      The results, as in the JSON file (where NaN is null).

    Raises:
      ValueError: If the set is empty or holds scans that the model was trained on.
    """
    watch = {"begin": time.monotonic()}
    test = _checked(context)
    stages = (Stage.PROCESSED,) if alone else tuple(Stage)
    recalled = memory.recall(context) if memory and not alone else None
    others: list[Scorer] = []
    missing: Mapping[str, str] = {}
    if recalled:
        missing = recalled.missing
    elif not alone:
        others, missing = baseline_scorers.fitted(context)
    scorers = [scorer, *others]
    names = [*recalled.found[stages[0]]] if recalled else [one.name for one in others]
    _refuse_one_name(scorer.name, names)
    calibrations = calibrating.calibrate(
        context,
        scorers,
        stages,
        exported=not alone,
        known=known,
        others=recalled.calibrations if recalled else None,
    )
    watch["calibrate"] = time.monotonic()
    scales = calibrating.scales(context, calibrations, scorer.name)
    exact = _fits(context, test, 1 + len(names), stages)
    if not scales and not exact:
        scales = calibrating.edges_only(context, scorers, test, stages)
    found = _score(context, scorers, test, scales, stages, exact, alone)
    if recalled:
        found = {stage: {**found[stage], **recalled.found[stage]} for stage in stages}
    elif memory and not alone and scales:
        _keep(memory, context, scorer.name, calibrations, found, missing)
    watch["score"] = time.monotonic()
    run = results_lib.run_facts(context)
    results = {
        "run": run,
        "set": results_lib.set_facts(context, found[Stage.PROCESSED][scorer.name]),
        "operating": calibrating.operating(context, scales, scorer.name),
        "thresholds": results_lib.threshold_rows(context, calibrations, scorer.name),
        **summary.summarize(
            found,
            group_by=evaluation.GROUP_BY,
            num_samples=context.settings.bootstrap_samples,
            rule=calibrating.operating(context, scales, scorer.name)["rule"],
            undertrained=bool(run["training"] and run["training"]["undertrained"]),
            missing_baselines=missing,
        ),
        "missing_baselines": missing,
    }
    watch["summarize"] = time.monotonic()
    if alone:
        return results
    chosen = drawing.chosen(found[Stage.PROCESSED][scorer.name])
    cases = _cases(context, scorer, chosen, scales, calibrations)
    drawn = drawing.draw(context, found, cases, results["operating"]["threshold"])
    watch["draw"] = time.monotonic()
    results["run"] |= _timings(watch, whole=not recalled)
    calibrated = calibrations.get((scorer.name, Stage.PROCESSED))
    results_lib.write(context, results, found, calibrated, drawn)
    return results


def _timings(watch: Mapping[str, float], *, whole: bool) -> dict[str, Any]:
    """Seconds of each part, and in all: None if the baselines were not measured."""
    names, times = list(watch), list(watch.values())
    seconds = {
        name: round(after - before, 2)
        for name, before, after in zip(names[1:], times, times[1:], strict=False)
    }
    total = round(times[-1] - times[0], 1) if whole else None
    return {"timings": seconds, "evaluation_seconds": total}


def _checked(context: Context) -> list[VolumeInfo]:
    test = context.test
    if not test:
        raise ValueError(
            evaluation.no_volumes(context.name, context.evaluation_set.split)
        )
    if context.evaluation_set.split != "train":
        _check_unseen(context, test)
    return test


def _check_unseen(context: Context, test: Sequence[VolumeInfo]) -> None:
    """Refuses scans that chose the parameters, the checkpoint or the threshold."""
    store = context.training_store
    known = {"trained on": {info.content for info in context.select(store, "train")}}
    note = context.workdir / workdir_lib.FINGERPRINT
    if context.config is not None and note.is_file():
        known["trained on"] |= lineage.seen(context.workdir).contents
    if context.evaluation_set.store:
        known["validated on"] = {info.content for info in context.select(store, "val")}
    for what, contents in known.items():
        seen = [info.subject for info in test if info.content in contents]
        if seen:
            raise ValueError(
                f"Set {context.name!r}: {len(seen)} of {len(test)} scans are among "
                f"those that the model was {what} ({', '.join(seen[:5])}). Take them "
                "out of the manifest and prepare the store again."
            )
    patients = {info.patient for info in context.select(store, "train")}
    shared = sorted({info.patient for info in test} & patients)
    if shared:
        logging.warning(
            "Set %s: %d patients have the names of training patients (%s). If they "
            "are the same people, the figures are too good.",
            context.name,
            len(shared),
            ", ".join(shared[:5]),
        )


def _keep(
    memory: BaselineMemory,
    context: Context,
    own: str,
    calibrations: Calibrations,
    found: Mapping[Stage, Mapping[str, list[VolumeResult]]],
    missing: Mapping[str, str],
) -> None:
    """Keeps all that was found but what was evaluated itself."""
    baselines_of = {
        stage: {name: results for name, results in rows.items() if name != own}
        for stage, rows in found.items()
    }
    theirs = {key: one for key, one in calibrations.items() if key[0] != own}
    memory.keep(context, Baselines(theirs, baselines_of, missing))


def _refuse_one_name(first: str, others: Sequence[str]) -> None:
    """Results are kept by name."""
    if first in others:
        raise ValueError(
            f"What is evaluated is called {first!r}, like one of the baselines. Give "
            "the run (config.name) or the folder of maps another name."
        )


def _fits(
    context: Context,
    test: Sequence[VolumeInfo],
    num_scorers: int,
    stages: Sequence[Stage],
) -> bool:
    """Whether all scores of the set may be held in memory."""
    brain = sum(sum(info.brain_voxels) for info in test)
    return brain * num_scorers * len(stages) <= context.settings.exact_voxels


def _score(
    context: Context,
    scorers: Sequence[Scorer],
    test: Sequence[VolumeInfo],
    scales: Scales,
    stages: Sequence[Stage],
    exact: bool,
    alone: bool,
) -> dict[Stage, dict[str, list[VolumeResult]]]:
    """Scores the set: stage -> scorer -> results; writes segmentations and maps."""
    found: dict[Stage, dict[str, list[VolumeResult]]] = {
        stage: {one.name: [] for one in scorers} for stage in stages
    }
    scored = evaluation.score(
        context,
        scorers,
        context.store,
        test,
        scales,
        "Testing",
        stages=stages,
        voxels=exact,
    )
    operating = calibrating.operating(context, scales, scorers[0].name)
    with contextlib.ExitStack() as stack:
        writer = None
        if not alone and operating["rule"] is not None:
            facts = results_lib.segmentation_facts(context, test, operating)
            path = results_lib.staged_segmentations(context)
            writer = stack.enter_context(segmentations.create(path, facts))
        for one in scored:
            for stage, result in one.results.items():
                found[stage][one.scorer.name].append(result)
            if one.scorer is not scorers[0] or alone:
                continue
            info = one.results[Stage.PROCESSED].info
            if writer is not None:
                writer.add(info.subject, one.segmentations[operating["rule"]])
            if context.settings.export_maps:
                export.write(context, info, one.arrays)
    return found


def _cases(
    context: Context,
    scorer: Scorer,
    chosen: Mapping[str, VolumeResult],
    scales: Scales,
    calibrations: Calibrations,
) -> list[drawing.Case]:
    """Scores the subjects to show once more, this time keeping their pictures."""
    infos = [result.info for result in chosen.values()]
    arrays = {
        one.results[Stage.PROCESSED].info.uid: one
        for one in evaluation.score(
            context, [scorer], context.store, infos, scales, "Drawing", pictures=True
        )
    }
    calibrated = calibrations.get((scorer.name, Stage.PROCESSED))
    if calibrated is not None and not calibrated.healthy_volume_scores:
        calibrated = None  # of none there are no percentiles
    rule = calibrating.operating(context, scales, scorer.name)["rule"]
    return [
        drawing.case(caption, result, arrays[result.info.uid], rule, calibrated)
        for caption, result in chosen.items()
    ]
