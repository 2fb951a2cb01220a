"""A recorded forward pass, ready to send cotangents back through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from keras_natgrad.capture import LayerRecord, check_gradients, is_off_tape
from keras_natgrad.curvature.cotangents import OutputTerm, example_weights
from keras_natgrad.curvature.entry import Entry
from keras_natgrad.heads.tensors import as_parameters


@dataclass(frozen=True)
class Backward:
    """What one backward pass brought to the layers.

    Attributes:
        cotangents: Per captured entry, `g` of `[(groups,) batch, shared,
            columns]`.
        gradients: Per fallback entry, the `[rows, columns]` gradient summed
            over the batch.
        sizes: Squared norms of the cotangents sent back, one per example,
            `[batch]`: each one's part in the trace of the output Fisher.
    """

    cotangents: list[tf.Tensor]
    gradients: list[tf.Tensor]
    sizes: tf.Tensor


class CapturedPass:
    """The canonical inputs of a forward pass, and its way back.

    Args:
        tape: Persistent tape of the forward pass.
        terms: The network's outputs.
        records: One `LayerRecord` per captured entry.
        entries: All entries, captured ones first.
        variables: All variables, as `tf.Variable`s.
        share: This replica's share of the examples' weights, `None` where
            there is one replica.

    Raises:
        ValueError: If the outputs depend on the weights of a layer that was
            not recorded, or (in `backward`) not by the tape.
    """

    def __init__(
        self,
        tape: tf.GradientTape,
        terms: Sequence[OutputTerm],
        records: Sequence[LayerRecord],
        entries: Sequence[Entry],
        variables: Sequence[Any],
        share: tf.Tensor | None = None,
    ) -> None:
        self.tape = tape
        self.share = share
        self.terms = list(terms)
        self.records = list(records)
        self.captured = [entry for entry in entries if entry.layer is not None]
        self.fallbacks = [entry for entry in entries if entry.layer is None]
        self.variables = list(variables)
        #: Number of examples.
        self.batch = tf.shape(self.terms[0].outputs)[0]
        self.inputs = [
            record.canonical_inputs(entry.block.dtype, self.batch)
            for entry, record in zip(self.captured, self.records, strict=True)
        ]
        self.weights = example_weights(terms)
        self._is_checked = False
        self._check([not record.preactivations for record in self.records])

    @property
    def is_half(self) -> bool:
        """Whether anything in the pass is float16, which overflows early."""
        tensors = [term.outputs for term in self.terms]
        for record in self.records:
            tensors += record.preactivations
        return any(tensor.dtype == tf.float16 for tensor in tensors)

    def backward(self, cotangents: Sequence[tf.Tensor]) -> Backward:
        """Sends one cotangent per output back through the network."""
        rest = [self.variables[entry.variables[0]] for entry in self.fallbacks]
        gradients, rest_gradients = self.tape.gradient(
            [term.outputs for term in self.terms],
            ([list(record.preactivations) for record in self.records], rest),
            output_gradients=list(cotangents),
        )
        if not self._is_checked:
            self._is_checked = True
            self._check(
                [
                    is_off_tape(self.tape, record, sent, own)
                    for record, sent, own in zip(
                        self.records, gradients, self._own(), strict=True
                    )
                ]
            )
        canonical = [
            record.canonical_cotangents(g, entry.block.dtype, self.batch)
            for entry, record, g in zip(
                self.captured, self.records, gradients, strict=True
            )
        ]
        matrices = []
        for entry, variable, gradient in zip(
            self.fallbacks, rest, rest_gradients, strict=True
        ):
            if gradient is None:
                gradient = tf.zeros_like(variable)
            dense = tf.cast(tf.convert_to_tensor(gradient), entry.block.dtype)
            matrices.append(tf.reshape(dense, entry.block.shape.matrix))
        sizes = tf.add_n(
            [
                tf.reduce_sum(
                    tf.reshape(
                        tf.square(as_parameters(cotangent)), [self.batch, -1]
                    ),
                    axis=1,
                )
                for cotangent in cotangents
            ]
        )
        return Backward(canonical, matrices, sizes)

    def _own(self) -> list[list[Any]]:
        """Returns the variables of every captured entry."""
        return [
            [self.variables[index] for index in entry.variables]
            for entry in self.captured
        ]

    def _check(self, suspects: Sequence[bool]) -> None:
        """Raises ValueError if suspected layers act on the outputs."""
        check_gradients(
            self.tape,
            [term.outputs for term in self.terms],
            [
                (record, own)
                for record, own, suspect in zip(
                    self.records, self._own(), suspects, strict=True
                )
                if suspect
            ],
        )
