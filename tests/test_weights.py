import json
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import foreign_states
from tests.foreign_states import Call, Global, tensor
from uad_jax import weights

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.bias": np.array([0.5, -1.0], np.float16),
    "steps": np.array(7, np.int64),
}
KERNEL = jax.ShapeDtypeStruct((3, 2), jnp.float32)
LIKE = {"dense": {"kernel": KERNEL, "bias": jax.ShapeDtypeStruct((2,), jnp.float32)}}
SOURCES = {
    "dense/kernel": weights.Source("a.weight", np.transpose),
    "dense/bias": weights.Source("a.bias", np.asarray),
}


def _safetensors(
    path: pathlib.Path,
    arrays: dict[str, np.ndarray] = ARRAYS,
    change: Callable[[dict[str, Any]], Any] = lambda header: header,
    tail: bytes = b"",
) -> pathlib.Path:
    kinds = {"float32": "F32", "float16": "F16", "int64": "I64", "bfloat16": "BF16"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, x in arrays.items():
        start, end = end, end + x.nbytes
        header[name] = {
            "dtype": kinds[x.dtype.name],
            "shape": list(x.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(change(header)).encode()
    data = b"".join(x.tobytes() for x in arrays.values())
    file = path / "x.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data + tail)
    return file


def _npz(path: pathlib.Path) -> pathlib.Path:
    np.savez(path / "x.npz", **ARRAYS)
    return path / "x.npz"


def _torch(path: pathlib.Path) -> pathlib.Path:
    foreign_states.save_state(path / "x.pth", ARRAYS)
    return path / "x.pth"


@pytest.mark.parametrize("write", [_safetensors, _npz, _torch])
def test_every_format_gives_the_same_arrays(
    tmp_path: pathlib.Path, write: Callable[[pathlib.Path], pathlib.Path]
) -> None:
    found = weights.read(write(tmp_path))
    assert set(found.arrays) == set(ARRAYS)
    assert found.refused == {}
    for name, expected in ARRAYS.items():
        np.testing.assert_array_equal(found.arrays[name], expected)
        assert found.arrays[name].dtype == expected.dtype
        assert found.arrays[name].shape == expected.shape


def test_safetensors_hold_bfloat16(tmp_path: pathlib.Path) -> None:
    expected = np.array([1.5, -2.0], jnp.bfloat16)
    found = weights.read(_safetensors(tmp_path, {"x": expected})).arrays["x"]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("suffix", [".pkl", ".bin", ".h5", ".npy", ".PTH", ""])
def test_other_formats_are_refused_unopened(
    tmp_path: pathlib.Path, suffix: str
) -> None:
    target = tmp_path / "made"
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(foreign_states.pickled(Call(Global("os.mkdir"), (str(target),))))
    with pytest.raises(weights.WeightsError, match=r"are read from \.safetensors"):
        weights.read(path)
    assert not target.exists()
    pickle.loads(path.read_bytes())
    assert target.exists(), "the file is not malicious, so nothing was shown"


@pytest.mark.parametrize("suffix", weights.SUFFIXES)
def test_a_malicious_file_is_inert_whatever_its_name(
    tmp_path: pathlib.Path, suffix: str
) -> None:
    target = tmp_path / "made"
    evil = Call(Global("os.mkdir"), (str(target),))
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(foreign_states.pickled(evil))
    with pytest.raises(weights.WeightsError):
        weights.read(path)
    foreign_states.save_archive(path, {"state_dict": {"x": evil}, "y": evil}, {})
    if suffix in weights.TORCH:
        with pytest.raises(weights.WeightsError, match="none of its entries"):
            weights.read(path)
    np.savez(tmp_path / "weights.npz", x=np.array([_Evil(str(target))], object))
    with pytest.raises(weights.WeightsError, match="allow_pickle"):
        weights.read(tmp_path / "weights.npz")
    assert not target.exists()


class _Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return pathlib.os.mkdir, (self.path,)


def test_wanted_tensors_must_not_depend_on_calls(tmp_path: pathlib.Path) -> None:
    evil = Call(Global("os.mkdir"), (str(tmp_path / "made"),))
    content = {"a.weight": tensor("0", 6, (2, 3)), "a.bias": evil, "other": evil}
    foreign_states.save_archive(
        tmp_path / "x.ckpt",
        {"state_dict": content, "callbacks": evil},
        {"0": ARRAYS["a.weight"]},
    )
    found = weights.read(tmp_path / "x.ckpt")
    assert set(found.arrays) == {"a.weight"}
    assert set(found.refused) == {"a.bias", "other"}
    kernel = weights.fit(found, {"dense": {"kernel": KERNEL}}, SOURCES)
    np.testing.assert_array_equal(kernel["dense"]["kernel"], ARRAYS["a.weight"].T)
    with pytest.raises(weights.WeightsError, match=r"dense/bias: a\.bias .*os\.mkdir"):
        weights.fit(found, LIKE, SOURCES)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "entry", "expected"),
    [
        ({"x": 1}, "", {1: "x"}),
        ({"state_dict": {"x": 1}, "epoch": None}, "", {1: "x"}),
        ({"state_dict": {"x": 1}, "ema": {"x": 2}}, "", {1: "x"}),
        ({"state_dict": {"x": 1}, "ema": {"x": 2}}, "ema", {2: "x"}),
        ({"loss": 1, "model_state_dict": {"x": 2}}, "", {2: "x"}),
    ],
)
def test_the_model_is_found_in_what_was_saved(
    tmp_path: pathlib.Path, content: dict, entry: str, expected: dict[int, str]
) -> None:
    def place(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: place(inner) for key, inner in value.items()}
        return None if value is None else tensor(str(value), 1, (1,))

    storages = {key: np.full(1, float(key), np.float32) for key in ("1", "2")}
    path = tmp_path / "x.ckpt"
    foreign_states.save_archive(path, place(content), storages)
    found = weights.read(path, entry=entry).arrays
    assert {int(x[0]): name for name, x in found.items()} == expected


def test_the_model_must_be_there(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.ckpt"
    foreign_states.save_archive(path, {"mine": {"x": tensor("0", 1, (1,))}}, {})
    with pytest.raises(
        weights.WeightsError, match=r"\['mine'\].*Choose one with entry"
    ):
        weights.read(path)
    with pytest.raises(weights.WeightsError, match=r"'yours'; .*\['mine'\]"):
        weights.read(path, entry="yours")
    foreign_states.save_archive(path, Call(Global("my.Model"), ()), {})
    with pytest.raises(weights.WeightsError, match=r"call of my\.Model.*state_dict"):
        weights.read(path)
    with pytest.raises(weights.WeightsError, match="only files of PyTorch have any"):
        weights.read(_npz(tmp_path), entry="ema")


def test_missing_files_and_our_checkpoints_are_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(weights.WeightsError, match="nothing there"):
        weights.read(tmp_path / "x.pth")
    with pytest.raises(weights.WeightsError, match=r"a directory.*warm_start"):
        weights.read(tmp_path)


def _change(name: str, **fields: Any) -> Callable[[dict[str, Any]], Any]:
    def change(header: dict[str, Any]) -> dict[str, Any]:
        header[name] = {**header[name], **fields}
        return header

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change("a.bias", data_offsets=[20, 24]), "begins at byte 20 instead of 24"),
        (_change("a.bias", data_offsets=[28, 32]), "begins at byte 28 instead of 24"),
        (_change("a.bias", shape=[3]), "has 4 bytes for"),
        (_change("a.bias", shape=[-2]), "something but numbers"),
        (_change("a.bias", shape=2), "something but numbers"),
        (_change("a.bias", data_offsets=[24]), "values to unpack"),
        (_change("a.bias", dtype="F8_E4M3"), "is F8_E4M3; known types"),
        (_change("a.bias", dtype=[]), "incompletely"),
        (_change("steps", data_offsets=[28, 44], shape=[2]), "has 16 bytes"),
        (lambda header: {"x": 1}, "incompletely"),
        (lambda header: [], "no dictionary"),
        (lambda header: {}, "36 bytes follow"),
    ],
)
def test_damaged_safetensors_are_refused(
    tmp_path: pathlib.Path, change: Callable[[dict], Any], message: str
) -> None:
    with pytest.raises(weights.WeightsError, match=message):
        weights.read(_safetensors(tmp_path, change=change))


