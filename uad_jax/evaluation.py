"""What the steps of an evaluation share: the run, the set, and its volumes."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import tqdm

from uad_jax import config as config_lib
from uad_jax import mesh as mesh_lib
from uad_jax import scoring, train
from uad_jax.config import EvaluationSet, ExperimentConfig
from uad_jax.data import pipeline
from uad_jax.data.sources import Store, VolumeInfo
from uad_jax.scoring import Scorer, VolumeArrays, VolumeResult

GROUP_BY = "kind"  # manifest column that splits the table, where the store has it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What the steps of one evaluation share.

    Attributes:
      config: The run's config.
      evaluation_set: What to evaluate on, and how.
      name: Name of the set.
      workdir: The run.
      step: The checkpoint.
      training_store: Store that the run was trained on.
      store: The set's own store, or the training store.
      mesh: Devices.
      progress: Whether to show progress bars.
    """

    config: ExperimentConfig
    evaluation_set: EvaluationSet
    name: str
    workdir: pathlib.Path
    step: int
    training_store: Store
    store: Store
    mesh: jax.sharding.Mesh
    progress: bool

    def select(self, store: Store, split: str) -> list[VolumeInfo]:
        """The volumes of one split that have the model's modalities."""
        return pipeline.select(store, self.config.data, split)

    @property
    def calibration_path(self) -> pathlib.Path:
        """The thresholds' file; a set with its own store has its own."""
        name = self.evaluation_set.protocol.value
        if self.evaluation_set.store:
            name = f"{name}_{self.name}"
        return self.workdir / "calibration" / str(self.step) / f"{name}.json"


def opened(
    config: ExperimentConfig,
    workdir: pathlib.Path,
    step: int | None,
    mesh: jax.sharding.Mesh | None,
    progress: bool,
) -> Iterator[tuple[Context, Scorer]]:
    """Restores the model once and opens every set."""
    config_lib.validate(config)
    mesh = mesh_lib.make_mesh() if mesh is None else mesh
    method, model, step = train.load_model(config, workdir, step, mesh)
    key = jax.random.key(config.seed)
    training_store = Store.open(pathlib.Path(config.data.store))
    for name, evaluation_set in sets(config).items():
        context = Context(
            config=config,
            evaluation_set=evaluation_set,
            name=name,
            workdir=workdir,
            step=step,
            training_store=training_store,
            store=_open_store(training_store, evaluation_set),
            mesh=mesh,
            progress=progress,
        )
        yield (
            context,
            scoring.method_scorer(
                config.name, method, model, key, evaluation_set.protocol, mesh
            ),
        )


def sets(config: ExperimentConfig) -> dict[str, EvaluationSet]:
    """The configured sets; by default the test split of the training store."""
    return config.evaluation.sets or {"test": EvaluationSet()}


def _open_store(own: Store, evaluation_set: EvaluationSet) -> Store:
    if not evaluation_set.store:
        return own
    other = Store.open(pathlib.Path(evaluation_set.store))
    for what, expected, found in (
        ("recipe", own.recipe, other.recipe),
        ("modalities", own.modalities, other.modalities),
    ):
        if expected != found:
            raise ValueError(
                f"{evaluation_set.store}: the {what} is {found}, but the model was "
                f"trained with {expected}. Prepare it with the training recipe."
            )
    return other


def batches(
    context: Context, store: Store, infos: Sequence[VolumeInfo]
) -> Iterator[tuple]:
    """Yields decoded volumes on the mesh, their truth, and who they are.

    The last batch is padded, so that nothing is compiled twice and nothing dropped.
    """
    size = -(-context.config.evaluation.batch_size // context.mesh.size)
    for volumes, labels, rows in pipeline.volume_batches(
        store,
        infos,
        modalities=context.config.data.modalities,
        batch_size=size * context.mesh.size,
        mesh=context.mesh,
    ):
        yield scoring.decode(volumes), labels, rows


def images(
    context: Context, store: Store, infos: Sequence[VolumeInfo]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the first channel and the brain mask of single volumes, [D, H, W]."""
    for volumes, _, rows in batches(context, store, infos):
        images, masks = np.asarray(volumes.image), np.asarray(volumes.mask)
        for row in range(len(rows)):
            yield images[row, ..., 0], masks[row, ..., 0]


def score(
    context: Context,
    scorers: Sequence[Scorer],
    store: Store,
    infos: Sequence[VolumeInfo],
    thresholds: dict[str, dict[str, float]],
    title: str,
) -> Iterator[tuple[Scorer, VolumeResult, VolumeArrays]]:
    """Scores volumes with every scorer, each batch read once.

    Args:
      context: The evaluation.
      scorers: What to score with.
      store: Where the volumes are.
      infos: The volumes.
      thresholds: Scorer -> rule -> threshold to segment at.
      title: Of the progress bar.

    Yields:
      Scorer, result and arrays of each volume.
    """
    bar = tqdm.tqdm(
        total=len(infos), desc=title, unit="volume", disable=not context.progress
    )
    with bar:
        for volumes, labels, rows in batches(context, store, infos):
            for scorer in scorers:
                for result, arrays in scoring.score_volumes(
                    scorer, volumes, labels, rows, thresholds[scorer.name]
                ):
                    yield scorer, result, arrays
            bar.update(len(rows))
