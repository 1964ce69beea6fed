"""What happens when training leaves the finite numbers."""

import math
import pathlib
from typing import NoReturn

import numpy as np
import optax

from uad_jax import distributed, workdir
from uad_jax.types import Tree


class Diverged(FloatingPointError):
    """The loss, a gradient or a parameter is NaN or infinite."""


def first_bad(scalars: dict[str, np.ndarray]) -> int | None:
    """Index of the first step of a call with a NaN or Inf, None if there is none.

    Args:
      scalars: Name -> values of the steps of the call, [number of steps].
    """
    bad = np.stack([~np.isfinite(values) for values in scalars.values()]).any(axis=0)
    return int(np.argmax(bad)) if bad.any() else None


def norms(params: dict[str, Tree]) -> dict[str, float]:
    """Global norm of each network's parameters."""
    return {name: float(optax.tree.norm(tree)) for name, tree in params.items()}


def stop(
    dump: pathlib.Path,
    step: int,
    scalars: dict[str, float],
    rows: list[dict[str, int | str]],
    params: dict[str, Tree],
    *,
    member: str = "",
) -> NoReturn:
    """Writes down what is known and ends the run.

    Args:
      dump: Directory that gets `step_<step>.json` (NaN and Inf as words).
      step: The step, counted from 1, whose numbers are not finite.
      scalars: Its scalars, the gradient norm among them.
      rows: Subject, uid and slice index of the rows of its batch.
      params: The live parameters, after the update.
      member: Which of several runs that one program trains, "seed=1"; "" if it is
        the only one.

    Raises:
      Diverged: Always.
    """
    path = dump / f"step_{step}.json"
    if distributed.is_main():
        note = {
            "step": step,
            "scalars": {name: _plain(value) for name, value in scalars.items()},
            "parameter_norms": {
                name: _plain(value) for name, value in norms(params).items()
            },
            "batch": rows,
        }
        workdir.write_json(path, note)
    bad = {name: value for name, value in scalars.items() if not math.isfinite(value)}
    bad_ones = ", ".join(f"{name} = {value}" for name, value in bad.items())
    who, others = "", ""
    if member:
        who = f"{member}: "
        others = (
            ". Or train the other members singly, with --workdir=DIR/MEMBER and their "
            f"own value; or begin without {member} in another --workdir"
        )
    raise Diverged(
        f"{who}Step {step}: {bad_ones}. The batch's ids and the norms are in {path}; "
        "the last finite checkpoint is kept. Look at the volumes named there, lower "
        f"the learning rate, or set clip_norm{others}."
    )


def _plain(value: float) -> float | str:
    return float(value) if math.isfinite(value) else str(float(value))
