"""A state as flat leaves by path: what a checkpoint stores, compares and reads."""

import pathlib
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from uad_jax.types import Tree

T = TypeVar("T")
LeafTable = dict[str, tuple[tuple[int, ...], str]]  # path -> (shape, dtype)


def flatten(tree: Tree) -> dict[str, Any]:
    """Flattens a tree to {"model/params/encoder/kernel": leaf}."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }


def table(leaves: Mapping[str, Any]) -> LeafTable:
    """Shape and dtype of every leaf of a flattened tree."""
    return {path: (tuple(x.shape), str(x.dtype)) for path, x in leaves.items()}


def differences(
    expected: LeafTable, found: LeafTable, *, allow_cast: bool = False
) -> list[str]:
    """Lists every leaf in which a checkpoint differs from what is asked of it.

    Args:
      expected: The leaves that the model has.
      found: The leaves that the checkpoint has.
      allow_cast: Whether another dtype is acceptable.

    Returns:
      One line per leaf: "path: expected (64,) float32, found (96,) float32".
    """
    lines = []
    for path in sorted(expected.keys() | found.keys()):
        wanted, stored = expected.get(path), found.get(path)
        if wanted is None:
            lines.append(f"{path}: not in the model, found {_spell(stored)}")
        elif stored is None:
            lines.append(f"{path}: expected {_spell(wanted)}, not in the checkpoint")
        elif wanted[0] != stored[0] or (wanted[1] != stored[1] and not allow_cast):
            lines.append(f"{path}: expected {_spell(wanted)}, found {_spell(stored)}")
    return lines


def unflatten(like: T, leaves: Mapping[str, jax.Array]) -> T:
    """Puts leaves back into the structure of a tree; the inverse of `flatten`."""
    order = flatten(like)
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[k] for k in order])


def averaged(path: str, stored: Mapping[str, Any]) -> str:
    """Where the model leaf of `TrainState.for_eval()` is stored: average, or itself."""
    average = path.replace("model/params/", "ema/", 1)
    return average if average in stored else path


def non_finite(leaves: Mapping[str, jax.Array]) -> list[str]:
    """Paths of the leaves that hold a NaN or Inf; one small transfer to the host."""
    checked = {
        path: leaf
        for path, leaf in leaves.items()
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    }
    if not checked:
        return []
    finite = np.asarray(jax.device_get(_all_finite(list(checked.values()))))
    return [path for path, ok in zip(checked, finite, strict=True) if not ok]


def require_shardings(wanted: Mapping[str, Any]) -> None:
    """Refuses abstract leaves without a sharding.

    Orbax would put them where they were when they were saved, on devices that may not
    exist here.

    Raises:
      ValueError: If a leaf has none.
    """
    bare = [path for path, leaf in wanted.items() if leaf.sharding is None]
    if bare:
        raise ValueError(
            f"{len(bare)} of {len(wanted)} leaves have no sharding, such as {bare[0]}. "
            "Attach them with mesh.with_shardings."
        )


def read(step_dir: pathlib.Path, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Reads some leaves of a step; the others are not touched.

    Args:
      step_dir: A verified step.
      wanted: Path -> `jax.ShapeDtypeStruct` with a sharding.
    """
    wanted = dict(wanted)
    request = ocp.args.PyTreeRestore(
        wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
    )
    with (
        jax.transfer_guard("allow"),
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader,
    ):
        return reader.restore(step_dir, args=request)


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves])


def _spell(leaf: tuple[tuple[int, ...], str] | None) -> str:
    assert leaf is not None
    return f"{leaf[0]} {leaf[1]}"
