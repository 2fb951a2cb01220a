"""The natural gradient through the Fisher matrix itself."""

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
)


@keras.saving.register_keras_serializable(package="keras_natgrad")
@dataclass(frozen=True)
class Dense(Solver):
    """Solves with the P × P Fisher, for fewer parameters than columns.

    `φ = s + (R Rᵀ + λI)⁻¹ (R (u − Rᵀs) + r)` by Cholesky, or with the
    Moore–Penrose inverse by an eigendecomposition if λ is zero.

    Cost: `P M` for R, `P² M` for F and `P³/3`; `P² + P M` memory.

    Args:
        cutoff: Relative eigenvalue cutoff of the pseudo-inverse, or `None`
            for P times the rounding unit.
    """

    cutoff: float | None = None
    kind = "dense"

    @override
    def solve(
        self, root: FisherRoot, system: System, exact: bool = False
    ) -> Solution:
        matrix = root.matrix()
        fisher = tf.matmul(matrix, matrix, transpose_b=True)
        residual = system.residual
        if system.shift is not None:
            shift = root.flatten(system.shift)
            residual -= tf.linalg.matvec(matrix, shift, transpose_a=True)
        right = tf.linalg.matvec(matrix, residual)
        if system.remainder is not None:
            right += root.flatten(system.remainder)
        if exact:
            solution = pseudo_inverse_solve(fisher, right, self.cutoff)
            retries, succeeded = tf.constant(0, tf.int32), tf.constant(True)
        else:
            solved = damped_solve(fisher, right[:, tf.newaxis], system.damping)
            solution = solved.solution[:, 0]
            retries, succeeded = solved.retries, solved.succeeded
        return Solution(
            system.shifted(root.unflatten(solution)),
            retries,
            tf.cast(~succeeded, tf.int32),
            tf.constant(0, tf.int32),
        )

    @override
    def memory(self, size: int, columns: int) -> int:
        return 2 * size**2 + size * columns

    @override
    def describe(self) -> str:
        return "dense Fisher matrix"
