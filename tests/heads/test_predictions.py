"""Means, deviations and quantiles of what is predicted."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from scipy.integrate import quad
from scipy.special import expit

from keras_natgrad import heads

tfd = tfp.distributions


def logit_normal_moments(loc, scale):
    """Mean and deviation, by adaptive quadrature."""

    def expect(function):
        def integrand(z):
            y = expit(loc + scale * z)
            return function(y) * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)

        points = np.clip([-loc / scale, scale], -11.0, 11.0)
        return quad(
            integrand, -12, 12, points=points, epsrel=1e-12, limit=1000
        )[0]

    mean = expect(lambda y: y)
    return mean, np.sqrt(expect(lambda y: (y - mean) ** 2))


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0, 20.0])
@pytest.mark.parametrize("loc", [-8.0, 0.3, 10.0])
def test_moments_of_logit_normal(loc, scale):
    expected = logit_normal_moments(loc, scale)
    outputs = np.array([[loc, np.log(scale)]])
    head = heads.LogitNormal("exp")
    np.testing.assert_allclose(head.mean(outputs), [[expected[0]]], rtol=1e-8)
    np.testing.assert_allclose(head.stddev(outputs), [[expected[1]]], rtol=1e-8)
    fixed = heads.LogitNormal(scale)
    np.testing.assert_allclose(
        fixed.mean(tf.constant([[loc]], tf.float32)),
        [[expected[0]]],
        rtol=1e-6,
    )


@pytest.mark.parametrize("cutpoints", [None, [-1.0, 0.5, 2.0]])
def test_moments_of_ordered_classes(cutpoints):
    head = heads.OrderedLogistic(cutpoints)
    size = 3 if cutpoints is None else 1
    outputs = np.random.default_rng(0).normal(size=(5, size))
    p = head.distribution(outputs).categorical_probs().numpy()
    mean = p @ np.arange(4)
    spread = np.sqrt(p @ np.arange(4) ** 2 - mean**2)
    np.testing.assert_allclose(head.mean(outputs), mean, rtol=1e-10)
    np.testing.assert_allclose(head.stddev(outputs), spread, rtol=1e-10)


def test_moments_of_heads_side_by_side():
    parts = [
        heads.Normal("exp"),
        heads.OrderedLogistic([-1.0, 0.5]),
        heads.LogitNormal(1.0),
        heads.MultivariateNormalTriL(),
    ]
    sizes = [4, 1, 1, 5]
    head = heads.Joint(parts, sizes)
    outputs = np.random.default_rng(0).normal(size=(3, 11))
    pieces = np.split(outputs, np.cumsum(sizes)[:-1], axis=1)
    for name in ("mean", "stddev"):
        expected = np.hstack(
            [
                np.reshape(getattr(part, name)(piece), [3, -1])
                for part, piece in zip(parts, pieces, strict=True)
            ]
        )
        found = getattr(head, name)(outputs)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        assert found.shape == head.sample(outputs, [0, 1]).shape


def test_inverse_gamma_of_infinite_moments():
    head = heads.InverseGamma("exp", "exp")
    outputs = np.log([[1.0, 0.5], [1.0, 1.5], [1.0, 3.0]])
    np.testing.assert_allclose(head.mean(outputs)[:, 0], [np.inf, 2.0, 0.5])
    expected = [np.inf, np.inf, 0.5]
    np.testing.assert_allclose(head.stddev(outputs)[:, 0], expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: heads.Distribution(
                lambda o: tfd.SinhArcsinh(o[..., 0], 1.0, 0.5)
            ).mean([[0.0]]),
            "has no mean for the head Distribution",
        ),
        (
            lambda: heads.Distribution(
                lambda o: tfd.SinhArcsinh(o[..., 0], 1.0, 0.5)
            ).stddev([[0.0]]),
            "has no stddev for the head Distribution",
        ),
        (
            lambda: heads.Poisson().quantile([[0.0]], 0.5),
            r"has no quantile for the head Poisson\(rate='exp'\)",
        ),
    ],
)
def test_what_is_not_known_names_the_head(call, message):
    with pytest.raises(NotImplementedError, match=message):
        call()
