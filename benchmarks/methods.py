"""The Keras optimizers in the race, and the grids they are tuned over."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping
from typing import Any

import keras

from benchmarks.muon import Muon

FIRST_ORDER = ("sgd", "adam", "muon")
CURVATURE = {"kfac": "KFAC", "rngd": "RNGD", "prong": "PRONG"}

LEARNING_RATES: dict[str, tuple[float, ...]] = {
    "sgd": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    "adam": (0.0003, 0.001, 0.002, 0.004, 0.01, 0.03, 0.1),
    "muon": (0.0003, 0.001, 0.002, 0.004, 0.01, 0.03, 0.1),
}
"""Learning rates tried by the tuner. Those of SGD are for the summed loss and
are divided by the task's `loss_scale`; the others do not depend on it."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """The tuned part of a first-order contender.

    Attributes:
        learning_rate: The learning rate, or its first value under a
            schedule. `None` keeps the optimizer's default.
        horizon: Steps over which a cosine takes the learning rate to zero.
            `None` keeps the learning rate constant.
    """

    learning_rate: float | None = None
    horizon: int | None = None

    def schedule(self) -> float | keras.optimizers.schedules.CosineDecay:
        """Returns what the optimizer takes as `learning_rate`."""
        if self.horizon is None:
            return self.learning_rate
        return keras.optimizers.schedules.CosineDecay(
            self.learning_rate, self.horizon
        )


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer by name, with arguments for its constructor.

    Attributes:
        name: The whole text it was parsed from; labels the results.
        optimizer: `"kfac"`, `"rngd"`, `"prong"`, `"sgd"`, `"adam"` or
            `"muon"`.
        options: Arguments for the optimizer's constructor.
    """

    name: str
    optimizer: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(
        cls, text: str, defaults: Mapping[str, Any] | None = None
    ) -> Method:
        """Parses `name` or `name:key=value,key=value`.

        Args:
            text: For example `"kfac"` or `"adam:learning_rate=0.01"`.
            defaults: Arguments that the text may override.

        Returns:
            The method.

        Raises:
            ValueError: If the optimizer is unknown.

        Example:

        >>> Method.parse("adam:beta_1=0.5").options
        {'beta_1': 0.5}
        """
        optimizer, _, rest = text.partition(":")
        known = (*CURVATURE, *FIRST_ORDER)
        if optimizer not in known:
            raise ValueError(
                f"The optimizer must be one of {known}. Received: text={text!r}"
            )
        pairs = rest.split(",") if rest else []
        options = {**(defaults or {}), **parse_options(pairs)}
        return cls(text, optimizer, options)

    @property
    def first_order(self) -> bool:
        """Whether the learning rate is tuned for each task."""
        return self.optimizer in FIRST_ORDER

    def build(
        self, model: keras.Model, setting: Setting
    ) -> keras.optimizers.Optimizer:
        """Makes the optimizer for a built model."""
        options = dict(self.options)
        if setting.learning_rate is not None:
            options["learning_rate"] = setting.schedule()
        if self.optimizer in CURVATURE:
            import keras_natgrad

            kind = getattr(keras_natgrad, CURVATURE[self.optimizer])
            return kind(**options).attach(model)
        return _FACTORIES[self.optimizer](**options)


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """Parses `key=value` texts; values are Python literals or plain text."""
    options = {}
    for pair in pairs:
        key, found, value = pair.partition("=")
        if not found:
            raise ValueError(f"Expected 'key=value'. Received: {pair!r}")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return options


def learning_rates(method: Method, loss_scale: float) -> list[float]:
    """Returns the learning rates that a first-order method is tuned over."""
    scale = 1.0 / loss_scale if method.optimizer == "sgd" else 1.0
    return [rate * scale for rate in LEARNING_RATES[method.optimizer]]


def _sgd(**options) -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(
        **{"momentum": 0.9, "nesterov": True, **options}
    )


def _muon(**options) -> keras.optimizers.Optimizer:
    # As its documentation asks: Adam on the output layer (and, always, on
    # biases). Its weight decay is off, since no other contender has any.
    defaults = {
        "exclude_layers": ["output"],
        "weight_decay": None,
        "adam_weight_decay": None,
    }
    return Muon(**{**defaults, **options})


_FACTORIES = {"sgd": _sgd, "adam": keras.optimizers.Adam, "muon": _muon}
