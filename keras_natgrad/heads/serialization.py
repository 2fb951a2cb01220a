"""Heads from names and saved configurations."""

import inspect
from typing import Any

import keras

from keras_natgrad.heads.base import Head


def _named_heads() -> dict[str, type[Head]]:
    """Returns the heads that need no argument, by lower-case names."""
    from keras_natgrad import heads

    public = [getattr(heads, name) for name in heads.__all__]
    return {
        head.__name__.lower(): head
        for head in public
        if isinstance(head, type)
        and _is_complete(head)
        and not _required_arguments(head)
    }


def _is_complete(kind: type) -> bool:
    """Tells whether this is a head class with all methods."""
    return issubclass(kind, Head) and not inspect.isabstract(kind)


def _required_arguments(head: type[Head]) -> list[str]:
    parameters = inspect.signature(head).parameters.values()
    return [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]


def get(identifier: Any) -> Head:
    """Retrieves a head.

    Args:
        identifier: A `Head`, which is returned unchanged; a subclass of `Head`;
            the name of a head, such as `"normal"` or the registered name
            `"my_package>MyHead"`; or a dictionary made by
            `keras.saving.serialize_keras_object(head)`.

    Returns:
        A `Head`; with default arguments unless `identifier` has others.

    Raises:
        ValueError: If `identifier` does not denote a head.

    Example:

    >>> keras_natgrad.heads.get("normal")
    Normal(scale=1.0)
    """
    head = identifier
    if isinstance(identifier, dict):
        head = keras.saving.deserialize_keras_object(identifier)
    elif isinstance(identifier, str):
        head = _named_heads().get(
            identifier.lower()
        ) or keras.saving.get_registered_object(identifier)
    if isinstance(head, type) and _is_complete(head):
        missing = _required_arguments(head)
        if missing:
            raise ValueError(
                f"The head {head.__name__} needs arguments; pass an instance, "
                f"{head.__name__}({', '.join(f'{m}=…' for m in missing)}). "
                f"Received: identifier={identifier!r}"
            )
        head = head()
    if not isinstance(head, Head):
        raise ValueError(
            "A head is an instance of keras_natgrad.heads.Head, a dictionary "
            "made by keras.saving.serialize_keras_object(head), or one of the "
            f"names {sorted(_named_heads())}. "
            f"Received: identifier={identifier!r}"
        )
    return head
