"""Wall time of a training step of several members beside that of one run.

    python -m benchmarks.ensemble --config=configs/autoencoder.py:variant=vae,cpu

Both programs are those of the trainer, on made-up slices of the recipe's shape, and
alternate in one process: other load on the machine falls on both. Prints one JSON line:
seconds of a step of one run and of M members (M seeds), and their ratio, the median
over the rounds. 1: M runs cost what one costs; M: nothing is gained.
"""

import json
import pathlib
import runpy
import statistics
import time
from collections.abc import Callable, Sequence

import jax
from absl import app, flags

from uad_jax import environment, member_programs, programs, runtime, stand_ins
from uad_jax import mesh as mesh_lib
from uad_jax.data import recipes
from uad_jax.methods.base import RunShape
from uad_jax.types import Batch, Key, TrainState

_CONFIG = flags.DEFINE_string(
    "config", "configs/autoencoder.py:variant=vae,cpu", "FILE or FILE:ARGUMENT."
)
_RECIPE = flags.DEFINE_string("recipe", "grid2mm", "Whose grid gives the shape.")
_MEMBERS = flags.DEFINE_integer("members", 5, "Members of the ensemble.")
_BATCH = flags.DEFINE_integer("batch_size", 0, "Rows of a batch; 0 = the config's.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Measurements of each.")
_CALLS = flags.DEFINE_integer("calls", 2, "Calls of a measurement.")


def _clock(
    update: Callable, state: TrainState, batch: Batch, key: Key
) -> Callable[[int], float]:
    """A function that makes some calls and returns the seconds of one."""
    held = [state]

    def seconds(calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            held[0], _ = update(held[0], batch, key)
        jax.block_until_ready(held[0])
        return (time.perf_counter() - begin) / calls

    return seconds


def main(argv: Sequence[str]) -> None:
    """Measures and prints."""
    del argv
    runtime.setup()
    name, colon, argument = _CONFIG.value.partition(":")
    config = runpy.run_path(name)["get_config"](*([argument] if colon else []))
    mesh, members = mesh_lib.make_mesh(), _MEMBERS.value
    rows = _BATCH.value or config.batch_size
    width, height, depth = recipes.RECIPES[_RECIPE.value].grid
    method = config.method.make(RunShape(config.total_steps, 1, rows))
    stride = programs.steps_per_call(config.train.steps_per_call, mesh)

    def made_up(stack: int | None) -> Batch:
        return stand_ins.batch(
            (depth, width, height, 1),
            rows,
            mesh,
            num_slices=method.inputs.num_slices,
            needs_lesion=method.inputs.needs_lesion,
            stack=stack,
        )

    spec = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        made_up(None),
    )
    one = programs.build(method, spec, (), mesh, stride)
    several = member_programs.build(
        lambda place: method, members, spec, (), mesh, stride
    )
    seeds = range(members)
    clocks = {
        "one": _clock(
            one.update,
            programs.init(method, spec, 0, mesh),
            made_up(stride if stride > 1 else None),
            programs.run_key(0, mesh),
        ),
        "members": _clock(
            several.programs.update,
            member_programs.init(lambda place: method, spec, seeds, mesh),
            made_up(stride * members),
            member_programs.keys(seeds, mesh),
        ),
    }
    for clock in clocks.values():
        clock(1)
    rounds = [
        {what: clock(_CALLS.value) for what, clock in clocks.items()}
        for _ in range(_ROUNDS.value)
    ]
    ratios = [one["members"] / one["one"] for one in rounds]
    facts = environment.describe()
    result = {
        "config": f"{pathlib.Path(name).as_posix()}{colon}{argument}",
        "device": f"{mesh.size} x {facts['device_kind']}",
        "commit": facts["commit"],
        "members": members,
        "batch": rows,
        "slice": [width, height],
        "steps_per_call": stride,
        "seconds_of_a_step": {
            what: statistics.median(one[what] for one in rounds) / stride
            for what in clocks
        },
        "ratio": statistics.median(ratios),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "of_separate_runs": statistics.median(ratios) / members,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    app.run(main)
