"""Maps in files: found by name, placed by their affine, scored like a method's."""

import dataclasses
import json
import pathlib
from collections.abc import Callable

import jax
import nibabel as nib
import numpy as np
import pytest

from tests import stores
from uad_jax import maps
from uad_jax import mesh as mesh_lib
from uad_jax.data import builder, examine, geometry, nifti, pipeline
from uad_jax.data.sources import Store, VolumeInfo
from uad_jax.methods import lifting
from uad_jax.metrics.protocols import Protocol
from uad_jax.types import Geometry, Scores, Volumes

# Scans of 1 mm, stored right to left and front to back, off the origin.
NATIVE = Geometry(
    native_shape=(70, 66, 16),
    native_affine=np.array(
        [[-1.0, 0, 0, 30], [0, -1, 0, 41.5], [0, 0, 1, -700], [0, 0, 0, 1]]
    ),
    grid_to_native=np.array(
        [[-2.0, 0, 0, 66], [0, -2, 0, 64.5], [0, 0, 2, 3.25], [0, 0, 0, 1]]
    ),
)
BOX = (32, 32, 6)  # x, y, z of the tiny stores
NAMES = ["sub-1", "sub-10", "sub-1_ses-2", "sub-2"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Four volumes whose scans have 1 mm voxels; one is shallower."""

    def load(number: int, depth: int) -> stores.Prepared:
        scan = stores.phantom(number, (depth, 32, 32, 1), lesion=number == 1)
        return dataclasses.replace(scan, geometry=NATIVE)

    scans = [
        builder.Source(
            subject=name,
            load=lambda i=i, name=name: load(i, 5 if name == "sub-2" else 6),
            modalities=("t1",),
            label="abnormal" if i == 1 else "healthy",
            split="test",
        )
        for i, name in enumerate(NAMES)
    ]
    path = builder.build_from(
        scans,
        tmp_path_factory.mktemp("maps") / "store",
        recipe={"name": "phantom", "spacing": [2.0, 2.0, 2.0]},
        recipe_hash="1",
        source_hash="1",
        workers=0,
    )
    return Store.open(path)


def _touch(folder: pathlib.Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def _native_map(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=NATIVE.native_shape).astype("f4")


def _save(path: pathlib.Path, data: np.ndarray, affine: np.ndarray) -> pathlib.Path:
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def _info(store: Store, subject: str) -> VolumeInfo:
    return next(info for info in store.volumes if info.subject == subject)


def _stored_as(
    data: np.ndarray, affine: np.ndarray, codes: str
) -> tuple[np.ndarray, np.ndarray]:
    """The same map with its axes stored in another order."""
    image = nib.Nifti1Image(data, affine)
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(codes)
    )
    turned = image.as_reoriented(turn)
    assert nib.aff2axcodes(turned.affine) == tuple(codes)
    return np.asarray(turned.dataobj), turned.affine


def test_a_file_belongs_to_the_longest_subject_that_its_name_begins_with(
    tmp_path: pathlib.Path, store: Store
) -> None:
    _touch(
        tmp_path,
        "sub-1.nii.gz",
        "sub-10_map.nii",
        "sub-1_ses-2-anomaly.nii.gz",
        "sub-2/any/name.nii.gz",
        "sub-2/any/name_mask.nii.gz",
        "sub-1_mask.nii.gz",
        "sub-1_reconstruction.nii.gz",
        "sub-1_desc-reconstruction_t1.nii.gz",
        "sub-1_prediction.json",
        "._sub-1.nii.gz",
        "sub-1x.nii.gz",
    )
    found = maps.find(tmp_path, store.volumes)
    assert {name: str(path.relative_to(tmp_path)) for name, path in found.items()} == {
        "sub-1": "sub-1.nii.gz",
        "sub-10": "sub-10_map.nii",
        "sub-1_ses-2": "sub-1_ses-2-anomaly.nii.gz",
        "sub-2": "sub-2/any/name.nii.gz",
    }


def test_our_own_export_is_taken_before_other_maps(
    tmp_path: pathlib.Path, store: Store
) -> None:
    own = f"sub-2{maps.SUFFIX}.nii.gz"
    _touch(tmp_path, "sub-2_desc-anomaly_map.nii.gz", "sub-2_old.nii", own)
    found = maps.find(tmp_path, [_info(store, "sub-2")])
    assert found == {"sub-2": tmp_path / own}


def test_missing_and_ambiguous_maps_are_named_in_one_error(
    tmp_path: pathlib.Path, store: Store
) -> None:
    _touch(tmp_path, "sub-1.nii", "sub-1_b.nii.gz", "sub-10.nii.gz")
    with pytest.raises(ValueError, match=r"2 problem\(s\)") as error:
        maps.find(tmp_path, store.volumes)
    text = str(error.value)
    assert "sub-1: 2 files could be its map: sub-1.nii, sub-1_b.nii.gz" in text
    assert "no map of 2 of 4 subjects: sub-1_ses-2, sub-2." in text
    assert "sub-1_ses-2_anomaly.nii.gz" in text
    with pytest.raises(ValueError, match=r"nowhere: there is no folder"):
        maps.find(tmp_path / "nowhere", store.volumes)


def test_a_map_of_a_subject_that_needs_none_is_not_taken_for_another(
    tmp_path: pathlib.Path, store: Store
) -> None:
    _touch(tmp_path, "sub-1_ses-2_map.nii.gz")
    one = [_info(store, "sub-1")]
    assert maps.find(tmp_path, one)  # nobody else is known
    with pytest.raises(ValueError, match="no map of 1 of 1 subjects: sub-1"):
        maps.find(tmp_path, one, NAMES)
    assert maps.available(tmp_path, store.volumes) == [_info(store, "sub-1_ses-2")]


def test_a_map_on_the_model_grid_is_taken_voxel_for_voxel(
    tmp_path: pathlib.Path, store: Store
) -> None:
    info = _info(store, "sub-2")
    data = np.random.default_rng(0).normal(size=(5, 32, 32)).astype(np.float32)
    affine = NATIVE.native_affine @ NATIVE.grid_to_native
    path = _save(tmp_path / "a.nii.gz", data.transpose(1, 2, 0), affine)
    np.testing.assert_array_equal(maps.place(path, info, store), data)


def test_a_map_on_the_scans_voxels_is_resampled_like_the_scan(
    tmp_path: pathlib.Path, store: Store
) -> None:
    data = _native_map()
    path = _save(tmp_path / "a.nii.gz", data, NATIVE.native_affine)
    placed = maps.place(path, _info(store, "sub-1"), store)
    assert placed.dtype == np.float32
    np.testing.assert_array_equal(placed, geometry.to_grid(data, NATIVE, BOX))
    # By hand: voxel (x, y, z) = (3, 4, 1) lies at 60, 56.5, 5.25 of the scan; at a
    # step of 2 the weights of whole positions are 1/4, 1/2, 1/4.
    x = np.array([0.25, 0.5, 0.25])
    y = np.array([0.25, 0.75, 0.75, 0.25]) / 2
    z = np.array([0.375, 0.875, 0.625, 0.125]) / 2
    value = np.einsum("xyz,x,y,z", data[59:62, 55:59, 4:8], x, y, z)
    assert placed[1, 3, 4] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL", "AIL"])
@pytest.mark.parametrize("oblique", [False, True])
def test_the_order_in_which_axes_are_stored_does_not_matter(
    tmp_path: pathlib.Path, store: Store, codes: str, oblique: bool
) -> None:
    tilt = np.eye(4)
    if oblique:  # near 45 degrees rounding decides which axis is which
        tilt[:3, :3] = nib.eulerangles.euler2mat(np.pi / 4, 0.1, -0.05)
    where = dataclasses.replace(NATIVE, native_affine=tilt @ NATIVE.native_affine)
    info = dataclasses.replace(_info(store, "sub-1"), geometry=where)
    on_grid = np.random.default_rng(1).normal(size=BOX).astype(np.float32)
    for data, affine, expected in (
        (
            _native_map(),
            where.native_affine,
            geometry.to_grid(_native_map(), where, BOX),
        ),
        (
            on_grid,
            where.native_affine @ where.grid_to_native,
            on_grid.transpose(2, 0, 1),
        ),
    ):
        straight = np.linalg.inv(tilt) @ affine
        stored, turned = _stored_as(data, straight, codes)
        path = _save(tmp_path / "a.nii.gz", stored, tilt @ turned)
        np.testing.assert_array_equal(maps.place(path, info, store), expected)


def test_an_affine_counts_as_equal_within_a_thousandth_of_a_voxel(
    tmp_path: pathlib.Path, store: Store
) -> None:
    info, data = _info(store, "sub-1"), _native_map()
    for shift, fits in ((0.0005, True), (0.002, False)):
        moved = NATIVE.native_affine.copy()
        moved[0, 3] += shift
        path = _save(tmp_path / "a.nii.gz", data, moved)
        if fits:
            expected = geometry.to_grid(data, NATIVE, BOX)
            np.testing.assert_array_equal(maps.place(path, info, store), expected)
        else:
            with pytest.raises(nifti.GridMismatch, match=r"it is 0\.002 voxels off"):
                maps.place(path, info, store)
    scaled = NATIVE.native_affine.copy()
    scaled[:3, 1] *= 1.0001  # adds up over 65 voxels
    with pytest.raises(nifti.GridMismatch, match=r"voxels off the scan of sub-1"):
        maps.place(_save(tmp_path / "b.nii.gz", data, scaled), info, store)


def test_a_map_from_elsewhere_is_an_error_that_names_all_shapes_and_affines(
    tmp_path: pathlib.Path, store: Store
) -> None:
    path = _save(tmp_path / "a.nii.gz", np.zeros((9, 8, 7), "f4"), np.eye(4))
    with pytest.raises(nifti.GridMismatch) as error:
        maps.place(path, _info(store, "sub-1"), store)
    text = str(error.value)
    assert str(path) in text
    for shape in ((9, 8, 7), NATIVE.native_shape, BOX):
        assert f"shape {shape}" in text
    assert text.count("affine") == 3
    assert "Resample" in text
    assert "--ignore_affine" not in text  # would not help


def test_ignore_affine_takes_an_array_in_the_order_of_the_scan(
    tmp_path: pathlib.Path, store: Store
) -> None:
    info, data = _info(store, "sub-1"), _native_map()
    path = _save(tmp_path / "a.nii.gz", data, np.eye(4))
    with pytest.raises(nifti.GridMismatch, match="--ignore_affine"):
        maps.place(path, info, store)
    reading = examine.Reading(ignore_affine=True)
    expected = geometry.to_grid(data, NATIVE, BOX)
    np.testing.assert_array_equal(maps.place(path, info, store, reading), expected)
    on_grid = np.arange(np.prod(BOX), dtype=np.float32).reshape(BOX)
    path = _save(tmp_path / "b.nii.gz", on_grid, np.eye(4))
    placed = maps.place(path, info, store, reading)
    np.testing.assert_array_equal(placed, on_grid.transpose(2, 0, 1))


def test_whole_numbers_and_constants_are_maps_and_nan_is_not(
    tmp_path: pathlib.Path, store: Store
) -> None:
    info = _info(store, "sub-1")
    counts = np.random.default_rng(0).integers(0, 255, NATIVE.native_shape)
    path = _save(tmp_path / "a.nii", counts.astype(np.uint8), NATIVE.native_affine)
    expected = geometry.to_grid(counts.astype(np.float32), NATIVE, BOX)
    np.testing.assert_array_equal(maps.place(path, info, store), expected)
    constant = np.full(NATIVE.native_shape, -3, np.int16)
    path = _save(tmp_path / "b.nii", constant, NATIVE.native_affine)
    assert maps.place(path, info, store) == pytest.approx(-3.0)
    broken = _native_map()
    broken[0, 0, :2] = np.nan, np.inf
    path = _save(tmp_path / "c.nii", broken, NATIVE.native_affine)
    with pytest.raises(nifti.BadVoxels, match=r"c\.nii: 2 of \d+ voxels are NaN"):
        maps.place(path, info, store)
    placed = maps.place(path, info, store, examine.Reading(nan_to_zero=True))
    assert np.isfinite(placed).all()


def _batches(
    store: Store, mesh: jax.sharding.Mesh, batch_size: int
) -> list[tuple[Volumes, list[VolumeInfo]]]:
    return [
        (volumes, infos)
        for volumes, _, infos in pipeline.volume_batches(
            store, store.volumes, modalities="", batch_size=batch_size, mesh=mesh
        )
    ]


def _method(volumes: Volumes) -> Scores:
    """Stands for a method with scores of its own, negative and tiny ones among them."""
    noise = [
        np.random.default_rng(max(uid, 0)).normal(size=volumes.mask.shape[1:-1])
        for uid in np.asarray(volumes.uid).tolist()
    ]
    anomaly_map = (np.exp(5 * np.stack(noise)) - 0.1).astype(np.float32)
    slices = anomaly_map.max(axis=(2, 3)) / np.float32(3)
    scores = (anomaly_map, slices, slices.max(axis=1) / np.float32(7))
    anomaly_map, slices, whole = jax.device_put(scores, volumes.mask.sharding)
    return Scores(anomaly_map=anomaly_map, slice_score=slices, volume_score=whole)


def _scored(
    score: Callable[[Volumes], Scores],
    store: Store,
    mesh: jax.sharding.Mesh,
    batch_size: int,
) -> dict[str, tuple[np.ndarray, ...]]:
    """Subject -> map [d, H, W], slice scores [d] and volume score []."""
    found = {}
    for volumes, infos in _batches(store, mesh, batch_size):
        scores = jax.device_get(score(volumes))
        assert scores.reconstruction is None
        for row, info in enumerate(infos):
            found[info.subject] = (
                scores.anomaly_map[row, : info.depth],
                scores.slice_score[row, : info.depth],
                scores.volume_score[row],
            )
    return found


def test_our_own_maps_scored_again_give_the_same_bits(
    tmp_path: pathlib.Path,
    store: Store,
    mesh1: jax.sharding.Mesh,
    mesh8: jax.sharding.Mesh,
) -> None:
    folder = tmp_path / "maps"
    own = _scored(_method, store, mesh1, 3)
    for info in store.volumes:
        anomaly_map, slices, whole = own[info.subject]
        maps.write_scores(folder, info, anomaly_map, slices, float(whole))
    for mesh, batch_size in ((mesh1, 3), (mesh8, 8)):
        scorer = maps.scorer(
            "again", folder, store, store.volumes, Protocol.BEHRENDT, mesh
        )
        assert (scorer.name, scorer.protocol) == ("again", Protocol.BEHRENDT)
        again = _scored(scorer.score, store, mesh, batch_size)
        assert again.keys() == own.keys()
        for subject, arrays in again.items():
            for one, expected in zip(arrays, own[subject], strict=True):
                assert one.dtype == np.float32
                np.testing.assert_array_equal(one, expected)


def test_the_export_says_where_its_voxels_are(
    tmp_path: pathlib.Path, store: Store
) -> None:
    info = _info(store, "sub-2")
    sheared, far = NATIVE.native_affine.copy(), NATIVE.native_affine.copy()
    sheared[0, 1] += 0.1  # a qform cannot say that
    far[:3] *= 1.017
    far[:3, 3] = np.float32(70000.1)  # where float32 rounds the model grid's origin
    for affine, qform in (
        (NATIVE.native_affine, True),
        (sheared, False),
        (far, True),
    ):
        where = dataclasses.replace(NATIVE, native_affine=affine)
        there = dataclasses.replace(info, geometry=where)
        data = np.random.default_rng(2).normal(size=(5, 32, 32)).astype(np.float32)
        maps.write_scores(tmp_path, there, data, data.mean(axis=(1, 2)), 0.5)
        image = nib.load(tmp_path / f"sub-2{maps.SUFFIX}.nii.gz")
        assert image.get_data_dtype() == np.float32
        grid = affine @ NATIVE.grid_to_native
        assert image.get_sform() == pytest.approx(grid, rel=1e-6)
        assert (int(image.header["qform_code"]) > 0) == qform
        if qform:
            assert image.get_qform() == pytest.approx(grid, rel=1e-6)
        # The brightest voxel of the array is the brightest place in the world.
        z, x, y = np.unravel_index(data.argmax(), data.shape)
        stored = np.asarray(image.dataobj)
        peak = np.unravel_index(stored.argmax(), stored.shape)
        world = image.affine @ [*peak, 1]
        assert world == pytest.approx(grid @ [x, y, z, 1], rel=1e-6)
        again = maps.place(tmp_path / f"sub-2{maps.SUFFIX}.nii.gz", there, store)
        np.testing.assert_array_equal(again, data)


def test_maps_without_scores_are_scored_by_their_mean_in_the_brain(
    tmp_path: pathlib.Path, store: Store, mesh8: jax.sharding.Mesh
) -> None:
    for number, info in enumerate(store.volumes):
        _save(
            tmp_path / f"{info.subject}.nii.gz",
            _native_map(number),
            NATIVE.native_affine,
        )
    scorer = maps.scorer(
        "tool", tmp_path, store, store.volumes, Protocol.NONE, mesh8, progress=False
    )
    volumes, infos = _batches(store, mesh8, 8)[0]
    scores = scorer.score(volumes)
    assert scores.anomaly_map.sharding == mesh_lib.batch_sharded(mesh8)
    placed = np.asarray(scores.anomaly_map)
    expected = lifting.summarise(scores.anomaly_map, None, volumes)
    for field in ("slice_score", "volume_score"):
        one, other = getattr(scores, field), getattr(expected, field)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-8)
    assert not placed[len(infos) :].any()  # padded rows
    for row, info in enumerate(infos):
        one = geometry.to_grid(_native_map(row), NATIVE, (32, 32, info.depth))
        np.testing.assert_array_equal(placed[row, : info.depth], one)
        assert not placed[row, info.depth :].any()
        brain = np.asarray(volumes.mask)[row, : info.depth, ..., 0]
        mean = one[brain].mean(dtype=np.float64)
        assert float(scores.volume_score[row]) == pytest.approx(mean, abs=1e-6)


def test_a_scorer_of_some_volumes_knows_the_names_of_all(
    tmp_path: pathlib.Path, store: Store, mesh1: jax.sharding.Mesh
) -> None:
    _save(tmp_path / "sub-1_ses-2.nii", _native_map(), NATIVE.native_affine)
    infos = [_info(store, "sub-1")]
    with pytest.raises(ValueError, match="no map of 1 of 1 subjects: sub-1"):
        maps.scorer("tool", tmp_path, store, infos, Protocol.NONE, mesh1)


def test_a_tools_own_volume_scores_take_the_place_of_the_mean(
    tmp_path: pathlib.Path, store: Store, mesh1: jax.sharding.Mesh
) -> None:
    affine = NATIVE.native_affine
    for name in NAMES:
        _save(tmp_path / f"{name}.nii.gz", np.ones(NATIVE.native_shape, "f4"), affine)
    table = {name: {"volume_score": 0.1 + i} for i, name in enumerate(NAMES)}
    (tmp_path / "scores.json").write_text(json.dumps({**table, "stranger": {}}))
    scorer = maps.scorer(
        "tool", tmp_path, store, store.volumes, Protocol.NONE, mesh1, progress=False
    )
    found = _scored(scorer.score, store, mesh1, 2)
    for i, name in enumerate(NAMES):
        _, slices, whole = found[name]
        assert whole == np.float32(0.1 + i)
        assert slices.max() == pytest.approx(1.0)  # still the mean


def test_all_maps_that_cannot_be_used_are_listed_before_anything_is_scored(
    tmp_path: pathlib.Path, store: Store, mesh1: jax.sharding.Mesh
) -> None:
    affine, data = NATIVE.native_affine, _native_map()
    _save(tmp_path / "sub-1.nii.gz", data, affine)
    _save(tmp_path / "sub-10.nii.gz", np.where(data > 3, np.nan, data), affine)
    _save(tmp_path / "sub-1_ses-2.nii.gz", data[:-1], affine)
    (tmp_path / "sub-2.nii.gz").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"3 problem\(s\)") as error:
        maps.scorer(
            "tool", tmp_path, store, store.volumes, Protocol.NONE, mesh1, progress=False
        )
    text = str(error.value)
    for words in ("are NaN", f"shape {(69, 66, 16)}", "looks like HTML"):
        assert words in text
