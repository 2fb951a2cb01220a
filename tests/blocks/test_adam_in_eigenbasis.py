"""A block of one's own: options, and a look at the gradient of every step."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from keras_natgrad.blocks import BlockShape, EigenBlock
from keras_natgrad.linalg import expand_to
from tests.reference.bridge import mlp


@keras.saving.register_keras_serializable("tests")
class AdamInEigenbasis(EigenBlock):
    """Adam on the coordinates of the gradient in the eigenbasis of K-FAC.

    With `ĝ = Q_Aᵀ g Q_G` it averages g, and `ĝ²` entry by entry, and the
    direction is `Q_A [(Q_Aᵀ m Q_G) ⊘ (√v + ε)] Q_Gᵀ`, m and v debiased
    (Vyas et al., 2024, arXiv:2409.11321, with K-FAC's factors).

    Args:
        beta_1: Decay of m.
        beta_2: Decay of v.
        epsilon: ε.
    """

    kind = "adam_in_eigenbasis"
    uses_gradients = True

    def __init__(self, beta_1=0.9, beta_2=0.95, epsilon=1e-8):
        super().__init__()
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon

    def build_state(self):
        super().build_state()
        self.mean = self.add_state("mean", self.matrix)
        self.squares = self.add_state("squares", self.matrix)
        self.steps = self.add_state("steps", self.axis)

    def turn(self, matrix):
        left, right = self.bases()
        return tf.matmul(tf.matmul(left, matrix, transpose_a=True), right)

    def observe_gradient(self, gradient):
        for average, decay, new in (
            (self.mean, self.beta_1, gradient),
            (self.squares, self.beta_2, tf.square(self.turn(gradient))),
        ):
            average.assign(decay * average.value + (1 - decay) * new)
        self.steps.assign(self.steps.value + 1)

    def precondition(self, gradient):
        steps = tf.convert_to_tensor(self.steps.value)
        steps = expand_to(steps, len(self.matrix))
        mean = self.mean.value / (1 - self.beta_1**steps)
        squares = self.squares.value / (1 - self.beta_2**steps)
        turned = self.turn(mean) / (tf.sqrt(squares) + self.epsilon)
        left, right = self.bases()
        return tf.matmul(tf.matmul(left, turned), right, transpose_b=True)


class Reference:
    """The same in NumPy, for one layer."""

    def __init__(self, shape):
        self.m, self.v, self.t = np.zeros(shape), np.zeros(shape), 0

    def step(self, gradient, left, right, beta_1=0.9, beta_2=0.95):
        turned = left.T @ gradient @ right
        self.t += 1
        self.m = beta_1 * self.m + (1 - beta_1) * gradient
        self.v = beta_2 * self.v + (1 - beta_2) * turned**2
        mean = left.T @ self.m @ right / (1 - beta_1**self.t)
        scale = np.sqrt(self.v / (1 - beta_2**self.t)) + 1e-8
        return left @ (mean / scale) @ right.T


@pytest.mark.parametrize("eagerly", [True, False])
def test_training(eagerly, float64):
    """Two layers of one shape and one of another, three steps."""
    model = mlp([3, 3, 3, 2])
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3)), rng.normal(size=(8, 2))
    optimizer = kng.KFAC(
        learning_rate=0.01,
        momentum=0.0,
        damping=1e-3,
        block=AdamInEigenbasis(beta_2=0.8),
        inverse_update_period=1000,
        refresh_growth=None,
    ).attach(model)
    model.compile(optimizer, "mse", run_eagerly=eagerly, jit_compile=False)
    references = [Reference((4, 3)), Reference((4, 3)), Reference((4, 2))]
    for _ in range(3):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
        variables = model.trainable_variables
        gradients = [g.numpy() for g in tape.gradient(loss, variables)]
        before = [variable.numpy() for variable in variables]
        model.train_on_batch(x, y)
        assert optimizer.curvature.uses_gradients
        for entry in optimizer.curvature.entries:
            kernel, bias = entry.variables
            matrix = np.vstack([gradients[kernel], gradients[bias]])
            step = references[entry.position].step(
                matrix, *(q.numpy() for q in entry.block.bases()), beta_2=0.8
            )
            found = np.vstack(
                [before[i] - variables[i].numpy() for i in (kernel, bias)]
            )
            np.testing.assert_allclose(found, 0.01 * step, rtol=1e-7, atol=1e-9)


def test_config():
    block = AdamInEigenbasis(beta_2=0.8)
    config = kng.KFAC(block={"dense*": block}).get_config()
    copy = kng.KFAC.from_config(config)
    (found,) = copy.block_options.block.values()
    assert isinstance(found, AdamInEigenbasis)
    assert found.get_config() == {
        "beta_1": 0.9,
        "beta_2": 0.8,
        "epsilon": 1e-8,
    }


def test_a_subclass_leaves_layers_their_own_block():
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(3),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(2),
        ]
    )
    optimizer = kng.KFAC(block=AdamInEigenbasis()).attach(model)
    optimizer.build(model.trainable_variables)
    kinds = [e.block.kind for e in optimizer.curvature.in_plan_order]
    assert kinds == ["adam_in_eigenbasis", "full", "adam_in_eigenbasis"]


@pytest.mark.parametrize("saved", [False, True])
def test_instances_of_the_package(saved):
    """Options of their own, kept in the config; equal ones share a stack."""
    chosen = {
        "last": kng.blocks.KroneckerBlock(max_factor_size=2),
        "*": EigenBlock(weight_sharing="reduce"),
    }
    optimizer = kng.KFAC(block=chosen)
    if saved:
        optimizer = kng.KFAC.from_config(optimizer.get_config())
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(3),
            keras.layers.Dense(3),
            keras.layers.Dense(3, name="last"),
        ]
    )
    optimizer.attach(model).build(model.trainable_variables)
    first, last = optimizer.curvature.stacks
    assert (first.block.kind, first.count) == ("eigen", 2)
    assert first.block.weight_sharing.value == "reduce"
    assert (last.block.kind, last.block.max_factor_size) == ("kronecker", 2)


def test_a_prototype_has_no_state():
    prototype = AdamInEigenbasis()
    bound = prototype.bind(BlockShape(3, 2), 4)
    assert bound.matrix == (4, 3, 2)
    assert not hasattr(prototype, "shape")


def test_what_is_no_block():
    with pytest.raises(ValueError, match="Unknown block"):
        kng.KFAC(block=3)
    with pytest.raises(ValueError, match="Unknown block"):
        kng.KFAC(block={"dense": EigenBlock})
