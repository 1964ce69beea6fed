"""SparK pretraining: hide most of a slice, fill it in, and keep the encoder.

The backbone starts the condition encoder of cDDPM by a warm start from
"spark/backbone" to "encoder/backbone". There is no score: nothing is detected yet.

Source: Tian et al. 2023, "Designing BERT for convolutional networks: sparse and
hierarchical masked modeling"; the settings are those that the code of Behrendt et al.
2023 (arXiv 2312.04215) pretrains with.
"""

import dataclasses

import jax
import jax.numpy as jnp

from uad_jax import optim
from uad_jax.methods import base
from uad_jax.nn import resnet, spark
from uad_jax.ops import losses
from uad_jax.types import Array, Batch, Key, ModelState, Scalars, Tree

NETWORK = "spark"  # its name in the parameters
_STATISTICS = "batch_stats"
_CELLS, _DROP_PATH = 0, 1  # draws of a row


@dataclasses.dataclass
class SparkConfig:
    """Masked pretraining of a ResNet.

    Attributes:
      stage_sizes: Blocks of its four stages; (3, 4, 6, 3) is ResNet-50.
      width: Channels of its stem.
      decoder_width: Channels of the decoder's first stage, halved by each of five.
      mask_ratio: Share of the 32x32 cells that are hidden. Fixes their number, so it
        may not be traced.
      drop_path: Rate at which training skips the last block; it rises linearly from 0
        at the first.
      precision: Type of the network's computation.
      accumulate_steps: Micro-batches per optimiser step. Batch statistics are those of
        a micro-batch.
      ema_decay: Decay of the averaged parameters; 0 = none.
      optimizer: The optimiser.
    """

    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    decoder_width: int = 512
    mask_ratio: float = 0.65
    drop_path: float = 0.05
    precision: base.Precision = base.Precision.FLOAT32
    accumulate_steps: int = 1
    ema_decay: float = 0.0
    optimizer: optim.OptimizerConfig = dataclasses.field(
        default_factory=optim.OptimizerConfig
    )

    def validate(self) -> None:
        """Raises ValueError for settings that cannot work."""
        resnet.check_stages("stage_sizes", self.stage_sizes)
        if self.width < 1 or self.decoder_width < 32 or self.decoder_width % 32:
            raise ValueError(
                f"width is {self.width} and decoder_width {self.decoder_width}; use a "
                "width of 1 or more and a multiple of 32, which five stages halve."
            )
        if not 0 < self.mask_ratio < 1:
            raise ValueError(
                f"mask_ratio is {self.mask_ratio}; it must lie between 0 and 1."
            )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path is {self.drop_path}; it must lie in [0, 1).")
        base.check_training(self.accumulate_steps, self.ema_decay)
        self.optimizer.validate()

    def make(self, run: base.RunShape) -> base.Method:
        """Builds the method. Float fields but `mask_ratio` may be traced scalars."""

        def init_model(key: Key, batch: Batch) -> ModelState:
            return _init_model(self, key, batch)

        def train_loss(
            params: dict[str, Tree],
            collections: dict[str, Tree],
            batch: Batch,
            key: Key,
        ) -> tuple[Array, tuple[dict[str, Tree], Scalars]]:
            model = ModelState(params=params, collections=collections)
            value, changed = loss(self, model, batch, key, train=True)
            return value, (changed, {})

        def validate(model: ModelState, batch: Batch, key: Key) -> Scalars:
            return {"loss": loss(self, model, batch, key, train=False)[0]}

        init, update = base.single_optimizer(
            init_model,
            train_loss,
            self.optimizer.make(run.total_steps),
            ema_decay=self.ema_decay,
            accumulate_steps=self.accumulate_steps,
        )
        return base.Method(
            inputs=base.Inputs(),
            init=init,
            update=update,
            validate=validate,
            score=None,
        )


def loss(
    config: SparkConfig, model: ModelState, batch: Batch, key: Key, train: bool
) -> tuple[Array, dict[str, Tree]]:
    """Mean squared error over the hidden cells.

    Args:
      config: The model.
      model: Its parameters and statistics.
      batch: Slices, image [B, H, W, C] float32 of about [0, 1], sides multiples of 32.
      key: Key of the step; cells are drawn per slice.
      train: Whether batch statistics are used and stored, and blocks skipped.

    Returns:
      The loss [] and the collections after it.

    Raises:
      ValueError: If the sides are no multiples of 32, or no cell or all are seen.
    """
    keys = base.sample_keys(key, batch.uid, batch.slice_index)
    cells = jax.vmap(lambda key: jax.random.fold_in(key, _CELLS))(keys)
    active = draw_cells(config, cells, batch.image.shape)
    paths = jax.vmap(lambda key: jax.random.fold_in(key, _DROP_PATH))(keys)
    output, changed = _network(config, batch.image.shape).apply(
        {"params": model.params[NETWORK], **model.collections[NETWORK]},
        batch.image,
        active,
        train=train,
        valid=batch.valid,
        drop_path=config.drop_path,
        keys=paths if train else None,
        mutable=[_STATISTICS] if train else [],
    )
    error = jnp.square(output - batch.image.astype(jnp.float32)).mean(axis=-1)
    hidden = ~resnet.cells_at(error[..., None], active)[..., 0]
    rows = jax.vmap(losses.mean_over_valid)(error, hidden)
    collections = {NETWORK: dict(changed)} if train else model.collections
    return losses.mean_over_valid(rows, batch.valid), collections


def draw_cells(config: SparkConfig, keys: Array, shape: tuple[int, ...]) -> Array:
    """Draws the cells that are seen, the same number for each key.

    Args:
      config: Says which share is hidden.
      keys: [N].
      shape: Of the images, [..., H, W, C].

    Returns:
      [N, H / 32, W / 32] bool; round((1 - mask_ratio) cells) are True.

    Raises:
      ValueError: If the sides are no multiples of 32, or no cell or all are seen.
    """
    height, width = resnet.cells_of(shape[-3], shape[-2])
    count = height * width
    seen = round(count * (1.0 - config.mask_ratio))
    if not 0 < seen < count:
        raise ValueError(
            f"mask_ratio is {config.mask_ratio}: of the {height}x{width} cells of a "
            f"slice {seen} would be seen. At least one must be seen and one hidden; "
            "use larger slices or another ratio."
        )

    def one(key: Key) -> Array:
        order = jax.random.permutation(key, count)
        return (order < seen).reshape(height, width)

    return jax.vmap(one)(keys)


def _init_model(config: SparkConfig, key: Key, batch: Batch) -> ModelState:
    """Initialises {"spark": ...} for the batch's image shape."""
    shape = batch.image.shape
    active = jnp.ones((1, *resnet.cells_of(shape[-3], shape[-2])), bool)
    module = _network(config, shape)
    variables = module.init(key, jnp.zeros((1, *shape[-3:])), active)
    return ModelState(
        params={NETWORK: variables["params"]},
        collections={NETWORK: {_STATISTICS: variables[_STATISTICS]}},
    )


def _network(config: SparkConfig, shape: tuple[int, ...]) -> spark.SparK:
    return spark.SparK(
        channels=shape[-1],
        stage_sizes=config.stage_sizes,
        width=config.width,
        decoder_width=config.decoder_width,
        dtype=jnp.dtype(config.precision.value),
    )
