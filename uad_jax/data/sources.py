"""Prepared stores: fast random reads of slices and volumes.

A store is a directory made by `data.builder`: a TFDS data set of one record per
slice (array_record), `index.npz` (which record holds which slice), `volumes.json`
and `store.json`. Reading needs neither TensorFlow nor JAX.
"""

import dataclasses
import hashlib
import json
import pathlib
import zlib
from typing import Any

import numpy as np
from array_record.python import array_record_module
from google.protobuf import message
from tensorflow_datasets.proto import tf_example_pb2

from uad_jax.types import Geometry

SCHEMA_VERSION = 1
BRAIN_BIT, LESION_BIT = 1, 2  # bits of a record's `plane`
RECORDS = "slices"  # TFDS data set inside the store
STORE_FILE, VOLUMES_FILE, INDEX_FILE = "store.json", "volumes.json", "index.npz"

# Random reads must not fetch ahead, and a record is about 10 kB.
_READER_OPTIONS = {
    "options": "readahead_buffer_size:0",
    "file_reader_buffer_size": 32768,
}
_READ_ERRORS = (
    ValueError,
    LookupError,
    RuntimeError,
    OSError,
    zlib.error,
    message.DecodeError,
)


class StoreError(ValueError):
    """A store is missing, damaged, or was written by another version."""


