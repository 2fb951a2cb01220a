"""Title: A deep autoencoder, K-FAC against Adam at equal seconds.

Author: keras_natgrad authors
Description: Train the deep autoencoder that second-order methods are compared
    on since Hinton & Salakhutdinov (2006), once with K-FAC and its default
    arguments and once with Adam, each for the same number of seconds.
Accelerator: None, or a GPU for `--data mnist`

Both contenders start from the same weights and see the same sequence of
batches. The clock runs while `fit` trains; it is stopped while the error is
measured. Before it starts, each contender takes two steps, so that its graph
is traced and compiled, and then all its variables are set back to where they
were: neither the seconds nor the progress of that warm-up count.

    python examples/mnist_autoencoder.py
    python examples/mnist_autoencoder.py --data mnist --seconds 120

The first runs offline, on the 8×8 digits that come with scikit-learn and a
smaller network; the second downloads MNIST, unless Keras has it already. Any
`.npz` file with an array `x_train` (and perhaps `x_test`) of square images
will do as well: `--data images.npz`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import keras
import matplotlib
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import keras_natgrad as kng

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# Widths from the input to the code; the decoder mirrors them.
MNIST_ENCODER = (1000, 500, 250, 30)
DIGITS_ENCODER = (128, 64, 16)
# The error is measured on so many images, and so often or, early on, more.
MEASURED_IMAGES = 2000
MEASUREMENTS = 50
COLORS = {"K-FAC": "#1f6fb4", "Adam": "#e08214"}


# ---- Data and model --------------------------------------------------------


def load_images(data: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns training and held-out images, flat, in [0, 1].

    Args:
        data: `"digits"`, `"mnist"` or the path of an `.npz` file.
        seed: Seed of the split, where the data have none of their own.
    """
    if data == "mnist":
        (train, _), (test, _) = keras.datasets.mnist.load_data()
    elif data == "digits":
        train, test = load_digits().data, None
    else:
        with np.load(data) as file:
            train = file["x_train"]
            test = file["x_test"] if "x_test" in file else None
    if test is None:
        order = np.random.default_rng(seed).permutation(len(train))
        count = len(train) // 6
        train, test = train[order[count:]], train[order[:count]]
    scale = float(train.max())
    return tuple(
        images.reshape(len(images), -1).astype("float32") / scale
        for images in (train, test)
    )


def batches(images: np.ndarray, batch_size: int, seed: int) -> tf.data.Dataset:
    """Returns an endless, shuffled dataset; the targets are the images."""
    return (
        tf.data.Dataset.from_tensor_slices(images)
        .shuffle(len(images), seed=seed)
        .repeat()
        .batch(batch_size, drop_remainder=True)
        .map(lambda x: (x, x))
        .prefetch(2)
    )


def build_autoencoder(features: int, seed: int) -> keras.Model:
    """Returns the autoencoder: tanh units, a linear code, output logits."""
    encoder = DIGITS_ENCODER if features == 64 else MNIST_ENCODER
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    code = encoder[-1]
    return keras.Sequential(
        [
            keras.Input((features,)),
            *(layers.Dense(width, "tanh") for width in encoder[:-1]),
            layers.Dense(code, name="code"),
            *(layers.Dense(width, "tanh") for width in encoder[-2::-1]),
            layers.Dense(features, name="logits"),
        ],
        name="autoencoder",
    )


# ---- One contender ---------------------------------------------------------


@dataclass
class Curve:
    """What was measured, one entry per measurement.

    Attributes:
        steps: Steps taken so far.
        seconds: Seconds trained so far.
        loss: Binary cross-entropy per pixel.
        error: Squared error per image.
    """

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)

    def seconds_to(self, error: float) -> float:
        """Returns when the squared error first came down to `error`."""
        reached = (
            seconds
            for seconds, own in zip(self.seconds, self.error, strict=True)
            if own <= error
        )
        return next(reached, math.inf)


