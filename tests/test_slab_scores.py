import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import slabs as tiny
from uad_jax import restoring, slab_scores, types
from uad_jax.anomaly_score_config import (
    Gradient,
    GradientConfig,
    RestorationConfig,
    Score,
    ScoreConfig,
    SliceScore,
    Smoothing,
)
from uad_jax.interslice_config import MixerConfig, SlabConfig, Target
from uad_jax.methods import autoencoder, base, interslice
from uad_jax.methods.interslice import InterSliceConfig
from uad_jax.nn.sequence import Mixer
from uad_jax.ops import losses, restoration
from uad_jax.ops.residuals import Residual
from uad_jax.score_functions import Rows
from uad_jax.types import Array, ModelState

RUN = base.RunShape(total_steps=10, steps_per_epoch=5, global_batch=2)
KEY = jax.random.key(5)
DEPTHS = (5, 2)  # no multiple of a slab of 3, and thinner than one
ALL = SlabConfig(num_slices=3, overlap=1)
CENTRE = SlabConfig(num_slices=3, target=Target.CENTRE, score_chunk=2)
TARGETS = pytest.mark.parametrize("slabs", [ALL, CENTRE], ids=["all", "centre"])
MODEL = ModelState(params={"half": {"scale": jnp.float32(0.5)}}, collections={})
KL_WEIGHT = 3.0


@functools.cache
def _volumes(depth: int = 5, fill: float = 0.0) -> types.Volumes:
    """Two volumes; `fill` stands in their padding."""
    image = jax.random.uniform(jax.random.key(4), (2, 5, 16, 16, 1))
    image = jnp.pad(image, [(0, 0), (0, depth - 5), (0, 0), (0, 0), (0, 0)])
    valid = jnp.arange(depth)[None] < jnp.array(DEPTHS)[:, None]
    inside = valid[..., None, None, None]
    mask = jnp.zeros(image.shape, bool).at[:, :, 2:14, 2:14].set(True)
    return types.Volumes(
        image=jnp.where(inside, image * mask, fill),
        mask=mask & (inside | (fill > 0)),
        valid=valid,
        uid=jnp.array([7, 3]),
    )


def _toy(slabs: SlabConfig) -> slab_scores.SlabFunctions:
    """Half of a slice plus a quarter of the mean of its slab; see `_slab_terms`."""

    def autoencode(
        model: ModelState,
        image: Array,
        valid: Array,
        keys: Array | None,
        *,
        sample: bool,
        dropout: bool,
    ) -> tuple[Array, Array]:
        seen = valid[..., None, None, None]
        count = seen.sum(axis=1, keepdims=True)
        mean = jnp.where(seen, image, 0).sum(axis=1, keepdims=True)
        output = (
            image * model.params["half"]["scale"] + mean / jnp.maximum(count, 1) / 4
        )
        if keys is not None:
            draw = jax.vmap(jax.vmap(jax.random.normal))(keys)
            output = output + (sample + 2 * dropout) * draw[..., None, None, None]
        total = jnp.where(seen, image, 0).sum(axis=(1, 2, 3, 4))
        kl = 0.5 * jnp.square(total)[:, None] + image.sum(axis=(2, 3, 4))
        if slabs.target is Target.CENTRE:
            middle = slabs.num_slices // 2
            return output[:, middle][:, None], kl[:, middle][:, None]
        return output, kl

    return slab_scores.SlabFunctions(autoencode, lambda pixels: KL_WEIGHT)


def _slab_terms(x: Array) -> tuple[Array, Array, Array]:
    """Reconstruction, squared error and divergence of valid slices [s, H, W, 1]."""
    output = x / 2 + x.mean(axis=0, keepdims=True) / 4
    error = jnp.square(output - x).sum(axis=(1, 2, 3))
    return output, error, 0.5 * jnp.square(x.sum()) + x.sum(axis=(1, 2, 3))


def _by_hand(
    slabs: SlabConfig, of_slab: Callable[[Array, int | None], Array]
) -> list[np.ndarray]:
    """Applies a function of valid slices to slabs of volumes, and merges the slabs.

    The function gets the slices and, of a window, the place of its centre.
    """
    volumes, results = _volumes(), []
    for image, depth in zip(volumes.image, DEPTHS, strict=True):
        found: list[list[Array]] = [[] for _ in range(depth)]
        if slabs.target is Target.CENTRE:
            for z in range(depth):
                first = max(z - 1, 0)
                window = image[first : min(z + 2, depth)]
                found[z].append(of_slab(window, z - first)[z - first])
        else:
            for start in (0, 2) if depth == 5 else (0,):
                end = min(start + 3, depth)
                for z, x in enumerate(of_slab(image[start:end], None), start):
                    found[z].append(x)
        results.append(np.stack([np.mean(np.stack(x), axis=0) for x in found]))
    return results


