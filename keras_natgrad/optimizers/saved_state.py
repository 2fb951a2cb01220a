"""Whether a saved state fits the optimizer that is to take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_MISFIT = (
    "The saved state does not fit this {name} optimizer: {reason}. It was "
    "saved by another version of keras_natgrad, or with other settings. Load "
    "the model with `keras.models.load_model(path, compile=False)` and compile "
    "it with a new optimizer."
)


def check_saved(name: str, store: Any, variables: Sequence[Any]) -> None:
    """Raises ValueError unless a state can be loaded as a whole.

    Keras itself only warns, and goes on with a new state.

    Args:
        name: Name of the optimizer's class.
        store: The saved arrays, under `"0"`, `"1"`, and so on.
        variables: The `keras.Variable`s that take them.
    """
    reason = ""
    if len(store.keys()) != len(variables):
        reason = f"it has {len(store.keys())} variables, not {len(variables)}"
    else:
        for index, variable in enumerate(variables):
            shape = tuple(store[str(index)].shape)
            if shape != tuple(variable.shape):
                reason = (
                    f"{variable.name!r} has the shape {tuple(variable.shape)}, "
                    f"not {shape}"
                )
    if reason:
        raise ValueError(_MISFIT.format(name=name, reason=reason))
