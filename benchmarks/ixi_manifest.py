"""Writes the manifest of the IXI T1 subjects that the real results use.

    python benchmarks/ixi_manifest.py FOLDER_OF_IXI_T1 manifest.csv

FOLDER holds `<id>_T1.nii.gz` and `<id>_tissue.nii.gz` (brain = tissue > 0). The
split is `uad_jax/data/splits/ixi_implants_v1.csv`.
"""

import csv
import pathlib
import sys

from uad_jax.data import manifest

SPLIT = pathlib.Path(manifest.__file__).parent / "splits" / "ixi_implants_v1.csv"


def main(folder: pathlib.Path, target: pathlib.Path) -> None:
    """Writes the manifest."""
    with SPLIT.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    subjects = [
        manifest.SubjectFiles(
            subject=row["subject"],
            patient=row["subject"],
            images={"t1": folder / f"{row['subject']}_T1.nii.gz"},
            brain_mask=folder / f"{row['subject']}_tissue.nii.gz",
            lesion_mask=None,
            label="healthy",
            split=row["split"],
            fold=None,
            licence="IXI, CC BY-SA 3.0, brain-development.org",
            extra={"data": "real, healthy"},
        )
        for row in rows
    ]
    manifest.write(target, subjects)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]))
