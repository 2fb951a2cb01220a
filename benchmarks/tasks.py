"""The problems: a network, its data, a metric and a target for the metric."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import keras
import numpy as np
from keras import ops

from benchmarks.data import (
    batch_indices,
    diabetes_data,
    glorot_uniform,
    ill_conditioned_data,
    images,
    load_mnist,
)
from benchmarks.resnet import build_resnet, estimate_statistics
from benchmarks.transformer import (
    build_transformer,
    encode,
    help_text,
    windows,
)

Batch = tuple[np.ndarray, np.ndarray]


class Task:
    """A network to train until a metric falls to a target.

    Args:
        train: Training inputs and targets.
        evaluation: The fixed inputs and targets that the metric is taken on.
        batch_size: Examples per batch, in place of the task's own.

    Attributes:
        name: The task's name on the command line.
        metric: What `evaluate` returns, in words. Lower is better.
        target: The value of the metric to reach.
        eval_every: Steps between two evaluations.
        eval_batch: Examples that are evaluated at once.
        seconds: Default budget of one training run, on the clock.
        tuning_steps: Default step budget of one point of the tuning grid.
        steps_per_execution: Steps run by one call of the compiled function.
            Above one where a step is so short that the call would be a good
            part of it.
        loss_weight: Factor of the training loss, or `None` for one.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    target: ClassVar[float]
    default_batch_size: ClassVar[int]
    eval_every: ClassVar[int] = 20
    eval_batch: ClassVar[int] = 10000
    seconds: ClassVar[float] = 60.0
    tuning_steps: ClassVar[int] = 5000
    steps_per_execution: ClassVar[int] = 1
    loss_weight: float | None = None

    def __init__(
        self,
        train: Batch,
        evaluation: Batch,
        batch_size: int | None = None,
    ) -> None:
        self.train = train
        self.evaluation = tuple(ops.convert_to_tensor(a) for a in evaluation)
        self.batch_size = min(
            batch_size or self.default_batch_size, len(train[0])
        )

    @property
    def loss_scale(self) -> float:
        """The Keras loss over the summed loss: one over the reduced size."""
        return 1.0

    @property
    def parameters(self) -> int:
        """Number of trainable weights."""
        weights = self.build_model(0).trainable_weights
        return sum(math.prod(weight.shape) for weight in weights)

    def loss(self) -> keras.losses.Loss:
        """Returns the training loss: that of classes, unless overridden."""
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def build_model(self, seed: int) -> keras.Model:
        """Builds the network with the weights that belong to a seed."""
        raise NotImplementedError

    def batches(self, seed: int) -> Iterator[Batch]:
        """Yields training batches, the same sequence for every method."""
        x, y = self.train
        for indices in batch_indices(len(x), self.batch_size, seed):
            yield x[indices], y[indices]

    def evaluate(self, model: keras.Model) -> float:
        """Returns the metric of a model on the fixed evaluation set.

        Batch normalisation uses its moving statistics.
        """
        x, y = self.evaluation
        total = 0.0
        for start in range(0, len(x), self.eval_batch):
            part = slice(start, start + self.eval_batch)
            outputs = model(x[part], training=False)
            if outputs.dtype.size == 2:  # Half precision is judged in full.
                outputs = ops.cast(outputs, "float32")
            score = self.score(y[part], outputs)
            total += float(score) * len(x[part])
        return total / len(x)

    def score(self, y, outputs):
        """Returns the metric as a scalar tensor, a mean over examples."""
        return ops.mean(self.loss()(y, outputs))


