"""A tiny inter-slice VAE and slabs for it, shared by the tests of many files."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uad_jax import interslice_config, optim, types
from uad_jax.methods import interslice
from uad_jax.nn.sequence import Mixer
from uad_jax.ops import erase


def config(
    kind: Mixer = Mixer.GRU,
    *,
    slabs: dict[str, Any] | None = None,
    mixer: dict[str, Any] | None = None,
    **changes: Any,
) -> interslice.InterSliceConfig:
    """A tiny model with every random part switched on; slabs of 3 slices."""
    hidden = 0.0 if kind is Mixer.NONE else 0.2
    tiny = interslice.InterSliceConfig(
        slabs=interslice_config.SlabConfig(num_slices=3, score_chunk=2),
        mixer=interslice_config.MixerConfig(
            kind=kind, num_heads=2, feedforward_size=16, slice_dropout=hidden
        ),
        latent_size=8,
        width=16,
        max_width=16,
        intermediate_resolution=8,
        erase=erase.EraseConfig(probability=0.5, num_cuboids=2),
        ema_decay=0.9,
        # The bias of attention's keys changes nothing; Adam would blow up the rounding
        # errors that are its gradient.
        optimizer=optim.OptimizerConfig(
            learning_rate=1e-3,
            clip_norm=100.0,
            eps=1e-3 if kind is Mixer.TRANSFORMER else 1e-8,
        ),
    )
    tiny.slabs = dataclasses.replace(tiny.slabs, **(slabs or {}))
    tiny.mixer = dataclasses.replace(tiny.mixer, **(mixer or {}))
    return dataclasses.replace(tiny, **changes)


def batch(rows: int = 2, length: int = 3, *, padded: int = 0) -> types.Batch:
    """Slabs of random 16x16 slices; the last `padded` slices of each are padding."""
    image = jax.random.uniform(jax.random.key(0), (rows, length, 16, 16, 1))
    return types.Batch(
        image=image,
        mask=jnp.ones(image.shape, bool),
        valid=jnp.broadcast_to(
            jnp.arange(length)[None] < length - padded, (rows, length)
        ),
        uid=jnp.arange(rows),
        slice_index=jnp.broadcast_to(jnp.arange(length)[None] + 4, (rows, length)),
    )


def model(of: interslice.InterSliceConfig, slabs: types.Batch) -> types.ModelState:
    """A model of random weights, drawn without compiling anything."""
    shapes = jax.eval_shape(
        lambda key: interslice.init_model(of, key, slabs), jax.random.key(0)
    )
    rng = np.random.default_rng(0)

    def draw(leaf: jax.Array) -> jax.Array:
        fan_in = max(int(np.prod(leaf.shape[:-1])), 1)
        return jnp.asarray(rng.normal(0, fan_in**-0.5, leaf.shape), jnp.float32)

    return jax.tree.map(draw, shapes)