def _score(slabs: SlabConfig, config: ScoreConfig) -> types.Scores:
    config.validate("toy", posterior=True, dropout=True)
    score = slab_scores.scorer(_toy(slabs), slabs, config, Residual.ABS)
    scores = jax.jit(score)(MODEL, _volumes(), KEY)
    driven = slab_scores.host_scorer(_toy(slabs), slabs, config, Residual.ABS)
    if driven is not None:
        _assert_close(driven(MODEL, _volumes(), KEY), scores)
    return scores


def _assert_close(a: types.Scores, b: types.Scores, depth: int = 5) -> None:
    """What counts is equal: valid slices of either."""
    for i, own in enumerate(DEPTHS):
        for name in ("anomaly_map", "reconstruction", "slice_score"):
            one, two = (np.asarray(getattr(x, name))[i, :own] for x in (a, b))
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(a.volume_score, b.volume_score, rtol=1e-4, atol=1e-5)


def _assert_volumes(found: Array, expected: list[np.ndarray], **tolerance: Any) -> None:
    for x, by_hand in zip(found, expected, strict=True):
        np.testing.assert_allclose(x[: len(by_hand)], by_hand, **tolerance)


@TARGETS
def test_the_gradient_of_a_slab_is_that_of_its_sum(slabs: SlabConfig) -> None:
    gradient = GradientConfig(
        of=Gradient.ELBO, smoothing=0, pixel_loss=losses.PixelLoss.L2
    )
    config = ScoreConfig(kind=Score.GRADIENT, gradient=gradient)

    @functools.partial(jax.jit, static_argnums=1)
    def slope(x: Array, centre: int | None) -> Array:
        def value(x: Array) -> Array:
            _, error, kl = _slab_terms(x)
            terms = error + KL_WEIGHT * kl
            return terms.sum() if centre is None else terms[centre]

        return jnp.abs(jax.grad(value)(x))[..., 0]

    found = _score(slabs, config).anomaly_map
    _assert_volumes(found, _by_hand(slabs, slope), rtol=1e-4)


@TARGETS
@pytest.mark.parametrize("smoothing", list(Smoothing))
def test_a_slab_is_restored_as_one(slabs: SlabConfig, smoothing: Smoothing) -> None:
    # After a step neighbours may have changed alike up to rounding errors, of which
    # total variation takes the sign: its weight is small, or there is one step only.
    steps, weight = (2, 0.02) if smoothing is Smoothing.CHANGE else (1, 2.0)
    settings = RestorationConfig(
        num_steps=steps,
        step_size=1e-4,
        clip=0.0,
        masked=smoothing is Smoothing.CHANGE,
        smoothing=smoothing,
        tv_weights=(weight,),
    )
    config = ScoreConfig(kind=Score.RESTORATION, restoration=settings)

    @functools.partial(jax.jit, static_argnums=1)
    def restored(y: Array, centre: int | None) -> Array:
        own = slice(None) if centre is None else slice(centre, centre + 1)

        def value(x: Array) -> Array:
            output, error, kl = _slab_terms(x)
            change = y - x if smoothing is Smoothing.CHANGE else x - output
            terms = error + KL_WEIGHT * kl
            terms = terms + weight * restoration.total_variation(change)
            return terms[own].sum()

        moves = jnp.zeros_like(y).at[own].set(1.0)
        if settings.masked:
            moves = moves * _volumes().mask[0, :1]
        x = y
        for _ in range(steps):
            x = x - 1e-4 * moves * jax.grad(value)(x)
        return x

    scores = _score(slabs, config)
    expected = _by_hand(slabs, restored)
    assert scores.reconstruction is not None
    _assert_volumes(scores.reconstruction, expected, rtol=1e-4, atol=1e-5)
    moved = [
        np.abs(x - y[: len(x)]) for x, y in zip(expected, _volumes().image, strict=True)
    ]
    _assert_volumes(
        scores.anomaly_map, [x[..., 0] for x in moved], rtol=1e-3, atol=1e-5
    )


