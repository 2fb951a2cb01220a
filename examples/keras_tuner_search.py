"""Title: K-FAC in Keras Tuner.

Author: keras_natgrad authors
Description: Hyperband searches the width of a classifier of scikit-learn's
    bundled digits, and the hyper-parameters of its optimizer, beside K-FAC
    with default arguments. With --directory the trials are kept, and the same
    command goes on with a search that was interrupted.
Accelerator: None
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import keras
import keras_tuner
import numpy as np
from sklearn.datasets import load_digits

import keras_natgrad as kng

BATCH_SIZE = 128


def build(hp: keras_tuner.HyperParameters) -> keras.Model:
    """Any `build(hp)`; its optimizer is replaced."""
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(hp.Choice("units", [32, 64]), activation="tanh"),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss=loss, metrics=["accuracy"])
    return model


def searched(hp: keras_tuner.HyperParameters) -> kng.KFAC:
    """Dense layers have one position, so that nothing shares weights."""
    return kng.tuner.search_space(hp, weight_sharing="expand")


def default(hp: keras_tuner.HyperParameters) -> kng.KFAC:
    return kng.KFAC()


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def held_out(model: keras.Model, x: Any, y: Any) -> str:
    loss, accuracy = model.evaluate(x, y, verbose=0)
    return f"loss {loss:.3f}, accuracy {accuracy:.3f}"


def main(epochs: int, seed: int, directory: str) -> keras.Model:
    """Searches, prints what was found and returns the best model."""
    keras.utils.set_random_seed(seed)
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = (x[order] / 16.0).astype("float32"), y[order]
    train, validation, test = (
        (x[part], y[part])
        for part in (slice(1077), slice(1077, 1437), slice(1437, None))
    )

    tuner = keras_tuner.Hyperband(
        kng.tuner.NaturalGradientHyperModel(build, searched),
        "val_loss",
        max_epochs=epochs,
        factor=3,
        seed=seed,
        directory=directory,
        project_name="digits",
        overwrite=False,
    )
    tuner.search(
        *train, validation_data=validation, batch_size=BATCH_SIZE, verbose=0
    )
    trials = tuner.oracle.get_best_trials(len(tuner.oracle.trials))
    print(f"\n{len(trials)} trials, by validation loss:")
    for trial in trials:
        hp = trial.hyperparameters
        values = (
            f"{name.removeprefix('kfac_')}={shown(value)}"
            for name, value in hp.values.items()
            if not name.startswith("tuner/")
        )
        print(f"{trial.score:.3f}, {hp.get('tuner/epochs')} epochs:", *values)

    # Weights, and the curvature with them: it could train on.
    model = tuner.get_best_models()[0]
    keras.utils.set_random_seed(seed)
    plain = kng.tuner.NaturalGradientHyperModel(build, default).build(
        tuner.get_best_hyperparameters()[0]
    )
    plain.fit(*train, batch_size=BATCH_SIZE, epochs=epochs, verbose=0)
    print(f"\nOn {len(test[1])} held-out digits:")
    print(f"Best model of the search: {held_out(model, *test)}")
    print(f"Same width, default KFAC(): {held_out(plain, *test)}")
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--epochs", type=int, default=3, help="most epochs of a trial"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--directory", default=None, help="where trials are kept (default: not)"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(
            arguments.epochs,
            arguments.seed,
            arguments.directory or temporary,
        )
