"""Alarms: training that goes on in finite numbers but no longer leads anywhere.

A method reports an alarm as a scalar named by one of the constants below: 0 as long as
all is well, above 0 (how bad it is) while something is wrong. The scalars stand in the
metrics like all others; the train loop warns, once for each kind, when one has stayed
above 0 for `PATIENCE` steps.
"""

from collections.abc import Mapping

import numpy as np
from absl import logging

PREFIX = "alarm/"
CRITIC_WINS = f"{PREFIX}critic_wins"
FLAT_OUTPUT = f"{PREFIX}flat_output"
SAME_OUTPUT = f"{PREFIX}same_output"

PATIENCE = 200  # steps; what happens in the first steps of any run is no alarm

_MEANING = {
    CRITIC_WINS: (
        "the critic tells real from made without effort, so the generator learns "
        "nothing from it. Lower the critic's learning rate, take fewer critic steps, "
        "raise its penalty, or give the generator more weight."
    ),
    FLAT_OUTPUT: (
        "images made by the model are nearly constant over their pixels. Lower the "
        "learning rate or the weights of the KL and adversarial terms, and check that "
        "the images are scaled to about [0, 1]."
    ),
    SAME_OUTPUT: (
        "the model makes nearly the same image for every input. Lower the KL weight "
        "and the dropout, or train the critic less; look at the reconstructions."
    ),
}


class Watch:
    """Counts how long each alarm lasts, and warns.

    Args:
      patience: Steps that it must last.
      who: Which of several runs that one program trains, "seed=1"; "" if it is the
        only one.
    """

    def __init__(self, patience: int = PATIENCE, who: str = "") -> None:
        self._patience, self._who = patience, f"{who}: " if who else ""
        self._lasted: dict[str, int] = {}
        self._warned: set[str] = set()

    def take(self, step: int, scalars: Mapping[str, np.ndarray]) -> None:
        """Looks at the scalars of some steps.

        Args:
          step: The last of these steps.
          scalars: Name -> values of the steps, [number of steps].
        """
        for name, values in scalars.items():
            if not name.startswith(PREFIX) or name in self._warned:
                continue
            for i, value in enumerate(values):
                lasted = self._lasted.get(name, 0) + 1 if value > 0 else 0
                self._lasted[name] = lasted
                if lasted >= self._patience:
                    self._warn(name, step - len(values) + i + 1, float(value))
                    break

    def _warn(self, name: str, step: int, value: float) -> None:
        self._warned.add(name)
        logging.warning(
            "%sStep %d: %s = %.3g for %d steps: %s",
            self._who,
            step,
            name,
            value,
            self._patience,
            _MEANING.get(name, "see the method that reports it."),
        )
