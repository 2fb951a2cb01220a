"""The examples, run as a user runs them, with tiny settings."""

import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(name, *arguments):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), os.environ.get("PYTHONPATH", "")]
        ),
        "COLUMNS": "100",
        "PYTHONIOENCODING": "utf-8",
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_is_figure(path):
    image = matplotlib.image.imread(path)
    height, width = image.shape[:2]
    assert min(height, width) > 500
    assert len(np.unique(image)) > 10


def assert_is_report(output, path):
    for word in ("K-FAC", "Adam", "Steps", "Seconds", "Loss", "Squared error"):
        assert word in output
    assert "Seconds to error" in output
    assert "nan" not in output
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in output.splitlines()
        if line.startswith(("│ K-FAC", "│ Adam"))
    ]
    assert [row[0] for row in rows] == ["K-FAC", "Adam"]
    for row in rows:
        assert int(row[1].replace(",", "")) > 0
        assert all(float(cell) > 0 for cell in row[2:6])
    assert_is_figure(path)


def test_quickstart():
    output = run("quickstart.py", "--epochs", "2")
    accuracy = float(output.strip().rsplit(" ", 1)[-1])
    assert 0.7 < accuracy <= 1.0


def test_mnist_autoencoder(tmp_path):
    """The default data, offline; the folder of the figure is created."""
    path = tmp_path / "new" / "figure.png"
    output = run(
        "mnist_autoencoder.py", "--seconds", "1", "--output", str(path)
    )
    assert_is_report(output, path)


def test_heteroscedastic_regression(tmp_path):
    path = tmp_path / "figure.png"
    output = run(
        "heteroscedastic_regression.py",
        *("--epochs", "5", "--output", str(path)),
    )
    rows = [line.split() for line in output.splitlines()]
    found = {
        row[0]: row[1:] for row in rows if row[:1] in (["K-FAC"], ["Adam"])
    }
    for row in found.values():
        assert 0.5 < float(row[0]) < 2.0 and 0.5 < float(row[1]) < 2.0
    assert len(found) == 2
    assert_is_figure(path)


def test_kl_distance(tmp_path):
    path = tmp_path / "figure.png"
    output = run("kl_distance.py", "--output", str(path))
    assert [line.split() for line in output.splitlines()[1:3]] == [
        ["2.0", "4.00", "2.83", "4.00"],
        ["0.5", "4.00", "5.66", "16.00"],
    ]
    found = {
        name: float(line.rsplit(maxsplit=1)[1])
        for line in output.splitlines()
        for name in ("Natural gradient", "SGD")
        if line.startswith(name)
    }
    assert found["Natural gradient"] < 1e-6 < 1 < found["SGD"]
    assert_is_figure(path)


def test_count_regression():
    output = run("count_regression.py", "--epochs", "3")
    rows = [line.rsplit(maxsplit=3) for line in output.splitlines()[2:]]
    assert [row[1] for row in rows] == ["K-FAC", "Adam"] * 2
    assert all(0 < float(cell) < 100 for row in rows for cell in row[2:])


@pytest.mark.slow
def test_mnist_autoencoder_on_a_file(tmp_path):
    """A file in the layout of MNIST, with the large network."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (80, 28, 28)).astype("uint8")
    np.savez(tmp_path / "images.npz", x_train=images)
    path = tmp_path / "figure.png"
    output = run(
        "mnist_autoencoder.py",
        *("--data", str(tmp_path / "images.npz")),
        *("--seconds", "1", "--batch-size", "32"),
        *("--adam-learning-rate", "1e-4", "--seed", "3"),
        *("--output", str(path)),
    )
    assert_is_report(output, path)


@pytest.mark.parametrize(
    "name",
    [
        "quickstart.py",
        "mnist_autoencoder.py",
        "heteroscedastic_regression.py",
        "count_regression.py",
        "kl_distance.py",
    ],
)
def test_help_and_header(name):
    text = (ROOT / "examples" / name).read_text(encoding="utf-8")
    for word in ("Title:", "Author: keras_natgrad authors", "Description:"):
        assert word in text
    assert "Accelerator:" in text
    assert '__name__ == "__main__"' in text
