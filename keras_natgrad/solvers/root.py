"""The root of a batch's Fisher, and the system that solvers solve."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_natgrad.linalg import random_signs, scalar

# A point in parameter space: one tensor per block or variable.
Direction = Sequence[tf.Tensor]


class FisherRoot(abc.ABC):
    r"""The root R of one batch's Fisher, `F = R Rᵀ`, by its products.

    With the loss `Σ_i c_i ℓ_i(η_i)` over examples and positions,

        R = [√c_1 J_1ᵀ L_1, …, √c_N J_Nᵀ L_N],    P × M,

    with P parameters, and M the number of columns of all L_i. If the gradient
    of the loss in the outputs lies in the range of their Fisher, the gradient
    in the parameters is `R u` with the whitened residuals
    `u_i = √c_i L_i⁺ ∂ℓ_i/∂η_i`.
    """

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Number P of parameters."""

    @property
    @abc.abstractmethod
    def column_count(self) -> int | None:
        """Number M of columns, `None` if it depends on the batch."""

    @abc.abstractmethod
    def residual(self) -> tf.Tensor:
        """Returns u, `[M]`."""

    @abc.abstractmethod
    def product(self, vector: tf.Tensor) -> list[tf.Tensor]:
        """Returns `R v` for v of shape `[M]`."""

    @abc.abstractmethod
    def transpose_product(self, direction: Direction) -> tf.Tensor:
        """Returns `Rᵀ δ`, `[M]`."""

    @abc.abstractmethod
    def gram(self) -> tf.Tensor:
        """Returns the kernel `K = RᵀR`, `[M, M]`."""

    @abc.abstractmethod
    def matrix(self) -> tf.Tensor:
        """Returns R itself, `[P, M]`, rows in the order of `flatten`."""

    @abc.abstractmethod
    def from_tensors(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns the direction given by one tensor per variable."""

    @abc.abstractmethod
    def to_tensors(self, direction: Direction) -> list[tf.Tensor]:
        """Returns one tensor per variable."""

    @abc.abstractmethod
    def unflatten(self, vector: tf.Tensor) -> list[tf.Tensor]:
        """Returns the direction of a vector `[P]`."""

    def flatten(self, direction: Direction) -> tf.Tensor:
        """Returns a direction as one vector `[P]`."""
        return tf.concat([tf.reshape(part, [-1]) for part in direction], 0)

    def fisher_product(self, direction: Direction) -> list[tf.Tensor]:
        """Returns `F δ = R (Rᵀ δ)`."""
        return self.product(self.transpose_product(direction))

    def trace_estimate(self) -> tf.Tensor:
        """Returns `‖R ε‖²` for random signs ε; its mean is the trace of F."""
        residual = self.residual()
        signs = random_signs(tf.shape(residual), (0, 0), residual.dtype)
        return tf.add_n(
            [tf.reduce_sum(tf.square(part)) for part in self.product(signs)]
        )


class System(NamedTuple):
    r"""The linear system of one step.

        (F + λI) φ = R u + r + λ s.

    Its solution minimises `‖Rᵀφ − u‖² + λ ‖φ − s‖² − 2 rᵀφ`: with s = μ φ₋₁
    that is SPRING (Goldshlager, Abrahamsen & Lin 2024), with s = 0 the damped
    natural gradient. Without damping it is the solution nearest to s.

    Attributes:
        residual: u, `[M]`.
        damping: Scalar λ.
        remainder: r, the part of the gradient that is not `R u`
            (regularizers, clipping, accumulated gradients), or `None`.
        shift: s, or `None` for zero.
    """

    residual: tf.Tensor
    damping: tf.Tensor
    remainder: Direction | None = None
    shift: Direction | None = None

    def target(self, root: FisherRoot) -> tf.Tensor:
        """Returns `u − Rᵀ s`, the residual that the shift leaves."""
        if self.shift is None:
            return self.residual
        return self.residual - root.transpose_product(self.shift)

    def shifted(self, direction: Direction) -> list[tf.Tensor]:
        """Returns `s + direction`."""
        if self.shift is None:
            return list(direction)
        return add(self.shift, direction)


class Solution(NamedTuple):
    """What a solver found.

    Attributes:
        direction: φ.
        retries: int32 scalar, how often the damping had to be raised.
        failures: int32 scalar: 1 if the system could not be solved and the
            direction is the last good one, or zero.
        iterations: int32 scalar, zero for direct solvers.
    """

    direction: list[tf.Tensor]
    retries: tf.Tensor
    failures: tf.Tensor
    iterations: tf.Tensor


class Solver(abc.ABC):
    """Solves the system of a step for all layers of a network at once.

    Subclasses are frozen dataclasses of their settings, registered with
    Keras, so that an optimizer's config can hold them.
    """

    #: Name of the solver, as an argument and in the summary.
    kind = "solver"

    @abc.abstractmethod
    def solve(
        self, root: FisherRoot, system: System, exact: bool = False
    ) -> Solution:
        """Returns φ.

        Args:
            root: R of the batch.
            system: What to solve.
            exact: Whether λ is always zero: then the Moore–Penrose inverse
                replaces `(F + λI)⁻¹`.
        """

    @abc.abstractmethod
    def memory(self, size: int, columns: int) -> int:
        """Returns how many elements a step needs, for P and M."""

    @abc.abstractmethod
    def describe(self) -> str:
        """Returns the solver in a few words, for the summary."""

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Solver:
        """Recreates the solver from `get_config`."""
        return cls(**config)


def add(left: Direction, right: Direction) -> list[tf.Tensor]:
    """Returns the sum of two directions."""
    return [a + b for a, b in zip(left, right, strict=True)]


def scale(factor: tf.Tensor | float, direction: Direction) -> list[tf.Tensor]:
    """Returns a multiple of a direction."""
    return [scalar(factor, part.dtype) * part for part in direction]


def inner(left: Direction, right: Direction) -> tf.Tensor:
    """Returns the inner product of two directions."""
    return tf.add_n(
        [tf.reduce_sum(a * b) for a, b in zip(left, right, strict=True)]
    )


def is_zero(direction: Direction) -> tf.Tensor:
    """Returns whether a direction is zero."""
    return tf.equal(tf.add_n([tf.reduce_sum(tf.abs(d)) for d in direction]), 0)


def rounding_of(dtype: tf.DType) -> tf.Tensor:
    """Returns the relative rounding error of a long sum."""
    return tf.constant(64 * np.finfo(dtype.as_numpy_dtype).eps, dtype)
