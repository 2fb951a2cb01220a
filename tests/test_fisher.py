"""`keras_natgrad.fisher` equals the dense reference."""

import keras
import numpy as np
import pytest
from scipy.linalg import block_diag

import keras_natgrad as kng
from tests.reference import fisher as reference
from tests.reference import kfac
from tests.reference.bridge import mlp, network_of, randomize
from tests.reference.heads import Term
from tests.reference.unknown import Unknown

pytestmark = pytest.mark.usefixtures("float64")

X = np.random.default_rng(0).normal(size=(5, 3))
HEADS = {
    "normal": kng.heads.Normal(scale=0.7),
    "bernoulli": kng.heads.Bernoulli(),
    "categorical": kng.heads.Categorical(),
}


def mean_term(head, batch=5, positions=1):
    coefficients = np.full((batch, positions), 1.0 / (batch * positions))
    return Term(head, coefficients, scale=0.7)


@pytest.fixture
def model():
    return mlp([3, 4, 2])


def assert_operators(operators, model, expected):
    assert list(operators) == [layer.path for layer in model.layers]
    for operator, matrix in zip(operators.values(), expected, strict=True):
        np.testing.assert_allclose(
            operator.to_dense(), matrix, rtol=1e-10, atol=1e-14
        )


@pytest.mark.parametrize("head", HEADS)
def test_kronecker(head, model):
    trace = network_of(model.layers).trace(X)
    expected = [
        np.kron(*kfac.exact_factors(trace, [mean_term(head)], i))
        for i in range(2)
    ]
    for name in ("kronecker", "kfac"):
        operators = kng.fisher(model, X, HEADS[head], name)
        assert_operators(operators, model, expected)
    assert_operators(kng.fisher(model, X, HEADS[head]), model, expected)


@pytest.mark.parametrize("head", HEADS)
def test_full_and_diagonal(head, model):
    trace = network_of(model.layers).trace(X)
    blocks = [reference.block(trace, [mean_term(head)], i) for i in range(2)]
    full = kng.fisher(model, X, HEADS[head], "full")
    assert_operators(full, model, blocks)
    diagonal = kng.fisher(model, X, HEADS[head], "diagonal")
    assert_operators(diagonal, model, [np.diag(np.diag(b)) for b in blocks])


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("positions", [None, 4])
def test_ekfac(positions, weight_sharing):
    """The diagonal of the exact block, in the eigenbasis of K-FAC."""
    model = mlp([2, 3, 2], positions=positions)
    x = np.random.default_rng(0).normal(size=(5, *model.input_shape[1:]))
    terms = [mean_term("categorical", 5, positions or 1)]
    trace = network_of(model.layers).trace(x)
    expected = []
    for index in range(2):
        factors = kfac.exact_factors(trace, terms, index, weight_sharing)
        turn = np.kron(*[np.linalg.eigh(factor)[1] for factor in factors])
        exact = reference.block(trace, terms, index)
        scales = np.diag(turn.T @ exact @ turn)
        expected.append(turn @ np.diag(scales) @ turn.T)
    head = HEADS["categorical"]
    operators = kng.fisher(
        model, x, head, "ekfac", weight_sharing=weight_sharing
    )
    for operator, matrix in zip(operators.values(), expected, strict=True):
        np.testing.assert_allclose(
            operator.to_dense(), matrix, rtol=1e-10, atol=1e-14
        )


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("pool", [False, True])
def test_sequences(weight_sharing, pool):
    model = mlp([2, 3, 2], positions=4, pool=pool)
    x = np.random.default_rng(0).normal(size=(3, 4, 2))
    terms = [mean_term("categorical", 3, 1 if pool else 4)]
    trace = network_of(model.layers).trace(x)
    operators = kng.fisher(
        model, x, HEADS["categorical"], weight_sharing=weight_sharing
    )
    for index, operator in enumerate(operators.values()):
        factors = kfac.exact_factors(trace, terms, index, weight_sharing)
        np.testing.assert_allclose(
            operator.to_dense(), np.kron(*factors), rtol=1e-10, atol=1e-14
        )


