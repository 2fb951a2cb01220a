"""The arguments of an optimizer, as they are saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base class of the own arguments of an optimizer.

    One frozen dataclass per optimizer is the only list of its arguments: the
    saved config, the integrations and the tuner read its fields.

    Attributes:
        log_statistics: Whether `fit` logs the statistics.
        rate: What `learning_rate` says beyond a number or a schedule: "auto",
            a `LineSearch` or a `StepRule`; otherwise `None`.
    """

    log_statistics: bool = False
    rate: Any = None

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Returns the names of the arguments."""
        names = (each.name for each in dataclasses.fields(cls))
        return tuple(name for name in names if name != "rate")

    def to_config(self) -> dict[str, Any]:
        """Returns the arguments as plain values and serialized objects."""
        config = {name: _plain(getattr(self, name)) for name in self.names()}
        if self.rate is not None:
            config["learning_rate"] = _plain(self.rate)
        return config


def _plain(value: Any) -> Any:
    """Returns what a saved config can hold of a value."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if hasattr(value, "to_config"):
        return value.to_config()
    return keras.saving.serialize_keras_object(value)
