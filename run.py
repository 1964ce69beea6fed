"""Command line of uad_jax. For research only, not a medical device.

    python run.py demo        [--quick]                  all of it, on synthetic brains
    python run.py check-data  --source=DIR               find files that cannot be used
    python run.py prepare     --source=DIR --store=DIR   make slices of scans, once
    python run.py train       --config=FILE --workdir=DIR --config.data.store=DIR
    python run.py evaluate    --workdir=DIR              metrics and report
    python run.py env                                    versions and devices

`python run.py --help` lists the flags.
"""

import sys

if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(
        "uad_jax needs Python 3.11, 3.12 or 3.13, and this is Python %d.%d: make the "
        "virtual environment with one of those." % sys.version_info[:2]
    )

import difflib
import functools
import json
import pathlib
import runpy
from collections.abc import Iterable
from typing import Any

from absl import app, flags
from ml_collections import config_flags
from ml_collections.config_flags import config_path

from uad_jax import runtime

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
_RECIPE = flags.DEFINE_string("recipe", "grid2mm", "Preprocessing recipe.")
_MODALITY = flags.DEFINE_string(
    "modality", "", "Modalities to take; of a plain folder also what its files are."
)
_WORKERS = flags.DEFINE_integer("workers", None, "Processes; default: all cores.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint step; default: the best.")
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
    from uad_jax import distributed, evaluate, train

    _need("config", "workdir")
    if _DISTRIBUTED.value:
        distributed.initialize()
    config, workdir = _CONFIG.value, pathlib.Path(_WORKDIR.value)
    if not config.data.store:
        raise ValueError(
            "There are no data to train on: give --config.data.store=DIR, where DIR is "
            "the --store of `run.py prepare`."
        )
    config.source = config_flags.get_config_filename(flags.FLAGS["config"])
    result = train.train(
        config,
        workdir,
        accept_data_change=_ACCEPT_DATA_CHANGE.value,
        evaluate=functools.partial(evaluate.figures_of_step, config, workdir),
    )
    if result.stopped == "preempted":
        return train.EXIT_PREEMPTED
    if evaluate.calibrate(config, workdir):
        print(f"Trained. Next: python run.py evaluate --workdir={workdir}")
    return 0


def _evaluate() -> None:
    from uad_jax import evaluate, evaluation, report

    _need("workdir")
    if not _CONFIG.value:  # taken from the workdir when not given
        raise ValueError(
            f"{_WORKDIR.value} is not the directory of a run: it has no config.json "
            "that names its config. Give the --workdir that `run.py train` was given."
        )
    config = _CONFIG.value
    if _STORE.value:
        config.evaluation.sets = evaluation.set_of_store(_STORE.value)
    workdir = pathlib.Path(_WORKDIR.value)
    found = evaluate.evaluate(config, workdir, step=_STEP.value)
    for name, results in found.items():
        print(f"\n{name}\n{report.summary(results)}")


def _env() -> None:
    from uad_jax import environment

    print(environment.render())


_MODES = {
    "demo": _demo,
    "prepare": _prepare,
    "check-data": _check_data,
    "train": _train,
    "evaluate": _evaluate,
    "env": _env,
}


def _need(*names: str) -> None:
    missing = [name for name in names if not flags.FLAGS[name].value]
    if missing:
        flags_missing = " ".join(f"--{name}=..." for name in missing)
        sys.exit(f"Missing: {flags_missing} (`python run.py --help` explains it.)")


def _hint(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(words), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _given(argv: list[str], name: str) -> str:
    """The last value of a flag in arguments that are not parsed yet, or ""."""
    value = ""
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        flag, equals, text = arg.partition("=")
        if flag in (f"--{name}", f"-{name}"):
            value = text if equals else following
    return value


def _stored_config(argv: list[str]) -> dict[str, Any] | None:
    """The config stored in the --workdir, unless a --config is given."""
    path = pathlib.Path(_given(argv, "workdir")) / "config.json"
    if _given(argv, "config") or not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        sys.exit(f"{path} is damaged: {error}. Put a sound copy in its place.")
    return stored if stored.get("source") else None


def _experiment(chosen: str) -> Any:
    """Builds what --config names, or ends with one sentence that says why not."""
    name, colon, argument = chosen.partition(":")
    if not pathlib.Path(name).is_file():
        files = sorted(str(path) for path in pathlib.Path("configs").glob("[a-z]*.py"))
        known = f" Known: {', '.join(files)}." if files else ""
        sys.exit(f"--config: there is no file {name}.{_hint(name, files)}{known}")
    try:
        return runpy.run_path(name)["get_config"](*([argument] if colon else []))
    except ValueError as error:
        sys.exit(f"--config={chosen}: {error}")


def _unknown_fields(argv: list[str], config: Any) -> str:
    """Names overrides of fields that the config does not have, and the nearest ones."""
    from configs import _parts

    known = set(_parts.field_paths(config))
    keys = [arg[2:].partition("=")[0] for arg in argv if arg.startswith("--config.")]
    unknown = [key for key in keys if key.removeprefix("config.") not in known]
    return "\n".join(_parts.nearest_field_error(config, key) for key in unknown)


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses flags; `evaluate` takes the config from the run's workdir."""
    stored = _stored_config(argv) if argv[1:2] == ["evaluate"] else None
    if stored is not None:
        argv = [*argv[:2], f"--config={stored['source']}", *argv[2:]]
        sys.argv = argv  # config_flags looks for overrides there
    chosen = _given(argv, "config")
    config = _experiment(chosen) if chosen else None
    try:
        rest = app.parse_flags_with_usage(argv)
    except (KeyError, AttributeError):
        message = _unknown_fields(argv, config) if config else ""
        if not message:
            raise
        sys.exit(message)
    if stored is not None:
        from uad_jax import config as config_lib

        flag = flags.FLAGS["config"]
        overrides = dict(config_flags.get_override_values(flag))
        try:
            config_lib.fill(flag.value, stored)
        except ValueError as error:
            sys.exit(f"{_given(argv, 'workdir')}: {error}")
        for path, value in overrides.items():
            config_path.set_value(path, flag.value, value)
    return rest


def main(argv: list[str]) -> int | None:
    """Runs one mode; the exit status is 0 when it succeeded."""
    if len(argv) < 2:
        raise app.UsageError(f"Give one mode: {', '.join(_MODES)}.")
    if argv[1] not in _MODES:
        hint = _hint(argv[1], _MODES)
        sys.exit(f"There is no mode {argv[1]!r}.{hint} Modes: {', '.join(_MODES)}.")
    if len(argv) > 2:
        sys.exit(f"Not understood: {' '.join(argv[2:])}. Write flags as --name=value.")
    runtime.log_ours_only()
    runtime.setup()
    try:
        return _MODES[argv[1]]()
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
