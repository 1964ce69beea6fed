"""The public data sets: one row each, in the layout their split lists were made for.

The rows follow the layout in which the authors of the diffusion papers publish their
preprocessed data: `Train/ixi/{t1,t2,mask}`, `Test/<set>/{t1,t2,mask,seg}` and
`splits/*.csv`, with or without a folder `Data` around it. The lists come with the data;
they are not part of this package.

Source: github.com/FinnBehrendt/patched-Diffusion-Models-UAD, README and Data/splits.
"""

import csv
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from absl import logging

from uad_jax.data import manifest, splits
from uad_jax.data.manifest import SubjectFiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One data set.

    Attributes:
      title: Name for people.
      homepage: Where the data come from.
      licence: Licence or terms as far as known.
      lists: Split -> CSV name; `{fold}` in it stands for 0, 1, 2, ...
      modalities: Modalities that exist, the one that the lists name first.
      partial: Modality that some subjects lack -> CSV that names those with it.
        Without that CSV the files on disk decide.
      patient: Pattern whose match in the subject's name is the patient; "" = all of it.
      read: Turns (this row, root, modalities or (), reference) into subjects.
    """

    title: str
    homepage: str
    licence: str
    lists: Mapping[str, str] = dataclasses.field(default_factory=dict)
    modalities: tuple[str, ...] = ("t1", "t2")
    partial: Mapping[str, str] = dataclasses.field(default_factory=dict)
    patient: str = ""
    read: Callable[["DatasetSpec", Path, tuple[str, ...], bool], list[SubjectFiles]]


def load(
    source: str, *, modality: str = "", reference: bool = False
) -> list[SubjectFiles]:
    """Reads a data set of any kind.

    Args:
      source: A folder, a manifest.csv, or `<row of DATASETS>:<root>`.
      modality: Modalities to read, comma-separated; "" = all that are there. For a
        folder whose files do not say: what they are.
      reference: Keeps the repeated rows and the leaks between training, validation
        and test of the published lists.

    Returns:
      The subjects.

    Raises:
      ValueError: Lists every problem found.
    """
    name, colon, root = str(source).partition(":")
    if not colon or Path(source).exists():
        name, root = "folder", str(source)
    if name not in DATASETS:
        raise ValueError(
            f"{source}: there is no data set {name!r}."
            f"{manifest.nearest(name, DATASETS)} Known: {', '.join(DATASETS)}."
        )
    spec = DATASETS[name]
    wanted = tuple(word for word in modality.lower().split(",") if word)
    return spec.read(spec, Path(root), wanted, reference)


def _read_folder(
    spec: DatasetSpec, root: Path, wanted: tuple[str, ...], reference: bool
) -> list[SubjectFiles]:
    del spec, reference  # nothing is published for anybody's own data
    return manifest.read(root, ",".join(wanted))


def _read_published(
    spec: DatasetSpec, root: Path, wanted: tuple[str, ...], reference: bool
) -> list[SubjectFiles]:
    """Reads the published lists and finds their files."""
    folder = _list_folder(spec, root)
    rows: dict[str, dict[str, str]] = {}
    folds = []
    for fold in _folds(spec, folder):
        roles = []
        for split, pattern in spec.lists.items():
            for row in _read_list(folder / pattern.format(fold=fold)):
                rows.setdefault(_subject(row), row)
                roles.append((_subject(row), split))
        folds.append(roles if reference else _clean(spec, fold, roles))
    first = next(iter(rows.values()))
    base = _image_folder(spec, root, first)
    modalities = _modalities(spec, base, first, wanted)
    present = _present(spec, folder)
    subjects = []
    for name, subject, columns in _copies(folds):
        images = {}
        for modality in modalities:
            path = _image(base, rows[subject], spec.modalities[0], modality)
            partial = modality in spec.partial
            if modality in present and subject not in present[modality]:
                continue
            if partial and modality not in present and not path.is_file():
                continue
            images[modality] = path
        if images:
            if reference:
                columns[splits.LEAK_COLUMN] = "kept"
            subjects.append(_entry(spec, base, rows[subject], name, images, columns))
    manifest.fail(root, manifest.missing_files(subjects))
    return sorted(subjects, key=lambda subject: subject.subject)


def _list_folder(spec: DatasetSpec, root: Path) -> Path:
    names = [pattern.format(fold=0) for pattern in spec.lists.values()]
    folders = (root / "splits", root / "Data" / "splits")
    for folder in folders:
        if all((folder / name).is_file() for name in names):
            return folder
    raise ValueError(
        f"{root}: expected the split lists {', '.join(names)} in {folders[0]} or "
        f"{folders[1]}. They come with the preprocessed data of {spec.title}; for your "
        "own layout, write a manifest (docs/data.md)."
    )


def _folds(spec: DatasetSpec, folder: Path) -> range:
    """Numbers of the published folds; one if the lists have none."""
    patterns = [p for p in spec.lists.values() if "{fold}" in p]
    count = 1
    while patterns and all((folder / p.format(fold=count)).is_file() for p in patterns):
        count += 1
    return range(count)


def _read_list(path: Path) -> list[dict[str, str]]:
    needed = {"img_name", "img_path", "label"}
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = needed - set(reader.fieldnames or [])
        if missing:
            raise ValueError(
                f"{path}: no column {', '.join(sorted(missing))}; found "
                f"{', '.join(reader.fieldnames or [])}."
            )
        return [{key: value or "" for key, value in row.items()} for row in reader]


def _subject(row: Mapping[str, str]) -> str:
    return manifest.split_modality(manifest.stem(Path(row["img_name"])))[0]


def _patient(spec: DatasetSpec, subject: str) -> str:
    match = re.match(spec.patient, subject) if spec.patient else None
    return match.group(0) if match else subject


def _clean(
    spec: DatasetSpec, fold: int, roles: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Keeps each subject once and each patient in one split: test, val, train."""
    owner: dict[str, str] = {}
    for split in reversed(manifest.SPLITS):
        for subject, role in roles:
            if role == split:
                owner.setdefault(_patient(spec, subject), split)
    kept = [
        (subject, role)
        for subject, role in dict.fromkeys(roles)
        if owner[_patient(spec, subject)] == role
    ]
    repeated = len(roles) - len(set(roles))
    leaking = len(set(roles)) - len(kept)
    if repeated or leaking:
        logging.info(
            "%s, fold %d: %d of %d rows removed: %d repeated, %d also in val or test. "
            "--reference keeps them.",
            spec.title,
            fold,
            repeated + leaking,
            len(roles),
            repeated,
            leaking,
        )
    return kept


