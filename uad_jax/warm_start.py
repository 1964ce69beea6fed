"""Parameters taken from other runs when training begins."""

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import logging

from uad_jax import checkpoint
from uad_jax import leaves as leaves_lib
from uad_jax import mesh as mesh_lib
from uad_jax import workdir as workdir_lib
from uad_jax.types import TrainState

Entry = tuple[pathlib.Path | str, int, str, str]


def warm_start(
    state: TrainState, entries: Sequence[Entry], mesh: jax.sharding.Mesh
) -> tuple[TrainState, list[str]]:
    """Fills parts of a fresh train state from the checkpoints of other runs.

    Parameters and collections (batch statistics) are taken together; averaged
    parameters are taken where the source has them, and also start the average here.
    The optimiser's state stays fresh. Networks without an optimiser are filled alike.

    Args:
      state: A freshly initialised state.
      entries: (workdir, step, source_prefix, target_prefix) each. The workdir may
        also be its checkpoint directory. Step -1 is the best one, or the latest if
        none was validated. A prefix is a path of modules, "encoder/backbone" or "".
      mesh: Where the parameters go.

    Returns:
      The state, and the model leaves that no entry filled.

    Raises:
      ValueError: Lists every leaf under a target prefix that its source lacks or has
        in another shape or dtype, and every leaf that two entries claim.
      CheckpointError: If a source cannot be read.
    """
    leaves = leaves_lib.flatten(state)
    model = [path for path in leaves if path.startswith("model/")]
    filled: dict[str, jax.Array] = {}
    for directory, step, source_prefix, target_prefix in entries:
        targets = [path for path in model if _is_under(path, target_prefix)]
        if not targets:
            known = sorted(state.model.params)
            raise ValueError(
                f"Warm start: no leaf of this model is under {target_prefix!r}. "
                f"Its networks are {', '.join(known)}."
            )
        claimed = [path for path in targets if path in filled]
        if claimed:
            raise ValueError(
                "Warm start: two entries fill the same leaves:\n  "
                + "\n  ".join(claimed)
            )
        sources = {
            path: _with_prefix(path, target_prefix, source_prefix) for path in targets
        }
        read = _read(
            pathlib.Path(directory), step, source_prefix, sources, leaves, mesh
        )
        filled |= read
    fresh = [path for path in model if path not in filled]
    for path, leaf in filled.items():
        leaves[path] = leaf
        average = path.replace("model/params/", "ema/", 1)
        if average in leaves:
            # A copy: the train step donates its state, and no buffer twice.
            leaves[average] = jnp.copy(leaf)
    if fresh:
        logging.info(
            "Warm start leaves %d leaves fresh: %s",
            len(fresh),
            ", ".join(_covering(fresh, model)),
        )
    restored = jax.tree.unflatten(jax.tree.structure(state), list(leaves.values()))
    return restored, fresh


def _read(
    directory: pathlib.Path,
    step: int,
    source_prefix: str,
    sources: dict[str, str],
    leaves: dict[str, jax.Array],
    mesh: jax.sharding.Mesh,
) -> dict[str, jax.Array]:
    """Reads the sources of the given target leaves; complains about all at once."""
    if (directory / workdir_lib.CHECKPOINTS).is_dir():
        directory = directory / workdir_lib.CHECKPOINTS
    store = checkpoint.Checkpoints(directory, read_only=True)
    try:
        chosen = store.best() if step < 0 else step
        chosen, stored = store.verified(chosen)
        origin = {
            target: leaves_lib.averaged(source, stored)
            for target, source in sources.items()
        }
        expected = leaves_lib.table({t: leaves[t] for t in sources})
        found = {t: stored[o] for t, o in origin.items() if o in stored}
        wrong = leaves_lib.differences(expected, found)
        if wrong:
            raise ValueError(
                f"Warm start from step {chosen} of {directory} does not fit:\n  "
                + "\n  ".join(wrong)
                + f"\nSource leaves are looked up under {source_prefix!r}. Check the "
                "prefixes and the sizes of both configs."
            )
        wanted = {
            o: jax.ShapeDtypeStruct(
                leaves[t].shape, leaves[t].dtype, sharding=mesh_lib.replicated(mesh)
            )
            for t, o in origin.items()
        }
        values = store.read(chosen, wanted)
    finally:
        store.close()
    logging.info(
        "Warm start: %d leaves from step %d of %s", len(wanted), chosen, directory
    )
    return {target: values[o] for target, o in origin.items()}


def _covering(paths: Sequence[str], among: Sequence[str]) -> list[str]:
    """The fewest modules (or leaves) that hold the given model leaves and no others."""
    names = {path: "/".join(_address(path)[1]) for path in among}
    others = {names[path] for path in among if path not in set(paths)}

    def cover(name: str) -> str:
        parts = name.split("/")
        for length in range(1, len(parts)):
            head = "/".join(parts[:length])
            if not any(_begins(other, head) for other in others):
                return head
        return name

    return list(dict.fromkeys(cover(names[path]) for path in paths))


def _begins(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + "/")


def _address(path: str) -> tuple[str, list[str]]:
    """Splits a model leaf into its kind and the path of its module.

    "model/params/encoder/stem/kernel" and
    "model/collections/encoder/batch_stats/stem/mean" both lie in encoder/stem.
    """
    _, group, network, *rest = path.split("/")
    if group == "params":
        return "params", [network, *rest]
    return rest[0], [network, *rest[1:]]


def _is_under(path: str, prefix: str) -> bool:
    parts = _parts(prefix)
    return _address(path)[1][: len(parts)] == parts


def _with_prefix(path: str, old: str, new: str) -> str:
    kind, modules = _address(path)
    network, *rest = _parts(new) + modules[len(_parts(old)) :]
    if kind == "params":
        return "/".join(["model/params", network, *rest])
    return "/".join(["model/collections", network, kind, *rest])


def _parts(prefix: str) -> list[str]:
    return [part for part in prefix.split("/") if part]
