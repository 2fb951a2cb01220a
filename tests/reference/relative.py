"""Relative Fisher information from its definition, in NumPy and SciPy.

`ν(t) = Σ_y p'(y)² / p(y)`, or the integral, with `p' = ∂p(y | t)/∂t` by
complex steps, and Jacobians of layers likewise.
"""

from __future__ import annotations

import numpy as np
from scipy import integrate

STEP = 1e-30


def soft_relu(t, slope=0.0, softness=1.0):
    return softness * np.log(
        np.exp(slope * t / softness) + np.exp(t / softness)
    )


def elu(t, alpha=1.0):
    t = np.asarray(t)
    return np.where(t.real >= 0, t, alpha * (np.exp(t) - 1))


def relu(t):
    return np.where(np.asarray(t).real > 0, t, 0)


def sigmoid(t):
    return 1 / (1 + np.exp(-t))


def softmax(z):
    powers = np.exp(z - z.real.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def slope_of(function, t):
    """`f'(t)` by a complex step."""
    return np.imag(function(t + 1j * STEP)) / STEP


def two_point(probability):
    """ν of y with `p(1) = probability(t)`, else the other value."""

    def information(t):
        p, slope = probability(t), slope_of(probability, t)
        return slope**2 / p + slope**2 / (1 - p)

    return np.vectorize(information)


def gaussian(mean, scale=1.0):
    """ν of y ~ N(mean(t), scale²), by quadrature over y."""

    def information(t):
        def integrand(y):
            p = np.exp(-0.5 * ((y - mean(t + 1j * STEP)) / scale) ** 2)
            p /= scale * np.sqrt(2 * np.pi)
            return (p.imag / STEP) ** 2 / p.real

        center = float(np.real(mean(t)))
        value, _ = integrate.quad(
            integrand,
            center - 12 * scale,
            center + 12 * scale,
            points=[center],
            epsabs=1e-13,
            epsrel=1e-12,
        )
        return value

    return np.vectorize(information)


#: ν by activation, at unit softness and noise.
INFORMATION = {
    "tanh": two_point(lambda t: (1 + np.tanh(t)) / 2),
    "sigmoid": two_point(sigmoid),
    "relu": gaussian(soft_relu),
    "elu": gaussian(elu),
    "linear": gaussian(lambda t: t),
}

#: What hidden units compute.
FUNCTIONS = {
    "tanh": np.tanh,
    "sigmoid": sigmoid,
    "relu": relu,
    "elu": elu,
    "linear": lambda t: t,
}


def information_matrix(activation, z):
    """U, `[m, m]`, of the response of a layer at one example's z."""
    if activation != "softmax":
        return np.diag(INFORMATION[activation](z))
    total = np.zeros((len(z), len(z)))
    for outcome in range(len(z)):
        slopes = [
            softmax(z + 1j * STEP * direction)[outcome].imag / STEP
            for direction in np.eye(len(z))
        ]
        total += np.outer(slopes, slopes) / softmax(z)[outcome].real
    return total


def extended(x):
    return np.append(x, 1.0)


def jacobian(matrices, activations, x):
    """`∂t/∂vec(W)` of the last pre-activation in the first matrix.

    Args:
        matrices: Homogeneous weights, bias last, one per layer.
        activations: Of all layers but the last.
        x: One example.
    """
    first = np.asarray(matrices[0], complex)

    def last(matrix):
        h = extended(x) @ matrix
        for weights, name in zip(matrices[1:], activations, strict=True):
            h = extended(FUNCTIONS[name](h)) @ weights
        return h

    columns = []
    for index in np.ndindex(first.shape):
        moved = first.copy()
        moved[index] += 1j * STEP
        columns.append(last(moved).imag / STEP)
    return np.stack(columns, axis=1), last(first).real


def metric(matrices, activations, examples):
    """Mean over examples of `Jᵀ U J`, `[n m, n m]`, of the first layer.

    Args:
        matrices: Homogeneous weights from the layer to its response.
        activations: Of these layers, that of the response last.
        examples: Inputs of the layer, `[N, n]`.
    """
    total = 0.0
    for x in examples:
        derivative, t = jacobian(matrices, activations[:-1], x)
        information = information_matrix(activations[-1], t)
        total = total + derivative.T @ information @ derivative
    return total / len(examples)


def unit_blocks(dense, rows, columns):
    """The diagonal blocks of the units, `[columns, rows, rows]`."""
    dense = dense.reshape(rows, columns, rows, columns)
    return np.stack([dense[:, j, :, j] for j in range(columns)])
