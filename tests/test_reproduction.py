"""The commands of docs/reproduction.md are complete and follow from one another."""

import pathlib
import re
import shlex

import pytest

from configs import _opening, _parts
from uad_jax.data import datasets, preprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")


def _commands() -> list[tuple[str, list[tuple[str, str]]]]:
    """Mode and flags of every command, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        python, run, mode, *rest = shlex.split(line)
        assert (python, run) == ("python", "run.py"), line
        assert all(flag.startswith("--") for flag in rest), line
        pairs = [flag[2:].partition("=") for flag in rest]
        found.append((mode, [(name, value) for name, _, value in pairs]))
    return found


def test_every_command_has_what_it_needs_from_those_before_it() -> None:
    stores: dict[str, tuple[str, str]] = {}  # store -> its recipe and modality
    runs: dict[str, str] = {}  # workdir -> the store it was trained on
    evaluated = set()
    for mode, pairs in _commands():
        flags = dict(pairs)
        assert "protocol" not in flags or mode == "evaluate"
        if mode == "prepare":
            assert flags["recipe"] in preprocess.RECIPES
            name, colon, _ = flags["source"].partition(":")
            if colon:
                assert flags["modality"] in datasets.DATASETS[name].modalities
            stores[flags["store"]] = (flags["recipe"], flags["modality"])
        elif mode == "train":
            assert flags["config.data.store"] in stores
            assert flags["workdir"] not in runs
            before = re.search(r"(encoder|gan)=(runs/[^,]*)", flags["config"])
            assert before is None or before[2] in runs
            runs[flags["workdir"]] = flags["config.data.store"]
        elif mode == "rescore":
            assert flags["output"] not in runs
            runs[flags["output"]] = runs[flags["workdir"]]
        else:
            assert mode == "evaluate"
            on = [value for name, value in pairs if name in ("data", "store")]
            assert on
            for store in on:  # prepared alike, or evaluation refuses them
                assert stores[store] == stores[runs[flags["workdir"]]]
            evaluated.add(flags["workdir"])
    assert set(runs) - evaluated == {
        "runs/spark",
        "runs/gan",
    }  # there is nothing to score


# Workdir -> the config that it is trained with.
CONFIGS = {
    dict(p)["workdir"]: dict(p)["config"] for m, p in _commands() if m == "train"
}


@pytest.mark.parametrize(
    "pairs",
    [
        pytest.param(
            [("config", CONFIGS[dict(p)["workdir"]]), *p], id=dict(p).get("output")
        )
        if m == "rescore"
        else pytest.param(p, id=dict(p)["workdir"])
        for m, p in _commands()
        if m in ("train", "rescore")
    ],
)
def test_every_config_exists_with_the_fields_that_are_set(
    pairs: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = _opening._experiment(dict(pairs)["config"])
    known = _parts.field_paths(config)
    for name, _ in pairs:
        assert not name.startswith("config.") or name[len("config.") :] in known


def test_a_published_figure_stands_beside_its_variant() -> None:
    rows = {
        figure: line
        for figure in (
            "Dice .271",
            ".154",
            ".333",
            ".332",
            ".283",
            "49.36",
            "49.78",
            "53.37",
        )
        for line in TEXT.splitlines()
        if line.startswith("|") and figure in line
    }
    assert "| dense AE |" in rows["Dice .271"]
    assert "| VAE, restoration |" in rows[".333"]
    assert "| GMVAE, restoration |" in rows[".332"]
    assert "| f-AnoGAN |" in rows[".283"]
    assert "| spatial AE |" in rows[".154"]
    assert "| single" in rows["49.36"]
    assert "| ensemble" in rows["49.78"]
    assert "+SSL+ensemble" in rows["53.37"]
