"""The frozen protocol `ixi_implants_v1`: a csv that fixes every volume, and its maker.

`splits/ixi_implants_v1_implants.csv` names backgrounds, masks, generators, seeds and
what came out. Whatever is made again is held against it: a volume that differs is an
error, so that every figure of the protocol is about the same voxels.
"""

import csv
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Sequence

import nibabel as nib
import numpy as np
import tqdm

from uad_jax.data import geometry, implant, implant_plan, manifest
from uad_jax.data.implant import Background, Generator

NAME = "ixi_implants_v1"
SEED = 1
SUBJECTS_CSV = pathlib.Path(__file__).parent / "splits" / f"{NAME}.csv"
ROWS_CSV = SUBJECTS_CSV.with_name(f"{NAME}_implants.csv")
DATA_KIND = "implant"  # of every volume, as sets of several kinds share no table
IXI_LICENCE = "IXI, CC BY-SA 3.0, brain-development.org"
MASK_LICENCES = {
    "ms": "lesion mask: MSLUB, CC BY, Lesjak et al. 2018",
    "stroke": "lesion mask: SOOP, BSD-2, OpenNeuro ds004889",
}
_T1_TOLERANCE = 0.5  # of the mean in the mask; other machines may round a voxel apart


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One volume of the protocol; all text, as in the csv.

    Attributes:
      subject: Unique name of the volume.
      patient: The healthy subject it lies on: the statistical unit.
      split: "train", "val" or "test".
      role: "healthy", "implant" or "sham".
      sham_of: The implant of a sham.
      kind: "ms", "stroke" or "".
      mask: Mask file, relative to the data.
      mask_patient: Whose lesion it is.
      generator: Value of `implant.Generator`.
      seed: Of the implant.
      ratio: T1 of the lesion over the tissue, mean over the mask; 1 for a sham.
      scan_sha256: First 16 hex digits, of the healthy scan's voxels.
      lesion_voxels: Voxels of the lesion on the subject's grid.
      lesion_ml: Their volume.
      lesion_t1: Mean of the finished scan in the mask.
      lesion_sha256: First 16 hex digits, of the lesion mask's voxels.
    """

    subject: str
    patient: str
    split: str
    role: str
    sham_of: str = ""
    kind: str = ""
    mask: str = ""
    mask_patient: str = ""
    generator: str = ""
    seed: str = ""
    ratio: str = ""
    scan_sha256: str = ""
    lesion_voxels: str = ""
    lesion_ml: str = ""
    lesion_t1: str = ""
    lesion_sha256: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Volume:
    """A finished volume, canonical.

    Attributes:
      image: T1, [X, Y, Z] int16.
      brain: [X, Y, Z] bool.
      lesion: [X, Y, Z] bool, None for a healthy one.
      affine: Voxel index to world RAS mm, [4, 4].
    """

    image: np.ndarray
    brain: np.ndarray
    lesion: np.ndarray | None
    affine: np.ndarray


def read_split() -> dict[str, str]:
    """The healthy subjects and their split."""
    with SUBJECTS_CSV.open(encoding="utf-8") as file:
        return {row["subject"]: row["split"] for row in csv.DictReader(file)}


def read_rows(path: pathlib.Path = ROWS_CSV) -> list[Row]:
    """Reads the rows of the protocol."""
    with path.open(encoding="utf-8", newline="") as file:
        return [Row(**row) for row in csv.DictReader(file)]


def write_rows(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Writes rows that `read_rows` reads back equal."""
    names = [field.name for field in dataclasses.fields(Row)]
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, names, lineterminator="\n")
        table.writeheader()
        table.writerows(dataclasses.asdict(row) for row in rows)


def plan_rows(data: pathlib.Path, split_of: dict[str, str], seed: int) -> list[Row]:
    """Chooses all volumes and makes each once, to write down what came out.

    Args:
      data: Folder of the data.
      split_of: Healthy subject -> split.
      seed: Of the whole plan.

    Returns:
      The untouched subjects, then the implants, each test implant before its sham.
    """
    rows = [
        Row(subject=name, patient=name, split=split, role="healthy")
        for name, split in sorted(split_of.items())
    ]
    masks = implant_plan.list_masks(data)
    for choice in implant_plan.plan(data, split_of, masks, seed):
        kind = implant_plan.KINDS[choice.mask.source]
        row = Row(
            subject=f"{choice.background}_{kind}{choice.number}",
            patient=choice.background,
            split=choice.split,
            role="implant",
            kind=kind,
            mask=choice.mask.file,
            mask_patient=choice.mask.patient,
            generator=choice.generator.value,
            seed=str(choice.seed),
            ratio=str(implant.draw_ratio(choice.generator, choice.seed)),
        )
        rows.append(row)
        if choice.split == "test":
            sham = dataclasses.replace(
                row,
                subject=f"{row.subject}_sham",
                role="sham",
                sham_of=row.subject,
                ratio=str(implant.SHAM_RATIO),
            )
            rows.append(sham)
    read = _reader(data)
    described = []
    for row in _progress(rows, "plan"):
        background = read(row.patient)
        volume = _make(data, row, background)
        described.append(dataclasses.replace(row, **_facts(volume, background)))
    return described


