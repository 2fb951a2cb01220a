"""Output distributions in NumPy, written without the package.

Every case lists its support with probabilities, so that expectations are exact
sums (for the normal, Gauss-Hermite quadrature, exact for polynomials). Scores
are complex-step derivatives of log-probabilities, exact to rounding.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_natgrad import heads

SCALE = 0.7
STEP = 1e-30


@dataclasses.dataclass(frozen=True)
class Case:
    """A head, its outputs `[2, 3, K]`, and its distribution in NumPy."""

    name: str
    head: heads.Head
    outputs: np.ndarray
    log_prob: Callable[[np.ndarray, Any], Any]
    support: Callable[[np.ndarray], list[tuple[Any, float]]]

    def score(self, eta, target):
        """Gradient of the log-probability of one example."""
        steps = 1j * STEP * np.eye(len(eta))
        return np.array(
            [self.log_prob(eta + step, target).imag / STEP for step in steps]
        )

    def fisher(self):
        """`E[score scoreᵀ]`, of shape `[2, 3, K, K]`."""

        def one(eta):
            return sum(
                probability * np.outer(s, s)
                for target, probability in self.support(eta)
                for s in [self.score(eta, target)]
            )

        return np.apply_along_axis(one, -1, self.outputs)

    def targets(self):
        """A different possible target for every example."""
        rows = self.outputs.reshape(-1, self.outputs.shape[-1])
        values = []
        for index, eta in enumerate(rows):
            support = self.support(eta)
            values.append(support[(3 * index + 1) % len(support)][0])
        values = np.asarray(values)
        return values.reshape(*self.outputs.shape[:-1], *values.shape[1:])

    def each(self, function, targets):
        """Applies `function(eta, target)` to every example."""
        shape = self.outputs.shape[:-1]
        return np.array(
            [
                function(self.outputs[index], targets[index])
                for index in np.ndindex(*shape)
            ]
        ).reshape(
            *shape, *np.shape(function(self.outputs[0, 0], targets[0, 0]))
        )


def normal_log_prob(eta, y):
    z = (y - eta) / SCALE
    return -np.sum(0.5 * z**2 + np.log(SCALE * np.sqrt(2.0 * np.pi)))


def normal_support(eta):
    nodes, weights = np.polynomial.hermite.hermgauss(3)
    nodes, weights = np.sqrt(2.0) * SCALE * nodes, weights / np.sqrt(np.pi)
    return [
        (eta + nodes[list(index)], np.prod(weights[list(index)]))
        for index in itertools.product(range(3), repeat=len(eta))
    ]


def bernoulli_log_prob(probability):
    def log_prob(eta, y):
        p = probability(eta)
        return np.sum(y * np.log(p) + (1.0 - y) * np.log(1.0 - p))

    return log_prob


def bernoulli_support(probability):
    def support(eta):
        p = probability(eta)
        return [
            (np.array(y), np.prod(np.where(np.array(y) == 1.0, p, 1.0 - p)))
            for y in itertools.product([0.0, 1.0], repeat=len(eta))
        ]

    return support


def categorical_log_prob(probability):
    def log_prob(eta, y):
        logs = np.log(probability(eta))
        return logs[y] if np.ndim(y) == 0 else np.sum(y * logs)

    return log_prob


def categorical_support(probability, one_hot):
    def support(eta):
        p = probability(eta)
        targets = np.eye(len(eta)) if one_hot else np.arange(len(eta))
        return list(zip(targets, p, strict=True))

    return support


def categorical_support_of(probability):
    """All labels, however many the parameters make."""

    def support(eta):
        return list(enumerate(probability(eta)))

    return support


def sigmoid(eta):
    return 1.0 / (1.0 + np.exp(-eta))


def softmax(eta):
    return np.exp(eta) / np.sum(np.exp(eta), axis=-1, keepdims=True)


def normalise(eta):
    return eta / np.sum(eta, axis=-1, keepdims=True)


def identity(eta):
    return eta


CUTPOINTS = np.array([-1.0, 0.2, 1.5])


def ordered_probabilities(eta):
    """Differences of the logistic distribution function at the edges."""
    if len(eta) == 1:
        edges = CUTPOINTS - eta[0]
    else:
        steps = np.log(1.0 + np.exp(eta[1:])) + 1e-6
        edges = np.cumsum(np.concatenate([-eta[:1], steps]))
    below = np.concatenate([[0.0], sigmoid(edges), [1.0]])
    return np.diff(below)


def normal_with_scale_log_prob(eta, y):
    loc, raw = np.split(eta, 2)
    scale = np.log(1.0 + np.exp(raw)) + 1e-6
    z = (y - loc) / scale
    return -np.sum(0.5 * z**2 + np.log(scale * np.sqrt(2.0 * np.pi)))


def normal_with_scale_support(eta):
    loc, raw = np.split(eta, 2)
    scale = np.log(1.0 + np.exp(raw)) + 1e-6
    nodes, weights = np.polynomial.hermite.hermgauss(3)
    nodes, weights = np.sqrt(2.0) * nodes, weights / np.sqrt(np.pi)
    return [
        (loc + scale * nodes[list(index)], np.prod(weights[list(index)]))
        for index in itertools.product(range(3), repeat=len(loc))
    ]


def sphere_log_prob(eta, y):
    """Von Mises–Fisher in three dimensions, Z = 4π sinh κ / κ."""
    kappa = np.sqrt(np.sum(eta**2))
    return eta @ y - np.log(4.0 * np.pi * np.sinh(kappa) / kappa)


def sphere_support(eta):
    """Gauss–Legendre in the height, the trapezoidal rule around."""
    heights, weights = np.polynomial.legendre.leggauss(16)
    angles = 2.0 * np.pi * np.arange(24) / 24
    found = []
    for height, weight in zip(heights, weights, strict=True):
        radius = np.sqrt(1.0 - height**2)
        for angle in angles:
            y = np.array(
                [radius * np.cos(angle), radius * np.sin(angle), height]
            )
            density = np.exp(sphere_log_prob(eta, y))
            found.append((y, density * weight * 2.0 * np.pi / 24))
    return found


def joint_log_prob(eta, y):
    """A class out of three, one-hot in two, and two bits."""
    return (
        categorical_log_prob(softmax)(eta[:3], int(y[0]))
        + categorical_log_prob(softmax)(eta[3:5], y[1:3])
        + bernoulli_log_prob(sigmoid)(eta[5:], y[3:])
    )


def joint_support(eta):
    parts = [
        categorical_support(softmax, one_hot=False)(eta[:3]),
        categorical_support(softmax, one_hot=True)(eta[3:5]),
        bernoulli_support(sigmoid)(eta[5:]),
    ]
    return [
        (
            np.concatenate([np.atleast_1d(y) for y, _ in each]),
            np.prod([p for _, p in each]),
        )
        for each in itertools.product(*parts)
    ]


def make_cases():
    rng = np.random.default_rng(0)
    logits3 = rng.normal(size=(2, 3, 3))
    logits4 = rng.normal(size=(2, 3, 4))
    # Not normalised: the log-probability of Keras is defined there as well.
    unnormalised = rng.uniform(0.1, 0.9, size=(2, 3, 4))
    return [
        Case(
            "normal",
            heads.Normal(scale=SCALE),
            logits3,
            normal_log_prob,
            normal_support,
        ),
        Case(
            "bernoulli_logits",
            heads.Bernoulli(),
            logits3,
            bernoulli_log_prob(sigmoid),
            bernoulli_support(sigmoid),
        ),
        Case(
            "bernoulli_probabilities",
            heads.Bernoulli(from_logits=False),
            sigmoid(logits3),
            bernoulli_log_prob(identity),
            bernoulli_support(identity),
        ),
        Case(
            "categorical_logits",
            heads.Categorical(),
            logits4,
            categorical_log_prob(softmax),
            categorical_support(softmax, one_hot=False),
        ),
        Case(
            "categorical_one_hot_logits",
            heads.Categorical(sparse=False),
            logits4,
            categorical_log_prob(softmax),
            categorical_support(softmax, one_hot=True),
        ),
        Case(
            "categorical_simplex",
            heads.Categorical(from_logits=False),
            softmax(logits4),
            categorical_log_prob(normalise),
            categorical_support(normalise, one_hot=False),
        ),
        Case(
            "categorical_unnormalised",
            heads.Categorical(from_logits=False, sparse=False),
            unnormalised,
            categorical_log_prob(normalise),
            categorical_support(normalise, one_hot=True),
        ),
        Case(
            "one_hot_categorical",
            heads.OneHotCategorical(),
            logits4,
            categorical_log_prob(softmax),
            categorical_support(softmax, one_hot=True),
        ),
        Case(
            "ordered_logistic_given",
            heads.OrderedLogistic(CUTPOINTS),
            logits3[..., :1],
            categorical_log_prob(ordered_probabilities),
            categorical_support_of(ordered_probabilities),
        ),
        Case(
            "ordered_logistic",
            heads.OrderedLogistic(),
            logits3,
            categorical_log_prob(ordered_probabilities),
            categorical_support_of(ordered_probabilities),
        ),
        Case(
            "multivariate_normal_diag",
            heads.MultivariateNormalDiag(),
            logits4,
            normal_with_scale_log_prob,
            normal_with_scale_support,
        ),
        Case(
            "von_mises_fisher",
            heads.VonMisesFisher(),
            logits3,
            sphere_log_prob,
            sphere_support,
        ),
        Case(
            "joint",
            heads.Joint(
                ["categorical", heads.OneHotCategorical(), "bernoulli"],
                sizes=[3, 2, 2],
            ),
            np.concatenate([logits3, logits4], axis=-1),
            joint_log_prob,
            joint_support,
        ),
    ]


CASES = make_cases()
