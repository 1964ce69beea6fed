"""Lists of subjects: a CSV with one row per subject, or a plain folder of NIfTI files.

Reading opens no image: it checks names, labels and that the files exist, and reports
every problem of the list at once. What is inside the files is `data/check.py`'s.
"""

import csv
import dataclasses
import difflib
import io
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

SPLITS = ("train", "val", "test")
LABELS = ("healthy", "abnormal", "sham")
SHAM_COLUMN = "sham_of"  # the subject whose implant a sham copies
COLUMNS = (
    "subject",
    "patient",
    "image",
    "modality",
    "brain_mask",
    "lesion_mask",
    "label",
    "split",
    "fold",
    "licence",
)
IMAGE_PREFIX = "image_"  # image_t1, image_flair, ...
DEFAULT_MODALITY = "image"

# Names that other tools use. Carried through as plain text they would leave the user
# believing that the masks were read.
_FOREIGN_COLUMNS = {
    "id": "subject",
    "name": "subject",
    "img_name": "subject",
    "path": "image",
    "img_path": "image",
    "mask": "brain_mask or lesion_mask",
    "mask_path": "brain_mask",
    "seg": "lesion_mask",
    "seg_path": "lesion_mask",
    "segmentation": "lesion_mask",
    "license": "licence",
}
_NIFTI = (".nii", ".nii.gz")
_BRAIN_SUFFIXES = ("_mask",)
_LESION_SUFFIXES = ("_seg", "_lesion")
_MODALITY_OF_SUFFIX = {
    "t1": "t1",
    "t1w": "t1",
    "t1ce": "t1ce",
    "t1c": "t1ce",
    "t2": "t2",
    "t2w": "t2",
    "flair": "flair",
    "pd": "pd",
    "pdw": "pd",
}
_MASK_WORDS = ("mask", "seg", "lesion", "label", "labels", "tissue")
_BIDS_PATIENT = re.compile(r"(sub-[A-Za-z0-9]+)(_|$)")


@dataclasses.dataclass(frozen=True)
class SubjectFiles:
    """The files and labels of one subject (one scanning session).

    Attributes:
      subject: Unique name.
      patient: The person; several subjects may be scans of one patient. Folds and leak
        checks go by it.
      images: Modality -> file, at least one.
      brain_mask: Brain mask; None = every voxel of the image that is not 0.
      lesion_mask: Annotation, or None.
      label: "healthy", "abnormal", or "sham": an implant that changes nothing.
      split: "train", "val", "test" or None.
      fold: Validation fold of the subject, or None.
      licence: Licence of the data, "" = not stated.
      extra: Every other column, as text.
    """

    subject: str
    patient: str
    images: dict[str, Path]
    brain_mask: Path | None = None
    lesion_mask: Path | None = None
    label: str = "healthy"
    split: str | None = None
    fold: int | None = None
    licence: str = ""
    extra: dict[str, str] = dataclasses.field(default_factory=dict)

    def files(self) -> list[Path]:
        """Lists the subject's files, images first."""
        masks = [path for path in (self.brain_mask, self.lesion_mask) if path]
        return [*self.images.values(), *masks]


def read(source: Path, modality: str = "") -> list[SubjectFiles]:
    """Reads a manifest, or lists a folder of skull-stripped NIfTI files.

    Args:
      source: A .csv file (columns in docs/data.md) or a folder.
      modality: Name of images that do not say theirs; of a folder whose file names
        do (`_T1`, `_flair`), only this one (comma-separated: these) is read.

    Returns:
      The subjects, in the order of the rows or of the sorted names.

    Raises:
      ValueError: Lists every problem found.
    """
    source = Path(source)
    if source.is_dir():
        subjects, problems = _read_folder(source, modality)
    elif source.is_file():
        subjects, problems = _read_csv(source, modality)
    else:
        raise ValueError(
            f"{source}: there is neither a manifest nor a folder of that name."
        )
    problems += missing_files(subjects) + _sham_problems(subjects)
    if not subjects and not problems:
        problems.append(
            "no subjects. Expected rows under the heading, or *.nii.gz files."
        )
    fail(source, problems)
    return subjects


