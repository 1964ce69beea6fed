import gzip
import pathlib
import struct

import nibabel as nib
import numpy as np
import pytest

from uad_jax.data import geometry, nifti, nifti_parse
from uad_jax.types import Geometry

SHAPE = (6, 7, 8)
AFFINE = np.array(
    [[2.0, 0, 0, -10], [0, 2, 0, -20], [0, 0, 2, 30], [0, 0, 0, 1]], np.float64
)


def _values(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).uniform(1, 100, shape).astype(np.float32)


def _save(
    path: pathlib.Path, data: np.ndarray | None = None, affine: np.ndarray = AFFINE
) -> pathlib.Path:
    nib.save(nib.Nifti1Image(_values() if data is None else data, affine), path)
    return path


def _patch(path: pathlib.Path, offset: int, content: bytes) -> pathlib.Path:
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(content)] = content
    path.write_bytes(raw)
    return path


def test_read_image_returns_float32_and_the_hash_of_the_file(
    tmp_path: pathlib.Path,
) -> None:
    import hashlib

    path = _save(tmp_path / "a.nii.gz")
    scan = nifti.read_image(path)
    np.testing.assert_array_equal(scan.data, _values())
    assert scan.data.dtype == np.float32
    assert scan.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    np.testing.assert_array_equal(scan.affine, AFFINE)
    assert scan.notes == ()


def test_read_image_accepts_nifti2(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti2Image(_values(), AFFINE), path)
    np.testing.assert_array_equal(nifti.read_image(path).data, _values())


@pytest.mark.parametrize("keep", [3, 100, 0.5, -1])
def test_fault_B1_truncated_gzip_is_rejected(
    tmp_path: pathlib.Path, keep: float
) -> None:
    path = _save(tmp_path / "a.nii.gz")
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep) if keep == 0.5 else int(keep)])
    with pytest.raises(nifti.DamagedFile, match=r"a\.nii\.gz.*again"):
        nifti.read_image(path)


def test_fault_B2_truncated_nii_is_rejected(tmp_path: pathlib.Path) -> None:
    path = _save(tmp_path / "a.nii")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(nifti.DamagedFile, match=r"truncated: 1695 bytes.*needs 1696"):
        nifti.read_image(path)


@pytest.mark.parametrize("damage", ["missing", "wrong"])
def test_fault_B3_gzip_trailer_is_checked(tmp_path: pathlib.Path, damage: str) -> None:
    path = _save(tmp_path / "a.nii.gz")
    raw = path.read_bytes()
    path.write_bytes(raw[:-8] if damage == "missing" else raw[:-8] + bytes(8))
    with pytest.raises(nifti.DamagedFile, match="damaged or truncated"):
        nifti.read_image(path)


