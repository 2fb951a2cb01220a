"""A head from any function that makes a distribution."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp

from keras_natgrad import heads

tfd = tfp.distributions


def poisson(outputs):
    return tfd.Poisson(tf.exp(outputs[..., 0]))


def gamma(outputs):
    return tfd.Gamma(tf.exp(outputs[..., 0]), tf.exp(outputs[..., 1]))


def normals(outputs):
    loc, raw = tf.split(outputs, 2, axis=-1)
    return tfd.Independent(tfd.Normal(loc, tf.nn.softplus(raw)), 1)


def categorical(outputs):
    return tfd.Categorical(logits=outputs)


def one_hot(outputs):
    return tfd.OneHotCategorical(logits=outputs, dtype=outputs.dtype)


def ordered(outputs):
    cutpoints = tf.constant([-1.0, 0.0, 1.5], outputs.dtype)
    return tfd.OrderedLogistic(cutpoints, outputs[..., 0])


def binomial(outputs):
    count = tf.constant(6.0, outputs.dtype)
    return tfd.Binomial(count, logits=outputs[..., 0])


def mixture(outputs):
    return tfd.MixtureSameFamily(
        tfd.Categorical(logits=outputs[..., :2]),
        tfd.Normal(outputs[..., 2:], tf.ones([], outputs.dtype)),
    )


OUTPUTS = np.random.default_rng(0).normal(size=(3, 4))
SAME = [
    ("gamma", gamma, "kl_divergence", heads.Gamma("exp", "exp"), 2),
    ("normals", normals, "kl_divergence", heads.Normal("softplus"), 4),
    ("categorical", categorical, "summation", heads.Categorical(), 4),
    (
        "one_hot",
        one_hot,
        "summation",
        heads.Categorical(sparse=False),
        3,
    ),
    ("binomial", binomial, "summation", heads.Binomial(6), 1),
]


@pytest.mark.parametrize(
    ("make", "method", "known", "size"),
    [case[1:] for case in SAME],
    ids=[case[0] for case in SAME],
)
def test_finds_the_fisher_matrix_of_the_known_head(make, method, known, size):
    head, outputs = heads.Distribution(make), OUTPUTS[:, :size]
    assert head.fisher_method(size) == method
    if make is gamma:  # The named head's order is rate, concentration.
        expected = known.fisher(outputs[:, ::-1]).numpy()[:, ::-1, ::-1]
    else:
        expected = known.fisher(outputs)
    # The normals' softplus has no floor here.
    tolerance = 1e-5 if make is normals else 1e-9
    np.testing.assert_allclose(
        head.fisher(outputs), expected, rtol=tolerance, atol=1e-9
    )


@pytest.mark.variants("None-summation", "False-summation", "True-summation")
@pytest.mark.parametrize("method", heads.generic.METHODS)
@pytest.mark.parametrize("jit_compile", [None, False, True])
def test_factor_products(method, jit_compile):
    head = heads.Distribution(categorical, method=method, samples=3)
    outputs = tf.constant(OUTPUTS)
    rank = head.factor_rank(4)

    def products(outputs):
        columns = [
            head.fisher_factor_product(outputs, tf.tile(column[None], [3, 1]))
            for column in tf.unstack(tf.eye(rank, dtype=tf.float64))
        ]
        return (
            tf.stack(columns, axis=-1),
            head.fisher_factor_transpose_product(outputs, outputs),
            head.fisher(outputs),
        )

    if jit_compile is not None:
        products = tf.function(products, jit_compile=jit_compile)
    dense, transposed, fisher = products(outputs)
    # XLA's eigh iterates to 1e-8 or so, in float64 as well.
    rounding = 1e-6 if jit_compile else 1e-9
    np.testing.assert_allclose(
        tf.matmul(dense, dense, transpose_b=True),
        fisher,
        rtol=rounding,
        atol=1e-9,
    )
    np.testing.assert_allclose(
        transposed,
        tf.linalg.matvec(dense, outputs, transpose_a=True),
        atol=1e-9,
    )


@pytest.mark.slow
def test_monte_carlo_is_unbiased():
    """The mixture's scores have no closed covariance: 4000 × 16 draws."""
    eta = OUTPUTS[0]
    head = heads.Distribution(mixture)
    assert head.fisher_method(4) == "monte_carlo"
    # Draws follow from the outputs; the last digits make them differ.
    outputs = eta + 1e-5 * np.random.default_rng(1).normal(size=(4000, 4))
    estimates = np.stack(
        [head.fisher(o[None])[0] for o in outputs[:20]]
        + list(head.fisher(outputs))
    )
    y = np.linspace(-12, 12, 20_001)
    scores = head.score(np.tile(eta, (len(y), 1)), y).numpy()
    density = np.exp(head.log_prob(np.tile(eta, (len(y), 1)), y))
    mass = density * (y[1] - y[0])
    exact = np.einsum("yi,yj,y->ij", scores, scores, mass)
    error = estimates.std(axis=0) / np.sqrt(len(estimates))
    assert np.all(np.abs(estimates.mean(axis=0) - exact) <= 5 * error + 1e-6)


