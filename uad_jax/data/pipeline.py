"""Batches for training, validation and scoring: views of the same records."""

import hashlib
import itertools
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import grain
import jax
import numpy as np
from absl import flags, logging
from jax.sharding import Mesh

from uad_jax.data import order, placement, reading, sources, splits
from uad_jax.data.config import DataConfig, Placement, Sampling
from uad_jax.types import Batch, Labels, Volumes

_READ_AHEAD = 4  # batches; grain's default holds 500


class Example(Protocol):
    """What one training example is; `methods.base.Inputs` has this form."""

    @property
    def num_slices(self) -> int | None:
        """None for single slices, S for slabs of S consecutive slices."""

    @property
    def needs_lesion(self) -> bool:
        """Whether `Batch.lesion` must be filled."""


def select(
    store: sources.Store, config: DataConfig, split: str
) -> list[sources.VolumeInfo]:
    """Lists the volumes of one split that have all the chosen modalities.

    Args:
      store: The store.
      config: Names the fold and the modalities.
      split: "train", "val" or "test".

    Raises:
      ValueError: If the split leaks, or a modality is not in the store.
    """
    wanted = {store.modalities[c] for c in channels(store, config.modalities)}
    roles = splits.assign(store.volumes, config.fold)
    chosen = [v for v in store.volumes if roles.get(v.subject) == split]
    without = [v.subject for v in chosen if not wanted <= set(v.modalities)]
    if without:
        logging.warning(
            "%s: %d of %d %s volumes lack one of %s and are left out: %s",
            store.path,
            len(without),
            len(chosen),
            split,
            ", ".join(sorted(wanted)),
            ", ".join(without),
        )
    return [v for v in chosen if v.subject not in without]


def channels(store: sources.Store, modalities: str) -> np.ndarray:
    """Channel numbers of comma-separated modalities; "" = all of them.

    Raises:
      ValueError: If a modality is not in the store.
    """
    names = [name.strip() for name in modalities.split(",") if name.strip()]
    unknown = [name for name in names if name not in store.modalities]
    if unknown:
        raise ValueError(
            f"{store.path}: no modality {', '.join(unknown)}; the store has "
            f"{', '.join(store.modalities)}. Change data.modalities."
        )
    chosen = names or store.modalities
    return np.array([store.modalities.index(name) for name in chosen])


def train_stream(
    store: sources.Store,
    config: DataConfig,
    inputs: Example,
    *,
    batch_size: int,
    seed: int,
    mesh: Mesh,
    volumes: Sequence[sources.VolumeInfo] | None = None,
) -> "TrainStream":
    """Opens the endless, step-indexed stream of training batches.

    Args:
      store: The training store.
      config: Sampling, modalities, placement, workers.
      inputs: What one example is.
      batch_size: Rows of the global batch.
      seed: Seeds the order and the drawn slices.
      mesh: The data mesh.
      volumes: The training volumes; None = those of the split "train".

    Raises:
      ValueError: If no volume is left, the batch cannot be split, or slabs are
        deeper than the volumes.
    """
    chosen = select(store, config, "train") if volumes is None else list(volumes)
    if not chosen:
        raise ValueError(
            f"{store.path}: no training volume in fold {config.fold} has the "
            f"modalities {config.modalities or ', '.join(store.modalities)}."
        )
    parts = jax.process_count()
    for count, what in ((mesh.size, "devices"), (parts, "processes")):
        if batch_size % count:
            raise ValueError(
                f"A batch of {batch_size} rows cannot be split over {count} {what}. "
                f"Use a multiple of {count}."
            )
    return TrainStream(
        store,
        config,
        inputs,
        chosen,
        batch_size=batch_size,
        seed=seed,
        mesh=mesh,
        process=(jax.process_index(), parts),
    )


