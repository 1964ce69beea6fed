"""Clinical FLAIR scans with a blob, and a run trained on them, for tests of predict."""

import dataclasses
import pathlib

import jax
import nibabel as nib
import numpy as np
import pytest

from configs import smoke
from tests import runs
from uad_jax import evaluate, predict, prepare, train
from uad_jax.config import ExperimentConfig
from uad_jax.data import manifest, preprocess
from uad_jax.prediction import Prediction

# A FLAIR as it comes from the clinic: 0.9 x 0.9 x 3 mm, stored L, P, S.
SHAPE = (112, 116, 34)
AFFINE = np.array(
    [[-0.9, 0, 0, 61.0], [0, -0.9, 0, 40.0], [0, 0, 3.0, -55.0], [0, 0, 0, 1.0]]
)
BLOB = np.array([22.0, -30.0, 10.0])  # mm: right, posterior
LICENCE = "CC BY 4.0, somewhere"


def world(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    index = np.indices(shape).reshape(3, -1)
    return (affine[:3, :3] @ index + affine[:3, 3:]).reshape(3, *shape)


def head(
    seed: int,
    *,
    blob: bool = False,
    shape: tuple[int, ...] = SHAPE,
    affine: np.ndarray = AFFINE,
) -> np.ndarray:
    """An ellipsoid brain with texture, and a bright ball at BLOB if asked, float32."""
    rng = np.random.default_rng(seed)
    x, y, z = world(shape, affine)
    inside = ((x - 11) / 44) ** 2 + ((y + 12) / 46) ** 2 + ((z + 5) / 42) ** 2 < 1
    image = 600 + 40 * np.sin(x / 9 + seed) + 40 * np.cos(y / 7) + 30 * np.sin(z / 11)
    image += rng.normal(0, 10, shape)
    if blob:
        near = sum((a - b) ** 2 for a, b in zip((x, y, z), BLOB, strict=True)) < 13**2
        image += 400 * near
    return np.where(inside, image, 0).astype(np.float32)


def save(
    path: pathlib.Path, data: np.ndarray, affine: np.ndarray = AFFINE
) -> pathlib.Path:
    """Writes a scan whose sform and qform differ a little, with codes 1 and 2."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(data, None)
    image.set_qform(affine + 1e-4 * np.eye(4, k=3), code=2)
    image.set_sform(affine, code=1)
    nib.save(image, path)
    return path


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained, evaluated run and the scans that it was evaluated on."""

    config: ExperimentConfig
    workdir: pathlib.Path
    scans: pathlib.Path
    store: pathlib.Path

    def predict(
        self, source: pathlib.Path, output: pathlib.Path, **options: object
    ) -> list[Prediction]:
        """Predicts without bars."""
        return predict.predict(
            self.config, self.workdir, str(source), output, progress=False, **options
        )


def trained_run(folder: pathlib.Path, mesh: jax.sharding.Mesh) -> Run:
    """Prepares the scans of a manifest, trains on them and evaluates."""
    splits = ["train"] * 3 + ["val"] * 2 + ["test"] * 2
    subjects = [
        manifest.SubjectFiles(
            subject=f"{split}-{number}",
            patient=f"{split}-{number}",
            images={
                "flair": save(
                    folder / "scans" / f"{split}-{number}_FLAIR.nii.gz",
                    head(number, blob=number == 6),
                )
            },
            label="abnormal" if number == 6 else "healthy",
            split=split,
            licence=LICENCE,
        )
        for number, split in enumerate(splits)
    ]
    manifest.write(folder / "manifest.csv", subjects)
    recipe = dataclasses.replace(
        preprocess.RECIPES["grid2mm"], name="tiny", grid=(32, 32, 24), spacing=(4,) * 3
    )
    store = folder / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(preprocess.RECIPES, "tiny", recipe)
        prepare.prepare(str(folder / "manifest.csv"), store, "tiny", workers=0)
    config = smoke.get_config("variant=ae")
    config.data.store = str(store)
    runs.overridden(config, {"method.intermediate_resolution": 8, "seed": 3})
    config.evaluation.export_maps = True
    train.train(config, folder / "run", mesh=mesh, progress=False)
    evaluate.evaluate(config, folder / "run", mesh=mesh, progress=False)
    return Run(config, folder / "run", folder / "scans", store)
