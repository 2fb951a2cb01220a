"""The examples, run as a user runs them, with tiny settings."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import tensorflow as tf

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


def load(name, monkeypatch):
    """Imports an example, which does not run it."""
    path = ROOT / "examples" / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


def table_rows(output):
    """The cells of the rows of a table, without continued lines."""
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in output.splitlines()
        if line.startswith("│")
    ]
    return [row for row in rows if row[1]]


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_count_regression():
    output = run("count_regression.py", "--epochs", "3")
    rows = [line.rsplit(maxsplit=3) for line in output.splitlines()[2:]]
    assert [row[1] for row in rows] == ["K-FAC", "Adam"] * 2
    assert all(0 < float(cell) < 100 for row in rows for cell in row[2:])


@pytest.mark.slow
def test_pinn_poisson(tmp_path):
    path = tmp_path / "new" / "figure.png"
    output = run(
        "pinn_poisson.py",
        *("--seconds", "2", "--adam-learning-rates", "5e-3"),
        *("--output", str(path)),
    )
    assert "257 parameters, 900 + 120 points" in output
    assert "Error on 9000 points" in output
    rows = {
        row[0]: [float(cell.replace(",", "")) for cell in row[1:]]
        for row in table_rows(output)
    }
    assert list(rows) == ["Natural gradient", "Adam, rate 0.005", "L-BFGS"]
    for error, steps, seconds, rate in rows.values():
        assert error < 1.0
        assert seconds >= 2.0
        np.testing.assert_allclose(rate, steps / seconds, rtol=0.05)
    assert rows["Natural gradient"][0] < 1e-2
    assert_is_figure(path)


@pytest.mark.slow
def test_pinn_poisson_with_points_drawn_anew(tmp_path):
    path = tmp_path / "figure.png"
    output = run(
        "pinn_poisson.py",
        *("--dimensions", "3", "--widths", "8", "8", "--seconds", "1"),
        *("--adam-learning-rates", "--output", str(path)),
    )
    assert "113 parameters, 3000 + 500 points" in output
    assert "Peak memory" in output and "MiB" in output
    names = [row[0] for row in table_rows(output)]
    assert names == ["Natural gradient", "L-BFGS, one draw of points"]
    assert_is_figure(path)


@pytest.mark.parametrize("dimensions", [2, 3, 5])
def test_pinn_poisson_problem(dimensions, monkeypatch):
    """The exact solution solves the equation, on points where they belong."""
    example = load("pinn_poisson.py", monkeypatch)
    problem = example.Problem(dimensions, 50, 4 * dimensions, seed=0)

    def exact(x):
        return example.solution(x)[:, tf.newaxis]

    for residual, x in zip(
        problem.residuals(exact), problem.points(), strict=True
    ):
        np.testing.assert_allclose(residual(x), 0.0, atol=1e-11)
    x, edge = problem.points()
    # Δ(x₁ x₂ + x₂³) = 6 x₂.
    np.testing.assert_allclose(
        example.laplacian(
            lambda x: (x[:, 0] * x[:, 1] + x[:, 1] ** 3)[:, tf.newaxis], x
        ),
        6.0 * x[:, 1],
        rtol=1e-12,
    )
    on_face = (edge.numpy() == 0.0) | (edge.numpy() == 1.0)
    np.testing.assert_array_equal(on_face.sum(axis=1), 1)
    for side in (0.0, 1.0):
        faces = (edge.numpy() == side).sum(axis=0)
        np.testing.assert_array_equal(faces, 2)
    assert np.all((x.numpy() > 0.0) & (x.numpy() < 1.0))
    again = problem.points()[0].numpy()
    assert np.array_equal(again, x.numpy()) == (dimensions == 2)


@pytest.mark.slow
def test_prong(tmp_path):
    path, report = tmp_path / "new" / "figure.png", tmp_path / "prong.json"
    output = run(
        "prong.py",
        *("--epochs", "3", "--learning-rates", "0.1", "0.3"),
        *("--sgd-learning-rates", "1"),
        *("--output", str(path), "--out", str(report)),
    )
    rows = {row[0]: row[1:] for row in table_rows(output)}
    assert list(rows) == ["SGD", "PRONG", "Whitened SGD"]
    for row in rows.values():
        assert row[1] == "3"
        assert 0.0 < float(row[2]) < 0.7 and 0.0 < float(row[3]) < 0.7
    results = json.loads(report.read_text())["results"]
    assert [len(each) for each in results.values()] == [1, 2, 2]
    for name, each in results.items():
        best = min(each, key=lambda result: result["loss"][-1])
        assert float(rows[name][0]) == best["learning_rate"]
        np.testing.assert_allclose(
            float(rows[name][2]), best["loss"][-1], atol=1e-5
        )
    assert_is_figure(path)


@pytest.mark.slow
def test_prong_on_a_file(tmp_path):
    """A file in the layout of MNIST, with the large network."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (80, 28, 28)).astype("uint8")
    np.savez(tmp_path / "images.npz", x_train=images)
    path = tmp_path / "figure.png"
    output = run(
        "prong.py",
        *("--data", str(tmp_path / "images.npz"), "--epochs", "1"),
        *("--learning-rates", "0.01", "--sgd-learning-rates", "0.1"),
        *("--output", str(path)),
    )
    assert len(table_rows(output)) == 3
    assert_is_figure(path)


