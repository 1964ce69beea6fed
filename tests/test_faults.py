"""`docs/faults.md` names, for every fault, the tests that show what happens."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Faults whose behaviour is promised so far; later work adds to them.
PROMISED = [
    *(f"A{n}" for n in (1, 2, 6, 7, 8, 9, 15, 18, 20, 21, 27, 28, 32, 36, 38)),
    *(f"B{n}" for n in (1, 2, 4, 5, 6, 7, 8, 9, 14, 17, 24, 29, 30, 31, 35)),
]


def _fault_tests() -> dict[str, set[str]]:
    """Fault number -> names of the tests that exist."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                for number in re.findall(r"(?<=_)[A-D]\d+(?=_)", node.name):
                    if node.name.startswith("test_fault_"):
                        found.setdefault(number, set()).add(node.name)
    return found


def _documented() -> dict[str, set[str]]:
    """Fault number -> names of the tests in the table of `docs/faults.md`."""
    rows: dict[str, set[str]] = {}
    for line in (ROOT / "docs" / "faults.md").read_text().splitlines():
        number = re.match(r"\| ([A-D]\d+) \|", line)
        if number:
            rows[number[1]] = set(re.findall(r"test_fault_\w+", line))
    return rows


def test_every_promised_fault_has_a_test() -> None:
    missing = [number for number in PROMISED if number not in _fault_tests()]
    assert not missing


def test_the_table_names_the_tests_that_exist_and_no_others() -> None:
    existing, documented = _fault_tests(), _documented()
    assert documented.keys() == existing.keys()
    for number, names in documented.items():
        assert names == existing[number], number
