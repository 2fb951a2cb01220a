"""Heads from names and saved configurations."""

from typing import Any

import keras

from keras_natgrad.heads.base import Head
from keras_natgrad.heads.bernoulli import Bernoulli
from keras_natgrad.heads.categorical import Categorical
from keras_natgrad.heads.normal import Normal

_HEADS: dict[str, type[Head]] = {
    head.__name__.lower(): head for head in (Bernoulli, Categorical, Normal)
}


def get(identifier: Any) -> Head:
    """Retrieves a head.

    Args:
        identifier: A `Head`, which is returned as it is; a subclass of `Head`;
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
        head = _HEADS.get(
            identifier.lower()
        ) or keras.saving.get_registered_object(identifier)
    if isinstance(head, type) and issubclass(head, Head):
        head = head()
    if not isinstance(head, Head):
        raise ValueError(
            "A head is an instance of keras_natgrad.heads.Head, a dictionary "
            "made by keras.saving.serialize_keras_object(head), or one of the "
            f"names {sorted(_HEADS)}. Received: identifier={identifier!r}"
        )
    return head
