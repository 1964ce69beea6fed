"""Training, from a config and a workdir to a finished run. Reads from top to bottom."""

import contextlib
import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from clu import parameter_overview
from jax.sharding import Mesh

from uad_jax import checkpoint as checkpoint_lib
from uad_jax import config as config_lib
from uad_jax import cost as cost_lib
from uad_jax import distributed, lineage, loop, programs, signals
from uad_jax import mesh as mesh_lib
from uad_jax import progress as progress_lib
from uad_jax import warm_start as warm_start_lib
from uad_jax import workdir as workdir_lib
from uad_jax.config import ExperimentConfig, Selection
from uad_jax.data import pipeline, profile, sources
from uad_jax.data.config import Sampling
from uad_jax.members import Member, Record, Run, TrainResult
from uad_jax.methods.base import Inputs, Method, RunShape
from uad_jax.types import Batch, TrainState

EXIT_PREEMPTED = 143  # status of a process that a signal stopped after it saved
CHECKPOINTS = "checkpoints"
PARAMETERS = "parameters.txt"
CONFIG_FILE = "config_file.py"  # a copy of --config, for where that file is not
SHAPES = "shapes.json"  # what is needed to rebuild the model without the data

_CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
_VALIDATION_SEED = 0  # not the run's: losses of different seeds compare


def train(
    config: ExperimentConfig,
    workdir: pathlib.Path,
    *,
    mesh: Mesh | None = None,
    progress: bool = True,
    accept_data_change: bool = False,
    evaluate: Callable[[int], Mapping[str, float]] | None = None,
) -> TrainResult:
    """Trains a method, or goes on from where the workdir stands, to the same bits.

    Args:
      config: The experiment.
      workdir: Directory of the run: checkpoints, metrics, and descriptions of the
        config, the environment and the data.
      mesh: Devices to train on; default: all of them.
      progress: Whether to show a progress bar (on a terminal) or lines.
      accept_data_change: Go on although the training data are not those that the
        run began with.
      evaluate: Full evaluation of one step, called every `train.evaluate_every`
        steps; its figures become metrics. The evaluator stands above the trainer, so
        the caller hands it in.

    Raises:
      ValueError: If the config cannot work with this data or these devices.
      workdir.WorkdirError: If the workdir is in use, not writable, or of another run.
      checkpoint.CheckpointError: If a checkpoint cannot be saved or restored.
      divergence.Diverged: If a loss or a gradient is NaN or infinite.
      cost.OutOfDeviceMemory: If a step does not fit on the devices.
    """
    config_lib.validate(config)
    mesh = mesh_lib.make_mesh() if mesh is None else mesh
    check_rows(config, mesh)
    if config.train.evaluate_every and jax.process_count() > 1:
        raise ValueError(
            f"train.evaluate_every is {config.train.evaluate_every}, but full "
            "evaluations run in one process only. Use 0 and run.py evaluate."
        )
    with signals.StopSignal() as stop, workdir_lib.opened(workdir):
        workdir_lib.check_config(
            workdir,
            config_lib.to_dict(config),
            functools.partial(config_lib.completed, config),
        )
        workdir_lib.write_environment(workdir)
        checkpoints = checkpoint_lib.Checkpoints(
            workdir / CHECKPOINTS,
            keep=config.train.keep_checkpoints,
            keep_every=config.train.keep_every,
        )
        with contextlib.closing(checkpoints):
            done = finished(config, checkpoints)
            if done is not None:
                logging.info(
                    "%s is finished (%s at step %d of %d): nothing left to train.",
                    workdir,
                    done.stopped,
                    done.step,
                    config.total_steps,
                )
                return done
            with cost_lib.explained(config.batch_size, mesh):
                run, state, start = _prepare(
                    config, workdir, mesh, checkpoints, accept_data_change, evaluate
                )
            with cost_lib.explained(config.batch_size, mesh, run.programs.cost):
                step, stopped = loop.loop(run, state, start, stop, progress)
                return run.members[0].record.result(step, stopped)


def check_rows(config: ExperimentConfig, mesh: Mesh) -> None:
    """Makes sure that the devices divide the batch.

    Raises:
      ValueError: If they do not.
    """
    if config.batch_size % mesh.size:
        below = config.batch_size // mesh.size * mesh.size
        raise ValueError(
            f"A batch_size of {config.batch_size} cannot be split over {mesh.size} "
            f"devices. Use {f'{below} or ' if below else ''}{below + mesh.size}."
        )


def finished(
    config: ExperimentConfig, checkpoints: checkpoint_lib.Checkpoints
) -> TrainResult | None:
    """The result of a run that has nothing left to train, else None."""
    step = checkpoints.latest()
    if step is None:
        return None
    record = Record.saved(checkpoints.metrics(step))
    if step >= config.total_steps:
        return record.result(step, "done")
    if record.out_of_patience(config.train.patience):
        return record.result(step, "patience")
    return None