@pytest.mark.slow
def test_natural_gradient_cg():
    output = run("natural_gradient_cg.py")
    rows = table_rows(output)
    assert [row[0] for row in rows] == [
        "Adam",
        "Adam on the gradient over its squared norm",
        "Adam on the gradient with one sampled",
        "Natural gradient, conjugate gradients",
        "Natural gradient, default arguments",
    ]
    accuracy = [float(row[1]) for row in rows]
    assert all(60.0 < value <= 100.0 for value in accuracy)
    assert all(row[3] == "22" for row in rows)
    # What the true Fisher gains, and what the rank-one operators do not.
    assert accuracy[3] > max(accuracy[:3]) + 10.0
    assert max(accuracy[:3]) - min(accuracy[:3]) < 5.0
    assert "Post" not in output


@pytest.mark.slow
def test_natural_gradient_cg_on_a_file(tmp_path):
    """A file in the layout of MNIST has the figures of the post beside it."""
    generator = np.random.default_rng(0)
    arrays = {
        f"x_{part}": generator.integers(0, 256, (40, 28, 28)).astype("uint8")
        for part in ("train", "test")
    }
    labels = {f"y_{part}": np.arange(40) % 10 for part in ("train", "test")}
    np.savez(tmp_path / "images.npz", **arrays, **labels)
    output = run(
        "natural_gradient_cg.py",
        *("--data", str(tmp_path / "images.npz")),
        *("--batch-size", "20", "--epochs", "1"),
    )
    rows = table_rows(output)
    assert [row[5:] for row in rows] == [
        ["95.99", "53"],
        ["96.25", "58"],
        ["95.82", "75"],
        ["", ""],
        ["", ""],
    ]
    assert all(row[3] == "2" for row in rows)


def test_directions_of_the_post(monkeypatch):
    """They solve the post's systems, which are of rank one."""
    example = load("natural_gradient_cg.py", monkeypatch)
    generator = np.random.default_rng(0)
    shapes = [(3, 2), (2,)]
    gradient, sampled = (
        [tf.constant(generator.normal(size=shape)) for shape in shapes]
        for _ in range(2)
    )

    def flat(parts):
        return np.concatenate([part.numpy().ravel() for part in parts])

    g, s = flat(gradient), flat(sampled)
    np.testing.assert_allclose(
        flat(example.over_squared_norm(gradient, sampled)),
        np.linalg.pinv(np.outer(g, g)) @ g,
        rtol=1e-10,
    )
    np.testing.assert_allclose(
        flat(example.deflated(gradient, sampled)),
        np.linalg.solve(np.outer(s, s) + 1e-3 * np.eye(g.size), g),
        rtol=1e-10,
    )


