"""The problems: a network, its data, a metric and a target for the metric."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import keras
import numpy as np
from keras import ops

from benchmarks.data import batch_indices, glorot_uniform, load_mnist

Batch = tuple[np.ndarray, np.ndarray]


class Task:
    """A dense network to train until a metric falls to a target.

    Args:
        train: Training inputs and targets.
        evaluation: The fixed inputs and targets that the metric is taken on.
        l2: Coefficient of `0.5 * ||weights||²` beside the summed loss (the
            loss before its division by the number of outputs).
        batch_size: Examples per batch, in place of the task's own.

    Attributes:
        name: The task's name on the command line.
        metric: What `evaluate` returns, in words. Lower is better.
        target: The value of the metric to reach.
        sizes: Width of the input and of every layer.
        activations: One activation a layer.
        eval_every: Steps between two evaluations.
        seconds: Default budget of one training run, on the clock.
        tuning_steps: Default step budget of one point of the tuning grid.
        steps_per_execution: Steps run by one call of the compiled function.
            Above one where a step is so short that the call would be a good
            part of it.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    target: ClassVar[float]
    sizes: ClassVar[tuple[int, ...]]
    activations: ClassVar[tuple[str | None, ...]]
    default_batch_size: ClassVar[int]
    eval_every: ClassVar[int] = 20
    seconds: ClassVar[float] = 60.0
    tuning_steps: ClassVar[int] = 5000
    steps_per_execution: ClassVar[int] = 1

    def __init__(
        self,
        train: Batch,
        evaluation: Batch,
        l2: float = 0.0,
        batch_size: int | None = None,
    ) -> None:
        self.train = train
        self.evaluation = tuple(ops.convert_to_tensor(a) for a in evaluation)
        self.l2 = l2
        self.batch_size = min(
            batch_size or self.default_batch_size, len(train[0])
        )

    @property
    def loss_scale(self) -> float:
        """The Keras loss over the summed loss: one over the reduced size."""
        return 1.0

    def loss(self) -> keras.losses.Loss:
        """Returns the training loss."""
        raise NotImplementedError

    def build_model(self, seed: int) -> keras.Model:
        """Builds the network with the weights that belong to a seed."""
        penalty = 0.5 * self.l2 * self.loss_scale
        regularizer = keras.regularizers.L2(penalty) if penalty else None
        names = [f"hidden_{i}" for i in range(len(self.activations) - 1)]
        layers = [
            keras.layers.Dense(
                units,
                activation=activation,
                kernel_regularizer=regularizer,
                bias_regularizer=regularizer,
                name=name,
            )
            for units, activation, name in zip(
                self.sizes[1:],
                self.activations,
                [*names, "output"],
                strict=True,
            )
        ]
        model = keras.Sequential([keras.Input((self.sizes[0],)), *layers])
        for layer, (kernel, bias) in zip(
            layers, glorot_uniform(self.sizes, seed), strict=True
        ):
            layer.set_weights([kernel, bias])
        return model

    def batches(self, seed: int) -> Iterator[Batch]:
        """Yields training batches, the same sequence for every method."""
        x, y = self.train
        for indices in batch_indices(len(x), self.batch_size, seed):
            yield x[indices], y[indices]

    def evaluate(self, model: keras.Model) -> float:
        """Returns the metric of a model on the fixed evaluation set."""
        x, y = self.evaluation
        return float(self.score(y, model(x, training=False)))

    def score(self, y, outputs):
        """Returns the metric as a scalar tensor."""
        return ops.mean(self.loss()(y, outputs))


class Autoencoder(Task):
    """The deep MNIST autoencoder: tanh, a linear code of 30, logits."""

    name = "autoencoder"
    metric = "squared error per image, first 10 000 training images"
    target = 5.0
    sizes = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    activations = ("tanh", "tanh", "tanh", None, "tanh", "tanh", "tanh", None)
    default_batch_size = 1000
    seconds = 600.0
    tuning_steps = 10000

    @property
    def loss_scale(self) -> float:
        return 1.0 / self.sizes[-1]

    def loss(self) -> keras.losses.Loss:
        return keras.losses.BinaryCrossentropy(from_logits=True)

    def score(self, y, outputs):
        error = ops.square(ops.sigmoid(outputs) - y)
        return ops.mean(ops.sum(error, axis=-1))


