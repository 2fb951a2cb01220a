"""Targets in other units: what it does to K-FAC and to Adam.

Heteroscedastic regression on scikit-learn's diabetes data under
`Normal(scale="exp")`, with the targets multiplied by 0.001, 1 and 1000, and the
last layer rescaled so that all three start with the same distribution. The
target is a training likelihood in units of the data. Adam's learning rate is
the best of its grid for unit 1.

    python -m benchmarks.units --out benchmarks/results/units.json
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_diabetes

import keras_natgrad as kng

UNITS = (1e-3, 1.0, 1e3)
ADAM_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
# Mean negative log-likelihood of standardised targets.
TARGET = 0.85
MOST_STEPS = 3000


def make_model(unit: float, features: int, seed: int) -> keras.Model:
    """Returns a network that starts at the same distribution of unit · y."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((features,)),
            keras.layers.Dense(20, "tanh"),
            keras.layers.Dense(2),
        ]
    )
    kernel, bias = model.layers[-1].get_weights()
    kernel[:, 0] *= unit
    bias[1] += np.log(unit)
    model.layers[-1].set_weights([kernel, bias])
    return model


def steps_to_target(optimizer: Any, unit: float, seed: int) -> int | None:
    """Returns the steps of full batches until the target, or `None`."""
    x, y = load_diabetes(return_X_y=True)
    x = ((x - x.mean(0)) / x.std(0)).astype("float32")
    y = (unit * (y - y.mean()) / y.std()).astype("float32").reshape(-1, 1)
    model = make_model(unit, x.shape[1], seed)
    if isinstance(optimizer, kng.KFAC):
        optimizer.attach(model)
    head = kng.heads.Normal(scale="exp")
    model.compile(optimizer, kng.losses.NegativeLogLikelihood(head))
    model.make_train_function()
    pair = (tf.constant(x), tf.constant(y))
    evaluate = tf.function(
        lambda: -tf.reduce_mean(head.log_prob(model(pair[0]), pair[1]))
    )
    goal = TARGET + np.log(unit)
    for step in range(1, MOST_STEPS + 1):
        model.train_function(iter([pair]))
        if float(evaluate()) < goal:
            return step
    return None


def run(seeds: int) -> dict[str, Any]:
    """Returns the steps of both optimizers for every unit and seed."""

    def all_seeds(make: Any, unit: float) -> list[int | None]:
        return [steps_to_target(make(), unit, seed) for seed in range(seeds)]

    def typical(steps: list[int | None]) -> float:
        return float(np.median([s or 2 * MOST_STEPS for s in steps]))

    tuned = {
        rate: typical(
            all_seeds(lambda rate=rate: keras.optimizers.Adam(rate), 1.0)
        )
        for rate in ADAM_RATES
    }
    rate = min(tuned, key=lambda each: tuned[each])
    contenders = {
        "KFAC, default": kng.KFAC,
        f"Adam, {rate:g}": lambda: keras.optimizers.Adam(rate),
    }
    return {
        name: {str(unit): all_seeds(make, unit) for unit in UNITS}
        for name, make in contenders.items()
    }


def main() -> None:
    """Prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = run(arguments.seeds)
    for name, steps in results.items():
        print(name, steps)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
