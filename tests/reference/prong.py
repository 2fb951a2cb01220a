"""PRONG by its definition: gradient descent on (V, d) of whitened inputs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tests.reference.network import Array


class Whitening(NamedTuple):
    """`h ↦ U (h − μ)`; one example per row of h."""

    centre: Array
    root: Array


def whitening(inputs: Array, damping: float, relative: bool) -> Whitening:
    """The symmetric root `U = (Σ + εI)^{-½}` of the seed's text.

    Args:
        inputs: `[N, n]`.
        damping: ε.
        relative: Whether in mean eigenvalues of Σ.
    """
    centre = inputs.mean(axis=0)
    covariance = np.cov(inputs, rowvar=False, bias=True)
    if relative:
        damping = damping * np.mean(np.linalg.eigvalsh(covariance))
    values, vectors = np.linalg.eigh(covariance)
    root = vectors @ np.diag((values + damping) ** -0.5) @ vectors.T
    return Whitening(centre, root)


def step(
    weights: Array,
    bias: Array,
    gradients: tuple[Array, Array],
    white: Whitening,
    rate: float,
) -> tuple[Array, Array]:
    """One step on (V, d) and back to (W, b), kernels as `[m, n]`.

    With `W = V U` and `b = d − W μ`, the gradients of V and d are
    `g (U (h − μ))ᵀ = (∇W − ∇b μᵀ) Uᵀ` and `∇b`.
    """
    inner = weights @ np.linalg.inv(white.root)
    offset = bias + weights @ white.centre
    along = gradients[0] - np.outer(gradients[1], white.centre)
    inner = inner - rate * along @ white.root.T
    offset = offset - rate * gradients[1]
    return inner @ white.root, offset - inner @ white.root @ white.centre


def closed_step(
    matrix: Array, gradient: Array, white: Whitening, rate: float
) -> Array:
    """The same as one solve, on `[n + 1, m]` matrices.

    `Ā_ε = [[Σ + εI + μμᵀ, μ], [μᵀ, 1]]`, with `Σ + εI = (UUᵀ)⁻¹`.
    """
    mean = white.centre[:, None]
    damped = np.linalg.inv(white.root @ white.root.T)
    factor = np.block([[damped + mean @ mean.T, mean], [mean.T, np.eye(1)]])
    return matrix - rate * np.linalg.solve(factor, gradient)
