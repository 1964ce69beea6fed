"""What the command line says to somebody who mistypes."""

import pathlib
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


def test_no_mode_explains_all_of_them() -> None:
    done = _run()
    assert done.returncode == 1
    for mode in ("demo", "check-data", "prepare", "train", "evaluate", "env"):
        assert f"run.py {mode} " in done.stderr
