"""The scans that a run's parameters have seen, those of its warm starts included."""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from absl import logging

from uad_jax import workdir as workdir_lib
from uad_jax.data.sources import VolumeInfo

ORIGINS = "warm_start_data.json"  # what trained the runs that this one started from


class Seen(NamedTuple):
    """What parameters were trained on.

    Attributes:
      contents: Hashes of the scans, as a store has them.
      licences: Of their data.
    """

    contents: frozenset[str]
    licences: frozenset[str]


def seen(workdir: pathlib.Path) -> Seen:
    """Everything that trained the parameters of a run, in all its stages.

    Raises:
      workdir.WorkdirError: If the run does not say what it is trained on.
    """
    own = workdir_lib.read_json(workdir / workdir_lib.FINGERPRINT)
    earlier = origins(workdir)
    return Seen(
        earlier.contents | set(own["subjects"].values()),
        earlier.licences | {licence for licence in own["licences"] if licence},
    )


def origins(workdir: pathlib.Path) -> Seen:
    """What trained the runs that a run started from; nothing for a run from scratch."""
    path = workdir / ORIGINS
    found: dict[str, Any] = workdir_lib.read_json(path) if path.is_file() else {}
    return Seen(
        frozenset(found.get("contents", ())), frozenset(found.get("licences", ()))
    )


def write(workdir: pathlib.Path, sources: Sequence[pathlib.Path]) -> None:
    """Notes what trained the runs that a fresh run starts from.

    Args:
      workdir: The fresh run.
      sources: Workdirs of the others, or their directories of checkpoints. What trained
        one that does not say so, or whose weights were imported, is not known, and a
        warning names it.
    """
    contents: set[str] = set()
    licences: set[str] = set()
    for source in dict.fromkeys(sources):
        own = source.name == workdir_lib.CHECKPOINTS
        folder = source.parent if own else source
        described = (folder / workdir_lib.FINGERPRINT).is_file()
        if not described or (folder / workdir_lib.IMPORTED).is_file():
            logging.warning(
                "%s does not say what it was trained on: keep its scans out of what "
                "this run is validated and tested on.",
                source,
            )
            continue
        found = seen(folder)
        contents |= found.contents
        licences |= found.licences
    path = workdir / ORIGINS
    path.unlink(missing_ok=True)
    if contents or licences:
        note = {"contents": sorted(contents), "licences": sorted(licences)}
        workdir_lib.write_json(path, note)


def check_validation(
    workdir: pathlib.Path, store: str, volumes: Iterable[VolumeInfo]
) -> None:
    """Makes sure that no earlier stage was trained on what a run is validated on.

    Args:
      workdir: The run.
      store: Its store, for the message.
      volumes: Its validation scans.

    Raises:
      ValueError: If one was.
    """
    known = origins(workdir).contents
    shared = [volume.subject for volume in volumes if volume.content in known]
    if shared:
        raise ValueError(
            f"{store}: {len(shared)} validation scans trained the run that this one "
            f"starts from ({', '.join(shared[:5])}). Give both runs the same fold of "
            "the same store."
        )
