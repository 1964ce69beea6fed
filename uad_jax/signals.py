"""Signals that ask a run to save and stop, as flags that the loop reads."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from absl import logging

_STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignal:
    """Turns SIGTERM, SIGUSR1 and Ctrl-C into a flag while it is entered.

    The first signal only sets the flag: no I/O happens in a handler, the loop saves
    at its next step boundary. A second one of any kind ends the process at once with
    128 + its number, as a shell reports it; checkpoints are written to a temporary
    name and renamed, so the directory stays valid.

    Outside the main thread Python cannot set handlers, and the flag stays clear.

    Attributes:
      received: Name of the first signal, "SIGTERM", or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in _STOP:
                self._previous[number] = signal.signal(number, self._handle)
        else:
            logging.warning(
                "Training runs outside the main thread: SIGTERM will not save."
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number).name
