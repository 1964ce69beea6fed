import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import slabs
from uad_jax import types
from uad_jax.interslice_config import MixerConfig, SlabConfig, Target
from uad_jax.methods import autoencoder, base, interslice
from uad_jax.methods.interslice import InterSliceConfig
from uad_jax.nn.sequence import Mixer, Positions
from uad_jax.ops import losses, residuals

RUN = base.RunShape(total_steps=10, steps_per_epoch=5, global_batch=2)
KEY = jax.random.key(5)
LENGTH = 5


def _config(kind: Mixer, **changes: Any) -> InterSliceConfig:
    return slabs.config(kind, slabs={"num_slices": LENGTH}, **changes)


@functools.cache
def _batch(padded: int = 0) -> types.Batch:
    return slabs.batch(2, LENGTH, padded=padded)


@functools.cache
def _model(kind: Mixer) -> types.ModelState:
    return slabs.model(_config(kind), _batch())


@functools.cache
def _compiled(kind: Mixer) -> Any:
    config = _config(kind)
    return jax.jit(functools.partial(interslice.reconstruct_slab, config))


def _output(kind: Mixer, image: jax.Array, valid: jax.Array) -> np.ndarray:
    return np.asarray(_compiled(kind)(_model(kind), image, valid))


@pytest.mark.parametrize(
    ("kind", "layers", "expected"),
    [
        (Mixer.NONE, 1, 1_584_497),
        (Mixer.GRU, 1, 1_617_905),
        (Mixer.LSTM, 1, 1_642_481),
        (Mixer.TRANSFORMER, 1, 1_682_801),
        (Mixer.TRANSFORMER, 2, 1_815_281),
        # Two directions of 8 channels on maps of 16: 2 * (3 * 9 * (16 + 8) * 8 + 32).
        (Mixer.CONVGRU, 1, 1_584_497 + 10_432),
    ],
)
def test_parameters_of_50_slices_at_96_pixels(
    kind: Mixer, layers: int, expected: int
) -> None:
    config = InterSliceConfig(
        slabs=SlabConfig(num_slices=50),
        mixer=MixerConfig(kind=kind, num_layers=layers),
    )
    image = jax.ShapeDtypeStruct((1, 50, 96, 96, 1), jnp.float32)
    batch = dataclasses.replace(_batch(), image=image)
    model = jax.eval_shape(
        lambda key: interslice.init_model(config, key, batch), jax.random.key(0)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == expected


@pytest.mark.parametrize("kind", list(Mixer))
def test_every_mixer_makes_a_method(kind: Mixer) -> None:
    method = _config(kind).make(RUN)
    assert method.inputs == base.Inputs(num_slices=LENGTH)
    state = jax.eval_shape(method.init, KEY, _batch())
    after, scalars = jax.eval_shape(method.update, state, _batch(), KEY)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert set(scalars) == {"loss", "reconstruction", "l1", "kl", "grad_norm"}
    assert ("context" in after.model.params) == (kind is not Mixer.NONE)
    assert np.isfinite(_output(kind, _batch().image, _batch().valid)).all()


def test_without_a_mixer_it_is_the_vae() -> None:
    config = dataclasses.replace(
        _config(Mixer.NONE),
        erase=dataclasses.replace(slabs.config().erase, probability=0.0),
    )
    plain = autoencoder.AutoencoderConfig(
        latent_size=config.latent_size,
        intermediate_resolution=config.intermediate_resolution,
        width=config.width,
        max_width=config.max_width,
        sample_at_test=True,
    )
    model, batch = _model(Mixer.NONE), _batch()
    rows = types.Batch(
        image=batch.image.reshape(-1, 16, 16, 1),
        mask=batch.mask.reshape(-1, 16, 16, 1),
        valid=batch.valid.reshape(-1),
        uid=jnp.repeat(batch.uid, LENGTH),
        slice_index=batch.slice_index.reshape(-1),
    )
    # Noise and dropout of a slice are the same as well.
    ours = jax.jit(functools.partial(interslice.loss, config))
    theirs = jax.jit(functools.partial(autoencoder.loss, plain))
    (value, (_, scalars)) = ours(model.params, {}, batch, KEY)
    (expected, (_, others)) = theirs(model.params, {}, rows, KEY)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert set(scalars) == set(others)
    for name, scalar in scalars.items():
        np.testing.assert_allclose(scalar, others[name], rtol=1e-5)

    volumes = types.Volumes(
        image=batch.image, mask=batch.mask, valid=batch.valid, uid=batch.uid
    )
    # Whole volumes too, whatever the slabs are: noise is keyed by volume and slice.
    changes = {
        "sample_at_test": True,
        "slabs": SlabConfig(num_slices=3, overlap=1),
    }
    score = dataclasses.replace(config, **changes).make(RUN).score
    together = jax.jit(score)(model, volumes, KEY)
    alone = jax.jit(plain.make(RUN).score)(model, volumes, KEY)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        together,
        alone,
    )