def describe(
    config: ExperimentConfig,
    workdir: pathlib.Path,
    mesh: Mesh,
    accept_data_change: bool = False,
) -> tuple[sources.Store, pipeline.TrainStream, Method]:
    """Opens data and method, and writes down in the workdir what they are.

    Args:
      config: The experiment.
      workdir: Directory of the run.
      mesh: The data mesh.
      accept_data_change: Go on although the data are not those the run began with.

    Raises:
      workdir.WorkdirError: If the data have changed.
      ValueError: If a validation scan trained a run that this one starts from.
    """
    store = sources.Store.open(config.data.store)
    shape = RunShape(config.total_steps, 1, config.batch_size)
    stream = pipeline.train_stream(
        store,
        config.data,
        config.method.make(shape).inputs,
        batch_size=config.batch_size,
        seed=config.seed,
        mesh=mesh,
    )
    workdir_lib.check_fingerprint(
        workdir, _describe_data(store, stream), accept_change=accept_data_change
    )
    shape = shape._replace(steps_per_epoch=stream.steps_per_epoch)
    if distributed.is_main():
        shapes = {"run": shape._asdict(), "batch": spec_to_json(stream.spec())}
        workdir_lib.write_json(workdir / SHAPES, shapes)
        if not workdir_lib.has_begun(workdir):
            started_from = [entry.workdir for entry in config.train.warm_start]
            lineage.write(workdir, [pathlib.Path(one) for one in started_from])
        _write_profile(config, workdir, store, stream)
        keep_config_file(config, workdir)
        if config.train.warm_start:
            validation = pipeline.select(store, config.data, "val")
            lineage.check_validation(workdir, config.data.store, validation)
    return store, stream, config.method.make(shape)


def _prepare(
    config: ExperimentConfig,
    workdir: pathlib.Path,
    mesh: Mesh,
    checkpoints: checkpoint_lib.Checkpoints,
    accept_data_change: bool,
    evaluate: Callable[[int], Mapping[str, float]] | None,
) -> tuple[Run, TrainState, int]:
    """Opens the data, builds the method, compiles, and restores or initialises.

    Returns:
      The run, the train state to go on from, and its step.
    """
    watch = progress_lib.Stopwatch()
    store, stream, method = describe(config, workdir, mesh, accept_data_change)
    spec = stream.spec()
    validation = validation_batches(config, store, method.inputs, mesh)
    with watch.charge("compile"):
        built = programs.build(
            method, spec, validation(0), mesh, _steps_per_call(config, mesh)
        )
    log_cost(watch, built.cost, spec.valid.size)
    with watch.charge("compile"):
        state, start, record = _first_state(config, method, spec, mesh, checkpoints)
    check_start(start, built.steps_per_call)
    if distributed.is_main():
        write_parameters(workdir, state)
    member = Member(
        config=config,
        workdir=workdir,
        stream=stream,
        validation=validation,
        validate=built.validate,
        checkpoints=checkpoints,
        record=record,
        evaluate=evaluate,
    )
    run = Run(
        config=config,
        members=[member],
        stream=stream,
        key=programs.run_key(config.seed, mesh),
        programs=built,
        part=lambda state, member: state,
        watch=watch,
        mesh=mesh,
    )
    return run, state, start


def log_cost(watch: progress_lib.Stopwatch, cost: cost_lib.Cost, slices: int) -> None:
    """Says what compiling took and what a step of so many slices costs."""
    logging.info(
        "Compiled in %.1f s: %.3g FLOPs per slice, %.2f GiB per device.",
        watch.seconds["compile"],
        cost.flops / slices,
        cost.total_bytes / 2**30,
    )


def _write_profile(
    config: ExperimentConfig,
    workdir: pathlib.Path,
    store: sources.Store,
    stream: pipeline.TrainStream,
) -> None:
    """Writes what scans must be like that the model may see, unless it is there."""
    path = workdir / workdir_lib.PROFILE
    known = workdir_lib.read_json(path) if path.is_file() else {}
    if known.get("fingerprint") == stream.fingerprint:
        return
    channels = pipeline.channels(store, config.data.modalities)
    profiles = profile.of_store(store, stream.volumes, channels)
    workdir_lib.write_json(
        path,
        {
            "fingerprint": stream.fingerprint,
            "modalities": [store.modalities[channel] for channel in channels],
            "recipe_hash": store.meta["recipe_hash"],
            "profiles": {name: found.to_json() for name, found in profiles.items()},
        },
    )


