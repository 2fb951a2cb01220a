"""Categorical distribution: softmax cross-entropy."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_natgrad.heads import softmax, tensors
from keras_natgrad.heads.base import Head
from keras_natgrad.heads.probability import distributions


@keras.saving.register_keras_serializable(package="keras_natgrad")
class Categorical(Head):
    """One of `K` classes, from logits or from probabilities.

    For logits, with `p = softmax(outputs)`:

    ```
    F = diag(p) - p pᵀ,    L = diag(√p) - p √pᵀ.
    ```

    For probabilities `q`, which are normalised to `p = q / s`, `s = Σ q`, as
    Keras does:

    ```
    F = (diag(1/p) - 1 1ᵀ) / s²,    L = (diag(1/√p) - 1 √pᵀ) / s.
    ```

    On the simplex (directions that sum to zero, the only ones which outputs of
    a softmax can take) this is `diag(1/q)`. Both matrices have rank `K - 1`:
    adding a constant to logits, or scaling probabilities, changes nothing. All
    products cost `O(K)`. Probabilities below `ε s`, `ε =
    keras.config.epsilon()`, are raised to it, but derivatives pass through, so
    that the score of an impossible class agrees with `F` and does not vanish.

    Targets are integer labels of shape `outputs.shape[:-1]`, with or without a
    trailing axis of size one, or rows of class probabilities (one-hot or soft)
    of shape `[..., K]`. A soft row `t` stands for the expected log-probability
    `Σ_k t_k log p_k`, as in Keras. The log-probability of a label outside
    `[0, K)` is `-inf`.

    Args:
        from_logits: Boolean, whether the outputs are logits (the default) or
            probabilities.
        sparse: Boolean, whether `sample()` returns integer labels (the
            default) or one-hot rows.

    Example:

    >>> head = keras_natgrad.heads.Categorical()
    >>> outputs = tf.constant([[0.0, 0.0]])
    >>> head.fisher(outputs).numpy().round(2)
    array([[[ 0.25, -0.25],
            [-0.25,  0.25]]], dtype=float32)
    """

    def __init__(self, from_logits: bool = True, sparse: bool = True) -> None:
        self.from_logits = bool(from_logits)
        self.sparse = bool(sparse)

    def distribution(self, outputs: tf.Tensor) -> Any:
        """Builds the `Categorical` or `OneHotCategorical` distribution."""
        tfd = distributions()
        logits = self._logits(outputs)
        if self.sparse:
            return tfd.Categorical(logits=logits)
        return tfd.OneHotCategorical(logits=logits, dtype=logits.dtype)

    def log_prob(self, outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Computes the log-probability; see `Head.log_prob()`."""
        logits = self._logits(outputs)
        labels = self._labels(logits, targets)
        if labels is None:
            rows = tensors.match_targets(logits, targets)
            return tf.reduce_sum(rows * tf.nn.log_softmax(logits), axis=-1)
        labels = tf.cast(labels, tf.int64)
        last = tf.cast(tf.shape(logits)[-1], tf.int64) - 1
        possible = (labels >= 0) & (labels <= last)
        log_prob = -tf.nn.sparse_softmax_cross_entropy_with_logits(
            labels=tf.clip_by_value(labels, 0, last), logits=logits
        )
        return tf.where(possible, log_prob, -np.inf)

    def score(self, outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Computes `t - p Σt` for logits, `t` the one-hot or soft target."""
        logits = self._logits(outputs)
        labels = self._labels(logits, targets)
        if labels is None:
            rows = tensors.match_targets(logits, targets)
        else:
            rows = tf.one_hot(
                tf.cast(labels, tf.int64),
                tf.shape(logits)[-1],
                dtype=logits.dtype,
            )
        total = tf.reduce_sum(rows, axis=-1, keepdims=True)
        score = rows - tf.nn.softmax(logits) * total
        return score if self.from_logits else score / self._floor(outputs)

    def fisher_factor_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Computes `√p v - p (√pᵀ v)`, divided by `q` for probabilities."""
        product = softmax.factor_product(self._logits(outputs), vector)
        return product if self.from_logits else product / self._floor(outputs)

    def fisher_factor_transpose_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Computes `√p (v - pᵀ v)`, of `v / q` for probabilities."""
        if not self.from_logits:
            floor = self._floor(outputs)
            vector = tensors.cast_like(vector, floor) / floor
        return softmax.factor_transpose_product(self._logits(outputs), vector)

    def natural_gradient(
        self, outputs: tf.Tensor, gradient: tf.Tensor
    ) -> tf.Tensor:
        """Computes `F⁺ g` exactly in `O(K)`; see `Head.natural_gradient()`.

        With `P` the projection orthogonal to the null direction `n` of `F`
        (`n = 1` for logits, `n = q` for probabilities), `F⁺ = P M P`, where
        `M = diag(1/p)` for logits and `M = s diag(q)` for probabilities solves
        `F M g = g` for all `g` orthogonal to `n`.

        For logits, `p` is taken to be at least the machine epsilon, so that
        impossible classes give finite values.
        """
        if self.from_logits:
            p = tf.nn.softmax(self._logits(outputs))
            gradient = tensors.cast_like(gradient, p)
            null = tf.ones_like(p)
            floor = np.finfo(p.dtype.as_numpy_dtype).eps
            solution = _project(gradient, null) / tf.maximum(p, floor)
        else:
            null = self._floor(outputs)
            gradient = tensors.cast_like(gradient, null)
            total = tf.reduce_sum(null, axis=-1, keepdims=True)
            solution = total * null * _project(gradient, null)
        return _project(solution, null)

    def validate(self, outputs_shape: Sequence[int | None]) -> None:
        """Checks that there are at least two classes."""
        super().validate(outputs_shape)
        if outputs_shape[-1] == 1:
            raise ValueError(
                "A categorical head needs one output per class, at least two. "
                "For two classes and a single output, use "
                "keras_natgrad.heads.Bernoulli(...) or the loss "
                "'binary_crossentropy'. Received: outputs_shape="
                f"{tuple(outputs_shape)}"
            )

    def targets_in_support(
        self, outputs: tf.Tensor, targets: tf.Tensor
    ) -> tf.Tensor:
        """Tells whether all targets are classes or rows that sum to one."""
        parameters = tensors.as_parameters(outputs)
        labels = self._labels(parameters, targets)
        if labels is None:
            rows = tensors.match_targets(parameters, targets)
            normalised = tf.abs(tf.reduce_sum(rows, axis=-1) - 1.0) < 1e-3
            return tf.reduce_all(rows >= 0.0) & tf.reduce_all(normalised)
        labels = tf.cast(labels, tf.float64)
        classes = tf.cast(tf.shape(parameters)[-1], tf.float64)
        possible = (labels >= 0.0) & (labels < classes)
        return tf.reduce_all(possible & (labels == tf.floor(labels)))

    def describe_support(self, outputs_shape: Sequence[int | None]) -> str:
        """Says in words which targets the head accepts."""
        classes = outputs_shape[-1]
        return (
            f"integer labels in [0, {classes}), or one-hot or soft rows of "
            f"{classes} nonnegative numbers that sum to 1"
        )

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {"from_logits": self.from_logits, "sparse": self.sparse}

    def _logits(self, outputs: tf.Tensor) -> tf.Tensor:
        if self.from_logits:
            return tensors.as_parameters(outputs)
        return tf.math.log(self._floor(outputs))

    @staticmethod
    def _floor(outputs: tf.Tensor) -> tf.Tensor:
        """Raises probabilities to at least `ε` times their sum."""
        epsilon = keras.config.epsilon()
        floor = tf.grad_pass_through(
            lambda q: tf.maximum(
                q, epsilon * tf.reduce_sum(q, axis=-1, keepdims=True)
            )
        )
        return floor(tensors.as_parameters(outputs))

    @staticmethod
    def _labels(outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor | None:
        """Returns integer labels `[...]`, or `None` if the targets are rows."""
        targets = tf.convert_to_tensor(targets)
        rank = outputs.shape.rank
        labels = targets
        if targets.shape.rank == rank and targets.shape[-1] == 1:
            labels = tf.squeeze(targets, axis=-1)
        if labels.shape.is_compatible_with(outputs.shape[:-1]):
            return labels
        if targets.shape.is_compatible_with(outputs.shape):
            return None
        raise ValueError(
            "Categorical targets must be integer labels of shape "
            f"{tuple(outputs.shape[:-1])} or one-hot rows of shape "
            f"{tuple(outputs.shape)}. Received: "
            f"targets.shape={targets.shape}, outputs.shape={outputs.shape}"
        )


@keras.saving.register_keras_serializable(package="keras_natgrad")
class OneHotCategorical(Categorical):
    """One of `K` classes, whose samples are one-hot rows.

    It is `Categorical(sparse=False)`, with the name in TensorFlow Probability.

    Args:
        from_logits: Boolean, whether the outputs are logits (the default) or
            probabilities.
    """

    def __init__(self, from_logits: bool = True) -> None:
        super().__init__(from_logits=from_logits, sparse=False)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {"from_logits": self.from_logits}


def _project(vector: tf.Tensor, null: tf.Tensor) -> tf.Tensor:
    """Removes from `vector` its component along `null`."""
    along = tf.reduce_sum(vector * null, axis=-1, keepdims=True)
    square = tf.reduce_sum(null * null, axis=-1, keepdims=True)
    return vector - null * (along / square)
