"""The relative Fisher of a network: each layer seen by a nearby response."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import keras
import tensorflow as tf
from typing_extensions import override

from keras_natgrad.blocks import (
    Block,
    BlockShape,
    CoupledBlock,
    EigenSharedBlock,
    IdentityBlock,
    MetricBlock,
    UnitMetricBlock,
    UnitwiseBlock,
)
from keras_natgrad.blocks.base import Statistics
from keras_natgrad.capture import Plan, Taps
from keras_natgrad.curvature.assignment import BlockOptions, Entry
from keras_natgrad.curvature.captured_pass import CapturedPass
from keras_natgrad.curvature.cotangents import OutputTerm, sum_over_columns
from keras_natgrad.curvature.estimator import BlockDiagonal
from keras_natgrad.heads.tensors import as_parameters
from keras_natgrad.linalg import to_dense
from keras_natgrad.relative.sources import Source

#: What units share whose metrics do not fit: the mean of a group, or the
#: eigenvectors of the mean of all.
SHARED_METRICS = ("groups", "eigen")


@dataclass(frozen=True)
class MetricSpec:
    """How one layer's metric is kept; plain data for a config.

    Attributes:
        block: `"unitwise"`, `"coupled"` or `"eigen_shared"`.
        groups: Groups of units that share a metric, for unitwise blocks.
        response: What the metric is that of, in words.
    """

    block: str
    groups: int | None
    response: str

    def get_config(self) -> dict[str, Any]:
        """Returns plain data for an optimizer's config."""
        return asdict(self)


