"""Importing the package under another Keras backend fails with one sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from keras_natgrad import _backend

ROOT = Path(__file__).resolve().parent.parent


def import_package(tmp_path, **environment):
    variables = {
        key: value
        for key, value in os.environ.items()
        if key not in ("KERAS_BACKEND", "KERAS_HOME")
    }
    variables |= {"PYTHONPATH": str(ROOT), "KERAS_HOME": str(tmp_path)}
    return subprocess.run(
        [sys.executable, "-c", "import keras_natgrad"],
        env=variables | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )


def assert_refused(result, backend):
    assert result.returncode != 0
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError: ")
    assert "KERAS_BACKEND=tensorflow" in last_line
    assert f"backend={backend}" in last_line


@pytest.mark.parametrize("backend", ["jax", "torch", "numpy"])
def test_backend_of_the_environment_is_refused(tmp_path, backend):
    result = import_package(tmp_path, KERAS_BACKEND=backend)
    assert_refused(result, backend)


def test_backend_of_the_config_file_is_refused(tmp_path):
    (tmp_path / "keras.json").write_text(json.dumps({"backend": "jax"}))
    assert_refused(import_package(tmp_path), "jax")


def test_environment_wins_over_the_config_file(tmp_path):
    (tmp_path / "keras.json").write_text(json.dumps({"backend": "jax"}))
    result = import_package(tmp_path, KERAS_BACKEND="tensorflow")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "tensorflow"),
        ("{}", "tensorflow"),
        ("not json", "tensorflow"),
        ("[1]", "tensorflow"),
        ('{"backend": "torch"}', "torch"),
    ],
)
def test_config_file_is_read_as_keras_reads_it(
    tmp_path, monkeypatch, content, expected
):
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    if content is not None:
        (tmp_path / "keras.json").write_text(content)
    assert _backend.configured_backend() == expected


def test_empty_variable_counts_as_unset(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    assert _backend.configured_backend() == "tensorflow"


def test_loaded_keras_is_asked_first(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    _backend.require_tensorflow_backend()  # Keras is loaded, on TensorFlow.
    monkeypatch.setattr("keras.config.backend", lambda: "torch")
    with pytest.raises(ImportError, match="Received: backend=torch"):
        _backend.require_tensorflow_backend()
