"""Checkpoints of a run: saved asynchronously, hashed, verified, never half-there.

Orbax writes `<step>.saving`. When its commit is through, a background thread adds a
note and the hash manifest, and only then renames the directory to `<step>`. Whatever
kills the process leaves a complete step, or a name that is ignored and cleared away
at the next start.
"""

import hashlib
import json
import math
import pathlib
import shutil
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from uad_jax import integrity
from uad_jax import leaves as leaves_lib
from uad_jax.types import ModelState, TrainState

_NOTE = "note.json"  # step, metrics, shape and dtype of every leaf


class CheckpointError(RuntimeError):
    """A checkpoint cannot be saved, or cannot be restored as asked."""


class Checkpoints:
    """The checkpoints of one run, in `<directory>/<step>/`.

    With several processes, every process makes the same calls in the same order on
    one shared file system; process 0 renames, hashes and deletes.
    """

    def __init__(
        self,
        directory: pathlib.Path | str,
        *,
        keep: int = 2,
        keep_every: int = 0,
        read_only: bool = False,
    ) -> None:
        """Opens a directory of checkpoints and clears what a killed save left.

        Args:
          directory: Directory of the steps; made unless `read_only`.
          keep: Newest steps to keep beside the best one, at least 1.
          keep_every: Also keep steps that are multiples of this; 0 = none.
          read_only: Never create, rename or delete anything (evaluation).
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}; use 1 or more.")
        self.directory = pathlib.Path(directory).absolute()
        self._keep = keep
        self._keep_every = keep_every
        self._read_only = read_only
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._publisher: threading.Thread | None = None
        self._error: BaseException | None = None
        self._pending: int | None = None
        if not read_only and _is_primary():
            self.directory.mkdir(parents=True, exist_ok=True)
            integrity.clear_leftovers(self.directory)

    def steps(self) -> list[int]:
        """Complete steps, oldest first: manifest readable, every listed file there.

        Hashes are compared on restore.
        """
        return [
            step
            for step in integrity.step_dirs(self.directory)
            if integrity.is_complete(self._path(step))
        ]

    def latest(self) -> int | None:
        """The newest complete step; None if nothing was ever saved here.

        Raises:
          CheckpointError: If there are steps but none is complete: training must not
            start from scratch without anybody noticing.
        """
        steps = self.steps()
        if steps:
            return steps[-1]
        broken = [str(step) for step in integrity.step_dirs(self.directory)]
        broken += integrity.quarantined(self.directory)
        if broken:
            raise CheckpointError(
                f"{self.directory}: no complete checkpoint, only {', '.join(broken)}. "
                "To start from scratch, move this directory away."
            )
        return None

    def best(self) -> int | None:
        """The complete step with the lowest finite metrics["loss"], or None."""
        losses = {step: self._loss(step) for step in self.steps()}
        finite = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
        return min(finite, key=lambda step: (finite[step], step)) if finite else None

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics that were saved with a step."""
        return self._note(step)["metrics"]

    def identity(self, step: int) -> str:
        """Hash of everything a step holds; another training gives another one.

        Raises:
          CheckpointError: If the step is not complete.
        """
        try:
            manifest = (self._path(step) / integrity.MANIFEST).read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{self._path(step)} is not complete: {error}"
            ) from error
        return hashlib.sha256(manifest).hexdigest()

    def save(
        self, step: int, state: TrainState, *, metrics: Mapping[str, float] | None
    ) -> bool:
        """Starts a save; the state may be donated as soon as this returns.

        Waits for the save before it. Saving below the newest step is a rollback: the
        newer steps are deleted first.

        Args:
          step: Number of finished optimiser steps.
          state: The train state.
          metrics: Validation metrics; "loss" selects the best step.

        Returns:
          False if this step is there already, which is logged.

        Raises:
          CheckpointError: If parameters are not finite, or the save before failed.
        """
        if self._read_only:
            raise CheckpointError(f"{self.directory} was opened read-only.")
        self.wait()
        leaves = leaves_lib.flatten(state)
        note = {
            "step": step,
            "metrics": {name: float(value) for name, value in (metrics or {}).items()},
            "leaves": leaves_lib.table(leaves),
        }
        with jax.transfer_guard("allow"):
            self._refuse_non_finite(step, leaves)
            if not self._make_room(step):
                return False
            staged = self._staged(step)
            try:
                self._orbax.save(staged, args=ocp.args.PyTreeSave(leaves))
            except Exception as error:
                raise self._save_failed(step, error) from error
        self._pending = step
        self._publisher = threading.Thread(
            target=self._publish, args=(step, note), name=f"publish-{step}"
        )
        self._publisher.start()
        return True

    def wait(self) -> None:
        """Waits until the running save is complete.

        Raises:
          CheckpointError: If it failed; older steps are untouched.
        """
        if self._publisher is None:
            return
        self._publisher.join()
        self._publisher = None
        step, self._pending = self._pending, None
        error, self._error = self._error, None
        assert step is not None
        if error is not None:
            raise self._save_failed(step, error) from error
        _barrier(f"checkpoint-{step}")

    def close(self) -> None:
        """Waits for the running save and frees Orbax's threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def restore(
        self,
        abstract: TrainState,
        step: int | None = None,
        *,
        allow_cast: bool = False,
        describe: str = "",
    ) -> tuple[TrainState, int]:
        """Restores a train state, by default the newest sound one.

        A damaged newest step is renamed to `<step>.bad` (unless read-only) and the
        one before is used. A step that is asked for by number must be sound.

        Args:
          abstract: `jax.ShapeDtypeStruct` leaves with shardings
            (`mesh.with_shardings`): where the state lives now, not where it lived.
          step: Step to restore; None = the newest sound one.
          allow_cast: Whether leaves stored in another dtype are cast.
          describe: Added to the error if the state does not fit, such as the
            difference of the configs.

        Returns:
          The state and its step.

        Raises:
          CheckpointError: If there is no sound step, or the state does not fit it.
        """
        step, stored = self.verified(step)
        wanted = leaves_lib.flatten(abstract)
        self._check_fit(step, wanted, stored, allow_cast, describe)
        found = self.read(step, wanted)
        logging.info("Restored step %d of %s.", step, self.directory)
        return leaves_lib.unflatten(abstract, found), step

    def restore_model(
        self,
        abstract_model: ModelState,
        step: int | None = None,
        *,
        allow_cast: bool = False,
        describe: str = "",
    ) -> ModelState:
        """Restores what evaluation needs: `TrainState.for_eval()`; see `restore`.

        The optimiser's state is not read.
        """
        step, stored = self.verified(step)
        flat = leaves_lib.flatten(abstract_model)
        wanted = {f"model/{path}": leaf for path, leaf in flat.items()}
        model = {path: x for path, x in stored.items() if path.startswith("model/")}
        self._check_fit(step, wanted, model, allow_cast, describe)
        origin = {path: leaves_lib.averaged(f"model/{path}", stored) for path in flat}
        found = self.read(step, {origin[path]: leaf for path, leaf in flat.items()})
        logging.info("Restored the model of step %d of %s.", step, self.directory)
        return leaves_lib.unflatten(
            abstract_model, {path: found[source] for path, source in origin.items()}
        )

    def verified(self, step: int | None = None) -> tuple[int, leaves_lib.LeafTable]:
        """Verifies a step (None = the newest sound one) and lists its leaves.

        Returns:
          The step, and path -> (shape, dtype) of everything stored in it.

        Raises:
          CheckpointError: See `restore`.
        """
        step = self._agree_on_step(step)
        stored = self._note(step)["leaves"]
        return step, {
            path: (tuple(shape), kind) for path, (shape, kind) in stored.items()
        }

    def read(self, step: int, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Reads some leaves of a verified step: path -> abstract leaf with sharding."""
        leaves_lib.require_shardings(wanted)
        try:
            return leaves_lib.read(self._path(step), wanted)
        except Exception as error:
            raise CheckpointError(
                f"{self._path(step)}: every file is as it was saved, but it cannot be "
                f"restored here: {error}"
            ) from error

    def _path(self, step: int) -> pathlib.Path:
        return self.directory / str(step)

    def _staged(self, step: int) -> pathlib.Path:
        return self.directory / f"{step}{integrity.SAVING}"

    def _note(self, step: int) -> dict[str, Any]:
        path = self._path(step) / _NOTE
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def _loss(self, step: int) -> float:
        try:
            return float(self.metrics(step).get("loss", math.nan))
        except (CheckpointError, TypeError, ValueError):
            return math.nan

    def _refuse_non_finite(self, step: int, state: dict[str, jax.Array]) -> None:
        model = {k: x for k, x in state.items() if k.startswith(("model/", "ema/"))}
        bad = leaves_lib.non_finite(model)
        if bad:
            raise CheckpointError(
                f"Step {step} is not saved: NaN or Inf in {len(bad)} of {len(model)} "
                f"leaves: {', '.join(bad)}. The steps before are untouched."
            )

    def _make_room(self, step: int) -> bool:
        """Handles steps at or above the one to save; False if it is there already."""
        there = step in self.steps()
        _barrier(f"checkpoint-room-{step}")  # before process 0 changes what others see
        if _is_primary():
            for newer in integrity.step_dirs(self.directory):
                if newer > step:
                    logging.warning("Rollback to step %d deletes step %d.", step, newer)
                    integrity.delete(self._path(newer))
            if not there and self._path(step).exists():
                aside = integrity.quarantine(self._path(step))
                logging.warning("An incomplete step %d is now %s.", step, aside.name)
        if there:
            logging.warning("Step %d is saved already; it is left as it is.", step)
        return not there

    def _publish(self, step: int, note: dict[str, Any]) -> None:
        try:
            self._orbax.wait_until_finished()
            if not _is_primary():
                return
            staged = self._staged(step)
            text = json.dumps(note, indent=1, sort_keys=True)
            (staged / _NOTE).write_text(text, encoding="utf-8")
            integrity.write_manifest(staged)
            staged.rename(self._path(step))
            integrity.sync_directory(self.directory)
            self._drop_old_steps()
        except BaseException as error:
            self._error = error

    def _drop_old_steps(self) -> None:
        steps = self.steps()
        kept = {*steps[-self._keep :], self.best()}
        if self._keep_every:
            kept |= {step for step in steps if step % self._keep_every == 0}
        for step in steps:
            if step not in kept:
                integrity.delete(self._path(step))

    def _save_failed(self, step: int, error: BaseException) -> CheckpointError:
        if _is_primary():
            for path in self.directory.glob(f"{self._staged(step).name}*"):
                shutil.rmtree(path, ignore_errors=True)
        free = shutil.disk_usage(self.directory).free
        return CheckpointError(
            f"Saving step {step} to {self.directory} failed ({free} bytes free there): "
            f"{error}. The complete steps are {self.steps()}."
        )

    def _agree_on_step(self, step: int | None) -> int:
        """Picks and verifies a step on process 0; all processes get the same one."""
        self.wait()
        found, error = -1, None
        if _is_primary():
            try:
                found = (
                    self._newest_sound() if step is None else self._check_sound(step)
                )
            except CheckpointError as problem:
                error = problem
        if jax.process_count() > 1:
            found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        if error is not None:
            raise error
        if found < 0:
            raise CheckpointError(f"{self.directory}: process 0 found no sound step.")
        return found

    def _check_sound(self, step: int) -> int:
        if not self._path(step).is_dir():
            raise CheckpointError(
                f"{self.directory} has no step {step}. Complete steps: {self.steps()}."
            )
        found = integrity.problems(self._path(step))
        if found:
            raise CheckpointError(
                f"{self._path(step)} is damaged: {'; '.join(found)}. "
                f"Complete steps: {self.steps()}."
            )
        return step

    def _newest_sound(self) -> int:
        damaged: dict[int, list[str]] = {}
        for step in reversed(integrity.step_dirs(self.directory)):
            found = integrity.problems(self._path(step))
            if not found:
                break
            damaged[step] = found
        else:
            self.latest()  # says so if there are only incomplete ones
            listed = [f"\n  {s}: {'; '.join(found)}" for s, found in damaged.items()]
            reason = f"only damaged ones:{''.join(listed)}" if listed else "it is empty"
            raise CheckpointError(
                f"{self.directory} has no checkpoint to restore; {reason}"
            )
        for bad, found in damaged.items():
            action = "ignored"
            if not self._read_only:
                aside = integrity.quarantine(self._path(bad))
                action = f"kept as {aside.name}"
            logging.warning(
                "Checkpoint %d of %s is damaged (%s) and %s; step %d is used instead.",
                bad,
                self.directory,
                "; ".join(found),
                action,
                step,
            )
        return step

    def _check_fit(
        self,
        step: int,
        wanted: Mapping[str, Any],
        stored: leaves_lib.LeafTable,
        allow_cast: bool,
        describe: str,
    ) -> None:
        lines = leaves_lib.differences(
            leaves_lib.table(wanted), stored, allow_cast=allow_cast
        )
        if lines:
            reason = f" ({describe})" if describe else ""
            raise CheckpointError(
                f"{self._path(step)}: the model differs{reason}:\n  "
                + "\n  ".join(lines)
                + "\nUse the config that the checkpoint was trained with."
            )


def _is_primary() -> bool:
    return jax.process_index() == 0


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
