"""Data, batches and initial weights, in NumPy alone.

Everything here is shared by contenders of different frameworks, which is why
neither Keras nor JAX is imported at the top: a contender that runs in an
environment without Keras sees the same numbers.
"""

from __future__ import annotations

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


def glorot_uniform(sizes: Sequence[int], seed: int) -> Weights:
    """Draws the initial weights of a stack of dense layers.

    Args:
        sizes: Width of the input and of every layer.
        seed: Seed of the draw.

    Returns:
        One `(kernel, bias)` pair a layer; the biases are zero.
    """
    generator = np.random.default_rng([seed, 1])
    weights = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        limit = np.sqrt(6.0 / (fan_in + fan_out))
        kernel = generator.uniform(-limit, limit, (fan_in, fan_out))
        weights.append((kernel.astype("float32"), np.zeros(fan_out, "f")))
    return weights
