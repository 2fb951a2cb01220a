"""What AutoGraph converts: the functions of users, not this package."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def converted(function: Any) -> Any:
    """Returns a user's function as AutoGraph sees it where this is called.

    AutoGraph is told not to convert the package; a function that is handed
    over to it keeps its conversion, as in Keras's own training steps.

    Args:
        function: Any function.
    """
    context = tf.__internal__.autograph.control_status_ctx()
    return tf.__internal__.autograph.tf_convert(function, context)