def keep_config_file(config: ExperimentConfig, workdir: pathlib.Path) -> None:
    """Copies the file of a config beside the run, unless it comes with this code."""
    path = pathlib.Path(config.source.partition(":")[0])
    if path.is_file() and not path.resolve().is_relative_to(_CONFIGS):
        shutil.copyfile(path, workdir / CONFIG_FILE)


def _describe_data(
    store: sources.Store, stream: pipeline.TrainStream
) -> dict[str, Any]:
    """What the training data are: compared at every start, with names for people."""
    return {
        "fingerprint": stream.fingerprint,
        "recipe": store.recipe,
        "licences": sorted({volume.licence for volume in stream.volumes}),
        "subjects": {volume.subject: volume.content for volume in stream.volumes},
    }


def _steps_per_call(config: ExperimentConfig, mesh: Mesh) -> int:
    return programs.steps_per_call(config.train.steps_per_call, mesh)


def validation_batches(
    config: ExperimentConfig, store: sources.Store, inputs: Inputs, mesh: Mesh
) -> Callable[[int], list[Batch]]:
    """Batches to validate a step on: of healthy volumes; none if there are none."""
    volumes = [
        volume
        for volume in pipeline.select(store, config.data, "val")
        if volume.label == "healthy"
    ]
    if not volumes:
        logging.warning(
            "%s has no healthy validation volumes: nothing selects a best checkpoint.",
            config.data.store,
        )
        return lambda step: []

    def draw(num_examples: int, seed: int, sampling: Sampling) -> list[Batch]:
        return pipeline.validation_batches(
            store,
            volumes,
            inputs,
            batch_size=config.batch_size,
            num_examples=num_examples,
            seed=seed,
            mesh=mesh,
            modalities=config.data.modalities,
            sampling=sampling,
        )

    if config.train.selection is Selection.REFERENCE:
        return lambda step: draw(0, _VALIDATION_SEED + step, Sampling.ONE_PER_VOLUME)
    count = -(-config.train.validation_slices // (inputs.num_slices or 1))
    fixed = draw(count, _VALIDATION_SEED, Sampling.SLICES)
    return lambda step: fixed


def _first_state(
    config: ExperimentConfig,
    method: Method,
    spec: Batch,
    mesh: Mesh,
    checkpoints: checkpoint_lib.Checkpoints,
) -> tuple[TrainState, int, Record]:
    """The state to go on from: own checkpoint, else warm start, else scratch."""
    if checkpoints.latest() is not None:
        abstract = programs.abstract_state(method, spec, mesh)
        state, start = checkpoints.restore(abstract)
        logging.info(
            "Training is resumed at step %d, to step %d.", start, config.total_steps
        )
        return state, start, Record.saved(checkpoints.metrics(start))
    state = warm_started(config, programs.init(method, spec, config.seed, mesh), mesh)
    return state, 0, Record()


def warm_started(config: ExperimentConfig, state: TrainState, mesh: Mesh) -> TrainState:
    """Takes parameters of other runs into a fresh state, where the config asks."""
    entries = [
        (entry.workdir, entry.step, entry.source_prefix, entry.target_prefix)
        for entry in config.train.warm_start
    ]
    if not entries:
        logging.info("From scratch, to step %d.", config.total_steps)
        return state
    state, fresh = warm_start_lib.warm_start(state, entries, mesh)
    logging.info(
        "Warm start, %d leaves fresh, to step %d.", len(fresh), config.total_steps
    )
    return state


def check_start(start: int, steps_per_call: int) -> None:
    """Makes sure that the calls of the update meet the steps that are due.

    Raises:
      ValueError: If they do not.
    """
    if start % steps_per_call:
        raise ValueError(
            f"The checkpoint is of step {start}, not a multiple of "
            f"train.steps_per_call = {steps_per_call}. Use steps_per_call = 1 until a "
            "multiple was saved."
        )


def write_parameters(workdir: pathlib.Path, state: TrainState) -> None:
    """Writes the table of parameters of a run."""
    overview = parameter_overview.get_parameter_overview(state.model.params)
    (workdir / PARAMETERS).write_text(f"{overview}\n", encoding="utf-8")
    total = overview.rstrip().splitlines()[-1]
    logging.info("%s: %s; by layer in %s.", workdir, total, PARAMETERS)


def spec_to_json(spec: Batch) -> dict[str, Any]:
    """Shapes and dtypes of a batch as plain JSON types."""
    return {
        field.name: [list(leaf.shape), str(leaf.dtype)]
        for field in dataclasses.fields(spec)
        if (leaf := getattr(spec, field.name)) is not None
    }


def spec_from_json(stored: dict[str, Any]) -> Batch:
    """Inverts `spec_to_json`, to `jax.ShapeDtypeStruct`."""
    fields: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
        for name, (shape, dtype) in stored.items()
    }
    return Batch(**fields)
