"""Title: A natural neural network against gradient descent.

Author: keras_natgrad authors
Description: Train a deep autoencoder by gradient descent, by PRONG, and by
    gradient descent on whitened layers, which is PRONG in another form, each
    with the best of three learning rates.
Accelerator: None, or a GPU for `--data mnist`

All contenders start from the same weights and see the same batches. The clock
runs while `fit` trains, from the second epoch on: in the first one TensorFlow
traces the training step.

    python examples/prong.py
    python examples/prong.py --data mnist.npz --epochs 5

The first runs offline, on the 8×8 digits that come with scikit-learn; the
second reads an `.npz` file with an array `x_train` (and perhaps `x_test`) of
square images, such as MNIST's. `--data mnist` downloads it, unless Keras has it
already.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
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
MNIST_ENCODER = (256, 64, 16)
DIGITS_ENCODER = (64, 32, 8)
WHITENING_IMAGES = 1000
COLORS = {"SGD": "#e08214", "PRONG": "#1f6fb4", "Whitened SGD": "#4d9221"}


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


def build_autoencoder(features: int, seed: int) -> keras.Model:
    """Returns the autoencoder: tanh units, a linear code, output logits."""
    encoder = DIGITS_ENCODER if features == 64 else MNIST_ENCODER
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((features,)),
            *(layers.Dense(width, "tanh") for width in encoder[:-1]),
            layers.Dense(encoder[-1], name="code"),
            *(layers.Dense(width, "tanh") for width in encoder[-2::-1]),
            layers.Dense(features, name="logits"),
        ],
        name="autoencoder",
    )


# ---- The contenders --------------------------------------------------------


@dataclass
class Result:
    """One contender with one learning rate.

    Attributes:
        learning_rate: The rate.
        loss: Cross-entropy per pixel, mean over the batches of each epoch.
        held_out: The same on held-out images, at the end.
        milliseconds: Of a step, whitening included.
        steps: Per epoch.
    """

    learning_rate: float
    loss: list[float]
    held_out: float
    milliseconds: float
    steps: int


class Clock(keras.callbacks.Callback):
    """Notes the loss and the seconds of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.loss: list[float] = []
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.started = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.seconds.append(time.perf_counter() - self.started)
        self.loss.append(float(logs["loss"]))


def batches(images: np.ndarray, batch_size: int, seed: int) -> tf.data.Dataset:
    """Returns one epoch, shuffled anew each time; targets are the images."""
    dataset = (
        tf.data.Dataset.from_tensor_slices((images, images))
        .shuffle(len(images), seed=seed)
        .batch(batch_size)
        .prefetch(2)
    )
    # The thread that tunes a pipeline sleeps twice as long each time, and an
    # epoch ends only when it wakes: on the clock, up to twice the time.
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def measure(model: keras.Model, images: np.ndarray) -> float:
    """Returns the cross-entropy per pixel of all images."""
    return float(model.evaluate(images, images, batch_size=1000, verbose=0))


def contender(
    name: str, model: keras.Model, rate: float, images: np.ndarray
) -> tuple[keras.Model, keras.optimizers.Optimizer, list]:
    """Returns the model to train, its optimizer and its callbacks."""
    if name == "SGD":
        return model, keras.optimizers.SGD(rate), []
    if name == "PRONG":
        return model, kng.PRONG(rate).attach(model), []
    model = kng.layers.whitened(model)
    whiten = kng.callbacks.Whiten(images[:WHITENING_IMAGES])
    return model, keras.optimizers.SGD(rate), [whiten]


