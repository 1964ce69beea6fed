"""The functions of a method that the shared anomaly scores are made of."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from uad_jax.ops import losses
from uad_jax.types import Array, ModelState, Tree


class Reconstruct(Protocol):
    """Reconstructs slices."""

    def __call__(
        self,
        model: ModelState,
        image: Array,
        keys: Array | None,
        *,
        sample: bool,
        dropout: bool,
    ) -> Array:
        """Maps [N, H, W, C] to the same shape.

        Args:
          model: The model.
          image: [N, H, W, C] float32.
          keys: One per slice, [N]; None = nothing is random.
          sample: Draw the code from the posterior, where there is one.
          dropout: Drop units.
        """
        ...


class Terms(NamedTuple):
    """The loss of slices, term by term.

    Attributes:
      output: The reconstruction, [N, H, W, C] float32.
      reconstruction: Its error, summed over the pixels, [N] float32.
      kl: All divergences, summed over the code, before their weight; [N] float32.
    """

    output: Array
    reconstruction: Array
    kl: Array


class Functions(NamedTuple):
    """What scores need of a method.

    Attributes:
      reconstruct: Its reconstruction.
      terms: (model, image [N, H, W, C], keys [N] or None, pixel loss) -> Terms, with
        the code drawn by the keys, or the posterior's mean. Without a posterior the
        divergence is 0.
      kl_weight: Of the divergence where the error is summed over the pixels.
      pixel_loss: The error of the method's own loss.
    """

    reconstruct: Reconstruct
    terms: Callable[[ModelState, Array, Array | None, losses.PixelLoss], Terms]
    kl_weight: float | Array = 0.0
    pixel_loss: losses.PixelLoss = losses.PixelLoss.L1


class Rows(NamedTuple):
    """Slices that are scored at once.

    Attributes:
      image: [N, H, W, C] float32.
      mask: What a restoration may change if it is masked, [N, H, W, 1] bool.
      keys: One per slice, [N].
      context: What else a method must know of them, arrays [N, ...]; None = nothing.
    """

    image: Array
    mask: Array
    keys: Array
    context: Tree = None


# What scores need of a method whose slices do not stand alone: its functions for these
# rows.
Bind = Callable[[Rows], Functions]
