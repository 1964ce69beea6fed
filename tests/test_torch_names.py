import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import foreign_states
from uad_jax import leaves, torch_names, weights
from uad_jax.nn import resnet, unet
from uad_jax.types import Tree

UNET: dict[str, Any] = {
    "width": 64,
    "multipliers": (1, 2),
    "num_blocks": 1,
    "attention_levels": (1,),
    "head_size": 32,
    "conditional": True,
}
IMAGE = np.linspace(-1, 1, 8 * 12, dtype=np.float32).reshape(1, 8, 12, 1)
STEPS = np.array([37], np.int32)
CONDITION = np.array([[0.5, -1.0, 2.0]], np.float32)
ENCODER: dict[str, Any] = {"features": 3, "stage_sizes": (1, 2), "width": 16}
# What PyTorch's networks return for weights and inputs of these names and values;
# tests/test_torch_parity.py computes them again.
UNET_OUTPUT = np.array([-0.13359243, 0.075641625, -0.10320548, -0.16027394])
ENCODER_OUTPUT = np.array([0.5310123, -0.46273324, -0.17198257])


def small_unet(**fields: Any) -> tuple[unet.UNet, Tree]:
    network = unet.UNet(**{**UNET, **fields})
    inputs = (IMAGE, STEPS, CONDITION if network.conditional else None)
    return network, jax.eval_shape(network.init, jax.random.key(0), *inputs)


def small_encoder() -> tuple[resnet.ConditionEncoder, Tree]:
    encoder = resnet.ConditionEncoder(**ENCODER)
    image = jax.ShapeDtypeStruct((1, 40, 56, 1), jnp.float32)
    return encoder, jax.eval_shape(encoder.init, jax.random.key(0), image)


def _held(arrays: dict[str, np.ndarray]) -> weights.Weights:
    return weights.Weights(path=pathlib.Path("x.pth"), arrays=arrays)


def unet_corners(network: unet.UNet, variables: Tree) -> np.ndarray:
    out = jax.jit(network.apply)(variables, IMAGE, STEPS, CONDITION)[0, :, :, 0]
    return np.array([out[0, 0], out[0, -1], out[-1, 0], out.mean()])


def encoder_input() -> np.ndarray:
    return np.linspace(0, 1, 40 * 56, dtype=np.float32).reshape(1, 40, 56, 1)


def test_a_unet_with_foreign_weights_gives_the_stored_image() -> None:
    network, like = small_unet()
    state = foreign_states.drawn_state(
        like, torch_names.unet_sources(network, like), "diffusion.model."
    )
    state["diffusion.betas"] = np.zeros(1000, np.float32)
    variables = torch_names.load_unet(_held(state), network, like)
    np.testing.assert_allclose(
        unet_corners(network, variables), UNET_OUTPUT, rtol=1e-4, atol=1e-4
    )


def test_an_encoder_with_foreign_weights_gives_the_stored_vector() -> None:
    encoder, like = small_encoder()
    state = foreign_states.drawn_state(
        like, torch_names.resnet_sources(like), "encoder.encoder."
    )
    state["encoder.encoder.bn1.num_batches_tracked"] = np.array(5)
    variables = torch_names.load_resnet(_held(state), like)
    vector = jax.jit(encoder.apply)(variables, encoder_input())[0]
    np.testing.assert_allclose(vector, ENCODER_OUTPUT, rtol=1e-4, atol=1e-4)


def test_pddpm_has_the_names_of_guided_diffusion() -> None:
    network = unet.UNet()
    image = jax.ShapeDtypeStruct((1, 96, 96, 1), jnp.float32)
    like = jax.eval_shape(network.init, jax.random.key(0), image, STEPS)
    sources = torch_names.unet_sources(network, like)
    names = {path: source.name for path, source in sources.items()}
    assert len(set(names.values())) == len(names)
    assert names["params/stem/kernel"] == "input_blocks.0.0.weight"
    assert names["params/step_1/bias"] == "time_embed.2.bias"
    for ours, theirs in (
        ("down_0_2/conv_0/kernel", "input_blocks.3.0.in_layers.2.weight"),
        ("down_0_halve/embed/bias", "input_blocks.4.0.emb_layers.1.bias"),
        ("down_1_0/skip/kernel", "input_blocks.5.0.skip_connection.weight"),
        ("down_2_2/norm_1/scale", "input_blocks.11.0.out_layers.0.weight"),
        ("middle_attention/qkv/kernel", "middle_block.1.qkv.weight"),
        ("middle_1/conv_1/bias", "middle_block.2.out_layers.3.bias"),
        ("up_2_0/norm_0/bias", "output_blocks.0.0.in_layers.0.bias"),
        ("up_2_double/conv_0/kernel", "output_blocks.3.1.in_layers.2.weight"),
        ("up_0_3/skip/kernel", "output_blocks.11.0.skip_connection.weight"),
        ("out_conv/kernel", "out.2.weight"),
    ):
        assert names[f"params/{ours}"] == theirs


