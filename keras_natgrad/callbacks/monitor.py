"""A callback that records what an optimizer of the package does."""

from __future__ import annotations

import warnings
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_natgrad.callbacks.attach import compiled_optimizer
from keras_natgrad.callbacks.figures import monitor_figure
from keras_natgrad.callbacks.refresh_timer import RefreshTimer
from keras_natgrad.callbacks.spectra import (
    block_names,
    condition_number,
    extremes,
    product_spectrum,
    to_arrays,
)
from keras_natgrad.callbacks.tensorboard import SummaryWriter
from keras_natgrad.checks import check_integer, check_period

# The optimizer's statistics that are logged, and their names in the logs.
# `learning_rate` is taken: callbacks of Keras log the attribute by that name.
_LOGGED = {
    "damping": "damping",
    "reduction_ratio": "reduction_ratio",
    "learning_rate": "step_size",
    "momentum": "momentum",
    "skipped": "skipped",
    "retracted": "retracted",
    "refreshes": "refreshes",
}


class CurvatureMonitor(keras.callbacks.Callback):
    """Records damping, steps and the curvature of every layer.

    Works with every optimizer of the package, also inside a
    `LossScaleOptimizer`. Each record is added to the logs of Keras, where
    `History`, `CSVLogger` and the progress bar find it (put the monitor first
    in the list of callbacks), to `history` and, with `log_dir`, to TensorBoard.
    The logs contain

    - `damping`: λ;
    - `reduction_ratio`: the ratio at the last adaptation of the damping, if it
      is adaptive;
    - `step_size`, `momentum`: α and μ of the last step, as the optimizer or
      its quadratic model chose them;
    - `update_norm`: Euclidean norm of the last change of the trainable weights;
      with `steps_per_execution` above one, of the change by all steps of the
      last call;
    - `skipped`, `retracted`, `refreshes`: how many batches were skipped, how
      many steps were taken back, how often the inverses were refreshed;
    - `condition_number`: the largest of all layers;
    - `refresh_seconds`, if it is measured.

    `history` is a dictionary of lists of equal length: these, `step` (the
    optimizer's iteration) and, for each layer, `condition_number/<layer>`,
    `largest_eigenvalue/<layer>` and `smallest_eigenvalue/<layer>`. The
    eigenvalues are those of the undamped Fisher block; the condition number is
    that of the preconditioner in use, i.e. of the damped block at the last
    refresh. Unknown values are NaN. Layers and fallback variables are named by
    their paths.

    A record reads some scalars from the device. Spectra cost `n³` per factor of
    side n; factors larger than `max_size` are left out, and `notes` says why.
    To record the update norm, the monitor keeps a copy of the weights during
    one call of the training function.

    Args:
        every: `"epoch"` for a record at the end of each epoch, or a number of
            steps. Defaults to `"epoch"`.
        spectra: Whether to compute eigenvalues. `NaturalGradient` has no blocks
            and therefore none. Defaults to `True`.
        log_dir: Folder for TensorBoard: scalars, and histograms of the
            logarithms (to base ten) of the eigenvalues. Needs the extra
            `tensorboard`. Defaults to `None`.
        measure_refresh: Whether every record measures the wall time of a
            refresh of all inverses. The refresh is made only for this, after a
            first one to warm up, and its results are thrown away. This needs a
            copy of the optimizer's state. Defaults to `False`.
        max_size: Largest side of a matrix whose eigenvalues are computed.
            Defaults to `1024`.

    Raises:
        ValueError: If an argument is out of range; when `fit` starts, if the
            compiled optimizer is not from keras_natgrad, or does not support
            the request.
        ImportError: When `fit` starts, if TensorBoard is not installed and
            `log_dir` is given.

    Example:

    ```python
    monitor = keras_natgrad.callbacks.CurvatureMonitor(every=100)
    model.fit(x, y, epochs=5, callbacks=[monitor])
    monitor.history["damping"]
    monitor.plot("curvature.png")
    ```
    """

    def __init__(
        self,
        every: str | int = "epoch",
        spectra: bool = True,
        log_dir: Any = None,
        measure_refresh: bool = False,
        max_size: int = 1024,
    ) -> None:
        super().__init__()
        if every != "epoch":
            every = check_period("every", every)
        self.every = every
        self.spectra = bool(spectra)
        self.log_dir = log_dir
        self.measure_refresh = bool(measure_refresh)
        self.max_size = check_integer("max_size", max_size)
        #: Lists of what was recorded, by name.
        self.history: dict[str, list[float]] = {}
        #: The last eigenvalues of every layer, in the parts of
        #: `Block.spectra`, as NumPy arrays.
        self.last_spectra: dict[str, dict[str, np.ndarray]] = {}
        #: Why a layer has no spectrum, by name.
        self.notes: dict[str, str] = {}
        # With records at the end of each epoch, nothing has to wait for a
        # batch.
        self.async_safe = every == "epoch"
        self._step = self._begin = 0
        self._end = -1
        # Weights before the last calls of the training function that may be
        # followed by a record, and the batches at which these began.
        self._copies: list[tuple[int, list[tf.Tensor]]] = []
        self._writer: SummaryWriter | None = None
        self._timer: RefreshTimer | None = None

    # -- Keras -----------------------------------------------------------

    def set_model(self, model: keras.Model) -> None:
        """Clears the records if the model is a different one."""
        if self.model is not model:
            self.history, self.last_spectra, self.notes = {}, {}, {}
            self._timer = None
        super().set_model(model)

    def on_train_begin(self, logs: Any = None) -> None:
        """Checks the optimizer, and opens the log for TensorBoard."""
        optimizer = self._optimizer()
        if self.measure_refresh:
            self._timer = RefreshTimer(self.model, optimizer)
        if self.log_dir is not None:
            self._writer = SummaryWriter(self.log_dir)

    def on_train_end(self, logs: Any = None) -> None:
        """Closes the log for TensorBoard."""
        self._copies, self._timer = [], None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Reads the number of steps once, not at every step."""
        self._step = int(self._optimizer().iterations.numpy())
        self._end = -1
        self._copies = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Keeps the weights if the change made by this call is recorded."""
        self._begin = batch
        if self._is_last(batch):
            # Keras also begins a batch that turns out not to exist.
            self._copies = [*self._copies[-1:], (batch, self._weights())]

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Makes a record if one is due."""
        self._end = batch
        if not isinstance(self.every, int):
            return
        taken = batch - self._begin + 1
        due = self._step // self.every < (self._step + taken) // self.every
        self._step += taken
        if due:
            self.record()
        self._log(logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Makes a record, or repeats the last one of the epoch."""
        if self.every == "epoch" or not self.history:
            self.record()
        self._log(logs)

    # -- Recording -------------------------------------------------------

    def record(self) -> dict[str, float]:
        """Records the current state; also for custom training loops.

        In a custom loop, call `monitor.set_model(model)` first.

        Returns:
            Values by name; empty before the optimizer's first step.

        Raises:
            ValueError: If the compiled optimizer is not from keras_natgrad.
        """
        optimizer = self._optimizer()
        statistics = optimizer.statistics
        if not statistics or not statistics["batches"]:
            return {}
        record = {"step": float(optimizer.iterations.numpy())}
        for name, logged in _LOGGED.items():
            record[logged] = statistics[name]
        if not optimizer.damping.adapts:
            del record["reduction_ratio"]
        record["update_norm"] = self._update_norm()
        if self.spectra:
            record.update(self._read_spectra(optimizer))
        if self.measure_refresh:
            record["refresh_seconds"] = self._seconds_of_refresh(optimizer)
        length = len(self.history.get("step", ()))
        for name, value in record.items():
            past = self.history.setdefault(name, [float("nan")] * length)
            past.append(float(value))
        for past in self.history.values():
            past.extend([float("nan")] * (length + 1 - len(past)))
        if self._writer is not None:
            self._writer.write(record, self._products(), int(record["step"]))
        return record

    def spectrum(self, layer: str) -> np.ndarray:
        """Returns the last eigenvalues of a layer's block, largest first.

        Args:
            layer: Name of a layer in `last_spectra`.

        Raises:
            ValueError: If there are none.
        """
        if layer not in self.last_spectra:
            raise ValueError(
                "There is no spectrum of this layer. Known layers are "
                f"{sorted(self.last_spectra)}; left out were "
                f"{sorted(self.notes)}. Received: layer={layer!r}"
            )
        return product_spectrum(self.last_spectra[layer])

    def plot(self, path: Any = None) -> Any:
        """Draws what was recorded. Needs the extra `plots`.

        Plots damping, reduction ratio, step norms and condition numbers over
        the steps, and the last spectra.

        Args:
            path: File to save the figure to, if any.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            ValueError: If nothing was recorded yet.
            ImportError: If matplotlib is not installed.
        """
        if not self.history:
            raise ValueError(
                "There is nothing to plot before the first record: pass the "
                "monitor to `fit(callbacks=...)`. Received: an empty history"
            )
        figure = monitor_figure(self.history, self._products())
        if path is not None:
            figure.savefig(path)
        return figure

    # -- Parts of a record -----------------------------------------------

    def _optimizer(self) -> Any:
        return compiled_optimizer(self.model, "CurvatureMonitor")

    def _is_last(self, batch: int) -> bool:
        """Returns whether this call may be followed by a record."""
        steps = int(self.model.steps_per_execution)
        if isinstance(self.every, int):
            return self._step % self.every + steps >= self.every
        length = (self.params or {}).get("steps")
        return length is None or batch + steps >= length

    def _weights(self) -> list[tf.Tensor]:
        variables = self.model.trainable_variables
        return [tf.identity(variable.value) for variable in variables]

    def _update_norm(self) -> float:
        before = [copy for begin, copy in self._copies if begin <= self._end]
        self._copies = []
        if not before:
            return float("nan")
        total = 0.0
        for new, old in zip(self._weights(), before[-1], strict=True):
            change = tf.cast(new, tf.float64) - tf.cast(old, tf.float64)
            total += float(tf.reduce_sum(tf.square(change)))
        return total**0.5

    def _read_spectra(self, optimizer: Any) -> dict[str, float]:
        """Reads the eigenvalues of all blocks."""
        record: dict[str, float] = {}
        self.last_spectra = {}
        worst = [float("nan")]
        for name, block in block_names(optimizer):
            if block.spectrum_side > self.max_size:
                self._note(
                    name,
                    f"a matrix of side {block.spectrum_side} is larger than "
                    f"max_size={self.max_size}",
                )
                continue
            try:
                parts = to_arrays(block.spectra())
                condition = condition_number(block.inverse_spectra())
            except tf.errors.InvalidArgumentError:
                self._note(name, "the eigenvalue algorithm failed on it")
                continue
            self.last_spectra[name] = parts
            smallest, largest = extremes(parts)
            worst.append(condition)
            record[f"condition_number/{name}"] = condition
            record[f"largest_eigenvalue/{name}"] = largest
            record[f"smallest_eigenvalue/{name}"] = smallest
        if len(worst) > 1:
            record["condition_number"] = float(np.fmax.reduce(worst))
        return record

    def _note(self, name: str, reason: str) -> None:
        if name not in self.notes:
            warnings.warn(
                f"`CurvatureMonitor` leaves out the spectrum of {name}: "
                f"{reason}.",
                stacklevel=2,
            )
        self.notes[name] = reason

    def _seconds_of_refresh(self, optimizer: Any) -> float:
        # The model may have been compiled with another optimizer since.
        if self._timer is None or self._timer.optimizer is not optimizer:
            self._timer = RefreshTimer(self.model, optimizer)
        return self._timer.seconds()

    def _log(self, logs: Any) -> None:
        """Writes the last record into the logs of Keras."""
        if logs is None or not self.history:
            return
        for name, values in self.history.items():
            if name != "step" and "/" not in name:
                logs[name] = values[-1]

    def _products(self) -> dict[str, np.ndarray]:
        return {
            name: product_spectrum(parts)
            for name, parts in self.last_spectra.items()
        }
