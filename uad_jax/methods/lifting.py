"""From scores of slices and slabs to scores of volumes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from uad_jax.methods import base
from uad_jax.ops import slabs
from uad_jax.types import Array, Key, ModelState, Scores, Tree, Volumes

# (model, image [N, H, W, C], mask [N, H, W, 1], keys [N]) -> map [N, H, W] and
# reconstruction [N, H, W, C] or None.
ScoreSlices = Callable[[ModelState, Array, Array, Array], tuple[Array, Array | None]]
# The same for slabs: image [B, S, H, W, C], mask [B, S, H, W, 1], valid [B, S], keys
# [B, S] -> map [B, S, H, W] and reconstruction [B, S, H, W, C] or None.
ScoreSlab = Callable[
    [ModelState, Array, Array, Array, Array], tuple[Array, Array | None]
]


def slicewise(
    score_slices: ScoreSlices, chunk: int = 0
) -> Callable[[ModelState, Volumes, Key], Scores]:
    """Lifts a score of slices to volumes; `chunk` as in `over_slices`."""
    lifted = over_slices(score_slices, chunk)

    def score(model: ModelState, volumes: Volumes, key: Key) -> Scores:
        anomaly_map, output = lifted(model, volumes, key)
        return summarise(anomaly_map, output, volumes)

    return score


def over_slices(
    function: Callable[[ModelState, Array, Array, Array], Tree],
    chunk: int = 0,
    *,
    key_per_volume: bool = False,
) -> Callable[[ModelState, Volumes, Key], Tree]:
    """Lifts a function of slices to volumes.

    Args:
      function: (model, image [N, H, W, C], mask [N, H, W, 1], keys [N]) -> arrays
        [N, ...].
      chunk: Slices per volume that are computed at once, to bound the memory; 0 = all.
      key_per_volume: All slices of a volume get one key, that of slice 0.

    Returns:
      (model, volumes, key) -> arrays [B, D, ...]. The volume axis stays outermost, so
      it may be sharded.
    """

    def lifted(model: ModelState, volumes: Volumes, key: Key) -> Tree:
        def one(image: Array, mask: Array, uid: Array, index: Array) -> Tree:
            keys = base.sample_keys(key, uid, index)
            return function(model, image, mask, keys)

        uid, index = _place(volumes)
        index = index * (0 if key_per_volume else 1)
        return _in_chunks(one, (volumes.image, volumes.mask, uid, index), chunk)

    return lifted


def over_windows(
    function: Callable[[ModelState, Array, Array, Array, Array], Tree],
    num_slices: int,
    chunk: int = 0,
) -> Callable[[ModelState, Volumes, Key], Tree]:
    """Lifts a function of the window around a slice to volumes.

    Every slice gets its own window, whose slices before the first and after the last
    one of the volume are invalid.

    Args:
      function: (model, image [N, S, H, W, C], mask [N, S, H, W, 1], valid [N, S], keys
        [N, S]) -> arrays [N, ...], one row for the centre of each window.
      num_slices: Length S of a window, odd.
      chunk: Windows per volume that are computed at once, to bound the memory; 0 = all.

    Returns:
      (model, volumes, key) -> arrays [B, D, ...].

    Raises:
      ValueError: If a window has no centre.
    """
    if num_slices % 2 == 0:
        raise ValueError(
            f"A window of {num_slices} slices has no centre. Use an odd number."
        )

    def lifted(model: ModelState, volumes: Volumes, key: Key) -> Tree:
        depth = volumes.valid.shape[1]
        reach = jnp.arange(num_slices) - num_slices // 2
        wanted = jnp.arange(depth)[:, None] + reach[None]
        window = jnp.clip(wanted, 0, depth - 1)
        inside = (wanted == window)[None]

        def one(
            image: Array, mask: Array, valid: Array, uid: Array, index: Array
        ) -> Tree:
            keys = base.sample_keys(key, uid.reshape(-1), index.reshape(-1))
            keys = keys.reshape(index.shape)
            return function(model, image, mask, valid, keys)

        uid, index = _place(volumes)
        whole = (volumes.image, volumes.mask, volumes.valid, uid, index)
        image, mask, valid, uid, index = (x[:, window] for x in whole)
        return _in_chunks(one, (image, mask, valid & inside, uid, index), chunk)

    return lifted


def _place(volumes: Volumes) -> tuple[Array, Array]:
    """Volume id and axial index of every slice, [B, D] each."""
    shape = volumes.valid.shape
    index = jnp.broadcast_to(jnp.arange(shape[1])[None], shape)
    return jnp.broadcast_to(volumes.uid[:, None], shape), index


def _in_chunks(
    function: Callable[..., Tree], parts: tuple[Array, ...], chunk: int
) -> Tree:
    """Applies a function of rows [N, ...] to arrays [B, D, ...], `chunk` of D at once.

    The volume axis stays outermost, so it may be sharded.
    """
    batch, depth = parts[0].shape[:2]
    size = min(chunk or depth, depth)
    count = -(-depth // size)

    def split(x: Array) -> Array:
        pad = [(0, 0), (0, count * size - depth)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, pad).reshape(batch, count, size, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    def one(rows: tuple[Array, ...]) -> Tree:
        out = function(*(x.reshape(batch * size, *x.shape[2:]) for x in rows))
        return jax.tree.map(lambda x: x.reshape(batch, size, *x.shape[1:]), out)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(batch, count * size, *x.shape[3:])[:, :depth]

    chunks = tuple(split(x) for x in parts)
    if count == 1:
        # No loop: on XLA:CPU convolution gradients inside one are several times slower.
        out = jax.tree.map(lambda x: x[None], one(tuple(x[0] for x in chunks)))
    else:
        out = jax.lax.map(one, chunks)
    return jax.tree.map(join, out)


def slabwise(
    score_slab: ScoreSlab, num_slices: int, overlap: int = 0
) -> Callable[[ModelState, Volumes, Key], Scores]:
    """Lifts a score of slabs of consecutive slices to volumes, as `over_slabs` does.

    Args:
      score_slab: Scores B slabs at once.
      num_slices: Slab length S.
      overlap: Slices shared by neighbouring slabs, below S.

    Returns:
      `score` of a Method.

    Raises:
      ValueError: If the overlap leaves no step.
    """
    lifted = over_slabs(score_slab, num_slices, overlap)

    def score(model: ModelState, volumes: Volumes, key: Key) -> Scores:
        anomaly_map, output = lifted(model, volumes, key)
        return summarise(anomaly_map, output, volumes)

    return score


def over_slabs(
    function: Callable[[ModelState, Array, Array, Array, Array], Tree],
    num_slices: int,
    overlap: int = 0,
) -> Callable[[ModelState, Volumes, Key], Tree]:
    """Lifts a function of slabs of consecutive slices to volumes.

    Slabs start every `num_slices - overlap` slices; the last one is moved back so that
    it ends with the volume's last valid slice. Where slabs overlap, their mean counts.
    A volume thinner than a slab is computed as one slab with invalid slices.

    Args:
      function: (model, image [B, S, H, W, C], mask [B, S, H, W, 1], valid [B, S], keys
        [B, S], one per slice) -> float arrays [B, S, ...].
      num_slices: Slab length S.
      overlap: Slices shared by neighbouring slabs, below S.

    Returns:
      (model, volumes, key) -> arrays [B, D, ...]. Valid slices of a volume must precede
      its padding. The result of a volume does not depend on the common depth of the
      batch.

    Raises:
      ValueError: If the overlap leaves no step.
    """
    if not 0 <= overlap < num_slices:
        raise ValueError(
            f"The overlap is {overlap}; slabs of {num_slices} slices need one in "
            f"[0, {num_slices - 1}]."
        )

    def lifted(model: ModelState, volumes: Volumes, key: Key) -> Tree:
        batch, depth = volumes.valid.shape
        where = slabs.places(volumes.valid, num_slices, overlap)
        image, mask, valid = (
            slabs.padded(x, num_slices)
            for x in (volumes.image, volumes.mask, volumes.valid)
        )

        def slab(start: Array) -> Tree:
            def part(x: Array) -> Array:
                return slabs.cut(x, start[:, None], num_slices)[:, 0]

            z = start[:, None] + jnp.arange(num_slices)[None]
            uid = jnp.repeat(volumes.uid, num_slices)
            keys = base.sample_keys(key, uid, z.reshape(-1)).reshape(z.shape)
            return function(model, part(image), part(mask), part(valid), keys)

        def step(sums: tuple, place: slabs.Places) -> tuple[tuple, None]:
            out = slab(place.start)
            used = place.used.astype(jnp.float32)
            ones = jnp.ones((batch, num_slices), jnp.float32)
            sums = jax.tree.map(
                lambda s, x: _add_rows(s, _scale(x, used), place.start),
                sums,
                (ones, out),
            )
            return sums, None

        shapes = jax.eval_shape(slab, where.start[:, 0])
        zeros = jax.tree.map(
            lambda x: jnp.zeros((*valid.shape, *x.shape[2:]), x.dtype), shapes
        )
        sums = (jnp.zeros(valid.shape, jnp.float32), zeros)
        turned = jax.tree.map(jnp.transpose, where)
        (weight, out), _ = jax.lax.scan(step, sums, turned)
        share = 1.0 / jnp.maximum(weight, 1.0)
        return jax.tree.map(lambda x: _scale(x, share)[:, :depth], out)

    return lifted


def summarise(
    anomaly_map: Array, reconstruction: Array | None, volumes: Volumes
) -> Scores:
    """Adds slice and volume scores: the mean of the map inside the brain (0 if none).

    Args:
      anomaly_map: [B, D, H, W].
      reconstruction: [B, D, H, W, C] or None.
      volumes: What was scored; padding counts for nothing.
    """
    anomaly_map = anomaly_map.astype(jnp.float32)
    brain = volumes.mask[..., 0] & volumes.valid[:, :, None, None]
    sums = jnp.where(brain, anomaly_map, 0.0).sum(axis=(2, 3))
    counts = brain.sum(axis=(2, 3))
    return Scores(
        anomaly_map=anomaly_map,
        slice_score=sums / jnp.maximum(counts, 1),
        volume_score=sums.sum(axis=1) / jnp.maximum(counts.sum(axis=1), 1),
        reconstruction=reconstruction,
    )


def _scale(x: Array, factor: Array) -> Array:
    """Multiplies by a factor given for the leading axes."""
    return x * factor.reshape(factor.shape + (1,) * (x.ndim - factor.ndim))


def _add_rows(total: Array, rows: Array, start: Array) -> Array:
    """Adds rows [B, S, ...] to total [B, D, ...] from each volume's own start."""

    def one(total: Array, rows: Array, start: Array) -> Array:
        old = jax.lax.dynamic_slice_in_dim(total, start, rows.shape[0])
        return jax.lax.dynamic_update_slice_in_dim(total, old + rows, start, axis=0)

    return jax.vmap(one)(total, rows, start)
