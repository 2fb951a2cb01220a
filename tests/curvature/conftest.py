"""A recorded forward pass beside its NumPy reference."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad import heads
from keras_natgrad._compat import flatten_layers
from keras_natgrad.capture import Taps, make_plan, match_layers
from keras_natgrad.curvature import (
    BlockDiagonal,
    BlockOptions,
    CapturedPass,
    OutputTerm,
)
from tests.reference.heads import Term

HEADS = {
    "normal": heads.Normal(scale=0.7),
    "bernoulli": heads.Bernoulli(),
    "categorical": heads.Categorical(),
}


class Recorded:
    """One pass of a model, with blocks and random loss coefficients.

    Attributes:
        curvature: Built `BlockDiagonal`.
        captured: `CapturedPass`.
        terms: The `OutputTerm`s.
        reference_terms: The same for the reference.
        variables: The model's trainable variables.
    """

    def __init__(self, model, x, head_names, targets=None, **options):
        rng = np.random.default_rng(11)
        self.variables = model.trainable_variables
        plan = make_plan(model, self.variables)
        shapes = [tuple(v.shape) for v in self.variables]
        options = BlockOptions(**{"block": "kronecker", **options})
        self.curvature = BlockDiagonal(plan, shapes, options)
        names = [f"v{i}" for i in range(len(shapes))]
        self.curvature.build(names, add_variable)
        with (
            Taps(flatten_layers(model)) as taps,
            tf.GradientTape(persistent=True) as tape,
        ):
            outputs = keras.tree.flatten(model(x))
        self.tape, self.terms, self.reference_terms = tape, [], []
        for index, (name, eta) in enumerate(
            zip(head_names, outputs, strict=True)
        ):
            c = rng.uniform(0.2, 1.0, size=tuple(eta.shape[:-1]))
            y = None if targets is None else targets[index]
            self.terms.append(OutputTerm(eta, HEADS[name], tf.constant(c), y))
            flat = c.reshape(len(c), -1)
            dense = None
            if y is not None:
                dense = np.asarray(y)
                if name == "categorical":
                    dense = np.eye(eta.shape[-1])[dense]
                dense = dense.reshape(*flat.shape, eta.shape[-1])
            self.reference_terms.append(Term(name, flat, dense, scale=0.7))
        self.captured = CapturedPass(
            tape,
            self.terms,
            [
                taps.record(layer, index)
                for layer, index in match_layers(plan, model, self.variables)
            ],
            self.curvature.entries,
            [variable.value for variable in self.variables],
        )

    def statistics(self, kind, seed=0):
        return self.curvature.statistics(
            self.captured, kind, tf.constant([seed, 0], tf.int32)
        )

    def update(self, kind, seed=0):
        self.curvature.accumulate(self.statistics(kind, seed), 0.0)
        return [entry.block for entry in self.curvature.in_plan_order]


def add_variable(name, shape, initializer):
    return keras.Variable(
        initializer, shape=shape, dtype="float64", trainable=False, name=name
    )


@pytest.fixture
def record(float64):
    return Recorded
