"""Writes the manifests of the real results: implants, and the two real lesions.

    python benchmarks/ixi_implants.py --data=DATA --output=DIR

DATA holds `ixi_t1/`, `lesion_masks/{mslub,soop}/`, and, for the real lesions,
`mslub/atlas_1mm/` and `tcga_lgg/atlas_1mm/` (docs/implants.md). Into DIR come

    implants/manifest.csv       scans and masks of the protocol ixi_implants_v1
    mslub_patient26/manifest.csv, tcga_fg_6692/manifest.csv
                                name files that stay where they are

and, with --with_training_implants, train_implants/manifest.csv. `--plan=CSV` chooses
the implants anew and writes what `uad_jax/data/splits/ixi_implants_v1_implants.csv`
was made with; nothing else is written then.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from absl import app, flags

from uad_jax.data import implant_protocol, manifest

_DATA = flags.DEFINE_string("data", None, "Folder of the data.", required=True)
_OUTPUT = flags.DEFINE_string("output", "", "Folder to write.")
_TRAINING = flags.DEFINE_bool(
    "with_training_implants", False, "Also write implants on training subjects."
)
_PLAN = flags.DEFINE_string("plan", "", "Choose anew and write this csv, no volumes.")


def real_lesions(data: pathlib.Path) -> dict[str, manifest.SubjectFiles]:
    """The subjects with lesions of their own, by the name of their folder."""
    mslub = data / "mslub" / "atlas_1mm"
    tcga = data / "tcga_lgg" / "atlas_1mm"
    return {
        "mslub_patient26": manifest.SubjectFiles(
            subject="MSLUB-patient26",
            patient="MSLUB-patient26",
            images={
                name.lower(): mslub / f"patient26_{name}_1mm.nii.gz"
                for name in ("T1", "T2", "FLAIR")
            },
            lesion_mask=mslub / "patient26_mask_1mm.nii.gz",
            label="abnormal",
            split="test",
            licence="MSLUB, CC BY, Lesjak et al. 2018",
            extra={"data": "real lesion", "kind": "ms"},
        ),
        "tcga_fg_6692": manifest.SubjectFiles(
            subject="TCGA-FG-6692",
            patient="TCGA-FG-6692",
            images={
                name: tcga / f"TCGA-FG-6692_{file}_1mm.nii.gz"
                for name, file in (("t1", "t1"), ("t2", "t2"), ("flair", "fla"))
            },
            lesion_mask=tcga / "TCGA-FG-6692_mask_auto_1mm.nii.gz",
            label="abnormal",
            split="test",
            licence="TCIA TCGA-LGG, CC BY 3.0 as quoted: check there and cite its DOI",
            extra={"data": "real lesion, automatic truth", "kind": "tumour"},
        ),
    }


def main(argv: list[str]) -> None:
    """Writes what the flags ask for."""
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are read, found {argv[1:]}.")
    data = pathlib.Path(_DATA.value).resolve()
    if _PLAN.value:
        rows = implant_protocol.plan_rows(
            data, implant_protocol.read_split(), implant_protocol.SEED
        )
        implant_protocol.write_rows(pathlib.Path(_PLAN.value), rows)
        return
    if not _OUTPUT.value:
        raise app.UsageError("--output is needed: the folder to write.")
    output = pathlib.Path(_OUTPUT.value)
    written = [implant_protocol.write_protocol(data, output / "implants")]
    if _TRAINING.value:
        folder = output / "train_implants"
        written.append(implant_protocol.write_protocol(data, folder, training=True))
    for name, subject in real_lesions(data).items():
        absent = manifest.missing_files([subject])
        if absent:
            print(f"{name} is left out: {'; '.join(absent)}")
            continue
        path = output / name / "manifest.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        manifest.write(path, [subject])
        written.append(path)
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    app.run(main)
