"""What the command line says to somebody who mistypes."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
VAE = "--config=configs/autoencoder.py:variant=vae,cpu"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "run.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian", "--workdir=x"], "no mode 'trian'. Did you mean 'train'?"),
        (["train", VAE, "more"], "Not understood: more. Write flags as --name=value."),
        (["check-data"], "Missing: --source=..."),
        (["prepare", "--source=x"], "Missing: --store=..."),
        (["prepare", "--sorce=x"], "Unknown command line flag 'sorce'"),
        (["train", "--config=configs/autoencodr.py:cpu"], "'configs/autoencoder.py'?"),
        (
            ["train", "--config=configs/autoencoder.py:variant=vea"],
            "'variant=vea': expected one of ae, ae_spatial, vae",
        ),
        (["train", VAE, "--config.data.stroe=x"], "mean 'config.data.store'?"),
        (["train", VAE, "--workdir=x"], "give --config.data.store=DIR"),
        (
            ["evaluate", "--protocol=bauer"],
            "one of <behrendt|baur|kascenas|thresh|none>",
        ),
        (["rescore", "--protocol=baur"], "belongs to evaluate and predict"),
        (
            ["rescore", "--workdir=x", "--output=y", "--choose_tv_weight=1,b"],
            "--choose_tv_weight=1,b: use numbers, such as 0.5,1,2.",
        ),
        (["compare", "a", "b", "--protocol=baur"], "compare --set=test_baur"),
        (["evaluate", "--workdir=no/run"], "no/run is not the directory of a run"),
    ],
)
def test_a_slip_gets_one_sentence_and_no_traceback(
    arguments: list[str], expected: str
) -> None:
    done = _run(*arguments)
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert expected in said
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 3


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ('{"source": ', "config.json is damaged"),
        ('{"source": "configs/smoke.py", "type": "X"}', "the stored config holds a X"),
    ],
)
def test_a_stored_config_that_cannot_be_read_gets_one_sentence(
    tmp_path: pathlib.Path, stored: str, expected: str
) -> None:
    (tmp_path / "config.json").write_text(stored, encoding="utf-8")
    done = _run("evaluate", f"--workdir={tmp_path}")
    assert done.returncode == 1
    assert expected.lower() in done.stderr.lower()
    assert "Traceback" not in done.stderr


def test_another_python_gets_one_sentence() -> None:
    code = "import runpy, sys; sys.version_info = (3, 10, 14); runpy.run_path('run.py')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("uad_jax needs Python 3.11, 3.12 or 3.13, and this")
    assert len(done.stderr.splitlines()) == 1
    # To say so it must be read by that Python.
    ast.parse((ROOT / "run.py").read_text(encoding="utf-8"), feature_version=(3, 7))


def test_no_mode_explains_all_of_them() -> None:
    done = _run()
    assert done.returncode == 1
    explained = set(re.findall(r"python run\.py ([a-z-]+) ", done.stderr))
    modes = "demo check-data prepare train evaluate compare predict import rescore "
    modes += "bench env"
    assert explained == set(modes.split())
    (listed,) = re.findall(r"Give one mode: (.*)\.", done.stderr)
    assert set(listed.split(", ")) == explained


def test_ctrl_c_is_no_crash() -> None:
    code = (
        "import run\n"
        "from absl import app\n"
        "def stop(): raise KeyboardInterrupt\n"
        "run._MODES['env'] = stop\n"
        "app.run(run.main, argv=['run.py', 'env'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 130
    assert done.stderr.strip() == "Stopped. The same command starts again."
