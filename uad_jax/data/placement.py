"""From the store to the accelerator: assembling, placing and prefetching batches."""

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uad_jax import mesh as mesh_lib
from uad_jax.data import sources
from uad_jax.data.config import DataConfig, Placement
from uad_jax.types import Array, Batch

T = TypeVar("T")


def chosen(
    config: DataConfig,
    store: sources.Store,
    volumes: Sequence[sources.VolumeInfo],
    num_channels: int,
    mesh: Mesh,
) -> Placement:
    """Where the training volumes live: as configured, or as their size allows."""
    if config.placement is not Placement.AUTO:
        return config.placement
    _, height, width, _ = store.grid
    pixel = num_channels * store.dtype.itemsize + 1
    size = sum(v.depth for v in volumes) * height * width * pixel
    devices = mesh.local_devices
    if devices[0].platform == "cpu":  # virtual devices share one memory
        size *= len(devices)
    budget = config.device_budget_gib * 2**30
    limit = mesh_lib.device_bytes(devices[0])
    if limit:
        budget = min(budget, limit / 4)  # the rest is for the model
    return Placement.DEVICE if size <= budget else Placement.STREAM


def sharding(mesh: Mesh, *, stacked: bool = False) -> NamedSharding:
    """Sharding of batches [B, ...], or of stacked batches [K, B, ...]."""
    if stacked:
        return NamedSharding(mesh, PartitionSpec(None, mesh_lib.AXIS))
    return mesh_lib.batch_sharded(mesh)


def to_mesh(local: T, mesh: Mesh, *, stacked: bool = False) -> T:
    """Joins each process's rows into global arrays; an explicit transfer.

    Args:
      local: Tree of host arrays, [b, ...] or [K, b, ...], b the rows of this process.
      mesh: The data mesh.
      stacked: Whether there is a leading axis of steps.
    """
    where = sharding(mesh, stacked=stacked)
    if jax.process_count() == 1:
        return jax.device_put(local, where)  # one call for the whole tree
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(where, rows), local
    )


def assemble(
    image: Any,
    plane: Any,
    uid: Any,
    slice_index: Any,
    *,
    lesion_known: Any | None = None,
) -> Batch:
    """Makes a batch of what the store holds; numpy and jnp alike.

    Args:
      image: Codes, [..., H, W, C].
      plane: [..., H, W] uint8: bit 0 brain, bit 1 lesion.
      uid: [B] int32.
      slice_index: [B, (S)] int32.
      lesion_known: [B] bool; None leaves the lesions out.
    """
    planes = plane[..., None]
    on_host = isinstance(slice_index, np.ndarray)
    valid: Any = (np if on_host else jnp).ones(slice_index.shape, bool)
    return Batch(
        image=image,
        mask=(planes & np.uint8(sources.BRAIN_BIT)) != 0,
        valid=valid,
        uid=uid,
        slice_index=slice_index,
        lesion=None
        if lesion_known is None
        else (planes & np.uint8(sources.LESION_BIT)) != 0,
        lesion_known=lesion_known,
    )


class Resident:
    """Whole volumes in accelerator memory, one copy per device.

    A copy per device makes the gather local: no collective, and no device waits for
    another.
    """

    def __init__(
        self,
        store: sources.Store,
        volumes: Sequence[sources.VolumeInfo],
        channels: np.ndarray,
        mesh: Mesh,
        *,
        lesion: bool,
    ) -> None:
        slices = sum(volume.depth for volume in volumes)
        _, height, width, _ = store.grid
        image = np.empty((slices, height, width, len(channels)), store.dtype)
        plane = np.empty((slices, height, width), np.uint8)
        self._first = np.zeros(len(store.volumes), np.int32)  # row of slice 0, by uid
        self._known = np.array([volume.annotated for volume in store.volumes])
        self._lesion = lesion
        row = 0
        for volume in volumes:
            codes, bits = store.read_volume(volume.uid)
            rows = slice(row, row + volume.depth)
            image[rows], plane[rows] = codes[..., channels], bits
            self._first[volume.uid] = row
            row += volume.depth
        copy = mesh_lib.replicated(mesh)
        self._image, self._plane = (
            jax.make_array_from_process_local_data(copy, data, data.shape)
            for data in (image, plane)
        )
        self._mesh = mesh
        self._gather = {
            stacked: jax.jit(_gather, out_shardings=sharding(mesh, stacked=stacked))
            for stacked in (False, True)
        }

    def batch(self, uid: np.ndarray, z: np.ndarray, *, stacked: bool) -> Batch:
        """Gathers one global batch on the device.

        Args:
          uid: Volumes of this process's rows, [b] or [K, b] int32.
          z: Slices, [b, (S)] or [K, b, (S)] int32.
          stacked: Whether there is a leading axis of steps.
        """
        first = self._first[uid]
        rows = z + (first if z.ndim == uid.ndim else first[..., None])
        local: dict[str, np.ndarray] = {"rows": rows, "uid": uid, "slice_index": z}
        if self._lesion:
            local["lesion_known"] = self._known[uid]
        placed = to_mesh(local, self._mesh, stacked=stacked)
        return self._gather[stacked](self._image, self._plane, placed)


def _gather(image: Array, plane: Array, placed: dict[str, Array]) -> Batch:
    rows = placed["rows"]
    return assemble(
        image[rows],
        plane[rows],
        placed["uid"],
        placed["slice_index"],
        lesion_known=placed.get("lesion_known"),
    )


class Prefetch(Generic[T]):
    """Runs an iterator in a thread, a few items ahead of the consumer.

    Errors of the iterator are raised where the item is taken. `close` (or garbage
    collection) ends the thread.
    """

    def __init__(self, items: Iterator[T], depth: int = 2) -> None:
        self._queue: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        self._ended = False
        # The thread holds no reference to self, so that an abandoned iterator can be
        # collected and stops its thread.
        self._thread = threading.Thread(
            target=_fill, args=(items, self._queue, self._stop), daemon=True
        )
        self._thread.start()

    def __iter__(self) -> "Prefetch[T]":
        return self

    def __next__(self) -> T:
        if self._ended:
            raise StopIteration
        kind, value = self._queue.get()
        if kind == _ITEM:
            return value
        self._ended = True
        self._thread.join()
        if kind == _ERROR:
            raise value
        raise StopIteration

    def close(self) -> None:
        """Ends the thread; later items are lost."""
        self._ended = True
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._stop.set()


_ITEM, _ERROR, _END = "item", "error", "end"


def _fill(items: Iterator, target: queue.Queue, stop: threading.Event) -> None:
    try:
        for item in items:
            if not _put(target, stop, (_ITEM, item)):
                return
        _put(target, stop, (_END, None))
    except BaseException as error:  # raised again where the item is taken
        _put(target, stop, (_ERROR, error))
    finally:
        close = getattr(items, "close", None)
        if close is not None:
            close()


def _put(target: queue.Queue, stop: threading.Event, entry: tuple) -> bool:
    while not stop.is_set():
        try:
            target.put(entry, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False
