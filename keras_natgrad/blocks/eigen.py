"""Kronecker factors' eigenbasis with exact second moments in it (EKFAC)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf
from typing_extensions import override

from keras_natgrad.blocks.base import Block, Statistics
from keras_natgrad.blocks.factors import DenseFactor, Factor, make_factor
from keras_natgrad.blocks.kronecker import (
    WeightSharing,
    input_moment,
    output_moment,
)
from keras_natgrad.blocks.state import (
    count_failures,
    identities,
    keep_good,
    select,
)
from keras_natgrad.linalg import (
    Rows,
    eigenbasis,
    expand_to,
    gradient_squares,
    identity_matrix,
    multiply,
)

# Of the input and of the output side; `None` is the identity.
Bases: TypeAlias = Sequence[tf.Tensor | None]


class EigenBlock(Block):
    r"""EKFAC: the eigenbasis of K-FAC, and exact second moments in it.

    With the factors of `KroneckerBlock`, `A = Q_A Λ_A Q_Aᵀ` and
    `G = Q_G Λ_G Q_Gᵀ`, the Fisher of a layer is

        F ≈ (Q_A ⊗ Q_G) diag(S) (Q_A ⊗ Q_G)ᵀ,
        S = Σ_n (Q_Aᵀ (Σ_s ā_s g_sᵀ) Q_G)²,

    the squares taken entry by entry. S is the diagonal of the exact block in
    that basis, so that of all matrices which are diagonal there this one is
    the nearest to it in the Frobenius norm; K-FAC has `λ_A λ_Gᵀ` for S. With
    several shared positions S has the sum over an example's positions,
    whatever the weight sharing, which is that of A and G only.

    The damping is not factored: the inverse maps X to

        Q_A [(Q_Aᵀ X Q_G) ⊘ (S + λ)] Q_Gᵀ.

    A refresh takes the bases of the averages A and G as they are then, and S
    is averaged on in them. What it was in the bases before is carried over:
    its ratios to K-FAC's moments `d_A d_Gᵀ`, `d = diag(Qᵀ A Q)`, are averaged
    with the squares of the rotation as weights,

        S' = d'_A d'_Gᵀ ∘ [(Q'_Aᵀ Q_A)² (S ⊘ d_A d_Gᵀ) (Q_Gᵀ Q'_G)²].

    The trace of S stays, and where the Fisher is `A ⊗ G` this is exact. On
    averages that drift it is nearer to the exact block than K-FAC's moments
    `d'_A d'_Gᵀ` anew or the rotation of S itself, whose large entries spill
    over into the small ones.

    A side longer than `max_factor_size` has its diagonal as factor, and the
    identity as basis; so has the input side of one-hot inputs. Before the
    first refresh both bases are the identity. A layer with groups has a pair
    of bases for each group.

    Cost per layer: that of `KroneckerBlock` and `N (n² + m² + n m)` for the
    statistics, with several positions `N n m (S + n)` and memory for `N`
    matrices `[n, m]`; two eigendecompositions for a refresh, 10 to 25 times
    `n³ + m³`; `2 n m (n + m)`, four products, to precondition;
    `2 (n² + m² + n m)` memory.

    Args:
        weight_sharing: `"expand"` or `"reduce"`, of the factors.
        max_factor_size: Largest side with a basis.

    References:
        - George et al., 2018, arXiv:1806.03884.
    """

    kind = "eigen"
    treats_groups = True
    stacks = True
    leaves_special_layers = True

    def __init__(
        self,
        weight_sharing: str | WeightSharing = WeightSharing.EXPAND,
        max_factor_size: int = 4096,
    ) -> None:
        self.weight_sharing = WeightSharing(weight_sharing)
        self.max_factor_size = max_factor_size

    @override
    def prepare(self) -> None:
        bound = 0 if self.shape.one_hot else self.max_factor_size
        self._input = make_factor(self, self.shape.rows, bound)
        self._output = make_factor(
            self, self.shape.columns, self.max_factor_size
        )

    # -- State -----------------------------------------------------------

    @override
    def build_state(self) -> None:
        self.add_average("input_factor", self._input.shape)
        self.add_average("output_factor", self._output.shape)
        self._scales = self.add_average("scales", self.matrix)
        self._basis_variables: list[Any] = []
        for name, side in (("input", self._input), ("output", self._output)):
            basis = None
            if _has_basis(side):
                basis = self.add_cache(f"{name}_basis", side.shape, identities)
            self._basis_variables.append(basis)
        self._inverse = self.add_cache("inverse", self.matrix)

    @override
    @property
    def refresh_cost(self) -> int:
        # An eigenproblem counts for about ten factorisations.
        sides = self._input.spectrum_side, self._output.spectrum_side
        return 10 * (self.shape.groups or 1) * sum(side**3 for side in sides)

    @override
    def copy_statistics(self, other: Block) -> None:
        """Takes the running averages, and the bases that they are in."""
        super().copy_statistics(other)
        assert isinstance(other, EigenBlock)
        scales = tf.convert_to_tensor(self._scales.value)
        self._store(other.bases(), scales, tf.ones(self.axis, tf.bool))

    @override
    def copy_inverse(self, other: Block) -> None:
        """Takes bases and inverse; the block's own averages are turned."""
        assert isinstance(other, EigenBlock)
        self._scales.assign(self._turned(other.bases()))
        super().copy_inverse(other)

    # -- Statistics ------------------------------------------------------

    @override
    def input_statistics(self, inputs: Rows, weights: tf.Tensor) -> Statistics:
        moment = input_moment(self._input, inputs, weights, self.weight_sharing)
        return {"input_factor": moment}

    @override
    def cotangent_statistics(
        self, inputs: Rows, cotangents: tf.Tensor
    ) -> Statistics:
        cotangents = tf.convert_to_tensor(cotangents)
        moment = output_moment(self._output, cotangents, self.weight_sharing)
        left, right = self.bases()
        if left is not None:
            left = tf.cast(left, cotangents.dtype)
        if right is not None:
            right = tf.cast(right, cotangents.dtype)
            cotangents = multiply(cotangents, right)
        scales = gradient_squares(inputs, cotangents, left)
        return {"output_factor": moment, "scales": scales}

    # -- Bases -----------------------------------------------------------

    def bases(self) -> list[tf.Tensor | None]:
        """Returns Q_A and Q_G, `None` for the identity."""
        variables = self._basis_variables
        return [
            None if basis is None else tf.convert_to_tensor(basis.value)
            for basis in variables
        ]

    @override
    def update_basis(self) -> bool:
        self._store(*self._renewed())
        return True

    def _renewed(self) -> tuple[Bases, tf.Tensor, tf.Tensor]:
        """Returns the bases of A and G, S in them, and whether all is well."""
        averages = self._values()
        sums = [self.layer_sums(average) for average in averages]
        succeeded = tf.math.is_finite(tf.add_n(sums))
        sides = self._input, self._output
        bases: list[tf.Tensor | None] = []
        for side, average in zip(sides, averages[:2], strict=True):
            basis = None
            if _has_basis(side):
                # The decomposition raises where it meets what is not finite.
                identity = identity_matrix(side.size, average.dtype)
                _, basis = eigenbasis(select(succeeded, average, identity))
            bases.append(basis)
        return bases, self._turned(bases), succeeded

    def _store(
        self, bases: Bases, scales: tf.Tensor, succeeded: tf.Tensor
    ) -> None:
        """Keeps bases and the average S in them, if they are good."""
        for variable, basis in zip(self._basis_variables, bases, strict=True):
            if variable is not None:
                assert basis is not None
                keep_good(variable, basis, succeeded)
        keep_good(self._scales, scales, succeeded)

    def _values(self) -> list[tf.Tensor]:
        """Returns A, G and S as they are averaged, not debiased."""
        return [
            tf.convert_to_tensor(average.value)
            for average in self._averages.values()
        ]

    def _turned(self, bases: Bases) -> tf.Tensor:
        """Returns the average S in other bases."""
        own = self.bases()
        left, right, scales = self._values()
        old = _outer(_moments(left, own[0]), _moments(right, own[1]))
        new = _outer(_moments(left, bases[0]), _moments(right, bases[1]))
        # Below it a moment is rounding.
        unit = np.finfo(old.dtype.as_numpy_dtype).eps
        least = unit * tf.reduce_max(new, axis=[-2, -1], keepdims=True)
        ratios = tf.math.divide_no_nan(scales, old + least)
        if bases[0] is not None:
            turn = tf.matmul(bases[0], own[0], transpose_a=True)
            ratios = tf.matmul(tf.square(turn), ratios)
        if bases[1] is not None:
            turn = tf.matmul(own[1], bases[1], transpose_a=True)
            ratios = tf.matmul(ratios, tf.square(turn))
        return (new + least) * ratios

    # -- Curvature -------------------------------------------------------

    @override
    def trace(self) -> tf.Tensor:
        return self.debias(self.layer_sums(self._scales.value))

    @override
    def refresh(
        self, damping: tf.Tensor, ratio: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        bases, scales, succeeded = self._renewed()
        damping = expand_to(tf.cast(damping, scales.dtype), scales.shape.rank)
        inverse = tf.math.reciprocal(self.debias(scales) + damping)
        succeeded &= tf.math.is_finite(self.layer_sums(inverse))
        # The inverse and the bases that it is in stay together.
        self._store(bases, scales, succeeded)
        keep_good(self._inverse, inverse, succeeded)
        return tf.constant(0, tf.int32), count_failures(succeeded)

    @override
    def precondition(self, gradient: tf.Tensor) -> tf.Tensor:
        left, right = self.bases()
        if left is not None:
            gradient = tf.matmul(left, gradient, transpose_a=True)
        if right is not None:
            gradient = tf.matmul(gradient, right)
        gradient = self._inverse.value * gradient
        if right is not None:
            gradient = tf.matmul(gradient, right, transpose_b=True)
        if left is not None:
            gradient = tf.matmul(left, gradient)
        return gradient

    @override
    def operator(self) -> tf.linalg.LinearOperator:
        scales, bases = self.average("scales"), self.bases()
        if self.shape.groups is None:
            return _operator(bases, scales)
        return tf.linalg.LinearOperatorBlockDiag(
            [
                _operator(
                    [
                        None if basis is None else basis[group]
                        for basis in bases
                    ],
                    scales[group],
                )
                for group in range(self.shape.groups)
            ],
            is_self_adjoint=True,
        )

    @override
    @property
    def spectrum_side(self) -> int:
        return 1

    @override
    def spectra(self) -> dict[str, tf.Tensor]:
        return {"fisher": self._flat(self.average("scales"))}

    @override
    def inverse_spectra(self) -> dict[str, tf.Tensor] | None:
        return {"fisher": self._flat(self._inverse.value)}

    def _flat(self, values: tf.Tensor) -> tf.Tensor:
        return tf.reshape(values, [*self.shape.lead, self.shape.matrix_size])

    @override
    def describe(self) -> str:
        sides = f"{self._input.describe()} ⊗ {self._output.describe()}"
        if self.shape.groups is not None:
            sides = f"{self.shape.groups} × ({sides})"
        return f"{sides}, eigenvalues corrected, {self.weight_sharing.value}"


def _has_basis(side: Factor) -> bool:
    return isinstance(side, DenseFactor)


def _moments(average: tf.Tensor, basis: tf.Tensor | None) -> tf.Tensor:
    """Returns the diagonal of `Qᵀ A Q`, `[(groups,) n]`."""
    if basis is None:
        return average
    moments = tf.reduce_sum(basis * tf.matmul(average, basis), axis=-2)
    # Rounding may leave one below zero.
    return tf.nn.relu(moments)


def _outer(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    return left[..., tf.newaxis] * right[..., tf.newaxis, :]


def _operator(bases: Bases, scales: tf.Tensor) -> tf.linalg.LinearOperator:
    """Returns `(Q_A ⊗ Q_G) diag(S) (Q_A ⊗ Q_G)ᵀ` of one group."""
    diagonal = tf.linalg.LinearOperatorDiag(
        tf.reshape(scales, [-1]), is_self_adjoint=True
    )
    if all(basis is None for basis in bases):
        return diagonal
    turn = tf.linalg.LinearOperatorKronecker(
        [
            tf.linalg.LinearOperatorIdentity(size, dtype=scales.dtype)
            if basis is None
            else tf.linalg.LinearOperatorFullMatrix(basis)
            for basis, size in zip(bases, scales.shape, strict=True)
        ]
    )
    return tf.linalg.LinearOperatorComposition(
        [turn, diagonal, turn.adjoint()], is_self_adjoint=True
    )
