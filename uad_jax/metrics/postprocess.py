"""From raw anomaly maps to the maps that are measured.

Voxels outside the eroded brain take the lowest score that their volume has inside
it, both while the median is taken and after it. Behrendt et al. write 0 there,
which is the lowest score of a residual; the lowest score itself serves every method:
a constant map stays constant, and adding a constant to a map, or any other
increasing change, changes nothing in the ranking. (A protocol with a prior compares
with the image, and writes 0 unless scores are negative.) A prediction never includes a
voxel outside the eroded brain (`predict`).
"""

import cc3d
import jax
import jax.numpy as jnp
import numpy as np

from uad_jax.metrics import protocols
from uad_jax.metrics.protocols import Erosion, Median, Protocol, Steps
from uad_jax.ops import filters

_BRAIN_SHARE = 0.95  # of the square around a pixel, Kascenas et al.


def postprocess(
    anomaly_map: jax.Array,
    mask: jax.Array,
    valid: jax.Array,
    protocol: Protocol,
    image: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Filters anomaly maps on their device, by the steps of a protocol.

    The brain mask of every axial slice is eroded, what lies outside takes the volume's
    lowest score; with a prior it takes 0, if no score is lower, and so do voxels below
    the prior's quantile. The median is taken, and the outside set again. Thresholds
    and the removal of small components (`predict`) follow on the host. What comes
    before is in `keep_positive`.

    Deviations from the published codes, all at the border of the brain: there the
    median may carry scores to voxels just outside the eroded brain; here these rank
    lowest. There a hole of one pixel in the mask may be scored (KASCENAS); here only
    brain is.

    Args:
      anomaly_map: [B, D, H, W] float32, finite, higher = more abnormal; may be
        sharded on axis 0.
      mask: Brain mask, [B, D, H, W] bool.
      valid: False on padding, [B, D] bool; the valid slices of a volume come first.
        Padding changes nothing: the median ends at the last valid slice.
      protocol: What to do.
      image: What was scored, [B, D, H, W] float32, for a protocol with a prior; of
        several channels the first.

    Returns:
      The filtered map, [B, D, H, W] float32, and the eroded brain mask,
      [B, D, H, W] bool; sharded like the input.

    Raises:
      ValueError: If a valid slice holds NaN or infinity, or the shapes do not fit, or
        the image is missing.
    """
    if protocols.steps(protocol).prior is None:
        image = None
    elif image is None:
        raise ValueError(
            f"The protocol {protocol.value} compares the image with its own quantile, "
            "and there is no image. Pass it beside the map."
        )
    _check_shapes(anomaly_map, mask, valid, image)
    _check_finite(anomaly_map, valid)
    return _on_device(anomaly_map, mask, valid, protocol, image)


def postprocess_jit(
    anomaly_map: jax.Array,
    mask: jax.Array,
    valid: jax.Array,
    protocol: Protocol,
    image: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Does what `postprocess` does as pure jnp, for use inside jit; checks nothing."""
    steps = protocols.steps(protocol)
    brain = _eroded(mask & valid[:, :, None, None], steps)
    scores = anomaly_map.astype(jnp.float32)
    floor = _lowest(scores, brain)
    if steps.prior is not None:
        floor = jnp.minimum(floor, 0.0)  # one for all volumes, see `keep_positive`
    scores = jnp.where(brain, scores, floor)
    if steps.prior is not None:
        assert image is not None
        bright = jax.vmap(_bright, (0, 0, 0, None))(image, mask, valid, steps)
        scores = jnp.where(bright, scores, floor)
    if steps.median is Median.CUBE:
        scores = jax.vmap(filters.median5)(scores, jnp.sum(valid, axis=1))
    elif steps.median is Median.SQUARE:
        scores = jax.vmap(filters.median5_slices)(scores)
    return jnp.where(brain, scores, floor), brain


def _eroded(brain: jax.Array, steps: Steps) -> jax.Array:
    pixels = steps.erosion_pixels(*brain.shape[-2:])
    if steps.erosion is Erosion.CROSS:
        return filters.erode_slices(brain, pixels)
    if steps.erosion is Erosion.SQUARE:
        return filters.erode_slices_by_share(brain, pixels, _BRAIN_SHARE)
    return brain


def _lowest(scores: jax.Array, brain: jax.Array) -> jax.Array:
    """The lowest score inside each brain, [B, 1, 1, 1]; 0 without any brain."""
    inside = jnp.where(brain, scores, jnp.inf)
    floor = jnp.min(inside, axis=(1, 2, 3), keepdims=True)
    return jnp.where(jnp.isfinite(floor), floor, 0.0)


def _bright(
    image: jax.Array, mask: jax.Array, valid: jax.Array, steps: Steps
) -> jax.Array:
    """Voxels of [D, H, W] not below the prior's quantile of the skull-stripped box.

    The quantile between two sorted values (linear, as in NumPy) lies above the lower
    one, so that not to be below it is to reach the upper one: no arithmetic, no
    rounding.
    """
    prior = steps.prior
    assert prior is not None
    keep = jnp.broadcast_to(valid[:, None, None], image.shape)
    stripped = jnp.where(mask & keep, image.astype(jnp.float32), 0.0)
    last = jnp.sum(valid, dtype=jnp.int32) * (image.shape[1] * image.shape[2]) - 1
    rank = -(-last * prior.numerator // prior.denominator)
    cut = filters.order_statistic(stripped, jnp.maximum(rank, 0), keep)
    return stripped >= cut


@jax.jit
def keep_positive(
    anomaly_map: jax.Array,
    image: jax.Array,
    reconstruction: jax.Array,
    mask: jax.Array,
    valid: jax.Array,
) -> jax.Array:
    """Makes voxels that are not brighter than their reconstruction the least abnormal.

    They get 0, or the lowest score of the volume if that is below 0: of the map
    |x - reconstruction| this leaves max(x - reconstruction, 0). A positive residual
    stays as it is, the brighter voxels keep their scores, whatever the map. Most
    voxels end at this score, also those of the prior. It is one for all volumes, since
    a threshold may fall on it: were it each volume's own, a volume whose lowest score
    lies a little higher would be found as a whole.

    Args:
      anomaly_map: [B, D, H, W] float32.
      image: [B, D, H, W, C] float32.
      reconstruction: Likewise. Of several channels the mean difference counts.
      mask: Brain mask, [B, D, H, W] bool.
      valid: False on padding, [B, D] bool.

    Returns:
      [B, D, H, W] float32.
    """
    scores = anomaly_map.astype(jnp.float32)
    brighter = jnp.mean(image - reconstruction, axis=-1) > 0
    floor = jnp.minimum(_lowest(scores, mask & valid[:, :, None, None]), 0.0)
    bad = ~jnp.isfinite(scores)  # `postprocess` shall find it
    return jnp.where(brighter | bad, scores, floor)


_on_device = jax.jit(postprocess_jit, static_argnums=3)


def _check_shapes(
    anomaly_map: jax.Array,
    mask: jax.Array,
    valid: jax.Array,
    image: jax.Array | None,
) -> None:
    shape = anomaly_map.shape
    others = [mask.shape] if image is None else [mask.shape, image.shape]
    if len(shape) != 4 or set(others) != {shape} or valid.shape != shape[:2]:
        found = " and ".join(map(str, [shape, *others, valid.shape]))
        raise ValueError(
            "Expected a map, a mask, an image where the protocol needs one, all "
            f"[B, D, H, W], and valid [B, D], found {found}."
        )


@jax.jit
def _count_bad(anomaly_map: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    bad = ~jnp.isfinite(anomaly_map) & valid[:, :, None, None]
    rows = jnp.sum(bad, axis=(1, 2, 3))
    return jnp.sum(rows), jnp.argmax(rows > 0)


def _check_finite(anomaly_map: jax.Array, valid: jax.Array) -> None:
    count, row = jax.device_get(_count_bad(anomaly_map, valid))
    if count:
        raise ValueError(
            f"The anomaly map holds {count} NaN or infinite voxels, the first in row "
            f"{row} of the batch. Scores must be finite; look for a division by zero "
            "in the method's score."
        )


def predict(
    anomaly_map: np.ndarray,
    eroded: np.ndarray,
    threshold: float,
    protocol: Protocol = Protocol.BEHRENDT,
) -> np.ndarray:
    """Segments one post-processed volume.

    Args:
      anomaly_map: [D, H, W] float32 from `postprocess`.
      eroded: [D, H, W] bool from `postprocess`.
      threshold: Scores strictly above it are abnormal.
      protocol: Says which components are too small: `Steps.drop_size`.

    Returns:
      [D, H, W] bool.
    """
    binary = (anomaly_map > np.float32(threshold)) & eroded
    return remove_small_components(binary, protocols.steps(protocol).drop_size)


def remove_small_components(binary: np.ndarray, max_size: int = 7) -> np.ndarray:
    """Drops the small 26-connected components.

    Behrendt et al.'s paper says fewer than 7 voxels; their code, like that of Baur et
    al. (7) and Kascenas et al. (20), drops so many or fewer of the filled component.
    This counts the component's own voxels: a hollow shell counts without its hole.

    Args:
      binary: [D, H, W] bool.
      max_size: Components of this many voxels or fewer are dropped.

    Returns:
      [D, H, W] bool.
    """
    binary = np.asarray(binary, bool)
    if max_size < 1 or not binary.any():
        return binary
    labels, _ = components(binary)
    sizes = np.bincount(labels.ravel())
    keep = sizes > max_size
    keep[0] = False
    return keep[labels]


def components(binary: np.ndarray) -> tuple[np.ndarray, int]:
    """Labels the 26-connected components: voxels join over faces, edges and corners.

    Args:
      binary: [D, H, W] bool.

    Returns:
      Labels [D, H, W] of an unsigned integer, 0 outside and 1 to n, and n.

    Raises:
      ValueError: If the array is not a volume.
    """
    if binary.ndim != 3:
        raise ValueError(f"Expected a volume [D, H, W], found {binary.shape}.")
    contiguous = np.ascontiguousarray(binary, bool)
    labels, number = cc3d.connected_components(
        contiguous, connectivity=26, return_N=True
    )
    return labels, int(number)
