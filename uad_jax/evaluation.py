"""What the steps of an evaluation share: the run, the set, and its volumes."""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from uad_jax import config as config_lib
from uad_jax import measuring, scoring
from uad_jax import workdir as workdir_lib
from uad_jax.config import EvaluationConfig, EvaluationSet, ExperimentConfig
from uad_jax.data import pipeline
from uad_jax.data.config import DataConfig
from uad_jax.data.sources import Store, VolumeInfo
from uad_jax.measuring import Scale, VolumeResult, Wanted
from uad_jax.metrics import calibration
from uad_jax.metrics.protocols import Protocol
from uad_jax.scoring import Scorer, Stage, VolumeArrays

DEFAULT_SET = "test"  # its report is report.html, that of others report_<set>.html
GROUP_BY = "kind"  # manifest column that splits the table, where the store has it

Scales = Mapping[tuple[str, Stage], Scale]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What the steps of one evaluation share.

    Attributes:
      scorer: Name of what is evaluated; the baselines come beside it.
      name: Name of the set.
      evaluation_set: What to evaluate on, and how.
      settings: Batch size, rates, resamplings.
      data: The modalities by name, for stores with more, and the fold.
      workdir: Where results go; the run, if one is evaluated.
      step: The checkpoint; None for maps made elsewhere.
      training_store: Store of the training and validation scans.
      store: The set's own store, or the training store.
      mesh: Devices.
      progress: Whether to show progress bars.
      config: The run's config; None for maps made elsewhere.
      checkpoint: Hash of the checkpoint; "" for maps made elsewhere.
      validation: Whether validation scans can be scored, for thresholds.
      facts: What the results say of what is evaluated, where it is not one checkpoint.
    """

    scorer: str
    name: str
    evaluation_set: EvaluationSet
    settings: EvaluationConfig
    data: DataConfig
    workdir: pathlib.Path
    step: int | None
    training_store: Store
    store: Store
    mesh: jax.sharding.Mesh
    progress: bool
    config: ExperimentConfig | None = None
    checkpoint: str = ""
    validation: bool = True
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def select(self, store: Store, split: str) -> list[VolumeInfo]:
        """The volumes of one split that have the model's modalities."""
        return pipeline.select(store, self.data, split)

    @property
    def test(self) -> list[VolumeInfo]:
        """The volumes of the set."""
        return self.select(self.store, self.evaluation_set.split)

    def calibration_path(self, stage: Stage) -> pathlib.Path:
        """The thresholds' file; a set with its own store has its own."""
        protocol = self.evaluation_set.protocol.value
        if stage is Stage.UNPROCESSED:
            protocol = f"unprocessed/{protocol}"
        own = self.name if self.evaluation_set.store else ""
        return calibration.file_path(self.workdir, self.step, protocol, own)

    def fingerprint(self, infos: Sequence[VolumeInfo]) -> str:
        """Identifies what is measured and how: equal ones share a table."""
        lines = sorted(
            f"{info.subject} {info.patient} {info.label} {info.content}"
            for info in infos
        )
        lines.append(self.evaluation_set.protocol.value)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def sets(config: ExperimentConfig) -> dict[str, EvaluationSet]:
    """The configured sets; by default the test split of the training store."""
    return config.evaluation.sets or {DEFAULT_SET: EvaluationSet()}


def sets_of_stores(
    config: ExperimentConfig, stores: Sequence[str]
) -> dict[str, EvaluationSet]:
    """The test splits of other stores, named after their folders.

    Protocol and rule are those of the config's first set. A name that is taken gets
    the parent folder before it, so that no results are overwritten.
    """
    first = next(iter(sets(config).values()))
    found: dict[str, EvaluationSet] = {}
    for store in stores:
        path = pathlib.Path(store).resolve()
        taken = {**sets(config), **found}
        name = path.name
        if name in taken and taken[name].store != store:
            name = f"{path.parent.name}_{name}"
        found[name] = dataclasses.replace(first, store=store, split="test")
    return found


def sets_with(config: ExperimentConfig, protocol: Protocol) -> dict[str, EvaluationSet]:
    """The sets under one protocol.

    A set of another protocol gets the name of this one after its own ("test_baur"):
    its results stand beside those of the configured protocol and replace nothing.
    """
    found: dict[str, EvaluationSet] = {}
    for name, chosen in sets(config).items():
        if chosen.protocol is not protocol:
            name = f"{name}_{protocol.value}"
        if name not in found or chosen.protocol is protocol:
            found[name] = dataclasses.replace(chosen, protocol=protocol)
    return found


