"""Regression with predicted mean and scale: test likelihood after few epochs.

The protocol is the usual one of the UCI regression tasks (Hernández-Lobato &
Adams 2015): 20 random splits of 90 % and 10 %, one hidden layer of 50 units,
everything standardised by the training part, test negative log-likelihood in
the units of the data. The kernels have a Gaussian prior of unit variance, an
L2 penalty of 1/(2N). A fifth of the training part is kept for validation, and
the weights after the epoch with the best validation likelihood are tested, as
with `EarlyStopping(restore_best_weights=True)`: networks of this size fit the
noise of a few hundred examples otherwise, under every optimizer. Adam gets
every learning rate of its grid, constant and with a cosine, five times as many
epochs, and the choice of the setting by the test likelihood itself. K-FAC runs
with default arguments, with the damping split layer by layer, and with the
exact Fisher of each layer (`block="full"`: the largest has a few hundred
weights), each with its automatic learning rate multiplied by 1, 0.3 and 0.1,
or falling from 1 by a cosine.

    python -m benchmarks.heteroscedastic --out benchmarks/results/x.json
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import tensorflow as tf

import keras_natgrad as kng

KFAC_RATES = (1.0, 0.3, 0.1)
KFAC_FORMS: dict[str, dict[str, Any]] = {
    "": {},
    " layer": {"damping_split": "layer"},
    " full": {"block": "full"},
}
ADAM_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
KFAC_EPOCHS = 60
ADAM_EPOCHS = 300
BATCH = 128


def diabetes() -> tuple[np.ndarray, np.ndarray]:
    """Disease progression of 442 patients, from scikit-learn."""
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    return data.data, data.target


def cars() -> tuple[np.ndarray, np.ndarray]:
    """Fuel consumption of 392 cars, from vega_datasets."""
    from vega_datasets import data

    table = data.cars().dropna()
    names = ("Cylinders", "Displacement", "Horsepower", "Weight_in_lbs")
    columns = [table[name] for name in (*names, "Acceleration")]
    columns.append(table["Year"].dt.year)
    columns += [table["Origin"] == origin for origin in ("USA", "Europe")]
    return np.stack(columns, axis=1), table["Miles_per_Gallon"]


def engel() -> tuple[np.ndarray, np.ndarray]:
    """Food expenditure of 235 households by income, from statsmodels."""
    from statsmodels.datasets import engel as source

    table = source.load_pandas().data
    return table[["income"]], table["foodexp"]


def schools() -> tuple[np.ndarray, np.ndarray]:
    """Share of pupils that pass mathematics in 303 districts (STAR 98)."""
    from statsmodels.datasets import star98

    table = star98.load_pandas().data
    share = table["NABOVE"] / (table["NABOVE"] + table["NBELOW"])
    # The last columns are products of the first ones.
    return table.iloc[:, 2:14], share


def temperatures() -> tuple[np.ndarray, np.ndarray]:
    """Every fourth hour's temperature of a year in San Francisco."""
    from vega_datasets import data

    table = data.sf_temps().iloc[::4]
    day = 2 * np.pi * table["date"].dt.dayofyear / 365
    hour = 2 * np.pi * table["date"].dt.hour / 24
    features = [np.sin(day), np.cos(day), np.sin(hour), np.cos(hour)]
    return np.stack(features, axis=1), table["temp"]


DATA: dict[str, Callable[[], tuple[Any, Any]]] = {
    "cars": cars,
    "diabetes": diabetes,
    "engel": engel,
    "schools": schools,
    "temperatures": temperatures,
}


class Contender:
    """A model that is trained again and again from given weights.

    Args:
        optimizer: A Keras optimizer.
        features: Number of features.
        examples: Number of training examples, for the prior.
        annealed: Whether the rate falls by a cosine over the epochs; for an
            automatic one, which takes no schedule.
    """

    def __init__(
        self,
        optimizer: Any,
        features: int,
        examples: int,
        annealed: bool = False,
    ) -> None:
        self.annealed = annealed
        prior = keras.regularizers.L2(0.5 / examples)
        self.model = keras.Sequential(
            [
                keras.Input((features,)),
                keras.layers.Dense(50, "tanh", kernel_regularizer=prior),
                keras.layers.Dense(2, kernel_regularizer=prior),
            ]
        )
        if isinstance(optimizer, kng.KFAC):
            optimizer.attach(self.model)
        self.head = kng.heads.Normal("softplus")
        self.model.compile(
            optimizer, kng.losses.NegativeLogLikelihood(self.head)
        )
        optimizer.build(self.model.trainable_variables)
        self.model.make_train_function()
        self._evaluate = tf.function(
            lambda x, y: -tf.reduce_mean(self.head.log_prob(self.model(x), y))
        )
        self.start = [v.numpy() for v in optimizer.variables]

    def train(self, split: Split, epochs: int, seed: int) -> float:
        """Returns the test negative log-likelihood of the best epoch."""
        for variable, value in zip(
            self.model.optimizer.variables, self.start, strict=True
        ):
            variable.assign(value)
        initializer = keras.initializers.GlorotUniform(seed)
        self.model.set_weights(
            [
                np.asarray(initializer(w.shape)) if w.ndim == 2 else 0 * w
                for w in self.model.get_weights()
            ]
        )
        generator = np.random.default_rng(seed)
        x, y = split.train
        best, weights = np.inf, self.model.get_weights()
        optimizer = self.model.optimizer
        rate = float(optimizer.learning_rate) if self.annealed else None
        for epoch in range(epochs):
            if rate is not None:
                phase = np.pi * epoch / epochs
                optimizer.learning_rate = 0.5 * rate * (1 + np.cos(phase))
            order = generator.permutation(len(x))
            # The short last batch of an epoch is left out.
            for batch in np.split(order, range(BATCH, len(x), BATCH)):
                if len(batch) == min(BATCH, len(x)):
                    pair = (tf.constant(x[batch]), tf.constant(y[batch]))
                    self.model.train_function(iter([pair]))
            likelihood = self._likelihood(split.validation)
            if likelihood < best:
                best, weights = likelihood, self.model.get_weights()
        self.model.set_weights(weights)
        return float(np.log(split.unit) + self._likelihood(split.test))

    def _likelihood(self, data: tuple[Any, Any]) -> float:
        return float(self._evaluate(*data))


