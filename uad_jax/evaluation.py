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
from uad_jax import workdir as workdir_lib
from uad_jax.config import EvaluationSet, ExperimentConfig
from uad_jax.data import pipeline
from uad_jax.data.config import DataConfig
from uad_jax.data.sources import Store, VolumeInfo
from uad_jax.scoring import Scorer, VolumeArrays, VolumeResult

DEFAULT_SET = "test"  # its report is report.html, that of others report_<set>.html
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
        return pipeline.select(store, self.data, split)

    @property
    def data(self) -> DataConfig:
        """The data config with the model's channels by name, for stores with more."""
        names = self.config.data.modalities or ",".join(self.training_store.modalities)
        return dataclasses.replace(self.config.data, modalities=names)

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
    """Restores the model once and opens every set.

    Raises:
      ValueError: If the config cannot work, or in a job of several processes.
      workdir.WorkdirError: If config or recipe are not those of the training.
    """
    config_lib.validate(config)
    if jax.process_count() > 1:
        raise ValueError(
            f"Evaluation runs in one process, and this job has {jax.process_count()}. "
            "Start run.py evaluate without --distributed."
        )
    workdir_lib.refuse_another_config(workdir, config_lib.to_dict(config))
    mesh = mesh_lib.make_mesh() if mesh is None else mesh
    method, model, step = train.load_model(config, workdir, step, mesh)
    key = jax.random.key(config.seed)
    training_store = Store.open(pathlib.Path(config.data.store))
    workdir_lib.refuse_another_recipe(workdir, training_store.recipe)
    for name, evaluation_set in sets(config).items():
        context = Context(
            config=config,
            evaluation_set=evaluation_set,
            name=name,
            workdir=workdir,
            step=step,
            training_store=training_store,
            store=_open_store(config, training_store, evaluation_set),
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
    return config.evaluation.sets or {DEFAULT_SET: EvaluationSet()}


def set_of_store(store: str) -> dict[str, EvaluationSet]:
    """The test split of another store as the only set, named after its folder."""
    return {pathlib.Path(store).resolve().name: EvaluationSet(store=store)}


def _open_store(
    config: ExperimentConfig, own: Store, evaluation_set: EvaluationSet
) -> Store:
    if not evaluation_set.store:
        return own
    other = Store.open(pathlib.Path(evaluation_set.store))
    if own.recipe != other.recipe:
        raise ValueError(
            f"{evaluation_set.store}: the recipe is {other.recipe}, but the model was "
            f"trained with {own.recipe}. Prepare it with the training recipe."
        )
    names = [own.modalities[c] for c in pipeline.channels(own, config.data.modalities)]
    if not set(names) <= set(other.modalities):
        raise ValueError(
            f"{evaluation_set.store}: the modalities are "
            f"{', '.join(other.modalities)}, but the model was trained with "
            f"{', '.join(names)}. Prepare it with those."
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
        modalities=context.data.modalities,
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
        total=len(infos),
        desc=title,
        unit="volume",
        disable=None if context.progress and infos else True,  # None: on a terminal
    )
    with bar:
        for volumes, labels, rows in batches(context, store, infos):
            for scorer in scorers:
                for result, arrays in scoring.score_volumes(
                    scorer, volumes, labels, rows, thresholds[scorer.name]
                ):
                    yield scorer, result, arrays
            bar.update(len(rows))
