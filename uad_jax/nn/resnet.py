"""ResNet-50: the condition encoder of cDDPM, and what SparK pretrains.

Source: He et al. 2016, "Deep residual learning for image recognition", with the stride
on the 3x3 convolution as in torchvision and timm, whose module names and counts of
parameters it shares; Tian et al. 2023, "Designing BERT for convolutional networks:
sparse and hierarchical masked modeling" (SparK); Behrendt et al. 2023, "Guided
reconstruction with conditioned diffusion models for unsupervised anomaly detection in
brain MRIs".

Running variances are biased here and unbiased in PyTorch: a factor n / (n - 1) of the
n positions of a batch.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uad_jax.nn import blocks, initialisers

STRIDE = 32  # of the last of four stages
EXPANSION = 4
EPSILON = 1e-5
MOMENTUM = 0.9  # the share of the old statistics; PyTorch's momentum is 0.1


class ResNet(nn.Module):
    """Bottleneck stages with batch normalisation, dense or masked.

    With `active` cells the convolutions act as sparse ones: after each layer the
    features outside the active cells are zero, and batch statistics are taken over the
    active positions only. Statistics live in the collection "batch_stats".

    Attributes:
      stage_sizes: Blocks per stage.
      width: Channels of the stem; stage s (from 0) returns 4 * width * 2^s.
      bottleneck_width: Channels inside the blocks of the first stage, doubled per
        stage; 128 gives Wide ResNet-50-2.
      dtype: Type of the computation; parameters and statistics are float32.
    """

    stage_sizes: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    bottleneck_width: int = 64
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        image: jax.Array,
        *,
        train: bool = False,
        active: jax.Array | None = None,
        valid: jax.Array | None = None,
        drop_path: float | jax.Array = 0.0,
        keys: jax.Array | None = None,
    ) -> tuple[jax.Array, ...]:
        """Computes the features of every stage.

        Args:
          image: [N, H, W, C].
          train: Whether batch statistics are used and stored.
          active: Cells that are seen, [N, H / 32, W / 32] bool; None = all, of any
            H and W.
          valid: Rows that count in the batch statistics, [N] bool; None = all.
          drop_path: Rate at which the last block is skipped, per row; it rises
            linearly from 0 at the first. May be a traced scalar.
          keys: Keys of the rows, [N]; None = no block is skipped.

        Returns:
          The output of each stage, [N, H / 4, W / 4, 4 width] first, in `dtype`.

        Raises:
          ValueError: If `active` does not fit the image.
        """
        if active is not None:
            _check_active(image.shape, active.shape)
            image = jnp.where(cells_at(image, active), image, 0)
        settings = (train, active, valid)
        x = _conv(image.astype(self.dtype), self.width, 7, 2, self.dtype, "conv1")
        x = nn.relu(batch_norm(x, self.dtype, "bn1", *settings))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        if active is not None:
            x = jnp.where(cells_at(x, active), x, 0)

        stages = []
        last = sum(self.stage_sizes) - 1
        for stage, size in enumerate(self.stage_sizes):
            for index in range(size):
                block = Bottleneck(
                    inner=self.bottleneck_width << stage,
                    features=EXPANSION * self.width << stage,
                    stride=2 if stage > 0 and index == 0 else 1,
                    dtype=self.dtype,
                    name=f"layer{stage + 1}_{index}",
                )
                done = sum(self.stage_sizes[:stage]) + index
                kept = _kept_rows(x, drop_path * (done / max(last, 1)), keys, done)
                x = block(x, kept, *settings)
            stages.append(x)
        return tuple(stages)


class ConditionEncoder(nn.Module):
    """A vector per image: the mean of the last stage, mapped linearly.

    Attributes:
      features: Length of the vector.
      stage_sizes: As in `ResNet`.
      width: As in `ResNet`; blocks are as wide inside.
      dtype: Type of the computation; the vector is float32.
    """

    features: int = 512
    stage_sizes: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        image: jax.Array,
        *,
        train: bool = False,
        valid: jax.Array | None = None,
        drop_path: float | jax.Array = 0.0,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Maps [N, H, W, C] to [N, features] float32; arguments as in `ResNet`."""
        backbone = ResNet(
            self.stage_sizes, self.width, self.width, self.dtype, name="backbone"
        )
        stages = backbone(
            image, train=train, valid=valid, drop_path=drop_path, keys=keys
        )
        x = stages[-1].astype(jnp.float32).mean(axis=(1, 2))
        return nn.Dense(self.features, name="fc", **initialisers.uniform(x.shape[-1]))(
            x
        )


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, added to the input.

    Attributes:
      inner: Channels of the first two.
      features: Channels of the output.
      stride: Of the 3x3 convolution.
      dtype: Type of the computation.
    """

    inner: int
    features: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        kept: jax.Array | None = None,
        train: bool = False,
        active: jax.Array | None = None,
        valid: jax.Array | None = None,
    ) -> jax.Array:
        """Maps [N, H, W, C] to [N, H / stride, W / stride, features].

        Args:
          x: Features.
          kept: Factor of each row before the sum, [N, 1, 1, 1]; None = 1.
          train: As in `ResNet`, like `active` and `valid`.
          active: Active cells.
          valid: Valid rows.
        """
        dtype = self.dtype
        settings = (train, active, valid)
        h = _conv(x, self.inner, 1, 1, dtype, "conv1")
        h = nn.relu(batch_norm(h, dtype, "bn1", *settings))
        h = _conv(h, self.inner, 3, self.stride, dtype, "conv2")
        h = nn.relu(batch_norm(h, dtype, "bn2", *settings))
        h = _conv(h, self.features, 1, 1, dtype, "conv3")
        h = batch_norm(h, dtype, "bn3", *settings, zero=True)
        if kept is not None:
            h = h * kept.astype(h.dtype)
        if x.shape[-1] != self.features or self.stride != 1:
            x = _conv(x, self.features, 1, self.stride, dtype, "downsample_0")
            x = batch_norm(x, dtype, "downsample_1", *settings)
        return nn.relu(x + h)


def check_stages(name: str, sizes: Sequence[int]) -> None:
    """Raises ValueError unless there are four stages of at least one block each."""
    if len(sizes) != 4 or min(sizes) < 1:
        raise ValueError(
            f"{name} is {tuple(sizes)}; use four numbers of 1 or more, (3, 4, 6, 3) "
            "for ResNet-50."
        )


def cells_of(height: int, width: int) -> tuple[int, int]:
    """Numbers of 32x32 cells along both sides of an image.

    Raises:
      ValueError: If a side is no multiple of 32.
    """
    if height % STRIDE or width % STRIDE:
        raise ValueError(
            f"Masked features need sides that are multiples of {STRIDE}; the image is "
            f"{height}x{width}. Crop or pad it."
        )
    return height // STRIDE, width // STRIDE


def _check_active(image: tuple[int, ...], active: tuple[int, ...]) -> None:
    """Refuses cells that are not the image's sides over the stride."""
    batch, height, width, _ = image
    expected = (batch, *cells_of(height, width))
    if active != expected:
        raise ValueError(
            f"active has shape {active}; an image of {height}x{width} has one cell per "
            f"{STRIDE}x{STRIDE} pixels, so give {expected}."
        )


