"""Title: Mean and spread of a regression, by natural gradient.

Author: keras_natgrad authors
Description: A network predicts the mean and the scale of the disease
    progression in scikit-learn's bundled diabetes data from the body mass
    index. K-FAC with default arguments against Adam at equal epochs; the
    figure shows both fitted bands.
Accelerator: None
"""

from __future__ import annotations

import argparse
from pathlib import Path

import keras
import matplotlib
import numpy as np
from sklearn.datasets import load_diabetes

import keras_natgrad as kng

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLORS = {"K-FAC": "#1f6f8b", "Adam": "#c8553d"}
BAND = 0.9  # share of the targets that the shaded band should hold


def load(seed: int) -> tuple[np.ndarray, ...]:
    """Returns standardised training and held-out inputs and targets."""
    bunch = load_diabetes()
    column = bunch.feature_names.index("bmi")
    x, y = bunch.data[:, [column]], bunch.target[:, np.newaxis]
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = x[order], y[order]
    x = (x - x[:354].mean()) / x[:354].std()
    y = (y - y[:354].mean()) / y[:354].std()
    x, y = x.astype("float32"), y.astype("float32")
    return x[:354], x[354:], y[:354], y[354:]


def train(
    name: str, head: kng.heads.Head, data: tuple[np.ndarray, ...], epochs: int
) -> tuple[keras.Model, dict[str, list[float]]]:
    """Trains one contender and returns the model and its losses by epoch."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((1,)),
            keras.layers.Dense(50, activation="tanh"),
            keras.layers.Dense(2),  # the mean, then the raw scale
        ]
    )
    if name == "K-FAC":
        optimizer = kng.KFAC().attach(model)
    else:
        optimizer = keras.optimizers.Adam(1e-2)
    model.compile(optimizer, kng.losses.NegativeLogLikelihood(head))
    x_train, x_test, y_train, y_test = data
    history = model.fit(
        x_train,
        y_train,
        batch_size=len(x_train),
        epochs=epochs,
        validation_data=(x_test, y_test),
        verbose=0,
    )
    return model, history.history


def plot(models, histories, head, data, output: Path) -> None:
    """Draws both bands over the data, and the losses over the epochs."""
    x_train, _, y_train, _ = data
    grid = np.linspace(x_train.min(), x_train.max(), 200)[:, np.newaxis]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    left.plot(x_train, y_train, ".", color="0.6", markersize=4)
    for name, model in models.items():
        outputs = model.predict(grid.astype("float32"), verbose=0)
        low = head.quantile(outputs, 0.5 - BAND / 2).numpy()[:, 0]
        high = head.quantile(outputs, 0.5 + BAND / 2).numpy()[:, 0]
        color = COLORS[name]
        left.plot(grid, head.mean(outputs), color=color, label=name)
        left.fill_between(grid[:, 0], low, high, color=color, alpha=0.18)
        right.plot(histories[name]["loss"], color=color, label=name)
    left.set(xlabel="body mass index", ylabel="progression", title="Fit")
    right.set(
        xlabel="epoch",
        ylabel="negative log-likelihood",
        title="Training",
    )
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)


def main(epochs: int, seed: int, output: Path) -> dict[str, float]:
    """Trains both; prints a table; returns held-out losses by name."""
    data = load(seed)
    head = kng.heads.Normal(scale="softplus")
    models, histories, held_out = {}, {}, {}
    for name in COLORS:
        models[name], histories[name] = train(name, head, data, epochs)
        held_out[name] = histories[name]["val_loss"][-1]
    print(f"Negative log-likelihood after {epochs} epochs")
    print(f"{'':8}{'training':>10}{'held out':>10}{'in band':>10}")
    for name, model in models.items():
        outputs = model.predict(data[1], verbose=0)
        low, high = (
            head.quantile(outputs, 0.5 + side * BAND / 2).numpy()
            for side in (-1, 1)
        )
        share = np.mean((data[3] >= low) & (data[3] <= high))
        print(
            f"{name:8}{histories[name]['loss'][-1]:10.3f}"
            f"{held_out[name]:10.3f}{share:10.0%}"
        )
    plot(models, histories, head, data, output)
    print(f"Figure: {output}")
    return held_out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent
        / "output"
        / "heteroscedastic_regression.png",
    )
    main(**vars(parser.parse_args()))
