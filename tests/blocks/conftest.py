"""Blocks with state but without a model."""

import keras
import numpy as np
import pytest

from keras_natgrad.blocks import BlockShape, create

BATCH, SHARED, ROWS, COLUMNS = 5, 3, 3, 2


class Data:
    """Canonical inputs and two columns of cotangents, in NumPy."""

    def __init__(self, shared=SHARED, seed=0):
        rng = np.random.default_rng(seed)
        self.inputs = rng.normal(size=(BATCH, shared, ROWS))
        self.columns = rng.normal(size=(2, BATCH, shared, COLUMNS))
        self.weights = rng.uniform(0.5, 2.0, size=BATCH)
        self.gradient = rng.normal(size=(ROWS, COLUMNS))

    def full(self):
        """The Fisher by its definition."""
        total = 0.0
        for g in self.columns:
            v = np.einsum("nsr,nsm->nrm", self.inputs, g).reshape(BATCH, -1)
            total += v.T @ v
        return total


@pytest.fixture
def data():
    return Data()


@pytest.fixture
def make_data():
    return Data


@pytest.fixture
def make_block():
    """Factory of built float64 blocks by name and options."""

    def make(kind, biased=False, **options):
        block = create(
            kind, BlockShape(ROWS, COLUMNS, biased=biased), **options
        )
        return build(block)

    return make


@pytest.fixture
def build_block():
    return build


def build(block, dtype="float64"):
    created = {}

    def add_variable(name, shape, initializer):
        assert name not in created, name
        created[name] = keras.Variable(
            initializer, shape=shape, dtype=dtype, trainable=False, name=name
        )
        return created[name]

    block.build(add_variable)
    block.created = created
    return block


def summed(per_column):
    """The sum of statistics, name by name."""
    return {
        name: sum(each[name] for each in per_column) for name in per_column[0]
    }


@pytest.fixture
def feed():
    """Gives a block one batch of statistics."""

    def update(block, data, decay=0.0):
        if block.shape.biased:
            data.inputs[..., -1] = 1.0
        statistics = block.input_statistics(data.inputs, data.weights)
        per_column = [
            block.cotangent_statistics(data.inputs, g) for g in data.columns
        ]
        block.accumulate({**statistics, **summed(per_column)}, decay)

    return update
