"""What a Gaussian-mixture VAE has beside the shared encoder and decoder.

Source: You et al. 2019, "Unsupervised lesion detection via image restoration with a
normative prior"; the sizes are those of the released code of Baur et al. 2021.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uad_jax.nn import blocks

EXTRA_LOG_PRECISION = 0.1  # initial value of the second bias of the log precisions
# Log precisions are kept within +-10: they are linear in w, and exponentials of what an
# odd slice (or padding) gives would overflow and spoil the gradients of a whole batch.
LIMIT = 10.0


class Heads(nn.Module):
    """Posteriors of the code z and of its context w from the encoder's feature map.

    Attributes:
      latent_size: Size of z; at every site if spatial.
      context_size: Size of w; at every site if spatial.
      spatial: Whether the codes are maps.
      dtype: Type of the computation; parameters and codes are float32.
    """

    latent_size: int
    context_size: int
    spatial: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        features: jax.Array,
        *,
        dropout: float | jax.Array = 0.0,
        keys: Sequence[jax.Array] | None = None,
    ) -> tuple[jax.Array, ...]:
        """Makes the posteriors.

        Args:
          features: [N, h, w, channels].
          dropout: Rate of dropout on each of the four.
          keys: For each of the four the keys of the rows, [N]; None = no dropout.

        Returns:
          Mean and log sigma of z, mean and log sigma of w, [N, (h, w,) size] float32.
        """
        x = features.astype(self.dtype)
        if not self.spatial:
            x = nn.Conv(
                x.shape[-1] // 8,
                (1, 1),
                kernel_init=blocks.glorot_uniform(),
                dtype=self.dtype,
            )(x)
            x = x.reshape(x.shape[0], -1)
        codes: list[jax.Array] = []
        for size in 2 * [self.latent_size] + 2 * [self.context_size]:
            code = _dense(size, self.dtype)(x)  # on a map: a 1x1 convolution
            if keys is not None:
                code = blocks.dropout(code, dropout, keys[len(codes)])
            codes.append(code.astype(jnp.float32))
        return tuple(codes)


class Prior(nn.Module):
    """The components of p(z | w), whose means and precisions depend on w.

    Attributes:
      latent_size: Size of z.
      num_components: Number C of components.
      hidden: Units of a hidden layer with ReLU; 0 = none.
    """

    latent_size: int
    num_components: int
    hidden: int = 0

    @nn.compact
    def __call__(self, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps w [..., context_size] to means and log precisions [..., C, Z]."""
        x = context
        if self.hidden:
            x = nn.relu(_dense(self.hidden, jnp.float32)(x))
        size = self.num_components * self.latent_size
        mean = _dense(size, jnp.float32)(x)
        log_precision = _dense(size, jnp.float32)(x)
        extra = self.param(
            "extra", nn.initializers.constant(EXTRA_LOG_PRECISION), (size,)
        )
        log_precision = log_precision + extra.reshape(*[1] * (x.ndim - 1), size)
        log_precision = jnp.clip(log_precision, -LIMIT, LIMIT)
        shape = (*x.shape[:-1], self.num_components, self.latent_size)
        return mean.reshape(shape), log_precision.reshape(shape)


def _dense(features: int, dtype: Any) -> nn.Dense:
    return nn.Dense(features, kernel_init=blocks.glorot_uniform(), dtype=dtype)
