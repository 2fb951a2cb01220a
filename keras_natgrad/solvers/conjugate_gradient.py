"""The natural gradient by conjugate gradients, matrix-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from typing_extensions import override

from keras_natgrad.checks import check_integer
from keras_natgrad.solvers.root import (
    Direction,
    FisherRoot,
    Solution,
    Solver,
    System,
    add,
    inner,
    rounding_of,
    scale,
)

#: The preconditioners, by the name of their blocks.
PRECONDITIONERS = ("none", "diagonal", "kronecker")

Preconditioner = Callable[[Direction], list[tf.Tensor]]


@keras.saving.register_keras_serializable(package="keras_natgrad")
@dataclass(frozen=True)
class ConjugateGradient(Solver):
    r"""Solves by conjugate gradients with products `F v = A (Aᵀ v)`.

    A product costs one forward and one backward tangent pass; no matrix is
    formed. The iteration starts at `warm_start` times the previous solution
    and stops at iteration i when the quadratic `q(x) = ½xᵀ(F + λI)x − bᵀx` has
    fallen by less than `tolerance` per iteration over the last
    `k = max(10, i/10)` of them (Martens 2010, section 4.4),

        i > k,   q_i < 0,   (q_i − q_{i−k}) / q_i < k · tolerance.

    A product that is not finite, or a curvature that is not positive, ends
    it at the last good iterate; the former counts as a failure.

    Args:
        max_iterations: Most products per step.
        tolerance: See above; 0 runs to `max_iterations`, or to a residual of
            zero.
        warm_start: Share of the previous solution to start from, in [0, 1].
        preconditioner: Block whose damped inverse, one per layer, stands in
            for `(F + λI)⁻¹`: `"none"`, `"diagonal"` or `"kronecker"` (K-FAC).
            The optimizer keeps running averages for it.

    Raises:
        ValueError: If an argument is out of range.

    References:
        - Martens, 2010, "Deep learning via Hessian-free optimization".
    """

    max_iterations: int = 50
    tolerance: float = 5e-4
    warm_start: float = 0.95
    preconditioner: str = "none"
    kind = "cg"

    def __post_init__(self) -> None:
        check_integer("max_iterations", self.max_iterations)
        if not self.tolerance >= 0:
            raise ValueError(
                "`tolerance` must be non-negative. "
                f"Received: tolerance={self.tolerance!r}"
            )
        if not 0 <= self.warm_start <= 1:
            raise ValueError(
                "`warm_start` must be in [0, 1]. "
                f"Received: warm_start={self.warm_start!r}"
            )
        if self.preconditioner not in PRECONDITIONERS:
            raise ValueError(
                f"`preconditioner` must be one of {PRECONDITIONERS}. "
                f"Received: preconditioner={self.preconditioner!r}"
            )

    @override
    def solve(
        self,
        factor: FisherRoot,
        system: System,
        exact: bool = False,
        start: Direction | None = None,
        preconditioner: Preconditioner | None = None,
    ) -> Solution:
        right = factor.product(system.target(factor))
        if system.remainder is not None:
            right = add(right, system.remainder)

        def curvature(direction: Direction) -> list[tf.Tensor]:
            product = factor.fisher_product(direction)
            return add(product, scale(system.damping, direction))

        if start is None:
            start = [tf.zeros_like(part) for part in right]
        else:
            start = scale(self.warm_start, start)
        solution, iterations, broken = self._iterate(
            curvature, right, start, preconditioner or list
        )
        return Solution(
            system.shifted(solution),
            tf.constant(0, tf.int32),
            tf.cast(broken, tf.int32),
            iterations,
        )

    def _iterate(
        self,
        curvature: Preconditioner,
        right: Direction,
        start: Direction,
        preconditioner: Preconditioner,
    ) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
        residual = [b - c for b, c in zip(right, curvature(start), strict=True)]
        solved = preconditioner(residual)
        slope = inner(residual, solved)
        history = tf.zeros([self.max_iterations + 1], slope.dtype)
        # A residual this small is rounding; in a singular system it would be
        # blown up by further iterations.
        unit = 8 * np.finfo(slope.dtype.as_numpy_dtype).eps
        least = unit**2 * inner(right, preconditioner(right))
        state = _Iterate(
            tf.constant(0, tf.int32),
            tf.constant(False),
            list(start),
            residual,
            solved,
            slope,
            _record(history, 0, _quadratic(start, residual, right)),
            slope > least,
        )

        def body(*flat: tf.Tensor) -> list[tf.Tensor]:
            now = tf.nest.pack_sequence_as(state, list(flat))
            product = curvature(now.search)
            bend = inner(now.search, product)
            good = tf.math.is_finite(bend) & (bend > 0)
            rate = tf.math.divide_no_nan(now.slope, tf.where(good, bend, 1))
            rate = tf.where(good, rate, 0)
            safe = [tf.where(good, p, tf.zeros_like(p)) for p in product]
            x = add(now.solution, scale(rate, now.search))
            r = add(now.residual, scale(-rate, safe))
            z = preconditioner(r)
            slope = inner(r, z)
            turn = tf.math.divide_no_nan(slope, now.slope)
            count = now.count + tf.cast(good, tf.int32)
            value = _quadratic(x, r, right)
            # Beyond rounding the quadratic rises in a singular system only,
            # once there is no more to gain.
            last = now.history[now.count]
            fell = value <= last + rounding_of(value.dtype) * tf.abs(last)
            x = [
                tf.where(fell, new, old)
                for new, old in zip(x, now.solution, strict=True)
            ]
            history = _record(now.history, count, value)
            finite = tf.math.is_finite(bend) & tf.math.is_finite(slope)
            going = good & fell & (slope > least)
            going &= ~self._converged(count, history)
            return tf.nest.flatten(
                _Iterate(
                    count,
                    ~finite,
                    x,
                    r,
                    add(z, scale(turn, now.search)),
                    slope,
                    history,
                    going,
                )
            )

        final = tf.while_loop(
            lambda *flat: tf.nest.pack_sequence_as(state, list(flat)).going,
            body,
            tf.nest.flatten(state),
            maximum_iterations=self.max_iterations,
        )
        found = tf.nest.pack_sequence_as(state, final)
        return found.solution, found.count, found.broken

    def _converged(self, count: tf.Tensor, history: tf.Tensor) -> tf.Tensor:
        back = tf.maximum(10, count // 10)
        now = history[count]
        before = history[tf.maximum(count - back, 0)]
        gain = tf.math.divide_no_nan(now - before, now)
        least = tf.cast(back, now.dtype) * tf.cast(self.tolerance, now.dtype)
        return (count > back) & (now < 0) & (gain < least)

    @override
    def memory(self, size: int, columns: int) -> int:
        return 5 * size + 2 * columns

    @override
    def describe(self) -> str:
        text = f"conjugate gradients, at most {self.max_iterations} products"
        if self.preconditioner == "none":
            return text
        return f"{text}, {self.preconditioner} preconditioner"


class _Iterate(NamedTuple):
    """State of the iteration."""

    count: tf.Tensor
    broken: tf.Tensor
    solution: list[tf.Tensor]
    residual: list[tf.Tensor]
    search: list[tf.Tensor]
    slope: tf.Tensor
    history: tf.Tensor
    going: tf.Tensor


def _quadratic(
    x: Direction, residual: Direction, right: Direction
) -> tf.Tensor:
    """Returns `½xᵀCx − bᵀx`, which is `−½ xᵀ(b + r)` as `r = b − Cx`."""
    return -0.5 * (inner(x, right) + inner(x, residual))


def _record(
    history: tf.Tensor, index: tf.Tensor | int, value: tf.Tensor
) -> tf.Tensor:
    here = tf.equal(tf.range(tf.size(history)), index)
    return tf.where(here, value, history)
