"""What `learning_rate=` and `momentum=` accept, in every optimizer."""

from __future__ import annotations

from typing import Any

import keras

from keras_natgrad.checks import is_number
from keras_natgrad.step.line_search import LineSearch
from keras_natgrad.step.rule import StepRule
from keras_natgrad.step.spring import Spring


def get_learning_rate(identifier: Any, automatic: bool = True) -> Any:
    """Returns a learning rate for Keras, and what else was said.

    Args:
        identifier: A float, a schedule or a callable; `"auto"`; a
            `LineSearch` or a `StepRule`, or the config of one.
        automatic: Whether `"auto"` and a `StepRule` are allowed.

    Returns:
        A pair: what Keras takes as a learning rate, and `"auto"`, the
        `LineSearch`, the `StepRule` or `None`. The first is 1.0 if there is
        a second.

    Raises:
        ValueError: If it is another string, or a class.
    """
    if isinstance(identifier, type):
        raise ValueError(
            "`learning_rate` must be an instance of "
            f"{identifier.__name__}: write `{identifier.__name__}()`. "
            f"Received: {identifier!r}"
        )
    if isinstance(identifier, dict) and "class_name" in identifier:
        identifier = keras.saving.deserialize_keras_object(identifier)
    if isinstance(identifier, LineSearch):
        return 1.0, identifier
    if automatic and isinstance(identifier, StepRule):
        return 1.0, identifier
    if automatic and identifier == "auto":
        return 1.0, identifier
    if isinstance(identifier, (str, StepRule)):
        also = "'auto', " if automatic else ""
        raise ValueError(
            f"`learning_rate` must be {also}a float, a schedule, a "
            "callable or a keras_natgrad.LineSearch. "
            f"Received: learning_rate={identifier!r}"
        )
    return identifier, None


def get_momentum(
    identifier: Any, rate: Any = None, automatic: bool = True
) -> float | str | Spring:
    """Returns a momentum: `"auto"`, a float or a `Spring`.

    Args:
        identifier: One of these, or the config of a `Spring`.
        rate: What `get_learning_rate` found beside a number.
        automatic: Whether `"auto"` is allowed.

    Raises:
        ValueError: If it is something else, or if a `StepRule` decides.
    """
    if isinstance(identifier, dict):
        identifier = keras.saving.deserialize_keras_object(identifier)
    if isinstance(rate, StepRule) and identifier != "auto":
        raise ValueError(
            "A StepRule decides on the momentum; give it to the rule. "
            f"Received: momentum={identifier!r}, learning_rate={rate!r}"
        )
    if isinstance(identifier, Spring):
        return identifier
    if automatic and isinstance(identifier, str) and identifier == "auto":
        return "auto"
    if is_number(identifier) and 0 <= identifier < 1:
        return float(identifier)
    also = "'auto', " if automatic else ""
    raise ValueError(
        f"`momentum` must be {also}a float in [0, 1) or a "
        "keras_natgrad.Spring. "
        f"Received: momentum={identifier!r}"
    )
