"""Evaluates the members of an ensemble, and the mean of their maps."""

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from uad_jax import (
    calibrating,
    ensembles,
    evaluate,
    evaluation,
    lineage,
    report,
    saved_run,
    tables,
    training_state,
    writer,
)
from uad_jax import mesh as mesh_lib
from uad_jax import results as results_lib
from uad_jax import workdir as workdir_lib
from uad_jax.config import ExperimentConfig
from uad_jax.ensembles import Axis
from uad_jax.evaluation import Context
from uad_jax.metrics import statistics
from uad_jax.metrics.protocols import Protocol
from uad_jax.scoring import Program, Scorer
from uad_jax.types import Array, Scores, Volumes

FOLDER = "results/members"  # one JSON file per set
_OWN_SCANS = (
    "Each member was measured on scans of its own, which may have trained the others: "
    "there is no map of the ensemble, and the deviation is one between scans too."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Opened:
    """One member, ready to score.

    Attributes:
      name: What it is called, "seed=1".
      step: Its checkpoint.
      contexts: Its evaluation of each set.
      scorers: Its score, for each set.
    """

    name: str
    step: int
    contexts: list[Context]
    scorers: list[Scorer]


def evaluate_ensemble(
    config: ExperimentConfig,
    axis: Axis,
    workdir: pathlib.Path,
    *,
    step: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Evaluates all members and the ensemble's own map on every configured set.

    Each member is measured with its own checkpoint and thresholds. The ensemble's own
    map is the mean of the members' maps before post-processing; it is post-processed
    once and has thresholds of its own, unless a validation scan trained some member,
    as in folds: then it has only figures that need no threshold. There is no such map
    of a set in which each member has scans of its own, as folds have in split "val".

    Args:
      config: What the members have in common.
      axis: What they differ in.
      workdir: The ensemble. Gets `results/members/<set>.json`, and of the ensemble's
        own map what `evaluate.evaluate` writes of a run.
      step: Checkpoint of all members; None = of each its best, or its latest if
        nothing was validated.
      mesh: Devices; None = all.
      progress: Whether to show a progress bar.

    Returns:
      Set name -> {"members": as in `results/members/<set>.json`, "ensemble": results of
      the own map, as `evaluate.evaluate` returns them, or None without such a map}.

    Raises:
      ValueError, workdir.WorkdirError: As in `evaluate.evaluate`.
    """
    evaluation.refuse_several_processes()
    mesh = mesh_lib.make_mesh() if mesh is None else mesh
    configs = ensembles.configs(config, axis)
    opened: list[_Opened] = []
    shared: Program | None = None
    for name, own, folder in zip(axis.members, configs, axis.folders, strict=True):
        with saved_run.opened(own, workdir / folder, mesh) as run:
            if shared is None or axis.of_method:
                shared = evaluate.program(run, mesh)
            opened.append(_open(name, run, step, mesh, progress, shared))
    found = {}
    known: calibrating.Known = {}
    for place, first in enumerate(opened[0].contexts):
        figures = {}
        for one in opened:
            logging.info(
                "Evaluating %s, step %d, on %s.", one.name, one.step, first.name
            )
            results = evaluate.evaluate_set(
                one.contexts[place], one.scorers[place], alone=True
            )
            figures[one.name] = _numbers(results["scorers"][config.name])
        own_map = None
        if _same_scans([one.contexts[place] for one in opened]):
            context = _context(axis, configs, workdir, opened, place)
            scorer = mean_scorer(context.scorer, [one.scorers[place] for one in opened])
            own_map = evaluate.evaluate_set(context, scorer, known=known)
        else:
            logging.warning("Set %s: %s", first.name, _OWN_SCANS)
        protocol = first.evaluation_set.protocol
        members = _summary(axis, opened, figures, own_map, protocol)
        path = workdir / FOLDER / f"{first.name}.json"
        workdir_lib.write_json(path, results_lib.without_nan(members))
        found[first.name] = {"members": members, "ensemble": own_map}
    return found


def _same_scans(contexts: Sequence[Context]) -> bool:
    """Whether a set has the same scans for all members.

    Each member refuses scans that trained it, unless training scans are asked for. So
    what is the same for all trained none.
    """
    return len({context.fingerprint(context.test) for context in contexts}) == 1


def calibrate(
    config: ExperimentConfig,
    axis: Axis,
    workdir: pathlib.Path,
    *,
    progress: bool = True,
) -> bool:
    """Fixes the thresholds of every member, at the end of training.

    Returns:
      False if one has none (see `evaluate.calibrate`).
    """
    configs = ensembles.configs(config, axis)
    return all(
        evaluate.calibrate(own, workdir / folder, progress=progress)
        for own, folder in zip(configs, axis.folders, strict=True)
    )


def _open(
    name: str,
    run: saved_run.SavedRun,
    step: int | None,
    mesh: jax.sharding.Mesh,
    progress: bool,
    program: Program,
) -> _Opened:
    step = run.default_step() if step is None else step
    contexts = evaluation.contexts(
        run.config, run.workdir, step, mesh, progress, run.identity(step)
    )
    scorer = evaluate.model_scorer(run, step, program)
    return _Opened(
        name=name,
        step=step,
        contexts=contexts,
        scorers=[scorer(context) for context in contexts],
    )


def mean_scorer(name: str, scorers: Sequence[Scorer]) -> Scorer:
    """Scores with the mean of several scorers: maps, scores and reconstructions."""
    count = len(scorers)

    def score(volumes: Volumes) -> Scores:
        total = scorers[0].score(volumes)
        for one in scorers[1:]:
            total = _plus(total, one.score(volumes))
        return _divided(total, np.float32(count))

    return Scorer(name, score, scorers[0].protocol)


@jax.jit
def _plus(a: Scores, b: Scores) -> Scores:
    return jax.tree.map(lambda x, y: x + y, a, b)


@jax.jit
def _divided(scores: Scores, count: Array | np.float32) -> Scores:
    return jax.tree.map(lambda x: x / count, scores)


def _context(
    axis: Axis,
    configs: Sequence[ExperimentConfig],
    workdir: pathlib.Path,
    opened: Sequence[_Opened],
    place: int,
) -> Context:
    """The evaluation of the ensemble's own map on one set."""
    of_members = [one.contexts[place] for one in opened]
    first = of_members[0]
    joined = "".join(context.checkpoint for context in of_members)
    states = [
        training_state.training_state(
            config, one.step, writer.read_metrics(context.workdir)
        )
        for config, one, context in zip(configs, opened, of_members, strict=True)
    ]
    steps = ", ".join(f"{one.step:,}" for one in opened)
    kind = type(configs[0].method).__name__
    context = dataclasses.replace(
        first,
        scorer=f"{first.scorer}, mean of {len(opened)}",
        workdir=workdir,
        step=None,
        config=None,
        checkpoint=hashlib.sha256(joined.encode()).hexdigest(),
        facts={
            "source": "ensemble",
            "method": f"mean map of {len(opened)} members of {kind} "
            f"({', '.join(axis.members)}; checkpoints of steps {steps})",
            "training": _least_trained(states),
        },
    )
    trained_on = {
        content for one in of_members for content in lineage.seen(one.workdir).contents
    }
    seen = [x.subject for x in calibrating.volumes(context) if x.content in trained_on]
    if seen:
        logging.warning(
            "The ensemble's own map has no thresholds: %d of its validation scans "
            "trained one of the members (%s).",
            len(seen),
            ", ".join(seen[:5]),
        )
        context = dataclasses.replace(context, validation=False)
    return context


def _least_trained(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What stands for the training of all: undertrained as soon as one member is."""
    return min(states, key=lambda x: (not x["undertrained"], x["slices_seen"]))


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The figures that are numbers, without intervals."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _summary(
    axis: Axis,
    opened: Sequence[_Opened],
    figures: Mapping[str, Mapping[str, float]],
    own_map: Mapping[str, Any] | None,
    protocol: Protocol,
) -> dict[str, Any]:
    """The content of `results/members/<set>.json`; "ensemble" is the own map."""
    names = [
        name
        for name in next(iter(figures.values()))
        if all(math.isfinite(one.get(name, math.nan)) for one in figures.values())
    ]
    spread = {
        name: statistics.summarize(np.array([one[name] for one in figures.values()]))
        for name in names
    }
    return {
        "field": axis.field,
        "values": list(axis.values),
        "steps": {one.name: one.step for one in opened},
        "members": {name: dict(one) for name, one in figures.items()},
        "mean": {name: one.mean for name, one in spread.items()},
        "standard_deviation": {name: one.sd for name, one in spread.items()},
        "same_scans": own_map is not None,
        "ensemble": own_map and _numbers(own_map["scorers"][own_map["run"]["name"]]),
        "set": own_map and own_map["set"],
        "protocol": protocol.value,
    }


def evaluated(
    config: ExperimentConfig, axis: Axis, workdir: pathlib.Path, step: int | None
) -> str:
    """Evaluates an ensemble; tells the members, then the own map, for the terminal."""
    parts = []
    found = evaluate_ensemble(config, axis, workdir, step=step)
    for name, one in found.items():
        own = one["ensemble"]
        protocol = one["members"]["protocol"]
        parts.append(f"{name}, protocol {protocol}\n{_table(one['members'])}")
        if own is None:
            parts.append(_OWN_SCANS)
            continue
        subjects = results_lib.read_subjects(workdir, name, own["run"]["name"])
        parts.append(report.summary(own, subjects))
    return "\n\n".join(["", *parts])


def _table(members: Mapping[str, Any]) -> str:
    """The members of one set: each, mean, deviation, own map."""
    rows = {
        **members["members"],
        "mean of the members": members["mean"],
        "standard deviation": members["standard_deviation"],
    }
    if members["ensemble"] is not None:
        rows["ensemble's own map"] = members["ensemble"]
    columns = [
        (key, heading)
        for key, heading, _ in tables.COLUMNS
        if any(tables.exists(row.get(key)) for row in rows.values())
    ]
    lines = [
        [name, *(tables.number(row.get(key)) for key, _ in columns)]
        for name, row in rows.items()
    ]
    return report.text_table(["", *(heading for _, heading in columns)], lines)