def test_attention_moves_the_doubling_block_one_place() -> None:
    network, like = small_unet()
    names = torch_names.unet_sources(network, like)
    place = "output_blocks.1"
    assert names["params/up_1_1/conv_0/kernel"].name.startswith(f"{place}.0.")
    assert names["params/up_1_1_attention/qkv/kernel"].name.startswith(f"{place}.1.")
    assert names["params/up_1_double/conv_0/kernel"].name.startswith(f"{place}.2.")


@pytest.mark.parametrize(("num_heads", "heads"), [(0, 4), (2, 2)])
def test_anoddpm_is_the_same_network_in_another_order(
    num_heads: int, heads: int
) -> None:
    network, like = small_unet(conditional=False, num_heads=num_heads)
    plain = torch_names.unet_sources(network, like)
    other = torch_names.unet_sources(network, like, torch_names.ANODDPM)
    state = foreign_states.drawn_state(like, plain)
    expected = torch_names.load_unet(_held(state), network, like)
    renamed = {}
    for path, source in plain.items():
        x = state[source.name]
        if "/qkv/" in path:  # query, key, value of each head together
            x = x.reshape(3, heads, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)
        if path == "params/step_0/kernel":  # sines first
            x = np.concatenate([x[:, 32:], x[:, :32]], axis=1)
        renamed[f"ema.{other[path].name}"] = x
    assert "ema.time_embedding.1.weight" in renamed
    assert "ema.down.2.0.embed_layers.1.weight" in renamed
    assert "ema.middle.1.to_qkv.weight" in renamed
    found = torch_names.load_unet(
        _held(renamed), network, like, spelling=torch_names.ANODDPM
    )
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


def test_resnets_have_the_names_of_torchvision() -> None:
    _, like = small_encoder()
    names = {p: s.name for p, s in torch_names.resnet_sources(like).items()}
    for ours, theirs in (
        ("params/backbone/conv1/kernel", "conv1.weight"),
        ("params/backbone/layer2_1/bn3/scale", "layer2.1.bn3.weight"),
        ("batch_stats/backbone/layer1_0/bn2/var", "layer1.0.bn2.running_var"),
        (
            "params/backbone/layer1_0/downsample_0/kernel",
            "layer1.0.downsample.0.weight",
        ),
        (
            "batch_stats/backbone/layer2_0/downsample_1/mean",
            "layer2.0.downsample.1.running_mean",
        ),
        ("params/fc/bias", "fc.bias"),
    ):
        assert names[ours] == theirs


def test_a_backbone_leaves_the_head_of_the_file_aside() -> None:
    _, like = small_encoder()
    state = foreign_states.drawn_state(like, torch_names.resnet_sources(like))
    inner = {group: tree["backbone"] for group, tree in like.items()}
    variables = torch_names.load_resnet(_held(state), inner)
    assert jax.tree.structure(variables) == jax.tree.structure(inner)
    np.testing.assert_array_equal(
        variables["params"]["conv1"]["kernel"],
        state["conv1.weight"].transpose(2, 3, 1, 0),
    )


def test_a_network_of_another_size_is_refused_with_every_difference() -> None:
    network, like = small_unet()
    state = foreign_states.drawn_state(like, torch_names.unet_sources(network, like))
    smaller, other = small_unet(num_blocks=2, conditional=False)
    with pytest.raises(weights.WeightsError) as caught:
        torch_names.load_unet(_held(state), smaller, other)
    text = str(caught.value)
    assert f"of {len(leaves.flatten(other))} leaves of the network" in text
    assert "weight is not in the file" in text
    assert "expected (" in text
    assert f"of {len(state)} tensors of the file are not used" in text
    assert "label_emb.0.weight (256, 3)" in text
    assert text.count(" more") == 2  # each list is cut on its own


def test_two_networks_in_one_file_need_a_prefix() -> None:
    network, like = small_unet()
    sources = torch_names.unet_sources(network, like)
    first = foreign_states.drawn_state(like, sources, "a.")
    both = {**first, **foreign_states.drawn_state(like, sources, "b.")}
    with pytest.raises(weights.WeightsError, match=r"\['a\.', 'b\.'\]"):
        torch_names.load_unet(_held(both), network, like)
    torch_names.load_unet(_held(both), network, like, prefix="b.")
