"""EKFAC: exact second moments in the eigenbasis of K-FAC, in NumPy."""

import keras
import numpy as np
import pytest
import scipy.linalg
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_natgrad as kng
from keras_natgrad.blocks import BlockShape, EigenBlock, create
from tests.blocks import test_contract as contract
from tests.blocks.conftest import COLUMNS, ROWS, Data, build, summed
from tests.blocks.test_contract import DAMPING, damping
from tests.blocks.test_spectra import check
from tests.reference import kfac
from tests.training.networks import (
    FEATURES,
    assert_close,
    assert_equal,
    compiled,
    mlp,
    state,
    weights,
)
from tests.training.networks import data as examples

# Both bases, one, and none.
BOUNDS = (4096, 2, 1)
KINDS = {
    "expand": {},
    "reduce": {"weight_sharing": "reduce"},
    "one_basis": {"max_factor_size": 2},
    "no_basis": {"max_factor_size": 1},
}


@pytest.fixture(params=KINDS)
def block(request, make_block):
    return make_block("ekfac", **KINDS[request.param])


# What every block has to do. A refresh changes this one, in rounding at
# least, so that two tests of the contract are not for it.
test_operator = contract.test_operator_matches_its_dense_matrix
test_trace = contract.test_trace
test_running_average = contract.test_running_average_is_the_weighted_mean
test_first_average = contract.test_first_average_is_the_first_batch
test_empty = contract.test_empty_block_is_zero
test_failed_refresh = contract.test_failed_refresh_keeps_the_last_good_inverse
test_good_refresh = contract.test_good_refresh_counts_nothing
test_memory = contract.test_memory_counts_what_is_stored
test_xla = contract.test_compiles_under_xla


def factors(data, sharing="expand", bound=4096):
    """A and G; of a side above the bound the diagonal."""
    sides = (
        kfac.input_factor(
            data.inputs, data.weights / data.weights.sum(), sharing
        ),
        kfac.output_factor(data.columns, sharing),
    )
    return [np.diag(np.diag(f)) if len(f) > bound else f for f in sides]


def bases(pair):
    """Eigenvectors; of a diagonal matrix the unit vectors, in order."""
    return [
        np.eye(len(f))
        if np.allclose(f, np.diag(np.diag(f)))
        else scipy.linalg.eigh(f)[1]
        for f in pair
    ]


def corrected(pair, exact):
    """The part of the exact block that is diagonal in K-FAC's eigenbasis."""
    turn = np.kron(*bases(pair))
    return turn @ np.diag(np.diag(turn.T @ exact @ turn)) @ turn.T


def feed_twice(block, data, feed):
    """A batch whose second moments are taken in its own eigenbasis."""
    feed(block, data)
    assert block.update_basis()
    feed(block, data)
    return block


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_definition(sharing, shared, bound, make_block, make_data, feed):
    data = make_data(shared)
    options = {"weight_sharing": sharing, "max_factor_size": bound}
    block = feed_twice(make_block("ekfac", **options), data, feed)
    dense = corrected(factors(data, sharing, bound), data.full())
    np.testing.assert_allclose(block.to_dense(), dense, rtol=1e-9, atol=1e-11)
    block.refresh(damping())
    np.testing.assert_allclose(block.to_dense(), dense, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(
        np.ravel(block.precondition(tf.constant(data.gradient))),
        np.linalg.solve(dense + DAMPING * np.eye(6), data.gradient.ravel()),
        rtol=1e-9,
    )
    np.testing.assert_allclose(block.trace(), np.trace(data.full()), rtol=1e-11)
    check(block)


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**32 - 1),
    shared=st.integers(1, 3),
    sharing=st.sampled_from(["expand", "reduce"]),
    bound=st.sampled_from(BOUNDS),
)
def test_never_farther_from_the_exact_block_than_kfac(
    seed, shared, sharing, bound
):
    data = Data(shared, seed)
    options = {"weight_sharing": sharing, "max_factor_size": bound}
    distances = []
    for kind in ("ekfac", "kfac"):
        block = build(create(kind, BlockShape(ROWS, COLUMNS), **options))
        for _ in range(2):
            inputs = block.input_statistics(data.inputs, data.weights)
            columns = [
                block.cotangent_statistics(data.inputs, g) for g in data.columns
            ]
            block.accumulate(inputs | summed(columns), 0.0)
            block.update_basis()
        distances.append(np.linalg.norm(block.to_dense() - data.full()))
    # Both are diagonal in one basis, this one has the diagonal of the block.
    assert distances[0] < distances[1] * (1 + 1e-9)


