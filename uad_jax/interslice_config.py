"""Settings of the inter-slice VAE: slabs, and what connects their slices."""

import dataclasses
import enum

from uad_jax.nn.sequence import Context, Mixer, Positions


class Target(enum.Enum):
    """Which slices of a slab are decoded."""

    ALL = "all"
    CENTRE = "centre"  # of a window; scoring slides it over the volume


@dataclasses.dataclass
class SlabConfig:
    """What the model takes at once, and what it gives back.

    Attributes:
      num_slices: Slices of a slab; at most those of the shallowest training volume.
      target: Which slices are decoded. CENTRE needs an odd number of slices.
      overlap: ALL: slices that neighbouring slabs of a scored volume share.
      score_chunk: CENTRE: windows of a volume that are scored at once; 0 = all.
      remat_slices: Slices of each slab that are decoded at a time, and again in the
        backward pass, to save memory; 0 = all at once, and kept.
    """

    num_slices: int = 16
    target: Target = Target.ALL
    overlap: int = 0
    score_chunk: int = 16
    remat_slices: int = 0

    def validate(self) -> None:
        """Raises ValueError for settings that cannot work."""
        size = self.num_slices
        if size < 1:
            raise ValueError(f"slabs.num_slices is {size}; use 1 or more.")
        if not 0 <= self.overlap < size:
            raise ValueError(
                f"slabs.overlap is {self.overlap}; use 0 to {size - 1} with slabs of "
                f"num_slices = {size}."
            )
        if self.target is Target.CENTRE and (size % 2 == 0 or self.overlap):
            raise ValueError(
                f"slabs.num_slices is {size} and slabs.overlap {self.overlap}; "
                "target=centre needs an odd window, and overlap = 0: it slides by one "
                "slice anyway."
            )
        if self.score_chunk < 0:
            raise ValueError(f"slabs.score_chunk is {self.score_chunk}; use 0 or more.")
        decoded = 1 if self.target is Target.CENTRE else size
        if self.remat_slices < 0 or (self.remat_slices and decoded % self.remat_slices):
            raise ValueError(
                f"slabs.remat_slices is {self.remat_slices}; use 0 or a divisor of the "
                f"{decoded} decoded slices."
            )


@dataclasses.dataclass
class MixerConfig:
    """What connects the slices.

    Attributes:
      kind: Which mixer; NONE is the two-dimensional VAE.
      num_layers: Its layers.
      positions: TRANSFORMER: how it knows the order of the slices.
      num_heads: TRANSFORMER: heads of the attention.
      feedforward_size: TRANSFORMER: width between its dense layers.
      slice_dropout: Share of the slices whose own token is hidden from the mixer while
        training; they are reconstructed from the others. Not with NONE.
    """

    kind: Mixer = Mixer.GRU
    num_layers: int = 1
    positions: Positions = Positions.LEARNED
    num_heads: int = 4
    feedforward_size: int = 256
    slice_dropout: float = 0.0

    def validate(self, latent_size: int, widths: tuple[int, ...]) -> None:
        """Raises ValueError for settings that cannot work with these sizes."""
        for name in ("num_layers", "num_heads", "feedforward_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"mixer.{name} is {getattr(self, name)}; use 1 or more."
                )
        if not 0 <= self.slice_dropout < 1:
            raise ValueError(
                f"mixer.slice_dropout is {self.slice_dropout}; it must lie in [0, 1)."
            )
        if self.kind is Mixer.NONE and self.slice_dropout:
            raise ValueError(
                f"mixer.slice_dropout is {self.slice_dropout}, but kind=none has no "
                "other slices to reconstruct from. Use 0."
            )
        if self.kind is Mixer.CONVGRU and any(width % 16 for width in widths):
            raise ValueError(
                f"width and max_width are {widths}; kind=convgru needs multiples of "
                "16: each direction takes half of an eighth."
            )
        if self.kind is Mixer.TRANSFORMER and latent_size % (2 * self.num_heads):
            raise ValueError(
                f"latent_size is {latent_size}, no multiple of 2 x mixer.num_heads = "
                f"{2 * self.num_heads}. Change one of them."
            )
        if self.kind is not Mixer.NONE and latent_size % 2:
            raise ValueError(
                f"latent_size is {latent_size}; each direction of kind="
                f"{self.kind.value} takes half. Use an even number."
            )

    def make(self, latent_size: int) -> Context | None:
        """Builds the mixer and the heads of the code; None for NONE."""
        if self.kind is Mixer.NONE:
            return None
        return Context(
            mixer=self.kind,
            latent_size=latent_size,
            num_layers=self.num_layers,
            positions=self.positions,
            num_heads=self.num_heads,
            feedforward_size=self.feedforward_size,
        )
