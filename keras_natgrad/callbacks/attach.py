"""A callback that attaches the compiled optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_natgrad.training.train_step import curvature_optimizer


class Attach(keras.callbacks.Callback):
    """Attaches the compiled optimizer to the model when `fit` starts.

    For code that cannot call `optimizer.attach(model)` itself. It holds only
    plain settings, so that tuners may copy it.

    Args:
        head: Passed to `attach`.
        exclude: Passed to `attach`. Defaults to what `attach` was given before.

    Raises:
        ValueError: When `fit` starts, if the compiled optimizer is not one
            of keras_natgrad.

    Example:

    ```python
    model.compile(keras_natgrad.KFAC(), loss="mse")
    model.fit(x, y, callbacks=[keras_natgrad.callbacks.Attach()])
    ```
    """

    def __init__(
        self, head: Any = None, exclude: Sequence[Any] | None = None
    ) -> None:
        super().__init__()
        self.head = head
        self.exclude = exclude

    def set_model(self, model: keras.Model) -> None:
        """Attaches; called by `fit` before it makes its training function."""
        super().set_model(model)
        optimizer = compiled_optimizer(model, "Attach")
        optimizer.attach(model, head=self.head, exclude=self.exclude)


def compiled_optimizer(model: keras.Model, callback: str) -> Any:
    """Returns the optimizer of this package that a model was compiled with.

    Args:
        model: The model of a callback.
        callback: Name of the callback, for the error.

    Raises:
        ValueError: If the optimizer is not from this package.
    """
    optimizer = curvature_optimizer(model.optimizer)
    if optimizer is None:
        raise ValueError(
            f"`{callback}` needs a model compiled with an optimizer of "
            "keras_natgrad, e.g. keras_natgrad.KFAC(). "
            f"Received: optimizer={model.optimizer!r}"
        )
    return optimizer