def _copies(
    folds: Sequence[Sequence[tuple[str, str]]],
) -> list[tuple[str, str, dict[str, str]]]:
    """Turns the folds' rows into subjects with split columns.

    A subject that occurs n times in some fold becomes n subjects on the same files.

    Returns:
      (name, subject of the row, split columns), in the order of first occurrence.
    """
    roles: dict[str, list[list[str]]] = {}
    for number, fold in enumerate(folds):
        for subject, split in fold:
            roles.setdefault(subject, [[] for _ in folds])[number].append(split)
    result = []
    for subject, per_fold in roles.items():
        for found in per_fold:
            found.sort(key=manifest.SPLITS.index, reverse=True)
        for copy in range(max(map(len, per_fold))):
            taken = [found[copy] if copy < len(found) else "" for found in per_fold]
            columns = {"split": taken[0]}
            if len(folds) > 1:
                columns = {f"{splits.FOLD_COLUMN}{k}": s for k, s in enumerate(taken)}
            name = f"{subject}_copy{copy + 1}" if copy else subject
            result.append((name, subject, columns))
    return result


def _image_folder(spec: DatasetSpec, root: Path, row: Mapping[str, str]) -> Path:
    top = Path(row["img_path"].lstrip("/")).parent.parent  # Train/ixi
    for base in (root, root / "Data"):
        if (base / top).is_dir():
            return base
    raise ValueError(
        f"{root}: expected the images of {spec.title} in {root / top} or "
        f"{root / 'Data' / top}; neither is a folder."
    )


