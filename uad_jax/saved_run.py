"""A finished or running training, opened to look at its checkpoints. Reads only."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh

from uad_jax import checkpoint as checkpoint_lib
from uad_jax import mesh as mesh_lib
from uad_jax import programs, train
from uad_jax import workdir as workdir_lib
from uad_jax.config import ExperimentConfig
from uad_jax.methods.base import Method, RunShape
from uad_jax.types import ModelState


class SavedRun:
    """The checkpoints of one run and the method they belong to, built once.

    Attributes:
      config: The experiment as it was trained.
      workdir: Directory of the run.
      method: The method; what is compiled from it serves every checkpoint.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        workdir: pathlib.Path,
        checkpoints: checkpoint_lib.Checkpoints,
        mesh: Mesh,
    ) -> None:
        """Builds the method; `opened` is the way in."""
        self.config = config
        self.workdir = workdir
        self._checkpoints = checkpoints
        shapes = workdir_lib.read_json(workdir / train.SHAPES)
        self.method: Method = config.method.make(RunShape(**shapes["run"]))
        spec = train.spec_from_json(shapes["batch"])
        state = programs.abstract_state(self.method, spec, mesh)
        self._abstract: Any = state.for_eval()

    def steps(self) -> list[int]:
        """Complete checkpoints that are there now, oldest first."""
        return self._checkpoints.steps()

    def default_step(self) -> int:
        """The best checkpoint, or the latest of a run that never validated.

        Raises:
          checkpoint.CheckpointError: If there is none.
        """
        best = self._checkpoints.best()
        step = self._checkpoints.latest() if best is None else best
        if step is None:
            raise checkpoint_lib.CheckpointError(
                f"{self.workdir / train.CHECKPOINTS} holds no checkpoint. Train first."
            )
        return step

    def identity(self, step: int) -> str:
        """Hash of a checkpoint; see `checkpoint.Checkpoints.identity`."""
        return self._checkpoints.identity(step)

    def model(self, step: int) -> ModelState:
        """Restores the model of one checkpoint for evaluation, EMA where there is one.

        Raises:
          checkpoint.CheckpointError: If the step is missing, damaged or does not fit.
        """
        return self._checkpoints.restore_model(self._abstract, step)

    def finished(self) -> bool:
        """Whether training has nothing left to do."""
        return train.finished(self.config, self._checkpoints) is not None


@contextlib.contextmanager
def opened(
    config: ExperimentConfig, workdir: pathlib.Path, mesh: Mesh | None = None
) -> Iterator[SavedRun]:
    """Opens a run to read its checkpoints; nothing in it is changed.

    Args:
      config: The experiment as it was trained.
      workdir: Directory of the run.
      mesh: Where models go; default: all devices.

    Raises:
      workdir.WorkdirError: If this is not the workdir of a run.
    """
    workdir_lib.refuse_ensemble(workdir, f"Name one of them: {workdir}/MEMBER")
    mesh = mesh_lib.make_mesh() if mesh is None else mesh
    checkpoints = checkpoint_lib.Checkpoints(
        workdir / train.CHECKPOINTS, read_only=True
    )
    with contextlib.closing(checkpoints):
        yield SavedRun(config, workdir, checkpoints, mesh)


def load_model(
    config: ExperimentConfig,
    workdir: pathlib.Path,
    step: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[Method, ModelState, int]:
    """Restores one model of a run, wherever it was trained.

    Args:
      config: The experiment as it was trained.
      workdir: Directory of the run.
      step: Checkpoint; None = the best, or the latest if it never validated.
      mesh: Where the model goes; default: all devices.

    Returns:
      The method, its model for evaluation, and the step.

    Raises:
      checkpoint.CheckpointError: If the step is missing, damaged or of another model.
      workdir.WorkdirError: If this is not the workdir of a run.
    """
    with opened(config, workdir, mesh) as run:
        step = run.default_step() if step is None else step
        return run.method, run.model(step), step
