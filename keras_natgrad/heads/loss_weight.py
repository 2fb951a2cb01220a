"""The weights with which a loss sums the log-probabilities of its units."""

import dataclasses
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad.heads import tensors

_UNITS = ("mean", "sum")


@dataclasses.dataclass(frozen=True)
class LossWeight:
    """The weight of every example and position in a Keras loss.

    A Keras loss with a head is a weighted sum of log-probabilities,

    ```
    loss(targets, outputs) = Σ_i c_i (-log p(targets_i | outputs_i)) + const,
    ```

    where the coefficients `c` hold everything that does not belong to the head:
    the mean over the last axis, sample weights, the mask and the reduction. The
    same coefficients weight the Fisher matrices of the examples, which makes
    the natural gradient independent of the scale of the loss.

    Args:
        reduction: The reduction of the loss, as in `keras.losses.Loss`. With
            `"none"` or `None` the loss is a tensor, and the coefficients are
            those of its sum: this is what `fit()` differentiates. Defaults to
            `"sum_over_batch_size"`.
        units: `"mean"` if the loss averages over the last axis of the outputs,
            `"sum"` if it sums, or if that axis holds a single distribution.
            Defaults to `"sum"`.
        ignore_class: Optional integer, the label of the examples that the loss
            ignores. Combine `target_mask()` with the Keras mask of the outputs.
            Defaults to `None`.
        open_scale: Whether the loss is, for any scale s, s times the negative
            log-likelihood of the head with that scale: absolute errors do not
            fix the scale of a Laplace distribution. Training then uses the most
            likely scale for the batch's errors. Defaults to `False`.

    Raises:
        ValueError: If `reduction` or `units` is unknown.

    Example:

    >>> weight = keras_natgrad.heads.LossWeight(units="mean")
    >>> weight.coefficients(tf.zeros([2, 4])).numpy()
    array([0.125, 0.125], dtype=float32)
    """

    reduction: str | None = "sum_over_batch_size"
    units: str = "sum"
    ignore_class: int | None = None
    open_scale: bool = False

    def __post_init__(self) -> None:
        # Keras raises the error for an unknown reduction.
        keras.losses.Loss(name="reduction", reduction=self.reduction)
        if self.units not in _UNITS:
            raise ValueError(
                f"`units` must be one of {_UNITS}. Received: units={self.units}"
            )

    def coefficients(
        self,
        outputs: tf.Tensor,
        sample_weight: tf.Tensor | None = None,
        mask: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Computes the coefficient of every example and position.

        Loss reductions are linear, so the coefficients are the derivative of
        the reduction with respect to the losses that it reduces. Keras itself
        does the reduction: it aligns ranks of weights, renormalises masks and
        divides sums exactly as in the loss. Under a `tf.distribute` strategy
        Keras divides means by the number of replicas, so that sums over
        replicas are global means; the coefficients include this.

        Args:
            outputs: Tensor of shape `[..., K]`.
            sample_weight: Optional tensor, as for a Keras loss.
            mask: Optional boolean tensor of shape `outputs.shape[:-1]`, false
                where an output does not count.

        Returns:
            Tensor of shape `outputs.shape[:-1]`.
        """
        outputs = tensors.as_parameters(outputs)
        losses = tf.ones_like(outputs[..., 0])
        if mask is not None:
            losses._keras_mask = tf.cast(mask, tf.bool)
        reduce = _Reduction(
            reduction=self.reduction, name="reduction", dtype=losses.dtype.name
        )
        with tf.GradientTape() as tape:
            tape.watch(losses)
            reduced = reduce(losses, losses, sample_weight)
        coefficients = tape.gradient(reduced, losses)
        if self.units == "mean":
            count = tf.cast(tf.shape(outputs)[-1], losses.dtype)
            coefficients = coefficients / count
        return coefficients

    def target_mask(
        self, outputs: tf.Tensor, targets: tf.Tensor
    ) -> tf.Tensor | None:
        """Tells which examples do not have the label `ignore_class`.

        Args:
            outputs: Tensor of shape `[..., K]`.
            targets: Tensor of labels of shape `[...]` or `[..., 1]`.

        Returns:
            Boolean tensor of shape `outputs.shape[:-1]`, or `None` if no class
            is ignored.
        """
        if self.ignore_class is None:
            return None
        targets = tf.convert_to_tensor(targets)
        if targets.shape.rank == tf.convert_to_tensor(outputs).shape.rank:
            targets = tf.squeeze(targets, axis=-1)
        return targets != tf.cast(self.ignore_class, targets.dtype)


class _Reduction(keras.losses.Loss):
    """A loss whose values are given, so only its reduction matters."""

    def call(self, y_true: Any, y_pred: Any) -> Any:
        # A new tensor, so that Keras does not apply the mask of `y_pred` again.
        return tf.identity(y_pred)
