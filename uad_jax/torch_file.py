"""Reads the tensors of PyTorch files without running anything that they contain.

What a file saves is followed as records (`pickle_program`). A tensor is the record of
a call with the name of PyTorch's own function, whose arguments (storage, offset, size,
strides) are read as numbers; the call itself is never made.

Both containers are read: the zip archive of PyTorch 1.6 and later, and the stream of
pickles before that.
"""

import io
import math
import pathlib
import types
import zipfile
from typing import Any, BinaryIO, Self

import jax.numpy as jnp
import numpy as np

from uad_jax import pickle_program
from uad_jax.pickle_program import Call, Global, Persistent

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {
    "torch.FloatStorage": np.float32,
    "torch.DoubleStorage": np.float64,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": jnp.bfloat16,
    "torch.LongStorage": np.int64,
    "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16,
    "torch.CharStorage": np.int8,
    "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
}
_TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_PARAMETERS = (
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
)


class RefusedError(ValueError):
    """A value is no tensor, or depends on something that is never called."""


class TorchFile:
    """An open file of PyTorch; a context manager.

    Attributes:
      content: What was saved, with records in place of all but plain values.
    """

    content: Any

    def __init__(self, path: pathlib.Path) -> None:
        """Reads the structure of a file; the numbers follow with `array`.

        Raises:
          ValueError: If it is no file of PyTorch, or damaged.
        """
        self._bytes: dict[str, bytes] = {}  # of storages
        self._archive: zipfile.ZipFile | None = None
        with open(path, "rb") as stream:
            zipped = stream.read(4) == b"PK\x03\x04"
            stream.seek(0)
            if not zipped:
                self._read_legacy(stream)
                return
        try:
            self._archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"the archive is damaged: {error}") from error
        try:
            self._read_archive(self._archive)
        except ValueError:
            self._archive.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        if self._archive is not None:
            self._archive.close()

    def array(self, value: Any) -> np.ndarray:
        """Reads a tensor of the content.

        Raises:
          RefusedError: If the value is no tensor or depends on a foreign function.
          ValueError: If its numbers are missing or damaged.
        """
        while isinstance(value, Call) and _name(value.function) in _PARAMETERS:
            value = value.args[0] if _is_tuple(value.args, 1) else None
        if not isinstance(value, Call) or _name(value.function) not in _TENSORS:
            raise RefusedError(f"is no tensor but {pickle_program.describe(value)}")
        if not _is_tuple(value.args, 4):
            raise RefusedError("is a tensor without storage, offset, size and strides")
        storage, offset, size, strides = value.args[:4]
        key, dtype, length = _reference(storage)
        if not (
            _is_count(offset)
            and _are_counts(size)
            and _are_counts(strides)
            and len(size) == len(strides)
        ):
            raise RefusedError("has an offset, size or strides that are no numbers")
        count = math.prod(size)
        if count == 0:
            return np.zeros(size, dtype)
        last = offset + sum((n - 1) * s for n, s in zip(size, strides, strict=True))
        if count > length or last >= length:
            raise ValueError(
                f"a tensor of size {size} does not fit its storage of {length} numbers"
            )
        data = self._storage(key)
        if len(data) != length * dtype.itemsize:
            raise ValueError(
                f"storage {key} has {len(data)} bytes instead of {length} x "
                f"{dtype.itemsize}: the file is damaged"
            )
        view = np.lib.stride_tricks.as_strided(
            np.frombuffer(data, dtype)[offset:],
            size,
            [step * dtype.itemsize for step in strides],
        )
        return np.asarray(view, order="C")

    def _storage(self, key: str) -> bytes:
        if key not in self._bytes:
            if self._archive is None:
                raise ValueError(f"storage {key} is missing")
            self._bytes[key] = _stored(self._archive, f"{self._root}/data/{key}")
        return self._bytes[key]

    def _read_archive(self, archive: zipfile.ZipFile) -> None:
        roots = [
            name.removesuffix("/data.pkl")
            for name in archive.namelist()
            if name.endswith("/data.pkl") and name.count("/") == 1
        ]
        if len(roots) != 1:
            raise ValueError("the archive was not written by PyTorch: no data.pkl")
        self._root = roots[0]
        order = f"{self._root}/byteorder"
        if order in archive.namelist() and _stored(archive, order) != b"little":
            raise ValueError(
                "the file comes from a big-endian machine; convert it there"
            )
        program = io.BytesIO(_stored(archive, f"{self._root}/data.pkl"))
        self.content, _ = pickle_program.interpret(program)

    def _read_legacy(self, stream: BinaryIO) -> None:
        """Five pickles, then each storage behind its length."""
        if pickle_program.interpret(stream)[0] != LEGACY_MAGIC:
            raise ValueError(
                "this is a plain pickle, not a file of torch.save. Load it where you "
                'trust it, and write torch.save(model.state_dict(), "weights.pth")'
            )
        pickle_program.interpret(stream)  # version of the format
        system, _ = pickle_program.interpret(stream)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise ValueError(
                "the file comes from a big-endian machine; convert it there"
            )
        self.content, references = pickle_program.interpret(stream)
        storages = {}
        for storage in references:
            key, dtype, length = _reference(storage)
            storages[key] = (length, length * dtype.itemsize)
        keys, _ = pickle_program.interpret(stream)
        if not isinstance(keys, list) or not all(key in storages for key in keys):
            raise ValueError("the list of storages is damaged")
        for key in keys:
            length, size = storages[key]
            if int.from_bytes(stream.read(8), "little") != length:
                raise ValueError(f"storage {key} is missing: the file is damaged")
            place = stream.tell()
            left = stream.seek(0, io.SEEK_END) - place
            stream.seek(place)
            if size > left:
                raise ValueError(
                    f"storage {key} says it has {size:,} bytes, but {left:,} are left: "
                    "the file is damaged"
                )
            self._bytes[key] = stream.read(size)


def is_tensor(value: Any) -> bool:
    """Whether a value of the content is the record of a tensor."""
    names = (*_TENSORS, *_PARAMETERS)
    return isinstance(value, Call) and _name(value.function) in names


def _reference(storage: Any) -> tuple[str, np.dtype, int]:
    """Key, type and length of a storage."""
    reference: Any = storage.reference if isinstance(storage, Persistent) else ()
    if not _is_tuple(reference, 5) or reference[0] != "storage":
        raise RefusedError(f"has its numbers in {pickle_program.describe(storage)}")
    _, kind, key, _, length = reference[:5]
    if _name(kind) not in _DTYPES:
        raise RefusedError(f"has numbers of type {pickle_program.describe(kind)}")
    if not isinstance(key, str) or not _is_count(length):
        raise RefusedError("has a storage without a key or length")
    if any(part is not None for part in reference[5:]):
        raise RefusedError("is a view of another storage, as PyTorch 0.3 saved them")
    return key, np.dtype(_DTYPES[_name(kind)]), length


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    """Reads a member. PyTorch does not compress, so nothing can grow on reading."""
    try:
        info = archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed, which PyTorch never does")
        return archive.read(info)
    except KeyError:
        raise ValueError(f"{name} is missing: the file is damaged") from None
    except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{name} is damaged: {error}") from error


def _name(value: Any) -> str:
    return value.name if isinstance(value, Global) else ""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**48


def _are_counts(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_count, value))


def _is_tuple(value: Any, least: int) -> bool:
    return isinstance(value, tuple) and len(value) >= least
