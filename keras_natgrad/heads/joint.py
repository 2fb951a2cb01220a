"""Several heads side by side on one output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad.heads import tensors
from keras_natgrad.heads.base import Head
from keras_natgrad.heads.probability import distributions
from keras_natgrad.heads.probe import probe
from keras_natgrad.heads.serialization import get


@keras.saving.register_keras_serializable(package="keras_natgrad")
class Joint(Head):
    """Several heads on slices of one output, independent given the output.

    The first `sizes[0]` outputs parametrise the first head, the next `sizes[1]`
    the second one, and so on. The targets lie side by side on the last axis in
    the same order; a single number, such as a label, takes one place. The
    Fisher matrix is block-diagonal, with a block for each head.

    Args:
        heads: The heads, or what `heads.get()` accepts.
        sizes: The number of outputs of each.

    Raises:
        ValueError: If there are not as many sizes as heads, or a head cannot
            take that many outputs.

    Example:

    >>> head = keras_natgrad.heads.Joint(["normal", "poisson"], sizes=[1, 1])
    >>> head.fisher(tf.zeros([1, 2])).numpy()
    array([[[1., 0.],
            [0., 1.]]], dtype=float32)
    """

    def __init__(self, heads: Sequence[Any], sizes: Sequence[int]) -> None:
        self.heads = [get(head) for head in heads]
        self.sizes = [int(size) for size in sizes]
        if not self.heads or len(self.heads) != len(self.sizes):
            raise ValueError(
                "`sizes` must hold the number of outputs of each of the "
                "`heads`, of which there must be at least one. Received: "
                f"heads={self.heads}, sizes={self.sizes}"
            )
        for head, size in zip(self.heads, self.sizes, strict=True):
            head.validate((None, size))
        self._places: list[int | None] | None = None

    # -- Distribution ----------------------------------------------------

    def distribution(self, outputs: tf.Tensor) -> Any:
        """Builds the `Blockwise` distribution."""
        outputs = tensors.as_parameters(outputs)
        return distributions().Blockwise(
            [head.distribution(part) for head, part in self._parts(outputs)],
            dtype_override=outputs.dtype,
        )

    def log_prob(self, outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Adds up the heads' log-probabilities; see `Head.log_prob()`."""
        return tf.add_n(
            self._with_targets(
                outputs, targets, lambda head, x, y: head.log_prob(x, y)
            )
        )

    def score(self, outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Returns the heads' scores side by side; see `Head.score()`."""
        return tf.concat(
            self._with_targets(
                outputs, targets, lambda head, x, y: head.score(x, y)
            ),
            axis=-1,
        )

    def mean(self, outputs: tf.Tensor) -> tf.Tensor:
        """Returns the heads' means side by side; see `Head.mean()`."""
        return self._side_by_side(outputs, lambda head, x: head.mean(x))

    def stddev(self, outputs: tf.Tensor) -> tf.Tensor:
        """Returns the heads' deviations side by side; see `Head.stddev()`."""
        return self._side_by_side(outputs, lambda head, x: head.stddev(x))

    # -- Fisher ----------------------------------------------------------

    def factor_rank(self, parameter_count: int) -> int:
        """Returns the sum of the heads' ranks."""
        return sum(self._ranks())

    def fisher_factor_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Multiplies block by block."""
        return self._by_block(
            outputs,
            vector,
            self._ranks(),
            lambda head, x, v: head.fisher_factor_product(x, v),
        )

    def fisher_factor_transpose_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Multiplies by the transpose, block by block."""
        return self._by_block(
            outputs,
            vector,
            self.sizes,
            lambda head, x, v: head.fisher_factor_transpose_product(x, v),
        )

    def natural_gradient(
        self, outputs: tf.Tensor, gradient: tf.Tensor
    ) -> tf.Tensor:
        """Solves block by block; see `Head.natural_gradient()`."""
        return self._by_block(
            outputs,
            gradient,
            self.sizes,
            lambda head, x, v: head.natural_gradient(x, v),
        )

    # -- Checks ----------------------------------------------------------

    def validate(self, outputs_shape: Sequence[int | None]) -> None:
        """Checks that the outputs are those of all heads."""
        super().validate(outputs_shape)
        size = tuple(outputs_shape)[-1]
        if size not in (None, sum(self.sizes)):
            raise ValueError(
                f"The head {self!r} takes {sum(self.sizes)} outputs. Give the "
                f"last layer of the model as many units. Received: "
                f"outputs_shape={tuple(outputs_shape)}"
            )

    def targets_in_support(
        self, outputs: tf.Tensor, targets: tf.Tensor
    ) -> tf.Tensor:
        """Tells whether all heads' targets are possible."""
        found = self._with_targets(
            outputs, targets, lambda head, x, y: head.targets_in_support(x, y)
        )
        return tf.reduce_all(tf.stack(found))

    def describe_support(self, outputs_shape: Sequence[int | None]) -> str:
        """Says in words which targets the head accepts."""
        described = (
            f"{head.describe_support((*outputs_shape[:-1], size))} ({head!r})"
            for head, size in zip(self.heads, self.sizes, strict=True)
        )
        return "side by side: " + "; ".join(described)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        serialize = keras.saving.serialize_keras_object
        return {
            "heads": [serialize(head) for head in self.heads],
            "sizes": self.sizes,
        }

    def __eq__(self, other: object) -> bool:
        # Not by the configuration, because not all heads have one.
        if type(self) is not type(other):
            return NotImplemented
        assert isinstance(other, Joint)
        return self.heads == other.heads and self.sizes == other.sizes

    def __hash__(self) -> int:
        return hash((type(self), *self.heads, *self.sizes))

    def __repr__(self) -> str:
        return f"Joint(heads={self.heads!r}, sizes={self.sizes!r})"

    # -- Slices ----------------------------------------------------------

    def _ranks(self) -> list[int]:
        return [
            head.factor_rank(size)
            for head, size in zip(self.heads, self.sizes, strict=True)
        ]

    def _parts(self, outputs: tf.Tensor) -> list[tuple[Head, tf.Tensor]]:
        parts = tf.split(outputs, self.sizes, axis=-1)
        return list(zip(self.heads, parts, strict=True))

    def _by_block(
        self,
        outputs: tf.Tensor,
        vector: tf.Tensor,
        sizes: Sequence[int],
        product: Callable[[Head, tf.Tensor, tf.Tensor], tf.Tensor],
    ) -> tf.Tensor:
        """Applies a product to each head, its outputs and its piece."""
        outputs = tensors.as_parameters(outputs)
        pieces = tf.split(_repeat(outputs, vector), sizes, axis=-1)
        return tf.concat(
            [
                product(head, part, piece)
                for (head, part), piece in zip(
                    self._parts(outputs), pieces, strict=True
                )
            ],
            axis=-1,
        )

    def _target_sizes(self) -> list[int | None]:
        """Returns the places of each head's targets; `None` for a scalar."""
        if self._places is None:
            places: list[int | None] = []
            for head, size in zip(self.heads, self.sizes, strict=True):
                event = _event_shape(head, size)
                places.append(event[-1] if event.rank else None)
            self._places = places
        return self._places

    def _side_by_side(
        self,
        outputs: tf.Tensor,
        function: Callable[[Head, tf.Tensor], tf.Tensor],
    ) -> tf.Tensor:
        """Applies a function to each head and joins results like targets."""
        outputs = tensors.as_parameters(outputs)
        results = []
        for (head, part), place in zip(
            self._parts(outputs), self._target_sizes(), strict=True
        ):
            result = tensors.cast_like(function(head, part), outputs)
            results.append(result[..., tf.newaxis] if place is None else result)
        return tf.concat(results, axis=-1)

    def _with_targets(
        self,
        outputs: tf.Tensor,
        targets: tf.Tensor,
        function: Callable[[Head, tf.Tensor, tf.Tensor], tf.Tensor],
    ) -> list[tf.Tensor]:
        """Applies a function to each head, its outputs and its targets."""
        outputs = tensors.as_parameters(outputs)
        targets = tensors.cast_like(targets, outputs)
        places = self._target_sizes()
        sizes = [1 if place is None else place for place in places]
        if targets.shape[-1] not in (None, sum(sizes)):
            raise ValueError(
                f"The targets of the head {self!r} take {sizes} places on the "
                f"last axis. Received: targets.shape={targets.shape}"
            )
        results = []
        for (head, part), piece, place in zip(
            self._parts(outputs),
            tf.split(targets, sizes, axis=-1),
            places,
            strict=True,
        ):
            piece = piece[..., 0] if place is None else piece
            results.append(function(head, part, piece))
        return results


def _event_shape(head: Head, size: int) -> tf.TensorShape:
    event = probe(
        lambda outputs, _: head.distribution(outputs).event_shape, size
    )
    if not isinstance(event, tf.TensorShape):
        raise ValueError(
            "Heads side by side must each have a distribution of one tensor. "
            f"Received: head={head!r} with the event shape {event}"
        )
    return event


def _repeat(outputs: tf.Tensor, vector: tf.Tensor) -> tf.Tensor:
    """Repeats vectors over the leading axes that only the outputs have."""
    vector = tensors.cast_like(vector, outputs)
    leading = tf.broadcast_dynamic_shape(
        tf.shape(outputs)[:-1], tf.shape(vector)[:-1]
    )
    shape = tf.concat([leading, tf.shape(vector)[-1:]], axis=0)
    return tf.broadcast_to(vector, shape)