@pytest.mark.slow
def test_rngd_mnist(tmp_path):
    """RNGD is ahead of SGD at one rate; what is printed is what is saved."""
    path, results = tmp_path / "new" / "figure.png", tmp_path / "results.json"
    output = run(
        "rngd_mnist.py",
        *("--methods", "RNGD", "SGD", "--learning-rates", "1e-2"),
        *("--epochs", "2", "--shape", "20", "20", "20"),
        *("--output", str(path), "--out", str(results)),
    )
    rows = {
        row[0]: [float(cell) for cell in row[1:]] for row in table_rows(output)
    }
    assert list(rows) == ["RNGD", "SGD"]
    assert rows["RNGD"][1] < 0.7 * rows["SGD"][1]
    assert rows["RNGD"][2] > rows["SGD"][2]
    saved = json.loads(results.read_text(encoding="utf-8"))
    assert saved["settings"]["shape"] == [20, 20, 20]
    assert [each["method"] for each in saved["runs"]] == ["RNGD", "SGD"]
    for each, row in zip(saved["runs"], rows.values(), strict=True):
        assert len(each["seconds"]) == len(each["accuracy"]) == 2
        np.testing.assert_allclose(each["cost"][-1], row[1], atol=1e-4)
    assert_is_figure(path)


@pytest.mark.slow
def test_keras_tuner_search(tmp_path):
    """The second time it finds its trials and only loads the best model."""
    for package in ("keras_tuner", "tensorboard"):
        pytest.importorskip(package, reason="pip install .[tuner]")
    arguments = ("--epochs", "1", "--directory", str(tmp_path))
    first, second = (
        run("keras_tuner_search.py", *arguments).splitlines() for _ in range(2)
    )
    found = [line for line in first if " epochs: units=" in line]
    assert f"{len(found)} trials, by validation loss:" in first
    scores = [float(line.split(",")[0]) for line in found]
    assert scores == sorted(scores)
    assert all("damping=" in line and "sharing" not in line for line in found)
    assert not any("Search" in line for line in first)
    assert second[0].startswith("Reloading Tuner")
    assert second[-len(found) - 5 :] == first[-len(found) - 5 :]
    results = [line for line in first if "accuracy " in line]
    assert len(results) == 2
    for line in results:
        assert 0.5 < float(line.rsplit(" ", 1)[1]) <= 1.0


@pytest.mark.slow
def test_rngd_mnist_on_a_file(tmp_path):
    """A file in the layout of MNIST, with batch normalisation."""
    generator = np.random.default_rng(0)
    arrays = {
        f"x_{part}": generator.integers(0, 256, (140, 28, 28)).astype("uint8")
        for part in ("train", "test")
    }
    labels = {f"y_{part}": np.arange(140) % 10 for part in ("train", "test")}
    np.savez(tmp_path / "images.npz", **arrays, **labels)
    output = run(
        "rngd_mnist.py",
        *("--data", str(tmp_path / "images.npz"), "--epochs", "1"),
        *("--methods", "RNGD, authors' setting", "Adam BNB", "Adam BNA"),
        *("--seeds", "2", "--output", str(tmp_path / "figure.png")),
    )
    assert len(table_rows(output)) == 3
    assert_is_figure(tmp_path / "figure.png")


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


@pytest.mark.slow
def test_distributed_mirrored():
    output = run("distributed_mirrored.py", "--epochs", "2")
    lines = output.splitlines()
    assert lines[0].startswith("2 replicas: loss ")
    assert lines[1].startswith("1 replica: loss ")
    assert float(lines[-1].rsplit(": ")[1]) < 1e-4


def test_model_garden_task():
    pytest.importorskip(
        "official",
        reason="tf-models-official is not installed, see docs/model_garden.md",
    )
    output = run("model_garden_task.py", "--steps", "60")
    accuracy = re.findall(r"^accuracy: (.*)$", output, re.MULTILINE)
    assert float(accuracy[-1]) > 0.9


@pytest.mark.parametrize(
    "name",
    [
        "quickstart.py",
        "mnist_autoencoder.py",
        "heteroscedastic_regression.py",
        "count_regression.py",
        "kl_distance.py",
        "model_garden_task.py",
        "pinn_poisson.py",
        "natural_chain.py",
        "natural_gradient_cg.py",
        "prong.py",
        "rngd_mnist.py",
        "keras_tuner_search.py",
        "distributed_mirrored.py",
    ],
)
def test_help_and_header(name):
    text = (ROOT / "examples" / name).read_text(encoding="utf-8")
    for word in ("Title:", "Author: keras_natgrad authors", "Description:"):
        assert word in text
    assert "Accelerator:" in text
    assert '__name__ == "__main__"' in text
