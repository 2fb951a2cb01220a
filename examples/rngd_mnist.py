"""Title: Relative natural gradient descent on MNIST.

Author: keras_natgrad authors
Description: The experiment of Sun & Nielsen (2017): a rectifier network with
    an L2 penalty, trained by RNGD, by SGD and by Adam, the latter also with
    batch normalisation before (BNB) and after (BNA) the activations.
Accelerator: None

Every method is run at two learning rates and with several seeds; the rate with
the best mean validation accuracy after the last epoch is shown. The training
cost includes the penalty. Seconds are those of `fit` alone, without the first
steps, which trace and compile; measuring does not count.

    python examples/rngd_mnist.py
    python examples/rngd_mnist.py --data mnist.npz --epochs 50 --seeds 5
    python examples/rngd_mnist.py --data mnist.npz --methods K-FAC FOOF RNGD \
        "RNGD horizon 2" "RNGD horizon full" --epochs 100 --seconds 20

The first runs offline, on the 8×8 digits that come with scikit-learn; the
second reads an `.npz` file in the layout of `keras.datasets.mnist`, and
`--data mnist` downloads that. The third compares curvatures at equal seconds.
`--shape 80 60 40 40 40 20` and the like give the deeper networks of the
document. `--first-seed` and `--out` share the seeds out over processes, and
`--stored a.json b.json` draws what they wrote.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, field
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

CLASSES = 10
METHODS = {
    "RNGD": ("rngd", ""),
    "RNGD, authors' setting": ("authors", ""),
    "SGD": ("sgd", ""),
    "SGD BNB": ("sgd", "before"),
    "SGD BNA": ("sgd", "after"),
    "Adam": ("adam", ""),
    "Adam BNB": ("adam", "before"),
    "Adam BNA": ("adam", "after"),
    "K-FAC": ("kfac", ""),
    "FOOF": ("foof", ""),
    "RNGD horizon 2": ("rngd 2", ""),
    "RNGD horizon full": ("rngd full", ""),
}
# The others are a matter of `--methods`.
DEFAULT_METHODS = [
    "RNGD",
    "RNGD, authors' setting",
    "SGD",
    "Adam",
    "Adam BNB",
    "Adam BNA",
]
COLORS = dict(zip(METHODS, plt.get_cmap("tab20").colors, strict=False))
# Steps that the training function makes at a call: a call costs as much as a
# few small steps.
STEPS_PER_CALL = 50


# ---- Data and model --------------------------------------------------------


def load(data: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns all images, flat, in [0, 1], and their labels.

    Args:
        data: `"digits"`, `"mnist"` or the path of an `.npz` file.
    """
    if data == "digits":
        digits = load_digits()
        images, labels = digits.data, digits.target
    else:
        if data == "mnist":
            (x, y), (x_test, y_test) = keras.datasets.mnist.load_data()
        else:
            with np.load(data) as file:
                x, y = file["x_train"], file["y_train"]
                x_test, y_test = file["x_test"], file["y_test"]
        images = np.concatenate([x, x_test])
        labels = np.concatenate([y, y_test])
    flat = images.reshape(len(images), -1).astype("float32")
    return flat / flat.max(), labels.astype("int32")


