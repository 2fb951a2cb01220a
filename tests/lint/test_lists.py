"""Lists of names hold what exists, all of it, and once."""

import re

import keras

from benchmarks.models import MODELS
from keras_natgrad import _compat
from tests import test_docs_code as code
from tests.contract.table import document, path
from tests.docs_code import ROOT, blocks_of_page, pages


def test_every_function_of_compat_is_tested():
    """One test per function of the module."""
    functions = {
        name
        for name, value in vars(_compat).items()
        if callable(value)
        and getattr(value, "__module__", None) == _compat.__name__
        and not isinstance(value, type)
    }
    text = (ROOT / "tests" / "test_compat.py").read_text(encoding="utf-8")
    tests = re.findall(r"^def (test_\w+)", text, re.MULTILINE)
    for function in functions:
        assert any(test.startswith(f"test_{function}") for test in tests)


def test_all_applications_are_listed():
    names = {
        name
        for name in dir(keras.applications)
        if name[0].isupper() and callable(getattr(keras.applications, name))
    }
    assert names == set(MODELS)


def test_contract_is_in_the_documentation():
    assert path().read_text(encoding="utf-8") == document()


def test_tables_of_documented_code_name_what_exists():
    assert set(code.PAGES) <= {path.name for path in pages()}
    assert set(code.DOCSTRINGS) | code.SHORT | code.SEARCHES <= set(code.FOUND)
    assert code.SLOW <= set(code.PAGES)


def test_no_example_is_missed():
    """As many blocks and doctests as there are openings of them."""
    texts = [p.read_text("utf-8") for p in (ROOT / "docs").glob("*.md")]
    texts += [(ROOT / "README.md").read_text("utf-8")]
    found = sum(len(blocks_of_page(path)) for path in pages())
    assert found == sum(text.count("```python") for text in texts)
    source = [
        p.read_text("utf-8") for p in (ROOT / "keras_natgrad").rglob("*.py")
    ]
    blocks = sum(len(blocks) for blocks, _ in code.FOUND.values())
    assert blocks == sum(text.count("```python") for text in source)
    tries = sum(len(session.examples) for _, session in code.FOUND.values())
    assert tries == sum(
        len(re.findall(r"^ *>>> ", text, re.MULTILINE)) for text in source
    )
