import pathlib
import pickle
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests import foreign_states
from tests.foreign_states import Call, Global, Reference, tensor
from uad_jax import torch_file

NUMBERS = np.arange(24, dtype=np.float32)
Save = Callable[..., None]
CONTAINERS = pytest.mark.parametrize(
    "save",
    [foreign_states.save_archive, foreign_states.save_stream],
    ids=["archive", "stream"],
)


def _read(path: pathlib.Path, name: str = "x") -> np.ndarray:
    with torch_file.TorchFile(path) as file:
        return file.array(file.content[name])


def _save(
    save: Save, path: pathlib.Path, value: Any, numbers: np.ndarray = NUMBERS
) -> pathlib.Path:
    file = path / "x.pth"
    save(file, {"x": value}, {"0": numbers})
    return file


@CONTAINERS
@pytest.mark.parametrize(
    ("size", "strides", "offset", "expected"),
    [
        ((4, 6), (6, 1), 0, NUMBERS.reshape(4, 6)),
        ((6, 4), (1, 6), 0, NUMBERS.reshape(4, 6).T),
        ((2, 3), (6, 2), 7, NUMBERS.reshape(4, 6)[1:3, 1::2]),
        ((), (), 5, np.float32(5)),
        ((0, 3), (3, 1), 0, np.zeros((0, 3), np.float32)),
        ((3,), (0,), 23, np.full(3, 23, np.float32)),
    ],
    ids=["whole", "turned", "part", "scalar", "empty", "repeated"],
)
def test_tensors_are_views_of_their_storage(
    tmp_path: pathlib.Path,
    save: Save,
    size: tuple[int, ...],
    strides: tuple[int, ...],
    offset: int,
    expected: np.ndarray,
) -> None:
    path = _save(save, tmp_path, tensor("0", 24, size, strides, offset))
    found = _read(path)
    np.testing.assert_array_equal(found, expected)
    assert found.shape == size
    assert found.dtype == np.float32
    assert found.flags.c_contiguous


@CONTAINERS
def test_parameters_are_their_tensors(tmp_path: pathlib.Path, save: Save) -> None:
    inner = tensor("0", 24, (24,))
    hooks = Call(Global("collections.OrderedDict"), ())
    value = Call(Global("torch._utils._rebuild_parameter"), (inner, True, hooks))
    np.testing.assert_array_equal(_read(_save(save, tmp_path, value)), NUMBERS)


@pytest.mark.parametrize("dtype", ["float64", "float16", "int64", "bool"])
def test_types_are_kept(tmp_path: pathlib.Path, dtype: str) -> None:
    numbers = NUMBERS.astype(dtype)
    value = tensor("0", 24, (24,), storage=foreign_states.STORAGES[dtype])
    path = _save(foreign_states.save_archive, tmp_path, value, numbers)
    found = _read(path)
    assert found.dtype == numbers.dtype
    np.testing.assert_array_equal(found, numbers)


@CONTAINERS
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda evil: evil, "a call of os.mkdir, which is never made"),
        (lambda evil: {}, "is no tensor but a dict"),
        (
            lambda evil: Call(
                Global("torch._utils._rebuild_parameter"), (evil, True, None)
            ),
            "a call of os.mkdir",
        ),
        (
            lambda evil: Call(
                Global("torch._utils._rebuild_tensor_v2"), (evil, 0, (1,), (1,))
            ),
            "has its numbers in a call of os.mkdir",
        ),
        (lambda evil: tensor("0", 24, (evil,), (1,)), "that are no numbers"),
        (lambda evil: tensor("0", 24, (2, -3), (1, 1)), "that are no numbers"),
        (lambda evil: tensor("0", 24, (2,), (1, 1)), "that are no numbers"),
        (lambda evil: tensor("0", 24, (2,), (-1,), 5), "that are no numbers"),
        (lambda evil: tensor("0", 24, (2,), (1,), -1), "that are no numbers"),
        (
            lambda evil: Call(Global("torch._utils._rebuild_tensor_v2"), ()),
            "without storage",
        ),
    ],
)
def test_values_that_depend_on_calls_are_refused_and_nothing_runs(
    tmp_path: pathlib.Path, save: Save, change: Callable[[Any], Any], reason: str
) -> None:
    target = tmp_path / "made"
    evil = Call(Global("os.mkdir"), (str(target),))
    path = tmp_path / "x.pth"
    save(path, {"x": change(evil), "y": tensor("0", 24, (24,))}, {"0": NUMBERS})
    with torch_file.TorchFile(path) as file:
        with pytest.raises(torch_file.RefusedError, match=reason):
            file.array(file.content["x"])
        np.testing.assert_array_equal(file.array(file.content["y"]), NUMBERS)
    assert not target.exists()


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        (("module", Global("torch.FloatStorage"), "0", "cpu", 24), "numbers in a"),
        (("storage", Global("os.mkdir"), "0", "cpu", 24), "of type os.mkdir"),
        (("storage", Global("torch.FloatStorage"), 0, "cpu", 24), "without a key"),
        (("storage", Global("torch.FloatStorage"), "0", "cpu", None), "without a key"),
        (("storage", Global("torch.FloatStorage"), "0", "cpu", 24, (1,)), "view of"),
    ],
)
def test_odd_storages_are_refused(
    tmp_path: pathlib.Path, reference: tuple, reason: str
) -> None:
    rebuild = Global("torch._utils._rebuild_tensor_v2")
    value = Call(rebuild, (Reference(reference), 0, (1,), (1,)))
    path = _save(foreign_states.save_archive, tmp_path, value)
    with pytest.raises(torch_file.RefusedError, match=reason):
        _read(path)


