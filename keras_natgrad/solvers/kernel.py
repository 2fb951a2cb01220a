"""The natural gradient through the kernel matrix of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import keras
import tensorflow as tf
from typing_extensions import override

from keras_natgrad.linalg import damped_solve, pseudo_inverse_solve
from keras_natgrad.solvers.root import (
    FisherRoot,
    Solution,
    Solver,
    System,
    add,
    is_zero,
    scale,
)


@keras.saving.register_keras_serializable(package="keras_natgrad")
@dataclass(frozen=True)
class Kernel(Solver):
    r"""Solves in the space of the batch; for fewer columns than parameters.

    With the kernel `K = RᵀR` and the push-through identity

        (R Rᵀ + λI)⁻¹ R u = R (K + λI)⁻¹ u,

    one M × M factorisation replaces one of size P. This *residual form* loses
    at most `ε ‖R‖ ‖u₀‖ / λ`, where u₀ is the part of u in the null space of R,
    and nothing if R has full column rank; the *Woodbury form* of the remainder,

        (R Rᵀ + λI)⁻¹ r = (r − R (K + λI)⁻¹ Rᵀ r) / λ,

    has the relative error `ε ‖K‖ / λ` by cancellation: in float32 it loses all
    digits for `λ < 1e-7 ‖K‖`. It is therefore used for the remainder only.

    Without damping it is the Moore–Penrose natural gradient `F⁺ ∇ = R K⁺ u`,
    `F⁺ r = R K⁺ K⁺ Rᵀ r`, where eigenvalues of K below `cutoff` times the
    largest count as zero. Correct for any rank and any ratio of M to P.

    Cost: `M² Σ (n + m)` for K, one product per layer, and `M³/3`; memory `M²`.

    Args:
        cutoff: Relative eigenvalue cutoff of the pseudo-inverse, or `None`
            for M times the rounding unit.

    References:
        - Ren & Goldfarb, 2019, arXiv:1906.02353.
        - Chen & Heyl, 2024, arXiv:2302.01941 (minSR).
    """

    cutoff: float | None = None
    kind = "kernel"

    @override
    def solve(
        self, root: FisherRoot, system: System, exact: bool = False
    ) -> Solution:
        gram = root.gram()
        target = system.target(root)
        if exact:
            retries, succeeded = tf.constant(0, tf.int32), tf.constant(True)

            def inverse(vector: tf.Tensor) -> tf.Tensor:
                return pseudo_inverse_solve(gram, vector, self.cutoff)

            weights = inverse(target)
        else:
            # The same factorisation solves the system of the remainder.
            extra = _pull_back(root, system)
            solved = damped_solve(
                gram, tf.stack([target, extra], axis=1), system.damping
            )
            retries, succeeded = solved.retries, solved.succeeded
            weights, extra = tf.unstack(solved.solution, axis=1)
        remainder = system.remainder
        if remainder is None:
            direction = root.product(weights)
        elif exact:
            extra = inverse(inverse(_pull_back(root, system)))
            direction = root.product(weights + extra)
        else:
            inverse_damping = tf.math.reciprocal(system.damping)
            direction = add(
                root.product(weights - inverse_damping * extra),
                scale(inverse_damping, remainder),
            )
        return Solution(
            system.shifted(direction),
            retries,
            tf.cast(~succeeded, tf.int32),
            tf.constant(0, tf.int32),
        )

    @override
    def memory(self, size: int, columns: int) -> int:
        return 2 * columns**2

    @override
    def describe(self) -> str:
        return "kernel RᵀR of the batch"


def _pull_back(root: FisherRoot, system: System) -> tf.Tensor:
    """Returns `Rᵀ r`, at no cost if the remainder is zero."""
    zeros = tf.zeros_like(system.residual)
    remainder = system.remainder
    if remainder is None:
        return zeros
    return tf.cond(
        is_zero(remainder),
        lambda: zeros,
        lambda: root.transpose_product(remainder),
    )
