import dataclasses
import json
import pathlib

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from uad_jax.data import geometry, nifti, normalise, preprocess, recipes

GRID = preprocess.RECIPES["grid2mm"]
TINY = dataclasses.replace(GRID, name="tiny", grid=(16, 18, 14))
SMALL_BEHRENDT = dataclasses.replace(
    preprocess.RECIPES["behrendt"], grid=(16, 16, 12), working_grid=(32, 32, 24)
)


def _head(shape: tuple[int, int, int], radii: tuple[float, ...]) -> np.ndarray:
    """An ellipsoid brain with a marker that tells right, anterior and superior."""
    rng = np.random.default_rng(0)
    grid = np.indices(shape).astype(float)
    centre = (np.array(shape) - 1) / 2
    unit = [(grid[k] - centre[k]) / radii[k] for k in range(3)]
    brain = sum(axis**2 for axis in unit) <= 1
    texture = ndimage.gaussian_filter(rng.normal(size=shape), 1.0) * 40
    image = 400 + 100 * unit[0] + 50 * unit[1] + 25 * unit[2] + texture
    return np.where(brain, image, 0).astype(np.float32)


def _scan(
    folder: pathlib.Path,
    data: np.ndarray,
    affine: np.ndarray | None = None,
    name: str = "a.nii.gz",
) -> nifti.Scan:
    affine = np.diag([2.0, 2, 2, 1]) if affine is None else affine
    nib.save(nib.Nifti1Image(data, affine), folder / name)
    return nifti.read_image(folder / name)


def _naive_flow(image: np.ndarray) -> np.ndarray:
    """One curvature-flow step, voxel by voxel, as the formula reads."""
    padded = np.pad(image.astype(np.float64), 1, mode="edge")
    result = image.astype(np.float64).copy()
    unit = np.eye(3, dtype=int)
    for index in np.ndindex(image.shape):
        p = np.array(index) + 1

        def at(offset: np.ndarray, p: np.ndarray = p) -> float:
            return padded[tuple(p + offset)]

        d = [(at(u) - at(-u)) / 2 for u in unit]
        dd = [at(u) - 2 * at(0 * u) + at(-u) for u in unit]
        total = sum(slope**2 for slope in d)
        if total < 1e-9:
            continue
        speed = sum(d[i] ** 2 * (sum(dd) - dd[i]) for i in range(3))
        for i in range(3):
            for j in range(i + 1, 3):
                u, v = unit[i], unit[j]
                cross = (at(u + v) - at(u - v) - at(v - u) + at(-u - v)) / 4
                speed -= 2 * d[i] * d[j] * cross
        result[index] += 0.125 * speed / total
    return result


def _library_flow(image: np.ndarray) -> np.ndarray:
    """The same step from SciPy's correlations."""

    def along(volume: np.ndarray, weights: list[float], axis: int) -> np.ndarray:
        return ndimage.correlate1d(volume, weights, axis, mode="nearest")

    image = image.astype(np.float64)
    first = [along(image, [-0.5, 0, 0.5], k) for k in range(3)]
    second = [along(image, [1, -2, 1], k) for k in range(3)]
    total = sum(slope**2 for slope in first)
    speed = sum(first[k] ** 2 * (sum(second) - second[k]) for k in range(3))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        mixed = along(first[i], [-0.5, 0, 0.5], j)
        speed = speed - 2 * first[i] * first[j] * mixed
    return image + np.where(total < 1e-9, 0, 0.125 * speed / np.maximum(total, 1e-9))


def test_curvature_flow_equals_the_formula_voxel_by_voxel() -> None:
    image = _head((11, 9, 8), (5, 4, 3.5))
    np.testing.assert_allclose(_naive_flow(image), _library_flow(image), rtol=1e-9)
    expected = image
    for _ in range(3):
        expected = _library_flow(expected)
    result = normalise.curvature_flow(image, 3)
    np.testing.assert_allclose(result, expected, rtol=2e-6, atol=2e-4)
    assert result.dtype == np.float32


