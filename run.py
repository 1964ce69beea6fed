"""Command line of uad_jax. For research only, not a medical device.

    python run.py demo        [--quick]                  all of it, on synthetic brains
    python run.py check-data  --source=DIR               find files that cannot be used
    python run.py prepare     --source=DIR --store=DIR   make slices of scans, once
    python run.py train       --config=FILE --workdir=DIR --config.data.store=DIR
    python run.py train       ... --ensemble=seed:5      several runs in one program
    python run.py evaluate    --workdir=DIR              metrics and report
    python run.py evaluate    --workdir=DIR --steps=all  many checkpoints [--watch]
    python run.py evaluate    --workdir=DIR --protocol=baur
                                                         as another study evaluates
    python run.py evaluate    --workdir=DIR --maps=DIR --source=MANIFEST
                                                         maps made by another tool
    python run.py compare     DIR DIR ... --output=DIR   runs or maps side by side
    python run.py predict     --workdir=DIR --input=SCANS --output=DIR
                                                         maps of new scans
    python run.py import      --config=FILE --workdir=DIR --config.data.store=DIR
                              --input=FILE               weights of another program
    python run.py rescore     --workdir=DIR --output=DIR --config.method.score.kind=KIND
                                                         the same run, another score
                              [--choose_tv_weight=1,2]   of a restoration, by itself
    python run.py bench       --config=FILE              speed of training and scoring
    python run.py env                                    versions and devices

`python run.py --help` lists the flags.
"""

import sys

if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(
        "uad_jax needs Python 3.11, 3.12 or 3.13, and this is Python %d.%d: make the "
        "virtual environment with one of those." % sys.version_info[:2]
    )

import pathlib
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from configs import _opening
from uad_jax import runtime
from uad_jax.metrics import protocols

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment, e.g. configs/autoencoder.py:variant=vae,cpu"
)
_WORKDIR = flags.DEFINE_string("workdir", "", "Directory of one run.")
_SOURCE = flags.DEFINE_string(
    "source", "", "Folder of NIfTI files, manifest.csv, or DATASET:ROOT."
)
_STORE = flags.DEFINE_string(
    "store", "", "Directory of prepared slices; evaluate: to evaluate on."
)
_DATA = flags.DEFINE_multi_string(
    "data", [], "evaluate: stores to evaluate on; may be given several times."
)
_RECIPE = flags.DEFINE_string("recipe", "grid2mm", "Preprocessing recipe.")
_MODALITY = flags.DEFINE_string(
    "modality", "", "Modalities to take; of a plain folder also what its files are."
)
_WORKERS = flags.DEFINE_integer("workers", None, "Processes; default: all cores.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint step; default: the best.")
_STEPS = flags.DEFINE_string("steps", "", "evaluate: 'all', or 'A:B'; by_step.csv.")
_WATCH = flags.DEFINE_bool("watch", False, "evaluate: follow a run that trains.")
_MAPS = flags.DEFINE_string("maps", "", "evaluate: folder of maps of another tool.")
_PROTOCOL = flags.DEFINE_enum_class(
    "protocol",
    None,
    protocols.Protocol,
    "evaluate, predict: instead of the config's; results are <set>_<protocol>.",
)
_INPUT = flags.DEFINE_string(
    "input", "", "predict: scan, folder or manifest.csv; import: file of weights."
)
_NOTE = flags.DEFINE_string("note", "", "import: source and licence of the weights.")
_ENTRY = flags.DEFINE_string("entry", "", "import: which model of the file, 'ema'.")
_OUTPUT = flags.DEFINE_string(
    "output", "", "predict, compare, rescore: folder of the results; bench: JSON file."
)
_SET = flags.DEFINE_string("set", "", "compare: the set; default: the common one.")
_FORCE = flags.DEFINE_bool("force", False, "predict: accept another modality.")
_BATCH = flags.DEFINE_list("batch", [], "bench: batch sizes, such as 32,64.")
_CHOOSE_TV_WEIGHT = flags.DEFINE_list(
    "choose_tv_weight", [], "rescore: weights to choose from on healthy scans: 0.5,1,2."
)
_BENCH_TRAIN = flags.DEFINE_bool("train", False, "bench: training only.")
_BENCH_SCORE = flags.DEFINE_bool("score", False, "bench: scoring only.")
_QUICK = flags.DEFINE_bool("quick", False, "demo: a smaller one, in about a minute.")
_IGNORE_AFFINE = flags.DEFINE_bool(
    "ignore_affine", False, "Accept masks whose affine differs from the image's."
)
_NAN = flags.DEFINE_enum(
    "nan", "error", ["error", "zero"], "What to do with NaN and Inf voxels."
)
_ASSUME_ORIENTATION = flags.DEFINE_string(
    "assume_orientation", "", "Axes of files that do not say theirs, such as RAS."
)
_REFERENCE = flags.DEFINE_bool(
    "reference", False, "Keep the published splits' duplicates and leaks."
)
_ACCEPT_DATA_CHANGE = flags.DEFINE_bool(
    "accept_data_change", False, "Resume although the training data changed."
)
_ENSEMBLE = flags.DEFINE_string(
    "ensemble",
    "",
    "train: runs to train in one program: seed:5, fold:5, method.kl_weight:0.1,1,10.",
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the other hosts of this job (jax.distributed)."
)
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")


