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


def sigmoid(eta):
    return 1.0 / (1.0 + np.exp(-eta))


def softmax(eta):
    return np.exp(eta) / np.sum(np.exp(eta), axis=-1, keepdims=True)


def normalise(eta):
    return eta / np.sum(eta, axis=-1, keepdims=True)


def identity(eta):
    return eta


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
    ]


CASES = make_cases()
