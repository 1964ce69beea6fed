"""Files as other programs write them, made without those programs."""

import hashlib
import io
import math
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from uad_jax import leaves, weights
from uad_jax.types import Tree

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "int64": "LongStorage",
    "bool": "BoolStorage",
}


class Global(NamedTuple):
    """A function that a pickle names: "os.system"."""

    name: str


class Call(NamedTuple):
    """A call that a pickle makes when it is loaded."""

    function: Any
    args: Any


class Reference(NamedTuple):
    """Something outside the pickle."""

    key: Any


def pickled(value: Any) -> bytes:
    """Writes a pickle of protocol 2 that may name anything."""
    return b"\x80\x02" + _code(value) + b"."


def _code(value: Any) -> bytes:
    if isinstance(value, Global):
        module, name = value.name.rsplit(".", 1)
        return f"c{module}\n{name}\n".encode()
    if isinstance(value, Call):
        return _code(value.function) + _code(value.args) + b"R"
    if isinstance(value, Reference):
        return _code(value.key) + b"Q"
    if isinstance(value, str):
        text = value.encode()
        return b"X" + len(text).to_bytes(4, "little") + text
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        return b"\x8a\x10" + value.to_bytes(16, "little", signed=True)
    if isinstance(value, dict):
        items = b"".join(_code(k) + _code(v) for k, v in value.items())
        return b"}(" + items + b"u"
    parts = b"".join(map(_code, value))
    return b"(" + parts + b"t" if isinstance(value, tuple) else b"](" + parts + b"e"


def tensor(
    key: str,
    length: int,
    size: tuple[Any, ...],
    strides: tuple[int, ...] | None = None,
    offset: int = 0,
    storage: str = "FloatStorage",
) -> Call:
    """The record of a tensor in a file of PyTorch."""
    if strides is None:
        strides = tuple(math.prod(size[i + 1 :]) for i in range(len(size)))
    place = Reference(("storage", Global(f"torch.{storage}"), key, "cpu", length))
    hooks = Call(Global("collections.OrderedDict"), ())
    rebuild = Global("torch._utils._rebuild_tensor_v2")
    return Call(rebuild, (place, offset, size, strides, False, hooks))


def save_archive(
    path: pathlib.Path,
    content: Any,
    storages: Mapping[str, np.ndarray],
    compression: int = zipfile.ZIP_STORED,
) -> None:
    """Writes the archive of torch.save."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled(content))
        archive.writestr("archive/byteorder", b"little")
        for key, values in storages.items():
            archive.writestr(f"archive/data/{key}", values.tobytes())
        archive.writestr("archive/version", b"3\n")


def save_stream(
    path: pathlib.Path, content: Any, storages: Mapping[str, np.ndarray]
) -> None:
    """Writes the stream of torch.save before PyTorch 1.6."""
    out = io.BytesIO()
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    for value in (0x1950A86A20F9469CFC6C, 1001, system, content, list(storages)):
        out.write(pickled(value))
    for values in storages.values():
        out.write(values.size.to_bytes(8, "little") + values.tobytes())
    path.write_bytes(out.getvalue())


def save_state(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes what torch.save(model.state_dict(), path) writes."""
    content = {
        name: tensor(name, x.size, x.shape, storage=STORAGES[x.dtype.name])
        for name, x in arrays.items()
    }
    save_archive(path, content, arrays)


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights that follow from the name alone; none is zero or neutral."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    x = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)
    if len(shape) > 1:
        x = x / math.sqrt(math.prod(shape[1:]))
    else:
        x = 0.2 * x
        if name.endswith(("weight", "running_var")):
            x = np.abs(x) + 0.5
    return x.astype(np.float32)


def drawn_state(
    like: Tree, sources: Mapping[str, weights.Source], prefix: str = ""
) -> dict[str, np.ndarray]:
    """The file of a network of ours in PyTorch's names and layout, filled by `draw`."""
    arrays = {}
    for path, leaf in leaves.flatten(like).items():
        shape = leaf.shape
        if path.endswith("kernel"):
            shape = (*shape[:1:-1], *shape[:2]) if len(shape) == 4 else shape[::-1]
        name = sources[path].name
        shape = (
            (*shape, 1) if name.endswith(("qkv.weight", "proj_out.weight")) else shape
        )
        arrays[prefix + name] = draw(name, shape)
    return arrays