def test_safetensors_of_another_length_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(weights.WeightsError, match="3 bytes follow the last"):
        weights.read(_safetensors(tmp_path, tail=b"123"))
    path = _safetensors(tmp_path)
    data = path.read_bytes()
    for length in (0, 7, 8, 40, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(weights.WeightsError):
            weights.read(path)
    path.write_bytes((2**40).to_bytes(8, "little") + data[8:])
    with pytest.raises(weights.WeightsError, match="header of 1099511627776 bytes"):
        weights.read(path)
    twice = b'{"x": 1, "x": 2}'
    path.write_bytes(len(twice).to_bytes(8, "little") + twice)
    with pytest.raises(weights.WeightsError, match="names a tensor twice"):
        weights.read(path)


@pytest.mark.parametrize("write", [_npz, _torch])
def test_every_cut_is_a_clean_error(
    tmp_path: pathlib.Path, write: Callable[[pathlib.Path], pathlib.Path]
) -> None:
    path = write(tmp_path)
    data = path.read_bytes()
    for length in range(0, len(data), 37):
        path.write_bytes(data[:length])
        with pytest.raises(weights.WeightsError, match=str(path)):
            weights.read(path)


def _held(**changes: Any) -> weights.Weights:
    arrays = {f"net.{name}": x for name, x in ARRAYS.items() if name != "steps"}
    arrays["betas"] = np.zeros(3)
    arrays |= {name.replace("_", "."): x for name, x in changes.items()}
    arrays = {name: x for name, x in arrays.items() if x is not None}
    return weights.Weights(path=pathlib.Path("x.pth"), arrays=arrays)


def test_fitted_leaves_have_the_layout_and_type_of_the_network() -> None:
    prefix = weights.find_prefix(_held(), "a.weight")
    assert prefix == "net."
    tree = weights.fit(_held(), LIKE, SOURCES, prefix=prefix)
    np.testing.assert_array_equal(tree["dense"]["kernel"], ARRAYS["a.weight"].T)
    np.testing.assert_array_equal(tree["dense"]["bias"], [0.5, -1.0])
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {np.dtype(np.float32)}


def test_every_misfit_is_listed_at_once() -> None:
    held = _held(net_a_bias=None, net_a_weight=np.zeros((4, 3)), net_b_weight=ARRAYS)
    held.arrays["net.b.weight"] = np.zeros((5, 5))
    with pytest.raises(weights.WeightsError) as caught:
        weights.fit(held, LIKE, SOURCES, prefix="net.")
    text = str(caught.value)
    assert "2 of 2 leaves of the network are not filled" in text
    assert "1 of 2 tensors of the file are not used" in text
    assert "dense/bias: net.a.bias is not in the file" in text
    assert (
        "dense/kernel: expected (3, 2), found (3, 4) (net.a.weight with (4, 3))" in text
    )
    assert "net.b.weight (5, 5)" in text
    assert "betas" not in text


def test_without_a_prefix_nothing_may_be_left_over() -> None:
    bare = {name: ARRAYS[name] for name in ("a.weight", "a.bias")}
    held = weights.Weights(path=pathlib.Path("x"), arrays={**bare, "b": np.zeros(1)})
    with pytest.raises(weights.WeightsError, match=r"are not used:\n  b \(1,\)"):
        weights.fit(held, LIKE, SOURCES)
    weights.fit(held, LIKE, SOURCES, ignored=["b"])


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (np.array([1, 2]), "holds int64, not floating-point"),
        (np.array([1.0, np.nan]), "holds NaN or Inf"),
    ],
)
def test_values_must_be_finite_numbers(bias: np.ndarray, message: str) -> None:
    with pytest.raises(weights.WeightsError, match=message):
        weights.fit(_held(net_a_bias=bias), LIKE, SOURCES, prefix="net.")


def test_prefixes_must_be_unambiguous() -> None:
    held = _held(ema_a_weight=np.zeros(1))
    with pytest.raises(weights.WeightsError, match=r"\['ema\.', 'net\.'\].*prefix"):
        weights.find_prefix(held, "a.weight")
    with pytest.raises(weights.WeightsError, match=r"no tensor is called 'c'"):
        weights.find_prefix(held, "c")
