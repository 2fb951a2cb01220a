"""Blocks that keep the metric of a layer unit by unit, or as a whole."""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from typing_extensions import override

from keras_natgrad.blocks.base import Statistics
from keras_natgrad.blocks.metric import MetricBlock, UnitMetricBlock
from keras_natgrad.blocks.shape import BlockShape
from keras_natgrad.linalg import kronecker_operator, transposed


class UnitwiseBlock(UnitMetricBlock):
    """One metric per output unit, `M_j = Σ_n (Σ_s ā_s g_sj)(Σ_s ā_s g_sj)ᵀ`.

    It is the exact Fisher of a layer whose units respond independently, and
    the diagonal blocks of any other. Units may share a metric, the mean of
    theirs, group by group in the order of their indices.

    Cost: `G N n²` for the statistics, `G n³` for a refresh, `n² m` to
    precondition, `2 G n²` memory, with G metrics.

    Args:
        metric_count: Most metrics to keep, each shared by a group of units;
            by default one per unit.
        relative_damping: See `MetricBlock`.
        identity_start: See `MetricBlock`.
        response: See `MetricBlock`.
    """

    kind = "unitwise"

    def __init__(
        self,
        metric_count: int | None = None,
        relative_damping: float = 0.0,
        identity_start: bool = False,
        response: str = "",
    ) -> None:
        super().__init__(relative_damping, identity_start, response)
        self.metric_count = metric_count

    @override
    def check_shape(self, shape: BlockShape) -> None:
        super().check_shape(shape)
        most = self.metric_count
        if most is not None and not 1 <= most <= shape.columns:
            raise ValueError(
                "`metric_count` must lie between 1 and the number of units, "
                f"{shape.columns}. Received: metric_count={most!r}"
            )

    @override
    def prepare(self) -> None:
        columns = self.shape.columns
        #: Units per group; the last one may have fewer.
        self.group_size = -(-columns // (self.metric_count or columns))
        #: Number of groups of units that share a metric.
        self.groups = -(-columns // self.group_size)

    @override
    @property
    def state_shape(self) -> tuple[int, int, int]:
        return (self.groups, self.shape.rows, self.shape.rows)

    @property
    def _shares(self) -> np.ndarray:
        """`[columns, groups]`: takes the mean over the units of each group."""
        group = np.arange(self.shape.columns) // self.group_size
        members = np.eye(self.groups)[group]
        return members / members.sum(axis=0)

    @override
    def metrics_of(self, inputs: tf.Tensor, moment: tf.Tensor) -> Statistics:
        if self.groups < self.shape.columns:
            shares = tf.constant(self._shares, moment.dtype)
            moment = tf.matmul(moment, shares)
        # All groups in one product: [G n, N] times [N, n].
        rows = self.shape.rows
        scaled = moment[:, :, tf.newaxis] * inputs[:, tf.newaxis]
        scaled = tf.reshape(scaled, [-1, self.groups * rows])
        product = tf.matmul(scaled, inputs, transpose_a=True)
        return {"metric": tf.reshape(product, self.state_shape)}

    @override
    def metrics_of_gradients(self, gradients: tf.Tensor) -> Statistics:
        by_unit = tf.transpose(gradients, [2, 0, 1])
        metrics = tf.matmul(by_unit, by_unit, transpose_a=True)
        if self.groups == self.shape.columns:
            return {"metric": metrics}
        shares = tf.constant(self._shares, gradients.dtype)
        return {"metric": tf.einsum("jab,jk->kab", metrics, shares)}

    @override
    def trace(self) -> tf.Tensor:
        metric = self.average("metric")
        return tf.reduce_sum(tf.linalg.trace(metric) * self._sizes)

    @override
    def precondition(self, gradient: tf.Tensor) -> tf.Tensor:
        inverse = self._inverse.value
        if self.groups == 1:
            return tf.matmul(inverse[0], gradient)
        rows, columns = self.shape.rows, self.shape.columns
        missing = self.groups * self.group_size - columns
        units = transposed(gradient)
        if missing:
            units = tf.pad(units, [[0, missing], [0, 0]])
        units = tf.reshape(units, [self.groups, self.group_size, rows])
        # The inverses are symmetric: (P g)ᵀ = gᵀ P.
        solved = tf.reshape(tf.matmul(units, inverse), [-1, rows])
        return transposed(solved[:columns] if missing else solved)

    @override
    def operator(self) -> tf.linalg.LinearOperator:
        metric = self.average("metric")
        rows, columns = self.shape.rows, self.shape.columns
        if self.groups == 1:
            return kronecker_operator(
                tf.linalg.LinearOperatorFullMatrix(
                    metric[0], is_self_adjoint=True
                ),
                tf.linalg.LinearOperatorIdentity(columns, dtype=metric.dtype),
            )
        by_unit = tf.linalg.LinearOperatorBlockDiag(
            [
                tf.linalg.LinearOperatorFullMatrix(
                    metric[unit // self.group_size], is_self_adjoint=True
                )
                for unit in range(columns)
            ]
        )
        # Rows of [n, m] in the order of the units: position (a, j) to (j, a).
        order = np.arange(rows * columns).reshape(rows, columns).T.ravel()
        sort = tf.linalg.LinearOperatorPermutation(order, dtype=metric.dtype)
        return tf.linalg.LinearOperatorComposition(
            [sort.adjoint(), by_unit, sort], is_self_adjoint=True
        )

    @override
    def spectra(self) -> dict[str, tf.Tensor]:
        return {"units": self._by_unit(self.average("metric"))}

    @override
    def inverse_spectra(self) -> dict[str, tf.Tensor] | None:
        return {"units": self._by_unit(self._inverse.value)}

    def _by_unit(self, matrices: tf.Tensor) -> tf.Tensor:
        """Returns the eigenvalues of each unit's matrix, `[m, n]`."""
        group = np.arange(self.shape.columns) // self.group_size
        return tf.gather(tf.linalg.eigvalsh(matrices), group)

    @override
    def describe_state(self) -> str:
        size = f"{self.shape.rows}²"
        if self.groups == self.shape.columns:
            return f"{size} per unit"
        if self.groups == 1:
            return f"{size} for all units"
        return f"{size} per group of {self.group_size} units"

    @property
    def _sizes(self) -> tf.Tensor:
        sizes = (self._shares > 0).sum(axis=0)
        return tf.constant(sizes, self._metric.dtype)


class CoupledBlock(MetricBlock):
    """The full metric of a layer, `Σ_n V_n ⊗ x̃_n x̃_nᵀ`, for coupled units.

    The same matrix as `FullBlock`. Columns of the loss factor at one position
    are summed to `V_n = Σ g gᵀ` before they meet the inputs: `N n² m²` for
    all of them, where `FullBlock` needs that for each. `(n m)³` for a
    refresh, `2 (n m)²` memory.

    Args:
        relative_damping: See `MetricBlock`.
        identity_start: See `MetricBlock`.
        response: See `MetricBlock`.
    """

    kind = "coupled"

    @override
    @property
    def state_shape(self) -> tuple[int, int, int]:
        return (1, self.shape.size, self.shape.size)

    @override
    def moment(self, cotangents: tf.Tensor) -> tf.Tensor:
        return cotangents[:, :, tf.newaxis] * cotangents[:, tf.newaxis]

    @override
    def moment_of(self, information: tf.Tensor) -> tf.Tensor:
        return information

    @override
    def metrics_of(self, inputs: tf.Tensor, moment: tf.Tensor) -> Statistics:
        n, m = self.shape.rows, self.shape.columns
        moment = tf.reshape(moment, [-1, m * m])
        if n <= m * m:  # The smaller one of two intermediate results.
            outer = inputs[:, :, tf.newaxis] * inputs[:, tf.newaxis]
            outer = tf.reshape(outer, [-1, n * n])
            product = tf.matmul(outer, moment, transpose_a=True)
            blocks = tf.reshape(product, [n, n, m, m])
            ordered = tf.transpose(blocks, [0, 2, 1, 3])
        else:
            scaled = moment[:, :, tf.newaxis] * inputs[:, tf.newaxis]
            scaled = tf.reshape(scaled, [-1, m * m * n])
            product = tf.matmul(scaled, inputs, transpose_a=True)
            blocks = tf.reshape(product, [m, m, n, n])
            ordered = tf.transpose(blocks, [2, 0, 3, 1])
        return {"metric": tf.reshape(ordered, self.state_shape)}

    @override
    def metrics_of_gradients(self, gradients: tf.Tensor) -> Statistics:
        flat = tf.reshape(gradients, [-1, self.shape.size])
        metric = tf.matmul(flat, flat, transpose_a=True)
        return {"metric": metric[tf.newaxis]}

    @override
    def trace(self) -> tf.Tensor:
        return self.debias(tf.linalg.trace(self._averages["metric"].value[0]))

    @override
    def precondition(self, gradient: tf.Tensor) -> tf.Tensor:
        flat = tf.reshape(gradient, [-1, 1])
        solved = tf.matmul(self._inverse.value[0], flat)
        return tf.reshape(solved, tf.shape(gradient))

    @override
    def operator(self) -> tf.linalg.LinearOperator:
        return tf.linalg.LinearOperatorFullMatrix(
            self.average("metric")[0], is_self_adjoint=True
        )

    @override
    def spectra(self) -> dict[str, tf.Tensor]:
        return {"fisher": tf.linalg.eigvalsh(self.average("metric")[0])}

    @override
    def inverse_spectra(self) -> dict[str, tf.Tensor] | None:
        return {"fisher": tf.linalg.eigvalsh(self._inverse.value[0])}

    @override
    def describe_state(self) -> str:
        return f"{self.shape.size}² for the layer"
