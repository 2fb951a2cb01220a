"""Families of proportions and angles."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_natgrad.heads.family import Family, Information, Parameter
from keras_natgrad.heads.special import bessel_ratio, trigamma_excess


@keras.saving.register_keras_serializable(package="keras_natgrad")
class Beta(Family):
    r"""Beta targets: proportions.

    The Fisher matrix in the logarithms of the concentrations a, b with
    `s = a + b` is

        [[a² (ψ₁(a) − ψ₁(s)), −a b ψ₁(s)], [·, b² (ψ₁(b) − ψ₁(s))]].

    Args:
        concentration1: The concentration a, at 1, a number or a link. Defaults
            to `"softplus"`.
        concentration0: The concentration b, at 0, a number or a link. Defaults
            to `"softplus"`.

    Raises:
        ValueError: If an argument is neither a number in its range nor a link.
    """

    parameters = (
        Parameter("concentration1", "positive"),
        Parameter("concentration0", "positive"),
    )
    distribution_name = "Beta"
    target_support = "unit"
    in_float64 = True

    def __init__(
        self,
        concentration1: float | str | Any = "softplus",
        concentration0: float | str | Any = "softplus",
    ) -> None:
        super().__init__(
            concentration1=concentration1, concentration0=concentration0
        )

    def information(self, values: dict[str, tf.Tensor]) -> Information:
        """Returns the Fisher matrix of each unit in its coordinates."""
        # In float64: the complement is small if a and b are far apart.
        a = tf.cast(values["concentration1"], tf.float64)
        b = tf.cast(values["concentration0"], tf.float64)
        total = a + b
        share_a, share_b = a / total, b / total
        h_a, h_b, h = (trigamma_excess(x) for x in (a, b, total))
        # With x² ψ₁(x) = x + h(x) the leading terms cancel analytically.
        common = a * share_b
        first = common + h_a - tf.square(share_a) * h
        second = common + h_b - tf.square(share_b) * h
        determinant = (
            common * (h_a + h_b - h)
            + h_a * h_b
            - h * (tf.square(share_b) * h_a + tf.square(share_a) * h_b)
        )
        return Information(
            (first, second),
            coupling=-share_a * share_b * (total + h),
            schur=determinant / first,
        )


@keras.saving.register_keras_serializable(package="keras_natgrad")
class VonMises(Family):
    r"""Von Mises targets: angles.

    The Fisher matrix in (loc, log concentration), with κ and `A = I₁/I₀(κ)`, is
    `diag(κ A, κ² A'(κ))`.

    Args:
        concentration: The concentration, a number or a link. Defaults to
            `"softplus"`.

    Raises:
        ValueError: If an argument is neither a number in its range nor a link.
    """

    parameters = (
        Parameter("loc", "real"),
        Parameter("concentration", "positive"),
    )
    distribution_name = "VonMises"

    def __init__(self, concentration: float | str | Any = "softplus") -> None:
        super().__init__(concentration=concentration)

    def information(self, values: dict[str, tf.Tensor]) -> Information:
        """Returns the Fisher matrix of each unit in its coordinates."""
        kappa = values["concentration"]
        ratio, slope = bessel_ratio(kappa)
        return Information((kappa * ratio, slope))