def test_fault_B4_bit_flips_in_gzip_are_rejected(tmp_path: pathlib.Path) -> None:
    path = _save(tmp_path / "a.nii.gz")
    raw = path.read_bytes()
    for position in range(20, len(raw) - 1, 97):
        damaged = bytearray(raw)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(nifti.NiftiError, match=r"a\.nii\.gz"):
            nifti.read_image(path)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"", "empty"),
        (bytes(2000), "all zeros"),
        (b"<!DOCTYPE html><html>log in</html>", "looks like HTML"),
        (b"hello", "begins with"),
    ],
)
@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii"])
def test_fault_B5_a_file_that_is_no_nifti_is_named_with_a_hint(
    tmp_path: pathlib.Path, content: bytes, hint: str, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(nifti.DamagedFile, match=hint):
        nifti.read_image(path)


def test_fault_B5_wrong_compression_suffix_is_named(tmp_path: pathlib.Path) -> None:
    plain = _save(tmp_path / "a.nii")
    packed = tmp_path / "b.nii.gz"
    packed.write_bytes(plain.read_bytes())
    with pytest.raises(nifti.DamagedFile, match=r"rename it to \.nii"):
        nifti.read_image(packed)
    packed.write_bytes(gzip.compress(b"hello " * 200))
    with pytest.raises(nifti.DamagedFile, match="not NIfTI"):
        nifti.read_image(packed)
    plain.write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(nifti.DamagedFile, match=r"Rename it to a\.nii\.gz"):
        nifti.read_image(plain)


def test_fault_B7_nan_is_an_error_unless_asked_for(tmp_path: pathlib.Path) -> None:
    data = _values()
    data[1, 2, 3], data[0, 0, 0] = np.nan, np.inf
    path = _save(tmp_path / "a.nii.gz", data)
    with pytest.raises(nifti.BadVoxels, match="2 of 336 voxels are NaN"):
        nifti.read_image(path)
    scan = nifti.read_image(path, nan_to_zero=True)
    assert scan.data[1, 2, 3] == 0
    assert scan.data[0, 0, 0] == 0
    assert "2 NaN" in scan.notes[0]


@pytest.mark.parametrize("frames", [1, 3])
def test_fault_B10_four_dimensions_need_a_frame(
    tmp_path: pathlib.Path, frames: int
) -> None:
    data = _values((*SHAPE, frames))
    path = _save(tmp_path / "a.nii.gz", data)
    if frames == 1:
        np.testing.assert_array_equal(nifti.read_image(path).data, data[..., 0])
        return
    with pytest.raises(nifti.BadVoxels, match="one 3-D volume"):
        nifti.read_image(path)
    np.testing.assert_array_equal(nifti.read_image(path, frame=2).data, data[..., 2])
    with pytest.raises(nifti.BadVoxels, match="there are 3"):
        nifti.read_image(path, frame=3)


def test_fault_B10_two_dimensions_are_rejected(tmp_path: pathlib.Path) -> None:
    path = _save(tmp_path / "a.nii.gz", _values((6, 7)))
    with pytest.raises(nifti.BadVoxels, match="3-D"):
        nifti.read_image(path)


def test_fault_B11_colour_voxels_are_rejected(tmp_path: pathlib.Path) -> None:
    data = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(nifti.BadVoxels, match="colour"):
        nifti.read_image(_save(tmp_path / "a.nii.gz", data))


def test_fault_B12_complex_voxels_are_rejected(tmp_path: pathlib.Path) -> None:
    path = _save(tmp_path / "a.nii.gz", _values().astype(np.complex64))
    with pytest.raises(nifti.BadVoxels, match="complex64"):
        nifti.read_image(path)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [("int64", "float32"), ("float16", "float32"), ("bool", "uint8")],
)
def test_fault_B13_any_dtype_can_be_written(
    tmp_path: pathlib.Path, dtype: str, stored: str
) -> None:
    source = nifti.read_image(_save(tmp_path / "a.nii.gz"))
    path = tmp_path / "map.nii.gz"
    data = (_values() > 50).astype(dtype)
    nifti.write_map(path, data, source)
    image = nib.load(path)
    assert image.get_data_dtype() == stored
    np.testing.assert_array_equal(image.get_fdata(), data.astype(float))


def test_fault_B14_maps_do_not_inherit_an_integer_header(
    tmp_path: pathlib.Path,
) -> None:
    image = nib.Nifti1Image(np.arange(336, dtype=np.int16).reshape(SHAPE), AFFINE)
    image.header.set_slope_inter(0.5, 3)
    image.set_qform(AFFINE, code=1)
    image.set_sform(AFFINE, code=4)
    nib.save(image, tmp_path / "a.nii.gz")
    source = nifti.read_image(tmp_path / "a.nii.gz")
    data = np.random.default_rng(1).random(SHAPE, np.float32)
    path = tmp_path / "map.nii.gz"
    nifti.write_map(path, data, source)
    back = nib.load(path)
    assert back.get_data_dtype() == np.float32
    np.testing.assert_array_equal(np.asarray(back.dataobj), data)
    np.testing.assert_allclose(back.affine, AFFINE)
    np.testing.assert_allclose(back.get_qform(), AFFINE, atol=1e-5)
    assert (back.header["sform_code"], back.header["qform_code"]) == (4, 1)
    assert back.header.get_xyzt_units()[0] == "mm"
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "a.nii.gz",
        "map.nii.gz",
    ]


