"""Links: how a real output of the network becomes a parameter."""

from __future__ import annotations

import abc
import math
from typing import Any, ClassVar

import keras
import numpy as np
import tensorflow as tf

from keras_natgrad.heads import tensors

#: The supports of parameters, and the coordinate of the Fisher for each.
SUPPORTS = {
    "real": "the parameter itself",
    "positive": "the logarithm of the parameter",
    "unit": "the logit of the parameter",
}


class Link(abc.ABC):
    """A smooth function from a real output to a parameter of a distribution.

    Fisher matrices are stated in a coordinate in which they neither overflow
    nor vanish: the parameter itself if it may be any real number, its logarithm
    if it is positive, its logit if it lies between 0 and 1. The link says how
    that coordinate changes with the raw output.
    """

    #: The supports of the parameters that the link can make.
    supports: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def value(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns the parameter; for the support "unit", its logit."""

    @abc.abstractmethod
    def slope(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns the derivative of the coordinate in the raw output."""

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Link:
        """Builds a link from what `get_config()` returned."""
        return cls(**config)

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        assert isinstance(other, Link)
        return bool(self.get_config() == other.get_config())

    def __hash__(self) -> int:
        return hash((type(self), repr(sorted(self.get_config().items()))))

    def __repr__(self) -> str:
        arguments = ", ".join(
            f"{k}={v!r}" for k, v in self.get_config().items()
        )
        return f"{type(self).__name__}({arguments})"


@keras.saving.register_keras_serializable(package="keras_natgrad")
class Identity(Link):
    """The parameter is the output; the network keeps it in its support.

    A positive parameter must come from a layer that makes it positive (an
    activation such as softplus), a parameter in (0, 1) from a sigmoid. As in
    the losses of Keras, outputs are clipped to at least
    `ε = keras.config.epsilon()`, and for (0, 1) to at most `1 − ε`: a ReLU's
    zeros are not rates. Derivatives pass through the clipping, so that scores
    agree with the Fisher matrix and do not vanish.
    """

    supports = ("real", "positive", "unit")

    def __init__(self, support: str = "real") -> None:
        self.support = support

    def value(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns the output, or the logit of an output in (0, 1)."""
        inside = self._clip(raw)
        if self.support == "unit":
            return tf.math.log(inside) - tf.math.log1p(-inside)
        return inside

    def slope(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns 1, 1/x or 1/(x (1 − x)), by the support."""
        if self.support == "real":
            return tf.ones_like(raw)
        inside = self._clip(raw)
        if self.support == "unit":
            return tf.math.reciprocal(inside * (1.0 - inside))
        return tf.math.reciprocal(inside)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {"support": self.support}

    def _clip(self, raw: tf.Tensor) -> tf.Tensor:
        if self.support == "real":
            return raw
        highest = 1.0 if self.support == "unit" else None
        return tensors.clip_with_gradient(raw, highest)


@keras.saving.register_keras_serializable(package="keras_natgrad")
class Exp(Link):
    """`exp(output)`."""

    supports = ("positive",)

    def value(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns `exp(raw)`."""
        return tf.exp(raw)

    def slope(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns 1: the output is the logarithm."""
        return tf.ones_like(raw)


@keras.saving.register_keras_serializable(package="keras_natgrad")
class LogVariance(Link):
    """`exp(output / 2)`: the output is the logarithm of a scale's square."""

    supports = ("positive",)

    def value(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns `exp(raw / 2)`."""
        return tf.exp(0.5 * raw)

    def slope(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns ½."""
        return 0.5 * tf.ones_like(raw)


@keras.saving.register_keras_serializable(package="keras_natgrad")
class Softplus(Link):
    """`log(1 + exp(output)) + floor`.

    Args:
        floor: Smallest value of the parameter, non-negative. It bounds the
            likelihood of a scale that shrinks to zero. Defaults to `1e-6`.

    Raises:
        ValueError: If `floor` is negative or infinite.
    """

    supports = ("positive",)

    def __init__(self, floor: float = 1e-6) -> None:
        real = isinstance(floor, (int, float, np.number))
        if isinstance(floor, bool) or not real or not 0 <= floor < math.inf:
            raise ValueError(
                "`floor` must be a non-negative, finite number, such as 1e-6. "
                f"Received: floor={floor!r}"
            )
        self.floor = float(floor)

    def value(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns `softplus(raw) + floor`."""
        return tf.nn.softplus(raw) + tf.constant(self.floor, raw.dtype)

    def slope(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns `sigmoid(raw) / value`."""
        if self.floor == 0.0:
            # For very negative outputs both are exp(raw), and may underflow.
            small = raw < -15.0
            safe = tf.where(small, tf.zeros_like(raw), raw)
            ratio = tf.sigmoid(safe) / tf.nn.softplus(safe)
            return tf.where(small, tf.ones_like(raw), ratio)
        return tf.sigmoid(raw) / self.value(raw)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {"floor": self.floor}


@keras.saving.register_keras_serializable(package="keras_natgrad")
class Sigmoid(Link):
    """`1 / (1 + exp(−output))`: the output is the logit."""

    supports = ("unit",)

    def value(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns the output, which is the logit."""
        return raw

    def slope(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns 1."""
        return tf.ones_like(raw)


_NAMES: dict[str, type[Link]] = {
    "identity": Identity,
    "exp": Exp,
    "log_variance": LogVariance,
    "softplus": Softplus,
    "sigmoid": Sigmoid,
}


def get_link(identifier: Any, name: str, support: str) -> Link:
    """Returns the link of a parameter.

    Args:
        identifier: A `Link`, the name of one, or the configuration of one.
        name: Name of the parameter, for the message.
        support: Support of the parameter.

    Raises:
        ValueError: If it is not a link, or not one for this support.
    """
    link = identifier
    if isinstance(identifier, dict):
        link = keras.saving.deserialize_keras_object(identifier)
    elif isinstance(identifier, str) and identifier in _NAMES:
        kind = _NAMES[identifier]
        link = Identity(support) if kind is Identity else kind()
    names = [key for key, kind in _NAMES.items() if support in kind.supports]
    if not isinstance(link, Link) or support not in link.supports:
        raise ValueError(
            f"`{name}` must be a fixed number, or the link that makes it from "
            f"the outputs: one of {names} or a keras_natgrad.heads.links.Link "
            f"for {support} parameters. Received: {name}={identifier!r}"
        )
    return link


def link_config(link: Link) -> Any:
    """Returns what `get_link` recreates a link from: its name if possible."""
    for name, kind in _NAMES.items():
        if type(link) is kind and (kind is Identity or link == kind()):
            return name
    return keras.saving.serialize_keras_object(link)
