"""`keras_natgrad.tuner` is imported when it is used, with its packages."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import keras_natgrad as kng

ROOT = Path(__file__).resolve().parent.parent
CHECK = """
import sys
import keras_natgrad
late = {"keras_natgrad.tuner", "keras_tuner", "tensorboard"}
assert not late & set(sys.modules), late & set(sys.modules)
"""


def test_the_package_does_not_import_it():
    subprocess.run(
        [sys.executable, "-c", CHECK], cwd=ROOT, check=True, timeout=120
    )


@pytest.mark.parametrize("package", ["keras_tuner", "tensorboard"])
def test_a_missing_package_is_named_with_the_extra(monkeypatch, package):
    if package == "tensorboard":
        pytest.importorskip("keras_tuner", reason="pip install .[tuner]")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "keras_natgrad.tuner", raising=False)
    monkeypatch.delitem(vars(kng), "tuner", raising=False)
    message = r"pip install keras_natgrad\[tuner\].*" + package
    with pytest.raises(ImportError, match=message):
        _ = kng.tuner
    with pytest.raises(ImportError, match=message):
        importlib.import_module("keras_natgrad.tuner")


def test_other_names_are_unknown_as_before():
    with pytest.raises(AttributeError, match="no attribute 'tunner'"):
        _ = kng.tunner
