"""The distribution of a unit's response, from its Keras activation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from keras_natgrad.blocks import relative
from keras_natgrad.heads import Categorical

# Variance of the response as a function of its mean; unit noise is scaled.
_VARIANCES: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
    "gaussian": tf.ones_like,
    "bernoulli": lambda h: h * (1 - h),
    "poisson": lambda h: h,
}

# Two examples of four units, on which activations are tried.
_PROBE = ((-1.3, 0.4, 0.9, 1.7), (0.6, -0.2, 2.1, 0.1))

Coefficient: TypeAlias = Callable[[tf.Tensor], tf.Tensor]


@dataclass(frozen=True)
class ResponseOptions:
    """What the activations leave open.

    Attributes:
        softness: ω of the rectifiers.
        noise_scale: σ of responses with Gaussian noise.
        other_response: Distribution, with mean f(t), of activations f without
            a closed form: `"gaussian"`, `"bernoulli"`, `"poisson"`, or `None`
            to refuse them.
    """

    softness: float = 1.0
    noise_scale: float = 1.0
    other_response: str | None = "gaussian"

    def __post_init__(self) -> None:
        for name in ("softness", "noise_scale"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(
                    f"`{name}` must be a positive number. "
                    f"Received: {name}={value!r}"
                )
        known = (None, *_VARIANCES)
        if self.other_response not in known:
            raise ValueError(
                f"`other_response` must be one of {known}. "
                f"Received: other_response={self.other_response!r}"
            )


@dataclass(frozen=True)
class UnitResponse:
    """Units that respond independently; `L = diag(√ν(z))`.

    Attributes:
        name: Of the activation.
        coefficient: ν, from pre-activations to a tensor of the same shape.
    """

    name: str
    coefficient: Coefficient

    def factor_rank(self, parameter_count: int) -> int:
        """Returns the number of columns of L."""
        return parameter_count

    def fisher_factor_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Returns `L v` at pre-activations."""
        information = self.coefficient(outputs)
        return tf.sqrt(information) * tf.cast(vector, information.dtype)


#: Independent units, or the one distribution over all units of a layer.
Response: TypeAlias = UnitResponse | Categorical


def response_name(response: Response) -> str:
    """Returns the name of a response, for the summary."""
    return response.name if isinstance(response, UnitResponse) else "softmax"


def find_response(
    activation: Any, options: ResponseOptions, layer_name: str
) -> Response:
    """Returns the response that belongs to an activation.

    Args:
        activation: A function or an activation layer.
        options: `ResponseOptions`.
        layer_name: For error messages.

    Raises:
        ValueError: If the activation has no closed form, and none can be
            derived from its derivative.
    """
    if isinstance(activation, keras.layers.Activation):
        activation = activation.activation
    name = getattr(activation, "__name__", None) or type(activation).__name__
    if activation is keras.activations.softmax or (
        isinstance(activation, keras.layers.Softmax) and activation.axis == -1
    ):
        return Categorical()
    known = _closed_form(activation, options)
    if known is not None:
        return UnitResponse(name, known)
    if options.other_response is None:
        raise ValueError(
            f"The activation {name!r} of the layer {layer_name!r} has no "
            "closed form of the relative Fisher information. State how its "
            "units respond, e.g. other_response='gaussian'. Received: "
            "other_response=None"
        )
    _check_elementwise(activation, name, layer_name)
    derived = functools.partial(_derived, activation, options)
    return UnitResponse(f"{name} ({options.other_response})", derived)


def _closed_form(
    activation: Any, options: ResponseOptions
) -> Coefficient | None:
    layers, functions = keras.layers, keras.activations
    noise = options.noise_scale
    if activation is functions.tanh:
        return relative.tanh_information
    if activation is functions.sigmoid:
        return relative.sigmoid_information
    if activation is functions.linear:
        return functools.partial(relative.linear_information, noise_scale=noise)
    if activation is functions.elu:
        return _elu(1.0, options)
    if isinstance(activation, layers.ELU):
        return _elu(float(activation.alpha), options)
    if activation is functions.relu:
        return _rectifier(lambda: 0.0, options)
    if activation is functions.leaky_relu:
        return _rectifier(lambda: 0.2, options)
    if isinstance(activation, layers.LeakyReLU):
        return _rectifier(lambda: float(activation.negative_slope), options)
    if isinstance(activation, layers.PReLU):
        return _rectifier(lambda: activation.alpha.value, options)
    if isinstance(activation, layers.ReLU):
        if activation.max_value is None and not activation.threshold:
            return _rectifier(lambda: float(activation.negative_slope), options)
    return None


def _elu(alpha: float, options: ResponseOptions) -> Coefficient:
    return functools.partial(
        relative.elu_information, alpha=alpha, noise_scale=options.noise_scale
    )


def _rectifier(
    slope: Callable[[], Any], options: ResponseOptions
) -> Coefficient:
    def coefficient(t: tf.Tensor) -> tf.Tensor:
        return relative.relu_information(
            t, slope(), options.softness, options.noise_scale
        )

    return coefficient


def _derived(
    activation: Any, options: ResponseOptions, t: tf.Tensor
) -> tf.Tensor:
    """Returns `f'² / Var`, ν of a mean f(t) in an exponential family."""
    with tf.GradientTape() as tape:
        tape.watch(t)
        mean = activation(t)
    derivative = tape.gradient(mean, t)
    variance = _VARIANCES[str(options.other_response)](mean)
    if options.other_response == "gaussian":
        variance *= tf.cast(options.noise_scale, variance.dtype) ** 2
    return tf.math.divide_no_nan(tf.square(derivative), variance)


def _check_elementwise(activation: Any, name: str, layer_name: str) -> None:
    """Raises unless the activation acts on each unit alone, with a slope."""

    def refuse(reason: str) -> ValueError:
        return ValueError(
            f"The activation {name!r} of the layer {layer_name!r} {reason}, so "
            "that its relative Fisher information cannot be derived. Leave "
            "the layer out with `optimizer.attach(model, exclude=[...])`, or "
            f"use horizon='full'. Received: activation={activation!r}"
        )

    t = tf.constant(_PROBE, keras.config.floatx())
    with tf.GradientTape() as tape:
        tape.watch(t)
        values = tf.convert_to_tensor(activation(t))
    if values.shape != t.shape:
        raise refuse("does not keep the shape of its argument")
    if tape.gradient(values, t) is None:
        raise refuse("has no derivative")
    # Outside of the graph that is being traced, if any.
    with tf.init_scope():
        moved = [[0, 1]]
        first = tf.constant(_PROBE, t.dtype)
        second = tf.tensor_scatter_nd_add(
            first, moved, tf.constant([0.5], t.dtype)
        )
        changed = tf.not_equal(activation(first), activation(second))
        changed = tf.tensor_scatter_nd_update(changed, moved, [False])
        if bool(tf.reduce_any(changed)):
            raise refuse("does not act on each unit alone")
