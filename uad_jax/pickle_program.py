"""Follows a pickle without running anything that it names.

A pickle is a program that may import and call any function of any module. Here its
instructions build records instead: naming a function gives a `Global`, calling one a
`Call`, and nothing ever imports the one or makes the other. Plain values, lists,
tuples and dictionaries come out as they are.
"""

import dataclasses
import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

_DICTS = ("collections.OrderedDict", "builtins.dict", "__builtin__.dict")


@dataclasses.dataclass(frozen=True)
class Global:
    """The name of a function or class."""

    name: str


@dataclasses.dataclass(eq=False)
class Call:
    """A call that the pickle asks for."""

    function: Any
    args: Any


@dataclasses.dataclass(eq=False)
class Persistent:
    """A reference to something that is stored outside the pickle."""

    reference: Any


def interpret(stream: BinaryIO) -> tuple[Any, list[Persistent]]:
    """Follows one pickle up to its end.

    Dictionaries keep the entries whose keys are plain values; sets become lists;
    attributes that objects are given are dropped.

    Args:
      stream: Left behind the pickle.

    Returns:
      What the pickle describes, and the references in it in their order.

    Raises:
      ValueError: If the pickle is damaged or needs what no weights need.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            machine.step(opcode.name, argument)
        (content,) = machine.stack
    except (IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"the pickle is damaged: {error}") from error
    return content, machine.persistent


def describe(value: Any) -> str:
    """Names a value for a message."""
    if isinstance(value, Global):
        return f"{value.name}, which is never called"
    if isinstance(value, Call):
        inner = value.function
        name = inner.name if isinstance(inner, Global) else "something computed"
        return f"a call of {name}, which is never made"
    return f"a {type(value).__name__}"


class _Machine:
    """The stack, the marks and the memo of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.persistent: list[Persistent] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Follows one instruction."""
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _NEW:
            self.stack.append(_NEW[name]())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self._memo[argument])
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self.stack[-1]
        elif name == "GLOBAL":
            self.stack.append(Global(argument.replace(" ", ".")))
        elif name == "MARK":
            self._marks.append(len(self.stack))
        elif name in _MARKED:
            _MARKED[name](self, self._top(len(self.stack) - self._marks.pop()))
        elif name in _COUNTED:
            count, follow = _COUNTED[name]
            follow(self, self._top(count))
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"no weights need the instruction {name}")

    def refer(self, values: list[Any]) -> None:
        """Notes a reference."""
        self.persistent.append(Persistent(values[0]))
        self.stack.append(self.persistent[-1])

    def add(self, values: list[Any]) -> None:
        """Appends to the list on top; a record takes nothing."""
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)

    def put(self, values: list[Any]) -> None:
        """Sets entries of the dictionary on top; a record takes nothing."""
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update(_entries(values))

    def call(self, values: list[Any]) -> None:
        """Notes a call; a dictionary that would only be made is made."""
        function, args = values[:2]
        name = function.name if isinstance(function, Global) else ""
        if name not in _DICTS or not isinstance(args, tuple):
            self.stack.append(Call(function, args))
            return
        pairs = args[0] if args and isinstance(args[0], list) else []
        self.stack.append(_entries([x for pair in pairs for x in pair]))

    def _top(self, count: int) -> list[Any]:
        start = len(self.stack) - count
        if count < 0 or start < (self._marks[-1] if self._marks else 0):
            raise ValueError("it takes more from its stack than it put there")
        values = self.stack[start:]
        del self.stack[start:]
        return values


def _name(machine: _Machine, values: list[Any]) -> None:
    if not all(isinstance(value, str) for value in values):
        raise ValueError("it names a function by something other than text")
    machine.stack.append(Global(".".join(values)))


def _entries(values: list[Any]) -> dict[Any, Any]:
    """Pairs keys and values; keys that are no plain values are left out."""
    pairs = zip(values[::2], values[1::2], strict=True)
    return {k: v for k, v in pairs if isinstance(k, str | bytes | int | float)}


def _ignore(machine: _Machine, values: list[Any]) -> None:
    del machine, values


def _tuple(machine: _Machine, values: list[Any]) -> None:
    machine.stack.append(tuple(values))


_Follow = Callable[[_Machine, list[Any]], None]
_LITERALS = frozenset(  # instructions that bring a value with them
    opcode.name
    for opcode in pickletools.opcodes
    if opcode.arg is not None
    and not opcode.stack_before
    and opcode.stack_after not in ([], [pickletools.anyobject])
)
_NEW: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_DICT": dict,
}
_MARKED: dict[str, _Follow] = {  # all values since the last mark
    "TUPLE": _tuple,
    "LIST": lambda machine, x: machine.stack.append(x),
    "FROZENSET": lambda machine, x: machine.stack.append(x),
    "DICT": lambda machine, x: machine.stack.append(_entries(x)),
    "APPENDS": _Machine.add,
    "ADDITEMS": _Machine.add,
    "SETITEMS": _Machine.put,
    "OBJ": lambda machine, x: machine.call([x[0], tuple(x[1:])]),
    "POP_MARK": _ignore,
}
_COUNTED: dict[str, tuple[int, _Follow]] = {  # that many values
    "TUPLE1": (1, _tuple),
    "TUPLE2": (2, _tuple),
    "TUPLE3": (3, _tuple),
    "APPEND": (1, _Machine.add),
    "SETITEM": (2, _Machine.put),
    "POP": (1, _ignore),
    "DUP": (1, lambda machine, x: machine.stack.extend(2 * x)),
    "STACK_GLOBAL": (2, _name),
    "REDUCE": (2, _Machine.call),
    "NEWOBJ": (2, _Machine.call),
    "NEWOBJ_EX": (3, _Machine.call),
    "BUILD": (1, _ignore),
    "BINPERSID": (1, _Machine.refer),
}
