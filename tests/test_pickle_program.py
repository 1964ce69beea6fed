import collections
import io
import os
import pathlib
import pickle
from typing import Any

import numpy as np
import pytest

from tests import foreign_states
from tests.foreign_states import pickled
from uad_jax import pickle_program
from uad_jax.pickle_program import Call, Global

PLAIN = {
    "none": None,
    "flags": [True, False],
    "numbers": (1, -1, 255, 256, 70_000, -(2**40), 2**80, 0.5, -1e300),
    "text": ["", "a", "ä\n", "x" * 300],
    "bytes": (b"", b"\x00\xff", b"y" * 300),
    "nested": {"a": {1: [(), (1,), (1, 2), (1, 2, 3)]}, 2: {}},
    1.5: [],
}


class Evil:
    """An object whose pickle makes a directory when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def _follow(data: bytes) -> Any:
    return pickle_program.interpret(io.BytesIO(data))[0]


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_those_of_pickle(protocol: int) -> None:
    shared = [1, 2]
    value = {**PLAIN, "twice": [shared, shared]}
    if protocol < 3:
        del value["bytes"]  # written as calls of a codec
    found = _follow(pickle.dumps(value, protocol))
    assert found == value
    assert found["twice"][0] is found["twice"][1]
    ordered = _follow(pickle.dumps(collections.OrderedDict(a=1, b=[2]), protocol))
    assert ordered == {"a": 1, "b": [2]}
    assert type(ordered) is dict


@pytest.mark.parametrize("protocol", range(6))
def test_named_functions_are_never_called(
    tmp_path: pathlib.Path, protocol: int
) -> None:
    path = str(tmp_path / "made")
    data = pickle.dumps({"x": [Evil(path)], "y": 1}, protocol)
    found = _follow(data)
    assert not os.path.exists(path)
    call = found["x"][0]
    assert isinstance(call, Call)
    assert call.function == Global(f"{os.mkdir.__module__}.mkdir")
    assert call.args == (path,)
    assert found["y"] == 1
    pickle.loads(data)
    assert os.path.exists(path), "the pickle is not malicious, so nothing was shown"


@pytest.mark.parametrize(
    "code",
    [
        b"(cos\nmkdir\nX\x01\x00\x00\x00zo.",  # OBJ
        b"cos\nmkdir\nX\x01\x00\x00\x00z\x85\x81.",  # NEWOBJ
        b"cos\nmkdir\nX\x01\x00\x00\x00z\x85}\x92.",  # NEWOBJ_EX
        b"\x8c\x02os\x8c\x05mkdir\x93X\x01\x00\x00\x00z\x85R.",  # STACK_GLOBAL
        b"cos\nmkdir\nX\x01\x00\x00\x00z\x85R}X\x01\x00\x00\x00aK\x01sb.",  # BUILD
    ],
)
def test_every_instruction_that_calls_gives_a_record(code: bytes) -> None:
    call = _follow(code)
    assert isinstance(call, Call)
    assert call.function == Global("os.mkdir")
    assert call.args == ("z",)
    assert not os.path.exists("z")


def test_records_take_no_attributes_and_no_items() -> None:
    # A dictionary subclass gets items; a function of ours would get attributes.
    code = pickled(foreign_states.Call(foreign_states.Global("a.B"), ()))[:-1]
    call = _follow(code + b"X\x01\x00\x00\x00kK\x01sK\x02a.")
    assert isinstance(call, Call)
    assert vars(call) == {"function": Global("a.B"), "args": ()}


def test_keys_that_are_no_plain_values_are_left_out() -> None:
    assert _follow(pickle.dumps({(1, (2,)): 3, "a": 4})) == {"a": 4}


def test_references_are_listed() -> None:
    first, second = (foreign_states.Reference(("storage", i)) for i in (1, 2))
    content, found = pickle_program.interpret(io.BytesIO(pickled([first, second])))
    assert [item.reference for item in found] == [("storage", 1), ("storage", 2)]
    assert content == found


def test_the_stream_is_left_behind_the_pickle() -> None:
    stream = io.BytesIO(pickle.dumps(1) + pickle.dumps([2]) + b"rest")
    assert pickle_program.interpret(stream)[0] == 1
    assert pickle_program.interpret(stream)[0] == [2]
    assert stream.read() == b"rest"


# Python warns of the odd text that a flipped byte makes.
@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_damage_is_a_value_error_and_never_anything_else(protocol: int) -> None:
    data = pickle.dumps({"a": [1, (2.5, "b")], "c": Evil("z")}, protocol)
    rng = np.random.default_rng(0)
    refused = 0
    for length in range(len(data)):
        with pytest.raises(ValueError, match="damaged"):
            _follow(data[:length])
    for _ in range(500):
        broken = bytearray(data)
        broken[rng.integers(len(data))] = rng.integers(256)
        try:
            _follow(bytes(broken))
        except ValueError:
            refused += 1
    assert refused > 50
    assert not os.path.exists("z")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"\x82\x01.", "no weights need the instruction EXT1"),
        (b"\x97.", "NEXT_BUFFER"),
        (b"K\x01(\x86.", "more from its stack"),
        (b"K\x01(\x85.", "more from its stack"),
        (b"ccollections\nOrderedDict\n](K\x01e\x85R.", "damaged"),
        (b"K\x01K\x02\x93.", "other than text"),
        (b".", "damaged"),
        (b"h\x05.", "damaged"),
        (b"<html>", "damaged"),
    ],
)
def test_what_no_weights_need_is_refused(code: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _follow(code)


def test_depth_does_not_exhaust_the_stack() -> None:
    depth = 100_000
    assert isinstance(_follow(b")" + depth * b"\x85" + b"."), tuple)
    assert _follow(b"}" + b")" + depth * b"\x85" + b"K\x01s.") == {}
    call = _follow(b"cos\nmkdir\n" + depth * b")R" + b".")
    assert "something computed" in pickle_program.describe(call)
