"""What the members of an ensemble differ in, and the directory that holds them."""

import copy
import dataclasses
import difflib
import math
import pathlib
import typing
from collections.abc import Sequence
from typing import Any

from uad_jax import config as config_lib
from uad_jax import rescoring
from uad_jax import workdir as workdir_lib
from uad_jax.config import ExperimentConfig
from uad_jax.data import sources, splits

FORMS = (
    "seed:5 (five seeds from config.seed on), seed:0,3,7, fold:5, fold:0,2, or a float "
    "field of the method with its values, method.kl_weight:0.1,1,10"
)
_AXES = {"seed": "seed", "fold": "data.fold"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """The one thing in which the members of an ensemble differ.

    Attributes:
      field: Dotted field of the experiment: "seed", "data.fold" or "method.NAME".
      values: Its value in each member: whole numbers, or floats of a method's field.
    """

    field: str
    values: tuple[int, ...] | tuple[float, ...]

    @property
    def name(self) -> str:
        """The last part of the field, "kl_weight"."""
        return self.field.rpartition(".")[2]

    @property
    def members(self) -> list[str]:
        """What the members are called, "seed=0"."""
        return [f"{self.name}={value!r}" for value in self.values]

    @property
    def folders(self) -> list[str]:
        """The names of their directories, "seed-0"."""
        return [member.replace("=", "-") for member in self.members]

    @property
    def of_method(self) -> bool:
        """Whether it is a float field of the method."""
        return self.field.startswith("method.")


def parse(text: str, config: ExperimentConfig) -> Axis:
    """Reads what --ensemble says.

    Args:
      text: AXIS:COUNT or AXIS:VALUE,VALUE,...
      config: The experiment that the members have in common.

    Raises:
      ValueError: If there is no such axis, or it has not two different values.
    """
    name, _, given = text.partition(":")
    if any(sign in name for sign in ";+&") or ":" in given:
        raise ValueError(
            f"--ensemble={text}: members differ in one thing, and this names several. "
            f"Use one of: {FORMS}."
        )
    name, words = name.strip(), [word.strip() for word in given.split(",")]
    field = _AXES.get(name, name)
    if field in _AXES.values():
        values: tuple[Any, ...] = _whole_numbers(text, words)
        if len(words) == 1:
            if values[0] < 2:
                raise ValueError(f"--ensemble={text}: use 2 or more members.")
            first = config.seed if field == "seed" else 0
            values = tuple(range(first, first + values[0]))
    else:
        _check_float_field(text, field, config)
        values = _floats(text, words)
    if len(set(values)) < max(2, len(values)):
        raise ValueError(
            f"--ensemble={text}: {len(values)} values, {len(set(values))} of them "
            f"different. Give two or more different ones: {FORMS}."
        )
    return Axis(field=field, values=values)


def configs(config: ExperimentConfig, axis: Axis) -> list[ExperimentConfig]:
    """The experiments of the members, each complete in itself.

    Raises:
      ValueError: If one of them cannot work; all are named.
    """
    found, problems = [], []
    for member, value in zip(axis.members, axis.values, strict=True):
        own = with_field(copy.deepcopy(config), axis.field, value)
        try:
            config_lib.validate(own)
        except ValueError as error:
            problems.append(f"{member}: {error}")
        found.append(own)
    if problems:
        raise ValueError("\n".join(problems))
    return found


def check_folds(config: ExperimentConfig, axis: Axis) -> None:
    """Makes sure that the store has the folds.

    Raises:
      ValueError: If it has not.
    """
    if axis.field != "data.fold":
        return
    store = sources.Store.open(pathlib.Path(config.data.store))
    known = splits.folds(store.volumes)
    unknown = [fold for fold in axis.values if fold not in known]
    if unknown:
        raise ValueError(
            f"{config.data.store}: no fold {', '.join(map(str, unknown))}; the split "
            f"has {len(known)}: {', '.join(map(str, known))}. Use "
            f"{_use_folds(known)}."
        )


def _use_folds(known: Sequence[int]) -> str:
    if len(known) < 2:
        return "--ensemble=seed:5, or give the manifest a `fold` column"
    return f"--ensemble=fold:{','.join(map(str, known))}"


def with_field(config: Any, path: str, value: Any) -> Any:
    """Copies a config with one dotted field changed, which may be a traced scalar."""
    head, _, rest = path.partition(".")
    if rest:
        value = with_field(getattr(config, head), rest, value)
    changed = copy.copy(config)
    setattr(changed, head, value)
    return changed


def _whole_numbers(text: str, words: Sequence[str]) -> tuple[int, ...]:
    if not all(word.isdecimal() for word in words):
        raise ValueError(
            f"--ensemble={text}: expected a count or whole numbers. Use one of: "
            f"{FORMS}."
        )
    return tuple(int(word) for word in words)


def _floats(text: str, words: Sequence[str]) -> tuple[float, ...]:
    try:
        values = tuple(float(word) for word in words)
    except ValueError:
        values = (math.nan,)
    if not all(map(math.isfinite, values)):
        raise ValueError(
            f"--ensemble={text}: expected finite numbers. Use one of: {FORMS}."
        )
    return values


def _check_float_field(text: str, field: str, config: ExperimentConfig) -> None:
    every = float_fields(config.method, "method")
    known = [one for one in every if not one.startswith(rescoring.SCORE_FIELDS)]
    if field in known:
        return
    if field in every:
        raise ValueError(
            f"--ensemble={text}: training does not depend on {field}, and all members "
            "would be one model. Train one run, and score it again with each value: "
            f"run.py rescore --workdir=DIR --output=DIR --config.{field}=VALUE."
        )
    target, name, found = config, "", ""
    for name in field.split("."):
        if not dataclasses.is_dataclass(target) or not hasattr(target, name):
            break
        target = getattr(target, name)
    else:
        found = f"{field} is {target!r}, and not a float field of the method. "
    near = difflib.get_close_matches(field, known, n=1, cutoff=0.5)
    near += [one for one in known if one.endswith(f".{field}")]
    hint = f"Did you mean {near[-1]}? " if near else ""
    raise ValueError(
        f"--ensemble={text}: {found or f'there is no axis {field!r}. '}{hint}Use one "
        f"of: {FORMS}. The float fields of this method: {', '.join(known)}."
    )


def float_fields(config: Any, prefix: str) -> list[str]:
    """Dotted names of the fields that are declared as float, also of inner configs."""
    kinds = typing.get_type_hints(type(config))
    found = []
    for field in dataclasses.fields(config):
        name, value = f"{prefix}.{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found += float_fields(value, name)
        elif kinds[field.name] is float:
            found.append(name)
    return found


def write(workdir: pathlib.Path, axis: Axis) -> None:
    """Writes down what the directory holds."""
    note = {
        "field": axis.field,
        "values": list(axis.values),
        "members": axis.folders,
    }
    workdir_lib.write_json(workdir / workdir_lib.ENSEMBLE, note)


def read(workdir: pathlib.Path) -> Axis | None:
    """What the members in a directory differ in; None if it holds no ensemble.

    Raises:
      workdir.WorkdirError: If the note is damaged.
    """
    path = workdir / workdir_lib.ENSEMBLE
    if not path.is_file():
        return None
    note = workdir_lib.read_json(path)
    try:
        return Axis(field=note["field"], values=tuple(note["values"]))
    except (KeyError, TypeError) as error:
        raise workdir_lib.WorkdirError(
            f"{path} is damaged: {error!r}. Put a sound copy in its place."
        ) from error


def check(workdir: pathlib.Path, axis: Axis) -> None:
    """Makes sure that a directory is free, or holds this ensemble.

    An ensemble begins with its first checkpoint; until then another may take its place.

    Raises:
      workdir.WorkdirError: If it holds a single run, or another ensemble.
    """
    known = read(workdir)
    if known is None and (workdir / workdir_lib.CONFIG).is_file():
        raise workdir_lib.WorkdirError(
            f"{workdir} holds a single run. Give the ensemble a --workdir of its own, "
            "or leave out --ensemble."
        )
    if known is None or known == axis:
        return
    if any(workdir_lib.has_begun(workdir / folder) for folder in known.folders):
        raise workdir_lib.WorkdirError(
            f"{workdir} was begun with the members {', '.join(known.members)}, and "
            f"not with {', '.join(axis.members)}. Use those, or another --workdir."
        )
