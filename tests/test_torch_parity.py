"""Our networks against PyTorch's with the same weights; skipped without PyTorch.

python -m venv ENV && ENV/bin/pip install -r requirements-test.txt torch
ENV/bin/python -m pytest -n 0 tests/test_torch_parity.py
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import foreign_states, test_torch_names
from uad_jax import optim, torch_names, weights
from uad_jax.nn import dae_unet, resnet, spark, unet
from uad_jax.ops import corrupt

torch = pytest.importorskip("torch", exc_type=ImportError)
torch_networks = pytest.importorskip("tests.torch_networks")

TOLERANCE = 1e-4  # of the largest value of the output
SMALL: dict[str, Any] = {"width": 64, "multipliers": (1, 2), "num_blocks": 1}


def _randomise(network: Any) -> None:
    """Fills all parameters and statistics so that nothing is zero or neutral."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if not value.is_floating_point():
                continue
            spread = 1 / np.sqrt(max(value[0].numel(), 1)) if value.ndim > 1 else 0.2
            value.copy_(spread * torch.randn(value.shape, generator=generator))
            if value.ndim == 1 and name.endswith(("weight", "running_var")):
                value.abs_().add_(0.5)


def _relative_error(ours: Any, theirs: Any) -> float:
    theirs = theirs.detach().numpy()
    if theirs.ndim == 4:
        theirs = theirs.transpose(0, 2, 3, 1)
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "stream"])
@pytest.mark.parametrize(
    ("fields", "condition"),
    [
        ({"film": True}, None),
        ({"film": False, "attention_levels": (1,), "head_size": 32}, None),
        ({"film": True}, 5),
        ({"film": False, "attention_levels": (0, 1), "num_heads": 2}, None),
    ],
    ids=["pDDPM", "DDPM", "cDDPM", "AnoDDPM"],
)
def test_a_saved_unet_gives_the_same_image(
    tmp_path: pathlib.Path, fields: dict[str, Any], condition: int | None, legacy: bool
) -> None:
    error = _unet_error(
        tmp_path, {**SMALL, **fields}, condition, (16, 24), legacy=legacy
    )
    assert error <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", TOLERANCE), ("bfloat16", 0.03)]
)
@pytest.mark.parametrize("condition", [None, 512], ids=["pDDPM", "cDDPM"])
def test_a_network_of_the_published_size_gives_the_same_image(
    tmp_path: pathlib.Path, condition: int | None, dtype: str, tolerance: float
) -> None:
    assert _unet_error(tmp_path, {}, condition, (96, 96), dtype=dtype) <= tolerance


def _unet_error(
    directory: pathlib.Path,
    fields: dict[str, Any],
    condition: int | None,
    sides: tuple[int, int],
    *,
    dtype: str = "float32",
    legacy: bool = False,
) -> float:
    """Largest difference over the largest output of one saved and loaded U-Net."""
    theirs = torch_networks.UNet(**fields, condition=condition)
    _randomise(theirs)
    state = {f"diffusion.model.{k}": v for k, v in theirs.state_dict().items()}
    state["diffusion.betas"] = torch.zeros(1000)
    path = directory / "epoch-1.ckpt"
    saved = {"state_dict": state, "optimizer_states": [], "epoch": 1}
    torch.save(saved, path, _use_new_zipfile_serialization=not legacy)

    rng = np.random.default_rng(1)
    image = rng.standard_normal((2, *sides, 1)).astype(np.float32)
    steps = np.array([0, 731], np.int32)
    vector = None
    if condition:
        vector = rng.standard_normal((2, condition)).astype(np.float32)
    ours = unet.UNet(
        **fields, conditional=condition is not None, dtype=jax.numpy.dtype(dtype)
    )
    like = jax.eval_shape(ours.init, jax.random.key(0), image, steps, vector)
    variables = torch_names.load_unet(weights.read(path), ours, like)
    out = jax.jit(ours.apply)(variables, image, steps, vector)
    with torch.no_grad():
        expected = theirs(
            torch.from_numpy(image.transpose(0, 3, 1, 2)),
            torch.from_numpy(steps),
            None if vector is None else torch.from_numpy(vector),
        )
    error = _relative_error(out, expected)
    print(f"relative error {error:.1e}")
    return error


