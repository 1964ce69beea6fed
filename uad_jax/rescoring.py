"""A trained run under another score: the same checkpoints, another config."""

import functools
import os
import pathlib
import shutil
from collections.abc import Sequence

from absl import logging

from uad_jax import config as config_lib
from uad_jax import tv_weight
from uad_jax import workdir as workdir_lib
from uad_jax.config import ExperimentConfig

# What a trained model is asked; the training did not depend on it.
SCORE_FIELDS = (
    "method.score.",
    "method.scoring.",
    "method.residual",
    "method.sample_at_test",
    "method.score_chunk",
    "method.feature_score",
    "method.way",  # of DDPM back to the image, and how
    "method.sampler",
    "method.eta",
    "method.chain_calls",
    "method.slabs.overlap",
    "method.slabs.score_chunk",
)
# Of the directory, not of the training.
_OWN = (workdir_lib.CONFIG, workdir_lib.LOCK, workdir_lib.TV_WEIGHT)


def rescore(
    config: ExperimentConfig,
    workdir: pathlib.Path,
    output: pathlib.Path,
    *,
    tv_weights: Sequence[float] = (),
    progress: bool = True,
) -> dict[str, str]:
    """Makes a run with the checkpoints of another, to be evaluated by another score.

    Args:
      config: The config of the run with other values of `SCORE_FIELDS`.
      workdir: The trained run; stays as it is.
      output: Directory of the run to make. Its checkpoints are hard links where the
        file system has them. Thresholds, results and maps are not taken along.
      tv_weights: Candidates for the weight of a restoration's total variation; the
        one that changes healthy validation scans least is the new run's, and all
        figures are in its `tv_weight.json` and its results. () = as configured.
      progress: Whether to show a progress bar while it is chosen.

    Returns:
      What changes, name -> "old -> new".

    Raises:
      ValueError: If no score changes, or more than that, or no weight can be chosen.
      workdir.WorkdirError: If `workdir` is not a run, or `output` is not empty.
    """
    if tv_weights:
        tv_weight.check(config, tv_weights)
        config = tv_weight.with_weight(config, tv_weights[0])
    changes = _changes(config, workdir, choosing=bool(tv_weights))
    checkpoints = workdir / workdir_lib.CHECKPOINTS
    if not checkpoints.is_dir():
        raise workdir_lib.WorkdirError(f"{workdir} holds no checkpoints. Train first.")
    if output.exists() and any(output.iterdir()):
        raise workdir_lib.WorkdirError(f"{output} is not empty. Name a new --output.")
    workdir_lib.make_writable(output)
    if tv_weights:
        chosen = tv_weight.choose(config, workdir, tv_weights, progress=progress)
        config = tv_weight.with_weight(config, chosen["weight"])
        changes = _changes(config, workdir, choosing=True)
        workdir_lib.write_json(output / workdir_lib.TV_WEIGHT, chosen)
        logging.info("%s", tv_weight.render(chosen))
    shutil.copytree(checkpoints, output / workdir_lib.CHECKPOINTS, copy_function=_link)
    for path in workdir.iterdir():
        if path.is_file() and path.name not in _OWN and path.suffix != ".html":
            shutil.copy2(path, output / path.name)
    workdir_lib.write_json(output / workdir_lib.CONFIG, config_lib.to_dict(config))
    for name, change in sorted(changes.items()):
        logging.info("%s: %s", name, change)
    return changes


def _changes(
    config: ExperimentConfig, workdir: pathlib.Path, *, choosing: bool
) -> dict[str, str]:
    """What a config changes of a run: something of its score, nothing else."""
    config_lib.validate(config)
    given = config_lib.to_dict(config)
    workdir_lib.refuse_ensemble(workdir, f"Name one of them: {workdir}/MEMBER")
    stored = workdir_lib.read_json(workdir / workdir_lib.CONFIG)
    completed = functools.partial(config_lib.completed, config)
    changes = workdir_lib.difference(completed(stored), given)
    scores = {name for name in changes if name.startswith(SCORE_FIELDS)}
    others = sorted(set(changes) - scores - {"name", "source"})
    if others or not (scores or choosing):
        found = f"found changes of {', '.join(others)}" if others else "found none"
        raise ValueError(
            f"Expected changes of the score of {workdir} alone (config.method.score, "
            f"config.method.residual, ...), {found}. Name what is to be asked "
            "otherwise, such as --config.method.score.kind=mc_mean."
        )
    return changes


def _link(source: str, target: str) -> None:
    """Links a file that never changes, or copies it where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
