"""Densities in NumPy with their Fisher matrices, without the package.

Every density takes complex parameters, so that scores are complex-step
derivatives, exact to rounding; expectations are double-exponential quadrature
(Takahasi & Mori 1974) or sums over the counts. The links are included.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy.special import betaln, erf, gammaln, iv, loggamma

from keras_natgrad import heads

STEP = 1e-30
FLOOR = 1e-6


def exp(x):
    return np.exp(x)


def softplus(x):
    return np.log(1.0 + np.exp(x)) + FLOOR


def log_variance(x):
    return np.exp(0.5 * x)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def real(x):
    return x


LINKS = {
    "identity": real,
    "exp": exp,
    "softplus": softplus,
    "log_variance": log_variance,
    "sigmoid": sigmoid,
}


def normal(y, loc, scale):
    return -0.5 * ((y - loc) / scale) ** 2 - np.log(scale * np.sqrt(2 * np.pi))


def log_normal(y, loc, scale):
    return normal(np.log(y), loc, scale) - np.log(y)


def logit_normal(y, loc, scale):
    logit = np.log(y) - np.log1p(-y)
    return normal(logit, loc, scale) - np.log(y) - np.log1p(-y)


def laplace(y, loc, scale):
    z = (y - loc) / scale
    return -np.where(z.real < 0, -z, z) - np.log(2 * scale)


def logistic(y, loc, scale):
    z = (y - loc) / scale
    z = np.where(z.real < 0, -z, z)  # Symmetric; the far side overflows.
    return -z - np.log(scale) - 2 * np.log(1 + np.exp(-z))


def cauchy(y, loc, scale):
    return -np.log(np.pi * scale) - np.log(1 + ((y - loc) / scale) ** 2)


def huber(y, loc, scale, delta=1.3):
    z = (y - loc) / scale
    z = np.where(z.real < 0, -z, z)
    inside = z.real <= delta
    loss = np.where(inside, 0.5 * z**2, delta * (z - 0.5 * delta))
    middle = np.sqrt(2 * np.pi) * erf(delta / np.sqrt(2))
    tails = 2 / delta * np.exp(-0.5 * delta**2)
    return -loss - np.log(middle + tails) - np.log(scale)


def hyperbolic_secant(y, loc, scale):
    z = (y - loc) / scale
    z = np.where(z.real < 0, -z, z)  # Symmetric; the far side overflows.
    return np.log(2 / np.pi) - z - np.log(1 + np.exp(-2 * z)) - np.log(scale)


def log1p_normal(y, loc, scale):
    return log_normal(y + 1, np.log(1 + loc), scale)


def gumbel(y, loc, scale):
    z = (y - loc) / scale
    return -z - np.exp(-z) - np.log(scale)


def student_t(y, loc, scale, df):
    z = (y - loc) / scale
    return (
        loggamma((df + 1) / 2)
        - loggamma(df / 2)
        - 0.5 * np.log(df * np.pi)
        - np.log(scale)
        - (df + 1) / 2 * np.log(1 + z**2 / df)
    )


def exponential(y, rate):
    return np.log(rate) - rate * y


def gamma(y, rate, alpha):
    return (
        alpha * np.log(rate)
        - loggamma(alpha)
        + (alpha - 1) * np.log(y)
        - rate * y
    )


def inverse_gamma(y, scale, alpha):
    return gamma(1 / y, scale, alpha) - 2 * np.log(y)


def inverse_gaussian(y, loc, concentration):
    return 0.5 * np.log(concentration / (2 * np.pi * y**3)) - (
        concentration * (y - loc) ** 2 / (2 * loc**2 * y)
    )


def weibull(y, scale, k):
    z = np.log(y) - np.log(scale)
    return np.log(k) - np.log(y) + k * z - np.exp(k * z)


def beta(y, a, b):
    return (
        loggamma(a + b)
        - loggamma(a)
        - loggamma(b)
        + (a - 1) * np.log(y)
        + (b - 1) * np.log1p(-y)
    )


def von_mises(y, loc, kappa):
    return kappa * np.cos(y - loc) - np.log(2 * np.pi * iv(0, kappa))


def poisson(y, rate):
    return y * np.log(rate) - rate - gammaln(y + 1)


def geometric(y, p):
    return y * np.log(1 - p) + np.log(p)


def negative_binomial_logits(y, p, count):
    return (
        loggamma(y + count)
        - loggamma(count)
        - gammaln(y + 1)
        + y * np.log(p)
        + count * np.log(1 - p)
    )


def negative_binomial(y, mean, count):
    return negative_binomial_logits(y, mean / (mean + count), count)


def zero_inflated_poisson(y, extra, rate):
    zero = np.log(extra + (1 - extra) * np.exp(-rate))
    return np.where(y == 0, zero, np.log(1 - extra) + poisson(y, rate))


def binomial(y, p):
    choose = -np.log(8.0) - betaln(8.0 - y, y + 1)
    return choose + y * np.log(p) + (7 - y) * np.log(1 - p)


T = np.arange(-4.6, 4.6, 1 / 64)


def positive_nodes():
    """Nodes and weights on (0, ∞): y = exp(π/2 sinh t)."""
    with np.errstate(over="ignore", under="ignore"):
        y = np.exp(0.5 * np.pi * np.sinh(T))
        weights = y * 0.5 * np.pi * np.cosh(T) / 64
    keep = (y > 1e-290) & (y < 1e280)
    return y[keep], weights[keep]


def real_nodes(center):
    y, w = positive_nodes()
    keep = (y > 1e-14) & (y < 1e140)
    y, w = y[keep], w[keep]
    return np.concatenate([center - y, center + y]), np.concatenate([w, w])


def huber_nodes(eta, delta=1.3):
    """Gauss-Legendre between the two points where the density has a kink."""
    center, scale = eta[0], softplus(eta[1])
    x, w = np.polynomial.legendre.leggauss(60)
    reach = scale * delta
    y, tail = positive_nodes()
    keep = (y > 1e-14) & (y < 1e140)
    y, tail = y[keep], tail[keep]
    return (
        np.concatenate(
            [center + reach * x, center + reach + y] + [center - reach - y]
        ),
        np.concatenate([reach * w, tail, tail]),
    )


def above_minus_one_nodes():
    y, weights = positive_nodes()
    keep = y > 1e-14
    return y[keep] - 1, weights[keep]


def unit_nodes():
    z = np.pi * np.sinh(T)
    z = z[np.abs(z) < 36]
    y = sigmoid(z)
    slope = np.pi * np.sqrt(1 + (z / np.pi) ** 2) / 64
    return y, slope * y * sigmoid(-z)


def circle_nodes():
    y = np.linspace(-np.pi, np.pi, 400, endpoint=False)
    return y, np.full(400, 2 * np.pi / 400)


def count_nodes(most=4000):
    return np.arange(most, dtype=float), np.ones(most)


@dataclasses.dataclass(frozen=True)
class Density:
    """A head of one unit, its density, and outputs `[2, K]` to try."""

    name: str
    head: heads.Head
    log_density: Callable
    links: tuple[str, ...]
    nodes: Callable
    outputs: np.ndarray

    def log_prob(self, eta, y):
        """Log-density at complex raw outputs."""
        values = [
            LINKS[link](value)
            for link, value in zip(self.links, eta, strict=True)
        ]
        return self.log_density(y, *values)

    def scores(self, eta, y):
        steps = 1j * STEP * np.eye(len(eta))
        return np.stack(
            [self.log_prob(eta + step, y).imag / STEP for step in steps]
        )

    def fisher(self, eta):
        """`E[s sᵀ]`, `[K, K]`."""
        if self.nodes is real_nodes:
            y, weights = self.nodes(eta[0])
        elif self.nodes is huber_nodes:
            y, weights = self.nodes(eta)
        else:
            y, weights = self.nodes()
        with np.errstate(all="ignore"):
            density = np.exp(self.log_prob(eta.astype(complex), y).real)
            scores = self.scores(eta, y)
        keep = density * weights > 1e-300
        scores = np.where(keep, scores, 0.0)
        mass = np.where(keep, density * weights, 0.0)
        np.testing.assert_allclose(mass.sum(), 1.0, atol=1e-9)
        return np.einsum("iy,jy,y->ij", scores, scores, mass)


def _density(name, head, log_density, links, nodes, seed=0, center=0.3):
    rng = np.random.default_rng(seed)
    outputs = center + 0.8 * rng.normal(size=(2, len(links)))
    return Density(name, head, log_density, links, nodes, outputs)


def make_densities():
    h, found = heads, []

    def add(name, head, density, links, nodes, center=0.3):
        seed = len(found)
        found.append(_density(name, head, density, links, nodes, seed, center))

    for link in ("softplus", "exp", "log_variance"):
        pair = ("identity", link)
        add(f"normal_{link}", h.Normal(link), normal, pair, real_nodes)
    pair = ("identity", "softplus")
    for head, density, nodes in (
        (h.LogNormal(), log_normal, positive_nodes),
        (h.LogitNormal(), logit_normal, unit_nodes),
        (h.Laplace(), laplace, real_nodes),
        (h.Logistic(), logistic, real_nodes),
        (h.Cauchy(), cauchy, real_nodes),
        (h.Gumbel("exp"), gumbel, real_nodes),
    ):
        links = ("identity", "exp") if density is gumbel else pair
        add(density.__name__, head, density, links, nodes)
    add(
        "student_t_fixed",
        h.StudentT(df=3.0),
        lambda y, loc, scale: student_t(y, loc, scale, 3.0),
        pair,
        real_nodes,
    )
    add(
        "student_t",
        h.StudentT("exp", "softplus"),
        student_t,
        ("identity", "exp", "softplus"),
        real_nodes,
    )
    two = ("softplus", "softplus")
    add("exponential", h.Exponential(), exponential, ("exp",), positive_nodes)
    add("gamma", h.Gamma(), gamma, two, positive_nodes)
    add(
        "gamma_fixed_shape",
        h.Gamma("exp", 2.5),
        lambda y, rate: gamma(y, rate, 2.5),
        ("exp",),
        positive_nodes,
    )
    add(
        "gamma_fixed_rate",
        h.Gamma(1.5, "exp"),
        lambda y, alpha: gamma(y, 1.5, alpha),
        ("exp",),
        positive_nodes,
    )
    add("inverse_gamma", h.InverseGamma(), inverse_gamma, two, positive_nodes)
    add(
        "inverse_gaussian",
        h.InverseGaussian("exp", "softplus"),
        inverse_gaussian,
        ("exp", "softplus"),
        positive_nodes,
    )
    add("weibull", h.Weibull(), weibull, two, positive_nodes)
    # Concentrations above 1, or the mass at 1 is beyond the last node.
    add("beta", h.Beta(), beta, two, unit_nodes, center=2.0)
    add("von_mises", h.VonMises(), von_mises, pair, circle_nodes)
    add("poisson", h.Poisson(), poisson, ("exp",), count_nodes)
    add(
        "poisson_softplus", h.Poisson("softplus"), poisson, two[:1], count_nodes
    )
    add("geometric", h.Geometric(), geometric, ("sigmoid",), count_nodes)
    add(
        "negative_binomial",
        h.NegativeBinomial(),
        negative_binomial,
        two,
        count_nodes,
    )
    add(
        "negative_binomial_fixed",
        h.NegativeBinomial("exp", 2.0),
        lambda y, mean: negative_binomial(y, mean, 2.0),
        ("exp",),
        count_nodes,
    )
    add(
        "negative_binomial_logits",
        h.NegativeBinomialLogits(),
        negative_binomial_logits,
        ("sigmoid", "softplus"),
        count_nodes,
    )
    add(
        "zero_inflated_poisson",
        h.ZeroInflatedPoisson(),
        zero_inflated_poisson,
        ("sigmoid", "exp"),
        count_nodes,
    )
    add(
        "binomial",
        h.Binomial(7),
        binomial,
        ("sigmoid",),
        lambda: (np.arange(8.0), np.ones(8)),
    )
    add("huber", h.Huber(delta=1.3), huber, pair, huber_nodes)
    add(
        "hyperbolic_secant",
        h.HyperbolicSecant(),
        hyperbolic_secant,
        pair,
        real_nodes,
    )
    # At a negative location the Fisher in it is zero: tested by itself.
    add(
        "log1p_normal",
        h.Log1pNormal(),
        log1p_normal,
        pair,
        above_minus_one_nodes,
        center=2.0,
    )
    return found


DENSITIES = make_densities()
