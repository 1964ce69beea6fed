"""Measures how fast a config trains and scores on these devices, and what it needs."""

import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from uad_jax import bench_score, bench_train, environment, flops, stand_ins
from uad_jax import config as config_lib
from uad_jax import cost as cost_lib
from uad_jax import mesh as mesh_lib
from uad_jax import results as results_lib
from uad_jax import workdir as workdir_lib
from uad_jax.bench_setting import Row, Setting
from uad_jax.config import ExperimentConfig
from uad_jax.data import pipeline, recipes, sources

SCHEMA = 1


def bench(
    config: ExperimentConfig,
    *,
    train: bool = True,
    score: bool = True,
    batches: Sequence[int] = (),
    repeats: int = 5,
    seconds: float = 2.0,
    output: pathlib.Path | None = None,
    mesh: Mesh | None = None,
    recipe: str = "grid2mm",
) -> dict[str, Any]:
    """Measures training steps and whole-volume scores; prints one line per row.

    With `config.data.store` the shapes are those of the store, steps run on its
    slices, and the wait for the real training stream is measured. Without it,
    made-up slices of the recipe's shape are used. A batch that does not fit in memory
    is a row that says so.

    Args:
      config: The experiment.
      train: Whether training steps are measured, one row per batch size.
      score: Whether scoring is measured, `evaluation.batch_size` volumes at a time.
      batches: Rows of the global batch to train with; default: the config's.
      repeats: Measurements; their median, minimum and maximum are kept.
      seconds: Shortest time of one measurement.
      output: JSON file for the result; None = none.
      mesh: Devices; default: all of them.
      recipe: Whose grid gives the shape where there is no store.

    Returns:
      What the JSON file holds (docs/benchmarks.md explains it).

    Raises:
      ValueError: If the config or the arguments cannot work.
    """
    mesh = mesh_lib.make_mesh() if mesh is None else mesh
    sizes = [int(size) for size in batches] or [config.batch_size]
    _check(config, mesh, sizes, train, score, repeats, seconds)
    setting = _setting(config, mesh, recipe, repeats, seconds)
    rows: list[Row] = []
    largest: dict[str, Row] = {}
    volumes = config.evaluation.batch_size + -config.evaluation.batch_size % mesh.size
    for wanted, part, counts in (
        (train, bench_train, sizes),
        (score, bench_score, [volumes]),
    ):
        measured = []
        for count in counts if wanted else ():
            measured.append(part.measure(setting, count))
            print(line(config.name, measured[-1]), flush=True)
        rows += measured
        done = {row["batch"]: row["memory"] for row in measured if "memory" in row}
        if done:
            kind = measured[0]["kind"]
            largest[kind] = _largest(setting, done, part.needed_bytes)
            print(largest_line(config.name, kind, largest[kind]), flush=True)
    result = {
        "schema": SCHEMA,
        "name": config.name,
        "method": type(config.method).__name__,
        "method_config": config_lib.to_dict(config.method),
        "source": config.source,
        "environment": environment.describe(),
        "num_devices": mesh.size,
        "repeats": repeats,
        "seconds": seconds,
        "input": {
            "kind": "store" if setting.store else "made up",
            "store": config.data.store,
            "recipe": setting.recipe,
            "shape": list(setting.shape),
        },
        "ceilings": {
            name: ceiling._asdict() for name, ceiling in setting.ceilings.items()
        },
        "rows": rows,
        "largest_batch": largest,
    }
    plain = results_lib.without_nan(results_lib.without_folders(result))
    plain = json.loads(json.dumps(plain))  # what a reader of the file gets
    if output is not None:
        workdir_lib.write_json(output, plain)
    return plain


def _check(
    config: ExperimentConfig,
    mesh: Mesh,
    sizes: Sequence[int],
    train: bool,
    score: bool,
    repeats: int,
    seconds: float,
) -> None:
    """Refuses what cannot work, before anything is compiled."""
    config_lib.validate(config)
    if jax.process_count() > 1:
        raise ValueError(
            f"bench runs in one process, and this job has {jax.process_count()}. "
            "Start it without --distributed."
        )
    if not (train or score):
        raise ValueError("Neither training nor scoring is to be measured. Ask for one.")
    if repeats < 1 or seconds <= 0:
        raise ValueError(
            f"{repeats} repeats of {seconds} seconds: use 1 or more repeats of more "
            "than 0 seconds."
        )
    for size in sizes:
        if size < 1:
            raise ValueError(f"A batch of {size} rows: use 1 or more.")
        if size % mesh.size:
            raise ValueError(
                f"A batch of {size} rows cannot be split over {mesh.size} devices. "
                f"Use a multiple of {mesh.size}."
            )


