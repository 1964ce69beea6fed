"""Who gets which lesion: the choice behind `splits/ixi_implants_v1_implants.csv`.

Run once, by `benchmarks/ixi_implants.py --plan`; what it chose is frozen in the csv,
and everybody else reads that. Kept because a choice that cannot be repeated cannot be
trusted.
"""

import collections
import dataclasses
import functools
import itertools
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from uad_jax.data import examine, geometry, implant, manifest, nifti
from uad_jax.data.implant import Background, Generator

KINDS = {"mslub": "ms", "soop": "stroke"}  # source of the masks -> kind of lesion
EXCLUDED = ("mslub/patient26",)  # its scan is a test case of its own
SIZES_ML = (0.1, 100.0)  # of a mask; larger acute strokes swell, implants do not
STRATA = 3  # small, medium, large: thirds of each source
TEST_MASKS = 4  # per stratum of a source at least, so that none is used twice
MAX_LOST = 0.3  # share of a mapped mask that may lie outside solid tissue
MIN_VOXELS = 10
PER_SOURCE = {"train": 1, "val": 1, "test": 2}  # implants per subject

_MASK_NAME = re.compile(r"(patient\d+|sub-\w+?)_")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """A lesion mask to choose from.

    Attributes:
      file: Relative to the folder of the data.
      source: Key in `KINDS`.
      patient: Whose lesion it is.
      stratum: 0 small to 2 large, among those of its source.
    """

    file: str
    source: str
    patient: str
    stratum: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """One implant to make.

    Attributes:
      background: The healthy subject.
      split: "train", "val" or "test".
      number: From 1, among those of the subject and source.
      mask: The lesion.
      generator: How it is implanted.
      seed: Of the implant.
    """

    background: str
    split: str
    number: int
    mask: Mask
    generator: Generator
    seed: int


def list_masks(data: pathlib.Path) -> list[Mask]:
    """Lists the masks of usable size, each source cut into strata of equal count."""
    masks = []
    for source in KINDS:
        sized = []
        for path in sorted((data / "lesion_masks" / source).glob("*.nii.gz")):
            found = _MASK_NAME.search(path.name)
            if not found or f"{source}/{found.group(1)}" in EXCLUDED:
                continue
            with examine.quiet():
                scan = nifti.read_mask(path)
            size = scan.data.sum() * float(np.prod(geometry.spacing(scan.affine)))
            if SIZES_ML[0] <= size / 1000 <= SIZES_ML[1]:
                file = path.relative_to(data).as_posix()
                sized.append((float(size), file, found.group(1)))
        masks += [
            Mask(
                file=file,
                source=source,
                patient=patient,
                stratum=rank * STRATA // len(sized),
            )
            for rank, (_, file, patient) in enumerate(sorted(sized))
        ]
    return masks


