"""Fisher matrices of output distributions, from their textbook formulas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

from tests.reference.network import Array, sigmoid


@dataclass(frozen=True)
class Term:
    """One output's part in the loss, `Σ c · (−log p(y | η))`.

    Attributes:
        head: `"normal"`, `"bernoulli"` or `"categorical"` (logits).
        coefficients: `[N, P]`.
        targets: `[N, P, K]`, one-hot rows for the categorical.
        scale: Standard deviation of the normal.
    """

    head: str
    coefficients: Array
    targets: Array | None = None
    scale: float = 1.0


def softmax(eta: Array) -> Array:
    return np.exp(log_softmax(eta, axis=-1))


def fisher(term: Term, eta: Array) -> Array:
    """`E[s sᵀ]` of every position, `[..., K, K]`."""
    identity = np.eye(eta.shape[-1])
    if term.head == "normal":
        return np.broadcast_to(
            identity / term.scale**2, (*eta.shape, eta.shape[-1])
        )
    if term.head == "bernoulli":
        p = sigmoid(eta)
        return (p * (1.0 - p))[..., np.newaxis] * identity
    p = softmax(eta)
    return p[..., np.newaxis] * identity - p[..., np.newaxis] * p[..., None, :]


def factor(term: Term, eta: Array) -> Array:
    """`L` with `L Lᵀ = F`, `[..., K, K]`."""
    identity = np.eye(eta.shape[-1])
    if term.head == "normal":
        return np.broadcast_to(
            identity / term.scale, (*eta.shape, eta.shape[-1])
        )
    if term.head == "bernoulli":
        p = sigmoid(eta)
        return np.sqrt(p * (1.0 - p))[..., np.newaxis] * identity
    p = softmax(eta)
    root = np.sqrt(p)
    return (
        root[..., np.newaxis] * identity
        - p[..., np.newaxis] * root[..., np.newaxis, :]
    )


def score(term: Term, eta: Array, targets: Array) -> Array:
    """`∂ log p(y | η) / ∂η`, `[..., K]`."""
    if term.head == "normal":
        return (targets - eta) / term.scale**2
    if term.head == "bernoulli":
        return targets - sigmoid(eta)
    return targets - softmax(eta)


def loss(term: Term, eta: Array) -> float:
    """The term's value, up to a constant."""
    if term.head == "normal":
        values = 0.5 * np.sum((term.targets - eta) ** 2, -1) / term.scale**2
    elif term.head == "bernoulli":
        values = np.sum(np.logaddexp(0.0, eta) - term.targets * eta, -1)
    else:
        values = -np.sum(term.targets * log_softmax(eta, axis=-1), -1)
    return float(np.sum(term.coefficients * values))