@pytest.mark.parametrize("kind", [Mixer.NONE, Mixer.GRU, Mixer.TRANSFORMER])
def test_only_without_a_mixer_slices_may_be_permuted_or_halved(kind: Mixer) -> None:
    image, valid = _batch().image, _batch().valid
    order = np.array([3, 0, 4, 1, 2])
    whole = _output(kind, image, valid)
    permuted = _output(kind, image[:, order], valid)
    first = jnp.arange(LENGTH)[None] < 2  # the others are padding
    halves = [
        _output(kind, image, jnp.broadcast_to(x, valid.shape)) for x in (first, ~first)
    ]
    joined = np.where(np.asarray(first)[..., None, None, None], *halves)
    alone = kind is Mixer.NONE
    assert np.allclose(whole[:, order], permuted, atol=1e-6) == alone
    assert np.allclose(whole, joined, atol=1e-6) == alone
    assert np.abs(whole - whole[:, :1]).max() > 1e-3


def test_padding_changes_neither_loss_nor_gradient() -> None:
    config, batch = _config(Mixer.TRANSFORMER), _batch(padded=2)
    step = jax.jit(
        jax.value_and_grad(functools.partial(interslice.loss, config), has_aux=True)
    )
    garbage = batch.image.at[:, -2:].set(5.0)
    other = dataclasses.replace(
        batch, image=garbage, mask=batch.mask.at[:, -2:].set(False)
    )
    params = _model(Mixer.TRANSFORMER).params
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        step(params, {}, batch, KEY),
        step(params, {}, other, KEY),
    )


def test_gradient_reaches_other_slices_of_the_input() -> None:
    batch = _batch()

    def centre_of(kind: Mixer) -> np.ndarray:
        def of(image: jax.Array) -> jax.Array:
            return _compiled(kind)(_model(kind), image, batch.valid)[0, 2].sum()

        return np.abs(np.asarray(jax.grad(of)(batch.image))).sum(axis=(2, 3, 4))

    assert (centre_of(Mixer.GRU)[0] > 0).all()
    np.testing.assert_array_equal(centre_of(Mixer.NONE)[0] > 0, np.arange(LENGTH) == 2)


