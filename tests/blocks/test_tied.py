"""The block of a matrix that is used as W and as Wᵀ."""

import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.blocks import BlockShape, create
from keras_natgrad.linalg import OneHot, TwoWayCotangents, TwoWayRows, slopes
from tests.blocks.conftest import summed

BATCH, LOOKUPS, LOGITS, DEPTH, WIDTH = 4, 3, 2, 7, 3
SHAPE = BlockShape(DEPTH, WIDTH, one_hot=True, two_way=True)
DAMPING = 0.03
SHARING = ("expand", "reduce")
# S, G and H dense; S diagonal; all diagonal.
SIZES = (DEPTH, WIDTH, 1)


class Data:
    """Two uses of an embedding, and two columns of cotangents, in NumPy.

    Token 6 is not looked up.
    """

    def __init__(self, seed=0, direct=1.0, transposed=1.0):
        rng = np.random.default_rng(seed)
        self.ids = rng.integers(0, DEPTH - 1, size=(BATCH, LOOKUPS))
        self.one_hot = np.eye(DEPTH)[self.ids]
        self.hidden = rng.normal(size=(BATCH, LOGITS, WIDTH))
        self.weights = rng.uniform(0.5, 2.0, size=BATCH)
        shape = (2, BATCH, LOOKUPS, WIDTH)
        self.g = direct * rng.normal(size=shape)
        shape = (2, BATCH, LOGITS, DEPTH)
        self.u = transposed * rng.normal(size=shape)
        self.gradient = rng.normal(size=(DEPTH, WIDTH))

    def rows(self):
        ones = tf.ones([BATCH, LOOKUPS], tf.float64)
        ids = OneHot(tf.constant(self.ids), ones, DEPTH)
        return TwoWayRows(ids, tf.constant(self.hidden))

    def feed(self, block, decay=0.0):
        inputs = block.input_statistics(self.rows(), tf.constant(self.weights))
        columns = [
            block.cotangent_statistics(
                self.rows(), TwoWayCotangents(tf.constant(g), tf.constant(u))
            )
            for g, u in zip(self.g, self.u, strict=True)
        ]
        block.accumulate(inputs | summed(columns), decay)
        return block

    def factors(self, sharing):
        """(c, H, G, s) by their definition."""
        e, h, g, u = self.one_hot, self.hidden, self.g, self.u
        if sharing == "reduce":
            e, h = (x.mean(axis=1, keepdims=True) for x in (e, h))
            g, u = (x.sum(axis=2, keepdims=True) for x in (g, u))
        w = self.weights / self.weights.sum()
        return (
            np.einsum("b,bsv,bsv->v", w / e.shape[1], e, e),
            np.einsum("b,bsi,bsj->ij", w / h.shape[1], h, h),
            np.einsum("kbsi,kbsj->ij", g, g),
            np.einsum("kbsv,kbsw->vw", u, u),
        )


def kept(factors, size):
    """The factors that a block with `max_factor_size=size` keeps, dense."""
    diagonal = [
        np.diag(np.diag(x)) if len(x) > size else x for x in factors[1:]
    ]
    return [np.diag(factors[0]), *diagonal]


def undamped(c, hidden, gradients, logits):
    return np.kron(c, gradients) + np.kron(logits, hidden)


def damped(c, hidden, gradients, logits, damping, ratio=None):
    """The damped block by the definition, `[DEPTH · WIDTH] * 2`."""
    products = (c, gradients), (hidden, logits)
    traces = np.array([np.trace(a) * np.trace(b) for a, b in products])
    total = 0.0
    for (a, b), part in zip(products, traces / traces.sum(), strict=True):
        root = np.sqrt(damping * part)
        mean = np.trace(a) / len(a), np.trace(b) / len(b)
        pi = np.sqrt(mean[0] / mean[1]) if min(mean) > 0 else 1.0
        pi = pi if ratio is None else ratio
        a = a + pi * root * np.eye(len(a))
        b = b + root / pi * np.eye(len(b))
        total = total + (np.kron(a, b) if len(a) == DEPTH else np.kron(b, a))
    return total


