"""The block of a matrix that is used both as W and as Wᵀ."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import tensorflow as tf
from typing_extensions import override

from keras_natgrad.blocks.base import Block, BlockShape
from keras_natgrad.blocks.factors import DiagonalFactor, Factor, make_factor
from keras_natgrad.blocks.kronecker import (
    WeightSharing,
    input_moment,
    output_moment,
)
from keras_natgrad.linalg import (
    OperatorSum,
    damped_inverse_root,
    kronecker_operator,
    trace_norm_ratio,
)


class Pencil(NamedTuple):
    """Two damped Kronecker products in one basis.

    With α and β the means of a and b, row v of the matrix has the block
    `P⁻ᵀ diag(first_v D + second_v (1 − D)) P⁻¹`.

    Attributes:
        basis: P, `[m, m]`, or `[m]` for a diagonal one.
        share: D, `[m]`, in [0, 1].
        first: `a / α`, `[n]`.
        second: `b / β`, `[n]`.
    """

    basis: tf.Tensor
    share: tf.Tensor
    first: tf.Tensor
    second: tf.Tensor

    def eigenvalues(self) -> tf.Tensor:
        """Returns the eigenvalues in the basis, `[n, m]`."""
        first = self.first[:, tf.newaxis] * self.share
        return first + self.second[:, tf.newaxis] * (1 - self.share)


class TiedBlock(Block):
    r"""Two Kronecker products for a matrix that is used as W and as Wᵀ.

    An embedding `E`, `[n, m]`, that is tied to the output projection looks up
    rows, with cotangents g, and makes logits `z = h Eᵀ`, with cotangents u:

        ∇E = Σ e_v gᵀ + Σ u hᵀ.

    What crosses the two uses and what crosses rows of E is left out. Each use
    is then a Kronecker product, with a diagonal on the side of the rows,

        F = diag(c) ⊗ G + diag(s) ⊗ H,

    with the shares c of the tokens and `H = E[h hᵀ]` as input factors, and
    `G = Σ g gᵀ` and `s = Σ u²` as output factors, in the units of
    `KroneckerBlock`, weight sharing included. Row v of E has the m × m block
    `c_v G + s_v H`.

    The damping λ is split over the two uses in proportion to their traces, and
    that of each is factored, with the trace-norm π of its own product, so that
    the block is the one of `KroneckerBlock` where one use has no curvature:

        a_v (G + ε I) + b_v (H + ε' I),   a = c + π √λ₁,   ε = √λ₁ / π, …

    One generalised eigenproblem solves all rows. With the means α, β of a, b

        α (G + εI) + β (H + ε'I) = L Lᵀ,   α L⁻¹ (G + εI) L⁻ᵀ = Q D Qᵀ,

    and `P = L⁻ᵀ Q`, the inverse of row v is

        P diag(a_v / α · D + b_v / β · (1 − D))⁻¹ Pᵀ.

    Where m is larger than `max_factor_size`, G and H are kept as diagonals.
    XLA computes eigenvectors by a Jacobi iteration that stops at a relative
    1e-6, which in float64 shows.

    Cost: `N S m² + N T n` for the statistics, `m³` for a refresh (an
    eigenproblem), `n m²` to precondition, `4 n + 3 m² + m` memory.

    Args:
        shape: `BlockShape` of a matrix that is used both ways.
        weight_sharing: `"expand"` or `"reduce"`.
        max_factor_size: Largest side of a dense factor.

    Raises:
        ValueError: If the matrix is not used both ways.

    References:
        - Press & Wolf, 2017, arXiv:1608.05859 (tied embeddings).
        - Golub & Van Loan, 2013, section 8.7 (the generalised eigenproblem).
    """

    kind = "tied"
    treats_two_way = True
    options = ("weight_sharing", "max_factor_size")

    def __init__(
        self,
        shape: BlockShape,
        weight_sharing: str | WeightSharing = WeightSharing.EXPAND,
        max_factor_size: int = 4096,
    ) -> None:
        if not shape.two_way:
            raise ValueError(
                "The block 'tied' is for a matrix that is used as its "
                f"transpose too; use 'kronecker'. Received: shape={shape!r}"
            )
        super().__init__(shape)
        self.weight_sharing = WeightSharing(weight_sharing)
        self._row = DiagonalFactor((), shape.rows)
        self._column = make_factor((), shape.columns, max_factor_size)

    @override
    def build_state(self) -> None:
        rows, columns = self._row.shape, self._column.shape
        # In the order of the statistics: c, H, G, s.
        self.add_average("direct_input_factor", rows)
        self.add_average("transposed_input_factor", columns)
        self.add_average("direct_output_factor", columns)
        self.add_average("transposed_output_factor", rows)
        self._pencil = (
            self.add_cache("basis", columns),
            self.add_cache("share", (self.shape.columns,)),
            self.add_cache("direct_weights", rows),
            self.add_cache("transposed_weights", rows),
        )

    @override
    @classmethod
    def state_size(cls, shape: BlockShape) -> int:
        return 4 * shape.rows + 3 * shape.columns**2 + shape.columns

    @override
    @property
    def memory(self) -> int:
        columns = 3 * self._column.elements + self.shape.columns
        return 4 * self.shape.rows + columns

    @override
    @property
    def refresh_cost(self) -> int:
        # The eigenproblem counts for about nine factorisations.
        return 10 * self.shape.columns**3

    # -- Statistics ------------------------------------------------------

    @override
    def input_statistics(
        self, inputs: Any, weights: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        """Returns c and H; the inputs are `linalg.TwoWayRows`."""
        sharing = self.weight_sharing
        return (
            input_moment(self._row, inputs.direct, weights, sharing),
            input_moment(self._column, inputs.transposed, weights, sharing),
        )

    @override
    def cotangent_statistics(
        self, inputs: Any, cotangents: Any
    ) -> tuple[tf.Tensor, ...]:
        """Returns G and s, of `linalg.TwoWayCotangents`."""
        sharing = self.weight_sharing
        return (
            output_moment(self._column, cotangents.direct, sharing),
            output_moment(self._row, cotangents.transposed, sharing),
        )

    # -- Curvature -------------------------------------------------------

    def _traces(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the traces of the two products."""
        c, hidden, gradients, s = self.averages()
        return (
            tf.reduce_sum(c) * self._column.trace(gradients),
            tf.reduce_sum(s) * self._column.trace(hidden),
        )

    @override
    def trace(self) -> tf.Tensor:
        direct, transposed = self._traces()
        return direct + transposed

    @override
    def refresh(
        self, damping: tf.Tensor, ratio: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        c, hidden, gradients, s = self.averages()
        direct, transposed = self._traces()
        total = direct + transposed
        share = tf.where(total > 0, tf.math.divide_no_nan(direct, total), 0.5)
        damping = tf.cast(damping, total.dtype)
        pi = _ratio((self._row, c), (self._column, gradients), ratio)
        root = tf.sqrt(share * damping)
        a, first_damping = c + pi * root, root / pi
        pi = _ratio((self._column, hidden), (self._row, s), ratio)
        root = tf.sqrt((1 - share) * damping)
        b, second_damping = s + root / pi, pi * root
        alpha, beta = tf.reduce_mean(a), tf.reduce_mean(b)
        basis, eigenvalues, retries = self._solve(
            alpha * self._damped(gradients, first_damping),
            beta * self._damped(hidden, second_damping),
        )
        new = Pencil(
            basis,
            eigenvalues,
            tf.math.divide_no_nan(a, alpha),
            tf.math.divide_no_nan(b, beta),
        )
        sums = [tf.reduce_sum(1 / new.eigenvalues()), tf.reduce_sum(basis)]
        succeeded = tf.reduce_all(tf.math.is_finite(sums))
        for variable, value in zip(self._pencil, new, strict=True):
            variable.assign(tf.where(succeeded, value, variable.value))
        return retries, tf.cast(~succeeded, tf.int32)

    def _solve(
        self, first: tf.Tensor, second: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Diagonalises two PSD matrices (or diagonals) at once.

        Returns:
            P and D with `Pᵀ first P = D` and `Pᵀ second P = 1 − D`, and how
            often their sum had to be damped. P is NaN where that failed.
        """
        total = first + second
        if isinstance(self._column, DiagonalFactor):
            basis = tf.math.rsqrt(total)
            return basis, first / total, tf.constant(0, tf.int32)
        result = damped_inverse_root(total, tf.zeros([], total.dtype))
        root = result.inverse
        # An eigenvalue routine may raise an error on what is not finite.
        moment = tf.matmul(root, tf.matmul(first, root, transpose_b=True))
        moment = tf.where(result.succeeded, moment, tf.zeros_like(moment))
        values, vectors = tf.linalg.eigh(moment)
        basis = tf.matmul(root, vectors, transpose_a=True)
        nan = tf.constant(math.nan, basis.dtype)
        basis = tf.where(result.succeeded, basis, nan)
        return basis, tf.clip_by_value(values, 0, 1), result.retries

    @override
    def precondition(self, gradient: tf.Tensor) -> tf.Tensor:
        # Zero before the first refresh.
        pencil = self._cached()
        eigenvalues = pencil.eigenvalues()
        if isinstance(self._column, DiagonalFactor):
            scaled = tf.square(pencil.basis) * gradient
            return tf.math.divide_no_nan(scaled, eigenvalues)
        rotated = tf.matmul(gradient, pencil.basis)
        rotated = tf.math.divide_no_nan(rotated, eigenvalues)
        return tf.matmul(rotated, pencil.basis, transpose_b=True)

    @override
    def operator(self) -> tf.linalg.LinearOperator:
        c, hidden, gradients, s = self.averages()
        row, column = self._row.operator, self._column.operator
        return OperatorSum(
            [
                kronecker_operator(row(c), column(gradients)),
                kronecker_operator(row(s), column(hidden)),
            ]
        )

    @override
    @property
    def spectrum_side(self) -> int:
        # One eigenproblem of side m per row.
        return math.ceil(self.shape.columns * self.shape.rows ** (1 / 3))

    @override
    def spectra(self) -> dict[str, tf.Tensor]:
        c, hidden, gradients, s = self.averages()

        def one(weights: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
            block = weights[0] * gradients + weights[1] * hidden
            return self._column.eigenvalues(block)

        return {"fisher": tf.map_fn(one, (c, s), fn_output_signature=c.dtype)}

    @override
    def inverse_spectra(self) -> dict[str, tf.Tensor] | None:
        pencil = self._cached()
        eigenvalues = pencil.eigenvalues()
        inverse = tf.math.divide_no_nan(tf.ones_like(eigenvalues), eigenvalues)
        if isinstance(self._column, DiagonalFactor):
            return {"fisher": tf.square(pencil.basis) * inverse}

        def one(row: tf.Tensor) -> tf.Tensor:
            block = tf.matmul(
                pencil.basis * row, pencil.basis, transpose_b=True
            )
            return tf.linalg.eigvalsh(block)

        return {"fisher": tf.map_fn(one, inverse)}

    def _cached(self) -> Pencil:
        return Pencil(*[variable.value for variable in self._pencil])

    def _damped(self, average: tf.Tensor, damping: tf.Tensor) -> tf.Tensor:
        if isinstance(self._column, DiagonalFactor):
            return average + damping
        diagonal = tf.linalg.diag_part(average)
        return tf.linalg.set_diag(average, diagonal + damping)

    @override
    def describe(self) -> str:
        side = f"diag {self.shape.rows} ⊗ {self._column.describe()}"
        return f"{side} + {side}, {self.weight_sharing.value}"


def _ratio(
    left: tuple[Factor, tf.Tensor],
    right: tuple[Factor, tf.Tensor],
    ratio: tf.Tensor | None,
) -> tf.Tensor:
    """Returns π of a product: the given one, or that of the trace norms."""
    if ratio is not None:
        return ratio
    return trace_norm_ratio(
        *[
            factor.trace(average) / factor.size
            for factor, average in (left, right)
        ]
    )
