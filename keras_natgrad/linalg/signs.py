"""Random signs."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def random_signs(shape: Any, seed: Any, dtype: Any) -> tf.Tensor:
    """Returns independent ±1, the same for the same seed.

    Args:
        shape: Shape of the result, a tensor or a sequence.
        seed: int32 `[2]`.
        dtype: Dtype of the result.
    """
    # The algorithm is named so that a compiled step draws the same signs.
    bits = tf.random.stateless_uniform(
        shape, seed=seed, minval=0, maxval=2, dtype=tf.int32, alg="philox"
    )
    return tf.cast(2 * bits - 1, dtype)
