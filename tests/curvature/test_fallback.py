"""Fallback blocks of a whole network: which, and what they average to."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.blocks import (
    GradientDiagonalBlock,
    GradientKroneckerBlock,
    GradientScalarBlock,
)
from keras_natgrad.capture import Plan
from keras_natgrad.curvature import BlockDiagonal, BlockOptions, CapturedPass
from tests.reference.bridge import mlp

from .conftest import HEADS, OutputTerm, add_variable

BATCH = 4
KINDS = {
    "auto": [GradientKroneckerBlock, GradientDiagonalBlock],
    "kronecker": [GradientKroneckerBlock, GradientDiagonalBlock],
    "diagonal": [GradientDiagonalBlock, GradientDiagonalBlock],
    "first_order": [GradientScalarBlock, GradientScalarBlock],
}
SHAPES = [(2, 3, 4), (4,)]


def excluded(shapes, **options):
    """The blocks of a network without any captured layer."""
    plan = Plan((), tuple(range(len(shapes))), ("excluded",) * len(shapes))
    return BlockDiagonal(plan, shapes, BlockOptions(**options))


@pytest.mark.parametrize("fallback", KINDS)
def test_blocks_by_rank(fallback):
    curvature = excluded(SHAPES, fallback=fallback)
    assert [type(e.block) for e in curvature.entries] == KINDS[fallback]
    matrix = (6, 4) if fallback in ("auto", "kronecker") else (24, 1)
    assert curvature.entries[0].block.shape.matrix == matrix
    assert curvature.size == 28


def test_largest_factor_is_an_option():
    (entry,) = excluded([(6, 4)], max_factor_size=4).entries
    assert entry.block.memory == 2 * (6 + 16)


def test_matrices_and_back():
    curvature = excluded(SHAPES)
    rng = np.random.default_rng(0)
    curvature.build(["a", "b"], add_variable)
    tensors = [tf.constant(rng.normal(size=shape)) for shape in SHAPES]
    matrices = curvature.to_matrices(tensors)
    np.testing.assert_array_equal(
        matrices[0][0], np.reshape(tensors[0], (6, 4))
    )
    for one, other in zip(
        curvature.from_matrices(matrices), tensors, strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", ["propagated", "exact"])
def test_trace_of_the_fisher(kind, float64):
    """A Dense layer that is not captured: E[tr(L ⊗ R / tr L)] = tr F.

    The expectation is over all signs of the examples, 2⁴ patterns of the
    propagated Fisher, and equal at every seed of the exact one's columns up to
    cross terms; there the mean over 60 seeds is within five of its standard
    errors.
    """
    model = mlp([3, 4, 1], "tanh")
    x = np.random.default_rng(1).normal(size=(BATCH, 3))
    variables = model.trainable_variables
    curvature = excluded([tuple(v.shape) for v in variables])
    curvature.build([f"v{i}" for i in range(len(variables))], add_variable)
    with tf.GradientTape(persistent=True) as tape:
        outputs = model(tf.constant(x))
    coefficients = tf.fill([BATCH], tf.constant(1 / BATCH, tf.float64))
    term = OutputTerm(outputs, HEADS["normal"], coefficients)
    captured = CapturedPass(
        tape, [term], [], curvature.entries, [v.value for v in variables]
    )
    root = np.sqrt(np.reshape(term.head.fisher(outputs), -1) / BATCH)
    draws = []
    if kind == "propagated":
        for signs in itertools.product([-1.0, 1.0], repeat=BATCH):
            sent = term.cotangent(tf.constant(signs)[:, tf.newaxis])
            draws.append(traces(curvature, captured.backward([sent])))
    else:
        for seed in range(60):
            curvature.accumulate(
                curvature.statistics(captured, kind, tf.constant([seed, 3])),
                0.0,
            )
            draws.append([float(e.block.trace()) for e in curvature.entries])
    for index, variable in enumerate(variables):
        jacobian = tape.jacobian(outputs, variable.value)
        rows = np.reshape(jacobian, (BATCH, -1)) * root[:, None]
        seen = np.array(draws)[:, index]
        error = abs(seen.mean() - np.sum(rows**2))
        if kind == "propagated":
            assert error <= 1e-12 * np.sum(rows**2)
        else:
            assert error <= 5 * seen.std() / np.sqrt(len(seen))


def traces(curvature, backward):
    """The trace of every block after one backward pass alone."""
    found = []
    for entry, gradient in zip(
        curvature.entries, backward.gradients, strict=True
    ):
        entry.block.accumulate(entry.block.gradient_statistics(gradient), 0.0)
        dense = entry.block.to_dense()
        np.testing.assert_allclose(np.trace(dense), entry.block.trace())
        found.append(float(entry.block.trace()))
    return found


def test_recurrent_kernel_against_its_jacobian(record):
    """One example: the partial traces of the exact Fisher of an LSTM."""
    model = keras.Sequential(
        [keras.Input((3, 2)), keras.layers.LSTM(2), keras.layers.Dense(1)]
    )
    x = np.random.default_rng(0).normal(size=(1, 3, 2))
    recorded = record(model, tf.constant(x), ["normal"])
    recorded.update("exact")
    (term,) = recorded.terms
    root = float(np.squeeze(term.head.fisher(term.outputs)) ** 0.5)
    root *= float(np.squeeze(term.coefficients)) ** 0.5
    fallbacks = recorded.curvature.entries[1:]
    assert [e.block.kind for e in fallbacks] == [
        *["gradient_kronecker"] * 2,
        "gradient_diagonal",
    ]
    for entry in fallbacks[:2]:
        variable = recorded.variables[entry.variables[0]]
        jacobian = recorded.tape.jacobian(term.outputs, variable.value)
        g = root * np.reshape(jacobian, variable.shape)
        left, right = entry.block.averages().values()
        np.testing.assert_allclose(left, g @ g.T, rtol=1e-10, atol=1e-15)
        np.testing.assert_allclose(right, g.T @ g, rtol=1e-10, atol=1e-15)
