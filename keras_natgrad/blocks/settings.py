"""Options of an object that travel in a config."""

from __future__ import annotations

import inspect
from enum import Enum
from typing import Any

from typing_extensions import Self


class Settings:
    """An object whose constructor takes options, and nothing else."""

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """Returns the names of the constructor's arguments."""
        return tuple(inspect.signature(cls).parameters)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, from attributes of their name.

        A subclass whose attributes have other names, or are no plain data,
        overrides it.
        """
        config = {}
        for name in self.option_names():
            value = getattr(self, name)
            config[name] = value.value if isinstance(value, Enum) else value
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Recreates the object from `get_config`."""
        return cls(**config)