def build(
    features: int, shape: list[int], norm: str, penalty: float, seed: int
) -> keras.Model:
    """Returns the network; `norm` is "", "before" or "after"."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    l2 = keras.regularizers.L2(penalty / 2)
    model = keras.Sequential([keras.Input((features,))])
    for width in shape:
        inside = None if norm == "before" else "relu"
        model.add(layers.Dense(width, inside, kernel_regularizer=l2))
        if norm:
            model.add(layers.BatchNormalization())
        if norm == "before":
            model.add(layers.Activation("relu"))
    model.add(layers.Dense(CLASSES, kernel_regularizer=l2))
    return model


def make_optimizer(kind: str, rate: float) -> keras.optimizers.Optimizer:
    """Returns an optimizer by its short name."""
    if kind == "sgd":
        return keras.optimizers.SGD(rate)
    if kind == "adam":
        return keras.optimizers.Adam(rate)
    if kind == "kfac":  # It chooses the rate itself.
        return kng.KFAC()
    if kind == "foof":
        return kng.PRONG(rate)
    if kind == "rngd 2":
        return kng.RNGD(rate, horizon=2)
    if kind == "rngd full":
        return kng.RNGD(rate, horizon="full")
    if kind == "rngd":
        return kng.RNGD(rate)
    return kng.RNGD(
        rate,
        ends="inputs",
        metric_decay=0.995,
        metric_update_period=1,
        refresh_growth=None,
        identity_start=True,
    )


# ---- One run ---------------------------------------------------------------


@dataclass
class Run:
    """One method, rate and seed; one entry per epoch.

    Attributes:
        method: Name of the method.
        rate: Learning rate.
        seed: Seed of the weights and the order of the batches.
        seconds: Seconds trained so far.
        cost: Training cost with the penalty.
        accuracy: Validation accuracy.
        test_accuracy: Test accuracy, after the last epoch.
    """

    method: str
    rate: float
    seed: int
    seconds: list[float] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    test_accuracy: float = 0.0


def train(run: Run, splits: dict, arguments: argparse.Namespace) -> None:
    """Trains one network and fills in what was measured."""
    kind, norm = METHODS[run.method]
    x, y = splits["train"]
    model = build(
        x.shape[1], arguments.shape, norm, arguments.l2, 2017 + run.seed
    )
    optimizer = make_optimizer(kind, run.rate)
    if hasattr(optimizer, "attach"):
        optimizer.attach(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    batches = (
        tf.data.Dataset.from_tensor_slices((x, y))
        .cache()
        .shuffle(len(x), seed=run.seed)
        .batch(arguments.batch_size, drop_remainder=True)
        .prefetch(2)
    )
    # The thread that tunes a pipeline sleeps twice as long each time, and an
    # epoch ends only when it wakes: on the clock, up to twice the time.
    options = tf.data.Options()
    options.autotune.enabled = False
    batches = batches.with_options(options)
    model.compile(
        optimizer,
        loss,
        metrics=["accuracy"],
        steps_per_execution=steps_per_call(len(batches)),
        jit_compile=False,
    )
    warm_up(model, batches)
    elapsed = 0.0
    for _ in range(arguments.epochs):
        if arguments.seconds is not None and elapsed >= arguments.seconds:
            break
        started = time.perf_counter()
        model.fit(batches, verbose=0)
        elapsed += time.perf_counter() - started
        cost, _ = model.evaluate(x, y, batch_size=1000, verbose=0)
        _, accuracy = model.evaluate(
            *splits["validation"], batch_size=1000, verbose=0
        )
        run.seconds.append(round(elapsed, 3))
        run.cost.append(round(cost, 5))
        run.accuracy.append(round(accuracy, 5))
    _, run.test_accuracy = model.evaluate(
        *splits["test"], batch_size=1000, verbose=0
    )


def steps_per_call(steps: int) -> int:
    """Returns the largest number below `STEPS_PER_CALL` that divides them."""
    counts = range(min(steps, STEPS_PER_CALL), 0, -1)
    return next(count for count in counts if steps % count == 0)


def warm_up(model: keras.Model, batches: tf.data.Dataset) -> None:
    """Traces the training function; all variables stay the same."""
    model.optimizer.build(model.trainable_variables)
    variables = [*model.variables, *model.optimizer.variables]
    before = [variable.numpy() for variable in variables]
    model.fit(batches.take(steps_per_call(len(batches))), verbose=0)
    for variable, value in zip(variables, before, strict=True):
        variable.assign(value)


# ---- Report ----------------------------------------------------------------


def best_rates(runs: list[Run]) -> dict[str, list[Run]]:
    """Returns the runs of each method at its best rate."""
    found: dict[str, dict[float, list[Run]]] = {}
    for run in runs:
        found.setdefault(run.method, {}).setdefault(run.rate, []).append(run)

    def last_accuracy(group: list[Run]) -> float:
        return float(np.mean([run.accuracy[-1] for run in group]))

    return {
        method: max(groups.values(), key=last_accuracy)
        for method, groups in found.items()
    }


def rate_label(run: Run) -> str:
    """Returns the rate as text; K-FAC chooses its own."""
    return "auto" if METHODS[run.method][0] == "kfac" else f"{run.rate:g}"


def print_table(best: dict[str, list[Run]]) -> None:
    """Prints one row per method."""
    table = Table(title="After the last epoch, mean over seeds")
    for column in (
        "Method",
        "Rate",
        "Training cost",
        "Validation accuracy %",
        "Test accuracy %",
        "Seconds",
    ):
        justify = "left" if column == "Method" else "right"
        table.add_column(column, justify=justify)
    for method, runs in best.items():
        means = [
            float(np.mean([getattr(run, name)[-1] for run in runs]))
            for name in ("cost", "accuracy", "seconds")
        ]
        table.add_row(
            method,
            rate_label(runs[0]),
            f"{means[0]:.4f}",
            f"{100 * means[1]:.2f}",
            f"{100 * np.mean([run.test_accuracy for run in runs]):.2f}",
            f"{means[2]:.2f}",
        )
    Console(width=100).print(table)


def plot(best: dict[str, list[Run]], title: str, path: Path) -> None:
    """Draws cost and accuracy over epochs and seconds."""
    figure, axes = plt.subplots(
        2, 2, figsize=(11, 8), sharex="col", sharey="row", layout="constrained"
    )
    figure.suptitle(title)
    for method, runs in best.items():
        # With a limit in seconds not every seed comes equally far.
        shortest = min(len(run.cost) for run in runs)
        mean = {
            name: np.mean([getattr(run, name)[:shortest] for run in runs], 0)
            for name in ("seconds", "cost", "accuracy")
        }
        epochs = np.arange(1, len(mean["cost"]) + 1)
        label = f"{method}, {rate_label(runs[0])}"
        for row, name in enumerate(("cost", "accuracy")):
            for column, x in enumerate((epochs, mean["seconds"])):
                axes[row, column].plot(
                    x, mean[name], label=label, color=COLORS[method]
                )
    for axis, text in zip(axes[1], ("Epochs", "Seconds"), strict=True):
        axis.set_xlabel(text)
    axes[0, 0].set_ylabel("Training cost with penalty")
    axes[1, 0].set_ylabel("Validation accuracy")
    axes[0, 0].set_yscale("log")
    axes[0, 1].legend(frameon=False, fontsize=9)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---- All together ----------------------------------------------------------


def split(images: np.ndarray, labels: np.ndarray) -> dict:
    """Returns test, validation (a seventh each) and training data."""
    order = np.random.default_rng(2017).permutation(len(images))
    part = len(order) // 7
    parts = {
        "test": order[:part],
        "validation": order[part : 2 * part],
        "train": order[2 * part :],
    }
    return {name: (images[own], labels[own]) for name, own in parts.items()}


def train_all(splits: dict, arguments: argparse.Namespace) -> list[Run]:
    """Trains every method at every rate, seed by seed."""
    runs = []
    first = arguments.first_seed
    for seed in range(first, first + arguments.seeds):
        for method in arguments.methods:
            rates = arguments.learning_rates
            for rate in rates[:1] if METHODS[method][0] == "kfac" else rates:
                run = Run(method, rate, seed)
                train(run, splits, arguments)
                runs.append(run)
                print(
                    f"{method}, {rate_label(run)}, seed {seed}: validation "
                    f"{100 * run.accuracy[-1]:.2f} %, {run.seconds[-1]:.1f} s",
                    flush=True,
                )
                save(runs, arguments)
    return runs


def save(runs: list[Run], arguments: argparse.Namespace) -> None:
    """Writes what was found so far, where `--out` asks for it."""
    if not arguments.out:
        return
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(arguments).items()
    }
    results = {"settings": settings, "runs": [asdict(run) for run in runs]}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


def stored(paths: list[Path]) -> list[Run]:
    """Returns the runs of files that `save` wrote."""
    return [
        Run(**each)
        for path in paths
        for each in json.loads(path.read_text())["runs"]
    ]


def main(arguments: argparse.Namespace) -> list[Run]:
    """Runs everything; prints the table, draws the figure, writes JSON."""
    images, labels = load(arguments.data)
    runs = stored(arguments.stored) if arguments.stored else []
    if not runs:
        runs = train_all(split(images, labels), arguments)
    best = best_rates(runs)
    print_table(best)
    widths = "-".join(map(str, [images.shape[1], *arguments.shape, CLASSES]))
    title = f"{widths}, batches of {arguments.batch_size}"
    plot(best, title, arguments.output)
    print(f"Figure: {arguments.output}")
    return runs


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
        "--shape", type=int, nargs="+", default=[80, 80, 80], help="widths"
    )
    parser.add_argument(
        "--methods", nargs="+", default=DEFAULT_METHODS, choices=list(METHODS)
    )
    parser.add_argument(
        "--learning-rates", type=float, nargs="+", default=[1e-2, 5e-3]
    )
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, help="no epoch begins after so many"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--l2", type=float, default=1e-3)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "output" / "rngd_mnist.png",
        help="the figure",
    )
    parser.add_argument("--out", type=Path, help="results as JSON")
    parser.add_argument(
        "--stored", type=Path, nargs="+", help="results to draw, not to train"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_arguments())
