"""One basis for all units of a layer, and eigenvalues for each of them."""

from __future__ import annotations

import tensorflow as tf
from typing_extensions import override

from keras_natgrad.blocks.base import Statistics
from keras_natgrad.blocks.metric import UnitMetricBlock
from keras_natgrad.blocks.state import count_failures
from keras_natgrad.linalg import scalar


class EigenSharedBlock(UnitMetricBlock):
    """The metrics of all units in one eigenbasis, `M_j ≈ Q diag(d_j) Qᵀ`.

    Q has the eigenvectors of the units' mean metric `M̄ = Σ_j M_j / m` of the
    last refresh, and `d_j` is the diagonal of `Qᵀ M_j Q`, a running average
    of its own; of all matrices that are diagonal in that basis this is the
    nearest one. It is exact where the units' metrics commute, and differs
    from a metric per unit in what they do not share.

    A refresh changes the basis, from Q to Q'. What has been averaged is then
    taken for `Q diag(d_j) Qᵀ`, whose diagonal in the new basis is

        d'_j = (Q'ᵀ Q)² d_j    (squares of the entries),

    and each coordinate is scaled so that the mean over the units is the
    eigenvalue of M̄ there, which is known. Before the first refresh Q is the
    identity.

    Cost: `N n² + N n m` for the statistics, an eigendecomposition `[n, n]`
    and `n³ + n² m` for a refresh, `2 n² m` to precondition, `2 (n² + n m)`
    memory.

    Args:
        relative_damping: See `MetricBlock`.
        identity_start: See `MetricBlock`.
        response: See `MetricBlock`.
    """

    kind = "eigen_shared"

    @override
    def prepare(self) -> None:
        self._matrix = (self.shape.rows, self.shape.columns)

    # -- State -----------------------------------------------------------

    @override
    @property
    def state_shape(self) -> tuple[int, int, int]:
        return (1, self.shape.rows, self.shape.rows)

    @override
    def build_state(self) -> None:
        self._metric = self.add_average("metric", self.state_shape)
        self._diagonals = self.add_average("diagonals", self._matrix)
        side = self.shape.rows
        self._basis = self.add_cache("basis", (side, side), "identity")
        self._inverse = self.add_cache("inverse", self._matrix)

    # -- Statistics ------------------------------------------------------

    @override
    def metrics_of(self, inputs: tf.Tensor, moment: tf.Tensor) -> Statistics:
        mean = tf.reduce_mean(moment, axis=1, keepdims=True)
        metric = tf.matmul(mean * inputs, inputs, transpose_a=True)
        coordinates = tf.matmul(inputs, self._basis.value)
        squares = tf.square(coordinates)
        diagonals = tf.matmul(squares, moment, transpose_a=True)
        return {"metric": metric[tf.newaxis], "diagonals": diagonals}

    @override
    def metrics_of_gradients(self, gradients: tf.Tensor) -> Statistics:
        rows, columns = self._matrix
        vectors = tf.reshape(tf.transpose(gradients, [0, 2, 1]), [-1, rows])
        metric = tf.matmul(vectors, vectors, transpose_a=True)
        coordinates = tf.matmul(vectors, self._basis.value)
        squares = tf.reshape(tf.square(coordinates), [-1, columns, rows])
        diagonals = tf.transpose(tf.reduce_sum(squares, axis=0))
        metric = metric[tf.newaxis] / columns
        return {"metric": metric, "diagonals": diagonals}

    # -- Curvature -------------------------------------------------------

    @override
    def trace(self) -> tf.Tensor:
        return tf.reduce_sum(self.average("diagonals"))

    @override
    def refresh(
        self, damping: tf.Tensor, ratio: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        metric = self._metric.value[0]
        succeeded = tf.math.is_finite(tf.reduce_sum(metric))
        # The decomposition raises where it meets what is not finite.
        identity = tf.eye(self.shape.rows, dtype=metric.dtype)
        values, basis = tf.linalg.eigh(tf.where(succeeded, metric, identity))
        turned = self._turned(basis, tf.nn.relu(values))
        self._diagonals.assign(
            tf.where(succeeded, turned, self._diagonals.value)
        )
        self._basis.assign(tf.where(succeeded, basis, self._basis.value))
        diagonals = self.average("diagonals")
        relative = scalar(self.relative_damping, metric.dtype)
        traces = tf.reduce_sum(diagonals, axis=0)
        dampings = tf.cast(damping, metric.dtype) + relative * traces
        # A unit without a metric has no inverse, as in `damped_inverses`.
        good = succeeded & (traces + dampings > 0)
        inverse = tf.math.reciprocal(diagonals + dampings)
        good &= tf.math.is_finite(tf.reduce_sum(inverse, axis=0))
        self._inverse.assign(tf.where(good, inverse, self._inverse.value))
        return tf.constant(0, tf.int32), count_failures(good)

    def _turned(self, basis: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
        """Returns the diagonals in another basis, their mean the values."""
        turn = tf.matmul(basis, self._basis.value, transpose_a=True)
        turned = tf.matmul(tf.square(turn), self._diagonals.value)
        means = tf.reduce_mean(turned, axis=1)
        scales = tf.math.divide_no_nan(values, means)
        return scales[:, tf.newaxis] * turned

    @override
    def precondition(self, gradient: tf.Tensor) -> tf.Tensor:
        basis = self._basis.value
        turned = tf.matmul(basis, gradient, transpose_a=True)
        return tf.matmul(basis, self._inverse.value * turned)

    @override
    def operator(self) -> tf.linalg.LinearOperator:
        diagonals = self.average("diagonals")
        # vec(Q X) = (Q ⊗ I) vec(X) for rows that follow each other.
        turn = tf.linalg.LinearOperatorKronecker(
            [
                tf.linalg.LinearOperatorFullMatrix(self._basis.value),
                tf.linalg.LinearOperatorIdentity(
                    self.shape.columns, dtype=diagonals.dtype
                ),
            ]
        )
        scale = tf.linalg.LinearOperatorDiag(tf.reshape(diagonals, [-1]))
        return tf.linalg.LinearOperatorComposition(
            [turn, scale, turn.adjoint()], is_self_adjoint=True
        )

    @override
    @property
    def spectrum_side(self) -> int:
        return 1

    @override
    def spectra(self) -> dict[str, tf.Tensor]:
        return {"units": tf.transpose(self.average("diagonals"))}

    @override
    def inverse_spectra(self) -> dict[str, tf.Tensor] | None:
        return {"units": tf.transpose(self._inverse.value)}

    @override
    def describe_state(self) -> str:
        side = self.shape.rows
        return f"{side}² basis for all units, {side} eigenvalues each"
