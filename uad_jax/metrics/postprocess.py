"""From raw anomaly maps to the maps that are measured."""

import enum


class Protocol(enum.Enum):
    """Named post-processing and aggregation; never two in one table."""

    BEHRENDT = "behrendt"
    NONE = "none"
