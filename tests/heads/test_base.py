import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad import heads
from keras_natgrad.heads.probability import distributions


@keras.saving.register_keras_serializable(package="test_heads")
class Exponential(heads.Head):
    """Rate `exp(outputs)`, F = I: a head of three short methods."""

    def distribution(self, outputs):
        tfd = distributions()
        return tfd.Independent(tfd.Exponential(tf.exp(outputs)), 1)

    def fisher_factor_product(self, outputs, vector):
        return vector

    def fisher_factor_transpose_product(self, outputs, vector):
        return vector


class SharedMean(heads.Head):
    """A normal mean `sum(outputs)`: L = 1 has one column, F = 1 1ᵀ."""

    def distribution(self, outputs):
        return distributions().Normal(tf.reduce_sum(outputs, -1), 1.0)

    def factor_rank(self, parameter_count):
        return 1

    def fisher_factor_product(self, outputs, vector):
        return vector * tf.ones_like(outputs)

    def fisher_factor_transpose_product(self, outputs, vector):
        return tf.reduce_sum(vector, axis=-1, keepdims=True)


OUTPUTS = np.random.default_rng(0).normal(size=(2, 3))


def test_head_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        heads.Head()


def test_small_head_has_log_prob_score_and_sample():
    head = Exponential()
    targets = np.array([[0.5, 1.0, 2.0], [0.1, 0.2, 0.3]])
    expected = np.sum(OUTPUTS - np.exp(OUTPUTS) * targets, axis=-1)
    np.testing.assert_allclose(head.log_prob(OUTPUTS, targets), expected)
    expected = 1.0 - np.exp(OUTPUTS) * targets
    np.testing.assert_allclose(head.score(OUTPUTS, targets), expected)
    draws = head.sample(OUTPUTS, [0, 1])
    assert draws.shape == OUTPUTS.shape
    assert draws.dtype == tf.float64
    assert np.all(draws > 0.0)


def test_small_head_has_fisher_and_natural_gradient():
    head = Exponential()
    eye = np.broadcast_to(np.eye(3), (2, 3, 3))
    np.testing.assert_array_equal(head.fisher(OUTPUTS), eye)
    gradient = np.arange(6.0).reshape(2, 3)
    np.testing.assert_allclose(
        head.natural_gradient(OUTPUTS, gradient), gradient, atol=1e-14
    )


def test_small_head_knows_the_support_from_its_log_prob():
    head = Exponential()
    assert bool(head.targets_in_support(OUTPUTS, np.ones((2, 3))))
    head.validate_targets(OUTPUTS, np.ones((2, 3)))
    bad = np.full((2, 3), np.inf)
    assert not bool(head.targets_in_support(OUTPUTS, bad))
    with pytest.raises(ValueError, match="possible values of the distribution"):
        head.validate_targets(OUTPUTS, bad)


def test_factor_of_low_rank():
    head = SharedMean()
    assert head.factor_rank(3) == 1
    np.testing.assert_array_equal(head.fisher(OUTPUTS), np.ones((2, 3, 3)))
    gradient = np.random.default_rng(1).normal(size=(2, 3))
    # The pseudo-inverse of 1 1ᵀ is 1 1ᵀ / 9.
    expected = np.tile(gradient.sum(-1, keepdims=True) / 9.0, 3)
    np.testing.assert_allclose(
        head.natural_gradient(OUTPUTS, gradient), expected, rtol=1e-12
    )


def test_natural_gradient_of_a_zero_fisher_matrix_is_zero():
    class Constant(Exponential):
        def fisher_factor_product(self, outputs, vector):
            return tf.zeros_like(vector)

    result = Constant().natural_gradient(OUTPUTS, np.ones((2, 3)))
    np.testing.assert_array_equal(result, np.zeros((2, 3)))


def test_score_of_unused_parameters_is_zero():
    class Fixed(Exponential):
        def log_prob(self, outputs, targets):
            return tf.zeros(outputs.shape[:-1], outputs.dtype)

    np.testing.assert_array_equal(
        Fixed().score(OUTPUTS, OUTPUTS), np.zeros((2, 3))
    )


def test_equality_and_hash_follow_the_configuration():
    assert heads.Normal(0.5) == heads.Normal(0.5)
    assert hash(heads.Normal(0.5)) == hash(heads.Normal(0.5))
    assert heads.Normal(0.5) != heads.Normal(1.0)
    assert heads.Bernoulli() != heads.Bernoulli(from_logits=False)
    assert heads.Bernoulli() != heads.Categorical()
    assert heads.Normal() != "normal"
    assert len({heads.Normal(), heads.Normal(), heads.Normal(2.0)}) == 2


@pytest.mark.parametrize(
    ("head", "text"),
    [
        (heads.Normal(scale=2), "Normal(scale=2.0)"),
        (heads.Bernoulli(), "Bernoulli(from_logits=True)"),
        (
            heads.Categorical(from_logits=False),
            "Categorical(from_logits=False, sparse=True)",
        ),
        (Exponential(), "Exponential()"),
    ],
)
def test_repr_and_configuration(head, text):
    assert repr(head) == text
    assert type(head).from_config(head.get_config()) == head


@pytest.mark.parametrize("shape", [(), (4, 0)])
def test_outputs_without_parameters_are_an_error(shape):
    with pytest.raises(
        ValueError, match="at least one unit. Received: outputs"
    ):
        Exponential().validate(shape)


@pytest.mark.parametrize("shape", [(1,), (None, 3), (None, None, None)])
def test_other_outputs_are_valid(shape):
    assert Exponential().validate(shape) is None
    assert Exponential().validate(tf.TensorShape(shape)) is None
