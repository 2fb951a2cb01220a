"""What the default run leaves out is still there, and the rest is run."""

import re
from pathlib import Path

import pytest

from tests.slow_tests import PATTERNS, VARIANTS

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("file", sorted({n.split("::")[0] for n in PATTERNS}))
def test_file_of_a_pattern_exists(file):
    assert (ROOT / file).is_file()


@pytest.mark.parametrize("name", VARIANTS)
def test_name_of_variants_exists(name):
    file, function = name.split("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    assert re.search(rf"^(def {function}\(|{function} = )", text, re.M)
    assert VARIANTS[name] > 0