def test_a_saved_resnet_gives_the_same_features(tmp_path: pathlib.Path) -> None:
    theirs = torch_networks.ResNet(7, stage_sizes=(2, 1, 2, 1), width=16).eval()
    _randomise(theirs)
    path = tmp_path / "resnet.pth"
    torch.save({f"encoder.{k}": v for k, v in theirs.state_dict().items()}, path)
    image = np.random.default_rng(1).random((2, 95, 64, 1), np.float32)
    with torch.no_grad():
        stages, vector = theirs(torch.from_numpy(image.transpose(0, 3, 1, 2)))

    encoder = resnet.ConditionEncoder(7, stage_sizes=(2, 1, 2, 1), width=16)
    like = jax.eval_shape(encoder.init, jax.random.key(0), image)
    variables = torch_names.load_resnet(weights.read(path), like)
    errors = [_relative_error(jax.jit(encoder.apply)(variables, image), vector)]
    backbone = resnet.ResNet((2, 1, 2, 1), width=16, bottleneck_width=16)
    inner = {group: tree["backbone"] for group, tree in variables.items()}
    outputs = jax.jit(backbone.apply)(inner, image)
    errors += map(_relative_error, outputs, stages)
    print(f"relative error {max(errors):.1e}")
    assert max(errors) <= TOLERANCE


def test_training_moves_batch_statistics_as_in_pytorch() -> None:
    theirs = torch_networks.ResNet(7, stage_sizes=(1,), width=4).train()
    image = np.random.default_rng(1).random((8, 64, 64, 1), np.float32)
    backbone = resnet.ResNet((1,), width=4, bottleneck_width=4)
    like = jax.eval_shape(backbone.init, jax.random.key(0), image)
    arrays = {k: v.detach().numpy().copy() for k, v in theirs.state_dict().items()}
    variables = torch_names.load_resnet(
        weights.Weights(path=pathlib.Path("memory"), arrays=arrays), like
    )
    theirs(torch.from_numpy(image.transpose(0, 3, 1, 2)))
    _, changed = jax.jit(
        lambda v, x: backbone.apply(v, x, train=True, mutable=["batch_stats"])
    )(variables, image)
    block = changed["batch_stats"]["layer1_0"]["bn2"]
    expected = theirs.layer1[0].bn2
    count = 8 * 16 * 16  # positions: the variance of PyTorch is unbiased
    np.testing.assert_allclose(
        block["mean"], expected.running_mean.numpy(), rtol=1e-4, atol=1e-6
    )
    ours = 0.9 + (block["var"] - 0.9) * count / (count - 1)
    np.testing.assert_allclose(ours, expected.running_var.numpy(), rtol=1e-4)


def test_the_decoder_of_spark_doubles_as_in_pytorch() -> None:
    theirs = torch.nn.ConvTranspose2d(3, 5, 4, stride=2, padding=1, bias=False)
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 3)).astype(np.float32)
    kernel = theirs.weight.detach().numpy().transpose(2, 3, 0, 1)
    out = spark.conv_transpose(jnp.array(x), jnp.array(kernel))
    expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2)))
    assert _relative_error(out, expected) <= 1e-6


def test_the_stored_outputs_are_those_of_pytorch() -> None:
    network, like = test_torch_names.small_unet()
    state = foreign_states.drawn_state(like, torch_names.unet_sources(network, like))
    fields = {k: v for k, v in test_torch_names.UNET.items() if k != "conditional"}
    theirs = torch_networks.UNet(**fields, condition=3)
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
    image = test_torch_names.IMAGE.transpose(0, 3, 1, 2)
    inputs = (image, test_torch_names.STEPS, test_torch_names.CONDITION)
    with torch.no_grad():
        out = theirs(*map(torch.tensor, inputs))[0, 0].numpy()
    corners = [out[0, 0], out[0, -1], out[-1, 0], out.mean()]
    np.testing.assert_allclose(corners, test_torch_names.UNET_OUTPUT, rtol=1e-5)

    _, like = test_torch_names.small_encoder()
    state = foreign_states.drawn_state(like, torch_names.resnet_sources(like))
    fields = test_torch_names.ENCODER
    theirs = torch_networks.ResNet(
        fields["features"], stage_sizes=fields["stage_sizes"], width=fields["width"]
    ).eval()
    theirs.load_state_dict(
        {k: torch.from_numpy(v) for k, v in state.items()}, strict=False
    )
    image = test_torch_names.encoder_input().transpose(0, 3, 1, 2)
    with torch.no_grad():
        vector = theirs(torch.tensor(image))[1][0].numpy()
    np.testing.assert_allclose(vector, test_torch_names.ENCODER_OUTPUT, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "stream"])
