"""Data, batches and initial weights, in NumPy alone.

Everything here is shared by contenders of different frameworks, which is why
neither Keras nor JAX is imported at the top: a contender that runs in an
environment without Keras sees the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

Weights = list[tuple[np.ndarray, np.ndarray]]


def load_mnist(path: str | Path | None = None) -> dict[str, np.ndarray]:
    """Loads MNIST as flat images in [0, 1] and integer labels.

    Args:
        path: An `.npz` file with the arrays `x_train`, `y_train`, `x_test`
            and `y_test`, as `keras.datasets.mnist` stores them. When `None`,
            `keras.datasets.mnist` is used (and downloads on first use).

    Returns:
        A dict with those four keys.
    """
    if path is None:
        import keras

        train, test = keras.datasets.mnist.load_data()
        arrays = dict(
            zip(
                ("x_train", "y_train", "x_test", "y_test"),
                (*train, *test),
                strict=True,
            )
        )
    else:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    for name in ("x_train", "x_test"):
        images = arrays[name].reshape(len(arrays[name]), -1)
        arrays[name] = images.astype("float32") / 255.0
    for name in ("y_train", "y_test"):
        arrays[name] = arrays[name].astype("int32")
    return arrays


def images(x: np.ndarray) -> np.ndarray:
    """Returns flat square images as `(size, height, width, 1)`."""
    side = math.isqrt(x.shape[1])
    return x.reshape(-1, side, side, 1)


def standardise(values: np.ndarray) -> np.ndarray:
    """Shifts and scales every column to mean zero and variance one."""
    return (values - values.mean(0)) / values.std(0)


def diabetes_data() -> tuple[np.ndarray, np.ndarray]:
    """Returns the standardised diabetes data of scikit-learn."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    return (
        standardise(x).astype("float32"),
        standardise(y[:, None]).astype("float32"),
    )


def ill_conditioned_data(
    size: int, features: int = 20, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
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


def batch_indices(
    size: int, batch_size: int, seed: int
) -> Iterator[np.ndarray]:
    """Yields random minibatches without end, the same for the same seed.

    Args:
        size: Number of training examples.
        batch_size: Examples per batch. A batch as large as the training set
            is the whole training set in order.
        seed: Seed of the sequence.

    Yields:
        Indices of the examples of one batch, drawn with replacement.
    """
    generator = np.random.default_rng(seed)
    while True:
        if batch_size >= size:
            yield np.arange(size)
        else:
            yield generator.integers(0, size, batch_size)


def weight_generator(seed: int) -> np.random.Generator:
    """Returns the generator of the initial weights that belong to a seed."""
    return np.random.default_rng([seed, 1])


def glorot_uniform(sizes: Sequence[int], seed: int) -> Weights:
    """Draws the initial weights of a stack of dense layers.

    Args:
        sizes: Width of the input and of every layer.
        seed: Seed of the draw.

    Returns:
        One `(kernel, bias)` pair a layer; the biases are zero.
    """
    generator = weight_generator(seed)
    weights = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        limit = np.sqrt(6.0 / (fan_in + fan_out))
        kernel = generator.uniform(-limit, limit, (fan_in, fan_out))
        weights.append((kernel.astype("float32"), np.zeros(fan_out, "f")))
    return weights


def normal_kernel(
    shape: Sequence[int],
    gain: float,
    generator: np.random.Generator,
    input_axes: int | None = None,
) -> np.ndarray:
    """Draws a kernel of variance `gain` over the number of inputs.

    Args:
        shape: Shape of the kernel.
        gain: Variance of an output over the mean square of the inputs.
        generator: From `weight_generator`.
        input_axes: Leading axes that are inputs; all but the last one when
            `None`.

    Returns:
        The kernel, normally distributed.
    """
    shape = tuple(shape)
    axes = len(shape) - 1 if input_axes is None else input_axes
    scale = np.sqrt(gain / np.prod(shape[:axes]))
    return generator.normal(0.0, scale, shape).astype("float32")
