"""Where the training data comes from and how it is drawn."""

import dataclasses
import enum


class Sampling(enum.Enum):
    """What one epoch is."""

    SLICES = "slices"  # every brain slice once
    ONE_PER_VOLUME = "one_per_volume"  # one random slice of every volume (Behrendt)


class Placement(enum.Enum):
    """Where the training fold lives."""

    STREAM = "stream"  # read from the store, batch by batch
    DEVICE = "device"  # whole fold in accelerator memory
    AUTO = "auto"  # device if it fits in the budget


@dataclasses.dataclass
class DataConfig:
    """The training data.

    Attributes:
      store: Directory written by `run.py prepare`.
      modalities: Channels to use, comma-separated ("t1,flair"); "" = all of them.
      fold: Validation fold, used when the manifest gives folds instead of splits.
      sampling: What one epoch is.
      min_brain_fraction: Training slices with a smaller share of brain pixels are
        left out (`Sampling.SLICES` only).
      placement: Where the training fold lives.
      device_budget_gib: Largest fold that `Placement.AUTO` puts on the device; never
        more than a quarter of its memory.
      num_workers: Grain worker processes; 0 reads in this process.
      read_threads: Grain reading threads.
    """

    store: str = ""
    modalities: str = ""
    fold: int = 0
    sampling: Sampling = Sampling.SLICES
    min_brain_fraction: float = 0.02
    placement: Placement = Placement.AUTO
    device_budget_gib: float = 4.0
    num_workers: int = 0
    read_threads: int = 1