def split_masks(masks: Sequence[Mask], seed: int) -> dict[str, list[Mask]]:
    """Divides the masks by patient into those for test and those for the rest.

    Args:
      masks: All of them.
      seed: Seeds the order.

    Returns:
      "test" and "train" (also for validation), each in the order of use.

    Raises:
      ValueError: A stratum is too small.
    """
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(masks))
    parts: dict[str, list[Mask]] = {"test": [], "train": []}
    for source in KINDS:
        for stratum in range(STRATA):
            group = [masks[i] for i in order]
            group = [m for m in group if (m.source, m.stratum) == (source, stratum)]
            patients = list(dict.fromkeys(mask.patient for mask in group))
            testing = patients[: max(TEST_MASKS, len(patients) // 2)]
            if len(patients) <= len(testing):
                raise ValueError(
                    f"{source}: {len(patients)} patients in size stratum {stratum}; "
                    f"expected more than {TEST_MASKS}. Give more masks."
                )
            for mask in group:
                parts["test" if mask.patient in testing else "train"].append(mask)
    _check_disjoint(parts)
    return parts


def _check_disjoint(parts: Mapping[str, Sequence[Mask]]) -> None:
    patients = [{(m.source, m.patient) for m in masks} for masks in parts.values()]
    both = sorted(set.intersection(*patients))
    manifest.fail("the masks", [f"{s}/{p} is in both parts." for s, p in both])


def plan(
    data: pathlib.Path, split_of: Mapping[str, str], masks: Sequence[Mask], seed: int
) -> list[Choice]:
    """Chooses the implants of every subject.

    Strata rotate from subject to subject, so that every size occurs equally often;
    a mask is used again only when all others of its kind, for test or for the rest,
    are used as often or do not fit.

    Args:
      data: Folder of the data.
      split_of: Healthy subject -> "train", "val" or "test".
      masks: From `list_masks`.
      seed: Of the whole plan.

    Returns:
      The choices: test, val, train, each by subject.

    Raises:
      ValueError: No mask fits a subject.
    """
    parts = split_masks(masks, seed)
    read = functools.lru_cache(maxsize=1)(functools.partial(read_background, data))
    uses: collections.Counter[str] = collections.Counter()
    choices: list[Choice] = []
    for split, subject, source, number, stratum in _slots(split_of):
        group = [
            mask
            for mask in parts["test" if split == "test" else "train"]
            if (mask.source, mask.stratum) == (source, stratum)
        ]
        group.sort(key=lambda mask: uses[mask.file])
        mask = _first_that_fits(data, group, read(subject), subject)
        uses[mask.file] += 1
        state = np.random.SeedSequence([seed, len(choices)])
        choices.append(
            Choice(
                background=subject,
                split=split,
                number=number,
                mask=mask,
                generator=Generator.TEST if split == "test" else Generator.TRAIN,
                seed=int(state.generate_state(1)[0]),
            )
        )
    return choices


def _slots(split_of: Mapping[str, str]) -> Iterator[tuple[str, str, str, int, int]]:
    """Split, subject, source, number and size stratum of every implant."""
    for split in ("test", "val", "train"):
        subjects = sorted(name for name, given in split_of.items() if given == split)
        numbers = range(PER_SOURCE[split])
        for turn, subject in enumerate(subjects):
            for (shift, source), number in itertools.product(enumerate(KINDS), numbers):
                stratum = (turn + shift + number) % STRATA
                yield split, subject, source, number + 1, stratum


def background_files(
    data: pathlib.Path, subject: str
) -> tuple[pathlib.Path, pathlib.Path]:
    """The T1 and the tissue map of a healthy subject."""
    folder = data / "ixi_t1"
    return folder / f"{subject}_T1.nii.gz", folder / f"{subject}_tissue.nii.gz"


def read_background(data: pathlib.Path, subject: str) -> Background:
    """Reads the T1 and the tissue map of a healthy subject.

    Raises:
      ValueError: A file cannot be used, or the two do not match.
    """
    scan, tissue = map(nifti.read_image, background_files(data, subject))
    nifti.check_same_grid(scan, tissue)
    return Background(
        image=np.rint(scan.data).astype(np.int16),
        tissue=tissue.data.astype(np.uint8),
        affine=scan.affine,
    )


def place(data: pathlib.Path, file: str, background: Background) -> implant.Placed:
    """Places a mask, named relative to the data, onto a background."""
    frame = implant.FRAMES[pathlib.PurePosixPath(file).parent.name]
    with examine.quiet():
        mask = nifti.read_mask(data / file)
    return implant.place(mask, frame, background)


def _first_that_fits(
    data: pathlib.Path, group: Sequence[Mask], background: Background, subject: str
) -> Mask:
    for mask in group:
        placed = place(data, mask.file, background)
        if placed.lost <= MAX_LOST and placed.mask.sum() >= MIN_VOXELS:
            return mask
    raise ValueError(
        f"{subject}: none of {len(group)} masks lies in its brain to "
        f"{1 - MAX_LOST:.0%} or more with {MIN_VOXELS} voxels. Give more masks."
    )