def test_one_layer_and_combination(model):
    head = HEADS["bernoulli"]
    operators = kng.fisher(model, X, head)
    first, second = (op.to_dense().numpy() for op in operators.values())
    layer = model.layers[0]
    for name in (layer.path, layer.name):
        found = kng.fisher(model, X, head, layer=name)
        np.testing.assert_array_equal(found.to_dense(), first)
    whole = kng.fisher(model, X, head, combine=True).to_dense()
    np.testing.assert_allclose(whole[:16, :16], first)
    np.testing.assert_allclose(whole[16:, 16:], second)
    np.testing.assert_array_equal(whole[:16, 16:], np.zeros((16, 10)))


class SameNames(keras.layers.Layer):
    """Layers inside a layer whose names are given by hand."""

    def __init__(self):
        super().__init__(name="outer")
        self.parts = [
            keras.layers.Dense(3, "tanh", name="d"),
            keras.layers.Dense(3, "tanh", name="d"),
            Unknown(name="u"),
            keras.layers.Dense(3, "tanh", name="d"),
            Unknown(name="u"),
        ]

    def build(self, shape):
        for layer in self.parts:
            layer.build(shape)

    def call(self, x):
        for layer in self.parts:
            x = layer(x)
        return x


def test_layers_that_share_a_path():
    """They have the operators that they have with names of their own."""
    model = keras.Sequential([keras.Input((3,)), SameNames()])
    randomize(model)
    operators = kng.fisher(model, X, HEADS["normal"])
    assert [name.split("outer/")[1] for name in operators] == [
        *("d", "d#2", "d#3", "u/gamma", "u/beta", "u/gamma#2", "u/beta#2")
    ]
    other = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(3, "tanh"),
            keras.layers.Dense(3, "tanh"),
            Unknown(),
            keras.layers.Dense(3, "tanh"),
            Unknown(),
        ]
    )
    other.set_weights(model.get_weights())
    expected = list(kng.fisher(other, X, HEADS["normal"]).values())
    # Keras lists the layers inside a layer backwards.
    expected = [each.to_dense() for each in expected[2::-1] + expected[3:]]
    for operator, matrix in zip(operators.values(), expected, strict=True):
        np.testing.assert_allclose(operator.to_dense(), matrix, rtol=1e-12)
    whole = kng.fisher(model, X, HEADS["normal"], combine=True).to_dense()
    np.testing.assert_allclose(whole, block_diag(*expected), rtol=1e-12)


def test_two_outputs(model):
    source = keras.Input((3,))
    hidden = keras.layers.Dense(3, activation="tanh")
    one, two = keras.layers.Dense(2), keras.layers.Dense(3)
    h = hidden(source)
    model = keras.Model(source, [one(h), two(h)])
    randomize(model)
    heads = [HEADS["bernoulli"], HEADS["categorical"]]
    operators = kng.fisher(model, X, heads, "full")
    network = network_of([hidden, one, two], sources={2: 1}, outputs=(2, 3))
    terms = [mean_term("bernoulli"), mean_term("categorical")]
    trace = network.trace(X)
    for index, layer in enumerate([hidden, one, two]):
        np.testing.assert_allclose(
            operators[layer.path].to_dense(),
            reference.block(trace, terms, index),
            rtol=1e-10,
            atol=1e-14,
        )


@pytest.mark.parametrize("kind", ["propagated", "sampled"])
def test_random_kinds_are_reproducible_and_unbiased(kind):
    """4 000 copies of an example: relative error below 10 %."""
    model = mlp([3, 2, 2])
    x = np.repeat(X[:1], 4000, axis=0)
    head = HEADS["categorical"]
    exact = kng.fisher(model, x, head, "full", combine=True).to_dense()
    first, again, other = (
        kng.fisher(
            model, x, head, "full", kind, combine=True, seed=seed
        ).to_dense()
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other, rtol=1e-6)
    # The combination is block diagonal, as is the estimate.
    assert np.linalg.norm(first - exact) < 0.1 * np.linalg.norm(exact)


