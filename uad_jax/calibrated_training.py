"""Training and what goes with it: evaluations on the way, thresholds at the end."""

import functools
import pathlib

from absl import logging

from uad_jax import (
    ensembles,
    evaluate,
    evaluate_ensemble,
    evaluation,
    train,
    train_ensemble,
)
from uad_jax.config import ExperimentConfig


def train_calibrated(
    config: ExperimentConfig,
    workdir: pathlib.Path,
    *,
    ensemble: str = "",
    accept_data_change: bool = False,
) -> tuple[bool, bool]:
    """Trains one run, or an ensemble, and fixes the thresholds of what was trained.

    Args:
      config: The experiment.
      workdir: Directory of the run, or of the ensemble.
      ensemble: What its members differ in (`ensembles.parse`); "" = one run.
      accept_data_change: Go on although the training data have changed.

    Returns:
      Whether training came to its end, and was not stopped by a signal; and whether
      there are thresholds.

    Raises:
      ValueError: If the config or the ensemble cannot work; else as `train.train`.
    """
    if config.train.evaluate_every:
        evaluation.check_sets(config)
    if not ensemble:
        result = train.train(
            config,
            workdir,
            accept_data_change=accept_data_change,
            evaluate=functools.partial(evaluate.figures_of_step, config, workdir),
        )
        ended = result.stopped != "preempted"
        return ended, ended and evaluate.calibrate(config, workdir)
    axis = ensembles.parse(ensemble, config)
    results = train_ensemble.train_ensemble(
        config,
        axis,
        workdir,
        accept_data_change=accept_data_change,
        evaluate=evaluate.figures_of_step,
    )
    ended = all(one.stopped != "preempted" for one in results.values())
    if ended:
        logging.info("The members are runs: %s in %s.", axis.folders, workdir)
    return ended, ended and evaluate_ensemble.calibrate(config, axis, workdir)
