"""Finds the head for the outputs of a tf_keras model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tf_keras

from keras_natgrad._compat import has_loss_weights
from keras_natgrad.curvature import OutputTerm
from keras_natgrad.heads.losses import find_head
from keras_natgrad.training.terms import mean_terms

_REDUCTIONS = {
    "auto": "sum_over_batch_size",
    "sum_over_batch_size": "sum_over_batch_size",
    "sum": "sum",
}
_GIVE_A_HEAD = (
    "{problem} Say what distribution the outputs parametrise with "
    "`optimizer.attach(model, head=keras_natgrad.heads.<Head>(...))`. "
    "Received: loss={loss!r}"
)


def output_terms(model: Any, outputs: Any, head: Any) -> Sequence[OutputTerm]:
    """Returns the terms of the loss, for the Fisher.

    Args:
        model: The attached model.
        outputs: Its outputs.
        head: What `attach` was given. The loss is then the mean of `−log p`
            over examples; without a head the compiled loss determines it.

    Raises:
        ValueError: If there is no head, and none is known for the loss.
    """
    if head is not None:
        return mean_terms(outputs, head)
    loss = getattr(model, "loss", None)
    if loss is None:
        problem = "The model is not compiled with a loss."
        raise ValueError(_GIVE_A_HEAD.format(problem=problem, loss=loss))
    if isinstance(loss, (list, tuple, dict)) or has_loss_weights(model):
        problem = "Several losses, or loss weights, do not determine a head."
        raise ValueError(_GIVE_A_HEAD.format(problem=problem, loss=loss))
    same = keras_loss(loss)
    found = None if same is None else find_head(same, tuple(outputs.shape))
    if found is None or found[1].ignore_class is not None:
        problem = "No head is known for the model's loss."
        raise ValueError(_GIVE_A_HEAD.format(problem=problem, loss=loss))
    own, weight = found
    return [OutputTerm(outputs, own, weight.coefficients(outputs))]


def keras_loss(loss: Any) -> Any:
    """Returns the loss of Keras 3 that equals one of tf_keras.

    Args:
        loss: A name, a function or a `tf_keras.losses.Loss`.

    Returns:
        A loss or function of Keras 3, or `None`.
    """
    if isinstance(loss, str):
        loss = tf_keras.losses.get(loss)
    is_loss = isinstance(loss, tf_keras.losses.Loss)
    name = type(loss).__name__ if is_loss else getattr(loss, "__name__", "")
    own = type(loss) if is_loss else loss
    if getattr(tf_keras.losses, name, None) is not own:
        return None  # Defined by the user or another package.
    if not hasattr(keras.losses, name):
        return None
    if not is_loss:
        return keras.losses.get(name)
    config = dict(loss.get_config())
    config.pop("fn", None)  # The function behind the class.
    reduction = _REDUCTIONS.get(str(config.pop("reduction")))
    if reduction is None:
        return None
    return getattr(keras.losses, name)(reduction=reduction, **config)