def test_ordinal_regression_has_an_exact_fisher_matrix():
    head, outputs = heads.Distribution(ordered), OUTPUTS[:, :1]
    assert head.fisher_method(1) == "summation"
    cut = np.array([-np.inf, -1.0, 0.0, 1.5, np.inf])
    edge = 1 / (1 + np.exp(-(cut[None] - outputs)))
    p, slope = np.diff(edge, axis=1), np.diff(-edge * (1 - edge), axis=1)
    expected = np.sum(slope**2 / p, axis=1)
    np.testing.assert_allclose(
        head.fisher(outputs)[:, 0, 0], expected, rtol=1e-10
    )


def test_draws_of_one_batch_are_repeated_and_of_another_differ():
    head = heads.Distribution(mixture)
    first, again = head.fisher(OUTPUTS), head.fisher(OUTPUTS)
    np.testing.assert_array_equal(first, again)
    assert np.abs(head.fisher(OUTPUTS + 1e-6) - first).max() > 1e-3


def test_unregistered_function_is_not_saved():
    head = heads.Distribution(lambda outputs: poisson(outputs))
    with pytest.raises(ValueError, match="is not registered and cannot be"):
        keras.saving.serialize_keras_object(head)
    assert repr(head) == "Distribution(<lambda>)"
    assert head != heads.Distribution(poisson)


def test_registered_function_is_saved():
    registered = keras.saving.register_keras_serializable("tests")(
        lambda outputs: poisson(outputs)
    )
    head = heads.Distribution(registered, 1, samples=4)
    restored = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(head)
    )
    assert restored == head


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: heads.Distribution(3), "`make` must be a function"),
        (lambda: heads.Distribution("nobody"), "is not registered; import"),
        (lambda: heads.Distribution(poisson, samples=0), "`samples` must be"),
        (lambda: heads.Distribution(poisson, method="guess"), "one of"),
        (
            lambda: heads.Distribution(mixture, method="kl_divergence").fisher(
                OUTPUTS
            ),
            r"allows the methods \['monte_carlo'\]",
        ),
        (
            lambda: heads.Distribution(poisson, 1).validate((None, 2)),
            "takes 1 outputs",
        ),
        (
            lambda: heads.Distribution(lambda o: o).validate((None, 2)),
            "must return a tfp.distributions.Distribution",
        ),
        (
            lambda: heads.Distribution(lambda o: tfd.Normal(o, 1.0)).validate(
                (None, 2)
            ),
            "one distribution per example",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_partial_function_has_no_name_to_be_saved_by():
    make = functools.partial(tfd.Independent, reinterpreted_batch_ndims=0)
    head = heads.Distribution(make)
    with pytest.raises(ValueError, match="is not registered and cannot be"):
        head.get_config()
    assert head == heads.Distribution(make) != heads.Distribution(poisson)
    assert "functools.partial" in repr(head)