@tf.function(reduce_retracing=True)
def measure(
    model: keras.Model, images: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the cross-entropy per pixel and the squared error per image."""
    logits = model(images, training=False)
    loss = tf.nn.sigmoid_cross_entropy_with_logits(images, logits)
    error = tf.reduce_sum((images - tf.sigmoid(logits)) ** 2, axis=-1)
    return tf.reduce_mean(loss), tf.reduce_mean(error)


class Stopwatch(keras.callbacks.Callback):
    """Measures at intervals of training time, and ends the training.

    Args:
        seconds: Seconds of training; measuring does not count.
        images: The images to measure on.
    """

    def __init__(self, seconds: float, images: tf.Tensor) -> None:
        super().__init__()
        self.budget = seconds
        self.images = images
        self.curve = Curve()
        self.steps = 0
        self.elapsed = 0.0

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Measures the untrained model and starts the clock."""
        self._measure()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Reads the clock; measures where it is time to."""
        _ = float(logs["loss"])  # Waits for an accelerator.
        self.steps += 1
        self.elapsed += time.perf_counter() - self.started
        self.started = time.perf_counter()
        if self.elapsed >= self.budget:
            self.model.stop_training = True
            self._measure()
        elif self.elapsed >= self.next_measurement:
            self._measure()
            # The progress bar shows the mean since the last measurement.
            self.model.reset_metrics()

    def _measure(self) -> None:
        loss, error = measure(self.model, self.images)
        self.curve.steps.append(self.steps)
        self.curve.seconds.append(self.elapsed)
        self.curve.loss.append(float(loss))
        self.curve.error.append(float(error))
        interval = max(0.25 * self.elapsed, 0.1 * self.budget / MEASUREMENTS)
        self.next_measurement = self.elapsed + min(
            interval, self.budget / MEASUREMENTS
        )
        self.started = time.perf_counter()


def warm_up(model: keras.Model, dataset: tf.data.Dataset) -> None:
    """Traces and compiles the training step; all variables stay the same."""
    model.optimizer.build(model.trainable_variables)
    variables = [*model.variables, *model.optimizer.variables]
    before = [variable.numpy() for variable in variables]
    model.fit(dataset.take(2), shuffle=False, verbose=0)
    for variable, value in zip(variables, before, strict=True):
        variable.assign(value)


def train(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    dataset: tf.data.Dataset,
    images: tf.Tensor,
    seconds: float,
) -> Curve:
    """Trains a model for some seconds and returns what was measured."""
    model.compile(
        optimizer, loss=keras.losses.BinaryCrossentropy(from_logits=True)
    )
    warm_up(model, dataset)
    measure(model, images)
    stopwatch = Stopwatch(seconds, images)
    # Into a file, a progress bar would write a line per update.
    verbose = 1 if sys.stdout.isatty() else 2
    model.fit(dataset, shuffle=False, verbose=verbose, callbacks=[stopwatch])
    return stopwatch.curve


# ---- Report ----------------------------------------------------------------


@dataclass
class Result:
    """One contender after training.

    Attributes:
        curve: What was measured on training images.
        held_out: Squared error per held-out image.
        reconstructions: Some held-out images after the autoencoder.
    """

    curve: Curve
    held_out: float
    reconstructions: np.ndarray


def common_error(results: dict[str, Result]) -> float:
    """Returns the final error of the worse contender."""
    return max(result.curve.error[-1] for result in results.values())


def print_table(results: dict[str, Result]) -> None:
    """Prints one row per contender."""
    target = common_error(results)
    table = Table(title="Autoencoder after equal seconds")
    for column in (
        "Optimizer",
        "Steps",
        "Seconds",
        "Loss",
        "Squared error",
        "Held-out squared error",
        f"Seconds to error {target:.3g}",
    ):
        justify = "left" if column == "Optimizer" else "right"
        table.add_column(column, justify=justify, overflow="fold")
    for name, result in results.items():
        curve = result.curve
        table.add_row(
            name,
            f"{curve.steps[-1]:,}",
            f"{curve.seconds[-1]:.1f}",
            f"{curve.loss[-1]:.5f}",
            f"{curve.error[-1]:.4g}",
            f"{result.held_out:.4g}",
            f"{curve.seconds_to(target):.2f}",
        )
    Console(width=100).print(table)
    print(
        "Loss: binary cross-entropy per pixel. Squared error: per image. "
        "Seconds exclude tracing, compilation and measuring."
    )


def caption(results: dict[str, Result]) -> str:
    """Returns the figures in words."""
    target = common_error(results)
    parts = [
        f"{name}: {result.curve.steps[-1]:,} steps in "
        f"{result.curve.seconds[-1]:.1f} s, squared error "
        f"{result.curve.error[-1]:.3g} per image "
        f"(held out: {result.held_out:.3g}); error {target:.3g} after "
        f"{result.curve.seconds_to(target):.2f} s"
        for name, result in results.items()
    ]
    return "\n".join(parts)


def plot(
    results: dict[str, Result], originals: np.ndarray, title: str, path: Path
) -> None:
    """Draws errors over steps and seconds, and reconstructions."""
    figure = plt.figure(figsize=(11, 9.2), layout="constrained")
    figure.suptitle(title, fontsize=15, fontweight="bold")
    top, bottom, foot = figure.subfigures(3, 1, height_ratios=[2.6, 1.5, 0.32])
    plot_curves(top, results)
    plot_images(bottom, results, originals)
    foot.text(0.5, 0.5, caption(results), ha="center", va="center", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_curves(figure, results: dict[str, Result]) -> None:
    """Draws loss (top) and squared error (bottom)."""
    axes = figure.subplots(2, 2, sharey="row", sharex="col")
    rows = (
        ("loss", "Loss (binary cross-entropy)"),
        ("error", "Squared error per image"),
    )
    columns = (("steps", "Steps"), ("seconds", "Seconds of training"))
    for (row, (y, y_label)), (column, (x, x_label)) in itertools.product(
        enumerate(rows), enumerate(columns)
    ):
        axis = axes[row, column]
        for name, result in results.items():
            axis.plot(
                getattr(result.curve, x),
                getattr(result.curve, y),
                label=name,
                color=COLORS[name],
                linewidth=2,
            )
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(minor_label)
        axis.tick_params(axis="y", which="minor", labelsize=8)
        axis.grid(which="both", alpha=0.25, linewidth=0.6)
        if x == "steps":
            axis.set_xscale("symlog", linthresh=10)
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.set_ylabel(y_label)
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
        if row == 0:
            axis.set_title(f"Over {x}")
        else:
            axis.set_xlabel(x_label)
    axes[0, 1].legend(frameon=False, fontsize=11)


def minor_label(value: float, _: int) -> str:
    """Labels 2, 3, 5 and 7 times a power of ten, no other minor tick."""
    leading = value / 10 ** math.floor(math.log10(value))
    return f"{value:g}" if round(leading, 6) in (2, 3, 5, 7) else ""


def plot_images(
    figure, results: dict[str, Result], originals: np.ndarray
) -> None:
    """Draws held-out images, and below them what each contender makes."""
    rows = {
        "Original": originals,
        **{name: result.reconstructions for name, result in results.items()},
    }
    figure.suptitle("Held-out images and their reconstructions", fontsize=12)
    axes = figure.subplots(len(rows), len(originals))
    side = math.isqrt(originals.shape[1])
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(
                image.reshape(side, -1), cmap="gray_r", vmin=0.0, vmax=1.0
            )
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_color("0.8")
        line[0].set_ylabel(
            name,
            rotation=0,
            ha="right",
            va="center",
            fontsize=11,
            color=COLORS.get(name, "black"),
        )


# ---- All together ----------------------------------------------------------


def main(arguments: argparse.Namespace) -> dict[str, Result]:
    """Trains both contenders; prints the table and draws the figure."""
    x_train, x_test = load_images(arguments.data, arguments.seed)
    features = x_train.shape[1]
    batch_size = arguments.batch_size or (256 if features == 64 else 512)
    batch_size = min(batch_size, len(x_train))
    images = tf.constant(x_train[:MEASURED_IMAGES])
    originals = x_test[:12]
    results = {}
    for name in ("K-FAC", "Adam"):
        model = build_autoencoder(features, arguments.seed)
        if name == "K-FAC":
            optimizer = kng.KFAC().attach(model)
        else:
            optimizer = keras.optimizers.Adam(arguments.adam_learning_rate)
        print(f"\n{name}, {arguments.seconds:g} seconds", flush=True)
        dataset = batches(x_train, batch_size, arguments.seed)
        curve = train(model, optimizer, dataset, images, arguments.seconds)
        _, held_out = measure(model, tf.constant(x_test[:MEASURED_IMAGES]))
        reconstructions = tf.sigmoid(model(originals, training=False))
        results[name] = Result(curve, float(held_out), reconstructions.numpy())
    print()
    print_table(results)
    widths = "-".join(
        str(layer.kernel.shape[-1])
        for layer in model.layers
        if hasattr(layer, "kernel")
    )
    title = f"Deep autoencoder {features}-{widths}, batches of {batch_size}"
    plot(results, originals, title, arguments.output)
    print(f"Figure: {arguments.output}")
    return results


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--data",
        default="digits",
        help="digits (bundled with scikit-learn), mnist, or an .npz file",
    )
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="for each contender"
    )
    parser.add_argument(
        "--batch-size", type=int, help="256 for digits, else 512"
    )
    parser.add_argument("--adam-learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "output" / "mnist_autoencoder.png",
        help="the figure",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_arguments())