class TrainStream:
    """Training batches, each a function of its step alone. Use `train_stream`.

    Batch n is the same bits whatever step the stream was opened at, and whatever the
    placement, the workers, the threads, the processes and the devices are.

    Attributes:
      volumes: The training volumes.
      num_examples: Examples of an epoch.
      steps_per_epoch: Whole batches of an epoch, at least 1.
      fingerprint: Hash of all that the batches depend on: content of the store,
        volumes, seed, batch size, sampling, modalities.
      placement: Where the training fold lives; never `AUTO`.
    """

    def __init__(
        self,
        store: sources.Store,
        config: DataConfig,
        inputs: Example,
        volumes: list[sources.VolumeInfo],
        *,
        batch_size: int,
        seed: int,
        mesh: Mesh,
        process: tuple[int, int],
    ) -> None:
        self.volumes = volumes
        self._store, self._config, self._inputs = store, config, inputs
        self._channels = channels(store, config.modalities)
        self._batch_size, self._mesh = batch_size, mesh
        examples = order.candidates(
            volumes,
            store.grid[1] * store.grid[2],
            sampling=config.sampling,
            num_slices=inputs.num_slices,
            min_brain_fraction=config.min_brain_fraction,
        )
        self.num_examples = len(examples)
        self.steps_per_epoch = max(1, self.num_examples // batch_size)
        self._order = order.index_stream(examples, batch_size, seed)
        index, count = process
        rows = batch_size // count
        self._rows = slice(index * rows, (index + 1) * rows)
        self.placement = placement.chosen(
            config, store, volumes, len(self._channels), mesh
        )
        self._resident: placement.Resident | None = None
        self.fingerprint = self._fingerprint(seed)

    def _fingerprint(self, seed: int) -> str:
        depends_on = [
            self._store.fingerprint,
            [volume.uid for volume in self.volumes],
            self._channels.tolist(),
            [seed, self._batch_size],
            [self._config.sampling.value, self._config.min_brain_fraction],
            [self._inputs.num_slices, self._inputs.needs_lesion],
        ]
        return hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()

    def spec(self) -> Batch:
        """Shapes, dtypes and shardings of a global batch (`jax.ShapeDtypeStruct`)."""
        where = placement.sharding(self._mesh)
        _, height, width, _ = self._store.grid
        slab = () if self._inputs.num_slices is None else (self._inputs.num_slices,)
        rows = (self._batch_size, *slab)

        def leaf(shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

        mask = leaf((*rows, height, width, 1), bool)
        lesion = self._inputs.needs_lesion
        return Batch(
            image=leaf((*rows, height, width, len(self._channels)), self._store.dtype),
            mask=mask,
            valid=leaf(rows, bool),
            uid=leaf((self._batch_size,), np.int32),
            slice_index=leaf(rows, np.int32),
            lesion=mask if lesion else None,
            lesion_known=leaf((self._batch_size,), bool) if lesion else None,
        )

    def ids(self, step: int) -> list[tuple[int, int]]:
        """Volume and (first) slice of every row of global batch `step`."""
        return [(int(uid), int(z)) for uid, z in self._order[step]]

    def block(self, step: int) -> np.ndarray:
        """Volume and (first) slice of this process's rows of a batch, [b, 2] int32."""
        return self._order[step][self._rows]

    def batches(
        self, start_step: int = 0, *, stack: int | None = None
    ) -> placement.Prefetch[Batch]:
        """Yields global batches on the mesh, from batch `start_step` on, without end.

        Batches are made ready in a thread. Close the iterator (it is a context
        manager) when done.

        Args:
          start_step: First batch.
          stack: K: every item holds K consecutive batches, [K, B, ...], split over
            the devices on axis 1. None: single batches, [B, ...].

        Returns:
          Batches of compact dtype; `ops.intensity.decode` makes them float32.

        Raises:
          sources.StoreError: When taking an item: its records cannot be read.
        """
        if self.placement is Placement.DEVICE:
            return placement.Prefetch(self._gathered(start_step, stack))
        return placement.Prefetch(self._streamed(start_step, stack))

    def host_batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Yields this process's rows of every batch as numpy arrays."""
        reader = reading.Reader(
            self._store,
            self._channels,
            self._inputs.num_slices,
            self._inputs.needs_lesion,
            self._rows,
        )
        source = self._order.slice(slice(start_step, None)).map(reader)
        options = grain.ReadOptions(
            num_threads=self._config.read_threads, prefetch_buffer_size=_READ_AHEAD
        )
        dataset = source.to_iter_dataset(options)
        if self._config.num_workers:
            _check_workers()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._config.num_workers)
            )
        for step, fields in enumerate(dataset, start=start_step):
            if isinstance(fields, reading.Unreadable):
                raise sources.StoreError(f"Training batch {step}: {fields.reason}")
            yield Batch(**fields)

    def _streamed(self, start_step: int, stack: int | None) -> Iterator[Batch]:
        host = self.host_batches(start_step)
        while stack is None:
            yield placement.to_mesh(next(host), self._mesh)
        while True:
            group = list(itertools.islice(host, stack))
            stacked = jax.tree.map(lambda *rows: np.stack(rows), *group)
            yield placement.to_mesh(stacked, self._mesh, stacked=True)

    def _gathered(self, start_step: int, stack: int | None) -> Iterator[Batch]:
        if self._resident is None:
            self._resident = placement.Resident(
                self._store,
                self.volumes,
                self._channels,
                self._mesh,
                lesion=self._inputs.needs_lesion,
            )
        for step in itertools.count(start_step, stack or 1):
            blocks = [self.block(n) for n in range(step, step + (stack or 1))]
            block = blocks[0] if stack is None else np.stack(blocks)
            uid, z = reading.spread(block, self._inputs.num_slices)
            yield self._resident.batch(uid, z, stacked=stack is not None)


