"""Host arrays of batches and volumes, read from a store."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from uad_jax.data import placement, sources
from uad_jax.types import Labels, Volumes

_ATTEMPTS = 2  # a second one for a network file system's hiccup


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """Takes the place of a batch that cannot be read.

    An exception inside grain would break its iterator for good.
    """

    reason: str


@dataclasses.dataclass(frozen=True)
class Reader(grain.transforms.Map):
    """Reads one process's block of global batches; picklable for workers.

    Attributes:
      store: The store.
      channels: Channels to keep, in this order.
      num_slices: Slab length, or None.
      needs_lesion: Whether lesions are read.
      rows: The block of every global batch.
    """

    store: sources.Store
    channels: np.ndarray
    num_slices: int | None
    needs_lesion: bool
    rows: slice

    def map(self, element: np.ndarray) -> dict[str, Any] | Unreadable:
        """Reads the block of a global batch of (uid, first slice), [B, 2]."""
        reason = ""
        for _ in range(_ATTEMPTS):
            try:
                return self.read(element[self.rows])
            except sources.StoreError as error:
                reason = str(error)
        return Unreadable(reason)

    def read(self, block: np.ndarray) -> dict[str, Any]:
        """Reads rows of (uid, first slice), [b, 2], as the fields of a `Batch`."""
        uid, z = spread(block, self.num_slices)
        volume = uid if self.num_slices is None else uid[:, None]
        found = self.store.records(np.broadcast_to(volume, z.shape), z)
        image, plane = self.store.read_slices(found.ravel())
        if not np.array_equal(self.channels, np.arange(image.shape[-1])):
            image = image[..., self.channels]
        annotated = [self.store.volumes[int(number)].annotated for number in uid]
        batch = placement.assemble(
            image.reshape(*z.shape, *image.shape[1:]),
            plane.reshape(*z.shape, *plane.shape[1:]),
            uid,
            z,
            lesion_known=np.array(annotated) if self.needs_lesion else None,
        )
        fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
        return {name: value for name, value in fields.items() if value is not None}


def spread(block: np.ndarray, num_slices: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Splits rows of (uid, first slice), [..., 2], into uid [...] and z [..., (S)]."""
    uid, z = block[..., 0], block[..., 1]
    if num_slices is not None:
        z = z[..., None] + np.arange(num_slices, dtype=np.int32)
    return np.ascontiguousarray(uid), np.ascontiguousarray(z)


def blank(fields: dict[str, Any], real: np.ndarray) -> dict[str, Any]:
    """Turns the rows of a `Batch`'s fields that are not `real`, [B], into padding."""
    kept = {name: np.array(rows) for name, rows in fields.items()}
    for rows in kept.values():
        rows[~real] = 0
    kept["uid"][~real] = -1
    return kept


def volumes(
    store: sources.Store,
    infos: Sequence[sources.VolumeInfo],
    channels: np.ndarray,
    batch_size: int,
) -> tuple[Volumes, Labels]:
    """Reads volumes, padded to the store's depth and to `batch_size` volumes."""
    depth, height, width, _ = store.grid
    plane = np.zeros((batch_size, depth, height, width), np.uint8)
    image = np.zeros((*plane.shape, len(channels)), store.dtype)
    annotated, abnormal = np.zeros(batch_size, bool), np.zeros(batch_size, bool)
    for row, info in enumerate(infos):
        codes, plane[row, : info.depth] = store.read_volume(info.uid)
        image[row, : info.depth] = codes[..., channels]
        annotated[row] = info.annotated
        abnormal[row] = info.label == "abnormal"
    lesion = (plane & sources.LESION_BIT) != 0
    rows = [(info.uid, info.depth) for info in infos]
    return assemble_volumes(image, plane, rows), Labels(
        lesion=lesion, annotated=annotated, abnormal=abnormal
    )


def assemble_volumes(
    image: np.ndarray, plane: np.ndarray, rows: Sequence[tuple[int, int]]
) -> Volumes:
    """Makes volumes of what a store holds.

    Args:
      image: Codes, [B, D, H, W, C]; 0 on padding.
      plane: [B, D, H, W] uint8: bit 0 brain; 0 on padding.
      rows: (uid, valid slices) of the first rows; the others are padding.

    Returns:
      The volumes as host arrays.
    """
    valid = np.zeros(plane.shape[:2], bool)
    uid = np.full(len(plane), -1, np.int32)
    for row, (number, depth) in enumerate(rows):
        valid[row, :depth] = True
        uid[row] = number
    mask = (plane[..., None] & sources.BRAIN_BIT) != 0
    host: dict[str, Any] = {"image": image, "mask": mask, "valid": valid, "uid": uid}
    return Volumes(**host)
