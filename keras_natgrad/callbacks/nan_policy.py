"""A callback that raises the damping when the loss is not finite."""

from __future__ import annotations

import warnings
from typing import Any

import keras
import numpy as np

from keras_natgrad.callbacks.attach import compiled_optimizer
from keras_natgrad.checks import check_integer, check_positive


class RaiseDamping(keras.callbacks.Callback):
    """Goes back and raises the damping when the loss is not finite.

    Instead of ending training, as `keras.callbacks.TerminateOnNaN` does, it
    restores the weights and the optimizer's state from the last good copy,
    multiplies the damping by `factor` and goes on with the next batch. A copy
    is good if the loss of the following batch is finite; the first copy, at the
    start of training, counts as good. Every further return to the same copy
    multiplies by `factor` once more; after `patience` returns training stops,
    with the weights of that copy.

    The optimizers of this package skip a batch whose loss or gradient is not
    finite, and `KFAC` with adaptive damping and momentum takes back its last
    step after two such batches in a row (or earlier, if the loss surges). The
    callback therefore waits for `tolerance` bad batches in a row, unless a
    weight is not finite. It helps when that is not enough, and with a constant
    or scheduled damping, which keeps the factor; see `raise_damping` of the
    optimizers.

    After a bad batch the metrics of the epoch are reset, so that its means stay
    finite. The learning rate stays as other callbacks have set it; all else is
    restored, including the iteration.

    Copies of the weights and the optimizer's state are held on the host: one,
    or two while a new one is being tried. As with `TerminateOnNaN`, every batch
    waits for its loss.

    Args:
        factor: Factor by which the damping is raised, above one. Defaults to
            `10.0`.
        keep_every: Steps between copies. Defaults to `100`.
        patience: How often in a row it goes back to the same copy before
            training stops. Defaults to `3`.
        tolerance: Number of bad batches in a row that are left to the
            optimizer. Defaults to `2`.

    Raises:
        ValueError: If an argument is out of range; when `fit` starts, if the
            compiled optimizer is not from keras_natgrad, or if its damping is
            the constant zero, which no factor raises.

    Example:

    ```python
    optimizer = keras_natgrad.KFAC(damping=1e-3).attach(model)
    model.compile(optimizer, loss="mse")
    model.fit(x, y, callbacks=[keras_natgrad.callbacks.RaiseDamping()])
    ```
    """

    def __init__(
        self,
        factor: float = 10.0,
        keep_every: int = 100,
        patience: int = 3,
        tolerance: int = 2,
    ) -> None:
        super().__init__()
        self.factor = check_positive("factor", factor)
        if factor <= 1:
            raise ValueError(
                f"`factor` must be above one. Received: factor={factor!r}"
            )
        self.keep_every = check_integer("keep_every", keep_every, 1)
        self.patience = check_integer("patience", patience, 1)
        self.tolerance = check_integer("tolerance", tolerance, 0)
        #: Pairs of the iteration at which it went back and the one it went back
        #: to.
        self.returns: list[tuple[int, int]] = []
        self._start()

    def _start(self) -> None:
        # Variables and their values.
        self._kept: list[tuple[Any, np.ndarray]] | None = None
        self._tried: list[tuple[Any, np.ndarray]] | None = None
        self._since = self._begin = self._bad = self._failures = 0
        self._renew_metrics = False

    # -- Keras -----------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        """Checks the optimizer."""
        optimizer = compiled_optimizer(self.model, "RaiseDamping")
        if optimizer.damping.is_zero:
            raise ValueError(
                "`RaiseDamping` multiplies the damping, which must not be "
                f"zero. Received: damping=0.0 of {optimizer!r}"
            )
        self._start()

    def on_train_end(self, logs: Any = None) -> None:
        """Frees the copy."""
        self._kept = self._tried = None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Keras has reset the metrics."""
        self._renew_metrics = False

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Takes a copy if one is due."""
        self._begin = batch
        # Not earlier: the mean of an epoch that ends with a bad batch is
        # undefined.
        if self._renew_metrics:
            self.model.reset_metrics()
            self._renew_metrics = False
        due = self._kept is None or self._since >= self.keep_every
        if due and not self._bad and self._is_built():
            self._tried = [(v, _to_array(v)) for v in self._variables()]

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Looks at the loss."""
        self._since += batch - self._begin + 1
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if np.all(np.isfinite(loss)):
            self._bad = 0
            if self._tried is not None:
                self._kept, self._tried = self._tried, None
                self._since, self._failures = batch - self._begin + 1, 0
            return
        if self._kept is None and self._tried is not None:
            # There is no better copy than the first.
            self._kept, self._since = self._tried, 0
        self._tried = None
        self._renew_metrics = True
        self._bad += 1
        if self._bad > self.tolerance or not self._weights_finite():
            self._go_back(batch)

    # -- Going back ------------------------------------------------------

    def _go_back(self, batch: int) -> None:
        self._bad = 0
        if self._kept is None:
            self._stop(batch, "there is no good copy of the weights")
            return
        optimizer = compiled_optimizer(self.model, "RaiseDamping")
        left = int(optimizer.iterations.numpy())
        for variable, value in self._kept:
            variable.assign(value)
        self.returns.append((left, int(optimizer.iterations.numpy())))
        self._since = 0
        if self._failures == self.patience:
            self._stop(batch, f"the damping was raised {self.patience} times")
            return
        self._failures += 1
        optimizer.raise_damping(self.factor**self._failures)
        warnings.warn(
            f"The loss is not finite at batch {batch}: the weights of "
            f"iteration {self.returns[-1][1]} are back, with the damping "
            f"{self.factor**self._failures:g} times as high.",
            stacklevel=2,
        )

    def _stop(self, batch: int, reason: str) -> None:
        warnings.warn(
            f"The loss is not finite at batch {batch}, and {reason}: training "
            "stops.",
            stacklevel=3,
        )
        self.model.stop_training = True

    def _is_built(self) -> bool:
        """Returns whether all state exists, after building the optimizer's."""
        model = self.model
        if not model.built:
            return False
        if not model.optimizer.built:
            with model.distribute_strategy.scope():
                model.optimizer.build(model.trainable_variables)
        return True

    def _variables(self) -> list[Any]:
        """Returns the variables to restore: all but the learning rate."""
        rate = self.model.optimizer.learning_rate
        everything = [*self.model.variables, *self.model.optimizer.variables]
        return [variable for variable in everything if variable is not rate]

    def _weights_finite(self) -> bool:
        return all(
            np.all(np.isfinite(_to_array(each).astype(np.float64)))
            for each in self.model.trainable_variables
        )


def _to_array(variable: Any) -> np.ndarray:
    return np.array(variable.value.numpy())
