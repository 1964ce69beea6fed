"""Prepared scans as the integer codes that a store keeps, by a pool of processes."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from uad_jax.data import sources
from uad_jax.ops import intensity
from uad_jax.types import Geometry


class Prepared(Protocol):
    """A scan on the model grid, as `preprocess.apply` returns it."""

    @property
    def image(self) -> np.ndarray:
        """[D, H, W, C] float32 of about [0, 1], or uint8 pictures."""

    @property
    def brain(self) -> np.ndarray:
        """[D, H, W] bool."""

    @property
    def lesion(self) -> np.ndarray:
        """[D, H, W] bool."""

    @property
    def geometry(self) -> Geometry:
        """How the grid sits in the native scan."""

    @property
    def notes(self) -> Sequence[str]:
        """What a user should know, one sentence each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One scan to write.

    Attributes:
      subject: Name of the scan, unique.
      load: Makes the prepared scan; picklable if a pool is used.
      modalities: Of the channels that `load` returns, in this order.
      patient: Name of the person; "" = the subject.
      label: "healthy", "abnormal" or "sham".
      annotated: Whether the lesion mask is an annotation.
      split: "train", "val", "test" or None.
      fold: Validation fold or None.
      licence: Licence of the scan.
      extra: Further columns of the manifest.
    """

    subject: str
    load: Callable[[], Prepared]
    modalities: tuple[str, ...]
    patient: str = ""
    label: str = "healthy"
    annotated: bool = True
    split: str | None = None
    fold: int | None = None
    licence: str = ""
    extra: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What a store keeps of a scan.

    Attributes:
      codes: [D, H, W, C] uint16 or uint8, C = all modalities of the store.
      plane: [D, H, W] uint8: bit 0 brain, bit 1 lesion.
      geometry: How the grid sits in the native scan.
      clipped: Values outside the range of the intensity code.
      content: SHA-256 of codes and plane.
      notes: What a user should know, one sentence each.
    """

    codes: np.ndarray
    plane: np.ndarray
    geometry: Geometry
    clipped: int
    content: str
    notes: tuple[str, ...]


def encode_all(
    scans: Sequence[Source], modalities: tuple[str, ...], workers: int | None
) -> Iterator[Encoded | str]:
    """Encodes scans in a pool, at most two per process ahead of the consumer.

    Args:
      scans: The scans.
      modalities: Channels of the store; those that a scan lacks become 0.
      workers: Processes; None = all cores, 0 = this process.

    Yields:
      In the order of `scans`, the encoded scan, or what went wrong with it.
    """
    workers = os.cpu_count() or 1 if workers is None else workers
    if workers == 0:
        yield from (_encode(scan, modalities) for scan in scans)
        return
    # Spawned, because forking a process that runs JAX's threads can deadlock.
    context = multiprocessing.get_context("spawn")
    pending: collections.deque[concurrent.futures.Future] = collections.deque()
    waiting = iter(scans)
    with concurrent.futures.ProcessPoolExecutor(
        min(workers, len(scans)), mp_context=context
    ) as pool:
        try:
            for scan in itertools.islice(waiting, 2 * workers):
                pending.append(pool.submit(_encode, scan, modalities))
            while pending:
                yield pending.popleft().result()
                for scan in itertools.islice(waiting, 1):
                    pending.append(pool.submit(_encode, scan, modalities))
        finally:
            pool.shutdown(cancel_futures=True)


def _encode(scan: Source, modalities: tuple[str, ...]) -> Encoded | str:
    """Prepares and encodes one scan; returns what went wrong as text."""
    try:
        return _encode_prepared(scan.load(), scan.modalities, modalities)
    except Exception as error:  # any failure of one scan is listed with the others
        return f"{type(error).__name__}: {error}"


def _encode_prepared(
    scan: Prepared, has: tuple[str, ...], modalities: tuple[str, ...]
) -> Encoded:
    image = np.asarray(scan.image)
    brain, lesion = np.asarray(scan.brain, bool), np.asarray(scan.lesion, bool)
    expected = (*brain.shape, len(has))
    if image.ndim != 4 or image.shape != expected or lesion.shape != brain.shape:
        raise ValueError(
            f"The image is {image.shape} and the lesion mask {lesion.shape}, but the "
            f"brain mask is {brain.shape} and the modalities are {', '.join(has)}: "
            f"expected an image of {expected}."
        )
    if not np.isfinite(image).all():
        raise ValueError("The prepared image has NaN or Inf values.")
    if image.dtype == np.uint8:
        codes, clipped = image, 0
    else:
        codes, clipped = intensity.encode(image)
    if has != modalities:  # channels that the scan lacks stay 0
        wide = np.zeros((*codes.shape[:-1], len(modalities)), codes.dtype)
        wide[..., [modalities.index(name) for name in has]] = codes
        codes = wide
    codes = np.ascontiguousarray(codes)
    plane = np.where(brain, sources.BRAIN_BIT, 0) | np.where(
        lesion, sources.LESION_BIT, 0
    )
    plane = plane.astype(np.uint8)
    content = hashlib.sha256(codes.tobytes() + plane.tobytes())
    return Encoded(
        codes=codes,
        plane=plane,
        geometry=scan.geometry,
        clipped=clipped,
        content=content.hexdigest(),
        notes=tuple(scan.notes),
    )
