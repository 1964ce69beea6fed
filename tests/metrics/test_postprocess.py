import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from uad_jax import mesh as mesh_lib
from uad_jax.metrics import postprocess as postprocess_lib
from uad_jax.metrics.postprocess import postprocess, remove_small_components
from uad_jax.metrics.protocols import Protocol

_SHAPE = (6, 28, 26)  # W // 25 = 1 iteration


def _brain(shape: tuple[int, int, int] = _SHAPE) -> np.ndarray:
    axes = [np.linspace(-1, 1, n) for n in shape]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    return (z / 1.3) ** 2 + y**2 + x**2 < 0.8


def _map(seed: int = 0, shape: tuple[int, ...] = _SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _run(
    scores: np.ndarray,
    mask: np.ndarray,
    protocol: Protocol = Protocol.BEHRENDT,
    valid: np.ndarray | None = None,
    image: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    valid = np.ones(scores.shape[:2], bool) if valid is None else valid
    image = _map(99, scores.shape) if image is None else image
    done, eroded = postprocess(
        jnp.asarray(scores), jnp.asarray(mask), jnp.asarray(valid), protocol, image
    )
    return np.asarray(done), np.asarray(eroded)


def _erode(mask: np.ndarray, iterations: int) -> np.ndarray:
    cross = scipy.ndimage.generate_binary_structure(2, 1)[None]
    return scipy.ndimage.binary_erosion(mask, cross, iterations)


def test_behrendt_is_erosion_then_median_of_scipy_for_a_residual() -> None:
    mask, scores = _brain(), np.abs(_map())
    eroded = _erode(mask, 1)
    scores[tuple(np.argwhere(eroded)[5])] = 0  # the least residual is 0
    expected = scipy.ndimage.median_filter(scores * eroded, size=5) * eroded
    found, found_mask = _run(scores[None], mask[None])
    np.testing.assert_array_equal(found_mask[0], eroded)
    np.testing.assert_array_equal(found[0], expected)
    assert found.dtype == np.float32


@pytest.mark.parametrize("constant", [-7.25, 0.0, 3.5])
@pytest.mark.parametrize(
    "protocol", [one for one in Protocol if one is not Protocol.BAUR]
)
def test_a_constant_map_stays_constant(constant: float, protocol: Protocol) -> None:
    scores = np.full((1, *_SHAPE), constant, np.float32)
    found, _ = _run(scores, _brain()[None], protocol)
    np.testing.assert_array_equal(found, scores)


def test_an_increasing_change_of_the_scores_changes_no_rank() -> None:
    mask, scores = _brain()[None], _map()[None]
    first, _ = _run(scores, mask)
    second, _ = _run(np.exp(scores) * 100 - 5000, mask)
    np.testing.assert_array_equal(np.exp(first) * 100 - 5000, second)


def test_outside_the_eroded_brain_ranks_lowest_with_negative_scores() -> None:
    found, eroded = _run(_map()[None] - 10, _brain()[None])
    assert found[~eroded].max() <= found[eroded].min()


@pytest.mark.parametrize("protocol", list(Protocol))
def test_padded_slices_and_volumes_change_nothing(protocol: Protocol) -> None:
    scores, mask = _map(), np.ones(_SHAPE, bool)
    image = _map(1)
    alone, alone_mask = _run(scores[None], mask[None], protocol, image=image[None])
    padded, images = (np.full((2, 9, *_SHAPE[1:]), 99, np.float32) for _ in range(2))
    padded[0, :6], images[0, :6], valid = scores, image, np.zeros((2, 9), bool)
    valid[0, :6] = True
    found, found_mask = _run(
        padded, np.ones(padded.shape, bool), protocol, valid, images
    )
    np.testing.assert_array_equal(found[0, :6], alone[0])
    np.testing.assert_array_equal(found_mask[0, :6], alone_mask[0])
    assert not found_mask[0, 6:].any()
    assert not found_mask[1].any()
    assert np.isfinite(found).all()


def test_fault_D5_nan_in_a_map_is_an_error() -> None:
    scores, mask = np.stack([_map()] * 3), np.stack([_brain()] * 3)
    scores[2, 3, 14, 13] = np.nan
    with pytest.raises(
        ValueError, match="1 NaN or infinite voxels, the first in row 2"
    ):
        _run(scores, mask)
    valid = np.ones(scores.shape[:2], bool)
    valid[2, 3:] = False  # in padding it is nobody's business
    _run(scores, mask, valid=valid)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"\[B, D, H, W\]"):
        _run(_map()[None], _brain())


@pytest.mark.parametrize("protocol", [Protocol.BEHRENDT, Protocol.BAUR])
def test_fault_D8_eight_devices_give_the_bits_of_one(
    mesh8: jax.sharding.Mesh, protocol: Protocol
) -> None:
    scores = np.stack([_map(seed) for seed in range(8)])
    mask = np.stack([_brain()] * 8)
    valid = np.ones((8, _SHAPE[0]), bool)
    valid[6, 4:] = valid[7] = False
    image = _map(9, scores.shape)
    expected, expected_mask = _run(scores, mask, protocol, valid, image)
    *sharded, image = jax.device_put(
        (scores, mask, valid, image), mesh_lib.batch_sharded(mesh8)
    )
    found, found_mask = postprocess(*sharded, protocol, image)
    assert found.sharding.is_equivalent_to(mesh_lib.batch_sharded(mesh8), 4)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(found_mask, expected_mask)
    compiled = jax.jit(postprocess_lib.postprocess_jit, static_argnums=3).lower(
        *sharded, protocol, image
    )
    program = compiled.compile().as_text()
    assert "all-gather" not in program  # every device filters its own volumes
    assert "all-reduce" not in program


def test_fault_D12_components_join_over_corners_and_seven_voxels_are_dropped() -> None:
    binary = np.zeros((12, 12, 12), bool)
    for n in range(8):
        binary[n, n, n] = True  # 8 voxels that touch by corners only
    binary[11, 0, :7] = True  # 7 voxels in a row
    found = remove_small_components(binary)
    assert found.sum() == 8
    assert found[0, 0, 0]
    assert remove_small_components(binary, 8).sum() == 0
    np.testing.assert_array_equal(remove_small_components(binary, 0), binary)


def test_small_components_equal_those_of_scipy() -> None:
    binary = np.random.default_rng(2).random((10, 14, 12)) < 0.08
    labels, _ = scipy.ndimage.label(binary, np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel())
    expected = binary & (sizes[labels] > 7)
    np.testing.assert_array_equal(remove_small_components(binary), expected)


def test_predict_is_strictly_above_and_inside_the_brain() -> None:
    scores = np.zeros((1, 4, 8), np.float32)
    scores[0, :, :4], scores[0, 0, 4] = 0.5, 0.6
    eroded = np.ones(scores.shape, bool)
    predict = postprocess_lib.predict
    assert predict(scores, eroded, 0.5, Protocol.NONE).sum() == 1
    assert predict(scores, eroded, 0.5).sum() == 0  # a component of one voxel
    assert predict(scores, eroded, 0.4).sum() == 17
    eroded[0, 0] = False
    assert predict(scores, eroded, 0.4).sum() == 12
