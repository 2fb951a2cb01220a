"""The part of a gradient that the residuals do not explain."""

from __future__ import annotations

import tensorflow as tf

from keras_natgrad.linalg import random_signs
from keras_natgrad.solvers.root import (
    Direction,
    FisherRoot,
    inner,
    rounding_of,
)


def remainder(factor: FisherRoot, gradient: Direction) -> list[tf.Tensor]:
    """Returns `∇ − A u`, zero where it is within rounding.

    Regularizers, clipping and accumulated gradients make it more than that.
    The terms of `A u` may cancel near a minimum; their size without the
    cancellation is that of `A (ε ∘ u)` with random signs ε, the scale of the
    rounding.

    Args:
        factor: A of the batch.
        gradient: ∇.
    """
    residual = factor.residual()
    signs = random_signs(tf.shape(residual), (0, 1), residual.dtype)
    known, size = factor.product(residual), factor.product(signs * residual)
    rest = [g - k for g, k in zip(gradient, known, strict=True)]
    bound = inner(size, size) + inner(known, known)
    small = inner(rest, rest) <= rounding_of(residual.dtype) ** 2 * bound
    return [tf.where(small, tf.zeros_like(part), part) for part in rest]
