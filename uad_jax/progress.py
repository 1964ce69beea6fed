"""Where the time of a run goes, the lines of metrics, and the progress bar."""

import contextlib
import math
import sys
import time
from collections.abc import Iterator

import numpy as np
import tqdm
from absl import logging


class Stopwatch:
    """Wall seconds of a run, split into accounts.

    `train` is all the time since the start that was not charged to another account
    by `charge`; waiting for input is part of training and counted beside it.

    Attributes:
      seconds: Account -> seconds so far.
      waited: Seconds of training spent waiting for input.
    """

    def __init__(self) -> None:
        self.seconds = {"compile": 0.0, "eval": 0.0, "save": 0.0}
        self.waited = 0.0
        self.start(0.0)

    def start(self, train_seconds: float) -> None:
        """Training begins now, after `train_seconds` in earlier processes."""
        charged = sum(self.seconds.values())
        self._start = time.perf_counter() - train_seconds - charged

    @contextlib.contextmanager
    def charge(self, account: str) -> Iterator[None]:
        """Charges the time inside to "compile", "eval" or "save"."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[account] += time.perf_counter() - begin

    @contextlib.contextmanager
    def wait(self) -> Iterator[None]:
        """Counts the time inside as waiting for input."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - begin

    @property
    def train(self) -> float:
        """Seconds of training alone."""
        return time.perf_counter() - self._start - sum(self.seconds.values())


class Meter:
    """Means of the scalars and the rates since the last line of metrics."""

    def __init__(self, watch: Stopwatch, slices_per_step: int) -> None:
        self._watch = watch
        self._slices_per_step = slices_per_step
        self._restart()

    def _restart(self) -> None:
        self._sums: dict[str, float] = {}
        self._steps = 0
        self._train, self._waited = self._watch.train, self._watch.waited

    def add(self, scalars: dict[str, np.ndarray]) -> None:
        """Adds the scalars of some steps, each [number of steps]."""
        for name, values in scalars.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(np.sum(values))
        self._steps += len(next(iter(scalars.values())))

    def line(self) -> dict[str, float]:
        """Returns the metrics since the last line and begins a new one."""
        seconds = max(self._watch.train - self._train, 1e-9)
        waited = self._watch.waited - self._waited
        metrics = {
            f"train/{name}": total / self._steps for name, total in self._sums.items()
        }
        metrics |= {
            "perf/slices_per_second": self._steps * self._slices_per_step / seconds,
            "perf/input_wait_share": waited / seconds,
            "perf/train_seconds": self._watch.train,
            "perf/compile_seconds": self._watch.seconds["compile"],
            "perf/eval_seconds": self._watch.seconds["eval"],
            "perf/save_seconds": self._watch.seconds["save"],
        }
        self._restart()
        return metrics


class Bar:
    """A tqdm bar with ETA and throughput on a terminal, lines in the log elsewhere.

    Args:
      total: Steps of the run.
      start: Steps that were done before.
      show: False hides both.
    """

    def __init__(self, total: int, start: int, show: bool) -> None:
        terminal = sys.stderr.isatty()
        self._log = show and not terminal
        self._total, self._start = total, start
        self._begin = time.perf_counter()
        self._bar = tqdm.tqdm(
            total=total,
            initial=start,
            unit="step",
            desc="train",
            dynamic_ncols=True,
            disable=not (show and terminal),
        )

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()

    def advance(self, steps: int) -> None:
        """Counts finished steps."""
        self._bar.update(steps)

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """Shows the loss and the throughput of the last line of metrics."""
        loss = f"{metrics.get('train/loss', math.nan):.4g}"
        rate = f"{metrics['perf/slices_per_second']:.0f}"
        self._bar.set_postfix({"loss": loss, "slices/s": rate}, refresh=False)
        if self._log:
            elapsed = time.perf_counter() - self._begin
            left = elapsed / (step - self._start) * (self._total - step)
            logging.info(
                "step %d of %d: loss %s, %s slices/s, %s left",
                step,
                self._total,
                loss,
                rate,
                tqdm.tqdm.format_interval(left),
            )
