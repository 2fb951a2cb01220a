"""Whether an optimizer and the model that it is to train belong together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

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
