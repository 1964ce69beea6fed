"""The commands of run.py, one after the other, as somebody types them."""

import csv
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import denoisers, foreign_states, heads, stores
from uad_jax import denoising, prepare, torch_names
from uad_jax.data import manifest, preprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent

# A lab's own file, which no copy of this repository has.
OWN_CONFIG = """
from configs import smoke

def get_config(arg=""):
    config = smoke.get_config(arg)
    config.name = "ours"
    config.method.intermediate_resolution = 8
    config.total_steps = 4
    config.train.eval_every = config.train.save_every = 2
    return config
"""
OWN_DIFFUSION = """
from tests import denoisers, runs

def get_config():
    config = runs.scale_config("")
    config.method = denoisers.ddpm_config()
    return config
"""
# A benchmark of tests: the same path, without the ten seconds per figure.
SHORT_BENCH = """
import functools, sys
import run
from absl import app
from uad_jax import bench, flops
flops._SIZES = (256,)
bench.bench = functools.partial(bench.bench, repeats=2, seconds=0.02)
app.run(run.main, argv=["run.py", *sys.argv[1:]], flags_parser=run._parse_flags)
"""


def _run(cwd: pathlib.Path, *arguments: str, code: str = "") -> str:
    """Runs one command on one device and returns what it printed."""
    program = ["-c", code] if code else [str(ROOT / "run.py")]
    done = subprocess.run(
        [sys.executable, *program, *arguments],
        cwd=cwd,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _own(path: pathlib.Path, text: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _prepared(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Scans of the clinic, two with a blob that is annotated, and a small store."""
    near = np.linalg.norm(
        heads.world(heads.SHAPE, heads.AFFINE) - heads.BLOB[:, None, None, None], axis=0
    )
    subjects = []
    for number, split in enumerate(["train"] * 2 + ["val"] * 2 + ["test"] * 3):
        name, abnormal = f"{split}-{number}", number > 4
        scan = heads.head(number, blob=abnormal)
        path = heads.save(folder / "scans" / f"{name}_FLAIR.nii.gz", scan)
        lesion = folder / "scans" / f"{name}_lesion.nii.gz"
        if abnormal:
            heads.save(lesion, (near < 13).astype(np.uint8))
        subjects.append(
            manifest.SubjectFiles(
                subject=name,
                patient=name,
                images={"flair": path},
                lesion_mask=lesion if abnormal else None,
                label="abnormal" if abnormal else "healthy",
                split=split,
            )
        )
    manifest.write(folder / "manifest.csv", subjects)
    recipe = dataclasses.replace(
        preprocess.RECIPES["grid2mm"], name="tiny", grid=(32, 32, 24), spacing=(4,) * 3
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(preprocess.RECIPES, "tiny", recipe)
        prepare.prepare(
            str(folder / "manifest.csv"), folder / "store", "tiny", workers=0
        )
    return folder / "scans", folder / "store"


def _foreign_state() -> dict[str, np.ndarray]:
    """What the program of the paper saves for the network of OWN_DIFFUSION."""
    image = jnp.zeros((1, 32, 32, 1))
    network = denoising.network(denoisers.ddpm_config(), image.shape, conditional=False)
    like = jax.eval_shape(network.init, jax.random.key(0), image, jnp.zeros(1), None)
    sources = torch_names.unet_sources(network, like)
    return foreign_states.drawn_state(like, sources, "diffusion.model.")


def test_commands_work_from_training_to_maps_of_new_scans(
    tmp_path: pathlib.Path,
) -> None:
    scans, store = _prepared(tmp_path)
    own = _own(tmp_path / "lab" / "ours.py", OWN_CONFIG)

    said = _run(
        tmp_path,
        "train",
        "--config=lab/ours.py:variant=ae",
        "--workdir=runs/ours",
        f"--config.data.store={store}",
    )
    assert "Next: python run.py evaluate --workdir=runs/ours" in said
    run = tmp_path / "runs" / "ours"

    said = _run(
        tmp_path,
        "evaluate",
        "--workdir=runs/ours",
        "--config.evaluation.export_maps=true",
    )
    results = json.loads((run / "results" / "test.json").read_text())
    assert f"{results['scorers']['ours']['ap_pooled']:.3f}" in said
    assert (run / "report.html").is_file()

    # From here on as if older code had trained it: a field is not stored.
    stored = json.loads((run / "config.json").read_text())
    del stored["train"]["selection"]
    (run / "config.json").write_text(json.dumps(stored))
    said = _run(
        tmp_path,
        "evaluate",
        "--workdir=runs/ours",
        "--steps=all",
        "--protocol=baur",
    )
    with (run / "results" / "by_step.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["step"] for row in rows} == {"2", "4"}
    assert {(row["set"], row["protocol"]) for row in rows} == {("test_baur", "baur")}
    assert "by_step.csv" in said

    said = _run(
        tmp_path,
        "evaluate",
        "--maps=runs/ours/maps/test",
        f"--store={store}",
        "--workdir=runs/maps",
        "--protocol=behrendt",
    )
    assert "Maps made by another tool" in said
    theirs = json.loads((tmp_path / "runs/maps/results/test.json").read_text())
    (name,) = set(theirs["scorers"]) - set(results["scorers"])
    assert (
        theirs["scorers"][name]["ap_pooled"] == results["scorers"]["ours"]["ap_pooled"]
    )

    said = _run(tmp_path, "compare", "runs/ours", "runs/maps", "--output=compared")
    assert "Page: compared/compare.html" in said
    compared = json.loads((tmp_path / "compared" / "compare.json").read_text())
    assert set(compared["runs"]) == {"ours", "maps"}

    # On another machine: the run, the scan, and nothing else.
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(run, elsewhere / "run")
    for gone in (run, store, own.parent):
        shutil.rmtree(gone)
    scan = scans / "test-6_FLAIR.nii.gz"
    said = _run(
        elsewhere, "predict", "--workdir=run", f"--input={scan}", "--output=maps"
    )
    assert "not a medical device" in said
    (report,) = (elsewhere / "maps").rglob("*_prediction.json")
    score = json.loads(report.read_text())["score"]["volume_score"]
    with (elsewhere / "run/results/test_subjects.csv").open(newline="") as file:
        (row,) = (
            row
            for row in csv.DictReader(file)
            if (row["subject"], row["scorer"]) == ("test-6", "ours")
        )
    assert score == pytest.approx(float(row["volume_score"]), rel=1e-6)


def test_bench_measures_the_batches_it_is_given(tmp_path: pathlib.Path) -> None:
    said = _run(
        ROOT,
        "bench",
        "--config=configs/smoke.py",
        f"--config.data.store={stores.tiny_store(tmp_path)}",
        "--batch=8,4",
        "--train",
        f"--output={tmp_path / 'bench.json'}",
        code=SHORT_BENCH,
    )
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [(row["kind"], row["batch"]) for row in rows] == [("train", 8), ("train", 4)]
    assert said.count("slices/s") == 2


def test_import_makes_a_run_of_a_file_of_another_program(
    tmp_path: pathlib.Path,
) -> None:
    foreign_states.save_state(tmp_path / "theirs.ckpt", _foreign_state())
    own = _own(tmp_path / "diffusion.py", OWN_DIFFUSION)
    said = _run(
        ROOT,
        "import",
        f"--config={own}",
        f"--config.data.store={stores.tiny_store(tmp_path)}",
        f"--input={tmp_path / 'theirs.ckpt'}",
        f"--workdir={tmp_path / 'run'}",
    )
    assert "Imported. Next: python run.py evaluate" in said
    assert (tmp_path / "run" / "checkpoints" / "8").is_dir()
    assert (tmp_path / "run" / "config_file.py").read_text() == OWN_DIFFUSION
