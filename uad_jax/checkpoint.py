"""Checkpoints of a run: saved asynchronously, hashed, verified, never half-there.

A save goes through three names. Orbax writes `<step>.saving`; when its commit is
through, a background thread adds a note (metrics, leaf table) and the hash manifest;
only then is the directory renamed to `<step>`. Whatever kills the process leaves
either a complete step or a name that is ignored and cleaned up at the next start.
"""

import json
import math
import pathlib
import re
import shutil
import threading
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from uad_jax import integrity
from uad_jax.types import ModelState, TrainState

_SAVING = ".saving"
_DELETING = ".deleting"

T = TypeVar("T")


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
            self._clear_leftovers()

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
        return self._meta(step)["metrics"]

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
        leaves = integrity.flatten(state)
        with jax.transfer_guard("allow"):
            self._refuse_non_finite(step, leaves)
            if not self._make_room(step):
                return False
            meta = {
                "step": step,
                "metrics": {k: float(v) for k, v in (metrics or {}).items()},
                "leaves": integrity.leaf_table(leaves),
            }
            staged = self._path(step, _SAVING)
            try:
                self._orbax.save(staged, args=ocp.args.PyTreeSave(leaves))
            except Exception as error:
                raise self._save_failed(step, error) from error
        self._pending = step
        self._publisher = threading.Thread(
            target=self._publish, args=(step, meta), name=f"publish-{step}"
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
        step = self._sound_step(step)
        wanted = integrity.flatten(abstract)
        stored = integrity.stored_table(self._meta(step))
        self._check_fit(step, wanted, stored, allow_cast, describe)
        leaves = self._load(step, wanted)
        logging.info("Restored step %d of %s.", step, self.directory)
        return _unflatten(abstract, leaves), step

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
        step = self._sound_step(step)
        stored = integrity.stored_table(self._meta(step))
        wanted = {
            f"model/{path}": leaf
            for path, leaf in integrity.flatten(abstract_model).items()
        }
        model = {k: v for k, v in stored.items() if k.startswith("model/")}
        self._check_fit(step, wanted, model, allow_cast, describe)
        sources = {path: eval_source(path, stored) for path in wanted}
        leaves = self._load(step, {sources[path]: x for path, x in wanted.items()})
        logging.info("Restored the model of step %d of %s.", step, self.directory)
        found = {
            path.removeprefix("model/"): leaves[source]
            for path, source in sources.items()
        }
        return _unflatten(abstract_model, found)

    def stored_leaves(self, step: int | None = None) -> tuple[int, integrity.LeafTable]:
        """Verifies a step and tells shape and dtype of its leaves."""
        step = self._sound_step(step)
        return step, integrity.stored_table(self._meta(step))

    def load(self, step: int, leaves: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Reads single leaves of a verified step by their path.

        Args:
          step: A step that `stored_leaves` returned.
          leaves: Path -> `jax.ShapeDtypeStruct` with a sharding.
        """
        return self._load(step, leaves)

    def _path(self, step: int, suffix: str = "") -> pathlib.Path:
        return self.directory / f"{step}{suffix}"

    def _meta(self, step: int) -> dict[str, Any]:
        try:
            return integrity.read_meta(self._path(step))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self._path(step) / integrity.META}: {error}"
            ) from error

    def _loss(self, step: int) -> float:
        try:
            return float(self.metrics(step).get("loss", math.nan))
        except (CheckpointError, TypeError, ValueError):
            return math.nan

    def _clear_leftovers(self) -> None:
        pattern = re.compile(rf"\d+(\{_SAVING}.*|\{_DELETING})")
        for path in self.directory.iterdir():
            if pattern.fullmatch(path.name) and path.is_dir():
                logging.info("Removing %s, left by an interrupted run.", path)
                shutil.rmtree(path, ignore_errors=True)

    def _refuse_non_finite(self, step: int, leaves: Mapping[str, jax.Array]) -> None:
        checked = {
            path: leaf
            for path, leaf in leaves.items()
            if path.startswith(("model/", "ema/"))
            and jnp.issubdtype(leaf.dtype, jnp.inexact)
        }
        if not checked:
            return
        finite = np.asarray(jax.device_get(_all_finite(list(checked.values()))))
        bad = [path for path, ok in zip(checked, finite, strict=True) if not ok]
        if bad:
            raise CheckpointError(
                f"Step {step} is not saved: NaN or Inf in {len(bad)} of {len(checked)} "
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
                    self._delete(newer)
            shutil.rmtree(self._path(step, _SAVING), ignore_errors=True)
            if not there and self._path(step).exists():
                aside = integrity.quarantine(self._path(step))
                logging.warning("An incomplete step %d is now %s.", step, aside.name)
        if there:
            logging.warning("Step %d is saved already; it is left as it is.", step)
        return not there

    def _publish(self, step: int, meta: dict[str, Any]) -> None:
        try:
            self._orbax.wait_until_finished()
            if not _is_primary():
                return
            staged = self._path(step, _SAVING)
            note = json.dumps(meta, indent=1, sort_keys=True)
            (staged / integrity.META).write_text(note, encoding="utf-8")
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
                self._delete(step)

    def _delete(self, step: int) -> None:
        # Renamed first, so that a kill half-way leaves no step that looks damaged.
        doomed = self._path(step, _DELETING)
        shutil.rmtree(doomed, ignore_errors=True)
        self._path(step).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _save_failed(self, step: int, error: BaseException) -> CheckpointError:
        if _is_primary():
            for path in self.directory.glob(f"{step}{_SAVING}*"):
                shutil.rmtree(path, ignore_errors=True)
        free = shutil.disk_usage(self.directory).free
        return CheckpointError(
            f"Saving step {step} to {self.directory} failed ({free} bytes free there): "
            f"{error}. The complete steps are {self.steps()}."
        )

    def _sound_step(self, step: int | None) -> int:
        """Picks and verifies a step on process 0; all processes get the same one."""
        self.wait()
        found, error = -1, None
        if _is_primary():
            try:
                found = self._newest_sound() if step is None else self._verified(step)
            except CheckpointError as problem:
                error = problem
        if jax.process_count() > 1:
            found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        if error is not None:
            raise error
        if found < 0:
            raise CheckpointError(f"{self.directory}: process 0 found no sound step.")
        return found

    def _verified(self, step: int) -> int:
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
            raise CheckpointError(
                f"{self.directory}: no sound checkpoint.{''.join(listed)}"
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
        stored: integrity.LeafTable,
        allow_cast: bool,
        describe: str,
    ) -> None:
        lines = integrity.differences(
            integrity.leaf_table(wanted), stored, allow_cast=allow_cast
        )
        if lines:
            reason = f" ({describe})" if describe else ""
            raise CheckpointError(
                f"{self._path(step)}: the model differs{reason}:\n  "
                + "\n  ".join(lines)
                + "\nUse the config that the checkpoint was trained with."
            )

    def _load(self, step: int, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
        bare = [path for path, x in wanted.items() if x.sharding is None]
        if bare:
            raise ValueError(
                f"{len(bare)} leaves have no sharding, such as {bare[0]}. "
                "Attach them with mesh.with_shardings."
            )
        wanted = dict(wanted)
        request = ocp.args.PyTreeRestore(
            wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,  # other leaves of the step are not read
        )
        try:
            with (
                jax.transfer_guard("allow"),
                ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader,
            ):
                return reader.restore(self._path(step), args=request)
        except Exception as error:
            raise CheckpointError(
                f"{self._path(step)}: every file is as it was saved, but it cannot be "
                f"restored here: {error}"
            ) from error


def eval_source(path: str, stored: Mapping[str, Any]) -> str:
    """Where a model leaf comes from in evaluation: its average, or itself."""
    averaged = path.replace("model/params/", "ema/", 1)
    return averaged if averaged in stored else path


def _unflatten(like: T, leaves: Mapping[str, jax.Array]) -> T:
    order = integrity.flatten(like)
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[k] for k in order])


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves])


def _is_primary() -> bool:
    return jax.process_index() == 0


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
