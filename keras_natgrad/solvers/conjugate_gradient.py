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

LinearMap = Callable[[Direction], list[tf.Tensor]]


@keras.saving.register_keras_serializable(package="keras_natgrad")
@dataclass(frozen=True)
class ConjugateGradient(Solver):
    r"""Solves by conjugate gradients with products `F v = R (Rᵀ v)`.

    A product costs one forward and one backward tangent pass; no matrix is
    formed. The iteration starts at `warm_start` times the previous solution
    and stops at iteration i when the quadratic `q(x) = ½xᵀ(F + λI)x − bᵀx` has
    fallen by less than `tolerance` per iteration over the last
    `k = max(10, i/10)` iterations (Martens 2010, section 4.4),

        i > k,   q_i < 0,   (q_i − q_{i−k}) / q_i < k · tolerance.

    If a product is not finite, or a curvature is not positive, the iteration
    ends at the last good x. A product that is not finite counts as a failure.

    Args:
        max_iterations: Maximal number of products per step.
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
        count = check_integer("max_iterations", self.max_iterations)
        object.__setattr__(self, "max_iterations", count)
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
        root: FisherRoot,
        system: System,
        exact: bool = False,
        start: Direction | None = None,
        preconditioner: LinearMap | None = None,
    ) -> Solution:
        b = root.product(system.target(root))
        if system.remainder is not None:
            b = add(b, system.remainder)

        def product(v: Direction) -> list[tf.Tensor]:
            return add(root.fisher_product(v), scale(system.damping, v))

        if start is None:
            x = [tf.zeros_like(part) for part in b]
        else:
            x = scale(self.warm_start, start)
        equation = _Equation(product, b, preconditioner or list)
        found = self._iterate(equation, x)
        return Solution(
            system.shifted(found.x),
            tf.constant(0, tf.int32),
            tf.cast(found.broken, tf.int32),
            found.i,
        )

    def _iterate(self, equation: _Equation, x: list[tf.Tensor]) -> _State:
        """Runs preconditioned conjugate gradients from x."""
        start = self._start(equation, x)

        def unpack(*flat: tf.Tensor) -> _State:
            return tf.nest.pack_sequence_as(start, list(flat))

        def advance(*flat: tf.Tensor) -> list[tf.Tensor]:
            return tf.nest.flatten(self._advance(equation, unpack(*flat)))

        final = tf.while_loop(
            lambda *flat: unpack(*flat).going,
            advance,
            tf.nest.flatten(start),
            maximum_iterations=self.max_iterations,
        )
        return unpack(*final)

    def _start(self, equation: _Equation, x: list[tf.Tensor]) -> _State:
        b, product = equation.b, equation.product(x)
        r = [left - right for left, right in zip(b, product, strict=True)]
        z = equation.preconditioner(r)
        gamma = inner(r, z)
        values = tf.zeros([self.max_iterations + 1], gamma.dtype)
        # A residual this small is rounding, which further iterations would
        # blow up in a singular system.
        unit = 8 * np.finfo(gamma.dtype.as_numpy_dtype).eps
        least = unit**2 * inner(b, equation.preconditioner(b))
        return _State(
            i=tf.constant(0, tf.int32),
            broken=tf.constant(False),
            x=x,
            r=r,
            p=z,
            gamma=gamma,
            least=least,
            values=_record(values, 0, _quadratic(x, r, b)),
            going=gamma > least,
        )

    def _advance(self, equation: _Equation, state: _State) -> _State:
        product = equation.product(state.p)
        curvature = inner(state.p, product)
        good = tf.math.is_finite(curvature) & (curvature > 0)
        alpha = tf.math.divide_no_nan(state.gamma, tf.where(good, curvature, 1))
        alpha = tf.where(good, alpha, 0)
        product = [
            tf.where(good, part, tf.zeros_like(part)) for part in product
        ]
        x = add(state.x, scale(alpha, state.p))
        r = add(state.r, scale(-alpha, product))
        z = equation.preconditioner(r)
        gamma = inner(r, z)
        beta = tf.math.divide_no_nan(gamma, state.gamma)
        i = state.i + tf.cast(good, tf.int32)
        value = _quadratic(x, r, equation.b)
        # The quadratic rises beyond rounding only in a singular system, once
        # there is nothing left to gain.
        last = state.values[state.i]
        fell = value <= last + rounding_of(value.dtype) * tf.abs(last)
        values = _record(state.values, i, value)
        finite = tf.math.is_finite(curvature) & tf.math.is_finite(gamma)
        going = good & fell & (gamma > state.least)
        return _State(
            i=i,
            broken=~finite,
            x=[
                tf.where(fell, new, old)
                for new, old in zip(x, state.x, strict=True)
            ],
            r=r,
            p=add(z, scale(beta, state.p)),
            gamma=gamma,
            least=state.least,
            values=values,
            going=going & ~self._converged(i, values),
        )

    def _converged(self, i: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
        k = tf.maximum(10, i // 10)
        now = values[i]
        before = values[tf.maximum(i - k, 0)]
        gain = tf.math.divide_no_nan(now - before, now)
        least = tf.cast(k, now.dtype) * tf.cast(self.tolerance, now.dtype)
        return (i > k) & (now < 0) & (gain < least)

    @override
    def memory(self, size: int, columns: int) -> int:
        return 5 * size + 2 * columns

    @override
    def describe(self) -> str:
        text = f"conjugate gradients, at most {self.max_iterations} products"
        if self.preconditioner == "none":
            return text
        return f"{text}, {self.preconditioner} preconditioner"


class _Equation(NamedTuple):
    """`C x = b` with `C = F + λI`.

    Attributes:
        product: Maps v to `C v`.
        b: The right-hand side.
        preconditioner: Maps r to z, an approximation of `C⁻¹ r`.
    """

    product: LinearMap
    b: list[tf.Tensor]
    preconditioner: LinearMap


class _State(NamedTuple):
    """State of the iteration.

    Attributes:
        i: Number of iterations that were made.
        broken: Whether a product was not finite.
        x: The solution so far.
        r: The residual `b − C x`.
        p: The search direction.
        gamma: `rᵀ z` with the preconditioned residual z.
        least: `gamma` of a residual that is only rounding.
        values: `q(x)` after every iteration.
        going: Whether to go on.
    """

    i: tf.Tensor
    broken: tf.Tensor
    x: list[tf.Tensor]
    r: list[tf.Tensor]
    p: list[tf.Tensor]
    gamma: tf.Tensor
    least: tf.Tensor
    values: tf.Tensor
    going: tf.Tensor


def _quadratic(x: Direction, r: Direction, b: Direction) -> tf.Tensor:
    """Returns `½xᵀCx − bᵀx`, which is `−½ xᵀ(b + r)` as `r = b − Cx`."""
    return -0.5 * (inner(x, b) + inner(x, r))


def _record(
    values: tf.Tensor, index: tf.Tensor | int, value: tf.Tensor
) -> tf.Tensor:
    here = tf.equal(tf.range(tf.size(values)), index)
    return tf.where(here, value, values)
