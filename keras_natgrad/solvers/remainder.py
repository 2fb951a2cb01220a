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


def remainder(root: FisherRoot, gradient: Direction) -> list[tf.Tensor]:
    """Returns `∇ − R u`, or zero if that is only rounding.

    It is more than rounding with regularizers, clipping or accumulated
    gradients. Near a minimum the terms of `R u` may cancel. Their size without
    cancellation, the scale of the rounding, is that of `R (ε ∘ u)` with random
    signs ε.

    Args:
        root: R of the batch.
        gradient: ∇.
    """
    residual = root.residual()
    signs = random_signs(tf.shape(residual), (0, 1), residual.dtype)
    known, size = root.product(residual), root.product(signs * residual)
    rest = [g - k for g, k in zip(gradient, known, strict=True)]
    bound = inner(size, size) + inner(known, known)
    small = inner(rest, rest) <= rounding_of(residual.dtype) ** 2 * bound
    return [tf.where(small, tf.zeros_like(part), part) for part in rest]
