"""Ordered classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_natgrad.heads import tensors
from keras_natgrad.heads.base import Head
from keras_natgrad.heads.categorical import Categorical
from keras_natgrad.heads.links import get_link, link_config
from keras_natgrad.heads.probability import distributions


@keras.saving.register_keras_serializable(package="keras_natgrad")
class OrderedLogistic(Head):
    r"""Ordinal regression: `C` ordered classes cut from a logistic variable.

    The class is the interval between cutpoints `c_1 < … < c_{C−1}` that a
    logistic variable around the location falls into. With `θ_k = c_k − loc`
    and σ the sigmoid, class j has the probability

        p_j = σ(θ_{j+1}) − σ(θ_j)
            = σ(θ_{j+1}) σ(−θ_j) (1 − exp(−Δ_j)),  Δ_j = θ_{j+1} − θ_j,

    with `θ_0 = −∞`, `θ_C = ∞`. The factor has one column √p_j ∇log p_j for
    each class:

        loc:    √p_j (σ(θ_j) − σ(−θ_{j+1}))
        Δ_j:    σ(θ_{j+1}) σ(−θ_{j+1}) / √p_j.

    - Given cutpoints: one output, the location; the factor is the root of the
      sum over the classes.
    - Cutpoints `None`: `C − 1` outputs, the location and the distances
      between the cutpoints through a link. The first cutpoint is zero, because
      moving all of them is the same as moving the location.

    All products cost `O(C)`. Targets are as for `Categorical`: integer labels
    or rows of class probabilities.

    Args:
        cutpoints: Increasing numbers, or `None` to predict them. Defaults to
            `None`.
        increment: Link of the predicted distances. Defaults to `"softplus"`.

    Raises:
        ValueError: If the cutpoints do not increase, or `increment` is not a
            link for positive parameters.

    Example:

    >>> head = keras_natgrad.heads.OrderedLogistic(cutpoints=[-1.0, 0.0, 2.0])
    >>> head.log_prob(tf.zeros([1, 1]), [1]).numpy().round(3)
    array([-1.465], dtype=float32)

    References:
        - McCullagh, 1980.
    """

    def __init__(
        self,
        cutpoints: Sequence[float] | None = None,
        increment: Any = "softplus",
    ) -> None:
        if cutpoints is not None:
            cutpoints = [float(c) for c in cutpoints]
            finite = cutpoints and all(map(math.isfinite, cutpoints))
            pairs = zip(cutpoints, cutpoints[1:], strict=False)
            if not finite or any(a >= b for a, b in pairs):
                raise ValueError(
                    "`cutpoints` must be finite, increasing numbers, such as "
                    "[-1.0, 0.0, 1.0], or None to predict them. "
                    f"Received: cutpoints={cutpoints}"
                )
        self.cutpoints = cutpoints
        self._link = get_link(increment, "increment", "positive")

    # -- Distribution ----------------------------------------------------

    def distribution(self, outputs: tf.Tensor) -> Any:
        """Builds the `OrderedLogistic`."""
        outputs = tensors.as_parameters(outputs)
        location = outputs[..., 0]
        if self.cutpoints is not None:
            cutpoints = tf.constant(self.cutpoints, outputs.dtype)
        else:
            first = tf.zeros_like(outputs[..., :1])
            steps = self._link.value(outputs[..., 1:])
            cutpoints = tf.cumsum(tf.concat([first, steps], -1), axis=-1)
        return distributions().OrderedLogistic(cutpoints, location)

    def log_prob(self, outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Computes the log-probability; see `Head.log_prob()`."""
        log_probs = self._classes(outputs).log_probs
        return Categorical().log_prob(log_probs, targets)

    def mean(self, outputs: tf.Tensor) -> tf.Tensor:
        """Returns the mean class, `Σ_j j p_j`; see `Head.mean()`."""
        return Categorical().mean(self._classes(outputs).log_probs)

    def stddev(self, outputs: tf.Tensor) -> tf.Tensor:
        """Returns the standard deviation of the class."""
        return Categorical().stddev(self._classes(outputs).log_probs)

    # -- Fisher ----------------------------------------------------------

    def factor_rank(self, parameter_count: int) -> int:
        """Returns 1 for given cutpoints, else the number of classes."""
        return 1 if self.cutpoints is not None else parameter_count + 1

    def fisher_factor_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Adds up the columns, in `O(C)`."""
        classes = self._classes(outputs)
        vector = tensors.cast_like(vector, classes.shift)
        if self.cutpoints is not None:
            return _root_of_sum(classes.shift) * vector
        shifted = classes.shift * vector
        location = -tf.reduce_sum(shifted, axis=-1, keepdims=True)
        # A distance moves both edges of all higher classes.
        above = tf.cumsum(shifted, axis=-1, exclusive=True, reverse=True)
        steps = classes.widen * vector[..., 1:-1] + above[..., 1:-1]
        return tf.concat([location, classes.slopes * steps], axis=-1)

    def fisher_factor_transpose_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Computes the products with the columns, in `O(C)`."""
        classes = self._classes(outputs)
        vector = tensors.cast_like(vector, classes.shift)
        if self.cutpoints is not None:
            return _root_of_sum(classes.shift) * vector
        location = -vector[..., :1] * tf.ones_like(classes.shift[..., :1])
        steps = classes.slopes * vector[..., 1:]
        # The change of the lower edge; of the upper edge for the first class.
        edges = tf.concat(
            [location, tf.cumsum(tf.concat([location, steps], -1), axis=-1)],
            axis=-1,
        )
        own = tf.pad(
            classes.widen * steps,
            [[0, 0]] * (steps.shape.rank - 1) + [[1, 1]],
        )
        return classes.shift * edges + own

    # -- Checks ----------------------------------------------------------

    def validate(self, outputs_shape: Sequence[int | None]) -> None:
        """Checks that given cutpoints come with a single output."""
        super().validate(outputs_shape)
        size = tuple(outputs_shape)[-1]
        if self.cutpoints is not None and size not in (1, None):
            raise ValueError(
                "An ordered logistic head with given cutpoints takes one "
                "output, the location; leave out the cutpoints to predict "
                f"them. Received: outputs_shape={tuple(outputs_shape)}"
            )

    def targets_in_support(
        self, outputs: tf.Tensor, targets: tf.Tensor
    ) -> tf.Tensor:
        """Tells whether all targets are classes or rows that sum to one."""
        log_probs = self._classes(outputs).log_probs
        return Categorical().targets_in_support(log_probs, targets)

    def describe_support(self, outputs_shape: Sequence[int | None]) -> str:
        """Says in words which targets the head accepts."""
        classes: int | None = None
        if self.cutpoints is not None:
            classes = len(self.cutpoints) + 1
        elif outputs_shape[-1] is not None:
            classes = outputs_shape[-1] + 1
        return Categorical().describe_support((*outputs_shape[:-1], classes))

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {
            "cutpoints": self.cutpoints,
            "increment": link_config(self._link),
        }

    def _classes(self, outputs: tf.Tensor) -> _Classes:
        outputs = tensors.as_parameters(outputs)
        location = outputs[..., :1]
        if self.cutpoints is not None:
            cutpoints = tf.constant(self.cutpoints, tf.float64)
            widths = tf.cast(cutpoints[1:] - cutpoints[:-1], outputs.dtype)
            widths *= tf.ones_like(location)
            edges = tf.cast(cutpoints, outputs.dtype) - location
            slopes = tf.zeros_like(widths)  # No width is predicted.
        else:
            raw = outputs[..., 1:]
            widths = self._link.value(raw)
            slopes = widths * self._link.slope(raw)
            edges = tf.cumsum(tf.concat([-location, widths], -1), axis=-1)
        below, above = tf.math.log_sigmoid(edges), tf.math.log_sigmoid(-edges)
        # A width that underflows makes a class impossible, not undefined.
        least = np.finfo(outputs.dtype.as_numpy_dtype).tiny
        gap = tf.maximum(-tf.math.expm1(-widths), least)
        one = tf.zeros_like(location)
        log_probs = (
            tf.concat([below, one], axis=-1)
            + tf.concat([one, above], axis=-1)
            + tf.concat([one, tf.math.log(gap), one], axis=-1)
        )
        # 1 − σ(upper) − σ(lower) is the relative change as both edges move.
        move = tf.concat([tf.sigmoid(-edges), one], axis=-1) - tf.concat(
            [one, tf.sigmoid(edges)], axis=-1
        )
        # σ(θ) σ(−θ) / √p at the upper edge.
        widen = tf.math.rsqrt(gap) * tf.exp(
            0.5 * below[..., 1:] + above[..., 1:] - 0.5 * above[..., :-1]
        )
        return _Classes(
            log_probs, tf.exp(0.5 * log_probs) * move, widen, slopes
        )


class _Classes(NamedTuple):
    """The classes and the columns of the factor.

    Attributes:
        log_probs: `[..., C]`.
        shift: `√p_j ∂ log p_j` as both edges of the class move, `[..., C]`.
        widen: The same as its upper edge moves, `[..., C − 2]`.
        slopes: Derivatives of the widths in the outputs, `[..., C − 2]`.
    """

    log_probs: tf.Tensor
    shift: tf.Tensor
    widen: tf.Tensor
    slopes: tf.Tensor


def _root_of_sum(columns: tf.Tensor) -> tf.Tensor:
    return tf.norm(columns, axis=-1, keepdims=True)