def plan_metrics(
    plan: Plan,
    sources: Sequence[Source],
    max_elements: int,
    shared: str = "groups",
) -> list[MetricSpec]:
    """Chooses the block of every layer.

    Coupled units get one matrix for the layer, independent ones a matrix
    each, as long as these have at most `max_elements` elements. Where coupled
    units do not fit, their diagonal blocks are kept; where those do not fit
    either, groups of units share the mean of their metrics, or all units
    share an eigenbasis.

    Args:
        plan: `Plan` of the network.
        sources: What the metric of every layer is made of.
        max_elements: Bound for one layer's metric.
        shared: One of `SHARED_METRICS`.
    """
    specs = []
    for layer, source in zip(plan.layers, sources, strict=True):
        rows, columns = layer.layout.rows, layer.layout.columns
        fits = (rows * columns) ** 2 <= max_elements
        if source.couples and columns > 1 and fits:
            specs.append(MetricSpec("coupled", None, source.name))
            continue
        groups = min(columns, max(1, max_elements // rows**2))
        if source.same_for_all_units:
            groups = 1
        elif groups < columns and shared == "eigen":
            specs.append(MetricSpec("eigen_shared", None, source.name))
            continue
        specs.append(MetricSpec("unitwise", groups, source.name))
    return specs


class RelativeCurvature(BlockDiagonal):
    """The blocks of a network, with relative metrics.

    Variables that no captured layer owns have no metric; their gradient
    passes unchanged.

    Args:
        plan: `Plan` of the network.
        shapes: Shapes of the optimizer's variables.
        specs: `MetricSpec` of every captured layer.
        relative_damping: Damping of a metric per unit of its trace.
        identity_start: Whether the running averages start at the identity.
    """

    def __init__(
        self,
        plan: Plan,
        shapes: Sequence[tuple[int, ...]],
        specs: Sequence[MetricSpec],
        relative_damping: float,
        identity_start: bool,
    ) -> None:
        self._specs = list(specs)
        self._options = {
            "relative_damping": relative_damping,
            "identity_start": identity_start,
        }
        super().__init__(plan, shapes, BlockOptions())

    @override
    def make_entries(
        self, shapes: Sequence[tuple[int, ...]], options: BlockOptions
    ) -> list[Entry]:
        entries = []
        for position, (layer, spec) in enumerate(
            zip(self.plan.layers, self._specs, strict=True)
        ):
            shape = BlockShape(layer.layout.rows, layer.layout.columns)
            block = self._metric_block(spec).bind(shape)
            entries.append(
                Entry(block, layer.variables, layer, position=position)
            )
        for position, index in enumerate(self.plan.fallback):
            own = tuple(shapes[index])
            identity = IdentityBlock().bind(BlockShape(math.prod(own), 1))
            entries.append(Entry(identity, (index,), None, own, position))
        return entries

    def _metric_block(self, spec: MetricSpec) -> Block:
        options: dict[str, Any] = {**self._options, "response": spec.response}
        if spec.block == "coupled":
            return CoupledBlock(**options)
        if spec.block == "eigen_shared":
            return EigenSharedBlock(**options)
        return UnitwiseBlock(spec.groups, **options)

    # -- Statistics ------------------------------------------------------

    def relative_statistics(
        self,
        captured: CapturedPass,
        sources: Sequence[Source],
        taps: Taps,
        seed: tf.Tensor,
    ) -> list[Statistics]:
        """Returns the statistics of one batch, those of every stack.

        Per example every metric is `V ⊗ x̃ x̃ᵀ`. A response of the layer's own
        independent units gives `V = diag(ν(z))` without a backward pass; any
        other one is sent back to the layer, column by column.

        Args:
            captured: The forward pass.
            sources: `Source` of every captured layer.
            taps: The `Taps` of the pass.
            seed: int32 `[2]`.
        """
        found: list[Statistics] = [{} for _ in self.entries]
        weights = tf.math.divide_no_nan(
            captured.weights, tf.reduce_sum(captured.weights)
        )
        if captured.share is not None:
            weights *= tf.cast(captured.share, weights.dtype)
        far: dict[int, list[int]] = {}
        for index, source in enumerate(sources):
            if source.kind in ("inputs", "own"):
                found[index] = self._own(captured, index, source, weights)
            elif source.kind == "output" and _is_output(captured, index):
                found[index] = _output_statistics(captured, index)
            else:
                far.setdefault(id(source.layer), []).append(index)
        for members in far.values():
            terms = captured.terms
            source = sources[members[0]]
            if source.layer is not None:
                terms = [_response_term(source, taps, weights)]
            for index, statistics in zip(
                members,
                _far_statistics(captured, terms, members, seed),
                strict=True,
            ):
                found[index] = statistics
        return self.stacked(found)

    def _own(
        self,
        captured: CapturedPass,
        index: int,
        source: Source,
        weights: tf.Tensor,
    ) -> Statistics:
        """Returns the metric of independent units, or of the inputs."""
        entry, inputs = captured.captured[index], captured.inputs[index]
        block, record = entry.block, captured.records[index]
        assert isinstance(block, UnitMetricBlock)
        if source.response is not None:
            information = record.canonical_cotangents(
                [
                    source.response.coefficient(as_parameters(z))
                    for z in record.preactivations
                ],
                block.dtype,
                captured.batch,
            )
        else:
            information = tf.ones(
                [*tf.unstack(tf.shape(inputs)[:2]), block.shape.columns],
                inputs.dtype,
            )
        moment = tf.cast(weights, inputs.dtype)[:, tf.newaxis, tf.newaxis]
        # The positions of one example respond independently, like examples.
        return block.metrics_of(
            tf.reshape(inputs, [-1, block.shape.rows]),
            tf.reshape(moment * information, [-1, block.shape.columns]),
        )

    # -- Curvature -------------------------------------------------------

    @override
    def refresh(
        self,
        damping: tf.Tensor,
        ridge: Sequence[float],
        devices: Sequence[str] = (),
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Recomputes every inverse; a regularizer is no part of a metric."""
        return self.refresh_blocks(
            [
                tf.ones_like(damping)
                if stack.entries[0].layer is None
                else damping
                for stack in self.stacks
            ],
            None,
            devices,
        )


def _response_term(
    source: Source, taps: Taps, weights: tf.Tensor
) -> OutputTerm:
    """Returns the response of a layer, as if it were an output."""
    layer: keras.layers.Layer = source.layer
    uses = taps.record(layer).preactivations
    if len(uses) != 1:
        raise ValueError(
            "A layer whose response is sent back must be used once in a "
            f"forward pass. The layer {layer.name!r} was used {len(uses)} "
            "times. Use horizon=1 or horizon='full'."
        )
    z = uses[0]
    own = tf.reshape(
        weights,
        tf.concat([tf.shape(weights), tf.ones_like(tf.shape(z)[1:-1])], 0),
    )
    coefficients = tf.cast(own, z.dtype) * tf.ones_like(z[..., 0])
    response: Any = source.response
    return OutputTerm(z, response, tf.stop_gradient(coefficients))


def _is_output(captured: CapturedPass, index: int) -> bool:
    """Returns whether a layer's pre-activation is the network's output.

    In a graph it can be seen whether nothing but identities lies between
    the two; elsewhere the columns are sent back.
    """
    uses = captured.records[index].preactivations
    if len(captured.terms) != 1 or len(uses) != 1 or tf.executing_eagerly():
        return False
    (use,) = uses
    found = captured.terms[0].outputs
    while found is not use and found.op.type == "Identity":
        found = found.op.inputs[0]
    columns = captured.captured[index].block.shape.columns
    return found is use and use.shape.rank == 2 and use.shape[-1] == columns


def _output_statistics(captured: CapturedPass, index: int) -> Statistics:
    """Returns the metric of the layer that makes the output, `V = c F_η`.

    The sum over the columns that `_far_statistics` would send back.
    """
    (term,) = captured.terms
    block: Any = captured.captured[index].block
    fisher = term.head.fisher(as_parameters(term.outputs))
    coefficients = tf.cast(term.coefficients, fisher.dtype)
    information = tf.cast(
        tf.stop_gradient(coefficients[:, tf.newaxis, tf.newaxis] * fisher),
        block.dtype,
    )
    inputs = to_dense(captured.inputs[index])[:, 0]
    statistics: Statistics = block.metrics_of(
        inputs, block.moment_of(information)
    )
    return statistics


def _far_statistics(
    captured: CapturedPass,
    terms: Sequence[OutputTerm],
    members: Sequence[int],
    seed: tf.Tensor,
) -> list[Statistics]:
    """Sends all columns of the terms' factors back to some layers."""
    blocks: list[Any] = [captured.captured[index].block for index in members]
    inputs = [to_dense(captured.inputs[index]) for index in members]

    def summed(function: Callable[[Any, tf.Tensor, tf.Tensor], Any]) -> Any:
        def contribution(cotangents: list[tf.Tensor]) -> Any:
            back = _send_back(captured, terms, members, cotangents)
            return [
                function(block, a, g)
                for block, a, g in zip(blocks, inputs, back, strict=True)
            ]

        return sum_over_columns(terms, contribution, seed)

    def one_position() -> Any:
        # Columns are summed to V before they meet the inputs.
        moments = summed(lambda block, a, g: block.moment(g[:, 0]))
        return [
            block.metrics_of(a[:, 0], moment)
            for block, a, moment in zip(blocks, inputs, moments, strict=True)
        ]

    def several_positions() -> Any:
        return summed(lambda block, a, g: block.cotangent_statistics(a, g))

    assert all(isinstance(block, MetricBlock) for block in blocks)
    single = tf.reduce_all([tf.equal(tf.shape(a)[1], 1) for a in inputs])
    return tf.cond(single, one_position, several_positions)


def _send_back(
    captured: CapturedPass,
    terms: Sequence[OutputTerm],
    members: Sequence[int],
    cotangents: Sequence[tf.Tensor],
) -> list[tf.Tensor]:
    """Returns the canonical cotangents at some layers' pre-activations."""
    records = [captured.records[index] for index in members]
    gradients = captured.tape.gradient(
        [term.outputs for term in terms],
        [list(record.preactivations) for record in records],
        output_gradients=list(cotangents),
    )
    captured.check_arrivals(members, gradients)
    return [
        record.canonical_cotangents(
            g, captured.captured[index].block.dtype, captured.batch
        )
        for index, record, g in zip(members, records, gradients, strict=True)
    ]
