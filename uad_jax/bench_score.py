"""Scoring rows of a benchmark: whole volumes, from the score to the metrics."""

import math
from typing import Any

import jax
import numpy as np

from uad_jax import bench_setting, programs, stand_ins
from uad_jax import cost as cost_lib
from uad_jax import scoring as scoring_lib
from uad_jax.bench_setting import Row, Setting
from uad_jax.metrics import postprocess, voxel
from uad_jax.metrics.protocols import Protocol
from uad_jax.ops import intensity
from uad_jax.types import Array


def measure(setting: Setting, size: int) -> Row:
    """Measures scoring, post-processing and metrics of made-up whole volumes.

    Args:
      setting: The benchmark.
      size: Volumes at a time, a multiple of the devices.

    Returns:
      A row of plain JSON types; with "skipped" for a pretraining stage, with "error"
      if memory ran out.
    """
    row: Row = {"kind": "score", "batch": size, "depth": setting.shape[0]}
    if setting.method(setting.config.batch_size).score is None:
        sentence = f"{setting.config.name} is a pretraining stage and scores nothing."
        return row | {"skipped": sentence}
    before = bench_setting.peak_bytes(setting.mesh)
    try:
        scoring = _Scoring(setting, size)
        row |= _measured_score(setting, scoring)
    except jax.errors.JaxRuntimeError as error:
        if not cost_lib.is_out_of_memory(error):
            raise
        return row | {
            "error": f"Out of device memory with {size} volumes of {setting.shape[0]} "
            "slices at a time. Use a smaller evaluation.batch_size. (XLA: "
            f"{str(error).splitlines()[0]})"
        }
    total = scoring.total_bytes
    return row | {"memory": bench_setting.memory(setting.mesh, before, total)}


def needed_bytes(setting: Setting, size: int) -> int:
    """Memory of one device for so many volumes, as compiled; 0 = unknown."""
    if scoring_lib.driven_by_host(setting.method(setting.config.batch_size)):
        return 0
    return _Scoring(setting, size).total_bytes


class _Scoring:
    """A model of random weights, and what evaluation runs on a batch of volumes.

    A score that the host drives compiles in its first call, whose time then counts as
    that of the compilation; what its programs need is not known.
    """

    def __init__(self, setting: Setting, size: int) -> None:
        config, mesh = setting.config, setting.mesh
        self.method = setting.method(config.batch_size)
        assert self.method.score is not None
        self.score = self.method.score
        spec = bench_setting.shapes(setting.made_up(mesh.size))
        state = programs.init(self.method, spec, config.seed, mesh)
        self.volumes = stand_ins.volumes(setting.shape, size, mesh)
        key = programs.run_key(config.seed, mesh)
        self.arguments = (state.for_eval(), self.volumes, key)
        self.run = scoring_lib.program(config.name, self.method, mesh)
        self.flops, self.total_bytes = math.nan, 0
        with bench_setting.compiling() as self.compile:
            if scoring_lib.driven_by_host(self.method):
                jax.block_until_ready(self.run(*self.arguments))
                return
            jitted: Any = self.run
            lowered = jitted.lower(*self.arguments)
            self.run = lowered.compile()
        cost = cost_lib.estimate(lowered, self.run, state, mesh.size)
        self.flops, self.total_bytes = cost.flops, cost.total_bytes


def _measured_score(setting: Setting, scoring: _Scoring) -> Row:
    count, depth = scoring.volumes.valid.shape

    def run(calls: int) -> None:
        for _ in range(calls):
            jax.block_until_ready(scoring.run(*scoring.arguments))

    per_volume = bench_setting.milliseconds(
        bench_setting.timed(run, setting), 1 / count
    )
    maps = scoring.run(*scoring.arguments).anomaly_map
    after = _measured_evaluation(setting, scoring, maps)
    return {
        "precision": bench_setting.precision(setting.config),
        "compile": scoring.compile,
        "milliseconds_per_volume": per_volume,
        **after,
        "whole_volume_milliseconds": per_volume["median"]
        + sum(part["median"] for part in after.values()),
        "input": None,
        **bench_setting.speed(
            setting,
            scoring.score,
            scoring.arguments,
            scoring.flops,
            count * depth,
            per_volume["median"] * count / 1000,
        ),
    }


def _measured_evaluation(
    setting: Setting, scoring: _Scoring, anomaly_map: Array
) -> dict[str, Row]:
    """Times post-processing and the exact voxel metrics, on made-up truth.

    Post-processing: erosion, median, the way to the host, and the removal of small
    components at one threshold. Metrics: AP, AUROC, best Dice, Dice at the threshold.
    """
    volumes = scoring.volumes
    mask, valid = volumes.mask[..., 0], volumes.valid
    protocol = Protocol.NONE if scoring.method.filters_inside else setting.protocol
    image = intensity.decode(volumes.image[..., 0])
    _, brain, lesion = stand_ins.volume(setting.shape)

    def filtered() -> tuple[np.ndarray, np.ndarray]:
        on_device = postprocess.postprocess(anomaly_map, mask, valid, protocol, image)
        return jax.device_get(on_device)

    maps, eroded = filtered()
    inside = maps[0][eroded[0]]
    threshold = float(np.quantile(inside, 0.95)) if inside.size else 0.0
    found = postprocess.predict(maps[0], eroded[0], threshold, protocol)

    def segment(calls: int) -> None:
        for _ in range(calls):
            for one, scored in zip(*filtered(), strict=True):
                postprocess.predict(one, scored, threshold, protocol)

    def count(calls: int) -> None:
        for _ in range(calls):
            voxels = voxel.from_map(maps[0], eroded[0], lesion, brain)
            ranking = voxel.rank(voxels)
            voxel.average_precision(ranking)
            voxel.auroc(ranking)
            voxel.best_dice(ranking)
            voxel.dice(voxel.confusion_of_masks(found, lesion))

    return {
        "postprocess_milliseconds_per_volume": bench_setting.milliseconds(
            bench_setting.timed(segment, setting), 1 / len(maps)
        ),
        "metrics_milliseconds_per_volume": bench_setting.milliseconds(
            bench_setting.timed(count, setting)
        ),
    }
