"""Weights that other programs wrote: read as plain arrays, fitted to a network.

Formats: safetensors, npz without objects, and PyTorch's `.pth`, `.pt` and `.ckpt`,
whose pickles are followed but never executed (`torch_file`). Everything else is
refused. Names and layouts of other programs' networks are in `torch_names`.

Weights come with the rights that their authors gave; most published ones carry no
licence at all. Whoever loads them answers for that.
"""

import dataclasses
import json
import math
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from uad_jax import leaves as leaves_lib
from uad_jax import pickle_program, torch_file
from uad_jax.types import Tree

TORCH = (".pth", ".pt", ".ckpt")
SUFFIXES = (".safetensors", ".npz", *TORCH)
# Where training programs keep the parameters of a model, the likeliest first.
ENTRIES = ("state_dict", "model_state_dict", "model", "net", "network", "ema")
_SAFE_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_LONGEST_HEADER = 100 * 2**20  # bytes; the limit of the safetensors library
_DAMAGE = (
    ValueError,
    OSError,
    EOFError,
    RecursionError,
    zipfile.BadZipFile,
    zlib.error,
)
_SHOWN = 20  # lines of a list in an error


class WeightsError(ValueError):
    """Weights cannot be read, or do not fit the network."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """What a file holds.

    Attributes:
      path: The file.
      arrays: Tensors by name.
      refused: Entries that are no tensors, or depend on a function that is never
        called: name -> reason. They are an error only where they are needed.
    """

    path: pathlib.Path
    arrays: Mapping[str, np.ndarray]
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)


Convert = Callable[[np.ndarray], np.ndarray]


class Source(NamedTuple):
    """Where a leaf of a network comes from.

    Attributes:
      name: Tensor in the file, after the prefix.
      convert: From the file's layout to ours.
    """

    name: str
    convert: Convert


def read(path: pathlib.Path | str, *, entry: str = "") -> Weights:
    """Reads the tensors of a file. Nothing in the file is executed.

    Args:
      path: A file that ends in one of `SUFFIXES`.
      entry: For files of PyTorch that hold more than one model: the entry of the saved
        dictionary, "ema" for instance. Default: the first of `ENTRIES` that holds
        tensors, else the dictionary itself.

    Raises:
      WeightsError: If the format is not one of these, or the file is damaged.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        found = "a directory" if path.is_dir() else "nothing there"
        raise WeightsError(
            f"{path}: expected a file of weights, found {found}. Checkpoints of this "
            "program are used through warm_start."
        )
    if path.suffix not in SUFFIXES:
        raise WeightsError(
            f"{path}: weights are read from {', '.join(SUFFIXES)}; other files, .pkl "
            "above all, may run any program when they are opened. Where you trust it, "
            'load it and write torch.save(model.state_dict(), "weights.pth").'
        )
    try:
        if path.suffix in TORCH:
            arrays, refused = _read_torch(path, entry)
        elif entry:
            raise ValueError(f"entry is {entry!r}, but only files of PyTorch have any")
        else:
            reader = _read_npz if path.suffix == ".npz" else _read_safetensors
            arrays, refused = reader(path), {}
    except WeightsError:
        raise
    except _DAMAGE as error:
        raise WeightsError(f"{path}: {error}.") from error
    logging.info("%s: %d tensors", path, len(arrays))
    return Weights(path=path, arrays=arrays, refused=refused)


