"""A callback that whitens the inputs of layers periodically."""

from __future__ import annotations

from typing import Any

import keras

from keras_natgrad import _compat
from keras_natgrad.checks import check_period, is_number
from keras_natgrad.layers.whitening import (
    input_moments,
    rewhiten,
    whitened_layers,
)


class Whiten(keras.callbacks.Callback):
    """Whitens the inputs of layers every `period` steps.

    The layers are `keras_natgrad.layers.WhitenedDense` and the whitened
    convolutions, whose patches are whitened. The model still computes the same
    function. The momentum of `keras.optimizers.SGD` is mapped to the new
    weights, where it is the same difference of canonical weights. Other
    optimizers are refused, because their statistics belong to the old weights.

    A whitening costs one forward pass on `x`, and `n³` per layer of n inputs
    (kernel offsets × channels for a convolution).

    Args:
        x: Inputs of the model from which means and covariances are estimated:
            some hundreds to thousands of training examples.
        period: Steps between whitenings. The first whitening is before the
            first step. Defaults to `100`.
        damping: ε, added to the covariance; non-negative. Defaults to `0.1`.
        relative_damping: Whether ε is in units of the mean eigenvalue of each
            layer's covariance. Defaults to `True`.

    Raises:
        ValueError: If an argument is out of range; when `fit` starts, if the
            model has no such layer or the optimizer is not supported.

    Example:

    ```python
    model = keras_natgrad.layers.whitened(model)
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    model.fit(x, y, callbacks=[keras_natgrad.callbacks.Whiten(x[:1000])])
    ```
    """

    def __init__(
        self,
        x: Any,
        period: int = 100,
        damping: float = 0.1,
        relative_damping: bool = True,
    ) -> None:
        super().__init__()
        if not is_number(damping) or damping < 0:
            raise ValueError(
                "`damping` must be a non-negative float. "
                f"Received: damping={damping!r}"
            )
        if not len(keras.tree.flatten(x)[0]):
            raise ValueError("`x` must have examples. Received: an empty x")
        self.x = x
        self.period = check_period("period", period)
        self.damping = float(damping)
        self.relative_damping = relative_damping
        self._step = 0
        self._begin = 0
        self._due = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Checks the model and its optimizer."""
        whitened_layers(self.model)
        check_optimizer(self.model.optimizer)
        self._step = int(self.model.optimizer.iterations.numpy())
        # A resumed run whitens at the same steps as an uninterrupted one.
        self._due = -(-self._step // self.period) * self.period

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Reads the number of steps once, not at every step."""
        self._step = int(self.model.optimizer.iterations.numpy())

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Whitens if it is due."""
        self._begin = batch
        if self._step >= self._due:
            self.whiten()
            self._due = (self._step // self.period + 1) * self.period

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Counts the steps; one call may make several."""
        self._step += batch - self._begin + 1

    def whiten(self) -> None:
        """Whitens all layers now."""
        model = self.model
        layers = whitened_layers(model)
        moments = input_moments(model, self.x)
        for layer, each in zip(layers, moments, strict=True):
            rewhiten(
                layer,
                each,
                self.damping,
                self.relative_damping,
                _velocities(model.optimizer, layer),
            )


def check_optimizer(optimizer: Any) -> None:
    """Raises ValueError unless the optimizer's state can be mapped.

    Args:
        optimizer: The compiled optimizer.
    """
    if _gradient_descent(optimizer) is None:
        raise ValueError(
            "`Whiten` maps the momentum of keras.optimizers.SGD; the "
            "statistics of other optimizers belong to the old weights. For a "
            "model without whitened layers there is keras_natgrad.PRONG. "
            f"Received: optimizer={optimizer!r}"
        )
    for each in _compat.wrapped_optimizers(optimizer):
        for name in ("use_ema", "gradient_accumulation_steps"):
            if getattr(each, name, None):
                raise ValueError(
                    f"`Whiten` cannot map the weights that `{name}` keeps. "
                    f"Received: {name}={getattr(each, name)!r} of {each!r}"
                )


def _gradient_descent(optimizer: Any) -> Any:
    """Returns the SGD optimizer inside wrappers, or `None`."""
    for each in _compat.wrapped_optimizers(optimizer):
        if type(each) is keras.optimizers.SGD:
            return each
    return None


def _velocities(optimizer: Any, layer: Any) -> list[Any]:
    """Returns the momentum of a layer's trained weights, if there is any."""
    descent = _gradient_descent(optimizer)
    # Before the first step there is none yet.
    momentums = getattr(descent, "momentums", [])
    return [
        momentums[_compat.variable_index(descent, variable)]
        for variable in layer.trainable_variables
        if momentums
    ]
