"""The Kronecker product of an uncaptured matrix, from its gradients."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.blocks import (
    BlockShape,
    GradientDiagonalBlock,
    GradientKroneckerBlock,
)
from tests.blocks.conftest import summed

ROWS, COLUMNS = 3, 2
DAMPING = 0.3


@pytest.fixture
def gradients():
    return np.random.default_rng(0).normal(size=(4, ROWS, COLUMNS))


@pytest.fixture
def make(build_block):
    def make(rows=ROWS, columns=COLUMNS, **options):
        shape = BlockShape(rows, columns)
        return build_block(GradientKroneckerBlock(**options).bind(shape))

    return make


def feed(block, gradients, decay=0.0):
    statistics = [block.gradient_statistics(tf.constant(g)) for g in gradients]
    block.accumulate(summed(statistics), decay)


def damping(value=DAMPING):
    return tf.constant(value, tf.float64)


def factors(gradients, bound=100):
    left = np.einsum("krc,ksc->rs", gradients, gradients)
    right = np.einsum("krc,krd->cd", gradients, gradients)
    if len(left) > bound:
        left = np.diag(np.diag(left))
    if len(right) > bound:
        right = np.diag(np.diag(right))
    return left, right


@pytest.mark.parametrize("bound", [100, 2, 1])
def test_definition(bound, make, gradients):
    """`L ⊗ R / tr L`, with long sides as their diagonals."""
    block = make(max_factor_size=bound)
    feed(block, gradients)
    left, right = factors(gradients, bound)
    np.testing.assert_allclose(
        block.to_dense(), np.kron(left, right) / np.trace(left), rtol=1e-12
    )
    np.testing.assert_allclose(block.trace(), np.sum(gradients**2), rtol=1e-12)


def test_averages_are_debiased(make, gradients):
    block = make()
    feed(block, gradients, decay=0.9)
    left, right = factors(gradients)
    np.testing.assert_allclose(
        block.to_dense(), np.kron(left, right) / np.trace(left), rtol=1e-12
    )


@pytest.mark.parametrize("bound", [100, 1])
@pytest.mark.parametrize("ratio", [None, 7.0])
def test_precondition(bound, ratio, make, gradients):
    """The inverse is `(L' + π√λ)⁻¹ ∇ (R' + √λ/π)⁻¹`, π = √(c/r).

    L' and R' have equal traces, and a ratio of other layers has no say.
    """
    block = make(max_factor_size=bound)
    feed(block, gradients)
    retries, failures = block.refresh(damping(), ratio)
    left, right = factors(gradients, bound)
    root, pi = np.sqrt(np.trace(left)), np.sqrt(COLUMNS / ROWS)
    left = left / root + pi * np.sqrt(DAMPING) * np.eye(ROWS)
    right = right / root + np.sqrt(DAMPING) / pi * np.eye(COLUMNS)
    expected = np.linalg.solve(left, gradients[0]) @ np.linalg.inv(right)
    np.testing.assert_allclose(
        block.precondition(tf.constant(gradients[0])), expected, rtol=1e-10
    )
    assert (int(retries), int(failures)) == (0, 0)


def test_a_kronecker_product_is_exact(make):
    """Gradients `a_i b_jᵀ` have the Fisher `A ⊗ B`."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(5, ROWS)), rng.normal(size=(4, COLUMNS))
    block = make()
    feed(block, [np.outer(x, y) for x in a for y in b])
    np.testing.assert_allclose(
        block.to_dense(), np.kron(a.T @ a, b.T @ b), rtol=1e-12
    )


def test_one_row_is_exact(make):
    gradients = np.random.default_rng(2).normal(size=(4, 1, COLUMNS))
    block = make(rows=1)
    feed(block, gradients)
    expected = gradients[:, 0].T @ gradients[:, 0]
    np.testing.assert_allclose(block.to_dense(), expected, rtol=1e-12)


def test_signs_average_to_the_partial_traces(make, gradients):
    """Over all sign patterns, L and R are partial traces of the Fisher."""
    block = make()
    patterns = list(itertools.product([-1.0, 1.0], repeat=len(gradients)))
    batches = [np.tensordot(signs, gradients, 1) for signs in patterns]
    feed(block, batches)
    flat = gradients.reshape(len(gradients), -1)
    fisher = (flat.T @ flat).reshape(ROWS, COLUMNS, ROWS, COLUMNS)
    left, right = (value / len(patterns) for value in block.averages().values())
    np.testing.assert_allclose(left, np.einsum("acbc->ab", fisher), rtol=1e-12)
    np.testing.assert_allclose(right, np.einsum("abac->bc", fisher), rtol=1e-12)
    assert float(block.trace()) / len(patterns) == pytest.approx(
        np.sum(flat**2), rel=1e-12
    )


def test_empty_block(make):
    block = make()
    np.testing.assert_array_equal(block.to_dense(), np.zeros((6, 6)))
    _, failures = block.refresh(damping())
    assert int(failures) == 0
    gradient = tf.ones([ROWS, COLUMNS], tf.float64)
    np.testing.assert_allclose(
        block.precondition(gradient), gradient / DAMPING, rtol=1e-12
    )


def test_failed_refresh_keeps_the_last_good_inverse(make, gradients):
    block = make()
    feed(block, gradients)
    block.refresh(damping())
    good = block.precondition(gradients[0]).numpy()
    feed(block, np.nan * gradients)
    _, failures = block.refresh(damping())
    assert int(failures) == 1
    np.testing.assert_array_equal(block.precondition(gradients[0]), good)


@pytest.mark.parametrize("bound", [100, 2, 1])
def test_memory(bound, make):
    block = make(max_factor_size=bound)
    stored = sum(
        int(np.prod(variable.shape))
        for name, variable in block.created.items()
        if name != "weight"
    )
    assert block.memory == stored


def test_compiles_under_xla(make, gradients):
    block = make()

    @tf.function(jit_compile=True)
    def run(gradient):
        block.accumulate(block.gradient_statistics(gradient), 0.0)
        block.refresh(damping())
        return block.precondition(gradient)

    compiled = run(tf.constant(gradients[0])).numpy()
    feed(block, gradients[:1])
    block.refresh(damping())
    eager = block.precondition(tf.constant(gradients[0]))
    np.testing.assert_allclose(compiled, eager, rtol=1e-10)


def test_cotangents_are_refused(make):
    with pytest.raises(TypeError, match="gradient_statistics"):
        make().cotangent_statistics(None, None)


@pytest.mark.parametrize(
    ("shape", "matrix", "vector"),
    [((2, 3, 4), (6, 4), (24, 1)), ((5, 3), (5, 3), (15, 1))],
)
def test_views(shape, matrix, vector):
    assert GradientKroneckerBlock.view(shape).matrix == matrix
    assert GradientDiagonalBlock.view(shape).matrix == vector


def test_scalar_view():
    assert GradientDiagonalBlock.view(()).matrix == (1, 1)


def test_kind_is_not_for_captured_layers():
    block = GradientKroneckerBlock().bind(BlockShape(2, 2))
    assert block.kind == "gradient_kronecker"
    assert block.describe() == "2² ⊗ 2²"
    assert block.factor_scales() is None