def solved(matrix, gradient):
    return np.linalg.solve(matrix, gradient.ravel()).reshape(gradient.shape)


@pytest.fixture(params=SHARING)
def sharing(request):
    return request.param


@pytest.fixture(params=SIZES)
def size(request):
    return request.param


def damping(value=DAMPING):
    return tf.constant(value, tf.float64)


def made(build_block, **options):
    return build_block(create("tied", SHAPE, **options))


def test_equals_its_definition(build_block, sharing, size):
    data = Data()
    options = {"weight_sharing": sharing, "max_factor_size": size}
    block = data.feed(made(build_block, **options))
    factors = kept(data.factors(sharing), size)
    shapes = [x.shape for x in block.averages().values()]
    for found, expected, shape in zip(
        block.averages().values(), factors, shapes, strict=True
    ):
        expected = np.diag(expected) if len(shape) == 1 else expected
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
    side = {1: (DEPTH,), 2: (DEPTH, DEPTH)}[2 if size == DEPTH else 1]
    assert shapes[0] == (DEPTH,) and shapes[3] == side
    expected = undamped(*factors)
    np.testing.assert_allclose(
        block.to_dense(), expected, rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(block.trace(), np.trace(expected), rtol=1e-12)
    operator, vector = block.operator(), data.gradient.ravel()
    product = operator.matvec(tf.constant(vector))
    np.testing.assert_allclose(product, expected @ vector, rtol=1e-10)
    np.testing.assert_allclose(operator.trace(), np.trace(expected), rtol=1e-12)
    np.testing.assert_allclose(
        operator.diag_part(), np.diag(expected), rtol=1e-12
    )
    assert operator.shape == (DEPTH * WIDTH, DEPTH * WIDTH)
    assert tuple(operator.shape_tensor().numpy()) == operator.shape


def test_is_the_fisher_of_one_independent_position(build_block):
    """One example, one lookup and one projection whose uses do not cross.

    With a zero cotangent of one of the uses, the block is the outer product
    of the gradient.
    """
    for direct, transposed in ((1.0, 0.0), (0.0, 1.0)):
        rng = np.random.default_rng(1)
        e, h = np.eye(DEPTH)[2], rng.normal(size=WIDTH)
        g = direct * rng.normal(size=WIDTH)
        u = transposed * rng.normal(size=DEPTH)
        rows = TwoWayRows(
            tf.constant(e[None, None]), tf.constant(h[None, None])
        )
        sent = TwoWayCotangents(
            tf.constant(g[None, None]), tf.constant(u[None, None])
        )
        block = made(build_block)
        block.accumulate(
            block.input_statistics(rows, tf.ones([1], tf.float64))
            | block.cotangent_statistics(rows, sent),
            0.0,
        )
        gradient = np.outer(e, g) + np.outer(u, h)
        np.testing.assert_allclose(
            rows.contract(sent)[0], gradient, rtol=1e-12, atol=1e-14
        )
        expected = np.outer(gradient, gradient)
        np.testing.assert_allclose(
            block.to_dense(), expected, rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("ratio", [None, 0.4])
@pytest.mark.parametrize("value", [1e-6, DAMPING, 10.0])
def test_preconditioner_is_the_dense_solve(
    build_block, sharing, size, value, ratio
):
    data = Data()
    options = {"weight_sharing": sharing, "max_factor_size": size}
    block = data.feed(made(build_block, **options))
    pi = None if ratio is None else tf.constant(ratio, tf.float64)
    retries, failures = block.refresh(damping(value), pi)
    assert (int(retries), int(failures)) == (0, 0)
    factors = kept(data.factors(sharing), size)
    dense = damped(*factors, value, ratio)
    found = block.precondition(tf.constant(data.gradient))
    np.testing.assert_allclose(found, solved(dense, data.gradient), rtol=1e-9)
    # The damping is at least λ.
    least = np.linalg.eigvalsh(dense - undamped(*factors)).min()
    assert least >= value * (1 - 1e-9)


@pytest.mark.parametrize("scales", [(1e-4, 1.0), (1.0, 1e-4)])
def test_uses_of_different_scale(build_block, size, scales):
    """A use with a small curvature is not lost beside the other."""
    data = Data(direct=scales[0], transposed=scales[1])
    block = data.feed(made(build_block, max_factor_size=size))
    block.refresh(damping())
    dense = damped(*kept(data.factors("expand"), size), DAMPING)
    found = block.precondition(tf.constant(data.gradient))
    np.testing.assert_allclose(found, solved(dense, data.gradient), rtol=1e-9)


def test_rows_above_the_bound_are_diagonal(build_block, monkeypatch):
    monkeypatch.setattr("keras_natgrad.blocks.tied.MAX_DENSE_ROWS", DEPTH - 1)
    block = made(build_block)
    assert block.describe() == "diag 7 ⊗ 3² + diag 7 ⊗ 3², expand"
    assert block.memory == 4 * DEPTH + 3 * WIDTH**2 + 2 * WIDTH
    assert block.refresh_cost == 10 * (WIDTH**3 + 1)


@pytest.mark.parametrize("dead", ["direct", "transposed"])
def test_one_use_without_curvature(build_block, sharing, dead, size):
    """It is the Kronecker block of the other use."""
    data = Data(**{dead: 0.0})
    options = {"weight_sharing": sharing, "max_factor_size": size}
    block = data.feed(made(build_block, **options))
    if dead == "transposed":
        other = build_block(
            create(
                "kronecker", BlockShape(DEPTH, WIDTH, one_hot=True), **options
            )
        )
        inputs, columns = data.rows().direct, data.g
    else:
        other = build_block(
            create("kronecker", BlockShape(WIDTH, DEPTH), **options)
        )
        inputs, columns = tf.constant(data.hidden), data.u
    sent = summed([other.cotangent_statistics(inputs, g) for g in columns])
    moment = other.input_statistics(inputs, tf.constant(data.weights))
    other.accumulate(moment | sent, 0.0)
    block.refresh(damping())
    other.refresh(damping())
    gradient = data.gradient if dead == "transposed" else data.gradient.T
    expected = other.precondition(tf.constant(gradient)).numpy()
    found = block.precondition(tf.constant(data.gradient))
    expected = expected if dead == "transposed" else expected.T
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_without_statistics(build_block):
    block, gradient = made(build_block), tf.constant(Data().gradient)
    assert float(block.trace()) == 0.0
    np.testing.assert_array_equal(block.precondition(gradient), 0.0 * gradient)
    block.refresh(damping())
    np.testing.assert_allclose(
        block.precondition(gradient), gradient / DAMPING, rtol=1e-12
    )


def test_spectra(build_block, sharing, size):
    data = Data()
    options = {"weight_sharing": sharing, "max_factor_size": size}
    block = data.feed(made(build_block, **options))
    block.refresh(damping())
    factors = kept(data.factors(sharing), size)
    found = np.sort(np.ravel(block.spectra()["fisher"]))
    np.testing.assert_allclose(
        found, np.linalg.eigvalsh(undamped(*factors)), rtol=1e-9, atol=1e-10
    )
    inverse = np.linalg.inv(damped(*factors, DAMPING))
    found = np.sort(np.ravel(block.inverse_spectra()["fisher"]))
    np.testing.assert_allclose(found, np.linalg.eigvalsh(inverse), rtol=1e-9)
    # One matrix of all entries, or for each row: 3 · 7^⅓ = 5.7.
    assert block.spectrum_side == (DEPTH * WIDTH if size == DEPTH else 6)


def test_state(build_block, size):
    block = made(build_block, max_factor_size=size)
    stored = sum(
        int(np.prod(variable.shape))
        for name, variable in block.created.items()
        if name != "weight"
    )
    columns = 3 * WIDTH**2 if size >= WIDTH else 2 * WIDTH
    rows = 2 * DEPTH**2 if size >= DEPTH else DEPTH
    assert block.memory == stored == rows + 3 * DEPTH + columns + 2 * WIDTH
    sides = [DEPTH if size >= DEPTH else 1, WIDTH if size >= WIDTH else 1]
    assert block.refresh_cost == 10 * (sides[0] ** 3 + sides[1] ** 3)
    if size == DEPTH:
        assert block.describe() == "diag 7 ⊗ 3² + 7² ⊗ 3², expand"


def test_failed_refresh_keeps_the_last_good_inverse(build_block, size):
    for broken in (np.nan, np.inf):
        for name in ("hidden", "u", "g"):
            data = Data()
            block = data.feed(made(build_block, max_factor_size=size))
            block.refresh(damping())
            gradient = tf.constant(data.gradient)
            good = block.precondition(gradient).numpy()
            getattr(data, name)[0] = broken
            data.feed(block)
            _, failures = block.refresh(damping())
            assert int(failures) == 1
            np.testing.assert_array_equal(block.precondition(gradient), good)


def test_no_damping_at_all(build_block, size):
    """A token that was not looked up still has the block of its logit."""
    data = Data()
    block = data.feed(made(build_block, max_factor_size=size))
    _, failures = block.refresh(damping(0.0))
    assert int(failures) == 0
    dense = undamped(*kept(data.factors("expand"), size))
    found = block.precondition(tf.constant(data.gradient))
    np.testing.assert_allclose(found, solved(dense, data.gradient), rtol=1e-9)


def test_running_average(build_block):
    first, second = Data(seed=1), Data(seed=2)
    block = made(build_block)
    first.feed(block, 0.9)
    second.feed(block, 0.9)
    for found, one, two in zip(
        block.averages().values(),
        first.factors("expand"),
        second.factors("expand"),
        strict=True,
    ):
        expected = (0.9 * one + two) / 1.9
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.variants("7-False")
@pytest.mark.parametrize("jit_compile", [False, True])
def test_compiles(build_block, size, jit_compile):
    """In a graph and under XLA to rounding."""
    data = Data()
    block = data.feed(made(build_block, max_factor_size=size))

    @tf.function(jit_compile=jit_compile)
    def run(gradient):
        counts = block.refresh(damping())
        return block.precondition(gradient), counts

    found, counts = run(tf.constant(data.gradient))
    dense = damped(*kept(data.factors("expand"), size), DAMPING)
    expected = solved(dense, data.gradient)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < (1e-10 if jit_compile else 1e-12)
    assert [int(count) for count in counts] == [0, 0]


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_exact_blocks_of_both_uses(build_block, kind):
    data = Data()
    block = build_block(create(kind, SHAPE))
    assert data.feed(block).kind == kind
    gradients = np.einsum("bsv,kbsi->kbvi", data.one_hot, data.g)
    gradients += np.einsum("kbsv,bsi->kbvi", data.u, data.hidden)
    flat = gradients.reshape(-1, DEPTH * WIDTH)
    expected = flat.T @ flat
    if kind == "diagonal":
        expected = np.diag(np.diag(expected))
    np.testing.assert_allclose(
        block.to_dense(), expected, rtol=1e-9, atol=1e-11
    )
    # The slope along a direction, for the estimated quadratic model.
    sent = TwoWayCotangents(tf.constant(data.g[0]), tf.constant(data.u[0]))
    np.testing.assert_allclose(
        slopes(data.rows(), sent, tf.constant(data.gradient)),
        np.einsum("bvi,vi->b", gradients[0], data.gradient),
        rtol=1e-11,
    )
    taken = data.rows().take(tf.constant([2, 0]))
    assert taken.dtype == tf.float64
    np.testing.assert_array_equal(taken.direct.to_dense(), data.one_hot[[2, 0]])
    np.testing.assert_array_equal(taken.transposed, data.hidden[[2, 0]])


@pytest.mark.parametrize(
    "kind", ["kronecker", "ekfac", "unitwise", "coupled", "input_factor"]
)
def test_other_blocks_refuse(kind):
    with pytest.raises(ValueError, match="used as its transpose too"):
        create(kind, SHAPE)


def test_one_way_matrices_are_refused():
    with pytest.raises(ValueError, match=r"use 'kronecker'\. Received"):
        create("tied", BlockShape(DEPTH, WIDTH))