@TARGETS
def test_slices_of_slabs_are_scored_by_their_own_terms(slabs: SlabConfig) -> None:
    def l1(x: Array) -> Array:
        return jnp.abs(_slab_terms(x)[0] - x).sum(axis=(1, 2, 3))

    hand = {
        SliceScore.KL: lambda x, _: _slab_terms(x)[2],
        SliceScore.ELBO: lambda x, _: l1(x) + KL_WEIGHT * _slab_terms(x)[2],
    }
    for kind, of_slab in hand.items():
        scores = _score(slabs, ScoreConfig(slice_score=kind))
        expected = _by_hand(slabs, of_slab)
        _assert_volumes(scores.slice_score, expected, rtol=1e-4)
        np.testing.assert_allclose(
            scores.volume_score, [x.max() for x in expected], rtol=1e-4
        )
        assert (scores.slice_score[1, 2:] == 0).all()


@TARGETS
def test_random_passes_draw_by_volume_and_slice(slabs: SlabConfig) -> None:
    config = ScoreConfig(kind=Score.MC_VARIANCE, passes=4)
    draws = np.zeros((2, 5, 4))
    for b, uid in enumerate((7, 3)):
        for z in range(5):
            key = jax.random.fold_in(jax.random.fold_in(KEY, uid), z)
            for i in range(4):
                draws[b, z, i] = 3 * jax.random.normal(jax.random.fold_in(key, i))
    found = _score(slabs, config).anomaly_map
    expected = [
        x.var(axis=-1)[:d, None, None] for x, d in zip(draws, DEPTHS, strict=True)
    ]
    _assert_volumes(
        found, [np.broadcast_to(x, (len(x), 16, 16)) for x in expected], rtol=1e-4
    )


# From here on with a network.


def _config(
    kind: Mixer, slabs: SlabConfig, score: ScoreConfig, **changes: Any
) -> InterSliceConfig:
    config = tiny.config(kind, score=score, **changes)
    return dataclasses.replace(config, slabs=slabs)


def _restoration(**changes: Any) -> ScoreConfig:
    settings = RestorationConfig(num_steps=4, late_from=2, tv_weights=(0.1, 1.0))
    return ScoreConfig(
        kind=Score.RESTORATION,
        slice_score=SliceScore.ELBO,
        restoration=dataclasses.replace(settings, **changes),
    )


SCORES = {
    "restoration": _restoration(sampled=True),
    "gradient": ScoreConfig(
        kind=Score.GRADIENT,
        slice_score=SliceScore.KL,
        gradient=GradientConfig(
            of=Gradient.ELBO, times_residual=True, smoothing=1, samples=2
        ),
    ),
    "mc": ScoreConfig(kind=Score.MC_VARIANCE, passes=3),
}


@functools.cache
def _model(kind: Mixer) -> ModelState:
    return tiny.model(_config(kind, ALL, ScoreConfig()), tiny.batch())


def _program(config: Any) -> Callable[..., types.Scores]:
    """As the evaluator runs it on a CPU; compiled once."""
    config.validate()
    method = config.make(RUN)
    return method.host_score or jax.jit(method.score)


@functools.cache
def _vae_scores(name: str) -> types.Scores:
    like = tiny.config(Mixer.NONE)
    config = autoencoder.AutoencoderConfig(
        latent_size=like.latent_size,
        intermediate_resolution=like.intermediate_resolution,
        width=like.width,
        max_width=like.max_width,
        score=SCORES[name],
        sample_at_test=True,
    )
    return _program(config)(_model(Mixer.NONE), _volumes(), KEY)


@TARGETS
@pytest.mark.parametrize("name", list(SCORES))
def test_without_a_mixer_the_scores_are_those_of_the_vae(
    slabs: SlabConfig, name: str
) -> None:
    # A mean over 256 pixels with the weight 1 / 256 is the sum with the weight 1.
    config = _config(
        Mixer.NONE,
        slabs,
        SCORES[name],
        reduction=losses.Reduction.MEAN,
        kl_weight=1 / 256,
        sample_at_test=True,
    )
    ours = _program(config)(_model(Mixer.NONE), _volumes(), KEY)
    assert np.ptp(np.asarray(_vae_scores(name).anomaly_map)) > 0
    _assert_close(ours, _vae_scores(name))


