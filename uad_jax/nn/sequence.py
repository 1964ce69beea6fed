"""Mixers: how the slices of a slab tell each other what they show.

Sources: Cho et al. 2014 (GRU); Hochreiter and Schmidhuber 1997 (LSTM); Ballas et al.
2016, "Delving deeper into convolutional networks for learning video representations"
(ConvGRU); Vaswani et al. 2017 (transformer), with the normalisation before each part.

Every mixer takes a mask of the slices that exist. Padding may lie anywhere; it changes
nothing for the others: a recurrence passes over it, and attention does not look at it.
"""

import enum
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uad_jax.nn import blocks


class Mixer(enum.Enum):
    """What connects the slices of a slab."""

    NONE = "none"  # nothing: every slice alone
    GRU = "gru"  # in both directions
    LSTM = "lstm"  # in both directions
    CONVGRU = "convgru"  # in both directions, on feature maps instead of tokens
    TRANSFORMER = "transformer"  # full attention


class Positions(enum.Enum):
    """How a transformer knows the order of the slices."""

    LEARNED = "learned"  # a table as long as the slab
    SINUSOIDAL = "sinusoidal"


class Context(nn.Module):
    """Turns features of each slice into a posterior that knows the other slices.

    Attributes:
      mixer: What connects the slices; not NONE.
      latent_size: Size of mean and log sigma.
      num_layers: Layers of the mixer.
      positions: TRANSFORMER: how it knows the order.
      num_heads: TRANSFORMER: heads of the attention.
      feedforward_size: TRANSFORMER: width between its two dense layers.
    """

    mixer: Mixer
    latent_size: int
    num_layers: int = 1
    positions: Positions = Positions.LEARNED
    num_heads: int = 4
    feedforward_size: int = 256

    @nn.compact
    def __call__(
        self, features: jax.Array, valid: jax.Array, hidden: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Mixes the slices.

        Args:
          features: Tokens [B, S, F], or for CONVGRU maps [B, S, h, w, C].
          valid: False on padding, [B, S] bool.
          hidden: True where a slice's own features are set to 0 first, [B, S] bool.

        Returns:
          Mean and log sigma, [B, S, latent_size] float32. Those of padding mean
          nothing.
        """
        x = features.astype(jnp.float32)
        if self.mixer is Mixer.CONVGRU:
            init = blocks.glorot_uniform()
            x = nn.Conv(x.shape[-1] // 8, (1, 1), kernel_init=init)(x)
        if hidden is not None:
            x = jnp.where(_spread(hidden, x.ndim), 0.0, x)
        if self.mixer is Mixer.TRANSFORMER:
            x = Transformer(
                self.num_layers, self.num_heads, self.feedforward_size, self.positions
            )(x, valid)
        else:
            for _ in range(self.num_layers):
                x = Bidirectional(_CELLS[self.mixer])(x, valid)
        x = x.reshape(*valid.shape, -1)
        heads = [
            nn.Dense(self.latent_size, kernel_init=blocks.glorot_uniform())
            for _ in range(2)
        ]
        mu, log_sigma = (head(x) for head in heads)
        return mu, log_sigma


class Bidirectional(nn.Module):
    """Runs a recurrence from both ends and adds what comes out to what went in.

    Each direction has half of the features; it begins with a state of zeros at the
    first valid slice on its way, which backwards is the last one.

    Attributes:
      make_cell: Number of features -> the cell.
    """

    make_cell: Callable[[int], nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        """Maps [B, S, ..., F] to the same shape; valid [B, S] bool."""
        outputs = []
        for reverse in (False, True):
            scan = nn.scan(
                _Step,
                variable_broadcast="params",
                split_rngs={"params": False},
                in_axes=1,
                out_axes=1,
                reverse=reverse,
            )
            cell: Any = self.make_cell(x.shape[-1] // 2)
            # The state is zeros, so its key does not matter.
            state = cell.initialize_carry(jax.random.key(0), x[:, 0].shape)
            outputs.append(scan(cell)(state, x, valid)[1])
        return x + jnp.concatenate(outputs, axis=-1)


class _Step(nn.Module):
    """One slice of a recurrence that passes over padding."""

    cell: nn.Module

    @nn.compact
    def __call__(
        self, state: Any, x: jax.Array, valid: jax.Array
    ) -> tuple[Any, jax.Array]:
        cell: Any = self.cell
        new, output = cell(state, x)
        kept = jax.tree.map(
            lambda n, old: jnp.where(_spread(valid, n.ndim), n, old), new, state
        )
        return kept, output


class ConvGruCell(nn.Module):
    """A gated recurrent unit whose products are 3x3 convolutions of a map.

    As in `nn.GRUCell`, the reset gate acts on the convolved state; in the paper it acts
    on the state before.

    Attributes:
      features: Channels of the state.
    """

    features: int

    @nn.compact
    def __call__(self, state: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Takes a step: state [N, h, w, features], x [N, h, w, C] -> (new, new)."""
        size = 3 * self.features
        from_x = self.param(
            "input_kernel", blocks.glorot_uniform(), (3, 3, x.shape[-1], size)
        )
        from_state = self.param(
            "state_kernel", nn.initializers.orthogonal(), (3, 3, self.features, size)
        )
        bias = self.param("bias", nn.initializers.zeros, (size,))
        state_bias = self.param("state_bias", nn.initializers.zeros, (self.features,))
        given = convolve(x, from_x) + bias.reshape(1, 1, 1, -1)
        kept = convolve(state, from_state)
        reset, update, candidate = jnp.split(given, 3, axis=-1)
        kept_reset, kept_update, kept_candidate = jnp.split(kept, 3, axis=-1)
        reset = nn.sigmoid(reset + kept_reset)
        update = nn.sigmoid(update + kept_update)
        kept_candidate = kept_candidate + state_bias.reshape(1, 1, 1, -1)
        candidate = nn.tanh(candidate + reset * kept_candidate)
        new = (1.0 - update) * candidate + update * state
        return new, new

    @nn.nowrap
    def initialize_carry(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """A state of zeros for inputs of a shape [N, h, w, C]."""
        return jnp.zeros((*shape[:-1], self.features))


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3x3 convolution with zeros outside, as one product of shifted copies.

    Convolution gradients inside a scan are 20 to 40 times slower on XLA:CPU; those of
    a product are not. For the small maps of a bottleneck it costs nothing elsewhere.

    Args:
      x: [N, h, w, C].
      kernel: [3, 3, C, F].

    Returns:
      [N, h, w, F].
    """
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [
        padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)
    ]
    flat = kernel.reshape(-1, kernel.shape[-1])
    return jnp.einsum("nhwc,cf->nhwf", jnp.concatenate(taps, axis=-1), flat)


_CELLS: dict[Mixer, Callable[[int], nn.Module]] = {
    Mixer.GRU: nn.GRUCell,
    Mixer.LSTM: nn.OptimizedLSTMCell,
    Mixer.CONVGRU: ConvGruCell,
}


class Transformer(nn.Module):
    """Layers of attention and dense layers, each normalised first; then once more.

    Attributes:
      num_layers: Number of layers.
      num_heads: Heads of the attention.
      feedforward_size: Width between the two dense layers.
      positions: How the order is known.
    """

    num_layers: int
    num_heads: int
    feedforward_size: int
    positions: Positions

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        """Maps [B, S, F] to the same shape; valid [B, S] bool."""
        rows, length, size = x.shape
        x = x + self._table(length, size)[None]
        mask = jnp.broadcast_to(valid[:, None, None, :], (rows, 1, length, length))
        for _ in range(self.num_layers):
            attention = nn.MultiHeadDotProductAttention(
                self.num_heads, deterministic=True
            )
            x = x + attention(nn.LayerNorm()(x), mask=mask)
            hidden = nn.gelu(nn.Dense(self.feedforward_size)(nn.LayerNorm()(x)))
            x = x + nn.Dense(size)(hidden)
        return nn.LayerNorm()(x)

    def _table(self, length: int, size: int) -> jax.Array:
        if self.positions is Positions.SINUSOIDAL:
            return sinusoids(length, size)
        init = nn.initializers.normal(0.02)
        return self.param("positions", init, (length, size))


def sinusoids(length: int, size: int) -> jax.Array:
    """Sines and cosines of each position at falling frequencies.

    Args:
      length: Number of positions.
      size: Number of features, even.

    Returns:
      [length, size] float32: sin(p w_i), then cos(p w_i), w_i = 10000^(-2 i / size).

    Source: Vaswani et al. 2017, section 3.5.
    """
    half = size // 2
    rates = jnp.exp(-math.log(10_000.0) / half * jnp.arange(half))
    angles = jnp.arange(length)[:, None] * rates[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def _spread(mask: jax.Array, ndim: int) -> jax.Array:
    """Appends axes of size 1 to a mask of the leading axes."""
    return mask.reshape(mask.shape + (1,) * (ndim - mask.ndim))
