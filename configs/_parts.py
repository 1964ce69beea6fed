"""The argument parser and the values that several experiments share."""

import dataclasses
import difflib
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Arguments(NamedTuple):
    """The parsed text after the colon of `--config=configs/NAME.py:TEXT`."""

    words: frozenset[str]
    values: dict[str, Any]


def parse(
    arg: str,
    words: Sequence[str] = (),
    keys: Mapping[str, Callable[[str], Any]] | None = None,
) -> Arguments:
    """Parses comma-separated `word` and `key=value` items, "variant=vae,cpu".

    Args:
      arg: The text.
      words: Words that may occur.
      keys: Name -> conversion from text, such as `int` or an enum class.

    Returns:
      The words and the converted values that were given.

    Raises:
      ValueError: Lists every unknown item with the nearest known one, and every value
        that cannot be converted.
    """
    keys = keys or {}
    known = [*words, *(f"{key}=" for key in keys)]
    found, values, problems = set(), {}, []
    for item in filter(None, (part.strip() for part in arg.split(","))):
        key, equals, text = item.partition("=")
        if equals and key in keys:
            try:
                values[key] = keys[key](text)
            except ValueError as error:
                problems.append(f"{item!r}: {_allowed(keys[key]) or error}.")
        elif not equals and item in words:
            found.add(item)
        else:
            near = difflib.get_close_matches(item, known, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            problems.append(f"{item!r} is unknown.{hint} Known: {', '.join(known)}.")
    if problems:
        raise ValueError("Config argument: " + " ".join(problems))
    return Arguments(frozenset(found), values)


def _allowed(convert: Callable[[str], Any]) -> str:
    if not (isinstance(convert, type) and issubclass(convert, enum.Enum)):
        return ""
    return "expected one of " + ", ".join(str(member.value) for member in convert)


def nearest_field_error(config: Any, key: str) -> str:
    """Explains an override of a field that does not exist.

    Args:
      config: The experiment (nested dataclasses).
      key: What was asked for, "config.lr" or "lr".

    Returns:
      One or two sentences that name the nearest field.
    """
    prefix = "config."
    wanted = key.removeprefix("--").removeprefix(prefix)
    fields = field_paths(config)
    leaf = {path: path.rpartition(".")[2] for path in fields}
    last = wanted.rpartition(".")[2]

    def likeness(path: str) -> float:
        whole = difflib.SequenceMatcher(None, wanted, path).ratio()
        name = difflib.SequenceMatcher(None, last, leaf[path]).ratio()
        initials = "".join(word[0] for word in leaf[path].split("_"))
        short = 0.95 if last.strip("_") == initials else 0.0
        return max(whole, 0.99 * name, short)

    near = max(fields, key=likeness)
    hint = f" Did you mean '{prefix}{near}'?" if likeness(near) > 0.5 else ""
    return f"Unknown field '{prefix}{wanted}'.{hint}"


def field_paths(config: Any) -> list[str]:
    """Dotted paths of all leaf fields of nested dataclasses."""
    paths = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            paths += [f"{field.name}.{path}" for path in field_paths(value)]
        else:
            paths.append(field.name)
    return paths
