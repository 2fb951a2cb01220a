"""The forward pass inside a training step of tf_keras."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import tensorflow as tf

from keras_natgrad._compat import flatten_layers
from keras_natgrad.capture import Taps

# Attribute in which a recording `call` keeps the original one.
_ORIGINAL = "_keras_natgrad_original"

_NO_FORWARD_PASS = (
    "No forward pass of the attached model was seen before this step. Call "
    "the model once, with training=True, in the same tf.function or eagerly "
    "as the optimizer; loss scaling and steps of other models are not "
    "supported. Received: model={name!r}"
)
_SEVERAL_PASSES = (
    "The attached model was called several times with training=True before "
    "one step, so it is not clear which call determines the curvature. "
    "Received: model={name!r}"
)


class ForwardPass:
    """One recorded call of a model, in place of a `CurvatureTape`.

    The tape of the training step belongs to tf_keras and is not persistent. A
    second tape records what is needed to send cotangents from the outputs back
    to the layers.

    Attributes:
        taps: `Taps` on the layers.
        gradient_tape: A persistent tape.
        graph: The graph of the call, `None` for eager execution.
        model_outputs: What the model returned.
        terms: `OutputTerm`s, once known.
        loss: Scalar loss; zero if it is unknown.
        objective: `None`, as the loss cannot be evaluated again.
        calls: How often the model was called in this graph.
    """

    terms: Sequence[Any] | None = None
    loss: Any = None
    objective: None = None

    def __init__(self, model: Any) -> None:
        self.taps = Taps(flatten_layers(model))
        self.gradient_tape = tf.GradientTape(persistent=True)
        self.graph = _current_graph()
        self.model_outputs: Any = None
        self.calls = 1

    def run(self, call: Callable[[], Any]) -> Any:
        """Calls the model and records its layers."""
        with self.gradient_tape, self.taps:
            self.model_outputs = call()
        return self.model_outputs


class Recorder:
    """Keeps the last forward pass of a model until a step takes it."""

    def __init__(self) -> None:
        self._last: ForwardPass | None = None

    def install(self, model: Any) -> None:
        """Puts an instance `call` on a model, for its training mode.

        Other modes run as before. Taps are on the layers only during a call.
        """
        remove_taps(model)
        # SavedModel needs a bound method.
        method = MethodType(self._recording(model.call), model)
        object.__setattr__(model, "call", method)

    def take(self, name: str) -> ForwardPass:
        """Returns the forward pass of a step, and forgets it.

        Args:
            name: Name of the model, for the error.

        Raises:
            ValueError: If there is none, or several.
        """
        last, self._last = self._last, None
        if last is None or last.graph is not _current_graph():
            raise ValueError(_NO_FORWARD_PASS.format(name=name))
        if last.calls > 1:
            raise ValueError(_SEVERAL_PASSES.format(name=name))
        return last

    def _recording(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def call(model: Any, *args: Any, **kwargs: Any) -> Any:
            arguments = signature.bind(*args, **kwargs).arguments
            if not _in_training(signature, arguments):
                return original(*args, **kwargs)
            forward = ForwardPass(model)
            last = self._last
            if last is not None and last.graph is forward.graph is not None:
                forward.calls += last.calls
            self._last = forward
            return forward.run(lambda: original(*args, **kwargs))

        vars(call)[_ORIGINAL] = original
        return call


def remove_taps(model: Any) -> None:
    """Removes the instance `call` from a model."""
    original = getattr(vars(model).get("call"), _ORIGINAL, None)
    if original is None:
        return
    object.__delattr__(model, "call")
    # A `call` that was set on the instance before is restored.
    if getattr(original, "__func__", None) is not type(model).call:
        object.__setattr__(model, "call", original)


def _in_training(signature: Any, arguments: Any) -> bool:
    """Returns whether a call is for training, which is the default."""
    if "training" not in signature.parameters:
        return True
    training = arguments.get("training")
    return training is not None and (tf.is_tensor(training) or bool(training))


def _current_graph() -> Any:
    if tf.executing_eagerly():
        return None
    return tf.compat.v1.get_default_graph()
