"""Layers that share a block, against blocks of single layers."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from keras_natgrad.blocks import BlockShape, FullBlock, GradientBlock, prototype
from keras_natgrad.blocks.fallback import (
    GradientDiagonalBlock,
    GradientScalarBlock,
)
from keras_natgrad.blocks.gradient_kronecker import GradientKroneckerBlock
from keras_natgrad.curvature.assignment import Entry
from keras_natgrad.curvature.stacks import Stack, make_stacks, share_out
from tests.reference.bridge import mlp

LAYERS, GROUPS, BATCH, SHARED, ROWS, COLUMNS = 3, 2, 6, 2, 4, 3
SHAPE = BlockShape(ROWS, COLUMNS)
CASES = {
    "kronecker": (prototype("kronecker"), SHAPE),
    "diagonal_input": (prototype("kronecker", max_factor_size=3), SHAPE),
    "groups": (prototype("kronecker"), BlockShape(ROWS, COLUMNS, GROUPS)),
    "ekfac": (prototype("ekfac"), SHAPE),
    "ekfac_groups": (prototype("ekfac"), BlockShape(ROWS, COLUMNS, GROUPS)),
    "feature_scaled": (prototype("feature_scaled"), SHAPE),
    "feature_scaled_diagonal": (
        prototype("feature_scaled", max_factor_size=3),
        SHAPE,
    ),
    "diagonal": (prototype("diagonal"), SHAPE),
    "full": (prototype("full"), SHAPE),
    "full_groups": (FullBlock(), BlockShape(2, 1, GROUPS)),
    "identity": (prototype("identity"), SHAPE),
    "input_factor": (prototype("input_factor"), SHAPE),
    "input_factor_biased": (
        prototype("foof", relative_damping=True),
        BlockShape(ROWS, COLUMNS, biased=True),
    ),
    "input_factor_diagonal": (
        prototype("input_factor", max_factor_size=1, damp_bias=False),
        BlockShape(ROWS, COLUMNS, biased=True),
    ),
    "gradient_kronecker": (GradientKroneckerBlock(), SHAPE),
    "gradient_diagonal": (GradientDiagonalBlock(), BlockShape(5, 1)),
    "first_order": (GradientScalarBlock(), BlockShape(5, 1)),
}


def add_variable(name, shape, initializer):
    return keras.Variable(
        initializer, shape=shape, dtype="float64", trainable=False, name=name
    )


class Pair:
    """A stack and as many single blocks, with the same statistics."""

    def __init__(self, case, layers=LAYERS):
        own, self.shape = CASES[case]
        self.layers = layers
        entries = tuple(
            Entry(own.bind(self.shape), (i,)) for i in range(layers)
        )
        self.stack = Stack(own.bind(self.shape, layers), entries)
        names = [f"v{i}" for i in range(layers)]
        self.stack.build(names, add_variable, add_variable)
        self.singles = [own.bind(self.shape) for _ in range(layers)]
        for single in self.singles:
            single.build(add_variable)

    def statistics(self, block, rng):
        if isinstance(block, GradientBlock):
            gradient = tf.constant(rng.normal(size=self.shape.matrix))
            return block.gradient_statistics(gradient)
        lead = (*self.shape.lead, BATCH, SHARED)
        inputs = rng.normal(size=(*lead, self.shape.rows))
        if self.shape.biased:
            inputs[..., -1] = 1.0
        cotangents = tf.constant(rng.normal(size=(*lead, self.shape.columns)))
        inputs = tf.constant(inputs)
        weights = tf.constant(rng.uniform(0.5, 2.0, size=BATCH))
        return block.input_statistics(
            inputs, weights
        ) | block.cotangent_statistics(inputs, cotangents)

    def feed(self, seed, bad=None, keep_finite=True, decay=0.9):
        stacked, singles = [], []
        for index, single in enumerate(self.singles):
            for block, found in (
                (self.stack.entries[index].block, stacked),
                (single, singles),
            ):
                rng = np.random.default_rng([seed, index])
                own = self.statistics(block, rng)
                if index == bad:
                    own = {name: np.nan * value for name, value in own.items()}
                found.append(own)
        self.stack.block.accumulate(
            self.stack.stack_statistics(stacked), decay, keep_finite
        )
        for single, own in zip(self.singles, singles, strict=True):
            single.accumulate(own, decay, keep_finite)

    def refresh(self, dampings, places=(None,)):
        places = [*places] * (self.layers // len(places))
        retries, failures = self.stack.refresh_parts(
            tf.constant(dampings, tf.float64), None, places
        )
        counts = [
            single.refresh(tf.constant(own, tf.float64))
            for single, own in zip(
                self.singles,
                np.broadcast_to(dampings, self.layers),
                strict=True,
            )
        ]
        assert int(failures) == sum(int(own) for _, own in counts)
        assert int(retries) == sum(int(own) for own, _ in counts)
        return int(failures)

    def check(self):
        """Asserts that both have the same state and do the same."""
        for index, single in enumerate(self.singles):
            own = self.stack.entries[index].block
            for name, variable in single.variables.items():
                np.testing.assert_allclose(
                    own.variables[name].numpy(),
                    variable.numpy(),
                    rtol=1e-9,
                    atol=1e-12,
                    err_msg=name,
                )
            np.testing.assert_allclose(
                own.to_dense(), single.to_dense(), rtol=1e-10, atol=1e-12
            )
        np.testing.assert_allclose(
            self.stack.trace(), [s.trace() for s in self.singles], rtol=1e-11
        )
        rng = np.random.default_rng(7)
        gradients = rng.normal(size=(self.layers, *self.shape.matrix))
        np.testing.assert_allclose(
            self.stack.precondition(tf.constant(gradients)),
            [
                single.precondition(tf.constant(gradient))
                for single, gradient in zip(
                    self.singles, gradients, strict=True
                )
            ],
            rtol=1e-8,
            atol=1e-12,
        )


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def test_a_stack_equals_its_layers(case):
    pair = Pair(case)
    pair.check()
    for seed in range(2):
        pair.feed(seed)
        assert pair.refresh(0.3) == 0
        pair.check()
    assert pair.refresh([0.3, 0.1, 2.0]) == 0
    pair.check()


def test_one_bad_layer_does_not_spoil_the_others(case):
    """It keeps its last good inverse; theirs are new."""
    pair = Pair(case)
    pair.feed(0)
    pair.refresh(0.3)
    before = pair.stack.block.variables["weight"].numpy()
    pair.feed(1, bad=1)
    pair.check()
    after = pair.stack.block.variables["weight"].numpy()
    if pair.stack.block.averages():
        assert list(after > before) == [True, False, True]
    assert pair.refresh(0.3) == 0
    pair.check()
    pair.feed(2, bad=1, keep_finite=False)
    fails = pair.refresh(0.3)
    assert fails == (1 if pair.stack.block.averages() else 0)
    if not fails:
        return
    for index, single in enumerate(pair.singles):
        gradient = tf.constant(np.ones(pair.shape.matrix))
        np.testing.assert_allclose(
            pair.stack.entries[index].block.precondition(gradient),
            single.precondition(gradient),
            rtol=1e-9,
        )


@pytest.mark.parametrize("name", ["kronecker", "full"])
def test_only_a_failed_factorisation_is_damped_more(name):
    pair = Pair(name)
    pair.feed(0)
    for block in (pair.stack.entries[1].block, pair.singles[1]):
        factor = "input_factor" if name == "kronecker" else "fisher"
        variable = block.variables[factor]
        value = variable.numpy()
        size = len(value)
        variable.assign(value - 1.2 * np.trace(value) / size * np.eye(size))
    pair.refresh(1e-6)
    pair.check()


def test_parts_on_several_devices(case):
    """As with replicas: here all on one, by two of its names."""
    pair = Pair(case)
    pair.feed(0)
    pair.feed(1)
    pair.refresh([0.3, 0.1, 2.0], ["CPU:0", "/device:CPU:0", "CPU:0"])
    pair.check()


def test_layers_of_a_stack_are_shared_out():
    assert share_out([5, 5, 5, 1, 1], ["a", "b"]) == ["a", "b", "a", "b", "b"]


def test_who_shares():
    """Class, shape and options must be equal."""
    blocks = [
        prototype("kronecker"),
        prototype("ekfac"),
        prototype("kronecker"),
        prototype("kronecker", max_factor_size=2),
        prototype("coupled"),
        prototype("coupled"),
    ]
    entries = [Entry(b.bind(SHAPE), (i,)) for i, b in enumerate(blocks)]
    entries.append(Entry(prototype("kronecker").bind(BlockShape(9, 2)), (6,)))
    stacks = make_stacks(entries)
    positions = [[e.variables[0] for e in s.entries] for s in stacks]
    assert positions == [[0, 2], [1], [3], [4], [5], [6]]
    assert [s.block.layers for s in stacks] == [2, 1, 1, None, None, 1]
    alone = make_stacks(entries, stacked=False)
    assert [s.block.layers for s in alone] == [None] * 7


def test_per_layer_order_and_names(float64):
    """Interleaved shapes: entries stack by stack, the summary by the plan."""
    model = mlp([3, 4, 3, 4, 3])
    optimizer = kng.KFAC(block="kronecker").attach(model)
    optimizer.build(model.trainable_variables)
    curvature = optimizer.curvature
    assert [s.count for s in curvature.stacks] == [2, 2]
    assert [e.position for e in curvature.entries] == [0, 2, 1, 3]
    assert [e.position for e in curvature.in_plan_order] == [0, 1, 2, 3]
    text = []
    optimizer.summary(print_fn=text.append)
    rows = [text[0].index(layer.name) for layer in model.layers]
    assert rows == sorted(rows)
    paths = [variable.path for variable in optimizer.variables]
    assert len(paths) == len(set(paths))
    assert any("and_1_more_input_factor" in path for path in paths)
    tensors = [np.random.normal(size=v.shape) for v in model.weights]
    matrices = curvature.to_matrices(tensors)
    for entry, matrix in zip(
        curvature.entries, curvature.split(matrices), strict=True
    ):
        np.testing.assert_array_equal(matrix, entry.to_matrix(tensors))
    for a, b in zip(curvature.from_matrices(matrices), tensors, strict=True):
        np.testing.assert_array_equal(a, b)


def test_state_is_as_large_as_that_of_single_layers(case):
    pair = Pair(case)
    assert pair.stack.block.memory == sum(s.memory for s in pair.singles)
