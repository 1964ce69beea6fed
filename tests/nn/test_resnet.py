import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uad_jax.nn import resnet
from uad_jax.types import Tree

SMALL: dict[str, Any] = {"stage_sizes": (1, 2), "width": 4, "bottleneck_width": 4}


def _shapes(network: Any, *shape: int) -> tuple[Tree, Any]:
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    out, variables = jax.eval_shape(network.init_with_output, jax.random.key(0), image)
    return variables, out


def _count(network: Any, channels: int) -> int:
    params = _shapes(network, 1, 64, 64, channels)[0]["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@functools.cache
def _filled(**fields: Any) -> tuple[resnet.ResNet, Tree]:
    """A small network with random parameters and positive running variances."""
    network = resnet.ResNet(**{**SMALL, **fields})
    shapes, _ = _shapes(network, 1, 64, 64, 1)
    rng = np.random.default_rng(1)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        x = 0.5 * rng.standard_normal(leaf.shape).astype(np.float32)
        return np.abs(x) + 0.5 if path[-1].key in ("var", "scale") else x

    return network, jax.tree_util.tree_map_with_path(draw, shapes)


def _images(batch: int = 2, height: int = 64, width: int = 64) -> jax.Array:
    return jax.random.uniform(jax.random.key(0), (batch, height, width, 1))


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def _features(
    network: resnet.ResNet, variables: Tree, image: jax.Array, **kwargs: Any
) -> tuple[jax.Array, ...]:
    return network.apply(variables, image, **kwargs)


@functools.partial(jax.jit, static_argnums=0)
def _train(
    network: resnet.ResNet, variables: Tree, image: jax.Array, **kwargs: Any
) -> tuple[tuple[jax.Array, ...], Tree]:
    out, changed = network.apply(
        variables, image, train=True, mutable=["batch_stats"], **kwargs
    )
    return out, changed["batch_stats"]


def test_parameters_are_those_of_the_published_networks() -> None:
    head = 2048 * 1000 + 1000
    assert _count(resnet.ResNet(), 3) + head == 25_557_032
    assert _count(resnet.ResNet(bottleneck_width=128), 3) + head == 68_883_240
    assert _count(resnet.ResNet(), 1) == 23_501_760
    assert _count(resnet.ConditionEncoder(), 1) == 24_550_848


@pytest.mark.parametrize(
    ("size", "sides"), [((96, 96), (24, 12, 6, 3)), ((95, 96), (24, 12, 6, 3))]
)
def test_stages_halve_as_in_pytorch(
    size: tuple[int, int], sides: tuple[int, ...]
) -> None:
    variables, stages = _shapes(resnet.ResNet(), 2, *size, 1)
    expected = [(2, side, side, 256 << i) for i, side in enumerate(sides)]
    assert [stage.shape for stage in stages] == expected
    assert set(variables) == {"params", "batch_stats"}
    blocks = [name for name in variables["params"] if name.startswith("layer")]
    assert len(blocks) == 16


def test_the_condition_is_the_mapped_mean_of_the_last_stage() -> None:
    encoder = resnet.ConditionEncoder(5, stage_sizes=(1,), width=4)
    variables, out = _shapes(encoder, 2, 32, 40, 1)
    assert out.shape == (2, 5)
    assert out.dtype == jnp.float32
    assert set(variables["params"]) == {"backbone", "fc"}
    assert set(variables["batch_stats"]) == {"backbone"}


def test_a_fresh_block_passes_its_input() -> None:
    block = resnet.Bottleneck(inner=2, features=8)
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    out, _ = jax.jit(block.init_with_output)(jax.random.key(1), x)
    np.testing.assert_allclose(out, jnp.maximum(x, 0), rtol=1e-6)


def test_strides_start_at_the_first_pixel() -> None:
    block = resnet.Bottleneck(inner=1, features=1, stride=2)
    x = jnp.arange(1.0, 17.0).reshape(1, 4, 4, 1)
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    variables["batch_stats"] = {
        name: {"mean": np.zeros(1, np.float32), "var": np.full(1, 1 - 1e-5, np.float32)}
        for name in variables["batch_stats"]
    }
    for name, stats in variables["params"].items():
        if name.startswith("bn") or name == "downsample_1":
            stats["bias"] = np.zeros(1, np.float32)
    out = block.apply(variables, x)[0, :, :, 0]
    # Sums of 3x3 pixels around (0, 0), (0, 2), ... plus the pixel itself.
    np.testing.assert_allclose(
        out, [[14 + 1, 30 + 3], [57 + 9, 99 + 11]], rtol=1e-5, atol=1e-4
    )


def test_training_moves_the_statistics_a_tenth_of_the_way() -> None:
    network, variables = _filled()
    _, stats = _train(network, variables, _images())
    conv = jax.lax.conv_general_dilated(
        _images(),
        variables["params"]["conv1"]["kernel"],
        (2, 2),
        ((3, 3), (3, 3)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    old = variables["batch_stats"]["bn1"]
    for name, new in (("mean", conv.mean((0, 1, 2))), ("var", conv.var((0, 1, 2)))):
        np.testing.assert_allclose(
            stats["bn1"][name], 0.9 * old[name] + 0.1 * new, rtol=1e-4, atol=1e-5
        )


def test_padded_rows_change_neither_statistics_nor_other_rows() -> None:
    network, variables = _filled()
    padded = _images().at[1].set(7.0)
    valid = jnp.array([True, False])
    out, stats = _train(network, variables, padded, valid=valid)
    alone, own = _train(network, variables, padded[:1])
    np.testing.assert_allclose(out[1][0], alone[1][0], rtol=1e-4, atol=1e-4)
    for x, y in zip(jax.tree.leaves(stats), jax.tree.leaves(own), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_a_batch_of_padding_alone_gives_numbers() -> None:
    network, variables = _filled()
    out, stats = _train(network, variables, _images(), valid=jnp.zeros(2, bool))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((out, stats)))


def test_hidden_cells_stay_zero_and_are_never_seen() -> None:
    network, variables = _filled()
    active = jnp.array([[[True, False], [False, True]], [[False, True], [True, True]]])
    out, stats = _train(network, variables, _images(), active=active)
    hidden = ~jnp.repeat(jnp.repeat(active, 32, 1), 32, 2)[..., None]
    changed = jnp.where(hidden, 99.0, _images())
    again, same = _train(network, variables, changed, active=active)
    for x, y in zip(
        jax.tree.leaves((out, stats)), jax.tree.leaves((again, same)), strict=True
    ):
        np.testing.assert_array_equal(x, y)
    for stage in out:
        side = stage.shape[1]
        seen = np.repeat(np.repeat(active, side // 2, 1), side // 2, 2)
        assert not np.any(stage[~seen])
        assert np.any(stage[seen])


def test_masked_statistics_are_those_of_the_active_positions() -> None:
    network, variables = _filled()
    active = jnp.array([[[True, False], [False, False]]])
    image = _images(1)
    # A lone cell is seen as if it had been cropped: zeros around it are the padding.
    _, stats = _train(network, variables, image, active=active)
    _, cropped = _train(network, variables, image[:, :32, :32])
    for x, y in zip(jax.tree.leaves(stats), jax.tree.leaves(cropped), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_all_cells_active_is_the_dense_network() -> None:
    network, variables = _filled()
    dense = _features(network, variables, _images())
    masked = _features(network, variables, _images(), active=jnp.ones((2, 2, 2), bool))
    for x, y in zip(dense, masked, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_blocks_are_skipped_by_the_key_of_the_row() -> None:
    network, variables = _filled()
    image = jnp.repeat(_images(1), 16, axis=0)
    keys = jax.random.split(jax.random.key(3), 16)
    out = _features(network, variables, image, drop_path=0.5, keys=keys)
    kept = _features(network, variables, image)
    # The first of three blocks is never skipped, the last half of the time.
    np.testing.assert_allclose(out[0], kept[0], rtol=1e-5, atol=1e-5)
    groups = {np.round(float(row), 3) for row in out[1].sum((1, 2, 3))}
    assert len(groups) == 4
    other = _features(network, variables, image[:3], drop_path=0.5, keys=keys[5:8])
    np.testing.assert_allclose(other[1], out[1][5:8], rtol=1e-5, atol=1e-5)
    none = _features(network, variables, image[:3], drop_path=0.0, keys=keys[:3])
    np.testing.assert_allclose(none[1], kept[1][:3], rtol=1e-5, atol=1e-5)


def test_bfloat16_keeps_parameters_and_statistics_in_float32() -> None:
    exact, variables = _filled()
    coarse, same = _filled(dtype=jnp.bfloat16)
    expected, _ = _train(exact, variables, _images())
    out, stats = _train(coarse, same, _images())
    leaves = jax.tree.leaves((_shapes(coarse, 1, 64, 64, 1)[0], stats))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
    assert out[1].dtype == jnp.bfloat16
    error = np.abs(np.asarray(out[1], np.float32) - expected[1]).max()
    assert 0 < error < 0.1 * np.abs(expected[1]).max()


@pytest.mark.parametrize(
    ("size", "active", "message"),
    [
        ((64, 60), (2, 2, 1), r"multiples of 32; the image is 64x60"),
        ((64, 96), (2, 3, 2), r"shape \(2, 3, 2\).*64x96.*give \(2, 2, 3\)"),
    ],
)
def test_cells_must_fit_the_image(
    size: tuple[int, int], active: tuple[int, ...], message: str
) -> None:
    network = resnet.ResNet(**SMALL)
    with pytest.raises(ValueError, match=message):
        network.init(
            jax.random.key(0), _images(2, *size), active=jnp.ones(active, bool)
        )