def test_fault_B15_nan_is_never_written(tmp_path: pathlib.Path) -> None:
    place = Geometry(native_shape=SHAPE, native_affine=AFFINE, grid_to_native=np.eye(4))
    data = _values()
    data[0, 0, 0] = np.nan
    with pytest.raises(nifti.BadVoxels, match="NaN"):
        nifti.write_map(tmp_path / "map.nii.gz", data, place)
    with pytest.raises(nifti.GridMismatch, match="to_native"):
        nifti.write_map(tmp_path / "map.nii.gz", data[1:], place)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("slope", "factor"), [(0.0, 1.0), (float("nan"), 1.0), (2.0, 2.0)]
)
def test_fault_B16_scale_slope(
    tmp_path: pathlib.Path, slope: float, factor: float
) -> None:
    data = np.arange(336, dtype=np.int16).reshape(SHAPE)
    path = _patch(_save(tmp_path / "a.nii", data), 112, struct.pack("<ff", slope, 0.0))
    np.testing.assert_array_equal(nifti.read_image(path).data, data * factor)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL", "ASR"])
def test_fault_B17_storage_orientation_is_undone_and_restored(
    tmp_path: pathlib.Path, codes: str
) -> None:
    ras = nib.Nifti1Image(_values(), AFFINE)
    orientation = nib.orientations.axcodes2ornt(codes)
    stored = ras.as_reoriented(
        nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt("RAS"), orientation
        )
    )
    nib.save(stored, tmp_path / "a.nii.gz")
    scan = nifti.read_image(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(scan.data, _values())
    np.testing.assert_allclose(scan.affine, AFFINE)
    assert scan.native_shape == stored.shape
    back = geometry.reorder(scan.data, np.linalg.inv(scan.native_to_canonical))
    np.testing.assert_array_equal(back, stored.get_fdata())
    nifti.write_map(tmp_path / "map.nii.gz", back, scan)
    again = nib.load(tmp_path / "map.nii.gz")
    assert "".join(nib.aff2axcodes(again.affine)) == codes
    np.testing.assert_array_equal(again.get_fdata(), stored.get_fdata())


def test_fault_B18_sform_wins_and_the_difference_is_noted(
    tmp_path: pathlib.Path,
) -> None:
    image = nib.Nifti1Image(_values(), AFFINE)
    image.set_sform(AFFINE, code=1)
    image.set_qform(np.diag([1.0, 1, 1, 1]), code=1)
    nib.save(image, tmp_path / "a.nii.gz")
    scan = nifti.read_image(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(scan.affine, AFFINE)
    assert "sform and qform differ" in scan.notes[0]


def test_fault_B19_unknown_orientation_is_an_error_unless_assumed(
    tmp_path: pathlib.Path,
) -> None:
    image = nib.Nifti1Image(_values(), None)
    image.header["pixdim"][1:4] = 1, 2, 3
    nib.save(image, tmp_path / "a.nii")
    path = _patch(tmp_path / "a.nii", 252, struct.pack("<hh", 0, 0))
    with pytest.raises(nifti.BadAffine, match="assume_orientation"):
        nifti.read_image(path)
    scan = nifti.read_image(path, assume_orientation="LPS")
    np.testing.assert_array_equal(scan.data, _values()[::-1, ::-1])
    assert geometry.spacing(scan.affine) == (1, 2, 3)
    assert "assumed" in scan.notes[0]
    with pytest.raises(nifti.BadAffine, match="three axis codes"):
        nifti.read_image(path, assume_orientation="RAX")


def test_fault_B20_sheared_affine_is_noted(tmp_path: pathlib.Path) -> None:
    sheared = AFFINE.copy()
    sheared[0, 1] = 0.3
    scan = nifti.read_image(_save(tmp_path / "a.nii.gz", affine=sheared))
    assert "sheared" in " ".join(scan.notes)
    nifti.write_map(tmp_path / "map.nii.gz", _values(), scan)
    np.testing.assert_allclose(nib.load(tmp_path / "map.nii.gz").affine, sheared)


@pytest.mark.parametrize(
    ("fault", "row"), [("B21", (np.nan, 0, 0, 0)), ("B22", (0, 0, 0, 0))]
)
def test_fault_B21_B22_unusable_affine_is_a_typed_error(
    tmp_path: pathlib.Path, fault: str, row: tuple[float, ...]
) -> None:
    path = _patch(_save(tmp_path / "a.nii"), 280, struct.pack("<4f", *row))
    with pytest.raises(nifti.BadAffine, match="not finite, not invertible"):
        nifti.read_image(path)


@pytest.mark.parametrize("size", [0, -4])
def test_fault_B23_impossible_dimensions_are_rejected(
    tmp_path: pathlib.Path, size: int
) -> None:
    path = _patch(_save(tmp_path / "a.nii"), 42, struct.pack("<h", size))
    with pytest.raises(nifti.BadHeader, match="dim"):
        nifti.read_image(path)


@pytest.mark.parametrize("packed", [False, True])
def test_fault_B24_claimed_size_is_checked_before_reading(
    tmp_path: pathlib.Path, packed: bool
) -> None:
    path = _patch(_save(tmp_path / "a.nii"), 42, struct.pack("<3h", *[32767] * 3))
    if packed:
        raw = path.read_bytes()
        path = tmp_path / "a.nii.gz"
        path.write_bytes(gzip.compress(raw))
    with pytest.raises(nifti.BadHeader, match="limit"):
        nifti.read_image(path)
    with pytest.raises(nifti.BadHeader, match="can hold"):
        nifti.read_image(path, max_voxels=10**15)


def test_fault_B25_gzip_bombs_are_not_unpacked(tmp_path: pathlib.Path) -> None:
    path = _save(tmp_path / "big.nii.gz", np.zeros((64, 64, 64), np.uint8))
    with pytest.raises(nifti.BadHeader, match="limit"):
        nifti.read_image(path, max_voxels=1000)
    small = _save(tmp_path / "a.nii")
    bomb = tmp_path / "a.nii.gz"
    bomb.write_bytes(gzip.compress(small.read_bytes() + bytes(1 << 23)))
    with pytest.raises(nifti.BadHeader, match="fill memory"):
        nifti.read_image(bomb)


@pytest.mark.parametrize("magic", [b"xxxx", b"ni1\0", bytes(4)])
def test_fault_B26_other_magic_is_rejected(
    tmp_path: pathlib.Path, magic: bytes
) -> None:
    path = _patch(_save(tmp_path / "a.nii"), 344, magic)
    with pytest.raises(nifti.DamagedFile, match="magic"):
        nifti.read_image(path)


def test_fault_B27_big_endian_becomes_native(tmp_path: pathlib.Path) -> None:
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    data = np.arange(336, dtype=np.int16).reshape(SHAPE)
    nib.save(nib.Nifti1Image(data, AFFINE, header), tmp_path / "a.nii.gz")
    scan = nifti.read_image(tmp_path / "a.nii.gz")
    assert scan.data.dtype.isnative
    np.testing.assert_array_equal(scan.data, data)


def test_fault_B28_unusual_voxel_sizes_are_noted(tmp_path: pathlib.Path) -> None:
    path = _save(tmp_path / "a.nii.gz", affine=np.diag([1000.0, 1000, 1000, 1]))
    assert "check the units" in nifti.read_image(path).notes[0]


def test_fault_B29_shapes_that_differ_are_an_error(tmp_path: pathlib.Path) -> None:
    image = nifti.read_image(_save(tmp_path / "a.nii.gz"))
    mask = nifti.read_mask(_save(tmp_path / "m.nii.gz", _values()[1:]))
    with pytest.raises(nifti.GridMismatch, match=r"m\.nii.*5, 7, 8.*6, 7, 8"):
        nifti.check_same_grid(image, mask)
    with pytest.raises(nifti.GridMismatch, match="5, 7, 8"):
        nifti.check_same_grid(image, mask, ignore_affine=True)


def test_fault_B30_affines_that_differ_are_an_error(tmp_path: pathlib.Path) -> None:
    image = nifti.read_image(_save(tmp_path / "a.nii.gz"))
    moved = AFFINE.copy()
    moved[0, 3] += 0.5
    mask = nifti.read_mask(_save(tmp_path / "m.nii.gz", affine=moved))
    with pytest.raises(nifti.GridMismatch, match=r"0\.5 mm"):
        nifti.check_same_grid(image, mask)
    nifti.check_same_grid(image, mask, ignore_affine=True)
    moved[0, 3] -= 0.4999
    same = nifti.read_mask(_save(tmp_path / "n.nii.gz", affine=moved))
    nifti.check_same_grid(image, same)


def test_ignoring_the_affine_matches_stored_voxels(tmp_path: pathlib.Path) -> None:
    image = nifti.read_image(
        _save(tmp_path / "a.nii.gz", affine=np.diag([-2.0, -2, 2, 1]))
    )
    other = nifti.read_image(_save(tmp_path / "b.nii.gz"))
    assert not np.array_equal(image.data, other.data)
    moved = nifti.on_grid_of(image, other)
    np.testing.assert_array_equal(image.data, moved.data)
    nifti.check_same_grid(image, moved)


@pytest.mark.parametrize(
    ("values", "inside", "found"),
    [
        ([0, 1, 2, 4], [0, 1, 1, 1], "{0, 1, 2, 4}"),
        ([0, 255, 0, 255], [0, 1, 0, 1], "{0, 255}"),
        ([0.0, 0.4, 0.5, 1.0], [0, 0, 1, 1], "fractions in [0, 1]"),
        ([0.0, 100.5, 127.5, 255.0], [0, 0, 1, 1], "inside is 127.5 and above"),
    ],
)
def test_fault_B31_masks_are_binarised_by_a_stated_rule(
    tmp_path: pathlib.Path, values: list[float], inside: list[int], found: str
) -> None:
    data = np.zeros((4, 2, 2), np.float32)
    data[:, 0, 0] = values
    scan = nifti.read_mask(_save(tmp_path / "m.nii.gz", data))
    assert scan.data.dtype == bool
    assert scan.data[:, 0, 0].tolist() == [bool(value) for value in inside]
    assert found in scan.notes[-1]


def test_fault_B31_negative_labels_are_rejected(tmp_path: pathlib.Path) -> None:
    path = _save(tmp_path / "m.nii.gz", _values() - 50)
    with pytest.raises(nifti.BadVoxels, match="image given as a mask"):
        nifti.read_mask(path)


def test_fault_B37_float64_is_never_made(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _save(tmp_path / "a.nii.gz", _values().astype(np.float64))
    asked = []
    original = nib.Nifti1Image.get_fdata

    def spy(image: nib.Nifti1Image, **options: object) -> np.ndarray:
        asked.append(options["dtype"])
        return original(image, **options)

    monkeypatch.setattr(nib.Nifti1Image, "get_fdata", spy)
    assert nifti.read_image(path).data.dtype == np.float32
    assert asked == [np.float32]


def test_fault_B38_odd_names_work_and_loops_are_clean_errors(
    tmp_path: pathlib.Path,
) -> None:
    folder = tmp_path / "Köpfe und 脳"
    folder.mkdir()
    path = _save(folder / "naïve scan.nii.gz")
    nifti.write_map(folder / "Läsion 1.nii.gz", _values(), nifti.read_image(path))
    assert nifti.read_image(folder / "Läsion 1.nii.gz").data.shape == SHAPE
    loop = tmp_path / "loop.nii.gz"
    loop.symlink_to(loop)
    (tmp_path / "dir.nii.gz").mkdir()
    for bad in (loop, tmp_path / "dir.nii.gz", tmp_path / "none.nii.gz"):
        with pytest.raises(nifti.DamagedFile, match="cannot be read"):
            nifti.read_image(bad)
    with pytest.raises(nifti.NiftiError, match="cannot be written"):
        nifti.write_map(folder / "none" / "map.nii", _values(), nifti.read_image(path))
    with pytest.raises(nifti.DamagedFile, match=r"ending in \.nii"):
        nifti.read_image(tmp_path / "a.mha")


def _outcome(path: pathlib.Path) -> str:
    try:
        scan = nifti.read_image(path)
    except nifti.NiftiError as error:
        return f"{type(error).__name__} {error}"
    return "scan" if np.isfinite(scan.data).all() else "not finite"


@pytest.mark.parametrize(
    ("kind", "size"), [(nib.Nifti1Image, 352), (nib.Nifti2Image, 544)]
)
def test_a_random_header_gives_a_scan_or_a_typed_error(
    tmp_path: pathlib.Path, kind: type[nib.Nifti1Image], size: int
) -> None:
    nib.save(kind(_values(), AFFINE), tmp_path / "a.nii")
    raw = (tmp_path / "a.nii").read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "b.nii"
    kinds = set()
    for _ in range(400):
        damaged = bytearray(raw)
        for position in rng.integers(0, size, rng.integers(1, 5)):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        outcome = _outcome(path)
        assert outcome == "scan" or "b.nii" in outcome
        kinds.add(outcome.split()[0])
    assert {"scan", "BadHeader", "DamagedFile"} <= kinds


def test_every_error_is_a_nifti_error_and_a_value_error() -> None:
    for kind in (nifti.DamagedFile, nifti.BadHeader, nifti.BadAffine):
        assert issubclass(kind, nifti.NiftiError)
        assert issubclass(kind, ValueError)
    assert nifti.NiftiError is nifti_parse.NiftiError


def _with_odd_place(kind: type = nib.Nifti1Image) -> nib.Nifti1Image:
    """sform and qform differ, the qform is left-handed, the units are microns."""
    image = kind(_values(), None)
    image.header.set_data_dtype(np.int16)
    image.set_qform(np.diag([-0.9, 0.9, 3.0, 1]) + 1e-3 * np.eye(4, k=3), code=2)
    image.set_sform(AFFINE, code=4)
    image.header.set_xyzt_units("micron", "sec")
    return image


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_a_map_is_placed_as_the_header_of_its_scan_to_the_last_bit(
    tmp_path: pathlib.Path, kind: type
) -> None:
    scan = tmp_path / "scan.nii.gz"
    nib.save(_with_odd_place(kind), scan)
    header, sha256 = nifti.read_header(scan)
    assert sha256 == nifti.read_image(scan).sha256
    like = Geometry(native_shape=SHAPE, native_affine=AFFINE, grid_to_native=np.eye(4))
    written = tmp_path / "map.nii.gz"
    nifti.write_map(written, _values(), like, header=header, description="a map")
    found, before = nib.load(written), nib.load(scan)
    assert type(found) is kind
    for name in nifti.PLACE:
        np.testing.assert_array_equal(found.header[name], before.header[name], name)
    np.testing.assert_array_equal(
        found.header["pixdim"][:4], before.header["pixdim"][:4]
    )
    np.testing.assert_array_equal(found.get_sform(), before.get_sform())
    np.testing.assert_array_equal(found.get_qform(), before.get_qform())
    assert (found.get_data_dtype(), found.header["descrip"]) == (np.float32, b"a map")
    np.testing.assert_array_equal(np.asarray(found.dataobj), _values())


def test_a_scan_without_orientation_gets_maps_without(tmp_path: pathlib.Path) -> None:
    image = nib.Nifti1Image(_values(), None)
    image.header["pixdim"][1:4] = 2.0
    nib.save(image, tmp_path / "scan.nii")
    scan = nifti.read_image(tmp_path / "scan.nii", assume_orientation="RAS")
    header, _ = nifti.read_header(tmp_path / "scan.nii")
    nifti.write_map(tmp_path / "map.nii", _values(), scan, header=header)
    found, _ = nifti.read_header(tmp_path / "map.nii")
    assert (int(found["sform_code"]), int(found["qform_code"])) == (0, 0)
    np.testing.assert_array_equal(found["pixdim"][1:4], 2.0)


def test_the_same_map_is_the_same_bytes(tmp_path: pathlib.Path) -> None:
    like = Geometry(native_shape=SHAPE, native_affine=AFFINE, grid_to_native=np.eye(4))
    for name in ("a", "b"):
        nifti.write_map(tmp_path / f"{name}.nii.gz", _values(), like)
    first, second = (tmp_path / f"{name}.nii.gz" for name in "ab")
    assert nifti.read_header(first)[1] == nifti.read_header(second)[1]