@pytest.mark.parametrize(
    ("slabs", "name"), [(ALL, "restoration"), (CENTRE, "gradient")]
)
def test_scores_of_slabs_know_neither_padding_nor_the_other_volume(
    slabs: SlabConfig, name: str
) -> None:
    method = _config(Mixer.GRU, slabs, SCORES[name]).make(RUN)
    assert method.score is not None
    score, model, volumes = jax.jit(method.score), _model(Mixer.GRU), _volumes()
    scores = score(model, volumes, KEY)
    _assert_close(score(model, _volumes(fill=9.0), KEY), scores)
    other = dataclasses.replace(volumes, image=volumes.image.at[0].multiply(0.5))
    found = score(model, other, KEY)
    np.testing.assert_allclose(
        found.anomaly_map[1, :2], scores.anomaly_map[1, :2], rtol=1e-4, atol=1e-5
    )
    assert (found.anomaly_map[0] != scores.anomaly_map[0]).any()
    turned = score(model, jax.tree.map(lambda x: x[::-1], volumes), KEY)
    _assert_close(jax.tree.map(lambda x: x[::-1], turned), scores)
    if method.host_score is not None:  # the same by loops on the host
        _assert_close(method.host_score(model, volumes, KEY), scores)
        # Another number of volumes, so another number of slabs at a time.
        alone = jax.tree.map(lambda x: x[1:], volumes)
        found = method.host_score(model, alone, KEY)
        np.testing.assert_allclose(
            found.anomaly_map[0, :2], scores.anomaly_map[1, :2], rtol=1e-4, atol=1e-5
        )


def test_a_restoration_lowers_the_sum_over_the_slab() -> None:
    config = _config(Mixer.TRANSFORMER, ALL, ScoreConfig())
    settings = RestorationConfig(
        num_steps=8, step_size=1e-3, late_step_size=1e-3, tv_weights=(0.1, 1.0)
    )
    model, batch = _model(Mixer.TRANSFORMER), tiny.batch(2, 3)
    rows = Rows(
        image=batch.image.reshape(-1, 16, 16, 1),
        mask=batch.mask.reshape(-1, 16, 16, 1),
        keys=jax.random.split(KEY, 6),
        context=batch.valid.at[1, 2].set(False).reshape(-1),
    )

    @jax.jit
    def terms(rows: Rows, x: Array, weight: Array) -> Array:
        functions = slab_scores.bind(interslice.score_functions(config), ALL, rows)
        down = restoring.objective(functions, settings, model)
        return down(x, rows.image, weight, None)

    bind = functools.partial(slab_scores.bind, interslice.score_functions(config), ALL)
    found = restoring.walker(bind, settings)(model, rows)
    for i, weight in enumerate(settings.tv_weights):
        before, after = (
            terms(rows, x, jnp.float32(weight)) for x in (rows.image, found[:, i])
        )
        sums = [x.reshape(2, 3).sum(axis=-1) for x in (before, after)]  # of each slab
        assert (sums[1] < 0.999 * sums[0]).all()
        assert before[5] == after[5] == 0
        np.testing.assert_array_equal(found[5, i], rows.image[5])
        assert (found[4, i] != rows.image[4]).any()


def test_passes_hide_slices_as_training_does() -> None:
    score = ScoreConfig(kind=Score.MC_VARIANCE, passes=6, mc_samples=False)
    config = _config(Mixer.GRU, ALL, score, dropout=0.0)
    assert config.mixer.slice_dropout > 0
    for slabs in (ALL, CENTRE):
        program = _program(dataclasses.replace(config, slabs=slabs))
        found = program(_model(Mixer.GRU), _volumes(), KEY)
        assert np.ptp(np.asarray(found.anomaly_map[0])) > 0
        turned = jax.tree.map(lambda x: x[::-1], _volumes())
        turned = program(_model(Mixer.GRU), turned, KEY)
        _assert_close(jax.tree.map(lambda x: x[::-1], turned), found)
    without = dataclasses.replace(config, mixer=MixerConfig(kind=Mixer.GRU))
    with pytest.raises(ValueError, match="nothing is random in the inter-slice VAE"):
        without.validate()
    dataclasses.replace(without, dropout=0.1).validate()
    drawn = dataclasses.replace(score, mc_samples=True)
    dataclasses.replace(without, score=drawn).validate()
