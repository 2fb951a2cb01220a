"""Networks of linear maps with explicit per-example Jacobians.

A network is a list of stages that read earlier nodes; node 0 is the input and
stage `i` makes node `i + 1`. All nodes are sequences `[N, T, features]`; a
matrix `[N, features]` is a sequence of one position. Parameters are canonical
matrices `[n (+ 1), m]`, the bias being the last row, and may be used by
several stages (weight tying).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


def sigmoid(z: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-z))


# Each activation with its derivative, both functions of the pre-activation.
ACTIVATIONS: dict[
    str, tuple[Callable[[Array], Array], Callable[[Array], Array]]
] = {
    "linear": (lambda z: z, np.ones_like),
    "tanh": (np.tanh, lambda z: 1.0 - np.tanh(z) ** 2),
    "sigmoid": (sigmoid, lambda z: sigmoid(z) * (1.0 - sigmoid(z))),
    "relu": (lambda z: np.maximum(z, 0.0), lambda z: (z > 0.0).astype(float)),
}


@dataclass(frozen=True)
class Linear:
    """`φ(x W + b)` at every position, with a parameter by its index."""

    parameter: int
    activation: str = "linear"
    source: int = -1


@dataclass(frozen=True)
class MeanPool:
    """The mean over positions; one position is left."""

    source: int = -1


@dataclass(frozen=True)
class Trace:
    """A forward pass with its derivatives.

    Attributes:
        outputs: One `[N, P, K]` array per output.
        inputs: Per parameter `[N, S, rows]`, homogeneous; several uses follow
            each other on the shared axis.
        jacobians: Per parameter and output `[N, P, K, S, m]`, the derivative
            of the output in the pre-activations.
    """

    outputs: list[Array]
    inputs: list[Array]
    jacobians: list[list[Array]]

    def parameter_jacobian(self, parameter: int, output: int = 0) -> Array:
        """`dη/dW` of shape `[N, P, K, rows, m]`."""
        return np.einsum(
            "nsr,npksm->npkrm",
            self.inputs[parameter],
            self.jacobians[parameter][output],
        )


class Network:
    """Parameters and stages; see the module's docstring."""

    def __init__(
        self,
        matrices: Sequence[Array],
        biased: Sequence[bool],
        stages: Sequence[Linear | MeanPool],
        outputs: Sequence[int] = (-1,),
    ) -> None:
        self.matrices = [np.array(m, np.float64) for m in matrices]
        self.biased = list(biased)
        self.stages = list(stages)
        count = len(self.stages) + 1
        self.outputs = [index % count for index in outputs]

    def with_matrices(self, matrices: Sequence[Array]) -> Network:
        """The same network with other parameters."""
        return Network(matrices, self.biased, self.stages, self.outputs)

    def __call__(self, x: Array) -> list[Array]:
        nodes, _ = self._forward(x)
        return [nodes[index] for index in self.outputs]

    def _source(self, stage: int) -> int:
        source = self.stages[stage].source
        return source if source >= 0 else stage

    def _extended(self, x: Array, parameter: int) -> Array:
        if not self.biased[parameter]:
            return x
        return np.concatenate([x, np.ones_like(x[..., :1])], axis=-1)

    def _forward(self, x: Array) -> tuple[list[Array], list[Array | None]]:
        x = np.asarray(x)
        nodes = [x[:, np.newaxis] if x.ndim == 2 else x]
        preactivations: list[Array | None] = []
        for index, stage in enumerate(self.stages):
            source = nodes[self._source(index)]
            if isinstance(stage, MeanPool):
                preactivations.append(None)
                nodes.append(source.mean(axis=1, keepdims=True))
                continue
            extended = self._extended(source, stage.parameter)
            z = extended @ self.matrices[stage.parameter]
            preactivations.append(z)
            nodes.append(ACTIVATIONS[stage.activation][0](z))
        return nodes, preactivations

    def _backward(
        self, output: int, nodes: list[Array], zs: list[Array | None]
    ) -> dict[int, Array]:
        """`dη/dz` of every linear stage that the output depends on."""
        examples, positions, units = nodes[output].shape
        identity = np.eye(positions * units).reshape(
            1, positions, units, positions, units
        )
        found: dict[int, Array] = {}
        pending = {output: np.repeat(identity, examples, axis=0)}
        for index in reversed(range(len(self.stages))):
            if index + 1 not in pending:
                continue
            derivative = pending.pop(index + 1)
            stage, source = self.stages[index], self._source(index)
            if isinstance(stage, MeanPool):
                length = nodes[source].shape[1]
                back = np.repeat(derivative, length, axis=3) / length
            else:
                slope = ACTIVATIONS[stage.activation][1](zs[index])
                derivative = derivative * slope[:, np.newaxis, np.newaxis]
                found[index] = derivative
                kernel = self.matrices[stage.parameter]
                if self.biased[stage.parameter]:
                    kernel = kernel[:-1]
                back = derivative @ kernel.T
            pending[source] = pending.get(source, 0.0) + back
        return found

    def trace(self, x: Array) -> Trace:
        """Runs the network and differentiates every output."""
        nodes, zs = self._forward(x)
        found = [self._backward(index, nodes, zs) for index in self.outputs]
        inputs, jacobians = [], []
        for parameter in range(len(self.matrices)):
            uses = [
                index
                for index, stage in enumerate(self.stages)
                if isinstance(stage, Linear) and stage.parameter == parameter
            ]
            inputs.append(
                np.concatenate(
                    [
                        self._extended(nodes[self._source(i)], parameter)
                        for i in uses
                    ],
                    axis=1,
                )
            )
            per_output = []
            for output, derivatives in zip(self.outputs, found, strict=True):
                lead = nodes[output].shape
                parts = [
                    derivatives.get(i, np.zeros((*lead, *zs[i].shape[1:])))
                    for i in uses
                ]
                per_output.append(np.concatenate(parts, axis=3))
            jacobians.append(per_output)
        return Trace([nodes[i] for i in self.outputs], inputs, jacobians)