def _demo() -> int:
    from configs import demo as demo_config
    from uad_jax import demo

    word = "quick" if _QUICK.value else ""
    workdir = _WORKDIR.value or ("runs/demo-quick" if _QUICK.value else "runs/demo")
    config = demo_config.get_config(word)
    config.source = f"configs/demo.py:{word}"
    return demo.demo(config, pathlib.Path(workdir), quick=_QUICK.value)


def _reading() -> dict[str, Any]:
    return {
        "modality": _MODALITY.value,
        "workers": _WORKERS.value,
        "ignore_affine": _IGNORE_AFFINE.value,
        "nan_to_zero": _NAN.value == "zero",
        "assume_orientation": _ASSUME_ORIENTATION.value,
        "reference": _REFERENCE.value,
    }


def _prepare() -> None:
    from uad_jax import prepare

    _need("source", "store")
    store = pathlib.Path(_STORE.value)
    prepare.prepare(_SOURCE.value, store, _RECIPE.value, **_reading())


def _check_data() -> int:
    from uad_jax import prepare

    _need("source")
    return prepare.check_data(_SOURCE.value, **_reading())


def _train() -> int:
    from uad_jax import calibrated_training, distributed, train

    _need("config", "workdir")
    if _DISTRIBUTED.value:
        distributed.initialize()
    workdir = pathlib.Path(_WORKDIR.value)
    ended, has_thresholds = calibrated_training.train_calibrated(
        _new_experiment(),
        workdir,
        ensemble=_ENSEMBLE.value,
        accept_data_change=_ACCEPT_DATA_CHANGE.value,
    )
    if not ended:
        return train.EXIT_PREEMPTED
    if has_thresholds:
        print(f"Trained. Next: python run.py evaluate --workdir={workdir}")
    return 0


def _new_experiment() -> Any:
    """The config of a run that is to be made."""
    config = _CONFIG.value
    if not config.data.store:
        raise ValueError(
            "There are no data to train on: give --config.data.store=DIR, where DIR is "
            "the --store of `run.py prepare`."
        )
    chosen = config_flags.get_config_filename(flags.FLAGS["config"])
    config.source = _opening.source_of(chosen)
    return config


def _import() -> None:
    from uad_jax import importing

    _need("config", "workdir", "input")
    workdir = pathlib.Path(_WORKDIR.value)
    path = pathlib.Path(_INPUT.value)
    importing.import_weights(
        _new_experiment(), path, workdir, entry=_ENTRY.value, note=_NOTE.value
    )
    print(f"Imported. Next: python run.py evaluate --workdir={workdir}")


