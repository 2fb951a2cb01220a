"""Heads of independent units with a few parameters each."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow as tf

from keras_natgrad.checks import check_fixed, check_probability
from keras_natgrad.heads import tensors
from keras_natgrad.heads.base import Head
from keras_natgrad.heads.links import Identity, get_link, link_config
from keras_natgrad.heads.probability import distributions
from keras_natgrad.heads.targets import TARGETS, clip_inside


class Parameter(NamedTuple):
    """A parameter of a distribution.

    Attributes:
        name: Its name in the constructor.
        support: `"real"`, `"positive"` or `"unit"`, see `heads.links`.
    """

    name: str
    support: str


class Information(NamedTuple):
    """The Fisher matrix of one unit, in the coordinates of the supports.

    It is diagonal, except that the last two parameters may be coupled. Their
    Schur complement is given separately, because the difference
    `F₂₂ − F₁₂²/F₁₁` would lose all digits if they are nearly collinear.

    Attributes:
        diagonal: One tensor per parameter.
        coupling: `F₁₂` of the last two parameters, or `None` for zero.
        schur: `F₂₂ − F₁₂²/F₁₁` of the last two, if they are coupled.
    """

    diagonal: tuple[tf.Tensor, ...]
    coupling: tf.Tensor | None = None
    schur: tf.Tensor | None = None


class Family(Head):
    """A head of independent units from one family of distributions.

    Each parameter of the family is either a fixed number or predicted by the
    network through a link. The outputs hold all units' first predicted
    parameter, then all units' second one, and so on: for D units and P
    predicted parameters the last axis has `K = P · D` entries, which
    `tf.split(outputs, P, axis=-1)` separates. Targets have D units.

    The Fisher matrix with respect to the raw outputs is `J I Jᵀ`, with the
    family's information I and the slopes J of the links. All products cost
    `O(K)`.

    A family is one small class:

    ```python
    @keras.saving.register_keras_serializable(package="my_package")
    class HalfNormal(keras_natgrad.heads.Family):
        parameters = (keras_natgrad.heads.Parameter("scale", "positive"),)
        distribution_name = "HalfNormal"
        target_support = "nonnegative"

        def __init__(self, scale="softplus"):
            super().__init__(scale=scale)

        def information(self, values):
            return keras_natgrad.heads.Information(
                (2.0 * tf.ones_like(values["scale"]),)
            )
    ```

    Args:
        **settings: One per parameter: a number, the name of a link, or a
            `Link`. Real parameters default to `"identity"`.

    Raises:
        ValueError: If a setting is neither, or out of its support.
    """

    parameters: ClassVar[tuple[Parameter, ...]]
    #: Name in TensorFlow Probability, for the default `units()`.
    distribution_name: ClassVar[str]
    #: A key of `TARGETS`.
    target_support: ClassVar[str] = "real"
    #: Whether log-probabilities are computed in float64 and then rounded.
    #: Float32 has too few digits for differences of log Γ at large arguments,
    #: or of logarithms in units of a small scale.
    in_float64: ClassVar[bool] = False

    def __init__(self, **settings: Any) -> None:
        self._fixed: dict[str, float] = {}
        self._links: dict[str, Any] = {}
        for name, support in self.parameters:
            setting = settings.pop(name, "identity")
            number = isinstance(setting, (int, float, np.number))
            if number and not isinstance(setting, bool):
                self._fixed[name] = check_fixed(name, setting, support)
            else:
                self._links[name] = get_link(setting, name, support)
        assert not settings, settings
        if not self._links:
            raise ValueError(
                f"{type(self).__name__} has no parameter left to predict. "
                "Give at least one a link, such as 'softplus'. "
                f"Received: {self._fixed}"
            )

    # -- To be implemented -----------------------------------------------

    @abc.abstractmethod
    def information(self, values: dict[str, tf.Tensor]) -> Information:
        """Returns the Fisher matrix of each unit in the coordinates."""

    def units(self, values: dict[str, tf.Tensor]) -> Any:
        """Returns the units' distributions, of batch shape `[..., D]`.

        By default that of TensorFlow Probability named `distribution_name`,
        whose arguments are the parameters.

        Args:
            values: The parameters by name; logits for the support "unit".
        """
        arguments = {
            "logits" if support == "unit" else name: values[name]
            for name, support in self.parameters
        }
        make = getattr(distributions(), self.distribution_name)
        return make(**arguments)

    def unit_log_prob(
        self, values: dict[str, tf.Tensor], targets: tf.Tensor
    ) -> tf.Tensor:
        """Returns the log-probability of each unit's target, `[..., D]`.

        To be overridden if that of `units()` loses digits.

        Args:
            values: As for `units()`.
            targets: Tensor `[..., D]`.
        """
        return self.units(values).log_prob(targets)

    # -- Parameters ------------------------------------------------------

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The predicted parameters, in the order of the outputs."""
        return tuple(self._links)

    def values(self, outputs: tf.Tensor) -> dict[str, tf.Tensor]:
        """Returns all parameters by name, `[..., D]`, or scalar if fixed."""
        outputs = tensors.as_parameters(outputs)
        predicted = {
            name: link.value(raw)
            for (name, link), raw in zip(
                self._links.items(), self._split(outputs), strict=True
            )
        }
        fixed = {}
        for name, support in self.parameters:
            if name in self._fixed:
                number = self._fixed[name]
                if support == "unit":
                    number = math.log(number) - math.log1p(-number)
                fixed[name] = tf.constant(number, outputs.dtype)
        return {**predicted, **fixed}

    def _split(self, outputs: tf.Tensor) -> list[tf.Tensor]:
        count = len(self._links)
        return tf.split(outputs, count, axis=-1) if count > 1 else [outputs]

    # -- Distribution ----------------------------------------------------

    def distribution(self, outputs: tf.Tensor) -> Any:
        """Builds the independent units' joint distribution."""
        units = self.units(self.values(outputs))
        return distributions().Independent(units, 1)

    def log_prob(self, outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Computes the log-probability; see `Head.log_prob()`."""
        outputs = tensors.as_parameters(outputs)
        precise = tf.cast(outputs, tf.float64) if self.in_float64 else outputs
        log_probs = self.unit_log_prob(
            self.values(precise), self._match(precise, targets)
        )
        return tensors.cast_like(tf.reduce_sum(log_probs, axis=-1), outputs)

    def sample(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Draws one target per unit; see `Head.sample()`.

        Draws are clipped to numbers inside the support. Rounded to its
        boundary, where many densities are infinite, they would have no score.
        """
        draws = super().sample(outputs, seed)
        return clip_inside(draws, self.target_support)

    def quantile(self, outputs: tf.Tensor, probability: float) -> tf.Tensor:
        """Returns the value that targets stay below with a probability.

        Args:
            outputs: Tensor or array of shape `[..., K]`.
            probability: Number between 0 and 1.

        Returns:
            Tensor `[..., D]`.

        Raises:
            ValueError: If `probability` is not between 0 and 1.
            NotImplementedError: If TensorFlow Probability has no quantile for
                this distribution.
        """
        check_probability(probability)
        values = self.values(outputs)
        level = tf.constant(probability, next(iter(values.values())).dtype)
        try:
            return self.units(values).quantile(level)
        except NotImplementedError as error:
            raise NotImplementedError(
                "TensorFlow Probability has no quantile for the head "
                f"{self!r}. Estimate it from draws of head.sample()."
            ) from error

    def cdf(self, outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Returns the distribution function at the targets, unit by unit.

        Args:
            outputs: Tensor or array of shape `[..., K]`.
            targets: Tensor or array of shape `[..., D]`.

        Returns:
            Tensor `[..., D]`.
        """
        outputs = tensors.as_parameters(outputs)
        targets = self._match(outputs, targets)
        return self.units(self.values(outputs)).cdf(targets)

    def _match(self, outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        return tensors.match_targets(self._split(outputs)[0], targets)

    # -- Fisher ----------------------------------------------------------

    def fisher_factor_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Multiplies by the lower triangular factor, unit by unit."""
        factor = self._factor(outputs)
        parts = self._split(tensors.cast_like(vector, factor.roots[0]))
        products = [
            root * v for root, v in zip(factor.roots, parts, strict=True)
        ]
        if factor.below is not None:
            products[-1] += factor.below * parts[-2]
        scaled = [s * p for s, p in zip(factor.slopes, products, strict=True)]
        return tf.concat(scaled, axis=-1)

    def fisher_factor_transpose_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Multiplies by the transposed factor, unit by unit."""
        factor = self._factor(outputs)
        parts = self._split(tensors.cast_like(vector, factor.roots[0]))
        parts = [s * v for s, v in zip(factor.slopes, parts, strict=True)]
        products = [
            root * v for root, v in zip(factor.roots, parts, strict=True)
        ]
        if factor.below is not None:
            products[-2] += factor.below * parts[-1]
        return tf.concat(products, axis=-1)

    def natural_gradient(
        self, outputs: tf.Tensor, gradient: tf.Tensor
    ) -> tf.Tensor:
        """Solves `F x = g` by substitution, unit by unit.

        Parameters that do not change the distribution get zero.
        """
        factor = self._factor(outputs)
        divide = tf.math.divide_no_nan
        parts = self._split(tensors.cast_like(gradient, factor.roots[0]))
        parts = [
            divide(g, s) for g, s in zip(parts, factor.slopes, strict=True)
        ]
        if factor.below is not None:
            first = divide(parts[-2], factor.roots[-2])
            parts[-1] -= factor.below * first
            last = divide(parts[-1], tf.square(factor.roots[-1]))
            parts[-2] = divide(first - factor.below * last, factor.roots[-2])
            parts[-1] = last
        uncoupled = len(parts) if factor.below is None else len(parts) - 2
        for i in range(uncoupled):
            parts[i] = divide(parts[i], tf.square(factor.roots[i]))
        solved = [
            divide(x, s) for x, s in zip(parts, factor.slopes, strict=True)
        ]
        return tf.concat(solved, axis=-1)

    def _factor(self, outputs: tf.Tensor) -> _Factor:
        outputs = tensors.as_parameters(outputs)
        values = self.values(outputs)
        information = self.information(values)
        slopes = [
            link.slope(raw)
            for link, raw in zip(
                self._links.values(), self._split(outputs), strict=True
            )
        ]
        names = [name for name, _ in self.parameters]
        free = [name in self._links for name in names]
        roots = [
            tf.sqrt(tf.cast(entry, outputs.dtype))
            for entry, predicted in zip(information.diagonal, free, strict=True)
            if predicted
        ]
        below = None
        if information.coupling is not None and all(free[-2:]):
            assert information.schur is not None
            coupling = tf.cast(information.coupling, outputs.dtype)
            below = tf.math.divide_no_nan(coupling, roots[-2])
            # Rounding must not make a small complement negative.
            schur = tf.maximum(tf.cast(information.schur, outputs.dtype), 0.0)
            roots[-1] = tf.sqrt(schur)
        return _Factor(roots, below, slopes)

    # -- Checks ----------------------------------------------------------

    def validate(self, outputs_shape: Sequence[int | None]) -> None:
        """Checks that the outputs divide into the predicted parameters."""
        super().validate(outputs_shape)
        count, size = len(self._links), tuple(outputs_shape)[-1]
        if size is not None and size % count:
            names = ", ".join(self._links)
            raise ValueError(
                f"The head {self!r} takes {count} outputs per unit ({names}), "
                f"all units' {next(iter(self._links))} first. Give the last "
                f"layer of the model a multiple of {count} units. Received: "
                f"outputs_shape={tuple(outputs_shape)}"
            )

    def targets_in_support(
        self, outputs: tf.Tensor, targets: tf.Tensor
    ) -> tf.Tensor:
        """Tells whether all targets are possible."""
        targets = self._match(tensors.as_parameters(outputs), targets)
        return tf.reduce_all(TARGETS[self.target_support].contains(targets))

    def describe_support(self, outputs_shape: Sequence[int | None]) -> str:
        """Says in words which targets the head accepts."""
        return TARGETS[self.target_support].description

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {
            name: self._fixed[name]
            if name in self._fixed
            else link_config(self._links[name])
            for name, support in self.parameters
            if name in self._fixed or not self._is_default(name, support)
        }

    def _is_default(self, name: str, support: str) -> bool:
        """Tells whether a link is the default for real parameters."""
        return support == "real" and self._links[name] == Identity(support)


class _Factor(NamedTuple):
    """`L` of each unit: slopes times a lower triangle.

    Attributes:
        roots: The diagonal of the triangle, one per predicted parameter.
        below: The entry of the triangle in the last row and second-to-last
            column.
        slopes: Derivatives of the coordinates in the raw outputs.
    """

    roots: list[tf.Tensor]
    below: tf.Tensor | None
    slopes: list[tf.Tensor]
