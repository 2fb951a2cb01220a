"""A gradient tape that also records what curvature needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import tensorflow as tf

from keras_natgrad._compat import flatten_layers
from keras_natgrad.capture.autograph import converted
from keras_natgrad.capture.half_precision import refine_gradients
from keras_natgrad.capture.receiver import CurvatureReceiver
from keras_natgrad.capture.replaced_call import replace_call, restore_call
from keras_natgrad.capture.taps import Taps


class CurvatureTape:
    """A `tf.GradientTape` for optimizers that use curvature.

    It records one forward pass of the attached model, layer by layer.
    `gradient` then returns the ordinary gradient and hands the recorded
    curvature to the optimizer, whose next `apply` uses it. `fit` does all this
    by itself; the tape is for custom training loops.

    Args:
        optimizer: An optimizer of this package, attached to a model.
        objective: Function without arguments that returns the loss of the same
            batch at the current weights. An adaptive damping needs it to
            compare its model with the true change; without it the damping stays
            where it started.

    Raises:
        ValueError: If the optimizer is from another package or not attached.

    Example:

    ```python
    optimizer = keras_natgrad.KFAC().attach(model, head=head)

    @tf.function
    def train_step(x, y):
        def objective():
            return loss_fn(y, model(x, training=True))

        with keras_natgrad.CurvatureTape(optimizer, objective) as tape:
            loss = objective()
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss
    ```
    """

    def __init__(
        self, optimizer: Any, objective: Callable[[], Any] | None = None
    ) -> None:
        if not isinstance(optimizer, CurvatureReceiver):
            raise ValueError(
                "`CurvatureTape` takes an optimizer of keras_natgrad, e.g. "
                f"keras_natgrad.KFAC(). Received: optimizer={optimizer!r}"
            )
        self.optimizer = optimizer
        # AutoGraph need not convert this package, but what it is given.
        self.objective = None if objective is None else converted(objective)
        self.gradient_tape = tf.GradientTape(persistent=True)
        self.model_outputs: Any = None
        self.terms: Sequence[Any] | None = None
        self.loss: tf.Tensor | None = None
        model = optimizer.attached_model()
        self._model = model
        self.taps = Taps(flatten_layers(model))

    def __enter__(self) -> CurvatureTape:
        self.taps.__enter__()

        def noting(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.model_outputs = original(*args, **kwargs)
                return self.model_outputs

            return call

        replace_call(self._model, noting)
        self.gradient_tape.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.gradient_tape.__exit__(kind, error, traceback)
        restore_call(self._model)
        self.taps.__exit__(kind, error, traceback)

    def observe(self, terms: Sequence[Any]) -> None:
        """Sets the terms of the loss, instead of the attached head.

        Args:
            terms: `curvature.OutputTerm`s whose weighted negative
                log-likelihoods sum to the loss.
        """
        self.terms = list(terms)

    @tf.autograph.experimental.do_not_convert
    def gradient(self, loss: tf.Tensor, sources: Sequence[Any]) -> list[Any]:
        """Returns the gradient; hands the curvature to the optimizer.

        Args:
            loss: Scalar tensor.
            sources: The variables that the optimizer trains.

        Returns:
            One gradient (or `None`) per source.
        """
        sources = list(sources)
        gradients = self._gradients(loss, sources)
        if self.loss is None:
            self.loss = loss
        self.optimizer.receive_curvature(self, gradients, sources)
        return gradients

    def _gradients(self, loss: tf.Tensor, sources: list[Any]) -> list[Any]:
        """Returns the gradient without the rounding of half precision."""
        records = self.taps.half_precision_records()
        if not records:
            return self.gradient_tape.gradient(loss, sources)
        gradients, cotangents = self.gradient_tape.gradient(
            loss, (sources, [record.preactivations for record in records])
        )
        return refine_gradients(gradients, sources, records, cotangents)
