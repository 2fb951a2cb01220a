"""Title: Natural gradient by conjugate gradients, and what passes for it.

Author: keras_natgrad authors
Description: Repeat the comparison of B. Gebotys, "Natural Gradient Descent
    without the Tears", beside the natural gradient with the true Fisher.
Accelerator: None

The network is 784-128-10 with relu, batches of 128, two epochs. The post's
table has three rows, all with Adam at 1e-3 on top of a direction:

- "Vanilla-SGD" is Adam.
- "Natural Gradient (Empirical)" multiplies by `v ↦ ḡ (ḡᵀv)`, ḡ the gradient
  of the mean loss: an operator of rank one in place of the mean of the outer
  products per example. `ḡḡᵀ x = ḡ` has the solution `ḡ / ‖ḡ‖²`, which
  conjugate gradients find in one iteration.
- "Natural Gradient" draws one label per example from the model; ḡ_s is the
  gradient of the mean loss with these labels. `(ḡ_s ḡ_sᵀ + λI) x = ḡ` is
  solved by `(ḡ − ḡ_s ḡ_sᵀḡ / (λ + ‖ḡ_s‖²)) / λ`, λ = 1e-3: the gradient
  with one direction deflated.

Adam does not see the scale of a direction, so all three are close to Adam.
The other two rows solve with the Fisher `(1/N) Σ J_iᵀ F_i J_i` and step along
the solution, without Adam: by at most ten iterations of conjugate gradients, as
in the post, with a learning rate and damping picked by their accuracy here from
six settings (four constant rates with a damping each, two with a cosine
schedule; the picked one is constant); and by default arguments, which solve
exactly, make full steps and fit the damping to each batch alone. That is meant
for large batches; on these it follows the noise of each.

    python examples/natural_gradient_cg.py
    python examples/natural_gradient_cg.py --data mnist

The first runs offline, on the 8×8 digits that come with scikit-learn; the
second downloads MNIST, unless Keras has it already. An `.npz` file in the
layout of Keras's MNIST will do as well: `--data mnist.npz`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import keras_natgrad as kng

LEARNING_RATE = 1e-3
# λ of the post's sampled row.
DEFLATION_DAMPING = 1e-3
# Of the row by conjugate gradients.
ITERATIONS = 10
# Accuracy in per cent and seconds, as the post gives them for MNIST.
POST = {
    "Adam": (95.99, 53),
    "Adam on the gradient over its squared norm": (96.25, 58),
    "Adam on the gradient with one sampled direction deflated": (95.82, 75),
}


class Result(NamedTuple):
    """One row of the table.

    Attributes:
        accuracy: On held-out images.
        loss: Mean cross-entropy on held-out images.
        steps: Steps taken.
        seconds: Seconds of training.
    """

    accuracy: float
    loss: float
    steps: int
    seconds: float


# ---- Data and model --------------------------------------------------------


def load_images(data: str, seed: int) -> tuple[tuple[np.ndarray, ...], ...]:
    """Returns training and held-out images, flat in [0, 1], with labels.

    Args:
        data: `"digits"`, `"mnist"` or the path of an `.npz` file.
        seed: Seed of the split of the digits.
    """
    if data == "mnist":
        train, test = keras.datasets.mnist.load_data()
    elif data == "digits":
        x, y = load_digits(return_X_y=True)
        order = np.random.default_rng(seed).permutation(len(x))
        x, y = x[order], y[order]
        train, test = (x[:1437], y[:1437]), (x[1437:], y[1437:])
    else:
        with np.load(data) as file:
            train, test = (
                (file[f"x_{part}"], file[f"y_{part}"])
                for part in ("train", "test")
            )
    scale = float(train[0].max())
    return tuple(
        (x.reshape(len(x), -1).astype("float32") / scale, y.astype("int32"))
        for x, y in (train, test)
    )


def batches(
    data: tuple[np.ndarray, ...], batch_size: int, seed: int
) -> tf.data.Dataset:
    """Returns one epoch, shuffled anew each time, of whole batches."""
    dataset = (
        tf.data.Dataset.from_tensor_slices(data)
        .shuffle(len(data[0]), seed=seed)
        .batch(batch_size, drop_remainder=True)
        .prefetch(2)
    )
    # The thread that tunes a pipeline sleeps twice as long each time, and an
    # epoch ends only when it wakes: on the clock, up to twice the time.
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def network_layers(features: int) -> list[keras.layers.Layer]:
    return [
        keras.Input((features,)),
        keras.layers.Dense(128, "relu"),
        keras.layers.Dense(10),
    ]


# ---- The post's directions -------------------------------------------------

Gradients = list[tf.Tensor]


def inner(left: Gradients, right: Gradients) -> tf.Tensor:
    pairs = zip(left, right, strict=True)
    return tf.add_n([tf.reduce_sum(a * b) for a, b in pairs])


def over_squared_norm(gradient: Gradients, _: Gradients) -> Gradients:
    """Returns `ḡ / ‖ḡ‖²`."""
    square = inner(gradient, gradient)
    return [tf.math.divide_no_nan(part, square) for part in gradient]


def deflated(gradient: Gradients, sampled: Gradients) -> Gradients:
    """Returns `(ḡ − ḡ_s ḡ_sᵀḡ / (λ + ‖ḡ_s‖²)) / λ`."""
    damping = DEFLATION_DAMPING
    share = inner(sampled, gradient) / (damping + inner(sampled, sampled))
    return [
        (g - share * s) / damping
        for g, s in zip(gradient, sampled, strict=True)
    ]


class DirectionModel(keras.Sequential):
    """A network whose optimizer gets a direction in place of the gradient.

    Args:
        layers: The layers.
        direction: Function of the gradient and of the gradient for labels
            drawn from the model.
    """

    def __init__(
        self,
        layers: list[keras.layers.Layer],
        direction: Callable[[Gradients, Gradients], Gradients],
    ) -> None:
        super().__init__(layers)
        self.direction = direction

    def train_step(
        self, data: tuple[tf.Tensor, tf.Tensor]
    ) -> dict[str, tf.Tensor]:
        """Makes one step."""
        x, y = data
        with tf.GradientTape(persistent=True) as tape:
            logits = self(x, training=True)
            loss = self.compute_loss(x, y, logits)
            drawn = tf.random.categorical(tf.stop_gradient(logits), 1)[:, 0]
            sampled_loss = self.compute_loss(x, drawn, logits)
        variables = self.trainable_variables
        direction = self.direction(
            tape.gradient(loss, variables),
            tape.gradient(sampled_loss, variables),
        )
        self.optimizer.apply_gradients(zip(direction, variables, strict=True))
        return self.compute_metrics(x, y, logits)


# ---- Contenders ------------------------------------------------------------


def build(
    name: str, features: int, arguments: argparse.Namespace
) -> keras.Model:
    """Returns a compiled model; all start from the same weights."""
    keras.utils.set_random_seed(arguments.seed)
    layers = network_layers(features)
    rules = dict(zip(POST, (None, over_squared_norm, deflated), strict=True))
    rule = rules.get(name)
    model = DirectionModel(layers, rule) if rule else keras.Sequential(layers)
    if name in POST:
        optimizer = keras.optimizers.Adam(LEARNING_RATE)
    elif name == "Natural gradient, conjugate gradients":
        rate = arguments.learning_rate or (0.3 if features == 64 else 0.03)
        optimizer = kng.NaturalGradient(
            rate,
            damping=arguments.damping,
            solver=kng.solvers.ConjugateGradient(ITERATIONS),
        ).attach(model)
    else:
        optimizer = kng.NaturalGradient().attach(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


CONTENDERS = (
    *POST,
    "Natural gradient, conjugate gradients",
    "Natural gradient, default arguments",
)


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
    train_data: tuple[np.ndarray, ...],
    test_data: tuple[np.ndarray, ...],
    arguments: argparse.Namespace,
) -> Result:
    """Trains one contender and measures it on held-out images."""
    dataset = batches(train_data, arguments.batch_size, arguments.seed)
    warm_up(model, dataset)
    # Like all others it sees the first epoch's order first.
    dataset = batches(train_data, arguments.batch_size, arguments.seed)
    started = time.perf_counter()
    model.fit(dataset, shuffle=False, epochs=arguments.epochs, verbose=0)
    seconds = time.perf_counter() - started
    loss, accuracy = model.evaluate(*test_data, batch_size=1000, verbose=0)
    return Result(accuracy, loss, int(model.optimizer.iterations), seconds)


# ---- Report ----------------------------------------------------------------


def print_table(results: dict[str, Result], is_mnist: bool) -> None:
    """Prints one row per contender, the post's figures beside it."""
    table = Table(title="Held-out accuracy")
    table.add_column("Optimizer", max_width=44)
    columns = ["Accuracy, %", "Loss", "Steps", "Seconds"]
    if is_mnist:
        columns += ["Post: %", "Post: s"]
    for column in columns:
        table.add_column(column, justify="right")
    for name, result in results.items():
        row = [
            f"{100.0 * result.accuracy:.2f}",
            f"{result.loss:.3f}",
            f"{result.steps:,}",
            f"{result.seconds:.1f}",
        ]
        if is_mnist:
            row += [str(figure) for figure in POST.get(name, ("", ""))]
        table.add_row(name, *row)
    Console(width=100).print(table)


def main(arguments: argparse.Namespace) -> dict[str, Result]:
    """Trains all contenders and prints the table."""
    train_data, test_data = load_images(arguments.data, arguments.seed)
    features = train_data[0].shape[1]
    results = {}
    for name in CONTENDERS:
        print(f"{name} ...", flush=True)
        model = build(name, features, arguments)
        results[name] = train(model, train_data, test_data, arguments)
    print_table(results, is_mnist=features == 784)
    print("Seconds exclude tracing and compilation.")
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
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument(
        "--learning-rate",
        type=float,
        help="of the row by conjugate gradients; 0.3 for digits, else 0.03",
    )
    parser.add_argument(
        "--damping",
        type=float,
        default=0.01,
        help="of the row by conjugate gradients",
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_arguments())
