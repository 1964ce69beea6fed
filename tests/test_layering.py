"""Reads the imports of every file and holds them to the floors of the design."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MAX_LINES = 450

# Module prefix -> floor; the longest prefix counts. A file may import its own floor or
# a lower one.
FLOORS = {
    "uad_jax": 0,  # the package itself: its version
    "uad_jax.types": 0,
    "uad_jax.mesh": 0,
    "uad_jax.runtime": 0,
    "uad_jax.environment": 0,
    "uad_jax.integrity": 0,
    "uad_jax.leaves": 0,
    "uad_jax.segmentations": 0,
    "uad_jax.compat": 0,
    "uad_jax.alarms": 0,
    "uad_jax.ops": 1,
    "uad_jax.nn": 2,
    "uad_jax.data": 2,
    "uad_jax.metrics": 2,
    "uad_jax.optim": 2,
    "uad_jax.methods": 3,
    "uad_jax.anomaly_scores": 3,
    "uad_jax.anomaly_score_config": 2,
    "uad_jax.gradient_score": 3,
    "uad_jax.restoring": 3,
    "uad_jax.score_functions": 2,
    "uad_jax.slab_scores": 3,
    "uad_jax.autoencoding": 3,
    "uad_jax.denoising": 3,
    "uad_jax.noising": 3,
    "uad_jax.denoising_config": 2,
    "uad_jax.adversarial": 3,
    "uad_jax.players": 3,
    "uad_jax.adversarial_config": 2,
    "uad_jax.interslice_config": 2,
    "uad_jax.checkpoint": 3,
    "uad_jax.writer": 3,
    "uad_jax.workdir": 3,
    "uad_jax.weights": 3,
    "uad_jax.pickle_program": 3,
    "uad_jax.torch_file": 3,
    "uad_jax.torch_names": 3,
    "uad_jax.config": 4,
    "configs": 6,
    "run": 6,
}
SHARED = ("uad_jax.methods.base", "uad_jax.methods.lifting")  # every method may
TOP_FLOOR = 5  # everything else in uad_jax: the modes of run.py
MAY_PICKLE = {"uad_jax.weights"}
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}

FILES = sorted(
    [*ROOT.glob("uad_jax/**/*.py"), *ROOT.glob("configs/**/*.py"), ROOT / "run.py"]
)


def _module(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _floor(module: str) -> int:
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in FLOORS and (prefix != "uad_jax" or module == "uad_jax"):
            return FLOORS[prefix]
    return TOP_FLOOR


def _exists(module: str) -> bool:
    path = ROOT / pathlib.Path(*module.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def imports(source: str) -> set[str]:
    """Modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor"
            base = node.module or ""
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if _exists(full) else base)
    return found


def violations(module: str, imported: set[str]) -> list[str]:
    """Imports that the floors forbid."""
    problems = []
    for other in sorted(imported):
        if other.split(".")[0] not in ("uad_jax", "configs", "run"):
            continue
        if _floor(other) > _floor(module):
            problems.append(
                f"{module} (floor {_floor(module)}) imports {other} "
                f"(floor {_floor(other)})"
            )
        method = "uad_jax.methods."
        between = module.startswith(method) and other.startswith(method)
        if between and other not in (*SHARED, module):
            problems.append(f"{module} imports the method {other}; share through base")
    return problems


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_no_file_imports_a_higher_floor(path: pathlib.Path) -> None:
    assert violations(_module(path), imports(path.read_text())) == []


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_files_are_short_and_named_for_their_idea(path: pathlib.Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{path.name} has {lines} lines"
    assert not VAGUE & set(_module(path).split("."))


def test_only_the_foreign_weights_reader_may_unpickle() -> None:
    readers = {
        _module(path)
        for path in FILES
        for name in imports(path.read_text())
        if name.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib", "shelve")
    }
    assert readers <= MAY_PICKLE


def test_operations_know_no_modules_and_data_no_networks() -> None:
    for path in FILES:
        packages = {name.split(".")[0] for name in imports(path.read_text())}
        if _module(path).startswith("uad_jax.ops"):
            assert not packages & {"flax", "optax", "orbax", "grain"}, path
        if _module(path).startswith("uad_jax.data"):
            assert not packages & {"flax", "optax"}, path
        if _module(path).startswith("uad_jax.nn"):
            assert not packages & {"optax", "orbax", "grain"}, path


def test_no_file_requires_tensorflow_or_torch() -> None:
    for path in FILES:
        packages = {name.split(".")[0] for name in imports(path.read_text())}
        assert not packages & {"tensorflow", "torch"}, path


def test_the_rules_can_fail() -> None:
    assert violations("uad_jax.ops.losses", {"uad_jax.nn.blocks", "jax"})
    assert violations("uad_jax.nn.blocks", {"uad_jax.methods.base"})
    assert violations("uad_jax.methods.new", {"uad_jax.methods.autoencoder"})
    assert violations("uad_jax.train", {"configs.demo"})
    assert not violations("uad_jax.train", {"uad_jax.evaluate", "uad_jax.config"})
    assert imports("def f():\n    from uad_jax.nn import blocks") == {
        "uad_jax.nn.blocks"
    }
