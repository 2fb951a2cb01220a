"""Title: K-FAC in ten lines.

Author: keras_natgrad authors
Description: Train a classifier of scikit-learn's bundled handwritten digits
    with K-FAC and its default arguments.
Accelerator: None
"""

from __future__ import annotations

import argparse

import keras
import numpy as np
from sklearn.datasets import load_digits

import keras_natgrad as kng


def main(epochs: int, batch_size: int, seed: int) -> float:
    """Trains, prints the accuracy on held-out digits and returns it."""
    keras.utils.set_random_seed(seed)
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = (x[order] / 16.0).astype("float32"), y[order]
    (x_train, x_test), (y_train, y_test) = (
        np.split(x, [1437]),
        np.split(y, [1437]),
    )

    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(64, activation="tanh"),
            keras.layers.Dense(10),
        ]
    )
    optimizer = kng.KFAC().attach(model)  # every argument has a default
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
    model.fit(x_train, y_train, batch_size=batch_size, epochs=epochs, verbose=2)

    _, accuracy = model.evaluate(x_test, y_test, verbose=0)
    print(f"Accuracy on {len(x_test)} held-out digits: {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