def write(path: Path, subjects: Sequence[SubjectFiles]) -> None:
    """Writes a manifest that `read` reads back equal.

    Args:
      path: The .csv to write; files under its folder are named relative to it.
      subjects: The subjects.
    """
    modalities = sorted({name for subject in subjects for name in subject.images})
    extras = sorted({name for subject in subjects for name in subject.extra})
    fixed = [name for name in COLUMNS if name not in ("image", "modality")]
    columns = fixed + [IMAGE_PREFIX + name for name in modalities] + extras
    root = Path(path).resolve().parent
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for subject in subjects:
            row = dict.fromkeys(columns, "")
            for name in ("subject", "patient", "label", "licence"):
                row[name] = getattr(subject, name)
            row["split"] = subject.split or ""
            row["fold"] = "" if subject.fold is None else str(subject.fold)
            row["brain_mask"] = _relative(subject.brain_mask, root)
            row["lesion_mask"] = _relative(subject.lesion_mask, root)
            for name, image in subject.images.items():
                row[IMAGE_PREFIX + name] = _relative(image, root)
            writer.writerow(row | subject.extra)


def missing_files(subjects: Iterable[SubjectFiles]) -> list[str]:
    """Names every file of the subjects that does not exist."""
    return [
        f"{subject.subject}: no file {path}"
        for subject in subjects
        for path in subject.files()
        if not path.is_file()
    ]


def _sham_problems(subjects: Sequence[SubjectFiles]) -> list[str]:
    """Shams without their implant on the same patient; they could not be compared."""
    implants = {s.subject: s.patient for s in subjects if s.label == "abnormal"}
    return [
        f"sham {sham.subject!r}: {SHAM_COLUMN} is {sham.extra.get(SHAM_COLUMN, '')!r}; "
        "expected an abnormal subject of the same patient."
        for sham in subjects
        if sham.label == "sham"
        and implants.get(sham.extra.get(SHAM_COLUMN, "")) != sham.patient
    ]


def fail(source: object, problems: Sequence[str]) -> None:
    """Raises one ValueError that lists all problems; does nothing without any."""
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(f"{source}: {len(problems)} problem(s):{lines}")


