"""`docs/faults.md` names, for every fault, the tests that show what happens."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Faults whose behaviour is promised so far; later work adds to them.
PROMISED = (
    "A1 A2 A6 A7 A8 A9 A15 A18 A20 A21 A27 A28 A32 A36 A38 "
    "B1 B2 B4 B5 B6 B7 B8 B9 B14 B17 B24 B29 B30 B31 B35"
).split()


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
