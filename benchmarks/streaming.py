"""Peak memory of an evaluation against the number of volumes.

    python benchmarks/streaming.py --root=runs/streaming --volumes=50,500

Every evaluation runs in a process of its own, so that its peak is its own: once with
all voxels held for exact pooled figures, once with histograms only. The model is an
autoencoder after two steps: what it finds does not matter here.
"""

import functools
import json
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from configs import autoencoder
from uad_jax import evaluate, runtime, train
from uad_jax.config import EvaluationSet, ExperimentConfig
from uad_jax.data import builder
from uad_jax.data.preprocess import Prepared
from uad_jax.types import Geometry

_ROOT = flags.DEFINE_string("root", "runs/streaming", "Directory of stores and run.")
_VOLUMES = flags.DEFINE_list("volumes", ["50", "500"], "Sizes of the test sets.")
_SLICES = flags.DEFINE_integer("slices", 80, "Slices of a volume.")
_EXACT_UP_TO = flags.DEFINE_integer("exact_up_to", 100, "Largest set held in memory.")
_ONE = flags.DEFINE_string("one", "", "Internal: store to evaluate on.")
_EXACT = flags.DEFINE_bool("exact", False, "Internal: hold all voxels.")

_RECIPE = {"name": "streaming", "spacing": [2.0, 2.0, 2.0]}


def ball(number: int, lesion: bool, grid: tuple[int, int, int, int]) -> Prepared:
    """A noisy ellipsoid of about a brain's size, with a brighter ball if asked."""
    rng = np.random.default_rng(number)
    z, x, y = np.meshgrid(*(np.linspace(-1, 1, n) for n in grid[:3]), indexing="ij")
    brain = (z / 0.8) ** 2 + (x / 0.7) ** 2 + (y / 0.85) ** 2 < 1
    spot = brain & (z**2 + (x - 0.3) ** 2 + (y - rng.uniform(-0.3, 0.3)) ** 2 < 0.01)
    spot &= lesion
    image = rng.normal(0.5, 0.05, brain.shape) + 0.3 * spot
    depth, height, width, _ = grid
    return Prepared(
        image=np.where(brain, image, 0)[..., None].astype(np.float32),
        brain=brain,
        lesion=spot,
        geometry=Geometry(
            native_shape=(height, width, depth),
            native_affine=np.diag([2.0, 2.0, 2.0, 1.0]),
            grid_to_native=np.eye(4),
        ),
        notes=[],
    )


def _store(directory: pathlib.Path, splits: dict[str, int]) -> pathlib.Path:
    grid = (_SLICES.value, 96, 96, 1)
    scans = []
    for split, count in splits.items():
        for number in range(count):
            lesion = split == "test" and number % 2 == 1
            scans.append(
                builder.Source(
                    subject=f"{split}-{number}",
                    load=functools.partial(
                        ball, len(scans) + 1000 * count, lesion, grid
                    ),
                    modalities=("t1",),
                    label="abnormal" if lesion else "healthy",
                    split=split,
                )
            )
    return builder.build_from(
        scans,
        directory,
        recipe=_RECIPE,
        recipe_hash="1",
        source_hash=json.dumps([splits, grid]),
        workers=2,
    )


def _config(root: pathlib.Path) -> ExperimentConfig:
    config = autoencoder.get_config("variant=ae,cpu")
    config.data.store = str(root / "train")
    config.total_steps = 2
    config.train.eval_every = config.train.save_every = 2
    return config


def _evaluate_one(root: pathlib.Path, store: str, exact: bool) -> None:
    """Evaluates in this process and prints its figures as JSON."""
    config = _config(root)
    config.evaluation.sets = {"set": EvaluationSet(store=store)}
    config.evaluation.exact_voxels = sys.maxsize if exact else 0
    begin = time.monotonic()
    found = evaluate.evaluate(config, root / "run", progress=False)["set"]
    print(
        json.dumps(
            {
                "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                "seconds": time.monotonic() - begin,
                "pooled": found["pooled"],
                "ap_pooled": found["scorers"][config.name]["ap_pooled"],
            }
        )
    )


def main(argv: list[str]) -> None:
    """Builds what is missing, then measures each size in both ways."""
    del argv
    root = pathlib.Path(_ROOT.value).resolve()
    runtime.log_ours_only()
    runtime.setup()
    if _ONE.value:
        _evaluate_one(root, _ONE.value, _EXACT.value)
        return
    _store(root / "train", {"train": 4, "val": 2})
    train.train(_config(root), root / "run", progress=False)
    for size in map(int, _VOLUMES.value):
        store = _store(root / f"test-{size}", {"test": size})
        for exact in (False, True) if size <= _EXACT_UP_TO.value else (False,):
            command = [
                *(sys.executable, __file__, f"--root={root}", f"--one={store}"),
                *(["--exact"] if exact else []),
            ]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            row = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{size} volumes of {_SLICES.value} slices, {row['pooled']}: "
                f"peak {row['peak_gib']:.2f} GiB, "
                f"{row['seconds'] / size:.2f} s per volume and 6 scorers, "
                f"AP pooled {row['ap_pooled']:.5f}",
                flush=True,
            )


if __name__ == "__main__":
    app.run(main)
