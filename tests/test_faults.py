"""`docs/faults.md` names, for every fault, the tests that show what happens."""

import ast
import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Faults whose behaviour is promised so far; later work adds to them.
PROMISED = [
    *(f"A{n}" for n in (1, 2, 6, 7, 8, 9, 15, 18, 20, 21, 27, 28, 32, 36, 38)),
    *(f"B{n}" for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 14, 15, 17, 19, 24, 29, 30, 31)),
    *(f"B{n}" for n in (32, 33, 35)),
    *(f"D{n}" for n in range(1, 13)),
]


def fault_numbers(source: str) -> dict[str, set[str]]:
    """Fault number -> names of the tests of one file."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_fault_"):
            for number in re.findall(r"(?<=_)[A-D]\d+(?=_)", node.name):
                found.setdefault(number, set()).add(node.name)
    return found


@functools.cache
def _fault_tests() -> dict[str, set[str]]:
    """Fault number -> names of the tests that exist."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "test_fault_" in text:
            for number, names in fault_numbers(text).items():
                found.setdefault(number, set()).update(names)
    return found


def _documented() -> dict[str, set[str]]:
    """Fault number -> names of the tests in the table of `docs/faults.md`."""
    rows: dict[str, set[str]] = {}
    for line in (ROOT / "docs" / "faults.md").read_text().splitlines():
        number = re.match(r"\| ([A-D]\d+) \|", line)
        if number:
            rows[number[1]] = set(re.findall(r"test_fault_\w+", line))
    return rows


@pytest.mark.parametrize("number", PROMISED)
def test_every_promised_fault_has_a_test(number: str) -> None:
    assert number in _fault_tests(), f"no test is named test_fault_{number}_..."


def test_only_names_that_begin_with_test_fault_and_hold_the_number_count() -> None:
    source = (
        "def test_fault_B1_B2_x(): ...\n\ndef test_D3_y(): ...\n\n# test_fault_D4_z"
    )
    assert fault_numbers(source) == {
        "B1": {"test_fault_B1_B2_x"},
        "B2": {"test_fault_B1_B2_x"},
    }


def test_the_table_names_the_tests_that_exist_and_no_others() -> None:
    existing, documented = _fault_tests(), _documented()
    assert documented.keys() == existing.keys()
    for number, names in documented.items():
        assert names == existing[number], number
