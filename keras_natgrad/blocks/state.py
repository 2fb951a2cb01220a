"""The state of blocks: what is kept of it, and the parts of it."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_natgrad.linalg import expand_to


def identities(shape: tuple[int, ...], dtype: Any = None) -> tf.Tensor:
    """Initializer of identity matrices, `[..., n, n]`."""
    dtype = keras.backend.standardize_dtype(dtype)
    return tf.eye(shape[-1], batch_shape=list(shape[:-2]), dtype=dtype)


def select(good: tf.Tensor | None, new: tf.Tensor, old: Any) -> tf.Tensor:
    """Returns the new values of the layers that are good, else the old.

    Args:
        good: Bool, a scalar or one per layer; `None` where all are.
        new: Tensor `[(layers,) ...]`.
        old: Likewise, a tensor or variable.
    """
    if good is None:
        return new
    return tf.where(expand_to(good, new.shape.rank), new, old)


def keep_good(variable: Any, new: tf.Tensor, succeeded: tf.Tensor) -> None:
    """Assigns a new value to the layers for which it is good."""
    variable.assign(select(succeeded, new, variable.value))


def count_failures(succeeded: tf.Tensor) -> tf.Tensor:
    """Returns how many layers have failed, an int32 scalar."""
    return tf.reduce_sum(tf.cast(~succeeded, tf.int32))


class LayerState:
    """The part of a variable that belongs to one layer of several.

    It is read and assigned like the variable itself.

    Args:
        variable: Variable `[layers, ...]`.
        index: The layer's position.
    """

    def __init__(self, variable: Any, index: int) -> None:
        self._variable = variable
        self._index = index
        self.dtype = variable.dtype
        self.shape = tuple(variable.shape)[1:]

    @property
    def value(self) -> tf.Tensor:
        """The layer's part."""
        whole = tf.convert_to_tensor(self._variable.value)
        if whole.shape[0] == 1:
            return tf.squeeze(whole, 0)
        return whole[self._index]

    def assign(self, value: tf.Tensor) -> None:
        """Changes the layer's part."""
        old = tf.convert_to_tensor(self._variable.value)
        new = tf.cast(value, old.dtype)[tf.newaxis]
        self._variable.assign(
            tf.tensor_scatter_nd_update(old, [[self._index]], new)
        )

    def numpy(self) -> np.ndarray:
        """Returns the layer's part as an array."""
        return np.asarray(self.value)


class PendingState:
    """The part of a variable that belongs to some layers, assigned later.

    Args:
        variable: Variable `[layers, ...]`.
        start: First of the layers.
        stop: The one after the last.
    """

    def __init__(self, variable: Any, start: int, stop: int) -> None:
        self.dtype = variable.dtype
        self.value = tf.convert_to_tensor(variable.value)[start:stop]
        #: Whether `value` is not the variable's any more.
        self.changed = False

    def assign(self, value: tf.Tensor) -> None:
        """Notes the new value."""
        self.value = tf.cast(value, self.value.dtype)
        self.changed = True