def test_variables_without_a_linear_map_have_their_diagonal():
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(2),
            Unknown(),
        ]
    )
    randomize(model)
    operators = kng.fisher(model, X, HEADS["normal"])
    dense, norm = model.layers
    assert list(operators) == [dense.path, norm.gamma.path, norm.beta.path]
    # ∂η/∂β = 1: with c = 1/N the diagonal is N c / σ² on average, and the
    # sum of five signs squared times c for one batch.
    beta = operators[norm.beta.path].diag_part().numpy()
    assert beta.shape == (2,)
    assert np.all(beta >= 0)


def test_frozen_layers_are_left_out(model):
    model.layers[0].trainable = False
    operators = kng.fisher(model, X, HEADS["normal"])
    assert list(operators) == [model.layers[1].path]


def test_head_by_name(model):
    named = kng.fisher(model, X, "bernoulli", combine=True).to_dense()
    given = kng.fisher(model, X, HEADS["bernoulli"], combine=True).to_dense()
    np.testing.assert_array_equal(named, given)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_dtype_of_the_operators(dtype):
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy(dtype)
    operators = kng.fisher(mlp([3, 4, 2]), X.astype("float32"), HEADS["normal"])
    assert all(op.dtype == "float32" for op in operators.values())


def test_errors(model):
    head = HEADS["normal"]
    with pytest.raises(ValueError, match="`kind` must be"):
        kng.fisher(model, X, head, kind="empirical")
    with pytest.raises(ValueError, match="`kind` must be"):
        kng.fisher(model, X, head, kind="all")
    with pytest.raises(ValueError, match="Unknown block"):
        kng.fisher(model, X, head, "dense")
    with pytest.raises(ValueError, match="`layer` must name one layer"):
        kng.fisher(model, X, head, layer="none")
    with pytest.raises(ValueError, match="leave one of them out. Received"):
        kng.fisher(model, X, head, layer="dense", combine=True)
    with pytest.raises(ValueError, match="has no weights yet"):
        kng.fisher(keras.Sequential([keras.layers.Dense(2)]), X, head)
    with pytest.raises(ValueError, match="one output per class"):
        kng.fisher(mlp([3, 1]), X, HEADS["categorical"])


@pytest.mark.parametrize("name", ["kronecker", "kfac", "tied", "auto"])
def test_tied_embedding(name):
    """The sum of two Kronecker products, from per-example cotangents."""
    depth, width, length, batch = 5, 3, 2, 4
    ids = keras.Input((length,), dtype="int32")
    tied = keras.layers.ReversibleEmbedding(depth, width)
    model = keras.Model(ids, tied(keras.ops.tanh(tied(ids)), reverse=True))
    rng = np.random.default_rng(0)
    tied.embeddings.assign(rng.normal(size=(depth, width)))
    x = rng.integers(0, depth, size=(batch, length))
    (operator,) = kng.fisher(model, x, HEADS["categorical"], name).values()
    e = tied.embeddings.numpy()
    hidden = np.tanh(e[x])
    logits = hidden @ e.T
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    # Cotangents of the columns of L, one at a time: L Lᵀ = diag p − p pᵀ.
    fisher = np.einsum("bti,ij->btij", p, np.eye(depth))
    fisher -= p[..., :, None] * p[..., None, :]
    fisher /= batch * length
    slope = 1 - hidden**2
    gradients = np.einsum("bti,vi,btvw,wj,btj->ij", slope, e, fisher, e, slope)
    counts = np.bincount(x.ravel(), minlength=depth) / x.size
    moment = np.einsum("bti,btj->ij", hidden, hidden) / x.size
    expected = np.kron(np.diag(counts), gradients)
    expected += np.kron(fisher.sum(axis=(0, 1)), moment)
    np.testing.assert_allclose(
        operator.to_dense(), expected, rtol=1e-10, atol=1e-14
    )
