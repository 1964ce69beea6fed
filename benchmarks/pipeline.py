"""Slices per second of the training stream, from the TFDS records to the device.

    python -m benchmarks.pipeline --store=DIR [--placement=stream] [--batch_size=64]

Without --store, a synthetic store of --volumes scans of 80 slices of 96x96 is made
in --scratch. Prints one JSON line per row of the table in docs/benchmarks.md.
"""

import functools
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Sequence

import jax
import numpy as np
from absl import app, flags
from scipy import ndimage

from uad_jax import mesh as mesh_lib
from uad_jax import runtime
from uad_jax.data import builder, pipeline, preprocess, sources
from uad_jax.data.config import DataConfig, Placement
from uad_jax.methods.base import Inputs
from uad_jax.types import Geometry

_STORE = flags.DEFINE_string("store", "", "A prepared store.")
_SCRATCH = flags.DEFINE_string("scratch", "", "Where the synthetic store is kept.")
_VOLUMES = flags.DEFINE_integer("volumes", 200, "Volumes of the synthetic store.")
_BATCH = flags.DEFINE_integer("batch_size", 64, "Rows of a batch.")
_SECONDS = flags.DEFINE_float("seconds", 5.0, "Time per measurement.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Measurements; the best one counts.")
_THREADS = flags.DEFINE_multi_integer("read_threads", [0, 1, 2], "Reading threads.")
_PLACEMENT = flags.DEFINE_multi_enum_class(
    "placement", [Placement.STREAM, Placement.DEVICE], Placement, "Where data live."
)


def _head(number: int) -> preprocess.Prepared:
    """A noisy ellipsoid on 80 x 96 x 96 voxels, about 30 % of them brain."""
    rng = np.random.default_rng(number)
    z, x, y = np.meshgrid(*(np.linspace(-1, 1, n) for n in (80, 96, 96)), indexing="ij")
    brain = z**2 + (x / 0.75) ** 2 + (y / 0.8) ** 2 < 1
    image = 0.5 + ndimage.gaussian_filter(rng.normal(size=brain.shape), 2.0) * 2
    image = np.where(brain, image + rng.normal(0, 0.02, brain.shape), 0.0)
    image = np.rint(image * 4095) / 4095  # scanners give 12 bits
    return preprocess.Prepared(
        image=image[..., None].astype(np.float32),
        brain=brain,
        lesion=np.zeros_like(brain),
        geometry=Geometry(
            native_shape=(96, 96, 80),
            native_affine=np.eye(4),
            grid_to_native=np.eye(4),
        ),
        notes=[],
    )


def _synthetic(directory: pathlib.Path, volumes: int) -> pathlib.Path:
    scans = [
        builder.Source(
            subject=f"{number:04d}",
            load=functools.partial(_head, number),
            modalities=("t1",),
            split="train",
        )
        for number in range(volumes)
    ]
    return builder.build_from(
        scans,
        directory / f"pipeline-{volumes}",
        recipe={"name": "benchmark"},
        recipe_hash="1",
        source_hash=str(volumes),
    )


def _measure(stream: pipeline.TrainStream) -> tuple[float, float]:
    """Best slices per second of wall time and of processor time."""
    best = (0.0, 0.0)
    with stream.batches() as batches:
        for _ in range(20):
            jax.block_until_ready(next(batches))
        for _ in range(_ROUNDS.value):
            count, begin, work = 0, time.perf_counter(), time.process_time()
            while time.perf_counter() - begin < _SECONDS.value:
                jax.block_until_ready(next(batches))
                count += _BATCH.value
            wall = count / (time.perf_counter() - begin)
            best = max(best, (wall, count / (time.process_time() - work)))
    return best


def main(argv: Sequence[str]) -> None:
    """Prints the table's rows."""
    del argv
    runtime.setup()
    scratch = pathlib.Path(_SCRATCH.value or tempfile.gettempdir())
    path = pathlib.Path(_STORE.value or _synthetic(scratch, _VOLUMES.value))
    store = sources.Store.open(path)
    for placement in _PLACEMENT.value:
        threads = _THREADS.value if placement is Placement.STREAM else [0]
        for count in threads:
            stream = pipeline.train_stream(
                store,
                DataConfig(
                    placement=placement, read_threads=count, min_brain_fraction=0.0
                ),
                Inputs(),
                batch_size=_BATCH.value,
                seed=0,
                mesh=mesh_lib.make_mesh(jax.devices()[:1]),
            )
            wall, work = _measure(stream)
            row = {
                "placement": placement.value,
                "read_threads": count,
                "batch_size": _BATCH.value,
                "slices": store.num_records,
                "grid": store.grid[1:],
                "slices_per_second": round(wall),
                "slices_per_cpu_second": round(work),
                "device": jax.devices()[0].device_kind,
                "cores": os.cpu_count(),
            }
            print(json.dumps(row))


if __name__ == "__main__":
    app.run(main)
