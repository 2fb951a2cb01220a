"""From compiled losses and outputs to the terms of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad import heads
from keras_natgrad._compat import compiled_losses, keras_mask
from keras_natgrad.curvature import OutputTerm


def compiled_terms(
    model: keras.Model,
    outputs: Any,
    targets: Any,
    sample_weight: Any,
    head: Any = None,
) -> list[OutputTerm]:
    """Returns one term per loss that `compile` set up.

    Args:
        model: A compiled model whose loss has been called.
        outputs: The model's outputs.
        targets: Targets, of the same structure.
        sample_weight: `None`, one tensor, or the same structure.
        head: Head (or a structure of heads like the losses) that replaces
            what the losses say.

    Raises:
        ValueError: If a loss has no known head and none is given, or a head
            does not fit its output.
    """
    terms = []
    for entry in compiled_losses(model):
        own_outputs = _resolve(entry.path, outputs)
        own_head = _head_of(head, entry.path)
        found, weight = _find_head(entry.loss, own_head, own_outputs)
        found.validate(tuple(own_outputs.shape))
        own_targets = _resolve(entry.path, targets)
        own_weight = sample_weight
        if sample_weight is not None and keras.tree.is_nested(sample_weight):
            own_weight = _resolve(entry.path, sample_weight)
        coefficients = weight.coefficients(
            own_outputs, own_weight, keras_mask(own_outputs)
        )
        if entry.weight is not None:
            coefficients *= tf.cast(entry.weight, coefficients.dtype)
        terms.append(OutputTerm(own_outputs, found, coefficients, own_targets))
    return terms


def mean_terms(outputs: Any, head: Any) -> list[OutputTerm]:
    """Returns terms of a loss that is the mean of `−log p` over examples.

    Args:
        outputs: The model's outputs.
        head: A head, or a list or dictionary of heads like the outputs.
    """
    flat = keras.tree.flatten(outputs)
    flat_heads = (
        keras.tree.flatten(head)
        if keras.tree.is_nested(head)
        else [head for _ in flat]
    )
    terms = []
    for own_outputs, own_head in zip(flat, flat_heads, strict=True):
        own_head = heads.get(own_head)
        own_head.validate(tuple(own_outputs.shape))
        coefficients = heads.LossWeight().coefficients(own_outputs)
        terms.append(OutputTerm(own_outputs, own_head, coefficients))
    return terms


def check_support(terms: Sequence[OutputTerm]) -> None:
    """Raises ValueError for targets outside a head's support, eagerly."""
    for term in terms:
        if term.targets is not None and tf.executing_eagerly():
            term.head.validate_targets(term.outputs, term.targets)


def in_support(terms: Sequence[OutputTerm]) -> tf.Tensor:
    """Returns whether all targets lie in their head's support."""
    result = tf.constant(True)
    for term in terms:
        if term.targets is not None:
            result &= term.head.targets_in_support(term.outputs, term.targets)
    return result


def has_weight(terms: Sequence[OutputTerm]) -> tf.Tensor:
    """Returns whether any example of the batch counts."""
    totals = [tf.reduce_sum(term.coefficients) for term in terms]
    return tf.reduce_any([total > 0 for total in totals])


def _find_head(loss: Any, head: Any, outputs: Any) -> Any:
    if head is None:
        return heads.from_loss(loss, tuple(outputs.shape))
    # The reduction is the loss's own; what it reduces is one value per
    # position, as for every head.
    reduction = getattr(loss, "reduction", "sum_over_batch_size")
    return heads.get(head), heads.LossWeight(reduction=reduction)


def _head_of(head: Any, path: tuple[Any, ...]) -> Any:
    if isinstance(head, (list, tuple, dict)):
        return _resolve(path, head)
    return head


def _resolve(path: tuple[Any, ...], structure: Any) -> Any:
    for key in path:
        structure = structure[key]
    return structure