def make(data: pathlib.Path, row: Row, background: Background) -> Volume:
    """Makes one volume and holds it against its row.

    Args:
      data: Folder of the data.
      row: Of the protocol.
      background: The row's healthy scan.

    Raises:
      ValueError: What came out is not what the row says.
    """
    volume = _make(data, row, background)
    problems = [
        f"{name} is {found}, expected {getattr(row, name)}."
        for name, found in _facts(volume, background).items()
        if not _agrees(name, found, getattr(row, name))
    ]
    if problems:
        problems.append(
            f"The files in {data} are not those of {NAME}, or the code that makes it "
            "has changed. Figures on these volumes would not compare with others."
        )
    manifest.fail(row.subject, problems)
    return volume


def write_protocol(
    data: pathlib.Path,
    output: pathlib.Path,
    *,
    rows: Sequence[Row] | None = None,
    training: bool = False,
) -> pathlib.Path:
    """Writes scans, brain masks, lesion masks and a manifest for `run.py prepare`.

    Args:
      data: Folder of the data: `ixi_t1/` and `lesion_masks/`.
      output: Folder to write.
      rows: Of the protocol; None = the frozen ones.
      training: Whether the implants on training subjects are written, and nothing
        else; by default everything but them.

    Returns:
      Path of `manifest.csv`, which is written last.

    Raises:
      ValueError: Files are missing, or what came out is not what the rows say.
    """
    rows = read_rows() if rows is None else rows
    rows = [
        row
        for row in rows
        if (row.split == "train" and row.role != "healthy") == training
    ]
    manifest.fail(data, _missing(data, rows))
    output.mkdir(parents=True, exist_ok=True)
    read = _reader(data)
    subjects = []
    for row in _progress(sorted(rows, key=lambda row: row.patient), "implants"):
        volume = make(data, row, read(row.patient))
        subjects.append(_write(volume, row, output))
    path = output / "manifest.csv"
    manifest.write(path, sorted(subjects, key=lambda subject: subject.subject))
    return path


def _make(data: pathlib.Path, row: Row, background: Background) -> Volume:
    image, lesion = background.image, None
    if row.role != "healthy":
        placed = implant_plan.place(data, row.mask, background)
        lesion = placed.mask
        image = implant.implant(
            background,
            placed,
            Generator(row.generator),
            float(row.ratio),
            int(row.seed),
        )
    return Volume(
        image=image,
        brain=background.tissue > 0,
        lesion=lesion,
        affine=background.affine,
    )


def _facts(volume: Volume, background: Background) -> dict[str, str]:
    """What the csv says about a finished volume."""
    facts = {"scan_sha256": _sha256(background.image.astype("<i2"))}
    if volume.lesion is None:
        return facts
    voxels = int(volume.lesion.sum())
    ml = voxels * float(np.prod(geometry.spacing(volume.affine))) / 1000
    return facts | {
        "lesion_voxels": str(voxels),
        "lesion_ml": f"{ml:.3f}",
        "lesion_t1": f"{volume.image[volume.lesion].mean():.2f}",
        "lesion_sha256": _sha256(volume.lesion.astype(np.uint8)),
    }


def _agrees(name: str, found: str, expected: str) -> bool:
    if name == "lesion_t1" and expected:
        return abs(float(found) - float(expected)) <= _T1_TOLERANCE
    return found == expected


def _sha256(array: np.ndarray) -> str:
    shape = np.array(array.shape, "<i4").tobytes()
    return hashlib.sha256(shape + array.tobytes()).hexdigest()[:16]


def _reader(data: pathlib.Path) -> Callable[[str], Background]:
    """Reads backgrounds; the last one is remembered."""
    read = functools.partial(implant_plan.read_background, data)
    return functools.lru_cache(maxsize=1)(read)


def _missing(data: pathlib.Path, rows: Iterable[Row]) -> list[str]:
    needed = {data / row.mask for row in rows if row.mask}
    for row in rows:
        needed |= set(implant_plan.background_files(data, row.patient))
    absent = sorted(path for path in needed if not path.is_file())
    return [f"no file {path}" for path in absent]


def _write(volume: Volume, row: Row, output: pathlib.Path) -> manifest.SubjectFiles:
    """Writes the files of one volume and returns its manifest row."""
    image = output / f"{row.subject}_T1.nii.gz"
    brain = output / f"{row.patient}_brain.nii.gz"
    _save(image, volume.image, volume.affine)
    _save(brain, volume.brain.astype(np.uint8), volume.affine)
    lesion = None
    if volume.lesion is not None:
        lesion = output / f"{row.subject}_lesion.nii.gz"
        _save(lesion, volume.lesion.astype(np.uint8), volume.affine)
    extra = {"data": DATA_KIND, "kind": row.kind, "sham_of": row.sham_of}
    for name in ("mask_patient", "generator", "ratio", "lesion_ml"):
        extra[name] = getattr(row, name)
    licences = [IXI_LICENCE, MASK_LICENCES.get(row.kind, "")]
    return manifest.SubjectFiles(
        subject=row.subject,
        patient=row.patient,
        images={"t1": image},
        brain_mask=brain,
        lesion_mask=lesion,
        label={"implant": "abnormal"}.get(row.role, row.role),
        split=row.split,
        licence="; ".join(filter(None, licences)),
        extra=extra,
    )


def _save(path: pathlib.Path, data: np.ndarray, affine: np.ndarray) -> None:
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, code="mni")
    image.set_qform(affine, code="mni")
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def _progress(rows: Sequence[Row], name: str) -> tqdm.tqdm:
    return tqdm.tqdm(rows, desc=name, unit="volume", disable=None)