def test_reductions_and_the_kl_weight_are_as_stated() -> None:
    batch, model = _batch(), _model(Mixer.GRU)
    config = _config(Mixer.GRU, reduction=losses.Reduction.MEAN, kl_weight=0.25)
    loss = jax.jit(functools.partial(interslice.loss, config, train=False))
    value, (_, scalars) = loss(model.params, {}, batch, KEY)
    np.testing.assert_allclose(scalars["reconstruction"], scalars["l1"], rtol=1e-6)
    mu, log_sigma = interslice.encode(config, model.params, batch.image, batch.valid)
    # Summed over the latents, in either reduction of the pixels.
    kl = losses.kl_normal(*(x.reshape(-1, 8) for x in (mu, log_sigma))).mean()
    np.testing.assert_allclose(scalars["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(value, scalars["l1"] + 0.25 * kl, rtol=1e-5)


def test_erased_input_has_a_whole_target_and_validation_sees_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, params = _batch(), _model(Mixer.NONE).params
    seen: list[jax.Array] = []
    erase = interslice.erase_lib.erase

    def spy(*args: Any, **kwargs: Any) -> jax.Array:
        seen.append(erase(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(interslice.erase_lib, "erase", spy)

    def l1(probability: float, train: bool) -> float:
        config = _config(Mixer.NONE, dropout=0.0)
        config.erase = dataclasses.replace(config.erase, probability=probability)
        given = interslice.loss(config, params, {}, batch, KEY, train=train)
        return float(given[1][1]["l1"])

    erased = l1(1.0, train=True)
    assert erased != l1(0.0, train=True)
    # The same input without erasing has itself as its target, and another error.
    (first, *_) = seen
    assert (first != batch.image).any()
    blind = dataclasses.replace(batch, image=first)
    config = _config(Mixer.NONE, dropout=0.0)
    config.erase = dataclasses.replace(config.erase, probability=0.0)
    own = interslice.loss(config, params, {}, blind, KEY, train=True)[1][1]["l1"]
    assert abs(float(own) - erased) > 1e-3
    np.testing.assert_allclose(l1(0.0, train=True), l1(1.0, train=False), rtol=1e-6)


def test_decoding_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, model = _batch(), _model(Mixer.NONE)

    def config(parts: int) -> InterSliceConfig:
        slabs = SlabConfig(num_slices=LENGTH, remat_slices=parts)
        return dataclasses.replace(_config(Mixer.NONE), slabs=slabs)

    def gradient(parts: int) -> types.Tree:
        loss = functools.partial(interslice.loss, config(parts))
        of = jax.jit(jax.grad(loss, has_aux=True))
        return of(model.params, {}, batch, KEY)[0]

    unrolled = jax.jit(functools.partial(interslice.reconstruct_slab, config(1)))
    np.testing.assert_allclose(
        unrolled(model, batch.image, batch.valid),
        _output(Mixer.NONE, batch.image, batch.valid),
        rtol=1e-4,
        atol=1e-5,
    )
    whole = gradient(0)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # in a loop
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
        whole,
        gradient(1),
    )


def _volumes(depths: tuple[int, ...], padded: int) -> types.Volumes:
    rng = np.random.default_rng(0)
    valid = np.arange(padded) < np.array(depths)[:, None]
    image = rng.random((len(depths), padded, 16, 16, 1)) * valid[..., None, None, None]
    return types.Volumes(
        image=jnp.asarray(image, jnp.float32),
        mask=jnp.asarray(image > 0.2),
        valid=jnp.asarray(valid),
        uid=jnp.arange(len(depths)),
    )


def test_volumes_of_any_depth_are_scored_slab_by_slab() -> None:
    # 7 is no multiple of 5, 3 is less than a slab.
    volumes = _volumes((7, 3), 7)
    config = _config(Mixer.GRU, residual=residuals.Residual.POSITIVE)
    scores = jax.jit(config.make(RUN).score)(_model(Mixer.GRU), volumes, KEY)
    assert scores.reconstruction is not None
    output = np.asarray(scores.reconstruction)
    every = jnp.ones((1, LENGTH), bool)
    one, two = (
        _output(Mixer.GRU, volumes.image[:1, first : first + 5], every)
        for first in (0, 2)
    )
    np.testing.assert_allclose(output[0, :2], one[0, :2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(output[0, 5:], two[0, 3:], rtol=1e-4, atol=1e-5)
    mean = (one[0, 2:] + two[0, :3]) / 2
    np.testing.assert_allclose(output[0, 2:5], mean, rtol=1e-4, atol=1e-5)
    thin = _output(Mixer.GRU, volumes.image[1:, :5], volumes.valid[1:, :5])
    np.testing.assert_allclose(output[1, :3], thin[0, :3], rtol=1e-4, atol=1e-5)
    expected = residuals.anomaly_map(
        config.residual, volumes.image, scores.reconstruction, volumes.valid
    )
    np.testing.assert_allclose(scores.anomaly_map, expected, rtol=1e-4, atol=1e-5)


def test_the_centre_slides_over_the_volume() -> None:
    config = _config(Mixer.GRU)
    config.slabs = SlabConfig(num_slices=LENGTH, target=Target.CENTRE, score_chunk=3)
    volumes = _volumes((7, 4), 7)
    scores = jax.jit(config.make(RUN).score)(_model(Mixer.GRU), volumes, KEY)
    output = np.asarray(scores.reconstruction)
    for row, depth in ((0, 7), (1, 4)):
        for z in range(depth):
            index = np.arange(z - 2, z + 3)
            inside = jnp.asarray((index >= 0) & (index < depth))[None]
            window = volumes.image[row, np.clip(index, 0, depth - 1)][None]
            expected = _output(Mixer.GRU, window, inside)[0, 2]
            np.testing.assert_allclose(output[row, z], expected, rtol=1e-4, atol=1e-5)


def test_the_centre_alone_is_in_the_loss() -> None:
    config = _config(Mixer.GRU)
    config.slabs = SlabConfig(num_slices=LENGTH, target=Target.CENTRE)
    batch = _batch()
    loss = jax.jit(functools.partial(interslice.loss, config, train=False))
    model = _model(Mixer.GRU)
    _, (_, scalars) = loss(model.params, {}, batch, KEY)
    keys = interslice.slice_keys(KEY, batch)
    decode = jax.jit(functools.partial(interslice.reconstruct_slab, config))
    sampled = decode(model, batch.image, batch.valid, keys)
    assert sampled.shape == (2, 1, 16, 16, 1)
    l1 = jnp.abs(sampled[:, 0] - batch.image[:, 2]).mean()
    np.testing.assert_allclose(scalars["l1"], l1, rtol=1e-5)


def test_bfloat16_is_close_and_keeps_float32_state() -> None:
    image, valid = _batch().image, _batch().valid
    config = _config(Mixer.CONVGRU, precision=base.Precision.BFLOAT16)
    state = jax.eval_shape(config.make(RUN).init, KEY, _batch())
    floats = {x.dtype for x in jax.tree.leaves(state) if x.dtype != jnp.int32}
    assert floats == {jnp.dtype(jnp.float32)}
    run = jax.jit(functools.partial(interslice.reconstruct_slab, config))
    close = run(_model(Mixer.CONVGRU), image, valid)
    assert close.dtype == jnp.float32
    exact = _output(Mixer.CONVGRU, image, valid)
    np.testing.assert_allclose(close, exact, atol=0.03 * np.abs(exact).max())
    assert (close != exact).any()


def test_image_that_does_not_fit_names_the_allowed_resolutions() -> None:
    batch = slabs.batch()
    odd = dataclasses.replace(batch, image=jnp.zeros((2, 3, 15, 18, 1)))
    with pytest.raises(ValueError, match=r"15x18.*Pad to even sides"):
        interslice.init_model(slabs.config(), KEY, odd)
    wide = dataclasses.replace(batch, image=jnp.zeros((2, 3, 16, 24, 1)))
    with pytest.raises(ValueError, match=r"is 3.*16x24.*\[8, 4, 2\]"):
        interslice.init_model(slabs.config(intermediate_resolution=3), KEY, wide)
    config = slabs.config(intermediate_resolution=4)
    model = jax.eval_shape(lambda: interslice.init_model(config, KEY, wide))
    assert model.params["encoder"]["Dense_0"]["kernel"].shape[0] == 4 * 6 * 2


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("", {"latent_size": 0}),
        ("", {"kl_weight": -1.0}),
        ("", {"dropout": 1.0}),
        ("", {"width": 4}),
        ("", {"width": 32, "max_width": 16}),
        ("", {"latent_size": 7}),
        ("slabs", {"num_slices": 0}),
        ("slabs", {"overlap": 3}),
        ("slabs", {"num_slices": 4, "target": Target.CENTRE}),
        ("slabs", {"overlap": 1, "target": Target.CENTRE}),
        ("slabs", {"remat_slices": 2}),
        ("slabs", {"score_chunk": -1}),
        ("mixer", {"slice_dropout": 1.0}),
        ("mixer", {"num_layers": 0}),
        ("mixer", {"num_heads": 3, "kind": Mixer.TRANSFORMER}),
        ("mixer", {"slice_dropout": 0.1, "kind": Mixer.NONE}),
        ("erase", {"probability": -0.1}),
    ],
)
def test_impossible_settings_are_named(part: str, change: dict[str, Any]) -> None:
    config = slabs.config()
    config.validate()
    name = next(iter(change))
    if part:
        change = {part: dataclasses.replace(getattr(config, part), **change)}
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(config, **change).validate()
    narrow = slabs.config(Mixer.CONVGRU, width=8)
    with pytest.raises(ValueError, match="convgru needs multiples of 16"):
        narrow.validate()


def test_sinusoidal_positions_need_no_parameters() -> None:
    def size(positions: Positions) -> int:
        config = _config(Mixer.TRANSFORMER, mixer={"positions": positions})
        model = jax.eval_shape(lambda: interslice.init_model(config, KEY, _batch()))
        return sum(leaf.size for leaf in jax.tree.leaves(model.params))

    assert size(Positions.LEARNED) - size(Positions.SINUSOIDAL) == LENGTH * 8
