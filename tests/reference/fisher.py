"""The dense Fisher of a network and its parts.

Parameters are flattened row by row, `[n (+ 1), m]` to `(n (+ 1)) m`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.reference import heads
from tests.reference.heads import Term
from tests.reference.network import Array, Trace


def flat_jacobian(trace: Trace, parameter: int, output: int = 0) -> Array:
    """`[N, P, K, size]`."""
    jacobian = trace.parameter_jacobian(parameter, output)
    return jacobian.reshape(*jacobian.shape[:3], -1)


def block(
    trace: Trace, terms: Sequence[Term], left: int, right: int | None = None
) -> Array:
    """`Σ c J_leftᵀ F_η J_right`, by default a diagonal block."""
    right = left if right is None else right
    return sum(
        np.einsum(
            "np,npka,npkl,nplb->ab",
            term.coefficients,
            flat_jacobian(trace, left, output),
            heads.fisher(term, trace.outputs[output]),
            flat_jacobian(trace, right, output),
            optimize=True,
        )
        for output, term in enumerate(terms)
    )


def dense(trace: Trace, terms: Sequence[Term]) -> Array:
    """The whole Fisher, parameter after parameter."""
    indices = range(len(trace.inputs))
    return np.block(
        [[block(trace, terms, i, j) for j in indices] for i in indices]
    )


def empirical(trace: Trace, terms: Sequence[Term], parameter: int) -> Array:
    """`Σ c Jᵀ s sᵀ J` with the score `s` at the observed targets."""
    total = 0.0
    for output, term in enumerate(terms):
        score = heads.score(term, trace.outputs[output], term.targets)
        gradients = np.einsum(
            "npk,npka->npa", score, flat_jacobian(trace, parameter, output)
        )
        total += np.einsum(
            "np,npa,npb->ab", term.coefficients, gradients, gradients
        )
    return total


def gradient(trace: Trace, terms: Sequence[Term], parameter: int) -> Array:
    """Gradient of the loss, `[rows, m]`."""
    return -sum(
        np.einsum(
            "np,npk,npkrm->rm",
            term.coefficients,
            heads.score(term, trace.outputs[output], term.targets),
            trace.parameter_jacobian(parameter, output),
        )
        for output, term in enumerate(terms)
    )


def loss(trace: Trace, terms: Sequence[Term]) -> float:
    """The loss up to a constant."""
    return sum(
        heads.loss(term, eta)
        for term, eta in zip(terms, trace.outputs, strict=True)
    )
