"""Float32 outputs over the whole range: finite, semidefinite, `F = L Lᵀ`."""

import numpy as np
import pytest
import tensorflow_probability as tfp

from keras_natgrad import heads

COUNT = 500
LOGIT = 27.6  # Probabilities from 1e-12 to 1 − 1e-12.
LOG = 13.8  # Scales, rates and counts from 1e-6 to 1e6.


def uniform(rng, size, bound):
    return rng.uniform(-bound, bound, size=(COUNT, size))


def logits(size):
    return lambda rng: uniform(rng, size, LOGIT)


def mixed(*parts):
    """Columns of several bounds, e.g. means, then raw scales."""
    return lambda rng: np.concatenate(
        [uniform(rng, size, bound) for size, bound in parts], axis=-1
    )


def triangle(rng):
    """Two means, and the triangle in TFP's order: its diagonal is 0 and 2."""
    outputs = uniform(rng, 5, LOG)
    outputs[:, 3] = rng.normal(size=COUNT)
    return outputs


def directions(rng):
    """Concentrations from 1e-12 to 1e6."""
    outputs = rng.normal(size=(COUNT, 3))
    length = np.exp(rng.uniform(-27.6, LOG, size=(COUNT, 1)))
    return outputs * length / np.linalg.norm(outputs, axis=-1, keepdims=True)


def rates(rng):
    """Rates of a ReLU: a third of them zero, the others from 1e-6 to 1e6."""
    drawn = np.exp(uniform(rng, 1, LOG))
    return np.where(rng.uniform(size=drawn.shape) < 1 / 3, 0.0, drawn)