def validation_batches(
    store: sources.Store,
    volumes: Sequence[sources.VolumeInfo],
    inputs: Example,
    *,
    batch_size: int,
    num_examples: int,
    seed: int,
    mesh: Mesh,
    modalities: str = "",
    sampling: Sampling = Sampling.SLICES,
) -> list[Batch]:
    """Makes a set of examples that checkpoints are compared on.

    Every volume gives the same number of examples, to within one. The last batch is
    padded with rows of `valid` False and `uid` -1, so nothing is dropped and nothing
    compiles twice.

    Args:
      store: The store.
      volumes: The validation volumes.
      inputs: What one example is.
      batch_size: Rows of a global batch.
      num_examples: Slices or slabs in all; 0 = all there are.
      seed: Seeds the choice.
      mesh: The data mesh.
      modalities: Comma-separated; "" = all.
      sampling: SLICES chooses from the slices with brain, ONE_PER_VOLUME one of all
        slices of each volume.

    Raises:
      ValueError: If there is no example.
    """
    examples = order.candidates(
        volumes,
        store.grid[1] * store.grid[2],
        sampling=sampling,
        num_slices=inputs.num_slices,
        min_brain_fraction=0.0,
    )
    table = order.spread_choice(examples, num_examples, seed)
    padding = -len(table) % batch_size
    rows = np.concatenate([table, np.repeat(table[:1], padding, axis=0)])
    real = np.arange(len(rows)) < len(table)
    count = jax.process_count()
    per_process = batch_size // count
    chosen = channels(store, modalities)
    batches = []
    for first in range(0, len(rows), batch_size):
        start = first + jax.process_index() * per_process
        mine = slice(start, start + per_process)
        reader = reading.Reader(
            store, chosen, inputs.num_slices, inputs.needs_lesion, mine
        )
        batch = Batch(**reading.blank(reader.read(rows[mine]), real[mine]))
        batches.append(placement.to_mesh(batch, mesh))
    return batches


def volume_batches(
    store: sources.Store,
    volumes: Sequence[sources.VolumeInfo],
    *,
    modalities: str,
    batch_size: int,
    mesh: Mesh,
) -> Iterator[tuple[Volumes, Labels, list[sources.VolumeInfo]]]:
    """Yields whole volumes to score, each device owning whole volumes.

    Volumes are padded to the depth of the store's deepest one, and the last batch
    with empty volumes: `valid` False, `uid` -1, no label.

    Args:
      store: The store.
      volumes: The volumes.
      modalities: Comma-separated; "" = all.
      batch_size: Volumes at a time; rounded up to a multiple of the devices.
      mesh: The data mesh.

    Yields:
      The volumes on the mesh, the labels of the whole global batch on the host, and
      what is known of its real volumes, in order.
    """
    batch_size += -batch_size % mesh.size
    per_process = batch_size // jax.process_count()
    start = jax.process_index() * per_process
    chosen = channels(store, modalities)
    for first in range(0, len(volumes), batch_size):
        infos = list(volumes[first : first + batch_size])
        batch, labels = reading.volumes(store, infos, chosen, batch_size)
        mine = jax.tree.map(lambda leaf: leaf[start : start + per_process], batch)
        yield placement.to_mesh(mine, mesh), labels, infos


def _check_workers() -> None:
    if multiprocessing.parent_process() is not None:
        raise ValueError(
            "A worker process tried to start workers. Put the call under "
            "`if __name__ == '__main__':`, or use data.num_workers = 0."
        )
    if not flags.FLAGS.is_parsed():  # grain's workers read absl flags
        flags.FLAGS.mark_as_parsed()
