"""From raw anomaly maps to the maps that are measured.

Voxels outside the eroded brain take the lowest score that their volume has inside
it, both while the median is taken and after it. Behrendt et al. write 0 there,
which is the lowest score of a residual; the lowest score itself serves every method:
a constant map stays constant, and adding a constant to a map, or any other
increasing change, changes nothing in the ranking. A prediction never includes a
voxel outside the eroded brain (`predict`).
"""

import enum

import cc3d
import jax
import jax.numpy as jnp
import numpy as np

from uad_jax.ops import filters

# Pixels of width for one iteration of erosion, as in Behrendt et al.'s code: 3 of 96.
_PIXELS_PER_EROSION = 25


class Protocol(enum.Enum):
    """Named post-processing and aggregation; never two in one table."""

    BEHRENDT = "behrendt"
    NONE = "none"


def erosion_iterations(width: int) -> int:
    """Iterations of erosion for slices of this width."""
    return width // _PIXELS_PER_EROSION


def postprocess(
    anomaly_map: jax.Array, mask: jax.Array, valid: jax.Array, protocol: Protocol
) -> tuple[jax.Array, jax.Array]:
    """Filters anomaly maps on their device.

    BEHRENDT erodes the brain mask of every axial slice (W // 25 iterations of the
    cross of 4 neighbours), sets what lies outside to the volume's lowest score, takes
    the 5 x 5 x 5 median and sets the outside again. Thresholds (`predict`) and the
    removal of small components (`remove_small_components`) follow on the host.
    NONE only sets the outside, and drops no components either.

    Deviation from the code of Behrendt et al.: there the median may carry scores to
    voxels just outside the eroded brain; here these rank lowest.

    Args:
      anomaly_map: [B, D, H, W] float32, finite, higher = more abnormal; may be
        sharded on axis 0.
      mask: Brain mask, [B, D, H, W] bool.
      valid: False on padding, [B, D] bool; the valid slices of a volume come first.
        Padding changes nothing: the median ends at the last valid slice.
      protocol: What to do.

    Returns:
      The filtered map, [B, D, H, W] float32, and the eroded brain mask,
      [B, D, H, W] bool; sharded like the input.

    Raises:
      ValueError: If a valid slice holds NaN or infinity, or the shapes do not fit.
    """
    _check_shapes(anomaly_map, mask, valid)
    _check_finite(anomaly_map, valid)
    return _on_device(anomaly_map, mask, valid, protocol)


def postprocess_jit(
    anomaly_map: jax.Array, mask: jax.Array, valid: jax.Array, protocol: Protocol
) -> tuple[jax.Array, jax.Array]:
    """Does what `postprocess` does as pure jnp, for use inside jit; checks nothing."""
    brain = mask & valid[:, :, None, None]
    if protocol is Protocol.BEHRENDT:
        brain = filters.erode_slices(brain, erosion_iterations(mask.shape[-1]))
    scores = anomaly_map.astype(jnp.float32)
    inside = jnp.where(brain, scores, jnp.inf)
    floor = jnp.min(inside, axis=(1, 2, 3), keepdims=True)
    floor = jnp.where(jnp.isfinite(floor), floor, 0.0)  # no brain at all
    scores = jnp.where(brain, scores, floor)
    if protocol is Protocol.BEHRENDT:
        scores = jax.vmap(filters.median5)(scores, jnp.sum(valid, axis=1))
    return jnp.where(brain, scores, floor), brain


_on_device = jax.jit(postprocess_jit, static_argnums=3)


def _check_shapes(anomaly_map: jax.Array, mask: jax.Array, valid: jax.Array) -> None:
    if (
        anomaly_map.ndim != 4
        or mask.shape != anomaly_map.shape
        or valid.shape != anomaly_map.shape[:2]
    ):
        raise ValueError(
            "Expected a map and a mask [B, D, H, W] and valid [B, D], found "
            f"{anomaly_map.shape}, {mask.shape} and {valid.shape}."
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
      protocol: BEHRENDT drops components of 7 voxels or fewer, NONE drops none.

    Returns:
      [D, H, W] bool.
    """
    binary = (anomaly_map > np.float32(threshold)) & eroded
    return binary if protocol is Protocol.NONE else remove_small_components(binary)


def remove_small_components(binary: np.ndarray, max_size: int = 7) -> np.ndarray:
    """Drops the small 26-connected components.

    Behrendt et al.'s paper says fewer than 7 voxels, their code 7 or fewer of the
    filled component; this drops 7 or fewer, counting the component's own voxels.

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