def test_one_example_is_exact(make_block, make_data, feed):
    """A rank-one block, `a aᵀ ⊗ g gᵀ`."""
    data = make_data(1)
    data.inputs, data.weights = data.inputs[:1], data.weights[:1]
    data.columns = data.columns[:1, :1]
    (a,), (g,) = data.inputs[0], data.columns[0, 0]
    block = feed_twice(make_block("ekfac"), data, feed)
    vector = np.kron(a, g)
    np.testing.assert_allclose(
        block.to_dense(), np.outer(vector, vector), rtol=1e-9, atol=1e-12
    )


def turned(scales, pair, old, new):
    """S in other bases, see `EigenBlock`."""
    here, there = (
        np.outer(
            *[np.diag(q.T @ f @ q) for q, f in zip(each, pair, strict=True)]
        )
        for each in (old, new)
    )
    left, right = [(b.T @ a) ** 2 for a, b in zip(old, new, strict=True)]
    return there * (left @ (scales / here) @ right.T)


def test_a_refresh_turns_the_scales(make_block, make_data, feed):
    first, second = make_data(seed=1), make_data(seed=2)
    block = make_block("ekfac")
    feed(block, first, 0.9)
    block.refresh(damping())
    pair = factors(first)
    identity, basis = [np.eye(ROWS), np.eye(COLUMNS)], bases(pair)
    scales = np.diag(first.full()).reshape(ROWS, COLUMNS)
    scales = turned(scales, pair, identity, basis)
    turn = np.kron(*basis)
    dense = turn @ np.diag(scales.ravel()) @ turn.T
    np.testing.assert_allclose(block.to_dense(), dense, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(block.trace(), np.trace(first.full()))
    # The next batch is averaged on in the new bases.
    feed(block, second, 0.9)
    own = np.diag(turn.T @ second.full() @ turn).reshape(ROWS, COLUMNS)
    scales = (0.9 * scales + own) / 1.9
    dense = turn @ np.diag(scales.ravel()) @ turn.T
    np.testing.assert_allclose(block.to_dense(), dense, rtol=1e-9, atol=1e-11)
    block.refresh(damping())
    pair = [
        (0.9 * a + b) / 1.9 for a, b in zip(pair, factors(second), strict=True)
    ]
    new = bases(pair)
    scales = turned(scales, pair, basis, new)
    turn = np.kron(*new)
    dense = turn @ np.diag(scales.ravel()) @ turn.T
    np.testing.assert_allclose(block.to_dense(), dense, rtol=1e-9, atol=1e-11)
    check(block)


def test_a_refresh_without_new_statistics_changes_rounding_only(
    block, data, feed
):
    feed(block, data)
    block.refresh(damping())
    dense = block.to_dense().numpy()
    gradient = tf.constant(data.gradient)
    first = block.precondition(gradient).numpy()
    block.refresh(damping())
    np.testing.assert_allclose(block.to_dense(), dense, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(block.precondition(gradient), first, rtol=1e-11)


def test_inverse_of_another_block(make_block, make_data, feed):
    """Statistics go on in the old bases while a copy is refreshed."""
    first, second = make_data(seed=1), make_data(seed=2)
    own, copy = make_block("ekfac"), make_block("ekfac")
    feed(own, first)
    own.refresh(damping())
    copy.copy_statistics(own)
    copy.copy_inverse(own)
    np.testing.assert_allclose(copy.to_dense(), own.to_dense(), rtol=1e-11)
    feed(own, second, 0.5)
    expected = make_block("ekfac")
    expected.copy_statistics(own)
    expected.refresh(damping())
    feed(copy, second, 0.5)
    copy.refresh(damping())
    own.copy_inverse(copy)
    for left, right in zip(own.bases(), copy.bases(), strict=True):
        np.testing.assert_array_equal(left, right)
    gradient = tf.constant(first.gradient)
    for found in (own, copy):
        np.testing.assert_allclose(
            found.to_dense(), expected.to_dense(), rtol=1e-10, atol=1e-12
        )
        np.testing.assert_allclose(
            found.precondition(gradient),
            expected.precondition(gradient),
            rtol=1e-10,
        )


def test_unknown_number_of_positions_in_a_graph(make_data, make_block):
    block = make_block("ekfac")
    specs = [
        tf.TensorSpec([None, None, size], tf.float64)
        for size in (ROWS, COLUMNS)
    ]
    traced = tf.function(block.cotangent_statistics, input_signature=specs)
    for shared in (1, 3):
        data = make_data(shared)
        block.created["input_basis"].assign(bases(factors(data))[0])
        found = traced(data.inputs, data.columns[0])
        expected = block.cotangent_statistics(data.inputs, data.columns[0])
        assert set(found) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-12)


def convolutional():
    return keras.Sequential(
        [
            keras.Input((4, 3, 2)),
            keras.layers.Conv2D(3, 2, activation="tanh"),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ]
    ), np.random.default_rng(0).normal(size=(5, 4, 3, 2))


def looked_up():
    return keras.Sequential(
        [
            keras.Input((3,), dtype="int32"),
            keras.layers.Embedding(6, 2),
            keras.layers.Dense(3, activation="tanh"),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ]
    ), np.random.default_rng(0).integers(0, 6, size=(8, 3))


@pytest.mark.parametrize("make", [convolutional, looked_up])
def test_patches_and_tokens(make, float64):
    """Of the layers of a model, from their exact blocks and factors."""
    model, x = make()
    head = kng.heads.Categorical()
    found, exact, products = (
        kng.fisher(model, x, head, name) for name in ("ekfac", "full", "kfac")
    )
    for name, operator in found.items():
        pair = [f.to_dense().numpy() for f in products[name].operators]
        np.testing.assert_allclose(
            operator.to_dense(),
            corrected(pair, exact[name].to_dense().numpy()),
            rtol=1e-9,
            atol=1e-12,
        )


def test_one_hot_rows_keep_the_identity(build_block):
    block = build_block(EigenBlock().bind(BlockShape(7, COLUMNS, one_hot=True)))
    assert block.bases()[0] is None
    assert block.describe() == "diag 7 ⊗ 2², eigenvalues corrected, expand"
    assert block.memory == 7 + 2 * 4 + 2 * 14
    assert block.refresh_cost == 10 * (1 + 8)


def test_size_and_description():
    shape = BlockShape(ROWS, COLUMNS, groups=5)
    assert EigenBlock().bind(shape).memory == 5 * 2 * (9 + 4 + 6)
    found = EigenBlock(weight_sharing="reduce").bind(shape).describe()
    assert found == "5 × (3² ⊗ 2²), eigenvalues corrected, reduce"


def test_nothing_to_divide_by(make_block, data):
    """Without statistics the inverse is 1/λ; without λ there is none."""
    block, gradient = make_block("ekfac"), tf.constant(data.gradient)
    assert int(block.refresh(damping())[1]) == 0
    np.testing.assert_allclose(
        block.precondition(gradient), gradient / DAMPING, rtol=1e-12
    )
    assert int(block.refresh(tf.constant(0.0, tf.float64))[1]) == 1
    np.testing.assert_allclose(
        block.precondition(gradient), gradient / DAMPING, rtol=1e-12
    )


# -- In training ---------------------------------------------------------


def optimizer(**kwargs):
    return kng.KFAC(0.1, 0.9, 0.1, fisher="exact", block="ekfac", **kwargs)


def steps(model, count):
    x, y = examples(16)
    for _ in range(count):
        model.train_on_batch(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_modes_agree(mode, float64):
    """In a graph to rounding, under XLA to the accuracy of its bases."""
    xla = mode == "xla"
    found = []
    for kwargs in (
        {"run_eagerly": True},
        {"run_eagerly": False, "jit_compile": xla},
    ):
        model = compiled(mlp(), optimizer(), **kwargs)
        steps(model, 6)
        assert model.optimizer.statistics["refreshes"] > 3
        found.append(weights(model))
    assert_close(found[1], found[0], 1e-7 if xla else 1e-9, 1e-10)


def test_saved_and_resumed_bit_for_bit(tmp_path):
    model = compiled(mlp(), optimizer())
    steps(model, 5)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config()["block"] == "ekfac"
    loaded.optimizer.attach(loaded)
    loaded.run_eagerly = True
    for each in (model, loaded):
        steps(each, 5)
    assert_equal(state(loaded), state(model))


def test_layers_with_a_block_of_their_own_keep_it():
    model = keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(4),
            keras.layers.LayerNormalization(),
            keras.layers.Dense(2),
        ]
    )
    for block, kinds in (
        ("ekfac", ["eigen", "full", "eigen"]),
        ({"dense*": "ekfac"}, ["eigen", "full", "eigen"]),
        ({"layer_norm*": "ekfac"}, ["feature_scaled", "eigen", "kronecker"]),
    ):
        made = kng.KFAC(block=block).attach(model)
        made.build(model.trainable_variables)
        assert [e.block.kind for e in made.curvature.entries] == kinds