@dataclasses.dataclass(frozen=True)
class VolumeInfo:
    """What is known of one volume of a store, apart from its voxels.

    Attributes:
      uid: Number of the volume in the store, from 0.
      subject: Name of the scan, unique in the store.
      patient: Name of the person; folds and leak checks go by it.
      split: "train", "val", "test" or None.
      fold: Fold in which the volume validates, or None.
      label: "healthy", "abnormal" or "sham".
      annotated: Whether the lesion mask is an annotation (an empty one counts for
        healthy volumes).
      licence: Licence of the scan.
      modalities: Modalities that the scan has; its other channels are empty.
      geometry: How the grid sits in the native scan.
      brain_voxels: Brain voxels of every slice, length D of this volume.
      clipped: Values outside the range of the intensity code.
      content: SHA-256 of the volume's codes and planes.
      notes: What a user should know of the scan, one sentence each.
      extra: Further columns of the manifest.
    """

    uid: int
    subject: str
    patient: str
    split: str | None
    fold: int | None
    label: str
    annotated: bool
    licence: str
    modalities: tuple[str, ...]
    geometry: Geometry
    brain_voxels: list[int]
    clipped: int
    content: str
    notes: tuple[str, ...] = ()
    extra: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def depth(self) -> int:
        """Slices of the volume."""
        return len(self.brain_voxels)

    def to_json(self) -> dict[str, Any]:
        """Converts to plain JSON types."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        geometry = self.geometry
        fields["modalities"] = list(self.modalities)
        fields["notes"] = list(self.notes)
        fields["geometry"] = {
            "native_shape": [int(n) for n in geometry.native_shape],
            "native_affine": np.asarray(geometry.native_affine).tolist(),
            "grid_to_native": np.asarray(geometry.grid_to_native).tolist(),
        }
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "VolumeInfo":
        """Inverts `to_json`."""
        geometry = fields["geometry"]
        x, y, z = geometry["native_shape"]
        return cls(
            **{
                **fields,
                "modalities": tuple(fields["modalities"]),
                "notes": tuple(fields["notes"]),
                "geometry": Geometry(
                    native_shape=(x, y, z),
                    native_affine=np.array(geometry["native_affine"], np.float64),
                    grid_to_native=np.array(geometry["grid_to_native"], np.float64),
                ),
            }
        )


class Store:
    """A prepared store, opened for reading. Picklable: open files stay behind.

    Attributes:
      path: Directory of the store.
      grid: Largest depth, height, width and number of modalities, (D, H, W, C).
      dtype: Of the codes, uint16 or uint8.
      modalities: Names of the channels.
      volumes: What is known of every volume; `volumes[uid].uid == uid`.
      recipe: The preprocessing recipe as written.
      fingerprint: Hash of the content: ids, labels, splits and voxels, not of
        paths or file layout.
    """

    def __init__(
        self,
        path: pathlib.Path,
        meta: dict[str, Any],
        volumes: tuple[VolumeInfo, ...],
        records: np.ndarray,
    ) -> None:
        self.path = path
        self.meta = meta
        self.volumes = volumes
        depth, height, width, channels = meta["grid"]
        self.grid: tuple[int, int, int, int] = (depth, height, width, channels)
        self.dtype = np.dtype(meta["dtype"])
        self.modalities: tuple[str, ...] = tuple(meta["modalities"])
        self.recipe: dict[str, Any] = meta["recipe"]
        self.fingerprint: str = meta["fingerprint"]
        self._records = records
        self._starts = np.cumsum([0, *(shard["records"] for shard in meta["shards"])])
        self._readers: dict[int, Any] = {}

    @classmethod
    def open(cls, path: pathlib.Path | str) -> "Store":
        """Opens a store after checking its file sizes and small files' hashes.

        Raises:
          StoreError: If it is missing, torn, or of another schema version.
        """
        path = pathlib.Path(path)
        meta = read_meta(path)
        problems = damage(path, meta, deep=False)
        if problems:
            raise StoreError(
                f"{path}: the store is damaged: {'; '.join(problems)}. Run prepare "
                "again: it rebuilds a damaged store."
            )
        rows = json.loads((path / VOLUMES_FILE).read_text(encoding="utf-8"))
        volumes = tuple(VolumeInfo.from_json(row) for row in rows)
        with np.load(path / INDEX_FILE) as index:
            records = np.full((len(volumes), meta["grid"][0]), -1, np.int64)
            records[index["uid"], index["z"]] = index["record"]
        return cls(path, meta, volumes, records)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}

    @property
    def num_records(self) -> int:
        """Slices in the store."""
        return int(self._starts[-1])

    def records(self, uid: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Record numbers of slices, any shape, int64."""
        found = self._records[uid, z]
        if (found < 0).any():
            bad = np.flatnonzero(np.ravel(found) < 0)[0]
            raise StoreError(
                f"{self.path}: volume {np.ravel(uid)[bad]} has no slice "
                f"{np.ravel(z)[bad]}; it has {self.volumes[np.ravel(uid)[bad]].depth}."
            )
        return found

    def read_slices(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reads slices by record number, in the order given.

        Args:
          records: Record numbers, [N] integers.

        Returns:
          Codes [N, H, W, C] uint16 or uint8, and planes [N, H, W] uint8 (bit 0
          brain, bit 1 lesion).

        Raises:
          StoreError: If a record cannot be read.
        """
        records = np.asarray(records, np.int64)
        _, height, width, channels = self.grid
        image = np.empty((len(records), height, width, channels), self.dtype)
        plane = np.empty((len(records), height, width), np.uint8)
        shards = np.searchsorted(self._starts, records, side="right") - 1
        for shard in np.unique(shards):
            rows = np.flatnonzero(shards == shard)
            positions = (records[rows] - self._starts[shard]).tolist()
            try:
                self._read(int(shard), positions, rows.tolist(), image, plane)
            except _READ_ERRORS as error:
                raise self._reading_error(records[rows], error) from error
        return image, plane

    def read_volume(self, uid: int) -> tuple[np.ndarray, np.ndarray]:
        """Reads a whole volume: codes [D, H, W, C] and planes [D, H, W] uint8."""
        z = np.arange(self.volumes[uid].depth)
        return self.read_slices(self.records(np.full_like(z, uid), z))

    def _read(
        self,
        shard: int,
        positions: list[int],
        rows: list[int],
        image: np.ndarray,
        plane: np.ndarray,
    ) -> None:
        # As flat bytes: reshaping every record would cost as much as unpacking it.
        targets = {
            "image": image.reshape(len(image), -1).view(np.uint8),
            "plane": plane.reshape(len(plane), -1),
        }
        examples = self._reader(shard).read(positions)
        for row, example in zip(rows, examples, strict=True):
            features = parse(example)
            for name, target in targets.items():
                packed = features[name].bytes_list.value[0]
                target[row] = unpack(packed, target.shape[1])

    def _reader(self, shard: int) -> Any:
        if shard not in self._readers:
            name = self.meta["shards"][shard]["file"]
            self._readers[shard] = open_records(self.path / name)
        return self._readers[shard]

    def _reading_error(self, records: np.ndarray, error: Exception) -> StoreError:
        return StoreError(
            f"{self.path}: a record among {records[:8].tolist()}"
            f"{'...' if len(records) > 8 else ''} cannot be read ({error}). Run "
            "prepare again: it rebuilds a damaged store."
        )


def open_records(path: pathlib.Path) -> Any:
    """Opens one array_record file for random reads (safe to share by threads)."""
    return array_record_module.ArrayRecordReader(str(path), **_READER_OPTIONS)


def parse(example: bytes) -> Any:
    """Parses a serialised tf.train.Example to its feature map."""
    return tf_example_pb2.Example.FromString(example).features.feature


def unpack(packed: bytes, size: int) -> np.ndarray:
    """Unpacks a ZLIB stream of `size` bytes, [size] uint8.

    What `data.records` writes is one stored block, read in place; its checksum is
    left to array_record, which has one for every record.
    """
    final_stored_block = packed[2] == 1 and len(packed) == size + 11
    if final_stored_block:
        return np.frombuffer(packed, np.uint8, size, 7)
    return np.frombuffer(zlib.decompress(packed, bufsize=size), np.uint8)


def read_meta(path: pathlib.Path) -> dict[str, Any]:
    """Reads and checks store.json.

    Raises:
      StoreError: If it is missing, garbled, or of another schema version.
    """
    file = path / STORE_FILE
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        sound = meta["digest"] == digest(meta)
    except FileNotFoundError:
        raise StoreError(
            f"{path} is not a prepared store (no {STORE_FILE}). Make one with "
            f"run.py prepare --source=DIR --store={path}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{file}: cannot be read ({error}). Run prepare again.") from (
            error
        )
    if not sound:
        raise StoreError(f"{file}: its own digest does not match. Run prepare again.")
    if meta["schema"] != SCHEMA_VERSION:
        raise StoreError(
            f"{file}: schema version {meta['schema']}, expected {SCHEMA_VERSION}. "
            "Run prepare again."
        )
    return meta


def digest(meta: dict[str, Any]) -> str:
    """Hash of store.json's fields except the hash itself."""
    rest = {key: value for key, value in meta.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def damage(path: pathlib.Path, meta: dict[str, Any], *, deep: bool) -> list[str]:
    """Compares the files of a store with the sizes and hashes written at its end.

    Args:
      path: Directory of the store.
      meta: From `read_meta`.
      deep: Whether the records are hashed too, not only the small files.

    Returns:
      One line for every damaged file.
    """
    problems = []
    for name, expected in meta["files"].items():
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != expected["bytes"]:
            problems.append(
                f"{name} has {file.stat().st_size} bytes, expected {expected['bytes']}"
            )
        elif (deep or not is_records(name)) and sha256(file) != expected["sha256"]:
            problems.append(f"{name} has another hash than when it was written")
    return problems


def is_records(name: str) -> bool:
    """Whether a file of the store holds records."""
    return ".array_record-" in name


def sha256(path: pathlib.Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
