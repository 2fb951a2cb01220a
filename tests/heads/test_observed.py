"""The empirical Fisher of any loss, against gradients of single examples."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad import heads
from keras_natgrad.heads.observed import ObservedLoss, observe_loss

N, K = 5, 3
RNG = np.random.default_rng(0)
OUTPUTS, TARGETS = RNG.normal(size=(2, N, K))
REDUCTIONS = ["sum", "sum_over_batch_size", "mean_with_sample_weight", "none"]


class Quartic(keras.losses.Loss):
    """Σ (y − μ)⁴ of every example."""

    def call(self, y_true, y_pred):
        return keras.ops.sum((y_true - y_pred) ** 4, axis=-1)


class PerUnit(Quartic):
    def call(self, y_true, y_pred):
        return (y_true - y_pred) ** 4


class OneNumber(Quartic):
    def call(self, y_true, y_pred):
        return keras.ops.mean(super().call(y_true, y_pred))


class OnePerUnit(Quartic):
    """Means over the batch, one for each unit."""

    def call(self, y_true, y_pred):
        return keras.ops.mean((y_true - y_pred) ** 4, axis=0)


class Masked(Quartic):
    def call(self, y_true, y_pred):
        values = super().call(y_true, y_pred)
        values._keras_mask = keras.ops.convert_to_tensor(np.arange(N) < 3)
        return values


def scores():
    """∂ Σ_k (y − μ)⁴ / ∂μ."""
    return -4 * (TARGETS - OUTPUTS) ** 3


def observe(loss, **weights):
    """Values, coefficients and `Σ c ∂ℓ ∂ℓᵀ`, `[N, K, N, K]`."""
    variable = tf.Variable(OUTPUTS)
    with tf.GradientTape() as tape:
        values, c = observe_loss(
            loss, tf.convert_to_tensor(variable), TARGETS, **weights
        )
    assert values.shape[:-1] == c.shape and values.shape[-1] == 1
    jacobian = tape.jacobian(values, variable).numpy().reshape(-1, N * K)
    flat = np.einsum("pa,p,pb->ab", jacobian, c.numpy().ravel(), jacobian)
    return values, c, flat.reshape(N, K, N, K), jacobian.reshape(-1, N, K)


def of_examples(c, s):
    full = np.zeros((N, K, N, K))
    for n in range(N):
        full[n, :, n] = c[n] * np.outer(s[n], s[n])
    return full


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_value_per_example(reduction, weighted):
    w = np.linspace(0.5, 2.0, N) if weighted else np.ones(N)
    loss = Quartic(reduction=reduction, dtype="float64")
    values, c, fisher, _ = observe(loss, sample_weight=w if weighted else None)
    total = {"mean_with_sample_weight": w.sum(), "sum_over_batch_size": N}
    expected = w / total.get(reduction, 1)
    np.testing.assert_allclose(c, expected)
    np.testing.assert_allclose(
        fisher, of_examples(expected, scores()), rtol=1e-10
    )
    np.testing.assert_allclose(
        np.sum(c * values[:, 0]),
        np.sum(loss(TARGETS, OUTPUTS, w if weighted else None)),
    )


def test_one_value_per_unit():
    """Every value is an observation of its own: no products of two units."""
    _, _, fisher, _ = observe(PerUnit(dtype="float64"))
    expected = np.zeros((N, K, N, K))
    for n, k in np.ndindex(N, K):
        expected[n, k, n, k] = scores()[n, k] ** 2 / (N * K)
    np.testing.assert_allclose(fisher, expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("loss", "scale"), [(OneNumber, 1), (OnePerUnit, 1 / K)]
)
def test_one_number_for_the_batch(loss, scale):
    """A mean over examples has the Fisher of its examples."""
    w = np.linspace(0.5, 2.0, N)
    weights = {"sample_weight": w} if loss is OneNumber else {}
    _, c, fisher, jacobian = observe(loss(dtype="float64"), **weights)
    mean = w.mean() if loss is OneNumber else 1.0
    expected = of_examples(np.full(N, mean / N), scale * scores())
    np.testing.assert_allclose(fisher, expected, rtol=1e-10)
    # Its gradient is that of the loss.
    variable = tf.Variable(OUTPUTS)
    with tf.GradientTape() as tape:
        value = loss(dtype="float64")(TARGETS, variable, *weights.values())
    np.testing.assert_allclose(
        np.einsum("p,pnk->nk", c, jacobian), tape.gradient(value, variable)
    )


def test_masks_of_the_outputs_and_of_the_loss():
    mask = np.array([True, False, True, True, True])
    _, c, _, _ = observe(Quartic(dtype="float64"), mask=mask)
    np.testing.assert_allclose(c, mask / 4)
    _, c, _, _ = observe(Masked(dtype="float64"))
    np.testing.assert_allclose(c, [1 / 3, 1 / 3, 1 / 3, 0, 0])
    _, c, _, _ = observe(Masked(dtype="float64"), mask=tf.constant(mask))
    np.testing.assert_allclose(c, [1 / 2, 0, 1 / 2, 0, 0])


def test_values_are_those_of_the_loss_in_its_dtype():
    values, _ = observe_loss(
        Quartic(dtype="float32"), tf.constant(OUTPUTS), TARGETS
    )
    assert values.dtype == "float32"


def test_head_of_a_loss():
    """F = 1, and both scores that replace an observed one have it."""
    head, values = ObservedLoss(), tf.constant(RNG.normal(size=(40, 1)))
    np.testing.assert_array_equal(head.fisher(values), np.ones((40, 1, 1)))
    np.testing.assert_array_equal(
        head.score(values, tf.ones_like(values)), -np.ones((40, 1))
    )
    signs = head.score(values, head.sample(values, [0, 1])).numpy()
    assert set(signs.ravel()) == {-1.0, 1.0}
    assert head.describe_fisher() == "empirical, at the observed targets"


def test_head_of_a_loss_is_no_head_of_the_user():
    head = ObservedLoss()
    assert head != ObservedLoss() and head == head
    with pytest.raises(NotImplementedError, match="no distribution"):
        head.distribution(tf.zeros([1, 1]))
    with pytest.raises(NotImplementedError, match="lives for one batch"):
        keras.saving.serialize_keras_object(head)
    with pytest.raises(ValueError, match="one of the names"):
        heads.get("ObservedLoss")
