import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import skimage.metrics

from uad_jax.ops import residuals
from uad_jax.ops.residuals import Residual

SHAPE = (2, 12, 16, 14, 2)
_map = jax.jit(residuals.anomaly_map, static_argnums=0)


def _pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    smooth = scipy.ndimage.gaussian_filter(rng.normal(size=SHAPE), (0, 1, 1, 1, 0))
    x = np.clip(2 * smooth + 0.4, 0, 1)
    y = x + 0.1 * rng.normal(size=SHAPE)
    return x.astype(np.float32), y.astype(np.float32)


def _scikit(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Similarity map of one channel of one volume in double precision."""
    return skimage.metrics.structural_similarity(
        x.astype(np.float64),
        y.astype(np.float64),
        data_range=max(np.ptp(x), np.ptp(y)),
        gaussian_weights=True,
        sigma=1.0,
        use_sample_covariance=False,
        full=True,
    )[1]


def test_pixelwise_residuals_by_hand() -> None:
    x = jnp.array([0.5, 0.2]).reshape(1, 1, 1, 1, 2)
    y = jnp.array([0.1, 0.4]).reshape(1, 1, 1, 1, 2)
    valid = jnp.ones((1, 1), bool)
    for kind, expected in (
        (Residual.ABS, (0.4 + 0.2) / 2),
        (Residual.POSITIVE, 0.4 / 2),
        (Residual.SQUARED, (0.16 + 0.04) / 2),
    ):
        np.testing.assert_allclose(_map(kind, x, y, valid), [[[[expected]]]], rtol=1e-6)


def test_ssim_residual_equals_scikit_image_per_volume_and_channel() -> None:
    x, y = _pair()
    found = _map(Residual.SSIM, x, y, np.ones(SHAPE[:2], bool))
    for n in range(SHAPE[0]):
        similar = [_scikit(x[n, ..., c], y[n, ..., c]) for c in range(SHAPE[-1])]
        np.testing.assert_allclose(found[n], 1 - np.mean(similar, 0), atol=1e-4)


@pytest.mark.parametrize("depth", [9, 10])
def test_ssim_residual_ends_at_the_last_valid_slice(depth: int) -> None:
    x, y = (np.array(volume[..., :1]) for volume in _pair())
    valid = np.ones(SHAPE[:2], bool)
    valid[1, depth:] = False
    x[1, depth:], y[1, depth:] = 50.0, -50.0
    found = _map(Residual.SSIM, x, y, valid)
    expected = 1 - _scikit(x[1, :depth, ..., 0], y[1, :depth, ..., 0])
    np.testing.assert_allclose(found[1, :depth], expected, atol=2e-4)


def test_ssim_residual_of_one_slice_is_that_of_images() -> None:
    x, y = (volume[:, :1, ..., :1] for volume in _pair())
    found = _map(Residual.SSIM, x, y, np.ones((2, 1), bool))
    expected = 1 - _scikit(x[0, 0, ..., 0], y[0, 0, ..., 0])
    np.testing.assert_allclose(found[0, 0], expected, atol=1e-4)


def test_empty_and_padded_volumes_have_finite_ssim_residuals() -> None:
    x = np.zeros(SHAPE, np.float32)
    valid = np.ones(SHAPE[:2], bool)
    valid[1] = False
    np.testing.assert_allclose(_map(Residual.SSIM, x, x, valid), 0, atol=1e-6)
    assert np.isfinite(_map(Residual.SSIM, x, x + np.float32(1e-3), valid)).all()