def _setting(
    config: ExperimentConfig, mesh: Mesh, recipe: str, repeats: int, seconds: float
) -> Setting:
    """Opens the store, or takes the recipe's shape, and measures the ceilings."""
    store = None
    if config.data.store:
        store = sources.Store.open(pathlib.Path(config.data.store))
        channels = len(pipeline.channels(store, config.data.modalities))
        shape: stand_ins.Shape = (*store.grid[:3], channels)
        recipe = str(store.recipe.get("name", ""))
    else:
        if recipe not in recipes.RECIPES:
            raise ValueError(
                f"There is no recipe {recipe!r}. Use one of "
                f"{', '.join(recipes.RECIPES)}."
            )
        width, height, depth = recipes.RECIPES[recipe].grid
        names = [name for name in config.data.modalities.split(",") if name.strip()]
        shape = (depth, width, height, len(names) or 1)
    logging.info("Measuring the fastest products of matrices ...")
    return Setting(
        config=config,
        mesh=mesh,
        store=store,
        shape=shape,
        recipe=recipe,
        ceilings={name: flops.ceiling(mesh, name) for name in ("float32", "bfloat16")},
        repeats=repeats,
        seconds=seconds,
    )


def _largest(
    setting: Setting, done: dict[int, Row], needed: Callable[[Setting, int], int]
) -> Row:
    """Estimates the largest batch from the memory that two compiled sizes need.

    Args:
      setting: The benchmark.
      done: Batch size -> "memory" of its row.
      needed: (setting, batch size) -> bytes of one device, for a second size.
    """
    devices = setting.mesh.size
    limit, limit_of = _memory_limit(setting.mesh)
    points = {size: memory["program_bytes"] or 0 for size, memory in done.items()}
    if len(points) == 1:
        (size,) = points
        other = size // 2 // devices * devices or 2 * size
        try:
            points[other] = needed(setting, other)
        except jax.errors.JaxRuntimeError as error:
            if not cost_lib.is_out_of_memory(error):
                raise
    small, large = min(points), max(points)
    row: Row = {
        "batch": None,
        "estimated_from": [small, large],
        "limit_bytes": limit,
        "limit_of": limit_of,
    }
    if small == large or not 0 < points[small] < points[large]:
        return row | {"note": "The compiled programs do not show what a row needs."}
    per_row = (points[large] - points[small]) / (large - small)
    fixed = max(0, round(points[large] - large * per_row))
    cost = cost_lib.Cost(flops=math.nan, total_bytes=points[large], fixed_bytes=fixed)
    return row | {
        "batch": cost_lib.largest_batch(cost, large, devices, limit),
        "bytes_per_row": per_row,
        "fixed_bytes": fixed,
        "note": "An estimate: memory of the compiled program, taken as linear.",
    }


def _memory_limit(mesh: Mesh) -> tuple[int, str]:
    """Bytes that one device of the mesh may use, and whose they are."""
    limit = mesh_lib.device_bytes(mesh.local_devices[0])
    if limit:
        return limit, "device memory"
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages // mesh.size, "host memory"


def line(name: str, row: Row) -> str:
    """Says one row in one line.

    Args:
      name: Of the experiment.
      row: From `bench`.
    """
    score = row["kind"] == "score"
    what = f"{name} {row['kind']} b={row['batch']}"
    if score:
        what += f" volumes of {row['depth']} slices"
    for key in ("skipped", "error"):
        if key in row:
            return f"{what}: {row[key]}"
    parts = [f"{_figure(row['slices_per_second'])} slices/s"]
    unit = "volume" if score else "step"
    per_unit = row[f"milliseconds_per_{unit}"]["median"]
    parts.append(f"{_figure(per_unit)} ms/{unit}")
    if score:
        for key in ("postprocess", "metrics"):
            median = row[f"{key}_milliseconds_per_volume"]["median"]
            parts.append(f"{key} {_figure(median)} ms")
        parts.append(f"whole volume {_figure(row['whole_volume_milliseconds'])} ms")
    if row["flops_per_slice"] is not None:
        shares = row["share_of_ceiling"]
        parts.append(f"{row['flops_per_slice'] / 1e9:.3g} GFLOP/slice")
        parts.append(
            f"{100 * shares['float32']:.2g} % of the fp32 matmul ceiling "
            f"(bf16 {100 * shares['bfloat16']:.2g} %)"
        )
    if row["input"] is not None:
        parts.append(f"input wait {100 * row['input']['wait_share']:.1f} %")
    if row["memory"]["peak_bytes"]:
        parts.append(f"{row['memory']['peak_bytes'] / 2**30:.2f} GiB")
    cached = ", cached" if row["compile"]["from_persistent_cache"] else ""
    parts.append(f"compile {row['compile']['seconds']:.1f} s{cached}")
    return f"{what}: {', '.join(parts)}"


def _figure(value: float) -> str:
    """Three digits where they say something, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def largest_line(name: str, kind: str, row: Row) -> str:
    """Says in one line what batch would fit."""
    what = {"train": "rows", "score": "volumes"}[kind]
    if row["batch"] is None:
        return f"{name} {kind}: largest batch unknown. {row['note']}"
    return (
        f"{name} {kind}: about {row['batch']:,} {what} would fit in "
        f"{row['limit_bytes'] / 2**30:.1f} GiB of {row['limit_of']} (an estimate "
        f"from the programs for {row['estimated_from'][0]} and "
        f"{row['estimated_from'][1]})"
    )
