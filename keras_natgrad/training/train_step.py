"""Keras's training step with a curvature tape in place of its tape."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad import _compat
from keras_natgrad.capture import CurvatureTape
from keras_natgrad.training.terms import (
    check_support,
    compiled_choices,
    compiled_terms,
)


def install(model: keras.Model) -> None:
    """Gives a model the training step of this package.

    The step is an attribute of the instance: the class, config and saved file
    of the model do not change. A model whose class overrides `train_step` keeps
    its own step, and uses `CurvatureTape` there.

    Args:
        model: A `keras.Model`.
    """
    if type(model).train_step is not keras.Model.train_step:
        return
    if getattr(model.train_step, "__func__", None) is train_step:
        return
    # Bypasses Keras's attribute tracking: this is not state.
    object.__setattr__(model, "train_step", MethodType(train_step, model))
    # A training function that Keras made earlier holds the old step.
    model.train_function = None


class _Hooked:
    """A training function that calls `after_step()` of the optimizer."""

    def __init__(self, function: Callable[..., Any], model: Any) -> None:
        self.function = function
        self._model = weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        logs = self.function(*args, **kwargs)
        model = self._model()
        optimizer = curvature_optimizer(getattr(model, "optimizer", None))
        if optimizer is not None and optimizer.steps_outside:
            optimizer.after_step()
        return logs


def install_hook(model: keras.Model) -> None:
    """Makes `fit` call the optimizer's `after_step()` between steps.

    Args:
        model: A `keras.Model` with the training step of this package.
    """
    if getattr(model.make_train_function, "__func__", None) is _make_hooked:
        return
    object.__setattr__(
        model, "make_train_function", MethodType(_make_hooked, model)
    )
    model.train_function = None


def _make_hooked(model: keras.Model, force: bool = False) -> Any:
    if isinstance(model.train_function, _Hooked) and not force:
        return model.train_function
    type(model).make_train_function(model, force)
    model.train_function = _Hooked(model.train_function, model)
    return model.train_function


def curvature_optimizer(optimizer: Any) -> Any:
    """Returns the optimizer of this package inside wrappers, or `None`.

    Raises:
        ValueError: If there are several.
    """
    found = [
        candidate
        for candidate in _compat.wrapped_optimizers(optimizer)
        if hasattr(candidate, "receive_curvature")
    ]
    if len(found) > 1:
        raise ValueError(
            "A model takes one optimizer of keras_natgrad; let an optimizer of "
            "Keras train its other variables, or let one train them all. "
            f"Received: {[each.name for each in found]}"
        )
    return found[0] if found else None


def train_step(model: keras.Model, data: Any) -> dict[str, Any]:
    """Trains on one batch; a drop-in for `keras.Model.train_step`.

    If the compiled optimizer is not from this package, it is Keras's own step.

    Args:
        model: The model.
        data: What `fit` passes: x, (x, y) or (x, y, sample_weight).

    Returns:
        The logs: metrics, and the optimizer's statistics if requested.
    """
    optimizer = curvature_optimizer(model.optimizer)
    if optimizer is None:
        return type(model).train_step(model, data)
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    restore = _restorer(model) if optimizer.needs_objective else None

    def total_loss() -> tuple[Any, Any]:
        y_pred = _compat.call_with_training(model, x)
        return y_pred, _compat.compute_loss(model, x, y, y_pred, sample_weight)

    def objective() -> tf.Tensor:
        assert restore is not None
        return restore(lambda: total_loss()[1])

    with CurvatureTape(optimizer, objective) as tape:
        y_pred, loss = total_loss()
        first = next(part for part in keras.tree.flatten(x) if part is not None)
        _compat.update_loss_tracker(model, loss, tf.shape(first)[0])
        # Without a compiled loss the tape needs a head, as in a custom loop.
        if _compat.compiled_losses(model):
            outputs, targets = _compat.like_losses(model, y_pred, y)
            head = optimizer.attached_head()
            choices = compiled_choices(
                model, outputs, head, optimizer.uses_targets
            )
            optimizer.receive_choices(choices)
            terms = compiled_terms(
                model, choices, outputs, targets, sample_weight
            )
            check_support(terms)
            tape.observe(terms)
        tape.loss = loss
        loss = model.optimizer.scale_loss(loss)
    variables = model.trainable_variables
    if not variables:
        warnings.warn(
            "The model does not have any trainable weights.", stacklevel=2
        )
        return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
    if not model.optimizer.built:
        # A wrapper may pass only some variables to the optimizer.
        model.optimizer.build(variables)
    gradients = tape.gradient(loss, variables)
    model.optimizer.apply_gradients(zip(gradients, variables, strict=True))
    logs = model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
    return {**logs, **optimizer.step_logs()}


def _restorer(model: keras.Model) -> Callable[[Callable[[], Any]], Any]:
    """Makes a second forward pass repeat the first one without side effects.

    Dropout seeds and batch statistics are non-trainable variables. They are
    restored to their values before the step for the second pass, and to their
    present values after it, as are the metrics that a loss updates.
    """
    state = list(model.non_trainable_variables)
    before = [tf.identity(variable.value) for variable in state]

    def repeat(function: Callable[[], Any]) -> Any:
        metrics = list(model.metrics_variables)
        kept = [tf.identity(v.value) for v in [*state, *metrics]]
        for variable, value in zip(state, before, strict=True):
            variable.assign(value)
        with tf.control_dependencies(before):
            result = function()
        with tf.control_dependencies([result]):
            for variable, value in zip([*state, *metrics], kept, strict=True):
                variable.assign(value)
        return result

    return repeat
