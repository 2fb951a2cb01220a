"""Fisher statistics of a network equal the NumPy reference."""

import itertools

import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

from keras_natgrad.curvature import BlockOptions
from tests.reference import fisher, kfac
from tests.reference.bridge import mlp, network_of, randomize
from tests.reference.unknown import Unknown

HEADS = ["normal", "bernoulli", "categorical"]


def inputs(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def two_heads():
    source = keras.Input((3,))
    trunk = keras.layers.Dense(3, activation="tanh")
    first, second = keras.layers.Dense(2), keras.layers.Dense(3)
    hidden = trunk(source)
    model = keras.Model(source, [first(hidden), second(hidden)])
    randomize(model)
    network = network_of([trunk, first, second], sources={2: 1}, outputs=(2, 3))
    return model, network


def exact_block(trace, terms, parameter, name):
    if name == "full":
        return fisher.block(trace, terms, parameter)
    if name == "diagonal":
        return np.diag(np.diag(fisher.block(trace, terms, parameter)))
    return np.kron(*kfac.exact_factors(trace, terms, parameter, name))


def options_of(name):
    if name in ("expand", "reduce"):
        return {"block": "kronecker", "weight_sharing": name}
    return {"block": name}


BLOCKS = ["full", "diagonal", "expand", "reduce"]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("head", HEADS)
def test_exact_statistics(name, head, record):
    model, x = mlp([3, 4, 2]), inputs(5, 3)
    recorded = record(model, x, [head], **options_of(name))
    trace = network_of(model.layers).trace(x)
    for parameter, block in enumerate(recorded.update("exact")):
        expected = exact_block(trace, recorded.reference_terms, parameter, name)
        np.testing.assert_allclose(
            block.to_dense(), expected, rtol=1e-10, atol=1e-13
        )


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("pool", [False, True], ids=["sequence", "pooled"])
def test_exact_statistics_of_sequences(name, pool, record):
    model, x = mlp([2, 3, 2], positions=3, pool=pool), inputs(4, 3, 2)
    recorded = record(model, x, ["categorical"], **options_of(name))
    trace = network_of(model.layers).trace(x)
    for parameter, block in enumerate(recorded.update("exact")):
        expected = exact_block(trace, recorded.reference_terms, parameter, name)
        np.testing.assert_allclose(
            block.to_dense(), expected, rtol=1e-10, atol=1e-13
        )


@pytest.mark.parametrize("name", BLOCKS)
def test_exact_statistics_of_two_heads(name, record):
    model, network = two_heads()
    x = inputs(4, 3)
    recorded = record(
        model, x, ["bernoulli", "categorical"], **options_of(name)
    )
    trace = network.trace(x)
    for parameter, block in enumerate(recorded.update("exact")):
        expected = exact_block(trace, recorded.reference_terms, parameter, name)
        np.testing.assert_allclose(
            block.to_dense(), expected, rtol=1e-10, atol=1e-13
        )


@pytest.mark.variants("full", "expand")
@pytest.mark.parametrize("name", BLOCKS)
def test_all_signs_average_to_the_exact_statistics(name, record):
    """The propagated kind is unbiased: every sign pattern of N P K = 8."""
    model, x = mlp([2, 2, 2], positions=2), inputs(2, 2, 2)
    recorded = record(model, x, ["categorical"], **options_of(name))
    (term,) = recorded.terms
    blocks = [entry.block for entry in recorded.curvature.entries]
    total = [0.0 for _ in blocks]
    patterns = list(itertools.product([-1.0, 1.0], repeat=8))
    for signs in patterns:
        values = tf.reshape(tf.constant(signs, tf.float64), [2, 2, 2])
        backward = recorded.captured.backward([term.cotangent(values)])
        for index, block in enumerate(blocks):
            ((_, statistic),) = block.cotangent_statistics(
                recorded.captured.inputs[index], backward.cotangents[index]
            ).items()
            total[index] += statistic.numpy() / len(patterns)
    # Both layers have one shape.
    (exact,) = recorded.statistics("exact")
    *_, statistics = exact.values()
    np.testing.assert_allclose(total, statistics, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("kind", ["propagated", "sampled"])
@pytest.mark.parametrize("head", HEADS)
def test_random_kinds_converge(kind, head, record):
    """4 000 copies of an example: relative error below 10 %.

    The standard error is about √(2 / 4 000) ≈ 2 % of the trace.
    """
    model = mlp([3, 2, 2])
    x = np.repeat(inputs(1, 3), 4000, axis=0)
    recorded = record(model, x, [head], block="full")
    exact = [b.to_dense().numpy() for b in recorded.update("exact")]
    random = [b.to_dense().numpy() for b in recorded.update(kind, seed=5)]
    for found, expected in zip(random, exact, strict=True):
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error < 0.1


@pytest.mark.parametrize("head", HEADS)
def test_empirical_is_its_definition(head, record):
    model, x = mlp([3, 4, 3]), inputs(5, 3)
    rng = np.random.default_rng(1)
    targets = {
        "normal": rng.normal(size=(5, 3)),
        "bernoulli": rng.integers(0, 2, size=(5, 3)).astype(float),
        "categorical": rng.integers(0, 3, size=5),
    }[head]
    recorded = record(model, x, [head], targets=[targets], block="full")
    trace = network_of(model.layers).trace(x)
    for parameter, block in enumerate(recorded.update("empirical")):
        expected = fisher.empirical(trace, recorded.reference_terms, parameter)
        np.testing.assert_allclose(
            block.to_dense(), expected, rtol=1e-10, atol=1e-13
        )


def test_seed_decides_the_random_kinds(record):
    recorded = record(mlp([3, 4, 2]), inputs(5, 3), ["categorical"])
    for kind in ("propagated", "sampled"):
        first, again, other = (
            [value.numpy() for value in tf.nest.flatten(statistics)]
            for statistics in (
                recorded.statistics(kind, 1),
                recorded.statistics(kind, 1),
                recorded.statistics(kind, 2),
            )
        )
        for a, b in zip(first, again, strict=True):
            np.testing.assert_array_equal(a, b)
        assert any(
            not np.allclose(a, b) for a, b in zip(first, other, strict=True)
        )


@pytest.mark.parametrize("fallback", ["diagonal", "first_order"])
def test_fallback_of_one_example_is_the_diagonal(fallback, record):
    """A layer without a linear map; its diagonal is exact here."""
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, activation="tanh"),
            Unknown(),
            keras.layers.Dense(2),
        ]
    )
    randomize(model)
    recorded = record(model, inputs(1, 3), ["bernoulli"], fallback=fallback)
    blocks = recorded.update("exact")
    (term,) = recorded.terms
    root = np.sqrt(term.head.fisher(term.outputs)[0] * term.coefficients[0])
    fallbacks = [e for e in recorded.curvature.entries if e.layer is None]
    assert len(fallbacks) == 2
    for entry in fallbacks:
        variable = recorded.variables[entry.variables[0]]
        jacobian = recorded.tape.jacobian(term.outputs, variable.value)
        u = root @ np.reshape(jacobian, (2, -1))
        diagonal = np.sum(u**2, axis=0)
        if fallback == "first_order":
            diagonal = np.full_like(diagonal, diagonal.mean())
        np.testing.assert_allclose(
            entry.block.operator().diag_part(), diagonal, rtol=1e-10
        )
    assert len(blocks) == 4


