"""The TFDS data set inside a store: one record per slice.

Any TFDS user can read it, without this package:
`tfds.builder_from_directory(store / "slices/1.0.0").as_data_source("slices")`.
"""

import contextlib
import io
import pathlib
import shutil
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from uad_jax.data import sources

_Example = dict[str, Any]


class _StoredZlib(tfds.features.Tensor):
    """A ZLIB tensor whose stream is stored (level 0).

    array_record compresses every record with zstd, so deflating the pixels first
    saves nothing on disk (29.6 against 29.8 MB) and halves the reading speed
    (8.8 against 19.4 thousand slices of 96x96 a second on two cores).
    """

    def encode_example(self, example_data: np.ndarray) -> bytes:
        """Checks and packs one array."""
        expected = (self.shape, self.np_dtype)
        if (example_data.shape, example_data.dtype) != expected:
            raise ValueError(
                f"A slice is {example_data.dtype} {example_data.shape}, expected "
                f"{self.np_dtype} {self.shape}."
            )
        return zlib.compress(example_data.tobytes(), level=0)


def features(
    height: int, width: int, channels: int, dtype: np.dtype, *, packed: bool = False
) -> tfds.features.FeaturesDict:
    """Schema of a record.

    Args:
      height: H.
      width: W.
      channels: C.
      dtype: Of the codes, uint16 or uint8.
      packed: Whether for writing; the schema on disk names TFDS's own classes.
    """
    tensor = _StoredZlib if packed else tfds.features.Tensor
    zlib_code = tfds.features.Encoding.ZLIB
    return tfds.features.FeaturesDict(
        {
            "image": tensor(
                shape=(height, width, channels),
                dtype=dtype,
                encoding=zlib_code,
                doc="Intensity codes, see uad_jax/ops/intensity.py.",
            ),
            "plane": tensor(
                shape=(height, width),
                dtype=np.uint8,
                encoding=zlib_code,
                doc="Bit 0: brain. Bit 1: lesion.",
            ),
            "uid": tfds.features.Scalar(np.int32, doc="Volume, see volumes.json."),
            "z": tfds.features.Scalar(np.int32, doc="Slice in the volume, from 0."),
        }
    )


class Slices(tfds.core.GeneratorBasedBuilder):
    """Writes slices in the order given, so that a volume lies together."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded. The inherited property would look for checksums beside
    # this file, with a package that TFDS does not install on Python 3.12.
    url_infos: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        *,
        schema: tfds.features.FeaturesDict,
        examples: Iterable[_Example],
        **kwargs: Any,
    ) -> None:
        self._schema = schema
        self._examples = examples
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Slices of prepared brain scans.",
            features=self._schema,
            disable_shuffling=True,
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, _Example]]]:
        return {sources.RECORDS: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, _Example]]:
        yield from enumerate(self._examples)


def write(
    directory: pathlib.Path,
    shape: tuple[int, int, int],
    dtype: np.dtype,
    examples: Iterable[_Example],
) -> None:
    """Writes the data set `directory`/slices/1.0.0.

    Args:
      directory: Existing directory.
      shape: Of a slice, (H, W, C).
      dtype: Of the codes.
      examples: Dictionaries of image, plane, uid and z.
    """
    tfds.disable_progress_bar()
    # TFDS announces itself on stdout, which belongs to the command.
    with contextlib.redirect_stdout(io.StringIO()):
        builder = Slices(
            schema=features(*shape, dtype, packed=True),
            examples=examples,
            data_dir=str(directory),
        )
        # One file, because every file of a batched read costs a call of its own.
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(num_shards=1)
        )
    shutil.rmtree(directory / "downloads", ignore_errors=True)  # made empty by TFDS
    features(*shape, dtype).save_config(str(builder.data_path))


def read_index(
    directory: pathlib.Path,
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Reads every record back and notes which slice it holds.

    Args:
      directory: The directory given to `write`.

    Returns:
      One row {"file", "records"} for every shard, and the arrays uid, z and record,
      each [number of records], for index.npz.
    """
    shards: list[dict[str, Any]] = []
    uids: list[int] = []
    depths: list[int] = []
    for path in sorted((directory / sources.RECORDS).rglob("*.array_record-*")):
        reader = sources.open_records(path)
        count = reader.num_records()
        for first in range(0, count, 256):
            for example in reader.read(list(range(first, min(first + 256, count)))):
                fields = sources.parse(example)
                uids.append(fields["uid"].int64_list.value[0])
                depths.append(fields["z"].int64_list.value[0])
        name = path.relative_to(directory).as_posix()
        shards.append({"file": name, "records": count})
    index: dict[str, np.ndarray] = {
        "uid": np.array(uids, np.int32),
        "z": np.array(depths, np.int32),
        "record": np.arange(len(uids), dtype=np.int64),
    }
    return shards, index
