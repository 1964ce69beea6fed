"""Scalars of a run: one JSON line per step, and TensorBoard without TensorFlow."""

import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import logging
from tensorboardX import record_writer
from tensorboardX.proto import event_pb2, summary_pb2

METRICS = "metrics.jsonl"
TENSORBOARD = "tb"

# Seconds between two moments at which TensorBoard events are forced to the disk.
_SYNC_SECONDS = 10.0


class MetricWriter:
    """Writes scalars to `metrics.jsonl` and to TensorBoard events in `tb/`.

    Only process 0 writes. Files that cannot be written any more (disk full, directory
    removed) are warned about once; training goes on.
    """

    def __init__(self, workdir: pathlib.Path, *, resume_step: int = 0) -> None:
        """Prepares both files to be appended to.

        Args:
          workdir: Directory of the run.
          resume_step: Finished steps when training goes on; what an earlier process
            wrote about later steps is dropped, so that no step appears twice.
        """
        self._path = workdir / METRICS
        self._events: _Events | None = None
        self._warned: set[str] = set()
        self._torn = False
        self._active = jax.process_index() == 0
        if self._active:
            self._try(METRICS, lambda: _drop_after(self._path, resume_step))
            self._try(TENSORBOARD, lambda: self._open_events(workdir, resume_step))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars of a step, named "group/name"; the line is flushed.

        Args:
          step: Finished optimiser steps.
          scalars: Host numbers; NaN and Inf are written as such.
        """
        if not self._active:
            return
        values = {name: float(value) for name, value in scalars.items()}
        self._try(METRICS, lambda: self._append({"step": int(step), **values}))
        if self._events is not None:
            events = self._events
            if not self._try(TENSORBOARD, lambda: events.write(step, values)):
                self.close()

    def close(self) -> None:
        """Forces TensorBoard events to the disk and closes their file."""
        events, self._events = self._events, None
        if events is not None:
            self._try(TENSORBOARD, events.close)

    def _open_events(self, workdir: pathlib.Path, resume_step: int) -> None:
        self._events = _Events(workdir / TENSORBOARD, resume_step)

    def _append(self, line: Mapping[str, Any]) -> None:
        # Opened for every line: a file that was removed comes back.
        start = "\n" if self._torn else ""
        self._torn = True
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(f"{start}{json.dumps(line)}\n")
        self._torn = False

    def _try(self, name: str, action: Callable[[], None]) -> bool:
        try:
            action()
        except OSError as error:
            if name not in self._warned:
                self._warned.add(name)
                logging.warning(
                    "%s cannot be written (%s); training goes on without it.",
                    name,
                    error.strerror or error,
                )
            return False
        return True


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the metrics of a run in the order in which they were written.

    Returns:
      One {"step": int, "group/name": float} per line; lines torn by a kill are left
      out, and a run without metrics has none.
    """
    path = workdir / METRICS
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = (_parse(line) for line in text.split("\n"))
    return [line for line in lines if line is not None]


def _parse(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "step" in line else None


def _drop_after(path: pathlib.Path, step: int) -> None:
    """Rewrites a metrics file without torn lines and without steps after `step`."""
    if not path.exists():
        return
    kept = [line for line in read_metrics(path.parent) if line["step"] <= step]
    partial = path.with_name(f".{path.name}.part")
    partial.write_text("".join(f"{json.dumps(x)}\n" for x in kept), encoding="utf-8")
    partial.replace(path)


class _Events:
    """A TensorBoard event file, written in this thread so that errors are seen here.

    tensorboardX's own writer hands events to a thread through a bounded queue; when
    that thread dies (disk full), the training loop would wait for ever.
    """

    def __init__(self, directory: pathlib.Path, resume_step: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        earlier = any(directory.iterdir())
        self._path = directory / f"events.out.tfevents.{time.time_ns()}.uad_jax"
        self._file = record_writer.RecordWriter(str(self._path))
        self._synced = time.monotonic()
        self._add(event_pb2.Event(file_version="brain.Event:2"))
        if earlier:
            # Tells TensorBoard to forget what earlier files say from this step on.
            restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(event_pb2.Event(step=resume_step + 1, session_log=restart))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if not self._path.exists():
            raise FileNotFoundError(f"{self._path.name} was removed")
        summary = summary_pb2.Summary(
            value=[
                summary_pb2.Summary.Value(tag=name, simple_value=value)
                for name, value in values.items()
            ]
        )
        self._add(event_pb2.Event(step=int(step), summary=summary))
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self._file.flush()
            self._synced = time.monotonic()

    def close(self) -> None:
        try:
            self._file.flush()
        finally:
            self._file.close()

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._file.write(event.SerializeToString())
