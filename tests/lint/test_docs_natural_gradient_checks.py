"""Every row of docs/natural_gradient_checks.md names tests that exist."""

import ast
import collections
import json
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "natural_gradient_checks.md").read_text("utf-8")
VERDICTS = ("holds", "fails", "printed beside", "found again")


def rows():
    """Statement, verdict and test cells of the tables of statements."""
    found = []
    for table in re.split(r"\n\n", TEXT):
        lines = table.strip().splitlines()
        if lines[0].startswith("| Statement |"):
            found += [line.strip("| ").split(" | ") for line in lines[2:]]
    return found


@pytest.fixture(scope="module")
def definitions():
    """The files that define each test function."""
    found = collections.defaultdict(set)
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                found[node.name].add(path.name)
    return found


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_row_names_tests_that_exist(row, definitions):
    assert len(row) == 3
    _, verdict, cell = row
    assert verdict.startswith(VERDICTS)
    names = re.findall(r"`(\w+)`", cell)
    assert names and ", ".join(f"`{name}`" for name in names) == cell
    for name in names:
        assert name.startswith("test_") and len(definitions[name]) == 1


def test_three_tables():
    assert TEXT.count("| Statement |") == 3
    assert len(rows()) == len(re.findall(r"^\|.*`test_", TEXT, re.MULTILINE))


def test_figures_of_the_text_are_those_of_the_example():
    source = (ROOT / "examples" / "natural_gradient_cg.py").read_text("utf-8")
    post = re.findall(r"\((\d\d\.\d\d), (\d\d)\),", source)
    table = TEXT.split("| Row |")[1].split("\n\n")[0].splitlines()[2:5]
    cells = [line.strip("| ").split(" | ") for line in table]
    assert [(row[1], row[3]) for row in cells] == post
    assert len(post) == 3


@pytest.mark.parametrize("letter", ["N", "r", "P"])
def test_exponents_of_memory_are_those_of_the_results(letter):
    """docs/natural_gradient.md, against the file of results."""
    path = ROOT / "benchmarks" / "results" / "costs.json"
    results = json.loads(path.read_text(encoding="utf-8"))["memory"]
    (row,) = (v for k, v in results.items() if f", {letter} (" in k)
    key = "exponent" if letter == "P" else "exponent of the largest two"
    text = (ROOT / "docs" / "natural_gradient.md").read_text("utf-8")
    sentence = " ".join(text.split("Peak memory")[1].split("\n\n")[0].split())
    shown = re.search(rf"([\d.]+) in {letter} \(", sentence)
    np.testing.assert_allclose(float(shown[1]), row[key], atol=0.005)