class PartlyUsed(keras.Model):
    """A model that does not call its first layer."""

    def __init__(self):
        super().__init__()
        self.unused = keras.layers.Dense(2)
        self.used = keras.layers.Dense(2)
        self.unused.build((None, 3))
        self.used.build((None, 3))
        self.built = True

    def call(self, x):
        return self.used(x)


@pytest.mark.parametrize("name", BLOCKS)
def test_unused_layer_has_zero_curvature(name, record):
    recorded = record(
        PartlyUsed(), inputs(4, 3), ["normal"], **options_of(name)
    )
    unused, used = recorded.update("exact")
    np.testing.assert_array_equal(unused.to_dense(), np.zeros((8, 8)))
    assert float(used.trace()) > 0


def test_mean_eigenvalue(record):
    recorded = record(mlp([3, 4, 2]), inputs(5, 3), ["categorical"])
    blocks = recorded.update("exact")
    means = [np.trace(b.to_dense()) / b.shape.size for b in blocks]
    sizes = [block.shape.size for block in blocks]
    np.testing.assert_allclose(
        recorded.curvature.mean_eigenvalue(),
        scipy.stats.hmean(means, weights=sizes),
        rtol=1e-12,
    )
    assert recorded.curvature.size == 4 * 4 + 5 * 2


@pytest.mark.parametrize("name", BLOCKS)
def test_precondition_solves_every_layer(name, record):
    """With the regularizer of the kernel added to the damping."""
    model, x = mlp([3, 4, 2]), inputs(30, 3)
    recorded = record(model, x, ["bernoulli"], **options_of(name))
    curvature, ridge = recorded.curvature, [0.2, 0.0, 0.1, 0.0]
    recorded.update("exact")
    retries, failures = curvature.refresh(tf.constant(0.3, tf.float64), ridge)
    assert (int(retries), int(failures)) == (0, 0)
    rng = np.random.default_rng(2)
    gradients = [rng.normal(size=tuple(v.shape)) for v in recorded.variables]
    matrices = curvature.to_matrices(gradients)
    solved = curvature.split(curvature.precondition(matrices))
    matrices = curvature.split(matrices)
    for index, entry in enumerate(curvature.entries):
        damping = 0.3 + ridge[entry.variables[0]]
        dense = entry.block.to_dense().numpy()
        if name in ("full", "diagonal"):
            inverse = np.linalg.inv(dense + damping * np.eye(len(dense)))
        else:
            inverse = np.kron(
                *kfac.factored_inverses(
                    *(a.numpy() for a in entry.block.averages().values()),
                    damping,
                )
            )
        np.testing.assert_allclose(
            np.ravel(solved[index]),
            inverse @ np.ravel(matrices[index]),
            rtol=1e-9,
        )


