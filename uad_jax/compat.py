"""Whether a released implementation is followed where it differs from its paper."""

import enum


class Compat(enum.Enum):
    """Whose form counts where the released code has a fault."""

    NONE = "none"  # the corrected form
    DENNER = "denner"  # the comparative study of Baur et al. 2021, as released