def test_curvature_flow_keeps_planes_and_smooths_noise() -> None:
    plane = np.indices((6, 6, 6)).sum(0).astype(np.float32)
    flat = normalise.curvature_flow(plane, 1)[1:-1, 1:-1, 1:-1]
    np.testing.assert_allclose(flat, plane[1:-1, 1:-1, 1:-1], atol=1e-6)
    noise = np.random.default_rng(0).normal(size=(12, 12, 12)).astype(np.float32)
    assert normalise.curvature_flow(noise, 3).std() < 0.7 * noise.std()


def _naive_behrendt(
    image: np.ndarray, brain: np.ndarray, working: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Spec A4 on a 1 mm image cut to its brain, with library calls only."""
    for _ in range(3):
        image = _library_flow(image)

    def crop_or_pad(volume: np.ndarray) -> np.ndarray:
        for axis, target in enumerate(working):
            difference = volume.shape[axis] - target
            large, small = (abs(difference) + 1) // 2, abs(difference) // 2
            if difference > 0:
                keep = np.arange(large, volume.shape[axis] - small)
                volume = np.take(volume, keep, axis)
            else:
                pads = [(0, 0)] * 3
                pads[axis] = (large, small)
                volume = np.pad(volume, pads)
        return volume

    image, brain = crop_or_pad(image), crop_or_pad(brain)
    low, high = np.percentile(image[brain], (1, 99))
    image = np.clip(image, low, high)
    image = (image - image.min()) / (image.max() - image.min())
    points = np.meshgrid(*(np.arange(0.5, n, 2) for n in working), indexing="ij")
    resampled = ndimage.map_coordinates(image, points, order=3, mode="mirror")
    return resampled, brain[1::2, 1::2, 1::2]


@pytest.mark.parametrize("shape", [(27, 35, 25), (24, 33, 22)])
def test_behrendt_equals_the_published_steps(
    tmp_path: pathlib.Path, shape: tuple[int, int, int]
) -> None:
    image = _head(shape, tuple((n - 3) / 2 for n in shape))
    brain = image != 0
    lesion = np.zeros(shape, np.float32)
    lesion[10:16, 12:19, 9:14] = 1
    scan = _scan(tmp_path, image, np.eye(4))
    marked = _scan(tmp_path, lesion, np.eye(4), "lesion.nii.gz")
    prepared = preprocess.apply(SMALL_BEHRENDT, {"t1": scan}, lesion=marked)
    low, high = geometry.bounding_box(brain)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    expected, labels = _naive_behrendt(image[box], brain[box], (32, 32, 24))
    np.testing.assert_allclose(
        prepared.image[..., 0], expected.transpose(2, 0, 1), atol=5e-6
    )
    np.testing.assert_array_equal(prepared.brain, labels.transpose(2, 0, 1))
    _, marks = _naive_behrendt(image[box], lesion[box] > 0, (32, 32, 24))
    np.testing.assert_array_equal(prepared.lesion, marks.transpose(2, 0, 1))
    assert prepared.image.dtype == np.float32


def test_behrendt_resamples_to_one_millimetre(tmp_path: pathlib.Path) -> None:
    coarse = _scan(tmp_path, _head((14, 16, 12), (6, 7, 5)))
    prepared = preprocess.apply(SMALL_BEHRENDT, {"t1": coarse})
    # 2 mm samples at half-way points of 2 mm voxels split in two: about the input.
    assert prepared.brain.sum() == pytest.approx((coarse.data != 0).sum(), rel=0.1)
    spaces = prepared.geometry.native_affine @ prepared.geometry.grid_to_native
    np.testing.assert_allclose(np.diag(spaces)[:3], 2.0)


def test_baur_scales_by_the_volume_and_takes_110_slices(
    tmp_path: pathlib.Path,
) -> None:
    recipe = preprocess.RECIPES["baur"]
    image = _head((60, 70, 60), (28, 33, 28))
    prepared = preprocess.apply(recipe, {"flair": _scan(tmp_path, image)})
    assert prepared.image.shape == (110, 128, 128, 1)
    values = np.zeros(240 * 240 * 155, np.float32)
    fine = np.repeat(image[image != 0], 8)
    values[: fine.size] = fine
    scale = np.percentile(values, 99.8)
    middle = prepared.image[57, 64, 64, 0]
    centre = image[29:31, 34:36, 29:31].mean() / scale
    assert middle == pytest.approx(centre, abs=0.03)


def test_scale_by_maximum_by_hand() -> None:
    image = np.arange(-1.0, 1000.0).astype(np.float32)
    scaled = normalise.scale_by_maximum(image)
    high = np.percentile(image, 99.8)
    assert not normalise.scale_by_maximum(-image - 1).any()
    np.testing.assert_allclose(scaled, np.clip(image, 0, high) / high, rtol=1e-6)


def test_grid2mm_only_shifts_an_image_that_is_already_2_mm(
    tmp_path: pathlib.Path,
) -> None:
    image = np.zeros((20, 20, 20), np.float32)
    image[1:14, 2:17, 5:15] = _head((13, 15, 10), (6.5, 7.5, 5))
    prepared = preprocess.apply(TINY, {"t1": _scan(tmp_path, image)})
    assert prepared.image.shape == (14, 16, 18, 1)
    brain = image != 0
    low, high = np.percentile(image[brain], (1, 99))
    expected = np.where(brain, np.clip((image - low) / (high - low), 0, 1), 0)
    back = geometry.to_native(prepared.image[..., 0], prepared.geometry)
    np.testing.assert_allclose(back, expected, atol=1e-6)
    shift = prepared.geometry.grid_to_native[:3, 3]
    np.testing.assert_array_equal(shift, np.rint(shift))
    assert prepared.notes == []


@pytest.mark.parametrize("name", list(preprocess.RECIPES))
def test_the_brain_lies_in_the_middle_whatever_the_world_origin(
    tmp_path: pathlib.Path, name: str
) -> None:
    shape = (60, 74, 62)
    image = np.zeros((80, 80, 80), np.float32)
    image[3:63, 1:75, 15:77] = _head(shape, (29.5, 36, 30.5))
    affine = np.diag([-2.0, -2, 2, 1])
    affine[:3, 3] = 5000, -800, 300
    stored = np.ascontiguousarray(image[::-1, ::-1])  # the file is LPS
    prepared = preprocess.apply(
        preprocess.RECIPES[name], {"t1": _scan(tmp_path, stored, affine)}
    )
    for axis, count in enumerate(prepared.brain.shape):
        others = tuple(k for k in range(3) if k != axis)
        profile = np.flatnonzero(prepared.brain.any(others))
        allowed = 6 if name == "baur" and axis == 0 else 2
        assert abs(profile[0] + profile[-1] - (count - 1)) <= allowed
    assert prepared.brain.mean() > 0.15
    # Right is brighter than left, front than back, top than bottom.
    centred = np.indices(prepared.brain.shape)[:, prepared.brain].T
    design = np.c_[centred - centred.mean(0), np.ones(len(centred))]
    fit = np.linalg.lstsq(design, prepared.image[prepared.brain, 0])
    up, right, front = fit[0][:3] * np.array(prepared.geometry.native_shape)[[2, 0, 1]]
    if name == "behrendt_lps":
        right, front = -right, -front
    assert right > front > up > 0
    back = geometry.to_native(prepared.image[..., 0], prepared.geometry)
    inside = (back > 0.05) & (stored > 0)
    assert np.corrcoef(back[inside], stored[inside])[0, 1] > 0.8


@pytest.mark.parametrize("codes", ["RAS", "PIR", "SAL", "ILA", "ASL"])
@pytest.mark.parametrize("recipe", [TINY, SMALL_BEHRENDT])
def test_permuted_storage_changes_nothing_and_is_restored(
    tmp_path: pathlib.Path, codes: str, recipe: preprocess.Recipe
) -> None:
    image = _head((14, 16, 12), (6, 7, 5))
    lesion = np.zeros_like(image)
    lesion[4:6, 10:13, 5:7] = 1
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)
    )
    scans = []
    for name, data in (("a", image), ("m", lesion)):
        nib.save(
            nib.Nifti1Image(data, np.diag([2.0, 2, 2, 1])).as_reoriented(turn),
            tmp_path / f"{name}.nii.gz",
        )
        scans.append(nifti.read_image(tmp_path / f"{name}.nii.gz"))
    straight = preprocess.apply(
        recipe,
        {"t1": _scan(tmp_path, image, name="s.nii.gz")},
        lesion=_scan(tmp_path, lesion, name="t.nii.gz"),
    )
    turned = preprocess.apply(recipe, {"t1": scans[0]}, lesion=scans[1])
    np.testing.assert_allclose(turned.image, straight.image, atol=1e-6)
    back = geometry.to_native(turned.lesion, turned.geometry)
    stored = nib.load(tmp_path / "m.nii.gz").get_fdata() > 0
    if recipe is TINY:
        np.testing.assert_array_equal(back, stored)
    overlap = 2 * np.count_nonzero(back & stored) / (back.sum() + stored.sum())
    assert overlap > 0.5


def test_grid2mm_averages_a_1_mm_scan(tmp_path: pathlib.Path) -> None:
    image = _head((28, 30, 24), (13, 14, 11))
    noisy = image + np.where(
        image != 0, np.random.default_rng(1).normal(0, 40, image.shape), 0
    )
    clean, rough = (
        preprocess.apply(TINY, {"t1": _scan(tmp_path, data, np.eye(4))})
        for data in (image, noisy.astype(np.float32))
    )
    np.testing.assert_array_equal(clean.brain, rough.brain)
    scale = np.ptp(np.percentile(image[image != 0], (1, 99)))
    error = (clean.image - rough.image)[clean.brain].std()
    assert error < 0.6 * 40 / scale
    assert not clean.image[~clean.brain].any()
    assert clean.brain.sum() == pytest.approx((image != 0).sum() / 8, rel=0.05)


def test_modalities_share_grid_and_brain(tmp_path: pathlib.Path) -> None:
    t1 = _head((14, 16, 12), (6, 7, 5))
    flair = np.where(t1 != 0, 900 - t1, 0)
    flair[7, 8, 6] = 0
    prepared = preprocess.apply(
        TINY,
        {
            "t1": _scan(tmp_path, t1),
            "flair": _scan(tmp_path, flair, name="b.nii.gz"),
        },
    )
    assert prepared.image.shape == (14, 16, 18, 2)
    assert prepared.brain.sum() == (t1 != 0).sum()
    inside = prepared.image[prepared.brain]
    assert np.corrcoef(inside.T)[0, 1] < -0.95


def test_the_given_brain_mask_strips_the_image(tmp_path: pathlib.Path) -> None:
    image = _head((14, 16, 12), (6, 7, 5))
    skull = np.where(image == 0, 1000, image).astype(np.float32)
    brain = _scan(tmp_path, (image != 0).astype(np.uint8), name="m.nii.gz")
    stripped = preprocess.apply(TINY, {"t1": _scan(tmp_path, image)})
    masked = preprocess.apply(TINY, {"t1": _scan(tmp_path, skull)}, brain=brain)
    np.testing.assert_array_equal(stripped.image, masked.image)
    with pytest.raises(nifti.BadVoxels, match="not skull-stripped"):
        preprocess.apply(TINY, {"t1": _scan(tmp_path, skull)})


def test_negative_intensities_keep_a_dark_background(tmp_path: pathlib.Path) -> None:
    image = _head((14, 16, 12), (6, 7, 5))
    scored = np.where(image != 0, (image - 400) / 50, 0).astype(np.float32)
    plain = preprocess.apply(SMALL_BEHRENDT, {"t1": _scan(tmp_path, image)})
    shifted = preprocess.apply(SMALL_BEHRENDT, {"t1": _scan(tmp_path, scored)})
    assert "shifted up" in shifted.notes[0]
    outside = ~ndimage.binary_dilation(shifted.brain, iterations=4)
    assert np.abs(shifted.image[outside]).max() < 0.02
    inside = ndimage.binary_erosion(plain.brain)
    both = np.corrcoef(plain.image[inside, 0], shifted.image[inside, 0])
    assert both[0, 1] > 0.98


@pytest.mark.parametrize("empty", ["image", "mask", "inside"])
def test_fault_B8_an_empty_brain_is_a_typed_error(
    tmp_path: pathlib.Path, empty: str
) -> None:
    image = _head((14, 16, 12), (6, 7, 5))
    brain = (image != 0).astype(np.uint8)
    if empty != "mask":
        image = image * 0
    else:
        brain = brain * 0
    scan = _scan(tmp_path, image)
    mask = _scan(tmp_path, brain, name="m.nii.gz")
    with pytest.raises(nifti.EmptyBrain, match=r"m\.nii|a\.nii"):
        preprocess.apply(TINY, {"t1": scan}, None if empty == "image" else mask)


@pytest.mark.parametrize("recipe", [TINY, SMALL_BEHRENDT])
def test_fault_B9_a_constant_image_becomes_zeros_with_a_note(
    tmp_path: pathlib.Path, recipe: preprocess.Recipe
) -> None:
    brain = _head((14, 16, 12), (6, 7, 5)) != 0
    scan = _scan(tmp_path, np.where(brain, np.float32(7), np.float32(0)))
    prepared = preprocess.apply(recipe, {"t1": scan})
    assert not prepared.image.any()
    assert "constant" in prepared.notes[0]


def test_fault_B29_mask_of_another_shape_is_an_error(tmp_path: pathlib.Path) -> None:
    image = _head((14, 16, 12), (6, 7, 5))
    scan = _scan(tmp_path, image)
    mask = _scan(tmp_path, (image[1:] != 0).astype(np.uint8), name="m.nii.gz")
    for masks in ({"brain": mask}, {"lesion": mask}):
        with pytest.raises(nifti.GridMismatch, match=r"13, 16, 12.*14, 16, 12"):
            preprocess.apply(TINY, {"t1": scan}, **masks)


def test_fault_B30_mask_of_another_affine_is_an_error_unless_ignored(
    tmp_path: pathlib.Path,
) -> None:
    image = _head((14, 16, 12), (6, 7, 5))
    scan = _scan(tmp_path, image, np.diag([-2.0, -2, 2, 1]))
    lesion = np.zeros_like(image)
    lesion[3:5, 8, 6] = 1
    mask = _scan(tmp_path, lesion, name="m.nii.gz")
    with pytest.raises(nifti.GridMismatch, match="--ignore_affine"):
        preprocess.apply(TINY, {"t1": scan}, lesion=mask)
    prepared = preprocess.apply(TINY, {"t1": scan}, lesion=mask, ignore_affine=True)
    back = geometry.to_native(prepared.lesion, prepared.geometry)
    np.testing.assert_array_equal(back, lesion > 0)


def test_fault_B33_lesion_outside_the_brain_is_reported(
    tmp_path: pathlib.Path,
) -> None:
    image = _head((14, 16, 12), (6, 7, 5))
    lesion = np.zeros_like(image)
    lesion[7, 8, 6] = lesion[0, 0, 0] = 1
    mask = _scan(tmp_path, lesion, name="m.nii.gz")
    prepared = preprocess.apply(TINY, {"t1": _scan(tmp_path, image)}, lesion=mask)
    assert "50.00% of the lesion lies outside the brain mask." in prepared.notes


def test_a_mask_that_vanishes_on_the_grid_is_told(tmp_path: pathlib.Path) -> None:
    image = _head((28, 30, 24), (13, 14, 11))
    scan = _scan(tmp_path, image, np.eye(4))
    dot = np.zeros_like(image)
    dot[13, 15, 12] = 1
    mask = _scan(tmp_path, dot, np.eye(4), "m.nii.gz")
    prepared = preprocess.apply(TINY, {"t1": scan}, lesion=mask)
    assert "No lesion voxel is left on the grid." in prepared.notes
    line = np.zeros_like(image)
    line[12:16, 15, 12] = 1
    mask = _scan(tmp_path, line, np.eye(4), "m.nii.gz")
    with pytest.raises(nifti.EmptyBrain, match="no brain voxel is left"):
        preprocess.apply(TINY, {"t1": scan}, brain=mask)


def test_fault_B36_cropping_is_noted_and_too_much_is_an_error(
    tmp_path: pathlib.Path,
) -> None:
    scan = _scan(tmp_path, _head((26, 18, 14), (12.5, 8.5, 6.5)))
    with pytest.raises(nifti.NiftiError, match="of the brain falls outside the tiny"):
        preprocess.apply(TINY, {"t1": scan})
    lenient = dataclasses.replace(TINY, max_cropped=0.5)
    prepared = preprocess.apply(lenient, {"t1": scan})
    before, after = (scan.data != 0).sum(), prepared.brain.sum()
    assert f"{1 - after / before:.2%} of the brain" in prepared.notes[0]


def test_fault_B36_a_scan_smaller_than_the_grid_is_padded_with_a_note(
    tmp_path: pathlib.Path,
) -> None:
    scan = _scan(tmp_path, _head((14, 16, 6), (6, 7, 2.4)))
    prepared = preprocess.apply(TINY, {"t1": scan})
    assert prepared.image.shape == (14, 16, 18, 1)
    assert "only part of the grid along z" in prepared.notes[0]


def test_turned_slices_are_the_same_slices(tmp_path: pathlib.Path) -> None:
    recipe = dataclasses.replace(SMALL_BEHRENDT, turned=True)
    scan = _scan(tmp_path, _head((20, 24, 16), (9, 11, 7.4)))
    straight = preprocess.apply(SMALL_BEHRENDT, {"t1": scan})
    turned = preprocess.apply(recipe, {"t1": scan})
    np.testing.assert_array_equal(turned.image[:, ::-1, ::-1], straight.image)
    np.testing.assert_array_equal(turned.brain[:, ::-1, ::-1], straight.brain)
    expected = geometry.to_native(straight.image[..., 0], straight.geometry)
    back = geometry.to_native(turned.image[..., 0], turned.geometry)
    np.testing.assert_allclose(back, expected, atol=1e-5)
    assert expected.max() > 0.5


def test_recipes_of_earlier_stores_keep_their_hashes() -> None:
    known = {
        "grid2mm": "960f6df0e7799f0e",
        "behrendt": "c083f2c2cd2cee5f",
        "baur": "37c7a08a6aa439eb",
    }
    for name, expected in known.items():
        assert preprocess.recipe_hash(preprocess.RECIPES[name]) == expected


def test_recipe_hash_changes_with_every_field() -> None:
    hashes = {preprocess.recipe_hash(recipe) for recipe in preprocess.RECIPES.values()}
    assert len(hashes) == 4
    hashes.add(preprocess.recipe_hash(dataclasses.replace(GRID, order=3)))
    hashes.add(preprocess.recipe_hash(dataclasses.replace(GRID, max_cropped=0.1)))
    assert len(hashes) == 6
    again = dataclasses.replace(GRID)
    assert preprocess.recipe_hash(again) == preprocess.recipe_hash(GRID)


def test_no_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one modality"):
        preprocess.apply(GRID, {})


@pytest.mark.parametrize("name", preprocess.RECIPES)
def test_a_recipe_comes_back_from_json(name: str) -> None:
    recipe = preprocess.RECIPES[name]
    stored = json.loads(json.dumps(recipes.to_json(recipe)))
    assert recipes.from_json(stored) == recipe


def test_a_recipe_of_another_version_is_refused() -> None:
    stored = recipes.to_json(preprocess.RECIPES["grid2mm"])
    with pytest.raises(ValueError, match=r"'grid2mm' has the fields .*not made by"):
        recipes.from_json({**stored, "sharpen": 1})