def cells_at(x: jax.Array, active: jax.Array) -> jax.Array:
    """Spreads cells [N, h, w] bool to the resolution of x: [N, H, W, 1] bool."""
    factor = x.shape[1] // active.shape[1]
    mask = jnp.repeat(jnp.repeat(active, factor, axis=1), factor, axis=2)
    return mask[..., None]


def _kept_rows(
    x: jax.Array, rate: float | jax.Array, keys: jax.Array | None, index: int
) -> jax.Array | None:
    """0 for a row whose block is skipped, else 1 / (1 - rate); [N, 1, 1, 1] or None."""
    if keys is None:
        return None
    own = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
    return blocks.dropout(jnp.ones((x.shape[0], 1, 1, 1)), rate, own)


def _conv(
    x: jax.Array, features: int, size: int, stride: int, dtype: Any, name: str
) -> jax.Array:
    # Explicit padding: SAME of an even side at stride 2 starts a pixel later.
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=size // 2,
        use_bias=False,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        dtype=dtype,
        name=name,
    )(x)


def batch_norm(
    x: jax.Array,
    dtype: Any,
    name: str,
    train: bool,
    active: jax.Array | None,
    valid: jax.Array | None,
    zero: bool = False,
) -> jax.Array:
    """Batch normalisation inside a compact module, over active positions of valid rows.

    Args:
      x: [N, H, W, C].
      dtype: Type of the computation.
      name: Of the Flax module.
      train: Whether batch statistics are used and stored.
      active: Active cells, [N, h, w] bool; None = all.
      valid: Rows that count, [N] bool; None = all. If none does, all count, because
        the mean of nothing is not a number; `base.accumulate` drops their statistics.
      zero: Whether the scale starts at 0 instead of 1.

    Returns:
      The shape of x; zero outside the active cells.
    """
    seen = None if active is None else cells_at(x, active)
    counted = seen
    if valid is not None:
        rows = (valid | ~valid.any())[:, None, None, None]
        counted = rows if seen is None else seen & rows
    norm = nn.BatchNorm(
        use_running_average=not train,
        momentum=MOMENTUM,
        epsilon=EPSILON,
        scale_init=nn.initializers.zeros if zero else nn.initializers.ones,
        dtype=dtype,
        name=name,
    )
    x = norm(x, mask=counted)
    # This also masks the convolution before, whose output nothing else reads.
    return x if seen is None else jnp.where(seen, x, 0)
