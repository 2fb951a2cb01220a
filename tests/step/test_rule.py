"""A step rule of one's own is one file: the example of CONTRIBUTING.md."""

from dataclasses import dataclass

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from tests.reference.bridge import dense_layers, mlp


@keras.saving.register_keras_serializable(package="tests")
@dataclass(frozen=True)
class SignedMomentum(kng.StepRule):
    """Steps of `−rate · sign(m)` with a running mean m of P∇."""

    rate: float = 0.01
    decay: float = 0.9

    def build(self, shapes, factory):
        return [
            factory.add(f"{i}_mean", shape, "zeros")
            for i, shape in enumerate(shapes)
        ]

    def direct(self, memory, solved, situation):
        signs = []
        for mean, part in zip(
            memory, situation.here.to_tensors(solved), strict=True
        ):
            mean.assign(self.decay * mean.value + (1 - self.decay) * part)
            signs.append(tf.sign(mean.value))
        return situation.here.to_vector(signs)

    def coefficients(self, memory, direction, form, situation):
        rate = self.rate * situation.learning_rate
        return tf.stack([rate, tf.zeros_like(rate)])


def trained(optimizer, x, y, steps, **kwargs):
    model = mlp([3, 4, 2])
    model.compile(optimizer.attach(model), "mse", **kwargs)
    start = model.get_weights()
    for _ in range(steps):
        model.train_on_batch(x, y)
    return model, start


def batch():
    rng = np.random.default_rng(0)
    return rng.normal(size=(8, 3)), rng.normal(size=(8, 2))


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_first_step_is_the_sign_of_the_preconditioned_gradient(
    run_eagerly, float64
):
    x, y = batch()
    rule = SignedMomentum(rate=0.25)
    model, start = trained(
        kng.KFAC(rule, damping=0.1), x, y, 1, run_eagerly=run_eagerly
    )
    keras.utils.set_random_seed(1234)
    plain = mlp([3, 4, 2])
    plain.set_weights(start)
    plain.compile(
        kng.KFAC(1.0, 0.0, damping=0.1).attach(plain), "mse", run_eagerly=True
    )
    plain.train_on_batch(x, y)
    for now, before, other in zip(
        model.get_weights(), start, plain.get_weights(), strict=True
    ):
        np.testing.assert_allclose(
            now - before, 0.25 * np.sign(other - before), atol=1e-12
        )


def test_it_remembers_and_multiplies_the_learning_rate(float64):
    x, y = batch()
    model, _ = trained(
        kng.KFAC(SignedMomentum(), damping=0.1), x, y, 3, run_eagerly=True
    )
    optimizer = model.optimizer
    means = optimizer.engine.memory
    assert len(means) == 2 * len(dense_layers(model))
    assert all(np.any(mean.numpy() != 0) for mean in means)
    optimizer.learning_rate = 0.0
    before = model.get_weights()
    model.train_on_batch(x, y)
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_it_adapts_the_damping_and_resumes(tmp_path):
    x, y = batch()
    model, _ = trained(kng.KFAC(SignedMomentum()), x, y, 6)
    assert model.optimizer.statistics["reduction_ratio"] != 0
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    assert loaded.optimizer.settings.rate == SignedMomentum()
    loaded.optimizer.attach(loaded)
    for each in (model, loaded):
        each.train_on_batch(x, y)
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_momentum_belongs_to_the_rule():
    with pytest.raises(ValueError, match="give it to the rule.*Received"):
        kng.KFAC(SignedMomentum(), momentum=0.9)
    with pytest.raises(ValueError, match=r"write\s+`SignedMomentum\(\)`"):
        kng.KFAC(SignedMomentum)
