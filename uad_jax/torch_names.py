"""Names and layouts of published PyTorch networks, as sources of ours.

PyTorch stores convolutions as [out, in, height, width] and dense layers as [out, in];
Flax as [height, width, in, out] and [in, out].
"""

import re
from collections.abc import Mapping

import numpy as np

from uad_jax import leaves as leaves_lib
from uad_jax import weights as weights_lib
from uad_jax.nn import unet
from uad_jax.types import Tree
from uad_jax.weights import Source, Weights

# Other spellings of the U-Net's names: AnoDDPM, against guided-diffusion.
ANODDPM = {
    "input_blocks": "down",
    "middle_block": "middle",
    "output_blocks": "up",
    "emb_layers": "embed_layers",
    "qkv": "to_qkv",
    "time_embed.0": "time_embedding.1",
    "time_embed.2": "time_embedding.3",
}
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_UNET = {
    "stem": "input_blocks.0.0",
    "step_0": "time_embed.0",
    "step_1": "time_embed.2",
    "condition_0": "label_emb.0",
    "condition_1": "label_emb.2",
    "middle_0": "middle_block.0",
    "middle_attention": "middle_block.1",
    "middle_1": "middle_block.2",
    "out_norm": "out.0",
    "out_conv": "out.2",
}
_BLOCK = {
    "norm_0": "in_layers.0",
    "conv_0": "in_layers.2",
    "embed": "emb_layers.1",
    "norm_1": "out_layers.0",
    "conv_1": "out_layers.3",
    "skip": "skip_connection",
    "norm": "norm",
    "qkv": "qkv",
    "out": "proj_out",
}


def load_unet(
    weights: Weights,
    network: unet.UNet,
    like: Tree,
    *,
    prefix: str | None = None,
    spelling: Mapping[str, str] | None = None,
) -> Tree:
    """Fills a U-Net from a guided-diffusion U-Net, such as pDDPM's or cDDPM's.

    Args:
      weights: The file.
      network: The U-Net; its sizes must be those of the file.
      like: Its variables {"params": ...} or their shapes.
      prefix: Before the names in the file; None = found.
      spelling: None for guided-diffusion with its "new" order of attention channels
        (all queries, all keys, all values); `ANODDPM` for that program, which orders
        them head by head and embeds the step as sines before cosines.

    Returns:
      {"params": ...} as numpy arrays.

    Raises:
      WeightsError: Lists everything that does not fit.
    """
    sources = unet_sources(network, like, spelling)
    if prefix is None:
        anchor = sources["params/step_0/kernel"].name
        prefix = weights_lib.find_prefix(weights, anchor)
    return weights_lib.fit(weights, like, sources, prefix=prefix)


def load_resnet(weights: Weights, like: Tree, *, prefix: str | None = None) -> Tree:
    """Fills a `ResNet` or `ConditionEncoder` from torchvision's or timm's names.

    Args:
      weights: The file: a plain ResNet, or a checkpoint of cDDPM or SparK.
      like: The variables {"params": ..., "batch_stats": ...} or their shapes. Without
        a dense layer "fc" in them, that of the file is left aside.
      prefix: Before the names in the file; None = found.

    Returns:
      A tree like `like` as numpy arrays.

    Raises:
      WeightsError: Lists everything that does not fit.
    """
    sources = resnet_sources(like)
    if prefix is None:
        prefix = weights_lib.find_prefix(weights, "layer1.0.conv1.weight")
    ignored = ["num_batches_tracked"]
    if not any(source.name == "fc.weight" for source in sources.values()):
        ignored += [f"{prefix}fc.weight", f"{prefix}fc.bias"]
    return weights_lib.fit(weights, like, sources, prefix=prefix, ignored=ignored)


def unet_sources(
    network: unet.UNet, like: Tree, spelling: Mapping[str, str] | None = None
) -> dict[str, Source]:
    """The source of each leaf of a U-Net."""
    sources = {}
    for path in leaves_lib.flatten(like):
        _, module, *inner, leaf = path.split("/")
        parts = [_unet_module(network, module), *(_BLOCK[name] for name in inner)]
        name = ".".join([*parts, _LEAVES[leaf]])
        for ours, theirs in (spelling or {}).items():
            name = re.sub(rf"(^|\.){re.escape(ours)}\.", rf"\g<1>{theirs}.", name)
        convert: weights_lib.Convert = _kernel if leaf == "kernel" else _same
        if spelling and inner == ["qkv"]:
            convert = _by_head(network, convert)
        if spelling and path == "params/step_0/kernel":
            convert = _cosines_first
        sources[path] = Source(name, convert)
    return sources


def resnet_sources(like: Tree) -> dict[str, Source]:
    """The source of each leaf of a `ResNet` or `ConditionEncoder`."""
    sources = {}
    for path in leaves_lib.flatten(like):
        _, *modules, leaf = path.split("/")
        if modules[0] == "backbone":
            del modules[0]
        parts = [re.sub(r"^(layer\d+|downsample)_", r"\1.", name) for name in modules]
        name = ".".join([*parts, _LEAVES[leaf]])
        sources[path] = Source(name, _kernel if leaf == "kernel" else _same)
    return sources


def _unet_module(network: unet.UNet, module: str) -> str:
    """Name of one of our modules in guided-diffusion, which numbers blocks on end."""
    if module in _UNET:
        return _UNET[module]
    side, level, kind, *attention = module.split("_")
    per_level = network.num_blocks + 1
    if side == "down":
        index = network.num_blocks if kind == "halve" else int(kind)
        return f"input_blocks.{1 + int(level) * per_level + index}.{len(attention)}"
    place = len(attention)
    if kind == "double":
        place = 2 if int(level) in network.attention_levels else 1
    index = network.num_blocks if kind == "double" else int(kind)
    above = len(network.multipliers) - 1 - int(level)
    return f"output_blocks.{above * per_level + index}.{place}"


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _kernel(x: np.ndarray) -> np.ndarray:
    """Kernel of a convolution or dense layer; 1-D convolutions of size 1 are dense."""
    if x.ndim == 4:
        return x.transpose(2, 3, 1, 0)
    if x.ndim == 3 and x.shape[2] == 1:
        x = x[:, :, 0]
    return x.T


def _by_head(network: unet.UNet, convert: weights_lib.Convert) -> weights_lib.Convert:
    """Reorders output channels from heads x (query, key, value) to the reverse."""

    def reorder(x: np.ndarray) -> np.ndarray:
        heads = network.num_heads or x.shape[0] // 3 // network.head_size
        parts = x.reshape(heads, 3, -1, *x.shape[1:])
        return convert(parts.swapaxes(0, 1).reshape(x.shape))

    return reorder


def _cosines_first(x: np.ndarray) -> np.ndarray:
    """Kernel of a dense layer whose inputs were sines, then cosines."""
    return np.roll(_kernel(x), x.shape[1] // 2, axis=0)