@CONTAINERS
@pytest.mark.parametrize(
    ("size", "strides", "offset"),
    [
        ((25,), (1,), 0),
        ((24,), (1,), 1),
        ((2, 3), (20, 3), 0),
        ((10**6, 10**6), (0, 0), 0),
    ],
)
def test_tensors_stay_inside_their_storage(
    tmp_path: pathlib.Path,
    save: Save,
    size: tuple[int, ...],
    strides: tuple[int, ...],
    offset: int,
) -> None:
    path = _save(save, tmp_path, tensor("0", 24, size, strides, offset))
    with pytest.raises(ValueError, match="does not fit its storage of 24"):
        _read(path)


def test_storages_must_be_whole(tmp_path: pathlib.Path) -> None:
    value = tensor("0", 24, (24,))
    path = _save(foreign_states.save_archive, tmp_path, value, NUMBERS[:23])
    with pytest.raises(ValueError, match="storage 0 has 92 bytes instead of 24 x 4"):
        _read(path)
    path = _save(foreign_states.save_archive, tmp_path, tensor("1", 24, (24,)))
    with pytest.raises(ValueError, match="archive/data/1 is missing"):
        _read(path)
    path = _save(foreign_states.save_stream, tmp_path, value, NUMBERS[:23])
    with pytest.raises(ValueError, match="storage 0 is missing"):
        _read(path)
    path = _save(foreign_states.save_stream, tmp_path, value)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="has 96 bytes, but 95 are left"):
        _read(path)


def test_a_length_beyond_the_file_is_refused_before_it_is_read(
    tmp_path: pathlib.Path,
) -> None:
    many = 1 << 47
    content = tensor("0", many, (many,))
    path = _save(foreign_states.save_stream, tmp_path, content)
    data = path.read_bytes()
    old, new = (24).to_bytes(8, "little"), many.to_bytes(8, "little")
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    with pytest.raises(ValueError, match="96 are left: the file is damaged"):
        _read(path)


def test_flipped_and_compressed_archives_are_refused(tmp_path: pathlib.Path) -> None:
    path = _save(foreign_states.save_archive, tmp_path, tensor("0", 24, (24,)))
    data = bytearray(path.read_bytes())
    data[data.index(NUMBERS.tobytes()) + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="data/0 is damaged"):
        _read(path)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="archive is damaged"):
        _read(path)
    content = {"x": tensor("0", 24, (24,))}
    foreign_states.save_archive(path, content, {}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed"):
        _read(path)


def test_other_archives_and_big_endian_files_are_refused(
    tmp_path: pathlib.Path,
) -> None:
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b/data.pkl", b"")
    with pytest.raises(ValueError, match="not written by PyTorch"):
        _read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", foreign_states.pickled({}))
        archive.writestr("a/byteorder", b"big")
    with pytest.raises(ValueError, match="big-endian"):
        _read(path)


def test_plain_pickles_are_refused_with_the_remedy(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(pickle.dumps({"x": NUMBERS}))
    with pytest.raises(ValueError, match=r"plain pickle.*torch\.save"):
        _read(path)