def check_sets(config: ExperimentConfig) -> None:
    """Makes sure that every configured set can be evaluated, before training.

    Raises:
      ValueError: If a store does not fit, or a set is empty.
    """
    own = Store.open(pathlib.Path(config.data.store))
    for name, chosen in sets(config).items():
        store = _open_store(config, own, chosen)
        if not pipeline.select(store, config.data, chosen.split):
            raise ValueError(no_volumes(name, chosen.split))


def no_volumes(name: str, split: str) -> str:
    """Says that a set is empty."""
    return (
        f"Set {name!r}: the store has no {split} volumes. Give the manifest a `split` "
        "column, or choose another split."
    )


def refuse_several_processes() -> None:
    """Makes sure that this is the only process of its job.

    Raises:
      ValueError: If it is not.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"Evaluation runs in one process, and this job has {jax.process_count()}. "
            "Start run.py evaluate without --distributed."
        )


def contexts(
    config: ExperimentConfig,
    workdir: pathlib.Path,
    step: int,
    mesh: jax.sharding.Mesh,
    progress: bool,
    checkpoint: str = "",
) -> list[Context]:
    """Opens every set of a run.

    Raises:
      ValueError: If the config cannot work, or a store does not fit.
      workdir.WorkdirError: If config or recipe are not those of the training.
    """
    config_lib.validate(config)
    workdir_lib.refuse_another_config(
        workdir,
        config_lib.to_dict(config),
        functools.partial(config_lib.completed, config),
    )
    store = Store.open(pathlib.Path(config.data.store))
    workdir_lib.refuse_another_recipe(workdir, store.recipe)
    names = config.data.modalities or ",".join(store.modalities)
    return [
        Context(
            scorer=config.name,
            name=name,
            evaluation_set=evaluation_set,
            settings=config.evaluation,
            data=dataclasses.replace(config.data, modalities=names),
            workdir=workdir,
            step=step,
            training_store=store,
            store=_open_store(config, store, evaluation_set),
            mesh=mesh,
            progress=progress,
            config=config,
            checkpoint=checkpoint,
        )
        for name, evaluation_set in sets(config).items()
    ]


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
    size = -(-context.settings.batch_size // context.mesh.size)
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


class Scored(NamedTuple):
    """One volume, scored by one scorer.

    Attributes:
      scorer: By what.
      results: Stage -> what is kept.
      arrays: Its arrays.
      segmentations: Rule -> [d, H, W] bool, of the processed map.
    """

    scorer: Scorer
    results: dict[Stage, VolumeResult]
    arrays: VolumeArrays
    segmentations: dict[str, np.ndarray]


def score(
    context: Context,
    scorers: Sequence[Scorer],
    store: Store,
    infos: Sequence[VolumeInfo],
    scales: Scales,
    title: str,
    *,
    stages: Sequence[Stage] = (Stage.PROCESSED,),
    voxels: bool = False,
    pictures: bool = False,
) -> Iterator[Scored]:
    """Scores volumes with every scorer, each batch read once.

    Volumes are measured in threads while the devices score the next ones; at most
    two batches of arrays are alive.

    Args:
      context: The evaluation.
      scorers: What to score with.
      store: Where the volumes are.
      infos: The volumes.
      scales: (scorer, stage) -> thresholds and histogram edges; absent = neither.
      title: Of the progress bar.
      stages: Which maps to measure.
      voxels: Whether the results keep all voxels.
      pictures: Whether the arrays hold images and reconstructions.
    """

    def measure(scorer: Scorer, info: VolumeInfo, arrays: VolumeArrays) -> Scored:
        measured = {
            stage: measuring.measure(
                info,
                arrays,
                stage,
                scorer.protocol_of(stage),
                scales.get((scorer.name, stage), measuring.UNSCALED),
                Wanted(voxels=voxels, lesions=stage is Stage.PROCESSED),
            )
            for stage in stages
        }
        return Scored(
            scorer,
            {stage: one.result for stage, one in measured.items()},
            arrays,
            measured[stages[0]].segmentations,
        )

    bar = tqdm.tqdm(
        total=len(infos) * len(scorers),
        desc=title,
        unit="map",
        disable=None if context.progress and infos else True,  # None: on a terminal
    )
    waiting: collections.deque[concurrent.futures.Future[Scored]] = collections.deque()
    with bar, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for volumes, labels, rows in batches(context, store, infos):
            for scorer in scorers:
                found = scoring.score_volumes(
                    scorer, volumes, labels, len(rows), stages, pictures=pictures
                )
                before = len(waiting)
                for info, arrays in zip(rows, found, strict=True):
                    waiting.append(pool.submit(measure, scorer, info, arrays))
                for _ in range(before):
                    yield waiting.popleft().result()
                bar.update(len(rows))
        while waiting:
            yield waiting.popleft().result()
