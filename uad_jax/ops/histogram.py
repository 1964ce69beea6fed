"""Counts of scores between given edges, on the device."""

import jax
import jax.numpy as jnp


def bin_index(scores: jax.Array, edges: jax.Array) -> jax.Array:
    """Finds the bin of each score.

    Bin i holds edges[i - 1] < score <= edges[i]; bin 0 everything up to the first
    edge, the last bin everything above the last one. So `score > edges[i]` is exactly
    "in a bin above i".

    Args:
      scores: Any shape, float32.
      edges: Ascending, [K] float32.

    Returns:
      Bins in [0, K], int32, shape of `scores`.
    """
    return jnp.searchsorted(edges, scores, side="left").astype(jnp.int32)


def counts(
    scores: jax.Array, lesion: jax.Array, counted: jax.Array, edges: jax.Array
) -> jax.Array:
    """Counts normal and lesion voxels per bin, one histogram per volume.

    Volumes are counted each on its own, so a batch sharded on axis 0 needs no
    communication. A volume has far fewer voxels than int32 can count; totals over
    volumes belong into int64 on the host (`metrics.accumulators`).

    Args:
      scores: [B, ...] float32.
      lesion: Like `scores`, bool.
      counted: Which voxels count, like `scores`, bool.
      edges: Ascending, [K] float32.

    Returns:
      [B, 2, K + 1] int32: row 0 normal voxels, row 1 lesion voxels.
    """
    num_bins = edges.shape[0] + 1

    def one(scores: jax.Array, lesion: jax.Array, counted: jax.Array) -> jax.Array:
        place = bin_index(scores, edges) + num_bins * lesion.astype(jnp.int32)
        total = jnp.zeros(2 * num_bins, jnp.int32)
        total = total.at[place.ravel()].add(counted.ravel().astype(jnp.int32))
        return total.reshape(2, num_bins)

    return jax.vmap(one)(scores, lesion, counted)
