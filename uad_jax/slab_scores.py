"""The anomaly scores of `anomaly_scores` for methods that take slabs of slices.

The slices of a slab know each other, so what is lowered or differentiated is the sum
over the valid slices of a slab, with respect to all of its pixels: a slice also moves
for the sake of its neighbours. Padding neither changes nor counts. Where slabs overlap,
the mean counts of what became of a slice in each. Of a window only the centre moves,
and its terms alone count; its neighbours stay what they are.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from uad_jax import anomaly_scores, restoring
from uad_jax.anomaly_score_config import Score, ScoreConfig
from uad_jax.interslice_config import SlabConfig, Target
from uad_jax.methods import base, lifting
from uad_jax.ops import losses, residuals
from uad_jax.ops import slabs as slabs_lib
from uad_jax.score_functions import Functions, Rows, Terms
from uad_jax.types import Array, Key, ModelState, Scores, Tree, Volumes


class Autoencode(Protocol):
    """Reconstructs slabs."""

    def __call__(
        self,
        model: ModelState,
        image: Array,
        valid: Array,
        keys: Array | None,
        *,
        sample: bool,
        dropout: bool,
    ) -> tuple[Array, Array]:
        """Gives reconstructions and divergences.

        Args:
          model: The model.
          image: [B, S, H, W, C] float32; 0 on padding.
          valid: False on padding, [B, S] bool.
          keys: One per slice, [B, S]; None = nothing is random.
          sample: Draw the codes from the posteriors.
          dropout: Drop what is dropped in training.

        Returns:
          [B, S, H, W, C] float32, and each slice's divergence before its weight,
          [B, S] float32; with Target.CENTRE of the centre alone, [B, 1, ...].
        """
        ...


class SlabFunctions(NamedTuple):
    """What scores need of a method of slabs.

    Attributes:
      autoencode: Its reconstruction.
      kl_weight: Numbers in a slice -> weight of the divergence where the error is
        summed over them.
      pixel_loss: The error of the method's own loss.
    """

    autoencode: Autoencode
    kl_weight: Callable[[int], float | Array]
    pixel_loss: losses.PixelLoss = losses.PixelLoss.L1


class Window(NamedTuple):
    """The slices around one: image [N, S, H, W, C] float32, valid [N, S] bool."""

    image: Array
    valid: Array


def bind(functions: SlabFunctions, slabs: SlabConfig, rows: Rows) -> Functions:
    """The functions of single slices that stand in slabs.

    Args:
      functions: The method.
      slabs: Its slabs.
      rows: Target.ALL: all slices of slabs, one slab after the other; their context
        says which are valid, [N] bool. Target.CENTRE: the centres of windows; their
        context is the `Window` of each.

    Returns:
      Functions of N such slices in the place of `rows.image`. The terms of padding are
      0, and their output there is the padding itself.
    """
    size, middle = slabs.num_slices, slabs.num_slices // 2
    centre = slabs.target is Target.CENTRE
    valid = rows.context.valid if centre else rows.context.reshape(-1, size)
    counted = valid[:, middle] if centre else rows.context

    def run(
        model: ModelState,
        image: Array,
        keys: Array | None,
        *,
        sample: bool,
        dropout: bool,
    ) -> tuple[Array, Array]:
        if centre:
            whole = rows.context.image.at[:, middle].set(image)
            keys = None if keys is None else _window_keys(keys, size)
        else:
            whole = image.reshape(-1, size, *image.shape[1:])
            keys = None if keys is None else keys.reshape(-1, size)
        output, kl = functions.autoencode(
            model,
            _where(valid, whole, 0.0),
            valid,
            keys,
            sample=sample,
            dropout=dropout,
        )
        return output.reshape(image.shape), kl.reshape(-1)

    def reconstruct(
        model: ModelState,
        image: Array,
        keys: Array | None,
        *,
        sample: bool,
        dropout: bool,
    ) -> Array:
        return run(model, image, keys, sample=sample, dropout=dropout)[0]

    def terms(
        model: ModelState, image: Array, keys: Array | None, kind: losses.PixelLoss
    ) -> Terms:
        output, kl = run(model, image, keys, sample=True, dropout=False)
        output = _where(counted, output, image)
        error = losses.pixels(kind, output, image)
        summed = losses.per_row(error, losses.Reduction.SUM)
        zero = jnp.zeros_like(kl)
        return Terms(
            output, jnp.where(counted, summed, zero), jnp.where(counted, kl, zero)
        )

    weight = functions.kl_weight(rows.image[0].size)
    return Functions(reconstruct, terms, weight, functions.pixel_loss)


def scorer(
    functions: SlabFunctions,
    slabs: SlabConfig,
    config: ScoreConfig,
    residual: residuals.Residual,
    *,
    sample: bool = False,
) -> Callable[[ModelState, Volumes, Key], Scores]:
    """Builds the `score` of a method of slabs; see `anomaly_scores.scorer`.

    Args:
      functions: The method.
      slabs: Its slabs, and how they are laid over a volume.
      config: Which score.
      residual: How an image and what became of it are compared.
      sample: RESIDUAL and the combined gradient: decode samples, not means.
    """

    def of_rows(model: ModelState, rows: Rows) -> anomaly_scores.Slices:
        return anomaly_scores.of_slices(
            bind(functions, slabs, rows), config, model, rows, sample=sample
        )

    lifted = _lifted(slabs, of_rows)

    def score(model: ModelState, volumes: Volumes, key: Key) -> Scores:
        found = lifted(model, volumes, key)
        return anomaly_scores.of_volumes(config, residual, found, volumes)

    return score


def host_scorer(
    functions: SlabFunctions,
    slabs: SlabConfig,
    config: ScoreConfig,
    residual: residuals.Residual,
    *,
    sample: bool = False,
) -> Callable[[ModelState, Volumes, Key], Scores] | None:
    """Builds the form of `scorer` that a CPU wants, not to be jitted.

    The loops over slabs and over the steps of a restoration are Python's, because
    XLA:CPU runs convolution gradients inside its own loops slowly.

    Returns:
      What `scorer` returns; None for scores without gradients.
    """
    if config.kind not in (Score.RESTORATION, Score.GRADIENT):
        return None
    bound = functools.partial(bind, functions, slabs)
    walk = restoring.walker(bound, config.restoration)

    @jax.jit
    def sloped(model: ModelState, rows: Rows) -> anomaly_scores.Slices:
        return anomaly_scores.of_slices(bound(rows), config, model, rows, sample=sample)

    @jax.jit
    def each(model: ModelState, rows: Rows) -> Array | None:
        return anomaly_scores.slice_scores(bound(rows), config, model, rows.image)

    def part(model: ModelState, rows: Rows) -> anomaly_scores.Slices:
        if config.kind is Score.GRADIENT:
            return sloped(model, rows)
        return anomaly_scores.Slices(walk(model, rows), None, each(model, rows))

    lifted = _driven(slabs, part)

    @jax.jit
    def finish(found: anomaly_scores.Slices, volumes: Volumes) -> Scores:
        return anomaly_scores.of_volumes(config, residual, found, volumes)

    def score(model: ModelState, volumes: Volumes, key: Key) -> Scores:
        return finish(lifted(model, volumes, key), volumes)

    return score


def _lifted(
    slabs: SlabConfig, function: Callable[[ModelState, Rows], Tree]
) -> Callable[[ModelState, Volumes, Key], Tree]:
    """Lifts a function of rows, as `bind` knows them, to volumes.

    Args:
      slabs: How they lie in a volume.
      function: (model, rows) -> float arrays [N, ...].

    Returns:
      (model, volumes, key) -> arrays [B, D, ...].
    """
    size = slabs.num_slices
    if slabs.target is Target.CENTRE:

        def window(model: ModelState, *parts: Array) -> Tree:
            return function(model, _window_rows(*parts))

        return lifting.over_windows(window, size, slabs.score_chunk)

    def slab(model: ModelState, *parts: Array) -> Tree:
        found = function(model, _slab_rows(*parts))
        return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), found)

    return lifting.over_slabs(slab, size, slabs.overlap)


def _driven(
    slabs: SlabConfig, function: Callable[[ModelState, Rows], Tree]
) -> Callable[[ModelState, Volumes, Key], Tree]:
    """Does what `_lifted` does by a loop on the host; the function is not jitted.

    As many slabs are computed at once as there are volumes, or `score_chunk` windows.
    """

    @jax.jit
    def take(volumes: Volumes, key: Key) -> Rows:
        if slabs.target is Target.ALL:
            return _all_slabs(slabs, volumes, key)
        gather = lifting.over_windows(
            lambda model, *parts: _window_rows(*parts), slabs.num_slices
        )
        found = gather(ModelState(params={}, collections={}), volumes, key)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)

    @jax.jit
    def join(found: Tree, volumes: Volumes) -> Tree:
        batch, depth = volumes.valid.shape
        if slabs.target is Target.CENTRE:
            return jax.tree.map(lambda x: x.reshape(batch, depth, *x.shape[1:]), found)
        size = slabs.num_slices
        where = slabs_lib.places(volumes.valid, size, slabs.overlap)

        def merge(x: Array) -> Array:
            x = x.reshape(batch, -1, size, *x.shape[1:])
            return slabs_lib.merged(x, where, depth)

        return jax.tree.map(merge, found)

    def lifted(model: ModelState, volumes: Volumes, key: Key) -> Tree:
        chunk = slabs.score_chunk
        if slabs.target is Target.ALL:
            chunk = len(volumes.uid) * slabs.num_slices
        rows = take(volumes, key)
        found = restoring.in_parts(lambda part: function(model, part), rows, chunk)
        return join(found, volumes)

    return lifted


def _all_slabs(slabs: SlabConfig, volumes: Volumes, key: Key) -> Rows:
    """The slices of all slabs of volumes, [B, K, S] of them in one axis."""
    size = slabs.num_slices
    start = slabs_lib.places(volumes.valid, size, slabs.overlap).start
    index = start[..., None] + jnp.arange(size)[None, None]
    uid = jnp.broadcast_to(volumes.uid[:, None, None], index.shape)
    keys = base.sample_keys(key, uid.reshape(-1), index.reshape(-1))

    def cut(x: Array) -> Array:
        x = slabs_lib.cut(slabs_lib.padded(x, size), start, size)
        return x.reshape(-1, *x.shape[2:])

    image, mask, valid = (cut(x) for x in (volumes.image, volumes.mask, volumes.valid))
    return _slab_rows(image, mask, valid, keys.reshape(-1, size))


def _slab_rows(image: Array, mask: Array, valid: Array, keys: Array) -> Rows:
    """The slices of slabs [B, S, ...] as rows."""
    mask = _where(valid, mask, False)
    return Rows(*(x.reshape(-1, *x.shape[2:]) for x in (image, mask, keys, valid)))


def _window_rows(image: Array, mask: Array, valid: Array, keys: Array) -> Rows:
    """The centres of windows [N, S, ...] as rows."""
    middle = image.shape[1] // 2
    mask = _where(valid, mask, False)
    return Rows(
        image[:, middle], mask[:, middle], keys[:, middle], Window(image, valid)
    )


def _window_keys(keys: Array, size: int) -> Array:
    """Keys [N, S] of the slices of windows from those of their centres, [N].

    The centre's own are its own. Those of its neighbours, which only say who is hidden,
    follow from them: a window may then be computed again with other keys.
    """
    offset = jnp.arange(size)

    def one(key: Array) -> Array:
        others = jax.vmap(lambda i: jax.random.fold_in(key, i))(offset)
        return jnp.where(offset == size // 2, key, others)

    return jax.vmap(one)(keys)


def _where(condition: Array, x: Array, other: Array | float) -> Array:
    """`jnp.where` with a condition of the leading axes."""
    spread = condition.reshape(condition.shape + (1,) * (x.ndim - condition.ndim))
    return jnp.where(spread, x, other)
