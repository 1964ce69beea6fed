"""Command line of uad_jax: flags and dispatch only.

    python run.py demo | prepare | check-data | train | evaluate | env  [--flags]

`python run.py --help` lists the flags. For research only, not a medical device.
"""

import sys

if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(
        "uad_jax needs Python 3.11, 3.12 or 3.13, and this is Python %d.%d: make the "
        "virtual environment with one of those." % sys.version_info[:2]
    )

import json
import pathlib
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
_STORE = flags.DEFINE_string("store", "", "Directory of prepared slices.")
_RECIPE = flags.DEFINE_string("recipe", "grid2mm", "Preprocessing recipe.")
_MODALITY = flags.DEFINE_string("modality", "", "Modality of a plain folder.")
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


def _demo() -> None:
    from configs import demo as demo_config
    from uad_jax import demo

    word = "quick" if _QUICK.value else ""
    workdir = _WORKDIR.value or ("runs/demo-quick" if _QUICK.value else "runs/demo")
    config = demo_config.get_config(word)
    config.source = f"configs/demo.py:{word}"
    demo.demo(config, pathlib.Path(workdir), quick=_QUICK.value)


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
    config.source = config_flags.get_config_filename(flags.FLAGS["config"])
    result = train.train(
        config,
        workdir,
        accept_data_change=_ACCEPT_DATA_CHANGE.value,
        evaluate=lambda step: evaluate.evaluate(config, workdir, step=step),
    )
    if result.stopped == "preempted":
        return train.EXIT_PREEMPTED
    evaluate.calibrate(config, workdir)
    return 0


def _evaluate() -> None:
    from uad_jax import evaluate

    _need("workdir")
    _need("config")  # filled from the workdir when not given
    evaluate.evaluate(_CONFIG.value, pathlib.Path(_WORKDIR.value), step=_STEP.value)


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
        raise app.UsageError("Missing: " + " ".join(f"--{n}=..." for n in missing))


def _stored_config(argv: list[str]) -> dict[str, Any] | None:
    """The config stored in the --workdir, unless a --config is given."""
    if any(arg.startswith(("--config=", "-config=")) for arg in argv):
        return None
    for arg in argv:
        name, _, value = arg.partition("=")
        path = pathlib.Path(value) / "config.json"
        if name.lstrip("-") == "workdir" and path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            return stored if stored.get("source") else None
    return None


def _unknown_fields(argv: list[str]) -> str:
    """Names overrides of fields that the config does not have, and the nearest ones."""
    from configs import _parts

    chosen = [arg.partition("=")[2] for arg in argv if arg.startswith("--config=")]
    config = config_flags.ConfigFileFlagParser("config").parse(chosen[-1])
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
    try:
        rest = app.parse_flags_with_usage(argv)
    except (KeyError, AttributeError):
        message = _unknown_fields(argv)
        if not message:
            raise
        sys.exit(message)
    if stored is not None:
        from uad_jax import config as config_lib

        flag = flags.FLAGS["config"]
        overrides = dict(config_flags.get_override_values(flag))
        config_lib.fill(flag.value, stored)
        for path, value in overrides.items():
            config_path.set_value(path, flag.value, value)
    return rest


def main(argv: list[str]) -> int | None:
    """Runs one mode; the exit status is 0 when it succeeded."""
    if len(argv) != 2 or argv[1] not in _MODES:
        raise app.UsageError(f"Give one mode: {', '.join(_MODES)}.")
    runtime.log_ours_only()
    runtime.setup()
    try:
        return _MODES[argv[1]]()
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        if _DEBUG.value:
            raise
        sys.exit(f"{type(error).__name__}: {error}\n(--debug shows where.)")


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
