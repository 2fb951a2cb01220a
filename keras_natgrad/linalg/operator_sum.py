"""Sums of linear operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from typing_extensions import override


class OperatorSum(tf.linalg.LinearOperator):
    """The sum of symmetric operators of one shape, each kept as it is.

    `tf.linalg` has products, Kronecker products and low-rank updates, but no
    sum.

    Args:
        operators: `LinearOperator`s of shape `[k, k]`.
    """

    def __init__(self, operators: Sequence[tf.linalg.LinearOperator]) -> None:
        self.operators = list(operators)
        super().__init__(
            dtype=self.operators[0].dtype,
            is_self_adjoint=True,
            is_square=True,
            parameters={"operators": operators},
        )

    @override
    def _shape(self) -> tf.TensorShape:
        return self.operators[0].shape

    @override
    def _shape_tensor(self) -> tf.Tensor:
        return self.operators[0].shape_tensor()

    @override
    def _matmul(
        self, x: tf.Tensor, adjoint: bool = False, adjoint_arg: bool = False
    ) -> tf.Tensor:
        return self._sum("matmul", x, adjoint=adjoint, adjoint_arg=adjoint_arg)

    @override
    def _to_dense(self) -> tf.Tensor:
        return self._sum("to_dense")

    @override
    def _diag_part(self) -> tf.Tensor:
        return self._sum("diag_part")

    @override
    def _trace(self) -> tf.Tensor:
        return self._sum("trace")

    def _sum(self, method: str, *args: Any, **kwargs: Any) -> tf.Tensor:
        return tf.add_n(
            [getattr(each, method)(*args, **kwargs) for each in self.operators]
        )
