"""Trains several runs in one program, and leaves behind ordinary runs."""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
from absl import logging
from jax.sharding import Mesh

from uad_jax import config as config_lib
from uad_jax import cost as cost_lib
from uad_jax import ensembles, loop, member_programs, programs, signals, train
from uad_jax import mesh as mesh_lib
from uad_jax import progress as progress_lib
from uad_jax import workdir as workdir_lib
from uad_jax.checkpoint import CheckpointError, Checkpoints
from uad_jax.config import ExperimentConfig
from uad_jax.data import pipeline, side_by_side, sources
from uad_jax.ensembles import Axis
from uad_jax.member_programs import Together
from uad_jax.members import Member, Record, Run, TrainResult
from uad_jax.methods.base import Inputs, Method, RunShape
from uad_jax.types import Array, Batch, TrainState

# (config of a member, its workdir, step) -> figures
Evaluate = Callable[[ExperimentConfig, pathlib.Path, int], Mapping[str, float]]


def train_ensemble(
    config: ExperimentConfig,
    axis: Axis,
    workdir: pathlib.Path,
    *,
    mesh: Mesh | None = None,
    progress: bool = True,
    accept_data_change: bool = False,
    evaluate: Evaluate | None = None,
) -> dict[str, TrainResult]:
    """Trains all members of an ensemble at once, or goes on with them.

    Each member sees what a run of its own would see: its seed, its fold, its order of
    slices, its key. It leaves the directory of an ordinary run, with its own best
    checkpoint, in `workdir`. All members are saved at the same steps, and at least
    two of these are kept, so that there is always one that all have.

    Args:
      config: What the members have in common.
      axis: What they differ in.
      workdir: Gets `ensemble.json`, `config.json`, and a directory for each member.
      mesh: Devices to train on; default: all of them.
      progress: Whether to show a progress bar.
      accept_data_change: As in `train.train`.
      evaluate: Full evaluation of one step of one member.

    Returns:
      Member -> how its training ended.

    Raises:
      ValueError: If a member cannot work, or members cannot share one program.
      workdir.WorkdirError: If the directory is in use, or holds something else.
      checkpoint.CheckpointError: If a checkpoint cannot be saved or restored, or the
        members have none of the same step.
      divergence.Diverged: If a loss or a gradient of a member is NaN or infinite.
      cost.OutOfDeviceMemory: If a step of all members does not fit on the devices.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"An ensemble is trained in one process, and this job has "
            f"{jax.process_count()}. Start it without --distributed."
        )
    configs = ensembles.configs(config, axis)
    ensembles.check_folds(config, axis)
    mesh = mesh_lib.make_mesh() if mesh is None else mesh
    train.check_rows(config, mesh)
    ensembles.check(workdir, axis)
    folders = [workdir / folder for folder in axis.folders]
    with signals.StopSignal() as stop, contextlib.ExitStack() as stack:
        stack.enter_context(workdir_lib.opened(workdir))
        checkpoints = [
            _open(stack, own, folder)
            for own, folder in zip(configs, folders, strict=True)
        ]
        ensembles.write(workdir, axis)
        workdir_lib.write_json(workdir / workdir_lib.CONFIG, config_lib.to_dict(config))
        train.keep_config_file(config, workdir)
        workdir_lib.write_environment(workdir)
        ended = _ended(configs, checkpoints)
        if all(ended):
            logging.info("%s is finished: nothing left to train.", workdir)
            return _named(axis, [one for one in ended if one is not None])
        rows = config.batch_size * len(configs)
        with cost_lib.explained(rows, mesh):
            run, state, start = _prepare(
                axis, configs, folders, mesh, checkpoints, accept_data_change, evaluate
            )
        with cost_lib.explained(rows, mesh, run.programs.cost):
            step, stopped = loop.loop(run, state, start, stop, progress)
        return _named(axis, [_result(run, one, step, stopped) for one in run.members])


def _open(
    stack: contextlib.ExitStack, config: ExperimentConfig, folder: pathlib.Path
) -> Checkpoints:
    """Takes the directory of one member."""
    stack.enter_context(workdir_lib.opened(folder))
    workdir_lib.check_config(
        folder,
        config_lib.to_dict(config),
        functools.partial(config_lib.completed, config),
    )
    workdir_lib.write_environment(folder)
    return stack.enter_context(
        contextlib.closing(
            Checkpoints(
                folder / train.CHECKPOINTS,
                keep=max(2, config.train.keep_checkpoints),
                keep_every=config.train.keep_every,
            )
        )
    )


def _named(axis: Axis, results: Sequence[TrainResult]) -> dict[str, TrainResult]:
    return dict(zip(axis.members, results, strict=True))


def _ended(
    configs: Sequence[ExperimentConfig], checkpoints: Sequence[Checkpoints]
) -> list[TrainResult | None]:
    """The results of members that have nothing left to train."""
    return [
        train.finished(config, own)
        for config, own in zip(configs, checkpoints, strict=True)
    ]


def _result(run: Run, member: Member, step: int, stopped: str) -> TrainResult:
    if member in run.active:
        return member.record.result(step, stopped)
    own = member.checkpoints.latest()  # it ended before the others
    assert own is not None
    return member.record.result(own, "patience")


def _prepare(
    axis: Axis,
    configs: Sequence[ExperimentConfig],
    folders: Sequence[pathlib.Path],
    mesh: Mesh,
    checkpoints: Sequence[Checkpoints],
    accept_data_change: bool,
    evaluate: Evaluate | None,
) -> tuple[Run, TrainState, int]:
    """As in `train`, for all members."""
    watch = progress_lib.Stopwatch()
    opened = [
        train.describe(config, folder, mesh, accept_data_change)
        for config, folder in zip(configs, folders, strict=True)
    ]
    stores, streams, methods = zip(*opened, strict=True)
    spec, inputs = streams[0].spec(), methods[0].inputs
    make = _make(axis, configs[0], streams)
    _refuse_other_programs(axis, make, methods, spec, mesh)
    validation = _validation(axis, configs, stores, inputs, mesh)
    with watch.charge("compile"):
        together = member_programs.build(
            make,
            len(configs),
            spec,
            validation[0](0),
            mesh,
            programs.steps_per_call(configs[0].train.steps_per_call, mesh),
        )
    if mesh.devices.flat[0].platform == "cpu":
        logging.warning(
            "On a CPU, members in one program are slower than the same runs one after "
            "another (docs/ensembles.md): an ensemble pays on an accelerator."
        )
    train.log_cost(watch, together.programs.cost, spec.valid.size * len(configs))
    with watch.charge("compile"):
        state, start, records = _first_state(
            configs, make, spec, mesh, checkpoints, together
        )
    train.check_start(start, together.programs.steps_per_call)
    members = [
        Member(
            name=axis.members[place],
            place=place,
            config=configs[place],
            workdir=folders[place],
            stream=streams[place],
            validation=validation[place],
            validate=_of_place(together, place),
            checkpoints=checkpoints[place],
            record=records[place],
            evaluate=evaluate
            and functools.partial(evaluate, configs[place], folders[place]),
        )
        for place in range(len(configs))
    ]
    for member in members:
        train.write_parameters(member.workdir, together.part(state, member.place or 0))
    run = Run(
        config=configs[0],
        members=members,
        stream=side_by_side.SideBySide(
            stores[0], configs[0].data, inputs, streams, mesh
        ),
        key=member_programs.keys([one.seed for one in configs], mesh),
        programs=together.programs,
        part=lambda state, member: together.part(state, member.place or 0),
        watch=watch,
        mesh=mesh,
    )
    return run, state, start


def _of_place(together: Together, place: int) -> Callable | None:
    if together.validate is None:
        return None
    return functools.partial(_validated, together.validate, place)


def _validated(
    validate: Callable, place: int, state: TrainState, batch: Batch, key: Array
) -> tuple:
    return validate(state, batch, key, place)


def _make(
    axis: Axis,
    config: ExperimentConfig,
    streams: Sequence[pipeline.TrainStream],
) -> member_programs.Make:
    """The method of a member by its place; epochs differ in folds only."""
    epochs = [one.steps_per_epoch for one in streams]

    def make(place: Array) -> Method:
        method = config.method
        if axis.of_method:
            value = member_programs.chosen([float(x) for x in axis.values], place)
            path = axis.field.partition(".")[2]
            method = ensembles.with_field(method, path, value)
        epoch = member_programs.chosen(epochs, place)
        return method.make(RunShape(config.total_steps, epoch, config.batch_size))

    return make


def _refuse_other_programs(
    axis: Axis,
    make: member_programs.Make,
    methods: Sequence[Method],
    spec: Batch,
    mesh: Mesh,
) -> None:
    """Refuses values that turn a part of the method off, such as clip_norm = 0.

    Raises:
      ValueError: If a member alone would have another train state.
    """
    together = _shapes(member_programs.abstract_member(make, spec, mesh))
    for member, method in zip(axis.members, methods, strict=True):
        if _shapes(programs.abstract_state(method, spec, mesh)) != together:
            raise ValueError(
                f"{member} alone has another train state than the other members: the "
                "value turns a part of the method off or on, and members share one "
                "program. Leave it out of --ensemble and train it as a run of its own."
            )


def _shapes(state: TrainState) -> tuple:
    """What two train states that fit one program have in common."""
    leaves = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]
    return jax.tree.structure(state), leaves


def _validation(
    axis: Axis,
    configs: Sequence[ExperimentConfig],
    stores: Sequence[sources.Store],
    inputs: Inputs,
    mesh: Mesh,
) -> list[Callable[[int], list[Batch]]]:
    """Validation batches of each member; only folds have different ones."""
    if axis.field != "data.fold":
        shared = train.validation_batches(configs[0], stores[0], inputs, mesh)
        return [shared] * len(configs)
    found = [
        train.validation_batches(config, store, inputs, mesh)
        for config, store in zip(configs, stores, strict=True)
    ]
    lacking = [
        member for member, own in zip(axis.members, found, strict=True) if not own(0)
    ]
    if lacking and len(lacking) < len(found):
        raise ValueError(
            f"{', '.join(lacking)}: no healthy validation volumes, while other members "
            "have some. Leave these folds out of --ensemble."
        )
    return found


def _first_state(
    configs: Sequence[ExperimentConfig],
    make: member_programs.Make,
    spec: Batch,
    mesh: Mesh,
    checkpoints: Sequence[Checkpoints],
    together: Together,
) -> tuple[TrainState, int, list[Record]]:
    """The state to go on from: own checkpoints, else warm start, else scratch."""
    start, steps = common_steps(configs, checkpoints)
    if not steps:
        seeds = [config.seed for config in configs]
        state = member_programs.init(make, spec, seeds, mesh)
        parts = [
            train.warm_started(config, together.part(state, place), mesh)
            for place, config in enumerate(configs)
        ]
        return together.joined(parts), 0, [Record() for _ in configs]
    abstract = member_programs.abstract_member(make, spec, mesh)
    own = list(zip(checkpoints, steps, strict=True))
    states = [one.restore(abstract, step)[0] for one, step in own]
    records = [Record.saved(one.metrics(step)) for one, step in own]
    logging.info("Resumed at step %d, to step %d.", start, configs[0].total_steps)
    return together.joined(states), start, records


def common_steps(
    configs: Sequence[ExperimentConfig], checkpoints: Sequence[Checkpoints]
) -> tuple[int, list[int]]:
    """The checkpoint from which each member goes on.

    Members that have run out of patience stay at their last one. All others go on from
    the newest step that all of them have.

    Returns:
      That step, and the step of each member; 0 and none if there is nothing yet.

    Raises:
      checkpoint.CheckpointError: If the members have no such step.
    """
    newest = [one.verified()[0] if one.latest() else 0 for one in checkpoints]
    ended = [
        result is not None and result.stopped == "patience"
        for result in _ended(configs, checkpoints)
    ]
    going = [
        set(one.steps())
        for one, has_ended in zip(checkpoints, ended, strict=True)
        if not has_ended
    ]
    first_save = len(set.union(*going)) <= 1 and not any(ended)
    shared = set.intersection(*going)
    if shared:
        start = max(shared)
        return start, [
            own if has_ended else start
            for own, has_ended in zip(newest, ended, strict=True)
        ]
    if first_save:  # none yet, or it was killed while the very first was saved
        _log_beginning_again(checkpoints)
        return 0, []
    listed = ", ".join(
        f"{one.directory.parent.name}: {one.steps() or 'none'}" for one in checkpoints
    )
    raise CheckpointError(
        f"The members have no step in common to go on from ({listed}). Put the missing "
        "checkpoints back, or go on with single members: run.py train "
        "--workdir=DIR/MEMBER."
    )


def _log_beginning_again(checkpoints: Sequence[Checkpoints]) -> None:
    """Says so if some members have a checkpoint, and it is not gone on from."""
    steps = {one.directory.parent.name: one.steps() for one in checkpoints}
    saved = [name for name, own in steps.items() if own]
    if saved:
        lacking = [name for name, own in steps.items() if not own]
        logging.warning(
            "All members begin again at step 0: %s saved step %d, and %s nothing (the "
            "training was stopped in its first save, or checkpoints are gone).",
            ", ".join(saved),
            steps[saved[0]][0],
            ", ".join(lacking),
        )
