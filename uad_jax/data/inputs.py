"""The scans to predict on: listed as `prepare` lists them, and of the right modality.

Only names are looked at here; what is inside the files is `data/check.py`'s.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from uad_jax.data import datasets, manifest
from uad_jax.data.manifest import DEFAULT_MODALITY, SubjectFiles

_SUFFIXES = (".nii.gz", ".nii")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """One subject to predict on.

    Attributes:
      files: Its files; the images are those that the model wants, by the model's
        names. No lesion mask, no label.
      warnings: What was overridden by force, one sentence each.
    """

    files: SubjectFiles
    warnings: tuple[str, ...] = ()


def find(
    source: str, wanted: Sequence[str], *, modality: str = "", force: bool = False
) -> list[Input]:
    """Lists the scans of a file, a folder or a manifest that a model can be shown.

    Args:
      source: A NIfTI file, or what `datasets.load` reads. Beside a single file
        `NAME.nii.gz` the brain mask `NAME_mask.nii.gz` counts, as in a folder.
      wanted: Modalities of the model.
      modality: As in `datasets.load`: what files are whose names do not say, and
        which files of a folder to take.
      force: Takes the only image of a subject although it is of another modality.

    Returns:
      The subjects.

    Raises:
      ValueError: Lists every subject without the modalities of the model, and every
        problem of the list itself.
    """
    path = Path(source)
    words = [word for word in modality.lower().split(",") if word]
    is_manifest = path.suffix.lower() == ".csv"
    if path.is_file() and path.name.endswith(_SUFFIXES):
        subjects = [_single(path, words)]
    elif path.name.endswith(_SUFFIXES) and not path.exists():
        raise ValueError(f"{source}: there is no file of that name.")
    elif path.is_file() and not is_manifest:
        raise ValueError(
            f"{source}: expected a .nii or .nii.gz file, a folder of them, or a "
            "manifest.csv. Convert other formats to NIfTI first."
        )
    else:
        subjects = datasets.load(source, modality=modality)
    found: list[Input] = []
    problems: list[str] = []
    for subject in subjects:
        images = _named(subject)
        problem = _mismatch(images, wanted, trusted=is_manifest)
        if problem and not (force and len(images) == len(wanted) == 1):
            problems.append(f"{subject.subject}: {problem}")
            continue
        if problem or list(wanted) == [DEFAULT_MODALITY]:
            images = {wanted[0]: next(iter(images.values()))}
        files = dataclasses.replace(
            subject,
            images={name: file for name, file in images.items() if name in wanted},
            lesion_mask=None,
            label="healthy",
            split="test",
            fold=None,
            extra={},
        )
        warnings = (f"Predicted all the same, by force: {problem}",) if problem else ()
        found.append(Input(files=files, warnings=warnings))
    if problems:
        raise ValueError(
            f"{source}: {len(problems)} of {len(subjects)} subjects do not fit the "
            "model:" + "".join(f"\n  {problem}" for problem in problems) + "\nGive it "
            f"{', '.join(wanted)} images; --modality={','.join(wanted)} takes only "
            "those of a folder. --force predicts all the same on the only image of a "
            "subject; the scores then mean little."
        )
    return found


def named_modalities(name: str) -> list[str]:
    """Modalities that stand anywhere in a file's name, as in 'a_T1_1mm.nii.gz'."""
    words = re.split(r"[-_.]", name)
    found = {manifest.split_modality(f"x_{word}")[1] for word in words}
    return sorted(found - {""})


def _single(path: Path, words: Sequence[str]) -> SubjectFiles:
    """The subject of one file, by the rules of a folder."""
    stem = manifest.stem(path)
    subject, named = manifest.split_modality(stem)
    masks = (
        path.with_name(f"{name}_mask{suffix}")
        for name in (stem, subject)
        for suffix in _SUFFIXES
    )
    modality = (words[0] if words else named) or DEFAULT_MODALITY
    return SubjectFiles(
        subject=subject,
        patient=subject,
        images={modality: path},
        brain_mask=next((mask for mask in masks if mask.is_file()), None),
    )


def _named(subject: SubjectFiles) -> dict[str, Path]:
    """Images by modality, also where that stands in the middle of the file's name."""
    if list(subject.images) == [DEFAULT_MODALITY]:
        (path,) = subject.images.values()
        named = named_modalities(path.name)
        if len(named) == 1:
            return {named[0]: path}
    return subject.images


def _mismatch(images: dict[str, Path], wanted: Sequence[str], *, trusted: bool) -> str:
    """What is wrong with these images for a model of `wanted`; "" if nothing is."""
    model = ", ".join(wanted)
    if model == DEFAULT_MODALITY and len(images) == 1:
        return ""  # nobody said what the model was trained on
    if list(images) == [DEFAULT_MODALITY]:
        (path,) = images.values()
        return (
            f"the name of {path.name} does not say its modality, and the model was "
            f"trained on {model}. If it is that, pass --modality={','.join(wanted)}."
        )
    if not set(wanted) <= set(images):
        return (
            f"there is {', '.join(sorted(images))}, but the model was trained on "
            f"{model}."
        )
    for name in [] if trusted else wanted:
        named = named_modalities(images[name].name)
        if named and name not in named:
            return (
                f"the name of {images[name].name} says {', '.join(named)}, but the "
                f"model was trained on {model}."
            )
    return ""
