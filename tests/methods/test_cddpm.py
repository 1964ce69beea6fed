import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import denoisers
from uad_jax import denoising, noising, types
from uad_jax.methods import base, cddpm
from uad_jax.ops import augment, diffusion, losses

RUN = base.RunShape(total_steps=10, steps_per_epoch=5, global_batch=4)
KEY = jax.random.key(3)


def _config(**changes: Any) -> cddpm.CddpmConfig:
    still = dataclasses.replace(denoisers.encoder(), drop_path=0.0)
    plain: dict[str, Any] = {"encoder": still, "augment": denoisers.NO_AUGMENT}
    return dataclasses.replace(denoisers.cddpm_config(), **{**plain, **changes})


@functools.cache
def _model() -> types.ModelState:
    """Random parameters, so that no layer is zero; fresh statistics."""
    config, batch = _config(), denoisers.batch()
    shapes = jax.eval_shape(lambda key: cddpm.init_model(config, key, batch), KEY)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32),
        shapes.params,
    )
    stats = jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32),
        shapes.collections,
    )
    return types.ModelState(params=params, collections=stats)


def _loss(
    function: Any, config: cddpm.CddpmConfig, batch: types.Batch
) -> tuple[float, types.Tree]:
    model = _model()
    run = jax.jit(functools.partial(function, config))
    value, (collections, scalars) = run(model.params, model.collections, batch, KEY)
    assert scalars == {}
    return float(value), collections


def test_validation_loss_by_hand() -> None:
    config, batch, model = _config(), denoisers.batch(), _model()
    value, collections = _loss(cddpm.validation_loss, config, batch)
    jax.tree.map(np.testing.assert_array_equal, collections, model.collections)

    @jax.jit
    def prediction(xt: jax.Array, t: jax.Array, image: jax.Array) -> jax.Array:
        variables = {"params": model.params["encoder"], **model.collections["encoder"]}
        condition = cddpm._encoder(config).apply(variables, image)
        network = denoising.network(config, image.shape, conditional=True)
        params = {"params": model.params["denoiser"]}
        return jnp.asarray(network.apply(params, xt, t, condition))

    example = noising.noised(config.process, batch, KEY)
    # The encoder sees the slice in [0, 1], the target is in [-1, 1].
    output = prediction(example.xt, example.t, batch.image)
    expected = np.abs(np.asarray(output - (2 * batch.image - 1))).mean()
    assert value == pytest.approx(expected, rel=1e-5)


def test_training_moves_the_statistics_to_those_of_the_batch() -> None:
    batch = denoisers.batch()
    value, collections = _loss(cddpm.loss, _config(), batch)
    old, new = _model().collections, collections
    changes = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), old, new)
    assert min(jax.tree.leaves(changes)) > 0
    # new = 0.9 old + 0.1 batch: with the batch's own, evaluation equals training.
    own = jax.tree.map(lambda a, b: (b - 0.9 * a) / 0.1, old, new)
    run = jax.jit(functools.partial(cddpm.validation_loss, _config()))
    checked, _ = run(_model().params, own, batch, KEY)
    assert float(checked) == pytest.approx(value, rel=1e-3)


def test_blocks_are_skipped_in_training_alone() -> None:
    batch = denoisers.batch()
    skipping = _config(encoder=denoisers.encoder())
    plain = _loss(cddpm.loss, _config(), batch)[0]
    assert _loss(cddpm.loss, skipping, batch)[0] != plain
    checked = _loss(cddpm.validation_loss, skipping, batch)[0]
    assert checked == _loss(cddpm.validation_loss, _config(), batch)[0]


def test_both_networks_learn() -> None:
    method, batch = _config().make(RUN), denoisers.batch()
    state = jax.jit(method.init)(KEY, batch)
    update = jax.jit(method.update)
    first = state
    for step in range(6):  # layers that start at zero stop gradients at first
        state, _ = update(state, batch, jax.random.fold_in(KEY, step))
    for name in ("encoder", "denoiser"):
        before, after = first.model.params[name], state.model.params[name]
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
        assert all(jax.tree.leaves(moved)), name


def test_all_steps_of_an_ensemble_share_the_condition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = _model()
    batch = denoisers.batch()
    seen: list[jax.Array] = []

    def denoiser(
        config: Any, params: Any, shape: Any, condition: jax.Array
    ) -> diffusion.Denoiser:
        seen.append(condition)
        return lambda xt, t: xt * t[:, None, None, None] + condition[:, :1, None, None]

    monkeypatch.setattr(denoising, "denoiser", denoiser)
    keys = jax.random.split(KEY, 4)
    args = model, batch.image, batch.mask, keys
    both = cddpm.reconstruct_slices(_config(), *args)
    vectors = cddpm.encode(_config(), model, batch.image)
    np.testing.assert_array_equal(seen[0], jnp.repeat(vectors, 2, axis=0))
    assert (vectors[0] != vectors[1]).any()
    for index, t in enumerate((249, 499)):
        scoring = dataclasses.replace(_config().scoring, test_steps=(t,))
        alone = cddpm.reconstruct_slices(_config(scoring=scoring), *args)
        np.testing.assert_allclose(both[:, index], alone[:, 0], rtol=1e-6)

    mean = cddpm.reconstruct(_config(), model, batch.image, batch.mask, KEY)
    assert mean.shape == batch.image.shape
    half = cddpm.reconstruct(_config(), model, batch.image, batch.mask, KEY, 0.5)
    scoring = dataclasses.replace(_config().scoring, test_steps=(499,))
    again = cddpm.reconstruct(
        _config(scoring=scoring), model, batch.image, batch.mask, KEY
    )
    np.testing.assert_array_equal(half, again)


def test_settings_that_cannot_work_are_named() -> None:
    for changes, words in (
        ({"features": 0}, "encoder.features is 0"),
        ({"stage_sizes": (3, 4, 6)}, r"encoder.stage_sizes is \(3, 4, 6\)"),
        ({"drop_path": 1.0}, "encoder.drop_path is 1.0"),
    ):
        encoder = dataclasses.replace(denoisers.encoder(), **changes)
        with pytest.raises(ValueError, match=words):
            _config(encoder=encoder).validate()
    wrong = augment.AugmentConfig(gamma_probability=1.5)
    with pytest.raises(ValueError, match=r"gamma_probability is 1\.5"):
        _config(augment=wrong).validate()
    batch = denoisers.batch()
    with pytest.raises(ValueError, match=r"strength is 1\.5"):
        cddpm.reconstruct(_config(), _model(), batch.image, batch.mask, KEY, 1.5)


def test_the_loss_follows_the_process() -> None:
    batch = denoisers.batch()
    values = {
        kind: _loss(
            cddpm.validation_loss,
            _config(
                process=dataclasses.replace(
                    _config().process, pixel_loss=losses.PixelLoss(kind)
                )
            ),
            batch,
        )[0]
        for kind in ("l1", "l2")
    }
    assert values["l1"] != values["l2"]