def train(
    name: str,
    rate: float,
    images: tuple[np.ndarray, np.ndarray],
    arguments: argparse.Namespace,
) -> Result:
    """Trains one contender with one learning rate."""
    train_images, held_out = images
    model = build_autoencoder(train_images.shape[1], arguments.seed)
    model, optimizer, callbacks = contender(name, model, rate, train_images)
    model.compile(
        optimizer, loss=keras.losses.BinaryCrossentropy(from_logits=True)
    )
    clock = Clock()
    keras.utils.set_random_seed(arguments.seed)
    model.fit(
        batches(train_images, arguments.batch_size, arguments.seed),
        shuffle=False,
        epochs=arguments.epochs,
        callbacks=[*callbacks, clock],
        verbose=0,
    )
    steps = math.ceil(len(train_images) / arguments.batch_size)
    seconds = clock.seconds[1:] or clock.seconds
    return Result(
        rate,
        clock.loss,
        measure(model, held_out),
        1e3 * float(np.mean(seconds)) / steps,
        steps,
    )


def best(results: list[Result]) -> Result:
    """Returns the result with the lowest final loss."""
    return min(
        results,
        key=lambda r: r.loss[-1] if math.isfinite(r.loss[-1]) else math.inf,
    )


# ---- Report ----------------------------------------------------------------


def print_table(results: dict[str, Result]) -> None:
    """Prints one row per contender."""
    table = Table(title="Autoencoder, best learning rate of each")
    for column in (
        "Method",
        "Learning rate",
        "Epochs",
        "Loss",
        "Held-out loss",
        "Milliseconds per step",
    ):
        justify = "left" if column == "Method" else "right"
        table.add_column(column, justify=justify, overflow="fold")
    for name, result in results.items():
        table.add_row(
            name,
            f"{result.learning_rate:g}",
            str(len(result.loss)),
            f"{result.loss[-1]:.5f}",
            f"{result.held_out:.5f}",
            f"{result.milliseconds:.2f}",
        )
    Console(width=100).print(table)
    print("Loss: binary cross-entropy per pixel.")


def plot(results: dict[str, Result], title: str, path: Path) -> None:
    """Draws the loss over epochs and over seconds."""
    figure, axes = plt.subplots(
        1, 2, sharey=True, figsize=(10, 4.8), layout="constrained"
    )
    figure.suptitle(title, fontsize=14, fontweight="bold")
    for name, result in results.items():
        epochs = np.arange(1, len(result.loss) + 1)
        style = {
            "color": COLORS[name],
            "linestyle": "--" if name == "Whitened SGD" else "-",
            "linewidth": 2,
        }
        axes[0].plot(epochs, result.loss, label=name, **style)
        seconds = 1e-3 * epochs * result.steps * result.milliseconds
        axes[1].plot(seconds, result.loss, **style)
    axes[0].set(xlabel="Epochs", ylabel="Loss (binary cross-entropy)")
    axes[1].set_xlabel("Seconds of training, without tracing")
    for axis in axes:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(which="both", alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---- All together ----------------------------------------------------------


def main(arguments: argparse.Namespace) -> dict[str, Result]:
    """Trains all contenders; prints the table, draws, writes the JSON."""
    images = load_images(arguments.data, arguments.seed)
    everything = {
        name: [
            train(name, rate, images, arguments)
            for rate in (
                arguments.sgd_learning_rates
                if name == "SGD"
                else arguments.learning_rates
            )
        ]
        for name in COLORS
    }
    results = {name: best(each) for name, each in everything.items()}
    print_table(results)
    features = images[0].shape[1]
    title = f"Autoencoder of {features} pixels, batches of "
    plot(results, f"{title}{arguments.batch_size}", arguments.output)
    print(f"Figure: {arguments.output}")
    if arguments.out is not None:
        report = {
            "data": str(arguments.data),
            "batch_size": arguments.batch_size,
            "epochs": arguments.epochs,
            "seed": arguments.seed,
            "results": {
                name: [asdict(result) for result in each]
                for name, each in everything.items()
            },
        }
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
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
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument(
        "--learning-rates",
        type=float,
        nargs="+",
        default=[0.1, 0.2, 0.4],
        help="the grid of the natural networks",
    )
    parser.add_argument(
        "--sgd-learning-rates",
        type=float,
        nargs="+",
        default=[1.0, 3.0, 10.0],
        help="the grid of gradient descent on the plain network",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file of all results")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "output" / "prong.png",
        help="the figure",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_arguments())
