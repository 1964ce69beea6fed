"""A trained run under another score: the same checkpoints, another config."""

import functools
import os
import pathlib
import shutil

from absl import logging

from uad_jax import config as config_lib
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
    "method.slabs.overlap",
    "method.slabs.score_chunk",
)
_OWN = (workdir_lib.CONFIG, workdir_lib.LOCK)  # of the directory, not of the training


def rescore(
    config: ExperimentConfig, workdir: pathlib.Path, output: pathlib.Path
) -> dict[str, str]:
    """Makes a run with the checkpoints of another, to be evaluated by another score.

    Args:
      config: The config of the run with other values of `SCORE_FIELDS`.
      workdir: The trained run; stays as it is.
      output: Directory of the run to make. Its checkpoints are hard links where the
        file system has them. Thresholds, results and maps are not taken along.

    Returns:
      What changes, name -> "old -> new".

    Raises:
      ValueError: If no score changes, or more than that.
      workdir.WorkdirError: If `workdir` is not a run, or `output` is not empty.
    """
    config_lib.validate(config)
    given = config_lib.to_dict(config)
    workdir_lib.refuse_ensemble(workdir, f"Name one of them: {workdir}/MEMBER")
    stored = workdir_lib.read_json(workdir / workdir_lib.CONFIG)
    completed = functools.partial(config_lib.completed, config)
    changes = workdir_lib.difference(completed(stored), given)
    scores = {name for name in changes if name.startswith(SCORE_FIELDS)}
    others = sorted(set(changes) - scores - {"name", "source"})
    if not scores or others:
        found = f"found changes of {', '.join(others)}" if others else "found none"
        raise ValueError(
            f"Expected changes of the score of {workdir} alone (config.method.score, "
            f"config.method.residual, ...), {found}. Name what is to be asked "
            "otherwise, such as --config.method.score.kind=mc_mean."
        )
    checkpoints = workdir / workdir_lib.CHECKPOINTS
    if not checkpoints.is_dir():
        raise workdir_lib.WorkdirError(f"{workdir} holds no checkpoints. Train first.")
    if output.exists() and any(output.iterdir()):
        raise workdir_lib.WorkdirError(f"{output} is not empty. Name a new --output.")
    workdir_lib.make_writable(output)
    shutil.copytree(checkpoints, output / workdir_lib.CHECKPOINTS, copy_function=_link)
    for path in workdir.iterdir():
        if path.is_file() and path.name not in _OWN and path.suffix != ".html":
            shutil.copy2(path, output / path.name)
    workdir_lib.write_json(output / workdir_lib.CONFIG, given)
    for name, change in sorted(changes.items()):
        logging.info("%s: %s", name, change)
    return changes


def _link(source: str, target: str) -> None:
    """Links a file that never changes, or copies it where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
