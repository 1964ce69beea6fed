"""How run.py finds a config: in a file, or in the workdir of a run."""

import difflib
import json
import pathlib
import runpy
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from absl import app, flags
from ml_collections import config_flags
from ml_collections.config_flags import config_path

_CONFIGS = pathlib.Path(__file__).resolve().parent
_ROOT = _CONFIGS.parent


def hint(word: str, words: Iterable[str]) -> str:
    """Suggests the nearest known word, if one is near."""
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


def numbers(name: str, texts: Sequence[str], kind: type, example: str) -> list[Any]:
    """The numbers of a list flag, or ends with one sentence that says how to write it.

    Args:
      name: Of the flag.
      texts: Its values.
      kind: int or float.
      example: What to write instead.
    """
    try:
        return [kind(text) for text in texts]
    except ValueError:
        sys.exit(f"--{name}={','.join(texts)}: use numbers, such as {example}.")


def source_of(chosen: str) -> str:
    """What a run stores as its config: a file of this repository by its place in it.

    Args:
      chosen: FILE or FILE:ARGUMENT, as --config was given.

    Returns:
      The same, but "configs/NAME.py" for every way to name a file in configs/, so that
      the run can be opened from any directory and with any copy of the repository.
    """
    name, colon, argument = chosen.partition(":")
    path = pathlib.Path(name).resolve()
    if path.is_relative_to(_CONFIGS):
        name = path.relative_to(_ROOT).as_posix()
    return f"{name}{colon}{argument}"


def _read_config(workdir: pathlib.Path) -> dict[str, Any] | None:
    """The config that a run stored; None where there is none that names its file."""
    path = workdir / "config.json"
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        sys.exit(f"{path} is damaged: {error}. Put a sound copy in its place.")
    return stored if stored.get("source") else None


def stored_experiment(workdir: pathlib.Path) -> Any:
    """Opens the experiment that a run was trained with."""
    from uad_jax import config as config_lib

    stored = _read_config(workdir)
    if stored is None:
        sys.exit(f"{workdir}: its config.json does not name the --config it came from.")
    config = _experiment(_stored_source(workdir, stored))
    try:
        config_lib.fill(config, stored)
    except ValueError as error:
        sys.exit(f"{workdir}: {error}")
    return config


def _stored_source(workdir: pathlib.Path, stored: dict[str, Any]) -> str:
    """Where the config of a run is now: --config as trained, or the run's own copy.

    The copy is code of whoever trained the run, and is executed as any --config is.
    """
    from uad_jax import train

    name, colon, argument = stored["source"].partition(":")
    copy = workdir / train.CONFIG_FILE
    for path in (pathlib.Path(name), _ROOT / name, copy):
        if path.is_file():
            return f"{path}{colon}{argument}"
    sys.exit(
        f"{workdir} was trained with {name}, which is not here; put it back or pass "
        "--config=..."
    )


def _experiment(chosen: str) -> Any:
    """Builds what --config names, or ends with one sentence that says why not."""
    name, colon, argument = chosen.partition(":")
    if not pathlib.Path(name).is_file():
        files = sorted(str(path) for path in pathlib.Path("configs").glob("[a-z]*.py"))
        known = f" Known: {', '.join(files)}." if files else ""
        sys.exit(f"--config: there is no file {name}.{hint(name, files)}{known}")
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


def parse_flags(argv: list[str], with_run: Sequence[str]) -> list[str]:
    """Parses flags; some modes take the config from the run in --workdir.

    Args:
      argv: The command line.
      with_run: These modes.

    Returns:
      What is not a flag.
    """
    stored = None
    workdir = pathlib.Path(_given(argv, "workdir"))
    if len(argv) > 1 and argv[1] in with_run and not _given(argv, "config"):
        stored = _read_config(workdir)
    if stored is not None:
        argv = [*argv[:2], f"--config={_stored_source(workdir, stored)}", *argv[2:]]
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
            sys.exit(f"{workdir}: {error}")
        for path, value in overrides.items():
            config_path.set_value(path, flag.value, value)
    return rest