def _evaluate() -> None:
    from uad_jax import (
        by_step,
        ensembles,
        evaluate,
        evaluate_ensemble,
        evaluation,
        report,
    )
    from uad_jax import results as results_lib

    _need("workdir")
    workdir = pathlib.Path(_WORKDIR.value)
    several = _STEPS.value or _WATCH.value
    if _STEP.value is not None and (several or _MAPS.value):
        sys.exit(
            "--step is one checkpoint: leave it out with --steps, --watch, --maps."
        )
    if _MAPS.value and several:
        sys.exit("Maps have no checkpoints: leave out --steps and --watch.")
    if _MAPS.value:
        found = _evaluate_maps(pathlib.Path(_MAPS.value), workdir)
    else:
        config = _run_config()
        stores = [*_DATA.value, *([_STORE.value] if _STORE.value else [])]
        if stores:
            config.evaluation.sets = evaluation.sets_of_stores(config, stores)
        if _PROTOCOL.value:
            config.evaluation.sets = evaluation.sets_with(config, _PROTOCOL.value)
        axis = None if several else ensembles.read(workdir)
        if axis is not None:
            print(evaluate_ensemble.evaluated(config, axis, workdir, _STEP.value))
            return
        if several:
            steps = _STEPS.value or "all"
            rows = by_step.evaluate_steps(
                config, workdir, steps=steps, watch=_WATCH.value
            )
            print(by_step.render(rows))
            print(f"\nAll figures: {workdir / 'results' / by_step.FILE}")
            return
        found = evaluate.evaluate(config, workdir, step=_STEP.value)
    for name, results in found.items():
        subjects = results_lib.read_subjects(workdir, name, results["run"]["name"])
        print(f"\n{name}\n{report.summary(results, subjects)}")


def _evaluate_maps(folder: pathlib.Path, workdir: pathlib.Path) -> dict[str, Any]:
    """Scores a folder of maps on --store, or on what --source is prepared to."""
    from uad_jax import evaluate_maps, evaluation, prepare
    from uad_jax.data import examine

    store = pathlib.Path(_STORE.value or workdir / "store")
    if _SOURCE.value:
        prepare.prepare(_SOURCE.value, store, _RECIPE.value, **_reading())
    elif not _STORE.value:
        sys.exit("Missing: --source=... (scans and truth), or --store=... (prepared).")
    reading = examine.Reading(
        ignore_affine=_IGNORE_AFFINE.value,
        nan_to_zero=_NAN.value == "zero",
        assume_orientation=_ASSUME_ORIENTATION.value,
    )
    chosen = evaluation.EvaluationSet()
    name = evaluation.DEFAULT_SET
    if _PROTOCOL.value and _PROTOCOL.value is not chosen.protocol:
        chosen.protocol = _PROTOCOL.value
        name = f"{name}_{chosen.protocol.value}"
    return evaluate_maps.evaluate_maps(
        folder,
        store,
        workdir,
        modality=_MODALITY.value,
        set_name=name,
        evaluation_set=chosen,
        reading=reading,
    )


def _compare(names: list[str]) -> int:
    from uad_jax import compare, entries

    if len(names) < 2:
        sys.exit("Give two or more: python run.py compare RUN RUN_or_MAPS ...")
    output = pathlib.Path(_OUTPUT.value or _WORKDIR.value or "runs/compare")
    given = [pathlib.Path(name).resolve() for name in names]
    if len(set(given)) < len(given):
        sys.exit("One folder is given twice: name every run or folder of maps once.")
    short = entries.short_names(given)
    folders = [
        _evaluated(folder, output / name.replace("/", "_"))
        for folder, name in zip(given, short, strict=True)
    ]
    result = compare.compare(folders, output, set_name=_SET.value)
    print(f"{compare.render(result)}\n\nPage: {output / 'compare.html'}")
    return 0


