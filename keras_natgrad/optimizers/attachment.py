"""The model that an optimizer trains, and what `attach` was told of it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import keras

from keras_natgrad.capture import Plan, make_plan, match_layers
from keras_natgrad.capture.selectors import pattern_name
from keras_natgrad.optimizers.coverage import warn_of_plan
from keras_natgrad.step import Direction
from keras_natgrad.training.loss_heads import (
    LossHead,
    declared_rows,
    warn_of_fallbacks,
)

NOT_ATTACHED = (
    "This {name} optimizer is not attached to a model, so it cannot see the "
    "layers whose curvature it needs. Write `optimizer.attach(model)` before "
    "training, or pass `keras_natgrad.callbacks.Attach()` to "
    "`fit(callbacks=...)`. Where Keras has wrapped the optimizer, as under "
    "mixed precision, that is `model.optimizer.inner_optimizer`."
)
_OTHER_MODEL = (
    "This {name} optimizer is attached to the model {model!r}, and was given "
    "variables of another one, {path!r} among them. Attach it to that one, "
    "with `optimizer.attach(model)`; a second model needs an optimizer of its "
    "own."
)
_FROZEN = (
    "Variables that this {name} optimizer was built for are frozen now. Its "
    "momentum and curvature would move them all the same: compile the model "
    "with a new optimizer, e.g. `keras_natgrad.{name}(...).attach(model)`. "
    "Received: {paths}"
)
_EXCLUDED_LATE = (
    "The layers of this {name} optimizer were chosen at its first step; "
    "`exclude` must be given before, or to a new optimizer. "
    "Received: exclude={exclude!r}"
)


class Attachment:
    """A model, held weakly, and the plan of its layers.

    Args:
        name: Name of the optimizer's class, for messages.

    Attributes:
        head: The head given to `attach`, or `None`.
        plan: `Plan` of the layers; from the model, or from a saved config.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._reference: weakref.ref[Any] | None = None
        self._exclude: tuple[Any, ...] = ()
        self._rows: list[tuple[str, str, str]] | None = None
        self.head: Any = None
        self.plan: Plan | None = None

    @property
    def is_made(self) -> bool:
        """Whether there has been a model."""
        return self._reference is not None

    @property
    def is_alive(self) -> bool:
        """Whether there is a model."""
        return self._reference is not None and self._reference() is not None

    def model(self) -> Any:
        """Returns the model.

        Raises:
            ValueError: If there is none.
        """
        model = None if self._reference is None else self._reference()
        if model is None:
            raise ValueError(NOT_ATTACHED.format(name=self._name))
        return model

    def take(
        self,
        model: Any,
        head: Any,
        exclude: Sequence[Any] | None,
        is_late: bool,
    ) -> None:
        """Notes what `attach` was given.

        What is not given stays as it was for this model.

        Args:
            model: The model.
            head: A head or a structure of heads, or `None`.
            exclude: Patterns of layers, or `None`.
            is_late: Whether the layers have been chosen already.

        Raises:
            ValueError: If `exclude` is no list of patterns, or comes too late.
        """
        if isinstance(exclude, (str, type)):
            raise ValueError(
                f"`exclude` must be a list. Received: exclude={exclude!r}"
            )
        for pattern in exclude or ():
            pattern_name(pattern, "exclude")
        again = self._reference is not None and self._reference() is model
        if is_late and again and exclude is not None:
            check_exclude(self._name, self._exclude, exclude)
        self._reference = weakref.ref(model)
        if head is not None or not again:
            self.head = head
        if exclude is not None or not again:
            self._exclude = tuple(exclude or ())

    def plan_layers(
        self,
        direction: Direction,
        own: Sequence[Any],
        variables: Sequence[Any],
    ) -> None:
        """Plans the layers of the model for a direction.

        Args:
            direction: What treats them.
            own: What the model's layers hold, one per variable.
            variables: The optimizer's variables.
        """
        model = self.model()
        if isinstance(model, keras.Model):
            check_same_model(self._name, model, own)
        plan = direction.choose_layers(make_plan(model, own, self._exclude))
        self.plan = plan
        direction.attach(model, plan, own)
        if direction.has_inverses:
            warn_of_plan(plan, variables)

    def layers(
        self, model: Any, own: Sequence[Any]
    ) -> list[tuple[keras.layers.Layer, int]]:
        """Returns the layer, and which of its maps, of each planned one.

        Args:
            model: A model.
            own: What its layers hold, in the order of the plan.
        """
        assert self.plan is not None
        return match_layers(self.plan, model, own)

    def take_loss_heads(self, found: Sequence[LossHead]) -> None:
        """Notes what stands for each loss; warns of fallbacks once."""
        if self._rows is None:
            warn_of_fallbacks(found)
        self._rows = [each.row() for each in found]

    def loss_rows(self, uses_targets: bool) -> list[tuple[str, str, str]]:
        """Returns output, head and how its Fisher is found, per loss."""
        if self._rows is not None:
            return list(self._rows)
        return declared_rows(self.model(), self.head, uses_targets)


def check_same_model(
    name: str, model: keras.Model, variables: Sequence[Any]
) -> None:
    """Raises ValueError if none of the variables is the model's.

    Args:
        name: Name of the optimizer's class.
        model: The attached model.
        variables: What the optimizer is to train. Some may be those of no
            model, in a training loop of one's own.
    """
    own = {id(variable) for variable in model.variables}
    if variables and not any(id(each) in own for each in variables):
        raise ValueError(
            _OTHER_MODEL.format(
                name=name, model=model.name, path=variables[0].path
            )
        )


def check_trainable(name: str, variables: Sequence[Any]) -> None:
    """Raises ValueError if a variable of the optimizer has been frozen.

    Args:
        name: Name of the optimizer's class.
        variables: Those that the optimizer was built for.
    """
    frozen = [each.path for each in variables if not each.trainable]
    if frozen:
        raise ValueError(_FROZEN.format(name=name, paths=frozen))


def check_exclude(name: str, old: Sequence[Any], new: Sequence[Any]) -> None:
    """Raises ValueError if layers are excluded that have been chosen.

    Args:
        name: Name of the optimizer's class.
        old: `exclude` that the layers were chosen with.
        new: That of another call of `attach`.
    """
    if tuple(old) != tuple(new):
        raise ValueError(_EXCLUDED_LATE.format(name=name, exclude=new))
