"""What the default run leaves out is still there, and the rest is run."""

import re
from pathlib import Path

import pytest

from tests.slow_tests import PATTERNS, VARIANTS

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern_names_a_test(pattern):
    file, name = pattern.split("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    stem = re.match(r"[\w*]+", name)[0]
    whole = stem.replace("*", r"\w*")
    assert re.search(rf"^(def {whole}\(|{whole} = )", text, re.M)


@pytest.mark.parametrize("name", VARIANTS)
def test_name_of_variants_exists(name):
    file, function = name.split("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    assert re.search(rf"^(def {function}\(|{function} = )", text, re.M)
    assert VARIANTS[name] > 0