def test_pytorch_saves_of_every_kind_are_read(
    tmp_path: pathlib.Path, dtype: str, legacy: bool
) -> None:
    whole = (
        torch.arange(24, dtype=torch.float32).reshape(4, 6).to(getattr(torch, dtype))
    )
    saved = {
        "whole": whole,
        "turned": whole.t(),
        "part": whole[1:3, ::2],
        "parameter": torch.nn.Parameter(whole[2]),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(7),
    }
    path = tmp_path / "all.pth"
    torch.save(saved, path, _use_new_zipfile_serialization=not legacy)
    arrays = weights.read(path).arrays
    assert set(arrays) == set(saved)
    for name, value in saved.items():
        expected = value.detach().to(torch.float64).numpy()
        np.testing.assert_array_equal(arrays[name].astype(np.float64), expected)
        assert arrays[name].shape == tuple(value.shape)
        if value.dtype is not torch.bfloat16:
            assert str(value.dtype) == f"torch.{arrays[name].dtype}"
    expected = jnp.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    assert arrays["whole"].dtype == expected


def _dae_params(theirs: Any) -> dict[str, Any]:
    """The parameters of PyTorch's DAE under our names."""

    def array(value: Any, *axes: int) -> np.ndarray:
        value = value.detach().numpy()
        return value.transpose(axes) if axes else value

    def conv(layer: Any) -> dict[str, np.ndarray]:
        return {"kernel": array(layer.weight, 2, 3, 1, 0), "bias": array(layer.bias)}

    def block(layers: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for i in (0, 1):
            norm = layers[3 * i + 2]
            found[f"StandardisedConv_{i}"] = conv(layers[3 * i])
            found[f"GroupNorm_{i}"] = {
                "scale": array(norm.weight),
                "bias": array(norm.bias),
            }
        return found

    params: dict[str, Any] = {"out": conv(theirs.out)}
    for level, layers in enumerate(theirs.down):
        params[f"down_{level}"] = block(layers)
    for index, (double, layers) in enumerate(
        zip(theirs.larger, theirs.up, strict=True)
    ):
        level = len(theirs.up) - 1 - index
        params[f"up_{level}"] = block(layers)
        params[f"double_{level}"] = {
            "kernel": array(double.weight, 2, 3, 0, 1),
            "bias": array(double.bias),
        }
    return params


def test_the_dae_gives_the_same_image() -> None:
    theirs = torch_networks.DaeUNet(2, ((16, 4), (32, 8), (64, 8)))
    _randomise(theirs)
    params = _dae_params(theirs)
    image = np.random.default_rng(0).standard_normal((2, 16, 24, 2)).astype(np.float32)
    ours = jax.jit(dae_unet.DaeUNet(2, width=16, num_levels=3).apply)
    expected = theirs(torch.from_numpy(image.transpose(0, 3, 1, 2).copy()))
    assert _relative_error(ours({"params": params}, image), expected) < TOLERANCE


def test_the_noise_of_a_dae_is_enlarged_as_in_pytorch() -> None:
    grid = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(grid)[None, None],
        (128, 96),
        mode="bilinear",
        align_corners=True,
    )[0, 0]
    rows, columns = (corrupt.align_corners(size, 16) for size in (128, 96))
    np.testing.assert_allclose(rows @ grid @ columns.T, expected, atol=1e-5)


def test_the_optimizer_of_a_dae_steps_as_in_pytorch() -> None:
    rng = np.random.default_rng(0)
    start = rng.standard_normal(5).astype(np.float32)
    config = optim.OptimizerConfig(
        learning_rate=1e-2,
        l2=1e-2,
        clip_norm=0.5,
        amsgrad=True,
        schedule=optim.Schedule.COSINE_PERIODIC,
        half_period=4,
    )
    tx = config.make(12)
    params = jnp.asarray(start)
    state = tx.init(params)
    theirs = torch.nn.Parameter(torch.from_numpy(start.copy()))
    adam = torch.optim.Adam([theirs], lr=1e-2, weight_decay=1e-2, amsgrad=True)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=4)
    for step in range(12):
        grad = (0.9**step * rng.standard_normal(5)).astype(np.float32)
        update, state = tx.update(jnp.asarray(grad), state, params)
        params = params + update
        theirs.grad = torch.from_numpy(grad.copy())
        torch.nn.utils.clip_grad_norm_([theirs], 0.5)
        adam.step()
        rate.step()
        np.testing.assert_allclose(params, theirs.detach().numpy(), atol=2e-6)
    assert np.abs(start - np.asarray(params)).max() > 1e-2
