"""Logs, summaries and messages."""

import csv

import keras
import numpy as np
import pytest

from tests.contract.common import FIT, eager, learns
from tests.training.networks import cross_entropy, data, mlp


def logs(make, folder):
    """`CSVLogger`, `TerminateOnNaN`; statistics in the logs"""
    model = eager(make(log_statistics=True))
    learns(
        model,
        callbacks=[
            keras.callbacks.CSVLogger(folder / "log.csv"),
            keras.callbacks.TerminateOnNaN(),
        ],
    )
    with open(folder / "log.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    name = model.optimizer.name
    assert float(rows[-1][f"{name}_batches"]) == 6.0
    # The batch with a NaN is skipped, and the training ends.
    x, y = data()
    x[0, 0] = np.nan
    stop = keras.callbacks.TerminateOnNaN()
    history = model.fit(x, y, epochs=5, callbacks=[stop], **FIT)
    assert len(history.epoch) == 1
    assert model.optimizer.statistics["skipped"] == 1


def tensorboard(make, folder):
    """`TensorBoard`"""
    callback = keras.callbacks.TensorBoard(folder / "logs", histogram_freq=1)
    learns(eager(make()), callbacks=[callback])
    assert list((folder / "logs" / "train").glob("events.out.tfevents.*"))


def summary(make, folder):
    """`model.summary`, and that of the optimizer"""
    model = eager(make(log_statistics=True))
    lines = []
    model.optimizer.summary(print_fn=lines.append)
    assert "5 × 5" in lines[0] and "Categorical" in lines[0]
    history = model.fit(*data(), **FIT).history
    assert history[f"{model.optimizer.name}_batches"] == [2.0]
    assert model.optimizer.statistics["batches"] == 2
    lines = []
    model.summary(print_fn=lambda line, **_: lines.append(line))
    assert "Optimizer params" in "\n".join(lines)


def not_attached(make, folder):
    """Without `attach`: an error that says what to do"""
    model = mlp()
    model.compile(make(), loss=cross_entropy())
    with pytest.raises(ValueError, match="not attached to a model"):
        model.fit(*data(), **FIT)