def nearest(word: str, words: Iterable[str]) -> str:
    """Returns ' Did you mean ...?' for the nearest of the words, or ''."""
    close = difflib.get_close_matches(word.lower(), list(words), 1, 0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def stem(path: Path) -> str:
    """Returns a file's name without .nii or .nii.gz."""
    return path.name.removesuffix(".gz").removesuffix(".nii")


def split_modality(name: str) -> tuple[str, str]:
    """Splits 'sub-01_T1w' into ('sub-01', 't1'); the second is '' if not named."""
    head, _, tail = name.rpartition("_")
    modality = _MODALITY_OF_SUFFIX.get(tail.lower(), "")
    return (head, modality) if head and modality else (name, "")


def _relative(path: Path | None, root: Path) -> str:
    if path is None:
        return ""
    full = Path(os.path.abspath(path))
    return str(full.relative_to(root)) if full.is_relative_to(root) else str(full)


def _read_csv(source: Path, modality: str) -> tuple[list[SubjectFiles], list[str]]:
    """Returns the subjects of the good rows and the problems of all the others."""
    try:
        text = source.read_text(encoding="utf-8-sig")  # spreadsheets write a mark
    except UnicodeDecodeError:
        return [], ["not UTF-8 text. Save it as 'CSV UTF-8'."]
    heading = text.partition("\n")[0]
    delimiter = max(",;\t", key=heading.count)  # spreadsheets of some countries use ;
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    columns = [name.strip() for name in next(reader, [])]
    problems = _heading_problems(columns)
    if problems:
        return [], problems
    subjects: list[SubjectFiles] = []
    lines: dict[str, int] = {}
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        where = f"line {reader.line_num}"
        if len(cells) != len(columns):
            problems.append(
                f"{where}: {len(cells)} cells, but the heading has {len(columns)} "
                "columns. Quote cells that hold commas."
            )
            continue
        row = {
            name: cell.strip()
            for name, cell in zip(columns, cells, strict=True)
            if name
        }
        found = _row_problems(row)
        first = lines.setdefault(row["subject"], reader.line_num)
        if row["subject"] and first != reader.line_num:
            found.append(
                f"subject {row['subject']!r} is already on line {first}. Put its "
                "modalities in image_<modality> columns of one row, or name scans of "
                "one person apart and give them the same `patient`."
            )
        problems += [f"{where}: {problem}" for problem in found]
        if not found:
            subjects.append(_subject(row, source.parent, modality))
    return subjects, problems


def _heading_problems(columns: Sequence[str]) -> list[str]:
    problems = []
    named = [name for name in columns if name]
    for name in sorted({name for name in named if named.count(name) > 1}):
        problems.append(f"column {name!r} occurs twice.")
    for name in named:
        if name in COLUMNS or name.startswith(IMAGE_PREFIX):
            continue
        absent = [column for column in COLUMNS if column not in named]
        close = difflib.get_close_matches(name.lower(), absent, 1, 0.8)
        meant = close[0] if close else _FOREIGN_COLUMNS.get(name.lower())
        if meant and not all(word in named for word in meant.split(" or ")):
            problems.append(
                f"column {name!r} is not read. Did you mean {meant!r}? If it is only "
                "to be carried through, give it another name."
            )
    if "subject" not in named:
        problems.append(f"no column 'subject'. Columns found: {', '.join(named)}.")
    if not any(name == "image" or name.startswith(IMAGE_PREFIX) for name in named):
        problems.append(
            "no image column. Expected 'image' or 'image_<modality>', e.g. image_t1."
        )
    return problems


def _row_problems(row: dict[str, str]) -> list[str]:
    problems = []
    if not row["subject"]:
        problems.append("the subject is empty.")
    if "/" in row["subject"] or "\\" in row["subject"]:
        problems.append(
            f"subject {row['subject']!r} holds a slash, but names files of results. "
            "Write a dash in its place."
        )
    if not any(row[name] for name in row if _is_image(name)):
        problems.append(f"subject {row['subject']!r} has no image.")
    for name, allowed in (("label", LABELS), ("split", SPLITS)):
        value = row.get(name, "")
        if value and value not in allowed:
            problems.append(
                f"{name} is {value!r}; expected one of {', '.join(allowed)}."
                + nearest(value, allowed)
            )
    if row.get("label") == "sham" and not row.get("lesion_mask"):
        problems.append(f"sham {row['subject']!r} has no lesion_mask: where is it?")
    fold = row.get("fold", "")
    if fold and not fold.isdecimal():
        problems.append(f"fold is {fold!r}; expected 0, 1, 2, ...")
    if row.get("image") and row.get(IMAGE_PREFIX + row.get("modality", "").lower()):
        problems.append(
            f"modality {row['modality']!r} is given by 'image' and by "
            f"'{IMAGE_PREFIX}{row['modality']}'."
        )
    return problems


def _is_image(column: str) -> bool:
    return column == "image" or column.startswith(IMAGE_PREFIX)


def _subject(row: dict[str, str], root: Path, modality: str) -> SubjectFiles:
    images = {
        name.removeprefix(IMAGE_PREFIX).lower(): root / value
        for name, value in row.items()
        if name.startswith(IMAGE_PREFIX) and value
    }
    if row.get("image"):
        name = (row.get("modality") or modality or DEFAULT_MODALITY).lower()
        images[name] = root / row["image"]
    lesion = row.get("lesion_mask")
    known = set(COLUMNS)
    return SubjectFiles(
        subject=row["subject"],
        patient=row.get("patient") or row["subject"],
        images=dict(sorted(images.items())),
        brain_mask=root / row["brain_mask"] if row.get("brain_mask") else None,
        lesion_mask=root / lesion if lesion else None,
        label=row.get("label") or ("abnormal" if lesion else "healthy"),
        split=row.get("split") or None,
        fold=int(row["fold"]) if row.get("fold") else None,
        licence=row.get("licence", ""),
        extra={
            name: value
            for name, value in row.items()
            if name not in known and not name.startswith(IMAGE_PREFIX)
        },
    )


def _read_folder(source: Path, modality: str) -> tuple[list[SubjectFiles], list[str]]:
    """Lists a folder: images by (subject, modality), then the masks beside them."""
    wanted = [name for name in modality.lower().split(",") if name]
    images: dict[str, dict[str, Path]] = {}
    brains: dict[str, Path] = {}
    lesions: dict[str, Path] = {}
    plain: list[str] = []
    problems: list[str] = []
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        if not path.name.endswith(_NIFTI) or path.name.startswith("."):
            continue
        name = stem(path)
        kind = next(
            (
                (table, name.removesuffix(suffix))
                for table, suffixes in (
                    (brains, _BRAIN_SUFFIXES),
                    (lesions, _LESION_SUFFIXES),
                )
                for suffix in suffixes
                if name.endswith(suffix)
            ),
            None,
        )
        if kind:
            table, owner = kind[0], split_modality(kind[1])[0]
            if owner in table:
                problems.append(f"{path} and {table[owner]}: two masks of one kind.")
            table[owner] = path
            continue
        subject, found = split_modality(name)
        if not found:
            plain.append(path.name)
        scans = images.setdefault(subject, {})
        found = found or (wanted[0] if wanted else DEFAULT_MODALITY)
        if found in scans:
            problems.append(f"{path} and {scans[found]}: two images of one name.")
        scans[found] = path
    if plain and len(plain) < sum(map(len, images.values())):
        problems.append(
            f"some files name their modality (..._T1) and others do not ({plain[0]}"
            f"{', ...' if len(plain) > 1 else ''}). Are those images? Move them away, "
            "or write a manifest."
        )
    problems += _mixed(plain)
    for kind_name, table in (("brain", brains), ("lesion", lesions)):
        problems += [
            f"{path}: a {kind_name} mask without an image {name}.nii.gz."
            for name, path in table.items()
            if name not in images
        ]
    subjects = _folder_subjects(images, brains, lesions, wanted)
    if images and not subjects:
        there = sorted({name for scans in images.values() for name in scans})
        problems.append(
            f"no image of modality {modality!r}. Found: {', '.join(there)}."
        )
    return subjects, problems


def _mixed(names: Sequence[str]) -> list[str]:
    """A problem if names without a modality at their end hold different ones inside."""
    found: dict[str, str] = {}
    for name in names:
        for word in re.split(r"[-_.]", name.lower()):
            kind = "mask" if word in _MASK_WORDS else _MODALITY_OF_SUFFIX.get(word)
            if kind:
                found.setdefault(kind, name)
    if len(found) < 2:
        return []
    return [
        f"images of several kinds ({', '.join(found.values())}), which their names do "
        "not say at the end (_T1.nii.gz, _mask.nii.gz). Rename them, or write a "
        "manifest."
    ]


def _folder_subjects(
    images: dict[str, dict[str, Path]],
    brains: dict[str, Path],
    lesions: dict[str, Path],
    wanted: Sequence[str],
) -> list[SubjectFiles]:
    subjects = []
    for name, scans in images.items():
        kept = {key: scans[key] for key in scans if not wanted or key in wanted}
        if not kept:
            continue
        person = _BIDS_PATIENT.match(name)
        subjects.append(
            SubjectFiles(
                subject=name,
                patient=person.group(1) if person else name,
                images=dict(sorted(kept.items())),
                brain_mask=brains.get(name),
                lesion_mask=lesions.get(name),
                label="abnormal" if name in lesions else "healthy",
            )
        )
    return subjects
