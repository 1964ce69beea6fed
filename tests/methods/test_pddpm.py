import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import denoisers
from uad_jax import denoising, noising, types
from uad_jax.methods import base, pddpm
from uad_jax.ops import diffusion, noise, patches

CONFIG = denoisers.pddpm_config()
CONFIG.process.noise = noise.Noise.GAUSSIAN  # compiles fastest
RUN = base.RunShape(total_steps=10, steps_per_epoch=5, global_batch=4)
MODEL = types.ModelState(params={}, collections={})


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Replaces the network by a smooth function; lists the shapes it is traced with."""
    found: list[tuple[int, ...]] = []

    def denoiser(config: Any, params: Any, shape: Any) -> diffusion.Denoiser:
        def denoise(xt: jax.Array, t: jax.Array) -> jax.Array:
            found.append(xt.shape)
            # Every pixel sees every other, as in a U-Net.
            total = xt.mean(axis=(1, 2), keepdims=True)
            return jnp.sin(3 * xt + total + t[:, None, None, None] / 1000)

        return denoise

    monkeypatch.setattr(denoising, "denoiser", denoiser)
    return found


def _slices(count: int = 3) -> tuple[jax.Array, jax.Array, jax.Array]:
    batch = denoisers.batch(count)
    return batch.image, batch.mask, jax.random.split(jax.random.key(5), count)


def _one_box(
    config: pddpm.PddpmConfig, inside: np.ndarray, t: int = 499
) -> tuple[jax.Array, jax.Array]:
    """Images, and the images with one box denoised by the noise of scoring."""
    image, _, keys = _slices()
    steps = jnp.full((3, 1), t)
    rows, t_rows, eps = noising.for_each_step(config.process, image, keys, steps)
    where = jnp.broadcast_to(jnp.asarray(inside), (3, 16, 16, 1))
    return image, pddpm.denoise_box(config, {}, rows, where, t_rows, eps)


@pytest.mark.parametrize("kind", list(diffusion.Prediction))
def test_output_outside_the_box_is_the_input_to_the_bit(
    kind: diffusion.Prediction,
) -> None:
    process = dataclasses.replace(CONFIG.process, prediction=kind)
    config = dataclasses.replace(CONFIG, process=process)
    for inside in patches.masks(pddpm.grid(config, (16, 16, 1))):
        image, output = _one_box(config, inside)
        outside = ~inside[None, ..., 0]
        np.testing.assert_array_equal(
            np.asarray(output)[..., 0][:, outside[0]],
            np.asarray(image)[..., 0][:, outside[0]],
        )
        changed = (output != image)[..., 0][:, inside[..., 0]]
        assert changed.mean() > 0.99


def test_the_denoiser_sees_noise_in_the_box_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def denoiser(config: Any, params: Any, shape: Any) -> diffusion.Denoiser:
        return lambda xt, t: seen.append(xt) or xt

    monkeypatch.setattr(denoising, "denoiser", denoiser)
    inside = patches.masks(pddpm.grid(CONFIG, (16, 16, 1)))[2]
    image, _ = _one_box(CONFIG, inside)
    clean = np.asarray(2 * image - 1)
    outside = ~inside[..., 0]
    np.testing.assert_array_equal(seen[0][:, outside], clean[:, outside])
    assert (seen[0][:, ~outside] != clean[:, ~outside]).mean() > 0.99


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_boxes_one_by_one_in_any_order_give_the_same_reconstruction(
    order: tuple[int, ...],
) -> None:
    image, mask, keys = _slices()
    pasted = np.zeros(image.shape, np.float32)
    boxes = patches.masks(pddpm.grid(CONFIG, (16, 16, 1)))
    for k in order:
        _, output = _one_box(CONFIG, boxes[k])
        pasted = np.where(boxes[k], output, pasted)
    together = pddpm.reconstruct_slices(CONFIG, MODEL, image, mask, keys)
    assert together.shape == (3, 1, 16, 16, 1)
    np.testing.assert_allclose(together[:, 0], pasted, atol=1e-6)


@pytest.mark.parametrize("overlap", list(patches.Overlap))
def test_overlapping_boxes_are_joined_as_asked(overlap: patches.Overlap) -> None:
    config = dataclasses.replace(CONFIG, patch=10, overlap=overlap)
    image, mask, keys = _slices()
    boxes = pddpm.grid(config, (16, 16, 1))
    assert boxes.rows == boxes.columns == (0, 6)
    outputs = [np.asarray(_one_box(config, box)[1]) for box in patches.masks(boxes)]
    joined = np.asarray(
        pddpm.reconstruct_slices(config, MODEL, image, mask, keys)[:, 0]
    )
    # Pixel (2, 7) lies in the first box and in its right neighbour.
    one, two = outputs[0][:, 2, 7], outputs[1][:, 2, 7]
    expected = {"average": (one + two) / 2, "first": one, "cut": one}[overlap.value]
    np.testing.assert_allclose(joined[:, 2, 7], expected, atol=1e-6)
    expected = {
        "average": np.mean([output[:, 8, 8] for output in outputs], 0),
        "first": outputs[0][:, 8, 8],
        "cut": outputs[3][:, 8, 8],
    }[overlap.value]
    np.testing.assert_allclose(joined[:, 8, 8], expected, atol=1e-6)


@pytest.mark.parametrize("boxes", list(pddpm.Boxes))
def test_loss_is_the_mean_error_inside_the_box(boxes: pddpm.Boxes) -> None:
    config = dataclasses.replace(CONFIG, boxes=boxes)
    batch, key = denoisers.batch(), jax.random.key(3)
    value, (_, scalars) = pddpm.loss(config, {}, {}, batch, key)
    assert scalars == {}
    example = noising.noised(config.process, batch, key)
    inside = pddpm.training_boxes(config, example.keys, batch.image.shape)
    rows = []
    for n in range(4):
        x0, xt = np.asarray(example.x0[n]), np.asarray(example.xt[n])
        box = np.asarray(inside[n])
        assert 0 < box.sum() <= 64
        seen = np.where(box, xt, x0)
        output = np.sin(3 * seen + seen.mean() + float(example.t[n]) / 1000)
        rows.append(np.abs(output - x0)[box].mean())
    np.testing.assert_allclose(value, np.mean(rows), rtol=1e-5)
    if boxes is not pddpm.Boxes.RANDOM_CUT:
        # The released code averages over the whole slice: a quarter of it here.
        assert (np.asarray(inside).mean(axis=(1, 2, 3)) == 0.25).all()


def test_boxes_follow_the_row_and_all_occur() -> None:
    keys = jax.random.split(jax.random.key(0), 64)
    shape = (64, 16, 16, 1)
    inside = pddpm.training_boxes(CONFIG, keys, shape)
    order = np.random.default_rng(0).permutation(64)
    np.testing.assert_array_equal(
        pddpm.training_boxes(CONFIG, keys[order], shape), inside[order]
    )
    assert len(np.unique(np.asarray(inside).reshape(64, -1), axis=0)) == 4
    # Step, noise and box of a row are drawn from different keys.
    batch = denoisers.batch()
    example = noising.noised(CONFIG.process, batch, jax.random.key(0))
    rows = base.sample_keys(jax.random.key(0), batch.uid, batch.slice_index)
    data = jax.random.key_data
    assert (data(example.keys) != data(rows)).any()


def test_all_boxes_of_all_slices_of_all_volumes_run_in_one_call(
    calls: list[tuple[int, ...]],
) -> None:
    score = jax.jit(CONFIG.make(RUN).score)
    volumes = denoisers.volumes(count=2, depth=5)
    first = score(MODEL, volumes, jax.random.key(0))
    assert calls.count((2 * 5 * 4, 16, 16, 1)) == len(calls) > 0
    traces = len(calls)
    jaxpr = str(
        jax.make_jaxpr(CONFIG.make(RUN).score)(MODEL, volumes, jax.random.key(0))
    )
    assert jaxpr.count("sin ") == 1

    del calls[:]
    other = dataclasses.replace(volumes, image=volumes.image * 0.5)
    second = score(MODEL, other, jax.random.key(1))
    assert (first.anomaly_map != second.anomaly_map).any()
    assert not calls, "scored again, traced again"
    assert score._cache_size() == 1 <= traces


def _scores(*steps: int) -> types.Scores:
    scoring = dataclasses.replace(CONFIG.scoring, test_steps=steps)
    method = dataclasses.replace(CONFIG, scoring=scoring).make(RUN)
    assert method.score is not None
    return method.score(MODEL, denoisers.volumes(), jax.random.key(4))


def test_ensemble_is_the_mean_over_its_steps(calls: list[tuple[int, ...]]) -> None:
    singles = [np.asarray(_scores(t).reconstruction) for t in (249, 499, 749)]
    del calls[:]
    together = _scores(249, 499, 749)
    assert set(calls) == {(2 * 3 * 3 * 4, 16, 16, 1)}
    np.testing.assert_allclose(together.reconstruction, np.mean(singles, 0), atol=1e-6)


def test_scores_do_not_depend_on_the_chunk_or_the_place() -> None:
    whole = _scores(499)
    scoring = dataclasses.replace(CONFIG.scoring, chunk=2)
    score = dataclasses.replace(CONFIG, scoring=scoring).make(RUN).score
    assert score is not None
    swapped = jax.tree.map(lambda x: x[::-1], denoisers.volumes())
    parts = score(MODEL, swapped, jax.random.key(4))
    np.testing.assert_allclose(parts.anomaly_map[::-1], whole.anomaly_map, atol=1e-6)


def test_prior_takes_a_strength() -> None:
    image, mask, _ = _slices()
    key = jax.random.key(0)
    half = pddpm.reconstruct(CONFIG, MODEL, image, mask, key, 0.5)
    default = pddpm.reconstruct(CONFIG, MODEL, image, mask, key)
    np.testing.assert_array_equal(half, default)  # t = 499
    rows = pddpm.reconstruct(CONFIG, MODEL, image, mask, key, jnp.array([0.5, 1, 1]))
    np.testing.assert_allclose(rows[0], half[0], atol=1e-6)
    assert (rows[1] != half[1]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 17}, r"patch is 17 x 17 pixels, but the image is 16 x 16"),
        ({"patch": 6, "stride": 8}, r"leave \d+ of 16 pixels uncovered"),
        ({"patch": 8, "stride": 5}, r"leave \d+ of 16 pixels uncovered"),
    ],
)
def test_boxes_that_do_not_cover_the_image_are_refused_at_once(
    change: dict[str, int], message: str
) -> None:
    method = dataclasses.replace(CONFIG, **change).make(RUN)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(method.init, jax.random.key(0), denoisers.batch())


@pytest.mark.parametrize("change", [{"patch": 0}, {"stride": -1}, {"ema_decay": 1.0}])
def test_impossible_settings_are_named(change: dict[str, float]) -> None:
    name, value = next(iter(change.items()))
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        dataclasses.replace(CONFIG, **change).validate()
