"""Batches of several runs side by side, for one program that trains all of them."""

import itertools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from uad_jax.data import pipeline, placement, reading, sources
from uad_jax.data.config import DataConfig, Placement
from uad_jax.types import Batch


class SideBySide:
    """The training streams of several runs as one.

    The batch of every run is bit-equal to the one that it would see alone. Runs of
    different seeds or folds draw from one store, and its volumes are held once.

    Attributes:
      placement: Where the training volumes of all runs live; never `AUTO`.
    """

    def __init__(
        self,
        store: sources.Store,
        config: DataConfig,
        inputs: pipeline.Example,
        streams: Sequence[pipeline.TrainStream],
        mesh: Mesh,
    ) -> None:
        """Joins streams.

        Args:
          store: The store of all streams.
          config: Modalities, placement and its budget.
          inputs: What one example is.
          streams: The streams, with equal shapes of their batches.
          mesh: The data mesh.
        """
        self._store, self._inputs, self._mesh = store, inputs, mesh
        self._streams = list(streams)
        self._channels = pipeline.channels(store, config.modalities)
        seen = {volume.uid: volume for one in streams for volume in one.volumes}
        self._volumes = [seen[uid] for uid in sorted(seen)]
        self.placement = placement.chosen(
            config, store, self._volumes, len(self._channels), mesh
        )

    def batches(
        self, start_step: int = 0, *, stack: int | None = None
    ) -> placement.Prefetch[Batch]:
        """Yields the batches of all M runs, from batch `start_step` on, without end.

        Args:
          start_step: First batch.
          stack: K consecutive batches in every item; None: one.

        Returns:
          Batches [K * M, B, ...], step by step and in each step run by run, split
          over the devices on axis 1.

        Raises:
          sources.StoreError: When taking an item: its records cannot be read.
        """
        make = self._streamed
        if self.placement is Placement.DEVICE:
            make = self._gathered
        return placement.Prefetch(make(start_step, stack or 1))

    def _streamed(self, start_step: int, stack: int) -> Iterator[Batch]:
        hosts = [one.host_batches(start_step) for one in self._streams]
        while True:
            group = [next(host) for _ in range(stack) for host in hosts]
            stacked = jax.tree.map(lambda *rows: np.stack(rows), *group)
            yield placement.to_mesh(stacked, self._mesh, stacked=True)

    def _gathered(self, start_step: int, stack: int) -> Iterator[Batch]:
        resident = placement.Resident(
            self._store,
            self._volumes,
            self._channels,
            self._mesh,
            lesion=self._inputs.needs_lesion,
        )
        for step in itertools.count(start_step, stack):
            steps = range(step, step + stack)
            block = np.stack([one.block(n) for n in steps for one in self._streams])
            uid, z = reading.spread(block, self._inputs.num_slices)
            yield resident.batch(uid, z, stacked=True)
