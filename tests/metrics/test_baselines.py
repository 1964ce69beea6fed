import numpy as np
import pytest

from uad_jax.metrics import baselines

_SHAPE = (6, 8, 8)


def _pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mask = np.zeros(_SHAPE, bool)
    mask[1:5, 1:7, 1:7] = True
    image = (0.5 + 0.1 * rng.normal(size=_SHAPE)).astype(np.float32)
    return np.where(mask, image, 0).astype(np.float32), mask


@pytest.mark.parametrize("name", list(baselines.UNFITTED))
def test_baselines_keep_shape_and_are_zero_outside(name: str) -> None:
    image, mask = _pair(0)
    found = baselines.UNFITTED[name](image, mask)
    assert found.shape == _SHAPE
    assert found.dtype == np.float32
    assert (found[~mask] == 0).all()
    assert (found >= 0).all()
    empty = baselines.UNFITTED[name](image, np.zeros(_SHAPE, bool))
    assert (empty == 0).all()


def test_inverted_ranks_the_reverse_of_raw() -> None:
    image, mask = _pair(0)
    up = np.argsort(baselines.raw(image, mask)[mask])
    down = np.argsort(baselines.inverted(image, mask)[mask])
    np.testing.assert_array_equal(up, down[::-1])


def test_the_constant_map_is_constant() -> None:
    assert len(np.unique(baselines.constant(*_pair(0)))) == 1


def test_thresh_makes_the_histogram_flat_and_keeps_the_order() -> None:
    image, mask = _pair(1)
    skewed = np.where(mask, np.exp(5 * image), 0).astype(np.float32)
    found = baselines.thresh(skewed, mask)[mask]
    order = np.argsort(skewed[mask])
    assert (np.diff(found[order]) >= 0).all()
    assert found.max() == 1.0
    assert abs(np.median(found) - 0.5) < 0.05
    shifted = np.where(mask, skewed * 3 + 1, 0)
    np.testing.assert_allclose(baselines.thresh(shifted, mask)[mask], found, atol=0.02)


def test_atlas_without_smoothing_is_mean_and_sd() -> None:
    pairs = [_pair(seed) for seed in range(6)]
    atlas = baselines.fit_atlas(iter(pairs), sigma=1e-3)
    mask = pairs[0][1]
    stack = np.stack([image for image, _ in pairs])
    np.testing.assert_allclose(atlas.mean[mask], stack.mean(0)[mask], atol=1e-5)
    sd = stack.std(0, ddof=1)[mask]
    floor = 0.1 * np.median(sd)
    np.testing.assert_allclose(atlas.sd[mask], np.maximum(sd, floor), atol=1e-5)
    assert atlas.num_volumes == 6


def test_atlas_z_is_high_at_a_lesion_bright_or_dark() -> None:
    atlas = baselines.fit_atlas(_pair(seed) for seed in range(10))
    assert (atlas.sd > 0).all()
    for change in (0.6, -0.6):
        image, mask = _pair(99)
        image[2, 3, 3] += change
        z = baselines.atlas_z(atlas, image, mask)
        assert np.unravel_index(z.argmax(), _SHAPE) == (2, 3, 3)
        assert (z[~mask] == 0).all()
        assert z.dtype == np.float32


def test_atlas_counts_only_brain_voxels() -> None:
    pairs = [_pair(seed) for seed in range(4)]
    hidden = pairs[0][1].copy()
    hidden[2, 3, 3] = False
    wild = np.where(hidden, pairs[0][0], 1e6)
    atlas = baselines.fit_atlas([*pairs[1:], (wild, hidden)], sigma=1e-3)
    others = np.stack([image for image, _ in pairs[1:]])[:, 2, 3, 3]
    np.testing.assert_allclose(atlas.mean[2, 3, 3], others.mean(), atol=1e-5)
    assert np.isfinite(atlas.mean).all()


def test_atlas_needs_two_volumes_on_one_grid() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        baselines.fit_atlas([_pair(0)])
    atlas = baselines.fit_atlas([_pair(0), _pair(1)])
    with pytest.raises(ValueError, match="one recipe"):
        baselines.atlas_z(atlas, np.zeros((2, 2, 2)), np.ones((2, 2, 2), bool))
