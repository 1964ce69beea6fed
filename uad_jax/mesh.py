"""One mesh axis, "data"; where arrays live on it."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from uad_jax.types import Tree

AXIS = "data"


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the one-dimensional data mesh over all (or the given) devices."""
    devices = jax.devices() if devices is None else list(devices)
    # Auto is passed explicitly: jax.make_mesh defaults to Explicit, under which
    # indexing, reshaping and sorting of sharded arrays raise.
    return jax.make_mesh(
        (len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """Sharding that splits axis 0 over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def tree_shardings(tree: Tree, mesh: Mesh) -> Tree:
    """Shardings for a train state: every leaf replicated (pure data parallelism)."""
    return jax.tree.map(lambda _: replicated(mesh), tree)


def with_shardings(abstract: Tree, mesh: Mesh) -> Tree:
    """Attaches replicated shardings to a tree of `jax.ShapeDtypeStruct`."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=replicated(mesh)
        ),
        abstract,
    )


def device_bytes(device: jax.Device) -> int:
    """Memory that JAX may use on a device, 0 if unknown (CPU)."""
    return (device.memory_stats() or {}).get("bytes_limit", 0)


def to_global(local: Tree, mesh: Mesh) -> Tree:
    """Joins each process's contiguous block of rows into global sharded arrays.

    Args:
      local: Tree of host arrays, each [B / number of processes, ...].
      mesh: The data mesh.

    Returns:
      The same tree as global arrays [B, ...], split over the devices on axis 0.

    Raises:
      ValueError: If the devices do not divide the global batch.
    """
    sharding = batch_sharded(mesh)

    def place(rows: np.ndarray) -> jax.Array:
        total = rows.shape[0] * jax.process_count()
        if total % mesh.size:
            raise ValueError(
                f"A batch of {total} rows cannot be split over {mesh.size} devices. "
                f"Use a multiple of {mesh.size}."
            )
        return jax.make_array_from_process_local_data(sharding, rows)

    return jax.tree.map(place, local)
