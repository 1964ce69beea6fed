"""Several processes, one program: joining them, and agreeing on a decision."""

import os

import jax
import numpy as np
from jax.experimental import multihost_utils

_HEARTBEAT_SECONDS = 100


def initialize() -> None:
    """Joins the other processes of this job; call before the first JAX computation.

    SLURM, Open MPI, GKE and Cloud TPU are detected by `jax.distributed`. Anywhere
    else each process is told by `JAX_COORDINATOR_ADDRESS` (host:port of process 0),
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`.

    A process whose peer dies is aborted by the heartbeat (default 100 s,
    `UAD_JAX_HEARTBEAT_SECONDS`) with a non-zero status; start all of them again to
    resume.

    Raises:
      ValueError: If only some of the variables are set.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    values = {name: os.environ[name] for name in names if name in os.environ}
    heartbeat = int(os.environ.get("UAD_JAX_HEARTBEAT_SECONDS", _HEARTBEAT_SECONDS))
    if not values:
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat)
        return
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(
            f"{', '.join(values)} is set but not {', '.join(missing)}. Set all three, "
            "or none of them under SLURM, Open MPI, GKE or Cloud TPU."
        )
    jax.distributed.initialize(
        coordinator_address=values[names[0]],
        num_processes=int(values[names[1]]),
        process_id=int(values[names[2]]),
        heartbeat_timeout_seconds=heartbeat,
    )


def is_main() -> bool:
    """Whether this process writes the logs, the progress and the metrics."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether `flag` is set on any process; all of them must ask at the same step."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
