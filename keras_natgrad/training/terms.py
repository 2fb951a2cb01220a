"""From compiled losses and outputs to the terms of the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad import heads
from keras_natgrad._compat import (
    compiled_losses,
    keras_mask,
)
from keras_natgrad.curvature import OutputTerm
from keras_natgrad.training.loss_heads import (
    LossHead,
    choose,
    head_of,
    output_name,
)


def compiled_choices(
    model: keras.Model, outputs: Any, head: Any = None, observed: bool = False
) -> list[LossHead]:
    """Returns what represents each loss that `compile` set up.

    Args:
        model: A compiled model whose loss has been called.
        outputs: The model's outputs, in the structure of the losses.
        head: Head (or a structure of heads like the losses) to use instead of
            the losses' own heads.
        observed: Whether the optimizer's Fisher is the empirical one.

    Raises:
        ValueError: If a head does not fit its loss or its output.
    """
    return [
        choose(
            entry.loss,
            output_name(entry.path),
            head_of(head, entry.path),
            tuple(_resolve(entry.path, outputs).shape),
            observed,
        )
        for entry in compiled_losses(model)
    ]


def compiled_terms(
    model: keras.Model,
    choices: Sequence[LossHead],
    outputs: Any,
    targets: Any,
    sample_weight: Any,
) -> list[OutputTerm]:
    """Returns one term per loss that `compile` set up.

    Args:
        model: A compiled model whose loss has been called.
        choices: The result of `compiled_choices`.
        outputs: The model's outputs.
        targets: Targets, of the same structure.
        sample_weight: `None`, one tensor, or the same structure.

    Raises:
        ValueError: If a head does not fit its output.
    """
    terms = []
    for entry, choice in zip(compiled_losses(model), choices, strict=True):
        own_outputs = _resolve(entry.path, outputs)
        own_targets = _resolve(entry.path, targets)
        own_weight = sample_weight
        if sample_weight is not None and keras.tree.is_nested(sample_weight):
            own_weight = _resolve(entry.path, sample_weight)
        term = choice.term(
            own_outputs, own_targets, own_weight, keras_mask(own_outputs)
        )
        if entry.weight is not None:
            factor = tf.cast(entry.weight, term.coefficients.dtype)
            term = dataclasses.replace(
                term, coefficients=factor * term.coefficients
            )
        terms.append(term)
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
    """Raises ValueError for targets outside a head's support; eager only."""
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


def total_weight(terms: Sequence[OutputTerm]) -> tf.Tensor:
    """Returns the sum of all loss coefficients, zero if nothing counts."""
    totals = [tf.reduce_sum(term.coefficients) for term in terms]
    return tf.stop_gradient(tf.add_n(totals))


def _resolve(path: tuple[Any, ...], structure: Any) -> Any:
    for key in path:
        structure = structure[key]
    return structure
