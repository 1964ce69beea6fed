"""Evaluation protocols: what published studies do between a score and a figure.

A protocol is one set of steps and the figures that its study reports. Figures of two
protocols are never comparable, so they never stand in one table; results, thresholds
and reports bear the name of theirs. docs/metrics.md has the table of all, and where
they deviate from the published code.
"""

import dataclasses
import enum
import fractions
from collections.abc import Callable


class Protocol(enum.Enum):
    """Named post-processing and aggregation; never two in one table."""

    BEHRENDT = "behrendt"
    BAUR = "baur"
    KASCENAS = "kascenas"
    THRESH = "thresh"
    NONE = "none"


class Erosion(enum.Enum):
    """How the brain mask of an axial slice shrinks by some pixels."""

    NONE = "none"
    CROSS = "cross"  # the cross of 4 neighbours, that many times
    SQUARE = "square"  # keeps pixels whose square of that radius is almost all brain


class Median(enum.Enum):
    """The median filter of a map."""

    NONE = "none"
    CUBE = "cube"  # 5 x 5 x 5, the border repeated
    SQUARE = "square"  # 5 x 5 of each axial slice, mirrored at the border


def _no_pixels(height: int, width: int) -> int:
    del height, width
    return 0


def _behrendt_pixels(height: int, width: int) -> int:
    """The authors' own rule: 3 of 96."""
    del height
    return width // 25


def _baur_pixels(height: int, width: int) -> int:
    """12 of 128, of the square that the authors pad to."""
    return _rounded(12 * max(height, width), 128)


def _kascenas_pixels(height: int, width: int) -> int:
    """Radius of the square: 2 (5 x 5) of 128."""
    return _rounded(2 * max(height, width), 128)


def _rounded(pixels: int, size: int) -> int:
    return (2 * pixels + size) // (2 * size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
    """What a protocol does to a map, in this order, and which figures lead.

    Attributes:
      keep_positive: Voxels that are not brighter than the reconstruction score
        lowest, where there is a reconstruction.
      erosion: How the brain mask is eroded.
      erosion_pixels: (height, width of a slice) -> iterations, or the radius of the
        square. The studies state pixels of their own grid; a share of the picture's
        side keeps the mm where another resolution shows the same field of view.
      prior: Voxels darker than this quantile of the volume, with 0 outside the brain,
        score lowest before the median; None = none.
      median: The median filter.
      drop_size: 26-connected components of at most so many voxels are dropped from a
        segmentation; 0 = none.
      headline: Keys of the figures that the study reports, the first ones of a table.
    """

    keep_positive: bool = False
    erosion: Erosion = Erosion.NONE
    erosion_pixels: Callable[[int, int], int] = _no_pixels
    prior: fractions.Fraction | None = None
    median: Median = Median.NONE
    drop_size: int = 0
    headline: tuple[str, ...] = ()


_POOLED = ("ap_pooled", "dice_ceiling_pooled")

_STEPS = {
    Protocol.BEHRENDT: Steps(
        erosion=Erosion.CROSS,
        erosion_pixels=_behrendt_pixels,
        median=Median.CUBE,
        drop_size=7,
        headline=("ap_volume_mean", "dice_validated_volume_mean"),
    ),
    Protocol.BAUR: Steps(
        keep_positive=True,
        erosion=Erosion.CROSS,
        erosion_pixels=_baur_pixels,
        prior=fractions.Fraction(9, 10),
        median=Median.CUBE,
        drop_size=7,
        headline=_POOLED,
    ),
    Protocol.KASCENAS: Steps(
        erosion=Erosion.SQUARE,
        erosion_pixels=_kascenas_pixels,
        median=Median.SQUARE,
        drop_size=20,
        headline=_POOLED,
    ),
    Protocol.THRESH: Steps(drop_size=20, headline=_POOLED),
    Protocol.NONE: Steps(),
}


def steps(protocol: Protocol) -> Steps:
    """The steps of a protocol."""
    return _STEPS[protocol]


def describe(
    protocol: Protocol, height: int, width: int, pixel_mm: tuple[float, float]
) -> str:
    """Says what a protocol does on one grid, with its sizes in mm.

    Args:
      protocol: The protocol.
      height: Of an axial slice in pixels.
      width: Likewise.
      pixel_mm: Edges of a pixel along height and width.

    Returns:
      Parts of a sentence, joined by semicolons; "nothing" if it does nothing.
    """
    chosen = steps(protocol)
    pixels = chosen.erosion_pixels(height, width)
    edges = " x ".join(f"{pixels * edge:.3g}" for edge in sorted(set(pixel_mm)))
    parts = []
    if chosen.keep_positive:
        parts.append("only what is brighter than the reconstruction")
    if chosen.erosion is Erosion.CROSS:
        parts.append(f"brain eroded by {pixels} pixels ({edges} mm)")
    if chosen.erosion is Erosion.SQUARE:
        side = 2 * pixels + 1
        parts.append(
            f"brain kept where over 95 % of {side} x {side} pixels are brain "
            f"(radius {edges} mm)"
        )
    if chosen.prior is not None:
        parts.append(
            f"only voxels from the volume's {float(chosen.prior):g}-quantile up"
        )
    if chosen.median is not Median.NONE:
        window = "5 x 5 x 5" if chosen.median is Median.CUBE else "5 x 5"
        parts.append(f"median {window}")
    if chosen.drop_size:
        parts.append(f"findings of {chosen.drop_size} voxels or fewer dropped")
    return "; ".join(parts) or "nothing"
