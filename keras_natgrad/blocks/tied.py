"""The block of a matrix that is used both as W and as Wᵀ."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf
from typing_extensions import override

from keras_natgrad.blocks.base import Block, Statistics
from keras_natgrad.blocks.factors import DiagonalFactor, Factor, make_factor
from keras_natgrad.blocks.kronecker import (
    WeightSharing,
    input_moment,
    output_moment,
)
from keras_natgrad.blocks.shape import BlockShape
from keras_natgrad.blocks.state import count_failures
from keras_natgrad.linalg import (
    OperatorSum,
    kronecker_operator,
    pencil,
    trace_norm_ratio,
)

# Largest vocabulary whose factor S is dense, for the cost of its eigenproblem.
MAX_DENSE_ROWS = 1024


class TiedBlock(Block):
    r"""Two Kronecker products for a matrix that is used as W and as Wᵀ.

    An embedding `E`, `[n, m]`, that is tied to the output projection looks up
    rows, with cotangents g, and makes logits `z = h Eᵀ`, with cotangents u:

        ∇E = Σ e_v gᵀ + Σ u hᵀ.

    What crosses the two uses is left out. Each use is then a Kronecker
    product,

        F = C ⊗ G + S ⊗ H,

    with `C = diag(c)` of the shares of the tokens and `H = E[h hᵀ]` as input
    factors, and `G = Σ g gᵀ` and `S = Σ u uᵀ` as output factors, in the units
    of `KroneckerBlock`, weight sharing included.

    The damping λ is split over the two uses in proportion to their traces, and
    that of each is factored, with the trace-norm π of its own product, so that
    the block is the one of `KroneckerBlock` where one use has no curvature:

        A₁ ⊗ B₁ + A₂ ⊗ B₂,
        A₁ = C + π₁√λ₁ I,   B₁ = G + √λ₁/π₁ I,
        A₂ = S + √λ₂/π₂ I,  B₂ = H + π₂√λ₂ I.

    Each side is diagonalised at once (`linalg.pencil`),

        Pᵀ A₁ P = diag(a₁),  Pᵀ A₂ P = diag(a₂),
        Qᵀ B₁ Q = diag(b₁),  Qᵀ B₂ Q = diag(b₂),

    and the inverse of the sum maps X to

        P [(Pᵀ X Q) ⊘ (a₁ b₁ᵀ + a₂ b₂ᵀ)] Qᵀ.

    S is kept as its diagonal where n is larger than `max_factor_size` or than
    1024; what crosses rows of E is then left out, and P is the identity. G and
    H are kept as diagonals where m is larger than `max_factor_size`.

    Cost: `N S m² + N T n²` for the statistics, `10 (n³ + m³)` for a refresh
    (two eigenproblems), `n m (n + m)` to precondition, `2 n² + 3 n + 3 m² +
    2 m` memory. With a diagonal S it is `N T n`, `10 m³`, `n m²` and
    `4 n + 3 m² + 2 m`.

    Args:
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

    def __init__(
        self,
        weight_sharing: str | WeightSharing = WeightSharing.EXPAND,
        max_factor_size: int = 4096,
    ) -> None:
        self.weight_sharing = WeightSharing(weight_sharing)
        self.max_factor_size = max_factor_size

    @override
    def check_shape(self, shape: BlockShape) -> None:
        if not shape.two_way:
            raise ValueError(
                "The block 'tied' is for a matrix that is used as its "
                f"transpose too; use 'kronecker'. Received: shape={shape!r}"
            )
        super().check_shape(shape)

    @override
    def prepare(self) -> None:
        rows, columns = self.shape.rows, self.shape.columns
        bound = min(self.max_factor_size, MAX_DENSE_ROWS)
        self._counts: Factor = DiagonalFactor(self, rows)
        self._logits = make_factor(self, rows, bound)
        # Of both G and H.
        self._column = make_factor(self, columns, self.max_factor_size)

    @override
    def build_state(self) -> None:
        column = self._column.shape
        # c, H, G, S.
        self.add_average("direct_input_factor", self._counts.shape)
        self.add_average("transposed_input_factor", column)
        self.add_average("direct_output_factor", column)
        self.add_average("transposed_output_factor", self._logits.shape)
        # P with a₁ and a₂, Q with b₁ and b₂; no basis where it is I.
        self._bases: list[Any] = []
        self._weights: list[Any] = []
        for name, side in (("row", self._logits), ("column", self._column)):
            basis = None
            if not isinstance(side, DiagonalFactor):
                basis = self.add_cache(f"{name}_basis", side.shape)
            self._bases.append(basis)
            weights = self.add_cache(f"{name}_weights", (2, side.size))
            self._weights.append(weights)

    @override
    @property
    def refresh_cost(self) -> int:
        # An eigenproblem counts for about nine factorisations.
        sides = self._logits.spectrum_side, self._column.spectrum_side
        return 10 * sum(side**3 for side in sides)

    # -- Statistics ------------------------------------------------------

    @override
    def input_statistics(self, inputs: Any, weights: tf.Tensor) -> Statistics:
        """Returns c and H; the inputs are `linalg.TwoWayRows`."""
        sharing = self.weight_sharing
        return {
            "direct_input_factor": input_moment(
                self._counts, inputs.direct, weights, sharing
            ),
            "transposed_input_factor": input_moment(
                self._column, inputs.transposed, weights, sharing
            ),
        }

    @override
    def cotangent_statistics(self, inputs: Any, cotangents: Any) -> Statistics:
        """Returns G and S, of `linalg.TwoWayCotangents`."""
        sharing = self.weight_sharing
        return {
            "direct_output_factor": output_moment(
                self._column, cotangents.direct, sharing
            ),
            "transposed_output_factor": output_moment(
                self._logits, cotangents.transposed, sharing
            ),
        }

    # -- Curvature -------------------------------------------------------

    def _traces(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the traces of the two products."""
        c, hidden, gradients, logits = self.averages().values()
        return (
            self._counts.trace(c) * self._column.trace(gradients),
            self._logits.trace(logits) * self._column.trace(hidden),
        )

    @override
    def trace(self) -> tf.Tensor:
        direct, transposed = self._traces()
        return direct + transposed

    @override
    def refresh(
        self, damping: tf.Tensor, ratio: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        c, hidden, gradients, logits = self.averages().values()
        direct, transposed = self._traces()
        total = direct + transposed
        share = tf.where(total > 0, tf.math.divide_no_nan(direct, total), 0.5)
        damping = tf.cast(damping, total.dtype)
        pi = _ratio((self._counts, c), (self._column, gradients), ratio)
        root = tf.sqrt(share * damping)
        first = _damped(c, pi * root), _damped(gradients, root / pi)
        pi = _ratio((self._column, hidden), (self._logits, logits), ratio)
        root = tf.sqrt((1 - share) * damping)
        second = _damped(logits, root / pi), _damped(hidden, pi * root)
        rows, columns = pencil(first[0], second[0]), pencil(first[1], second[1])
        inverse = 1 / tf.matmul(rows.weights, columns.weights, transpose_a=True)
        new = [rows.basis, rows.weights, columns.basis, columns.weights]
        kept = [value for value in new if value is not None]
        sums = [tf.reduce_sum(value) for value in (inverse, *kept)]
        succeeded = tf.reduce_all(tf.math.is_finite(sums))
        for variable, value in zip(self._caches.values(), kept, strict=True):
            variable.assign(tf.where(succeeded, value, variable.value))
        retries = rows.retries + columns.retries
        return retries, count_failures(succeeded)

    def _eigenvalues(self) -> tf.Tensor:
        """Returns `a₁ b₁ᵀ + a₂ b₂ᵀ`, zero before the first refresh."""
        rows, columns = (variable.value for variable in self._weights)
        return tf.matmul(rows, columns, transpose_a=True)

    @override
    def precondition(self, gradient: tf.Tensor) -> tf.Tensor:
        left, right = self._bases
        if left is not None:
            gradient = tf.matmul(left.value, gradient, transpose_a=True)
        if right is not None:
            gradient = tf.matmul(gradient, right.value)
        gradient = tf.math.divide_no_nan(gradient, self._eigenvalues())
        if right is not None:
            gradient = tf.matmul(gradient, right.value, transpose_b=True)
        if left is not None:
            gradient = tf.matmul(left.value, gradient)
        return gradient

    @override
    def operator(self) -> tf.linalg.LinearOperator:
        c, hidden, gradients, logits = self.averages().values()
        column = self._column.operator
        return OperatorSum(
            [
                kronecker_operator(self._counts.operator(c), column(gradients)),
                kronecker_operator(
                    self._logits.operator(logits), column(hidden)
                ),
            ]
        )

    # -- Eigenvalues -----------------------------------------------------

    @property
    def _crosses_rows(self) -> bool:
        return not isinstance(self._logits, DiagonalFactor)

    @override
    @property
    def spectrum_side(self) -> int:
        if self._crosses_rows:
            return self.shape.size
        # One eigenproblem of side m per row.
        return math.ceil(self.shape.columns * self.shape.rows ** (1 / 3))

    @override
    def spectra(self) -> dict[str, tf.Tensor]:
        if self._crosses_rows:
            return super().spectra()
        c, hidden, gradients, logits = self.averages().values()

        def one(weights: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
            block = weights[0] * gradients + weights[1] * hidden
            return self._column.eigenvalues(block)

        fisher = tf.map_fn(one, (c, logits), fn_output_signature=c.dtype)
        return {"fisher": fisher}

    @override
    def inverse_spectra(self) -> dict[str, tf.Tensor] | None:
        if self._crosses_rows:
            size = self.shape.size
            units = tf.eye(size, dtype=self.dtype)
            units = tf.reshape(units, [size, *self.shape.matrix])
            dense = tf.reshape(self.precondition(units), [size, size])
            return {"fisher": tf.linalg.eigvalsh(dense)}
        eigenvalues = self._eigenvalues()
        inverse = tf.math.divide_no_nan(tf.ones_like(eigenvalues), eigenvalues)
        basis = self._bases[1]
        if basis is None:
            return {"fisher": inverse}

        def one(row: tf.Tensor) -> tf.Tensor:
            block = tf.matmul(basis.value * row, basis.value, transpose_b=True)
            return tf.linalg.eigvalsh(block)

        return {"fisher": tf.map_fn(one, inverse)}

    @override
    def describe(self) -> str:
        rows = self._counts.describe(), self._logits.describe()
        column = self._column.describe()
        first, second = (f"{row} ⊗ {column}" for row in rows)
        return f"{first} + {second}, {self.weight_sharing.value}"


def _damped(average: tf.Tensor, damping: tf.Tensor) -> tf.Tensor:
    """Returns a matrix, or the diagonal of one, plus `damping I`."""
    if average.shape.rank == 1:
        return average + damping
    diagonal = tf.linalg.diag_part(average)
    return tf.linalg.set_diag(average, diagonal + damping)


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
