import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import denoisers
from uad_jax import denoising, denoising_config, noising, types
from uad_jax.methods import base, ddpm
from uad_jax.ops import diffusion, losses, noise, residuals

CONFIG = denoisers.ddpm_config()
RUN = base.RunShape(total_steps=10, steps_per_epoch=5, global_batch=4)
MODEL = types.ModelState(params={}, collections={})


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces the network by `stub["denoise"]`; counts its traces."""
    state: dict[str, Any] = {"traces": 0, "denoise": lambda xt, t: jnp.tanh(xt)}

    def denoiser(config: Any, params: Any, shape: Any) -> diffusion.Denoiser:
        def denoise(xt: jax.Array, t: jax.Array) -> jax.Array:
            state["traces"] += 1
            return state["denoise"](xt, t)

        return denoise

    monkeypatch.setattr(denoising, "denoiser", denoiser)
    return state


def _with(config: Any, part: str, **changes: Any) -> Any:
    return dataclasses.replace(
        config, **{part: dataclasses.replace(getattr(config, part), **changes)}
    )


def _slices(count: int = 4) -> tuple[jax.Array, jax.Array, jax.Array]:
    batch = denoisers.batch(count)
    return batch.image, batch.mask, jax.random.split(jax.random.key(5), count)


@pytest.mark.parametrize("kind", list(diffusion.Prediction))
@pytest.mark.parametrize("pixel_loss", list(losses.PixelLoss))
def test_loss_by_hand(
    stub: dict[str, Any], kind: diffusion.Prediction, pixel_loss: losses.PixelLoss
) -> None:
    config = _with(CONFIG, "process", prediction=kind, pixel_loss=pixel_loss)
    batch, key = denoisers.batch(), jax.random.key(3)
    value, (_, scalars) = ddpm.loss(config, {}, {}, batch, key)
    assert scalars == {}
    keys = base.sample_keys(key, batch.uid, batch.slice_index)
    abar = np.asarray(config.process.make_schedule().abar, np.float64)
    rows = []
    for n in range(4):
        step_key, noise_key = (jax.random.fold_in(keys[n], i) for i in (0, 1))
        t = int(jax.random.randint(step_key, (), 0, 1000))
        eps = np.asarray(
            config.process.make_noise((16, 16, 1))(noise_key[None], jnp.array([t]))[0]
        )
        x0 = 2 * np.asarray(batch.image[n]) - 1
        signal, share = np.sqrt(abar[t]), np.sqrt(1 - abar[t])
        xt = signal * x0 + share * eps
        wanted = {"x0": x0, "eps": eps, "v": signal * eps - share * x0}[kind.value]
        error = np.abs(np.tanh(xt) - wanted)
        rows.append(np.mean(error if pixel_loss.value == "l1" else error**2))
    np.testing.assert_allclose(value, np.mean(rows), rtol=2e-4)


def test_training_steps_stay_below_their_limit() -> None:
    process = dataclasses.replace(CONFIG.process, train_steps=7)
    batch = denoisers.batch(64)
    t = noising.noised(process, batch, jax.random.key(0)).t
    assert set(np.asarray(t)) == set(range(7))


def test_noise_of_a_row_does_not_depend_on_its_place() -> None:
    batch, key = denoisers.batch(), jax.random.key(3)
    order = np.array([2, 0, 3, 1])
    whole = noising.noised(CONFIG.process, batch, key)
    other = noising.noised(CONFIG.process, jax.tree.map(lambda x: x[order], batch), key)
    np.testing.assert_array_equal(whole.t[order], other.t)
    np.testing.assert_array_equal(whole.xt[order], other.xt)
    same = dataclasses.replace(batch, image=jnp.zeros_like(batch.image))
    first_step = dataclasses.replace(CONFIG.process, train_steps=1)
    xt = noising.noised(first_step, same, key).xt
    assert all((xt[n] != xt[m]).any() for n in range(4) for m in range(n))


def test_shared_noise_is_one_field_for_the_batch_and_one_per_volume(
    stub: dict[str, Any],
) -> None:
    config = _with(CONFIG, "process", shared_noise=True, num_steps=1, train_steps=1)
    batch = denoisers.batch()
    example = noising.noised(config.process, batch, jax.random.key(0))
    field = example.xt - jnp.sqrt(1 - 0.999) * example.x0
    np.testing.assert_allclose(field, np.broadcast_to(field[:1], (4, 16, 16, 1)), 1e-4)

    # A denoiser that gives its input back shows the noise: equal images, equal outputs.
    config = _with(config, "scoring", test_steps=(0,))
    stub["denoise"] = lambda xt, t: xt
    volumes = denoisers.volumes()
    flat = dataclasses.replace(volumes, image=jnp.full_like(volumes.image, 0.5))
    method = config.make(RUN)
    assert method.score is not None
    output = method.score(MODEL, flat, jax.random.key(1)).reconstruction
    assert output is not None
    np.testing.assert_array_equal(output[:, 0], output[:, 1])
    assert (output[0] != output[1]).any()
    alone = _with(config, "process", shared_noise=False).make(RUN).score
    assert alone is not None
    output = alone(MODEL, flat, jax.random.key(1)).reconstruction
    assert output is not None
    assert (output[:, 0] != output[:, 1]).any()


def test_the_right_prediction_reconstructs_the_image(stub: dict[str, Any]) -> None:
    image, mask, keys = _slices()
    rows = jnp.repeat(2 * image - 1, 2, axis=0)  # two test steps each
    stub["denoise"] = lambda xt, t: rows
    outputs = ddpm.reconstruct_slices(CONFIG, MODEL, image, mask, keys)
    assert outputs.shape == (4, 2, 16, 16, 1)
    np.testing.assert_allclose(outputs.mean(1), image, atol=1e-6)


@pytest.mark.parametrize("sampler", list(diffusion.Sampler))
def test_a_chain_with_the_right_prediction_reconstructs_the_image(
    stub: dict[str, Any], sampler: diffusion.Sampler
) -> None:
    config = dataclasses.replace(
        denoisers.anoddpm_config(), sampler=sampler, eta=0.5, chain_calls=0
    )
    image, mask, keys = _slices()
    schedule = config.process.make_schedule()

    def denoise(xt: jax.Array, t: jax.Array) -> jax.Array:
        kind = diffusion.Prediction.EPS
        return diffusion.from_x0(schedule, kind, 2 * image - 1, xt, t)

    stub["denoise"] = denoise
    outputs = ddpm.reconstruct_slices(config, MODEL, image, mask, keys)
    np.testing.assert_allclose(outputs[:, 0], image, atol=1e-4)


def test_a_chain_is_one_scan_with_one_trace_of_the_denoiser(
    stub: dict[str, Any],
) -> None:
    config = dataclasses.replace(denoisers.anoddpm_config(), chain_calls=0)
    config = _with(config, "scoring", test_steps=(17,))
    stub["denoise"] = lambda xt, t: jnp.sin(xt)
    image, mask, keys = _slices()

    def run(image: jax.Array) -> jax.Array:
        return ddpm.reconstruct_slices(config, MODEL, image, mask, keys)

    jaxpr = jax.make_jaxpr(run)(image)
    assert str(jaxpr).count("sin ") == 1
    assert "length=18" in str(jaxpr)


def test_scoring_again_does_not_trace_again(stub: dict[str, Any]) -> None:
    score = jax.jit(denoisers.anoddpm_config().make(RUN).score)
    volumes = denoisers.volumes()
    first = score(MODEL, volumes, jax.random.key(0)).anomaly_map
    traces = stub["traces"]
    other = dataclasses.replace(volumes, image=volumes.image * 0.5, uid=volumes.uid + 1)
    assert (score(MODEL, other, jax.random.key(1)).anomaly_map != first).any()
    assert stub["traces"] == traces
    assert score._cache_size() == 1


def _maps(config: ddpm.DdpmConfig, *steps: int) -> types.Scores:
    method = _with(config, "scoring", test_steps=steps).make(RUN)
    assert method.score is not None
    return method.score(MODEL, denoisers.volumes(), jax.random.key(4))


@pytest.mark.parametrize("way", list(ddpm.Way))
def test_ensemble_is_the_mean_over_its_steps(
    stub: dict[str, Any], way: ddpm.Way
) -> None:
    config = dataclasses.replace(CONFIG, way=way)
    config = _with(config, "process", num_steps=10)
    singles = [_maps(config, t) for t in (2, 5)]
    together = _maps(config, 2, 5)
    mean = np.mean([np.asarray(single.reconstruction) for single in singles], 0)
    image = np.asarray(denoisers.volumes().image)
    np.testing.assert_allclose(together.reconstruction, mean, atol=1e-6)
    np.testing.assert_allclose(
        together.anomaly_map, np.abs(image - mean)[..., 0], atol=1e-6
    )
    averaged = _maps(_with(config, "scoring", average=denoising.Average.MAPS), 2, 5)
    expected = np.mean([np.asarray(single.anomaly_map) for single in singles], 0)
    np.testing.assert_allclose(averaged.anomaly_map, expected, atol=1e-6)
    assert (np.abs(averaged.anomaly_map - together.anomaly_map) > 1e-3).any()


def test_ssim_scores_whole_volumes_whatever_the_chunk(stub: dict[str, Any]) -> None:
    config = _with(CONFIG, "scoring", residual=residuals.Residual.SSIM)
    scores = _maps(config, 499)
    volumes = denoisers.volumes()
    expected = residuals.anomaly_map(
        residuals.Residual.SSIM, volumes.image, scores.reconstruction, volumes.valid
    )
    np.testing.assert_allclose(scores.anomaly_map, expected, atol=1e-6)
    parts = _maps(_with(config, "scoring", chunk=2), 499)
    np.testing.assert_allclose(parts.anomaly_map, expected, atol=1e-5)


def test_prior_takes_the_test_steps_or_a_strength(stub: dict[str, Any]) -> None:
    image, mask, _ = _slices()
    key = jax.random.key(0)
    stub["denoise"] = lambda xt, t: jnp.broadcast_to(
        t[:, None, None, None] / 1000.0, xt.shape
    )

    def level(config: ddpm.DdpmConfig, strength: Any) -> np.ndarray:
        output = ddpm.reconstruct(config, MODEL, image, mask, key, strength)
        return np.asarray(1000 * (2 * output[:, 0, 0, 0] - 1))

    np.testing.assert_allclose(level(CONFIG, None), 374, atol=1e-2)
    np.testing.assert_allclose(level(CONFIG, 0.5), 499, atol=1e-2)
    np.testing.assert_allclose(level(CONFIG, 1e-9), 0, atol=1e-2)
    shares = jnp.array([0.001, 0.25, 0.499, 1.0])
    np.testing.assert_allclose(level(CONFIG, shares), [0, 249, 498, 999], atol=1e-2)
    for strength in (0.0, 1.5, np.float32(1.5), jnp.array([0.5, 0.5, 0.0, 0.5])):
        with pytest.raises(ValueError, match=r"strength is (0|1.5).*1000 steps"):
            level(CONFIG, strength)
    with pytest.raises(ValueError, match="strength is nan"):
        level(CONFIG, jnp.float32(jnp.nan))
    chain = denoisers.anoddpm_config()
    half = ddpm.reconstruct(chain, MODEL, image, mask, key, 0.5)
    same = ddpm.reconstruct(chain, MODEL, image, mask, key, jnp.float32(0.5))
    np.testing.assert_array_equal(half, same)
    with pytest.raises(TypeError, match="length of a chain"):
        ddpm.reconstruct(chain, MODEL, image, mask, key, shares)


def test_clip_limits_the_reconstruction(stub: dict[str, Any]) -> None:
    stub["denoise"] = lambda xt, t: 3 * xt
    image, mask, keys = _slices()
    free = ddpm.reconstruct_slices(CONFIG, MODEL, image, mask, keys)
    config = dataclasses.replace(CONFIG, clip=True)
    limited = ddpm.reconstruct_slices(config, MODEL, image, mask, keys)
    np.testing.assert_allclose(limited, np.clip(free, 0, 1), atol=1e-6)
    assert (free > 1).any()


def test_parameters_are_float32_at_every_precision() -> None:
    batch = denoisers.batch(2, channels=2)
    half = dataclasses.replace(CONFIG, precision=base.Precision.BFLOAT16)
    assert denoising.network(half, batch.image.shape).dtype == jnp.bfloat16
    state = jax.eval_shape(half.make(RUN).init, jax.random.key(0), batch)
    floats = {x.dtype for x in jax.tree.leaves(state) if x.dtype != jnp.int32}
    assert floats == {jnp.dtype(jnp.float32)}
    keys = jax.random.split(jax.random.key(0), 2)
    output = jax.eval_shape(
        lambda model: ddpm.reconstruct_slices(
            half, model, batch.image, batch.mask, keys
        ),
        state.for_eval(),
    )
    assert (output.shape, output.dtype) == ((2, 2, 16, 16, 2), jnp.float32)


def test_image_that_cannot_be_halved_is_named() -> None:
    config = _with(CONFIG, "unet", multipliers=(1, 1, 1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"multiples of 32; the image is 16x16"):
        jax.eval_shape(config.make(RUN).init, jax.random.key(0), denoisers.batch())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scoring.test_steps": (1000,)}, r"test_steps is 1000.*T = 1000.*0 to 999"),
        ({"scoring.test_steps": (-1,)}, "test_steps is -1"),
        ({"scoring.test_steps": ()}, "test_steps"),
        ({"scoring.test_steps": (5, 5)}, "different"),
        ({"scoring.chunk": -1}, "chunk is -1"),
        ({"process.noise": "perlin"}, "Unknown noise 'perlin'.*simplex_3d"),
        ({"process.num_steps": 0}, "0 steps"),
        ({"process.train_steps": 1001}, "train_steps is 1001.*1000"),
        ({"unet.width": 7}, "width is 7"),
        ({"unet.head_size": 3}, "head_size is 3.*8 channels"),
        ({"unet.num_heads": 3}, "num_heads is 3.*8 channels"),
        ({"unet.attention_levels": (1,)}, "levels are 0 to 0"),
        ({"unet.multipliers": ()}, "multipliers"),
        ({"accumulate_steps": 0}, "accumulate_steps is 0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"eta": 1.5}, "eta is 1.5"),
        ({"chain_calls": -1}, "chain_calls is -1"),
        ({"way": ddpm.Way.CHAIN, "chain_calls": 400}, "t = 249 cannot make 400"),
    ],
)
def test_impossible_settings_are_named(change: dict[str, Any], message: str) -> None:
    config = CONFIG
    for path, value in change.items():
        part, _, field = path.rpartition(".")
        if part:
            config = _with(config, part, **{field: value})
        else:
            config = dataclasses.replace(config, **{field: value})
    with pytest.raises(ValueError, match=message):
        config.validate()


def test_schedules_and_noises_are_those_asked_for() -> None:
    cosine = CONFIG.process.make_schedule()
    np.testing.assert_allclose(cosine.abar[499], 0.493844, atol=1e-6)
    linear = dataclasses.replace(
        CONFIG.process, schedule=denoising_config.NoiseSchedule.LINEAR
    ).make_schedule()
    np.testing.assert_allclose(linear.beta[[0, -1]], [1e-4, 0.02], rtol=1e-5)
    keys, t = jax.random.split(jax.random.key(0), 32), jnp.arange(32)
    for unit, expected in ((True, 1.0), (False, 0.59)):
        process = dataclasses.replace(
            CONFIG.process, noise=noise.Noise.SIMPLEX, unit_variance=unit
        )
        field = process.make_noise((64, 64, 1))(keys, t)
        np.testing.assert_allclose(field.std(), expected, rtol=0.15)