def find_prefix(weights: Weights, anchor: str) -> str:
    """Finds what stands before the names of a network, "diffusion.model." for instance.

    Args:
      weights: The file.
      anchor: A name that the network has exactly once.

    Raises:
      WeightsError: If no tensor, or more than one, ends in that name.
    """
    names = [*weights.arrays, *weights.refused]
    found = [
        name.removesuffix(anchor)
        for name in names
        if name == anchor or name.endswith(f".{anchor}")
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise WeightsError(
            f"{weights.path}: several networks have a tensor {anchor!r}, under "
            f"{sorted(found)}. Choose one with prefix."
        )
    raise WeightsError(
        f"{weights.path}: no tensor is called {anchor!r}, so this network is not in "
        f"the file, which has:{_listed(names)}"
    )


def fit(
    weights: Weights,
    like: Tree,
    sources: Mapping[str, Source],
    *,
    prefix: str = "",
    ignored: Sequence[str] = (),
) -> Tree:
    """Fills a network with the tensors of a file.

    Args:
      weights: The file.
      like: The network's variables or their shapes.
      sources: Path of each leaf, "params/conv/kernel" -> its source.
      prefix: Before each name in the file. Tensors without it belong to something
        else and are left aside.
      ignored: Ends of names that may be left over ("num_batches_tracked").

    Returns:
      A tree like `like` of numpy arrays in its dtypes.

    Raises:
      WeightsError: Lists both sides at once: the leaves without a fitting tensor, and
        the tensors under the prefix without a leaf.
    """
    wanted = leaves_lib.flatten(like)
    unfilled: list[str] = []
    filled = {}
    for path, leaf in wanted.items():
        name, convert = sources[path]
        try:
            filled[path] = _converted(weights, prefix + name, convert, leaf)
        except WeightsError as error:
            unfilled.append(f"{path}: {error}")
    used = {prefix + sources[path].name for path in wanted}
    under = [name for name in weights.arrays if name.startswith(prefix)]
    unused = [
        f"{name} {weights.arrays[name].shape}"
        for name in under
        if name not in used and not name.endswith(tuple(ignored))
    ]
    if unfilled or unused:
        raise WeightsError(
            f"{weights.path} does not fit the network under the prefix {prefix!r}.\n"
            f"{len(unfilled)} of {len(wanted)} leaves of the network are not filled:"
            f"{_listed(unfilled)}\n"
            f"{len(unused)} of {len(under)} tensors of the file are not used:"
            f"{_listed(unused)}\n"
            "Compare the sizes in the config with the file's, and check the prefix."
        )
    others = len(weights.arrays) - len(under)
    logging.info(
        "%s: %d tensors used, %d others in the file", weights.path, len(used), others
    )
    return jax.tree.unflatten(jax.tree.structure(like), list(filled.values()))


def _converted(
    weights: Weights,
    name: str,
    convert: Convert,
    leaf: Any,
) -> np.ndarray:
    """One tensor in the layout of its leaf; a WeightsError without the leaf's path."""
    if name in weights.refused:
        raise WeightsError(f"{name} in the file {weights.refused[name]}")
    if name not in weights.arrays:
        raise WeightsError(f"{name} is not in the file")
    found = weights.arrays[name]
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise WeightsError(f"{name} holds {found.dtype}, not floating-point numbers")
    try:
        value = np.asarray(convert(found), leaf.dtype)
    except ValueError:
        value = found
    if value.shape != leaf.shape:
        raise WeightsError(
            f"expected {leaf.shape}, found {value.shape} ({name} with {found.shape})"
        )
    if not np.isfinite(value).all():
        raise WeightsError(f"{name} holds NaN or Inf")
    return value


def _listed(lines: Sequence[str]) -> str:
    shown = [f"\n  {line}" for line in lines[:_SHOWN]]
    more = len(lines) - _SHOWN
    return "".join(shown) + (f"\n  and {more} more" if more > 0 else "")


def _read_torch(
    path: pathlib.Path, entry: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with torch_file.TorchFile(path) as file:
        arrays, refused = {}, {}
        for name, value in _choose(file.content, entry).items():
            try:
                arrays[name] = file.array(value)
            except torch_file.RefusedError as error:
                refused[name] = str(error)
    return arrays, refused


def _choose(content: Any, entry: str) -> dict[str, Any]:
    """The dictionary of tensors in what was saved."""
    if not isinstance(content, dict):
        raise ValueError(
            f"it holds {pickle_program.describe(content)}, not a dictionary of "
            "tensors. Save model.state_dict() instead of the model"
        )
    models = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and _has_tensors(value)
    }
    likely = [name for name in ENTRIES if name in models]
    if entry:
        if entry not in models:
            raise ValueError(
                f"it has no tensors in an entry {entry!r}; those with any: "
                f"{sorted(models) or 'none'}"
            )
        chosen = models[entry]
    elif likely:
        chosen = models[likely[0]]
    elif _has_tensors(content):
        chosen = content
    else:
        raise ValueError(
            "none of its entries is known to be a model; those with tensors: "
            f"{sorted(models) or 'none'}. Choose one with entry"
        )
    return {name: value for name, value in chosen.items() if isinstance(name, str)}


def _has_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(map(torch_file.is_tensor, value.values()))


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    # numpy leaves a file that it opens itself open when it turns out damaged.
    with open(path, "rb") as stream:
        file = np.load(stream, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array. Use np.savez with names")
        return {name: file[name] for name in file.files}


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The length of the header (8 bytes), the header (JSON), then all numbers."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(stream.read(length), object_pairs_hook=_unique)
    data = np.memmap(path, np.uint8, mode="r", offset=0)[8 + length :]
    if not isinstance(header, dict):
        raise ValueError("the header is no dictionary")
    header.pop("__metadata__", None)
    arrays, end = {}, 0
    for name, start, stop, row in sorted(
        ((name, *_extent(name, row), row) for name, row in header.items()),
        key=lambda item: (item[1], item[2]),
    ):
        if start != end:
            raise ValueError(f"{name} begins at byte {start} instead of {end}")
        dtype = np.dtype(_SAFE_DTYPES[row["dtype"]])
        if stop - start != math.prod(row["shape"]) * dtype.itemsize or stop > data.size:
            raise ValueError(f"{name} has {stop - start} bytes for {row['shape']}")
        arrays[name] = np.array(data[start:stop]).view(dtype).reshape(row["shape"])
        end = stop
    if end != data.size:
        raise ValueError(f"{data.size - end} bytes follow the last tensor")
    return arrays


def _extent(name: str, row: Any) -> tuple[int, int]:
    """First byte and the one after the last of a tensor."""
    known = isinstance(row, dict) and row.keys() >= {"dtype", "shape", "data_offsets"}
    if not known or not isinstance(row["dtype"], str):
        raise ValueError(f"the header describes {name} incompletely")
    if row["dtype"] not in _SAFE_DTYPES:
        raise ValueError(
            f"{name} is {row['dtype']}; known types: {', '.join(_SAFE_DTYPES)}"
        )
    numbers = [row["shape"], row["data_offsets"]]
    if not all(
        isinstance(part, list) and all(type(n) is int and n >= 0 for n in part)
        for part in numbers
    ):
        raise ValueError(f"the header describes {name} with something but numbers")
    start, stop = row["data_offsets"]
    return start, stop


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("the header names a tensor twice")
    return dict(pairs)