def _modalities(
    spec: DatasetSpec, base: Path, row: Mapping[str, str], wanted: tuple[str, ...]
) -> tuple[str, ...]:
    listed = spec.modalities[0]
    there = tuple(
        modality
        for modality in spec.modalities
        if _image(base, row, listed, modality).parent.is_dir()
    )
    lost = [modality for modality in wanted if modality not in there]
    if lost or not there:
        folder = _image(base, row, listed, listed).parent.parent
        raise ValueError(
            f"{folder}: no folder for modality {', '.join(lost) or listed}. "
            f"Found: {', '.join(there) or 'none'}."
        )
    return wanted or there


def _image(base: Path, row: Mapping[str, str], listed: str, modality: str) -> Path:
    """Path of one modality: the lists name `listed`, and folder and suffix follow."""
    path = base / row["img_path"].lstrip("/")
    if modality == listed:
        return path
    name = path.name.replace(f"_{listed}.nii", f"_{modality}.nii")
    upper = path.parent.parent / modality.upper()
    folder = upper if upper.is_dir() else path.parent.parent / modality
    return folder / name


def _present(spec: DatasetSpec, folder: Path) -> dict[str, set[str]]:
    """Modality -> the subjects that have it, where a list says so."""
    present = {}
    for modality, name in spec.partial.items():
        if (folder / name).is_file():
            with open(folder / name, newline="", encoding="utf-8-sig") as file:
                cells = [cell for cells in csv.reader(file) for cell in cells]
            present[modality] = {
                manifest.split_modality(manifest.stem(Path(cell)))[0]
                for cell in cells
                if cell.endswith((".nii", ".nii.gz"))
            }
    return present


def _entry(
    spec: DatasetSpec,
    base: Path,
    row: Mapping[str, str],
    name: str,
    images: dict[str, Path],
    columns: dict[str, str],
) -> SubjectFiles:
    brain, lesion = (
        base / row[column].lstrip("/") if row.get(column) else None
        for column in ("mask_path", "seg_path")
    )
    used = {"", "img_name", "label", "img_path", "mask_path", "seg_path"}
    carried = {key.strip(): row[key] for key in row if key and key not in used}
    return SubjectFiles(
        subject=name,
        patient=_patient(spec, _subject(row)),
        images=images,
        brain_mask=brain,
        lesion_mask=lesion,
        label="abnormal" if float(row["label"] or 0) > 0 else "healthy",
        split=columns.pop("split", None),
        licence=spec.licence,
        extra=carried | columns,
    )


DATASETS: dict[str, DatasetSpec] = {
    "ixi": DatasetSpec(
        title="IXI",
        homepage="https://brain-development.org/ixi-dataset/",
        licence="CC BY-SA 3.0",
        lists={
            "train": "IXI_train_fold{fold}.csv",
            "val": "IXI_val_fold{fold}.csv",
            "test": "IXI_test.csv",
        },
        partial={"t2": "avail_t2.csv"},
        patient=r"IXI\d+",
        read=_read_published,
    ),
    "brats21": DatasetSpec(
        title="BraTS 2021",
        homepage="http://braintumorsegmentation.org/",
        licence="see the terms of the challenge",
        lists={"val": "Brats21_val.csv", "test": "Brats21_test.csv"},
        modalities=("t1", "t2", "flair"),
        read=_read_published,
    ),
    "mslub": DatasetSpec(
        title="MSLUB",
        homepage="https://lit.fe.uni-lj.si/en/research/resources/3D-MR-MS/",
        licence="CC BY",
        lists={"val": "MSLUB_val.csv", "test": "MSLUB_test.csv"},
        modalities=("t1", "t2", "flair"),
        read=_read_published,
    ),
    "atlas_v2": DatasetSpec(
        title="ATLAS v2.0",
        homepage="https://doi.org/10.1038/s41597-022-01401-7",
        licence="see the data use agreement of ATLAS",
        lists={"val": "ATLAS_v2_val.csv", "test": "ATLAS_v2_test.csv"},
        modalities=("t1",),
        read=_read_published,
    ),
    "wmh": DatasetSpec(
        title="WMH challenge",
        homepage="https://doi.org/10.34894/AECRSD",
        licence="see the terms of the challenge",
        lists={"val": "WMH_val.csv", "test": "WMH_test.csv"},
        modalities=("t1", "flair"),
        read=_read_published,
    ),
    "folder": DatasetSpec(
        title="folder or manifest",
        homepage="",
        licence="",
        modalities=(),
        read=_read_folder,
    ),
}