CASES = {
    "bernoulli": (heads.Bernoulli(), logits(3)),
    "categorical": (heads.Categorical(), logits(4)),
    "one_hot_categorical": (heads.OneHotCategorical(), logits(4)),
    "multinomial": (heads.Multinomial(1e6), logits(4)),
    "binomial": (heads.Binomial(1e6), logits(1)),
    "geometric": (heads.Geometric(), logits(1)),
    "poisson": (heads.Poisson(), mixed((1, LOG))),
    "zero_inflated_poisson": (
        heads.ZeroInflatedPoisson(),
        mixed((1, LOGIT), (1, LOG)),
    ),
    "negative_binomial": (
        heads.NegativeBinomial("exp", "exp"),
        mixed((2, LOG)),
    ),
    "negative_binomial_logits": (
        heads.NegativeBinomialLogits("sigmoid", "exp"),
        mixed((1, 200.0), (1, LOG)),
    ),
    "mvn_tril": (heads.MultivariateNormalTriL("exp"), triangle),
    "mvn_diag": (
        heads.MultivariateNormalDiag("exp"),
        mixed((2, 1e6), (2, LOG)),
    ),
    "dirichlet": (heads.Dirichlet("exp"), mixed((4, LOG))),
    "dirichlet_multinomial": (
        heads.DirichletMultinomial(30, "exp"),
        mixed((4, LOG)),
    ),
    "ordered_given": (
        heads.OrderedLogistic([-1e3, -1.0, -1.0 + 1e-6, 27.6]),
        mixed((1, 2e3)),
    ),
    "ordered": (
        heads.OrderedLogistic(increment="exp"),
        mixed((1, LOGIT), (3, LOG)),
    ),
    "beta": (heads.Beta("exp", "exp"), mixed((2, LOG))),
    "gamma": (heads.Gamma("exp", "exp"), mixed((2, LOG))),
    "inverse_gamma": (heads.InverseGamma("exp", "exp"), mixed((2, LOG))),
    "inverse_gaussian": (
        heads.InverseGaussian("exp", "exp"),
        mixed((2, LOG)),
    ),
    "weibull": (heads.Weibull("exp", "exp"), mixed((2, LOG))),
    "student_t": (heads.StudentT("exp", "exp"), mixed((1, 1e6), (2, LOG))),
    "log_normal": (heads.LogNormal("exp"), mixed((2, LOG))),
    "logit_normal": (heads.LogitNormal("exp"), mixed((2, LOG))),
    "log1p_normal": (heads.Log1pNormal("exp"), mixed((1, 1e6), (1, LOG))),
    "von_mises": (heads.VonMises("exp"), mixed((1, 3.1), (1, LOG))),
    "poisson_of_rates": (heads.Poisson("identity"), rates),
    "von_mises_fisher": (heads.VonMisesFisher(), directions),
    "mixture": (
        heads.NormalMixture(2, "exp", samples=4),
        mixed((2, LOGIT), (2, LOG), (2, LOG)),
    ),
    "mixture_complete_data": (
        heads.NormalMixture(2, "exp", fisher="complete_data"),
        mixed((2, LOGIT), (2, 1e6), (2, LOG)),
    ),
    "joint": (
        heads.Joint(
            ["categorical", heads.NegativeBinomial("exp", "exp")], [3, 2]
        ),
        mixed((3, LOGIT), (2, LOG)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_float32_extremes(name):
    head, draw = CASES[name]
    outputs = draw(np.random.default_rng(0)).astype(np.float32)
    rank = head.factor_rank(outputs.shape[-1])
    dense = np.stack(
        [
            head.fisher_factor_product(outputs, np.tile(column, (COUNT, 1)))
            for column in np.eye(rank, dtype=np.float32)
        ],
        axis=-1,
    ).astype(float)
    transposed = np.stack(
        [
            head.fisher_factor_transpose_product(
                outputs, np.tile(column, (COUNT, 1))
            )
            for column in np.eye(outputs.shape[-1], dtype=np.float32)
        ],
        axis=-1,
    ).astype(float)
    fisher = head.fisher(outputs).numpy().astype(float)
    for value in (dense, transposed, fisher):
        assert np.all(np.isfinite(value))
    # In units of the diagonal: each output has its own size.
    diagonal = np.einsum("nii->ni", fisher)
    # Below this, squares of the factor are no float32 numbers.
    scale = np.where(diagonal > 1e-30, diagonal, np.inf) ** -0.5
    if name == "mixture":
        # Sampled scores γ − π of a component that is nearly certain are
        # rounding, of 6e-8 beside 1.
        scale = np.minimum(scale, 1.0)
    normed = fisher * scale[:, :, None] * scale[:, None, :]
    assert np.linalg.eigvalsh(normed).min() > -1e-5
    # 1 − p is rounded to 6e-8, and stands beside √(1 − p).
    dense *= scale[:, :, None]
    np.testing.assert_allclose(
        dense @ dense.swapaxes(-1, -2), normed, atol=1e-4
    )
    np.testing.assert_allclose(
        transposed * scale[:, None, :], dense.swapaxes(-1, -2), atol=1e-3
    )


@pytest.mark.parametrize("name", CASES)
def test_float32_agrees_with_float64(name):
    """Entry by entry in units of the diagonal, and no diagonal vanishes."""
    head, draw = CASES[name]
    if name == "mixture":
        pytest.skip("Draws differ between float types.")
    outputs = draw(np.random.default_rng(1)).astype(np.float32)
    exact = head.fisher(outputs.astype(float)).numpy()
    fisher = head.fisher(outputs).numpy().astype(float)
    diagonal = np.einsum("nii->ni", exact)
    # Below float32's smallest numbers nothing can be said.
    scale = np.where(diagonal > 1e-30, diagonal, np.inf) ** -0.5
    error = np.abs(fisher - exact) * scale[:, :, None] * scale[:, None, :]
    assert error.max() < 2e-4


@pytest.mark.parametrize("name", CASES)
def test_scores_at_extremes(name):
    """The loss's gradient at the head's own draws is finite."""
    head, draw = CASES[name]
    outputs = draw(np.random.default_rng(2))[:50].astype(np.float32)
    drawn_at = outputs
    if name == "negative_binomial_logits":
        # TFP's sampler does not end where the mean of counts overflows.
        drawn_at = np.clip(outputs, -np.inf, LOGIT)
    targets = head.sample(drawn_at, [0, 1])
    assert np.all(np.isfinite(head.log_prob(outputs, targets)))
    assert np.all(np.isfinite(heads.Head.score(head, outputs, targets)))


def normals(diagonal, dimension):
    """Means up to 1e6, scales from 1e-6 to 1e6; correlated by the triangle."""
    rng, count = np.random.default_rng(3), 10_000
    loc = rng.uniform(-1e6, 1e6, size=(count, dimension))
    raw = rng.uniform(-LOG, LOG, size=(count, dimension))
    if diagonal:
        return np.concatenate([loc, raw], axis=-1)
    # Rows in the unit of their scale, as a covariance has them.
    triangle = np.tril(rng.normal(size=(count, dimension, dimension)), -1)
    triangle *= np.exp(raw)[:, :, None]
    triangle += np.eye(dimension) * raw[:, :, None]
    rest = tfp.math.fill_triangular_inverse(triangle).numpy()
    return np.concatenate([loc, rest], axis=-1)


@pytest.mark.variants("tril-3")
@pytest.mark.parametrize("dimension", [3, 5])
@pytest.mark.parametrize(
    "head",
    [
        heads.MultivariateNormalTriL("exp"),
        heads.MultivariateNormalDiag("exp"),
    ],
    ids=["tril", "diag"],
)
def test_multivariate_normal_at_extremes(head, dimension):
    """10 000 parameters: finite, semidefinite, and those of float64."""
    diagonal = isinstance(head, heads.MultivariateNormalDiag)
    outputs = normals(diagonal, dimension).astype(np.float32)
    head.validate(outputs.shape)
    fisher = head.fisher(outputs).numpy().astype(float)
    assert np.all(np.isfinite(fisher))
    scale = np.einsum("nii->ni", fisher) ** -0.5
    assert np.all(np.isfinite(scale))
    normed = fisher * scale[:, :, None] * scale[:, None, :]
    assert np.linalg.eigvalsh(normed).min() > -1e-5
    ones = np.ones_like(outputs)
    for product in (
        head.fisher_factor_product(outputs, ones),
        head.fisher_factor_transpose_product(outputs, ones),
        head.natural_gradient(outputs[:100], ones[:100]),
    ):
        assert np.all(np.isfinite(product))
    exact = head.fisher(outputs.astype(float)).numpy()
    error = (fisher - exact) * scale[:, :, None] * scale[:, None, :]
    assert np.abs(error).max() < 2e-4


def residuals(rng):
    """Scales of 1e-3 to 1e-1 beside means up to 20."""
    return np.concatenate(
        [
            rng.uniform(1.0, 20.0, size=(COUNT, 1)),
            rng.uniform(-7.0, -2.0, size=(COUNT, 1)),
        ],
        axis=-1,
    )


SCORES = {
    name: CASES[name]
    for name in (
        "poisson",
        "zero_inflated_poisson",
        "negative_binomial",
        "gamma",
        "inverse_gamma",
        "beta",
        "student_t",
        "dirichlet",
    )
}
SCORES["negative_binomial_logits"] = (
    heads.NegativeBinomialLogits("sigmoid", "exp"),
    mixed((1, LOG), (1, LOG)),
)
# Not near 1, where draws in float32 have no digits.
SCORES["logit_normal"] = (
    heads.LogitNormal("exp"),
    lambda rng: residuals(rng) * [-1.0, 1.0],
)
SCORES["log_normal"] = (heads.LogNormal("exp"), residuals)
SCORES["log1p_normal"] = (
    heads.Log1pNormal("exp"),
    lambda rng: np.exp(residuals(rng)) * [1.0, 0.0] + residuals(rng) * [0, 1],
)


@pytest.mark.parametrize("name", SCORES)
def test_float32_scores_agree_with_float64(name):
    """At draws, in units of their standard deviation, and log-densities."""
    head, draw = SCORES[name]
    outputs = draw(np.random.default_rng(4)).astype(np.float32)
    targets = head.sample(outputs, [2, 3]).numpy()
    wide, wide_targets = outputs.astype(float), targets.astype(float)
    exact = head.score(wide, wide_targets).numpy()
    fisher = np.einsum("nii->ni", head.fisher(wide))
    error = np.abs(head.score(outputs, targets) - exact)
    assert np.all(error <= 1e-6 * (np.abs(exact) + np.sqrt(fisher)))
    np.testing.assert_allclose(
        head.log_prob(outputs, targets),
        head.log_prob(wide, wide_targets),
        rtol=1e-6,
        atol=1e-6,
    )
