"""A recorded forward pass, ready to send cotangents back through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from keras_natgrad import replicas
from keras_natgrad.capture import MapTrace
from keras_natgrad.capture.eligibility import check_arrivals, check_called
from keras_natgrad.curvature.assignment import Entry
from keras_natgrad.curvature.cotangents import (
    OutputTerm,
    example_weights,
    random_cotangents,
)
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
        records: One `MapTrace` per captured layer, in the order of the plan.
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
        records: Sequence[MapTrace],
        entries: Sequence[Entry],
        variables: Sequence[Any],
        share: tf.Tensor | None = None,
    ) -> None:
        self.tape = tape
        self.share = share
        self.terms = list(terms)
        self.captured = [entry for entry in entries if entry.layer is not None]
        #: Those of `captured`, in the same order.
        self.records = [records[entry.position] for entry in self.captured]
        self.fallbacks = [entry for entry in entries if entry.layer is None]
        self.variables = list(variables)
        #: Number of examples.
        self.batch = tf.shape(self.terms[0].outputs)[0]
        self._inputs: tuple[Any, list[Any]] | None = None
        self._traced_kind = ""
        self._sender: Callable[[tf.Tensor], Backward] | None = None
        self._is_checked = False
        check_called(
            self.tape, self._outputs(), self.records, self._variables()
        )

    @property
    def inputs(self) -> list[Any]:
        """Canonical inputs, one per captured entry.

        They are made in the graph that asks for them, so that they cost
        nothing on steps that do not.
        """
        graph = None
        if not tf.executing_eagerly():
            graph = tf.compat.v1.get_default_graph()
        if self._inputs is None or self._inputs[0] is not graph:
            made = [
                record.canonical_inputs(entry.block.dtype, self.batch)
                for entry, record in zip(
                    self.captured, self.records, strict=True
                )
            ]
            self._inputs = graph, made
        return self._inputs[1]

    @property
    def weights(self) -> tf.Tensor:
        """Relative weights of the examples, `[batch]`."""
        return example_weights(self.terms)

    def trace_backward(self, kind: str) -> None:
        """Traces the backward pass of random cotangents, here and once.

        What several branches of the graph below this one send back then takes
        one call each. Eagerly, and on several replicas, there is nothing to
        trace.

        Args:
            kind: One of `FISHER_KINDS`, not `"exact"`.
        """

        def send(seed: tf.Tensor) -> tuple[Any, Any, Any]:
            found = self.backward(random_cotangents(self.terms, kind, seed))
            return found.cotangents, found.gradients, found.sizes

        if tf.executing_eagerly() or replicas.replica_count() > 1:
            return
        self._traced_kind = kind
        traced = tf.function(send, autograph=False).get_concrete_function(
            tf.TensorSpec([2], tf.int32)
        )
        self._sender = lambda seed: Backward(*traced(seed))

    def random_backward(self, kind: str, seed: tf.Tensor) -> Backward:
        """Sends random cotangents back, see `random_cotangents`.

        Args:
            kind: One of `FISHER_KINDS`, not `"exact"`.
            seed: int32 `[2]`.
        """
        if self._sender is None or self._traced_kind != kind:
            return self.backward(random_cotangents(self.terms, kind, seed))
        return self._sender(seed)

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
            self.check_arrivals(range(len(self.records)), gradients)
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

    def check_arrivals(
        self,
        indices: Sequence[int],
        cotangents: Sequence[Sequence[tf.Tensor | None]],
    ) -> None:
        """Raises ValueError if cotangents cannot come to some entries.

        Args:
            indices: Which of the captured entries.
            cotangents: For each of them one per use, `None` where none came.
        """
        variables = self._variables()
        check_arrivals(
            self.tape,
            self._outputs(),
            [self.records[index] for index in indices],
            [variables[index] for index in indices],
            cotangents,
        )

    def _outputs(self) -> list[tf.Tensor]:
        return [term.outputs for term in self.terms]

    def _variables(self) -> list[list[Any]]:
        """Returns the variables of every captured entry."""
        return [
            [self.variables[index] for index in entry.variables]
            for entry in self.captured
        ]