class PartlyCut(keras.Model):
    """A model whose first layer sees large inputs, and never the loss."""

    def __init__(self, all_cut=False):
        super().__init__()
        self.all_cut = all_cut
        self.cut, self.used = keras.layers.Dense(2), keras.layers.Dense(2)
        self.cut.build((None, 3))
        self.used.build((None, 3))
        self.built = True

    def call(self, x):
        used, cut = self.used(x), tf.stop_gradient(self.cut(10.0 * x))
        return cut + (tf.stop_gradient(used) if self.all_cut else used)


def refreshed_inverses(recorded, damping):
    """Per block, A and G in NumPy and the two inverses it made of them."""
    blocks = recorded.update("exact")
    recorded.curvature.refresh(
        tf.constant(damping, tf.float64), [0.0] * len(recorded.variables)
    )
    return [
        (
            [average.numpy() for average in block.averages().values()],
            [block._input.inverse.numpy(), block._output.inverse.numpy()],
        )
        for block in blocks
    ]


def assert_split(factors, inverses, ratio, damping):
    """Asserts `(A + π√λ I)⁻¹` and `(G + √λ/π I)⁻¹`."""
    shares = ratio * damping**0.5, damping**0.5 / ratio
    for factor, inverse, share in zip(factors, inverses, shares, strict=True):
        damped = factor + share * np.eye(len(factor))
        np.testing.assert_allclose(
            inverse, np.linalg.inv(damped), rtol=1e-9, atol=1e-12
        )


def global_ratio(pairs):
    """`0.2 √(ā / ḡ)` with harmonic means; the 0.2 was measured.

    ā is the mean over all input features of the mean eigenvalue of their
    factor, ḡ that over all output features.
    """
    left, right = (
        scipy.stats.hmean(
            [np.trace(factor) / len(factor) for factor in side],
            weights=[len(factor) for factor in side],
        )
        for side in zip(*pairs, strict=True)
    )
    return 0.2 * np.sqrt(left / right)


def test_global_damping_split(record):
    """One π for all layers, which none of them has for itself."""
    model, x, damping = mlp([3, 4, 2]), inputs(5, 3), 0.3
    recorded = record(model, x, ["categorical"], damping_split="global")
    trace = network_of(model.layers).trace(x)
    pairs = [
        kfac.exact_factors(trace, recorded.reference_terms, parameter)
        for parameter in range(2)
    ]
    ratio = global_ratio(pairs)
    found = refreshed_inverses(recorded, damping)
    for pair, (_, inverses) in zip(pairs, found, strict=True):
        assert_split(pair, inverses, ratio, damping)
        assert abs(np.log(ratio / kfac.pi(*pair))) > 0.5


def test_damping_split_by_layer(record):
    model, x, damping = mlp([3, 4, 2]), inputs(5, 3), 0.3
    recorded = record(model, x, ["categorical"], damping_split="layer")
    trace = network_of(model.layers).trace(x)
    for parameter, (_, inverses) in enumerate(
        refreshed_inverses(recorded, damping)
    ):
        pair = kfac.exact_factors(trace, recorded.reference_terms, parameter)
        assert_split(pair, inverses, kfac.pi(*pair), damping)


def test_layer_out_of_reach_has_no_say_in_the_global_split(record):
    recorded = record(
        PartlyCut(), inputs(5, 3), ["normal"], damping_split="global"
    )
    (cut, cut_inverses), (used, inverses) = refreshed_inverses(recorded, 0.3)
    assert np.trace(cut[0]) > 10 * np.trace(used[0])
    np.testing.assert_array_equal(cut[1], np.zeros((2, 2)))
    ratio = global_ratio([used])
    assert_split(used, inverses, ratio, 0.3)
    assert_split(cut, cut_inverses, ratio, 0.3)


def test_global_split_where_no_layer_is_reached(record):
    """There is nothing to compare: the factors share alike, but for the k."""
    recorded = record(
        PartlyCut(all_cut=True),
        inputs(5, 3),
        ["normal"],
        damping_split="global",
    )
    for factors, inverses in refreshed_inverses(recorded, 0.3):
        np.testing.assert_array_equal(factors[1], np.zeros((2, 2)))
        assert_split(factors, inverses, 0.2, 0.3)


def test_directions_and_matrices_round_trip(record):
    recorded = record(mlp([3, 4, 2]), inputs(5, 3), ["normal"])
    rng = np.random.default_rng(2)
    tensors = [rng.normal(size=tuple(v.shape)) for v in recorded.variables]
    matrices = recorded.curvature.to_matrices(tensors)
    back = recorded.curvature.from_matrices(matrices)
    for tensor, expected in zip(back, tensors, strict=True):
        np.testing.assert_array_equal(tensor, expected)


def test_wrong_options():
    with pytest.raises(ValueError, match="`fallback` must be one of"):
        BlockOptions(fallback="none")
    with pytest.raises(ValueError, match="`weight_sharing` must be"):
        BlockOptions(weight_sharing="none")
    with pytest.raises(ValueError, match="`damping_split` must be"):
        BlockOptions(damping_split="none")