class Classifier(Task):
    """A narrow ReLU classifier of MNIST.

    The target is a training loss that Adam with a constant learning rate
    reaches after about 20 epochs (2 500 steps). The loss is used rather than
    the test accuracy because it is smooth enough to tell steps apart.
    """

    name = "classifier"
    metric = "cross-entropy, first 10 000 training images"
    target = 0.01
    sizes = (784, 80, 80, 80, 10)
    activations = ("relu", "relu", "relu", None)
    default_batch_size = 500
    tuning_steps = 8000
    steps_per_execution = 10

    def loss(self) -> keras.losses.Loss:
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class MeanSquaredErrorTask(Task):
    """A regression: the mean squared error is both loss and metric."""

    steps_per_execution = 10

    @property
    def loss_scale(self) -> float:
        return 1.0 / self.sizes[-1]

    def loss(self) -> keras.losses.Loss:
        return keras.losses.MeanSquaredError()


class Diabetes(MeanSquaredErrorTask):
    """The diabetes data of scikit-learn, standardised, fitted closely.

    442 points and 1 441 weights: the target, a thousandth of the variance,
    asks for nearly exact interpolation. It is a test of optimization, not of
    prediction.
    """

    name = "diabetes"
    metric = "mean squared error, training set"
    target = 0.001
    sizes = (10, 32, 32, 1)
    activations = ("tanh", "tanh", None)
    default_batch_size = 64
    tuning_steps = 10000


class IllConditioned(MeanSquaredErrorTask):
    """A teacher seen through features whose scales spread over 10³.

    The covariance of the inputs has condition number 10⁶, and a random
    rotation hides its axes, so no rescaling of single features undoes it.
    The teacher works on the white variables: every direction matters alike.
    The target, a twentieth of the variance, takes Adam with a constant
    learning rate some 15 000 steps.
    """

    name = "ill_conditioned"
    metric = "mean squared error, 5 000 held-out points"
    target = 0.05
    sizes = (20, 64, 64, 1)
    activations = ("tanh", "tanh", None)
    default_batch_size = 256
    tuning_steps = 20000


def standardise(values: np.ndarray) -> np.ndarray:
    """Shifts and scales every column to mean zero and variance one."""
    return (values - values.mean(0)) / values.std(0)


def diabetes_data() -> Batch:
    """Returns the standardised diabetes data of scikit-learn."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    return (
        standardise(x).astype("float32"),
        standardise(y[:, None]).astype("float32"),
    )


def ill_conditioned_data(size: int, features: int = 20, seed: int = 0) -> Batch:
    """Draws the ill-conditioned regression.

    Args:
        size: Number of points.
        features: Number of input features.
        seed: Seed of the rotation, the teacher and the points.

    Returns:
        Inputs `(size, features)` and targets `(size, 1)`, the targets
        standardised.
    """
    generator = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(generator.normal(size=(features, features)))
    hidden = generator.normal(size=(features, 16)) / np.sqrt(features)
    readout = generator.normal(size=(16, 1))
    white = generator.normal(size=(size, features))
    scales = np.logspace(0.0, -3.0, features)
    x = (white * scales) @ rotation * np.sqrt(features)
    y = standardise(np.tanh(white @ hidden) @ readout)
    return x.astype("float32"), y.astype("float32")


TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (Autoencoder, Classifier, Diabetes, IllConditioned)
}


def make_task(
    name: str,
    data: str | Path | None = None,
    l2: float = 0.0,
    batch_size: int | None = None,
) -> Task:
    """Builds a task by name.

    Args:
        name: One of the keys of `TASKS`.
        data: MNIST file for the tasks that use it, see `load_mnist`.
        l2: See `Task`.
        batch_size: See `Task`.

    Returns:
        The task with its data in memory.

    Raises:
        ValueError: If the name is unknown.
    """
    if name == "diabetes":
        train = evaluation = diabetes_data()
    elif name == "ill_conditioned":
        x, y = ill_conditioned_data(25000)
        train, evaluation = (x[5000:], y[5000:]), (x[:5000], y[:5000])
    elif name in TASKS:
        train, evaluation = _mnist_data(name, data)
    else:
        raise ValueError(
            f"`name` must be one of {sorted(TASKS)}. Received: name={name!r}"
        )
    return TASKS[name](train, evaluation, l2, batch_size)


def _mnist_data(name: str, data: str | Path | None) -> Sequence[Batch]:
    mnist = load_mnist(data)
    x, y = mnist["x_train"], mnist["y_train"]
    if name == "autoencoder":
        return (x, x), (x[:10000], x[:10000])
    return (x, y), (x[:10000], y[:10000])
