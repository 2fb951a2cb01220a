"""Title: Counts that vary more than Poisson's, by natural gradient.

Author: keras_natgrad authors
Description: The disease progression score of scikit-learn's bundled diabetes
    data is a whole number. Poisson and negative binomial regressions of it,
    each trained by K-FAC with default arguments and by Adam for equal epochs.
Accelerator: None
"""

from __future__ import annotations

import argparse

import keras
import numpy as np
from sklearn.datasets import load_diabetes

import keras_natgrad as kng

HEADS = {
    "Poisson": kng.heads.Poisson(),
    # exp keeps the mean positive on the scale of the data, in the hundreds.
    "negative binomial": kng.heads.NegativeBinomial("exp", "exp"),
}


def load(seed: int) -> tuple[np.ndarray, ...]:
    """Returns standardised inputs and counts, training and held out."""
    x, y = load_diabetes(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = x[order], y[order, np.newaxis]
    x = (x - x[:354].mean(axis=0)) / x[:354].std(axis=0)
    x, y = x.astype("float32"), y.astype("float32")
    return x[:354], x[354:], y[:354], y[354:]


def train(
    optimizer: str,
    head: kng.heads.Family,
    data: tuple[np.ndarray, ...],
    epochs: int,
) -> keras.Model:
    """Trains one model, from the same weights for every optimizer."""
    keras.utils.set_random_seed(0)
    x, _, y, _ = data
    start = [np.log(y.mean())] + [0.0] * (len(head.parameter_names) - 1)
    model = keras.Sequential(
        [
            keras.Input((x.shape[1],)),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dense(len(start)),
        ]
    )
    kernel, _ = model.layers[-1].get_weights()
    model.layers[-1].set_weights([0.1 * kernel, np.array(start, "float32")])
    rule = keras.optimizers.Adam(1e-2)
    if optimizer == "K-FAC":
        rule = kng.KFAC().attach(model)
    model.compile(rule, kng.losses.NegativeLogLikelihood(head))
    model.fit(x, y, batch_size=len(x), epochs=epochs, verbose=0)
    return model


def main(epochs: int, seed: int) -> dict[tuple[str, str], float]:
    """Trains all; prints a table; returns the training losses."""
    data = load(seed)
    losses = {}
    print(f"Negative log-likelihood per patient after {epochs} epochs")
    print(f"{'':20}{'':8}{'training':>10}{'held out':>10}")
    for name, head in HEADS.items():
        for optimizer in ("K-FAC", "Adam"):
            model = train(optimizer, head, data, epochs)
            fit, held_out = (
                model.evaluate(data[i], data[i + 2], verbose=0) for i in (0, 1)
            )
            print(f"{name:20}{optimizer:8}{fit:10.3f}{held_out:10.3f}")
            losses[name, optimizer] = fit
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
