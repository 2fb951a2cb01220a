"""K-FAC with every head: recovers what the data was drawn from."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from keras_natgrad import heads

# Outputs at the truth are these plus a linear function of two inputs; training
# starts three units away from them. A tail heavier than the model's start has
# a small influence, and takes more steps; that of the Gumbel distribution is
# exponential, and overflows three units away. A mixture's likelihood has other
# maxima, and starts nearer.
STEPS = {"student_t": 150, "cauchy": 150}
DISTANCE = {"gumbel": 1.5, "mixture": 1.0, "mixture_complete_data": 1.0}
HEADS = {
    "normal": (heads.Normal("softplus"), [0.5, 0.0]),
    "normal_log_variance": (heads.Normal("log_variance"), [0.5, 0.0]),
    "log_normal": (heads.LogNormal(), [0.5, 0.0]),
    "logit_normal": (heads.LogitNormal(), [0.5, 0.0]),
    "student_t": (heads.StudentT(), [0.5, 0.0]),
    "laplace": (heads.Laplace(), [0.5, 0.0]),
    "logistic": (heads.Logistic(), [0.5, 0.0]),
    "cauchy": (heads.Cauchy(), [0.5, 0.0]),
    "gumbel": (heads.Gumbel(), [0.5, 0.0]),
    "huber": (heads.Huber(), [0.5, 0.0]),
    "hyperbolic_secant": (heads.HyperbolicSecant(), [0.5, 0.0]),
    "log1p_normal": (heads.Log1pNormal(), [5.0, 0.0]),
    "exponential": (heads.Exponential(), [0.5]),
    "gamma": (heads.Gamma(), [0.5, 1.0]),
    "inverse_gamma": (heads.InverseGamma(), [0.5, 1.0]),
    "inverse_gaussian": (heads.InverseGaussian(), [0.5, 1.0]),
    "weibull": (heads.Weibull(), [0.5, 1.0]),
    "beta": (heads.Beta(), [1.0, 0.5]),
    "von_mises": (heads.VonMises(), [0.5, 1.0]),
    "poisson": (heads.Poisson(), [0.5]),
    "geometric": (heads.Geometric(), [0.5]),
    "negative_binomial": (heads.NegativeBinomial(), [1.0, 1.0]),
    "negative_binomial_logits": (heads.NegativeBinomialLogits(), [0.0, 1.0]),
    "zero_inflated_poisson": (heads.ZeroInflatedPoisson(), [0.0, 1.0]),
    "binomial": (heads.Binomial(7), [0.0]),
    "bernoulli": (heads.Bernoulli(), [0.0]),
    "categorical": (heads.Categorical(), [0.5, 0.0, -0.5]),
    "mvn": (heads.MultivariateNormalTriL(), [0.5, -0.5, 0.0, 0.5, 0.0]),
    "dirichlet": (heads.Dirichlet(), [0.5, 1.0, 1.5]),
    "multinomial": (heads.Multinomial(6), [0.5, 0.0, -0.5]),
    "dirichlet_multinomial": (heads.DirichletMultinomial(6), [0.5, 1.0, 1.5]),
    "one_hot": (heads.OneHotCategorical(), [0.5, 0.0, -0.5]),
    "mvn_diag": (heads.MultivariateNormalDiag(), [0.5, -0.5, 0.0, 0.5]),
    "ordered": (heads.OrderedLogistic(), [0.5, 0.0, 0.5]),
    "ordered_given": (heads.OrderedLogistic([-1.0, 0.0, 1.0]), [0.5]),
    "von_mises_fisher": (heads.VonMisesFisher(), [1.0, 0.5, -1.0]),
    "mixture": (heads.NormalMixture(2), [0.0, 0.5, -2.0, 2.0, 0.0, 0.5]),
    "mixture_complete_data": (
        heads.NormalMixture(2, fisher="complete_data"),
        [0.0, 0.5, -2.0, 2.0, 0.0, 0.5],
    ),
    "joint": (
        heads.Joint(["categorical", heads.Normal("softplus")], [3, 2]),
        [0.5, 0.0, -0.5, 0.5, 0.0],
    ),
}


def problem(name):
    head, center = HEADS[name]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(512, 2)).astype(np.float32)
    slopes = 0.4 * rng.normal(size=(2, len(center))).astype(np.float32)
    truth = x @ slopes + np.array(center, np.float32)
    return head, x, head.sample(truth, [1, 2]).numpy(), truth


def train(head, x, y, truth, steps=60, distance=3.0, **compile_options):
    keras.utils.set_random_seed(0)
    signs = np.where(np.arange(truth.shape[1]) % 2, -1.0, 1.0)
    start = truth.mean(axis=0) + distance * signs
    model = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(
                truth.shape[1],
                kernel_initializer="zeros",
                bias_initializer=lambda shape, dtype: tf.constant(start, dtype),
            ),
        ]
    )
    optimizer = kng.KFAC().attach(model)
    loss = kng.losses.NegativeLogLikelihood(head)
    model.compile(optimizer, loss, **compile_options)
    model.fit(x, y, batch_size=len(x), epochs=steps, verbose=0)
    return model, optimizer


@pytest.mark.variants("categorical")
@pytest.mark.parametrize("name", HEADS)
def test_default_kfac_finds_the_maximum_of_the_likelihood(name):
    """From a bad start to at least the likelihood of the truth."""
    head, x, y, truth = problem(name)
    model, optimizer = train(
        head, x, y, truth, STEPS.get(name, 60), DISTANCE.get(name, 3.0)
    )
    at_truth = -np.mean(head.log_prob(truth, y))
    found = -np.mean(head.log_prob(model(x), y))
    assert found <= at_truth + 5e-3
    # A step to where the loss overflows is skipped once, then taken back.
    assert optimizer.statistics["skipped"] <= optimizer.statistics["retracted"]
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    # XLA draws other samples for the mixture.
    [name for name in HEADS if name != "mixture"],
)
def test_modes_agree(name):
    """Steps in XLA and in eager mode are those of the graph."""
    head, x, y, truth = problem(name)
    # From three units away, five steps under heavy tails are no distance.
    distance = 1.0 if name in STEPS else DISTANCE.get(name, 3.0)
    results = [
        train(head, x, y, truth, 5, distance, **options)[0].get_weights()
        for options in (
            {"jit_compile": False},
            {"jit_compile": True},
            {"run_eagerly": True},
        )
    ]
    assert np.abs(results[0][0]).max() > 1e-2  # The kernel starts at zero.
    for actual in results[1:]:
        for a, b in zip(actual, results[0], strict=True):
            np.testing.assert_allclose(a, b, rtol=5e-3, atol=5e-3)