class Split:
    """One random split, standardised by its training part."""

    def __init__(self, x: np.ndarray, y: np.ndarray, seed: int) -> None:
        order = np.random.default_rng(seed).permutation(len(x))
        held_out = len(x) // 10
        test, rest = order[:held_out], order[held_out:]
        validation, train = np.split(rest, [len(rest) // 5])
        self.unit = y[train].std()

        def scale(values: np.ndarray, by: np.ndarray) -> np.ndarray:
            scaled = (values - by.mean(axis=0)) / by.std(axis=0)
            return scaled.astype("float32")

        self.train = scale(x[train], x[train]), scale(y[train], y[train])
        self.test = scale(x[test], x[train]), scale(y[test], y[train])
        self.validation = (
            scale(x[validation], x[train]),
            scale(y[validation], y[train]),
        )


def run(name: str, splits: int, methods: Sequence[str]) -> dict[str, Any]:
    """Returns the test likelihoods of the contenders on one data set."""
    x, y = (np.asarray(each, "float64") for each in DATA[name]())
    y = y.reshape(-1, 1)
    rest = len(x) - len(x) // 10
    examples = rest - rest // 5
    steps = ADAM_EPOCHS * (examples // min(BATCH, examples))
    contenders: dict[str, Any] = {}
    for form, arguments in KFAC_FORMS.items():
        for rate in KFAC_RATES:
            optimizer = kng.KFAC(**arguments)
            optimizer.learning_rate = rate
            contenders[f"kfac {rate:g}{form}"] = optimizer
        contenders[f"kfac 1{form} cosine"] = kng.KFAC(**arguments)
    for rate in ADAM_RATES:
        contenders[f"adam {rate:g}"] = keras.optimizers.Adam(rate)
        cosine = keras.optimizers.schedules.CosineDecay(rate, steps)
        contenders[f"adam {rate:g} cosine"] = keras.optimizers.Adam(cosine)
    built = {
        key: Contender(each, x.shape[1], examples, _is_annealed(key))
        for key, each in contenders.items()
        if any(key.startswith(method) for method in methods)
    }
    results: dict[str, list[float]] = {key: [] for key in built}
    for seed in range(splits):
        split = Split(x, y, seed)
        for key, each in built.items():
            kfac = key.startswith("kfac")
            epochs = KFAC_EPOCHS if kfac else ADAM_EPOCHS
            results[key].append(each.train(split, epochs, seed))
    return {"examples": len(x), "features": x.shape[1], "nll": results}


def _is_annealed(key: str) -> bool:
    """Returns whether a contender's rate is annealed from outside."""
    return key.startswith("kfac") and key.endswith("cosine")


def table(results: dict[str, Any]) -> str:
    """Returns a Markdown table, mean ± standard error over the splits."""
    rows = [
        "| Data | N × features | K-FAC, default | Kronecker, best | "
        "full blocks | full blocks, best | Adam, best | "
        "full best − Adam best |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]

    for name, result in results.items():
        nll = {key: np.array(each) for key, each in result["nll"].items()}
        full = [key for key in nll if " full" in key]
        adam = [key for key in nll if key.startswith("adam")]
        others = [key for key in nll if key not in (*full, *adam)]

        difference = nll[_best(nll, full)] - nll[_best(nll, adam)]
        rows.append(
            f"| {name} | {result['examples']} × {result['features']} | "
            f"{_show(nll['kfac 1'])} | {_show_best(nll, others)} | "
            f"{_show(nll['kfac 1 full'])} | {_show_best(nll, full)} | "
            f"{_show_best(nll, adam)} | {_show(difference)} |"
        )
    return "\n".join(rows)


def _best(nll: dict[str, np.ndarray], keys: Sequence[str]) -> str:
    return min(keys, key=lambda key: np.mean(nll[key]))


def _show(values: np.ndarray) -> str:
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.3f} ± {error:.3f}"


def _show_best(nll: dict[str, np.ndarray], keys: Sequence[str]) -> str:
    key = _best(nll, keys)
    return f"{_show(nll[key])} ({key.split(maxsplit=1)[1]})"


def main() -> None:
    """Runs all data sets, prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", default=sorted(DATA))
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["kfac", "adam"],
        help="how names of contenders begin, such as 'kfac 1 cosine'; others "
        "keep what --out has, from the same splits",
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    if arguments.out and arguments.out.exists():
        results = json.loads(arguments.out.read_text())["results"]
    for name in arguments.data:
        result = run(name, arguments.splits, arguments.methods)
        if set(arguments.methods) != {"kfac", "adam"}:
            result["nll"] = {**results[name]["nll"], **result["nll"]}
        results[name] = result
        print(table({name: results[name]}).splitlines()[-1], flush=True)
    print(table(results))
    if arguments.out:
        settings = {
            "kfac_epochs": KFAC_EPOCHS,
            "adam_epochs": ADAM_EPOCHS,
            "batch": BATCH,
        }
        arguments.out.write_text(
            json.dumps({"settings": settings, "results": results}, indent=1)
        )


if __name__ == "__main__":
    main()
