"""A factor that is a plain matrix, and systems of every rank."""

import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.solvers import FisherRoot


class MatrixFactor(FisherRoot):
    """A given as an array; directions are one vector."""

    def __init__(self, matrix, residual):
        self._matrix = tf.constant(matrix)
        self._residual = tf.constant(residual)

    @property
    def size(self):
        return int(self._matrix.shape[0])

    @property
    def column_count(self):
        return int(self._matrix.shape[1])

    def residual(self):
        return self._residual

    def product(self, vector):
        return [tf.linalg.matvec(self._matrix, vector)]

    def transpose_product(self, direction):
        return tf.linalg.matvec(self._matrix, direction[0], transpose_a=True)

    def gram(self):
        return tf.matmul(self._matrix, self._matrix, transpose_a=True)

    def matrix(self):
        return self._matrix

    def from_tensors(self, tensors):
        return list(tensors)

    def to_tensors(self, direction):
        return list(direction)

    def unflatten(self, vector):
        return [vector]


@pytest.fixture
def matrix_factor():
    return MatrixFactor


@pytest.fixture(params=["fewer", "equal", "more"])
def columns(request):
    """Number of columns, for eight parameters."""
    return {"fewer": 5, "equal": 8, "more": 20}[request.param]


@pytest.fixture(params=["full", "deficient"])
def matrix(request, columns):
    generator = np.random.default_rng(3)
    if request.param == "full":
        return generator.normal(size=(8, columns))
    left = generator.normal(size=(8, 3))
    return left @ generator.normal(size=(3, columns))