class DenseTask(Task):
    """A task for a stack of dense layers.

    Args:
        train: See `Task`.
        evaluation: See `Task`.
        l2: Coefficient of `0.5 * ||weights||²` beside the summed loss (the
            loss before its division by the number of outputs).
        batch_size: See `Task`.

    Attributes:
        sizes: Width of the input and of every layer.
        activations: One activation a layer.
    """

    sizes: ClassVar[tuple[int, ...]]
    activations: ClassVar[tuple[str | None, ...]]

    def __init__(
        self,
        train: Batch,
        evaluation: Batch,
        l2: float = 0.0,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(train, evaluation, batch_size)
        self.l2 = l2

    def build_model(self, seed: int) -> keras.Model:
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


class Autoencoder(DenseTask):
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


class Classifier(DenseTask):
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


class MeanSquaredErrorTask(DenseTask):
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


class ResNet20(Task):
    """ResNet-20 on MNIST.

    The metric is taken with fixed statistics in the batch normalisation, as
    one would use the network. Those averaged in training lag behind: over a
    few hundred steps they make the metric of any method jump by a factor of
    two or three, and what is measured then is the lag. They are therefore
    estimated anew before each evaluation. Adam reaches the target after some
    200 steps under a cosine, and 300 or more with a constant learning rate.

    Attributes:
        statistics: Training images that the statistics are estimated on.
    """

    name = "resnet20"
    metric = "cross-entropy, first 2 000 test images"
    target = 0.06
    default_batch_size = 128
    eval_every = 10
    eval_batch = 500
    statistics = 1000
    seconds = 300.0
    tuning_steps = 600

    def build_model(self, seed: int) -> keras.Model:
        return build_resnet(self.train[0].shape[1], 10, seed)

    def evaluate(self, model: keras.Model) -> float:
        estimate_statistics(model, self.train[0][: self.statistics])
        return super().evaluate(model)


class Transformer(Task):
    """A character-level transformer on the help texts of Python.

    Adam with a constant learning rate reaches the target after some 650
    steps.
    """

    name = "transformer"
    metric = "cross-entropy per character, 256 held-out windows"
    target = 1.5
    context = 64
    default_batch_size = 32
    eval_batch = 64
    seconds = 300.0
    tuning_steps = 2000

    def __init__(
        self, text: str | None = None, batch_size: int | None = None
    ) -> None:
        codes, self.vocabulary = encode(help_text() if text is None else text)
        split = len(codes) - len(codes) // 10
        held_out = windows(codes[split:], self.context)
        places = np.linspace(0, len(held_out[0]) - 1, 256).astype(int)
        super().__init__(
            windows(codes[:split], self.context),
            (held_out[0][places], held_out[1][places]),
            batch_size,
        )

    @property
    def loss_scale(self) -> float:
        return 1.0 / self.context

    def build_model(self, seed: int) -> keras.Model:
        return build_transformer(len(self.vocabulary), self.context, seed)


TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        Autoencoder,
        Classifier,
        Diabetes,
        IllConditioned,
        ResNet20,
        Transformer,
    )
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
        l2: See `DenseTask`.
        batch_size: See `Task`.

    Returns:
        The task with its data in memory.

    Raises:
        ValueError: If the name is unknown, or if `l2` is not zero for a
            network that is not a stack of dense layers.
    """
    if name not in TASKS:
        raise ValueError(
            f"`name` must be one of {sorted(TASKS)}. Received: name={name!r}"
        )
    task = TASKS[name]
    if issubclass(task, DenseTask):
        return task(*_data(name, data), l2, batch_size)
    if l2:
        raise ValueError(
            "`l2` is for the dense networks only. "
            f"Received: name={name!r}, l2={l2}"
        )
    if task is Transformer:
        return task(batch_size=batch_size)
    return task(*_data(name, data), batch_size)


def _data(name: str, data: str | Path | None) -> Sequence[Batch]:
    """Returns the training and the evaluation set of a task."""
    if name == "diabetes":
        return diabetes_data(), diabetes_data()
    if name == "ill_conditioned":
        x, y = ill_conditioned_data(25000)
        return (x[5000:], y[5000:]), (x[:5000], y[:5000])
    mnist = load_mnist(data)
    x, y = mnist["x_train"], mnist["y_train"]
    if name == "autoencoder":
        return (x, x), (x[:10000], x[:10000])
    if name == "classifier":
        return (x, y), (x[:10000], y[:10000])
    test = mnist["x_test"][:2000], mnist["y_test"][:2000]
    return (images(x), y), (images(test[0]), test[1])