def _evaluated(folder: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path:
    """The folder of results: evaluates what has none.

    Args:
      folder: The run, the ensemble, the results of maps, or maps.
      workdir: Where results of maps go.
    """
    from uad_jax import ensembles, evaluate, evaluate_ensemble

    if any(folder.glob("results/*.json")):
        return folder
    if (folder / "config.json").is_file():
        config, axis = _opening.stored_experiment(folder), ensembles.read(folder)
        if axis is None:
            evaluate.evaluate(config, folder)
        else:
            evaluate_ensemble.evaluate_ensemble(config, axis, folder)
        return folder
    if any(folder.rglob("*.nii*")):
        _evaluate_maps(folder, workdir)
        return workdir
    sys.exit(
        f"{folder} is neither a run nor a folder of NIfTI maps. Give the --workdir of "
        "run.py train, or maps with --source=MANIFEST."
    )


def _predict() -> None:
    from uad_jax import evaluation, predict, prediction

    _need("workdir", "input", "output")
    config = _run_config()
    if _PROTOCOL.value:
        config.evaluation.sets = evaluation.sets_with(config, _PROTOCOL.value)
    found = predict.predict(
        config,
        pathlib.Path(_WORKDIR.value),
        _INPUT.value,
        pathlib.Path(_OUTPUT.value),
        step=_STEP.value,
        modality=_MODALITY.value,
        force=_FORCE.value,
        nan_to_zero=_NAN.value == "zero",
        assume_orientation=_ASSUME_ORIENTATION.value,
        ignore_affine=_IGNORE_AFFINE.value,
    )
    print(prediction.render(found, pathlib.Path(_OUTPUT.value)))


def _bench() -> None:
    from uad_jax import bench

    _need("config")
    both = _BENCH_TRAIN.value == _BENCH_SCORE.value
    bench.bench(
        _CONFIG.value,
        train=both or _BENCH_TRAIN.value,
        score=both or _BENCH_SCORE.value,
        batches=_opening.numbers("batch", _BATCH.value, int, "32,64"),
        output=pathlib.Path(_OUTPUT.value) if _OUTPUT.value else None,
        recipe=_RECIPE.value,
    )


def _run_config() -> Any:
    """The config of the run in --workdir, or the one given."""
    if not _CONFIG.value:  # taken from the workdir when not given
        raise ValueError(
            f"{_WORKDIR.value} is not the directory of a run: it has no config.json "
            "that names its config. Give the --workdir that `run.py train` was given."
        )
    return _CONFIG.value


def _rescore() -> None:
    from uad_jax import rescoring

    _need("workdir", "output")
    workdir, output = pathlib.Path(_WORKDIR.value), pathlib.Path(_OUTPUT.value)
    name, texts = _CHOOSE_TV_WEIGHT.name, _CHOOSE_TV_WEIGHT.value
    weights = _opening.numbers(name, texts, float, "0.5,1,2")
    rescoring.rescore(_run_config(), workdir, output, tv_weights=weights)
    print(f"Next: python run.py evaluate --workdir={output}")


def _env() -> None:
    from uad_jax import environment

    print(environment.render())


_MODES = {
    "demo": _demo,
    "prepare": _prepare,
    "check-data": _check_data,
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "import": _import,
    "rescore": _rescore,
    "bench": _bench,
    "env": _env,
}


_WITH_RUN = ("evaluate", "predict", "rescore")  # take the config from --workdir
_WITH_PROTOCOL = ("evaluate", "predict")


def _need(*names: str) -> None:
    missing = [name for name in names if not flags.FLAGS[name].value]
    if missing:
        flags_missing = " ".join(f"--{name}=..." for name in missing)
        sys.exit(f"Missing: {flags_missing} (`python run.py --help` explains it.)")


def _parse_flags(argv: list[str]) -> list[str]:
    logging.use_absl_handler()  # opening a run has something to say already
    runtime.log_ours_only()
    return _opening.parse_flags(argv, with_run=_WITH_RUN)


def main(argv: list[str]) -> int | None:
    """Runs one mode; the exit status is 0 when it succeeded."""
    if len(argv) < 2:
        raise app.UsageError(f"Give one mode: {', '.join(_MODES)}, compare.")
    modes = (*_MODES, "compare")
    if argv[1] not in modes:
        hint = _opening.hint(argv[1], modes)
        sys.exit(f"There is no mode {argv[1]!r}.{hint} Modes: {', '.join(modes)}.")
    if len(argv) > 2 and argv[1] != "compare":
        sys.exit(f"Not understood: {' '.join(argv[2:])}. Write flags as --name=value.")
    if _PROTOCOL.value and argv[1] not in _WITH_PROTOCOL:
        sys.exit(
            f"--protocol belongs to {' and '.join(_WITH_PROTOCOL)}. Evaluate with it "
            f"what you compare, then: compare --set=test_{_PROTOCOL.value.value}."
        )
    if _CHOOSE_TV_WEIGHT.value and argv[1] != "rescore":
        sys.exit("--choose_tv_weight belongs to rescore, which makes a run with it.")
    runtime.setup()
    try:
        return _compare(argv[2:]) if argv[1] == "compare" else _MODES[argv[1]]()
    except KeyboardInterrupt:
        if _DEBUG.value:
            raise
        print("\nStopped. The same command starts again.", file=sys.stderr)
        return 130  # as a shell has it
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        if _DEBUG.value:
            raise
        sys.exit(f"{error}\n(--debug shows where in the code.)")


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
