"""Which slices make up training batch n: a function of the seed and n alone.

The order depends neither on the step that training starts from, nor on workers,
threads, processes or devices.
"""

import dataclasses
from collections.abc import Sequence

import grain
import numpy as np

from uad_jax.data import sources
from uad_jax.data.config import Sampling


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The examples of one epoch.

    Attributes:
      uid: Volume of the example, [N] int32.
      low: Smallest first slice that may be drawn, [N] int32.
      high: Largest first slice that may be drawn, [N] int32.
    """

    uid: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def __len__(self) -> int:
        return len(self.uid)


def candidates(
    volumes: Sequence[sources.VolumeInfo],
    pixels: int,
    *,
    sampling: Sampling,
    num_slices: int | None,
    min_brain_fraction: float,
) -> Candidates:
    """Lists the examples of one epoch.

    `SLICES`: every slice with enough brain once; slabs of S slices: as many per
    volume as fit without overlap between its first and last slice with enough brain,
    each with its first slice drawn anew every epoch. `ONE_PER_VOLUME`: one example of
    every volume, drawn from all its slices.

    Args:
      volumes: The training volumes.
      pixels: Pixels of a slice, H * W.
      sampling: What an epoch is.
      num_slices: S, or None for single slices.
      min_brain_fraction: Smallest share of brain pixels (`SLICES` only).

    Raises:
      ValueError: If a volume is shallower than a slab, or no example is left.
    """
    size = num_slices or 1
    shallow = [v.subject for v in volumes if v.depth < size]
    if shallow:
        least = min(volume.depth for volume in volumes)
        raise ValueError(
            f"{len(shallow)} of {len(volumes)} volumes have fewer slices than a slab "
            f"of {size}, the shallowest {least}: {', '.join(shallow[:5])}. Use "
            f"num_slices <= {least}."
        )
    rows: list[tuple[int, int, int]] = []
    for volume in volumes:
        if sampling is Sampling.ONE_PER_VOLUME:
            rows.append((volume.uid, 0, volume.depth - size))
            continue
        share = np.array(volume.brain_voxels) / pixels
        enough = np.flatnonzero((share >= min_brain_fraction) & (share > 0))
        if num_slices is None:
            rows.extend((volume.uid, int(z), int(z)) for z in enough)
        elif enough.size:
            rows.extend(_slabs(volume, int(enough[0]), int(enough[-1]) + 1, size))
    if not rows:
        raise ValueError(
            f"None of {len(volumes)} volumes has a slice with {min_brain_fraction:.0%} "
            "brain. Lower data.min_brain_fraction, or check the brain masks."
        )
    table = np.array(rows, np.int32)
    return Candidates(table[:, 0], table[:, 1], table[:, 2])


def _slabs(
    volume: sources.VolumeInfo, start: int, stop: int, size: int
) -> list[tuple[int, int, int]]:
    count = max(1, (stop - start) // size)
    low = max(0, min(start, volume.depth - size))
    return [(volume.uid, low, max(low, stop - size))] * count


@dataclasses.dataclass(frozen=True)
class _Draw(grain.transforms.RandomMap):
    """Draws the first slices of a batch; grain keys the rng by the batch's number."""

    candidates: Candidates

    def random_map(self, element: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        low, high = self.candidates.low[element], self.candidates.high[element]
        z = rng.integers(low, high, endpoint=True, dtype=np.int32)
        return np.stack([self.candidates.uid[element], z], axis=1)


@dataclasses.dataclass(frozen=True)
class _Fixed(grain.transforms.Map):
    """Looks up the first slices of a batch."""

    candidates: Candidates

    def map(self, element: np.ndarray) -> np.ndarray:
        uid, z = self.candidates.uid[element], self.candidates.low[element]
        return np.stack([uid, z], axis=1)


def index_stream(
    examples: Candidates, batch_size: int, seed: int
) -> "grain.MapDataset[np.ndarray]":
    """Makes the endless data set of global batches of (uid, first slice).

    Every epoch is shuffled anew, and batches may straddle epochs, so that every
    example is seen exactly once per epoch whatever the batch size.

    Args:
      examples: The examples of one epoch.
      batch_size: Rows of the global batch, B.
      seed: Seeds the shuffle and the drawn slices.

    Returns:
      A data set whose element n is global batch n, [B, 2] int32.
    """
    chain = grain.MapDataset.range(len(examples)).seed(seed).shuffle().repeat()
    batches = chain.batch(batch_size, drop_remainder=True)
    if np.array_equal(examples.low, examples.high):
        return batches.map(_Fixed(examples))
    return batches.random_map(_Draw(examples))


def spread_choice(examples: Candidates, count: int, seed: int) -> np.ndarray:
    """Chooses fixed examples, evenly over the volumes.

    Args:
      examples: What there is to choose from.
      count: How many; 0 = all.
      seed: Seeds the choice.

    Returns:
      Rows of (uid, first slice), [min(count, N), 2] int32.
    """
    rng = np.random.default_rng(seed)
    mixed = rng.permutation(len(examples))
    uid = examples.uid[mixed]
    z = rng.integers(examples.low[mixed], examples.high[mixed], endpoint=True)
    turn = np.zeros(len(mixed), np.int64)  # how many of its volume come before it
    for number in np.unique(uid):
        turn[uid == number] = np.arange((uid == number).sum())
    chosen = np.argsort(turn, kind="stable")[: count or None]
    return np.stack([uid[chosen], z[chosen]], axis=1).astype(np.int32)
