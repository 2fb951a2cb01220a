"""Patches of images as rows, without forming them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import tensorflow as tf
from typing_extensions import override

from keras_natgrad.linalg.rows import StructuredRows
from keras_natgrad.linalg.window_moments import second_moment
from keras_natgrad.linalg.windows import Size, Window, size_of


class Patches(StructuredRows):
    """The patches that a convolution sees, one row per position.

    It stands for the tensor `[(groups,) batch, shared, n]` of the windows of
    images, flattened row-major as a kernel `[*kernel, channels]` is, and
    keeps the images only. Products with a matrix are convolutions.

    Args:
        images: Tensor `[batch, images, *spatial, (groups,) channels]`, with
            the zeros of the padding. The positions of all images of an
            example are shared ones; most layers see one.
        window: `Window`.
        constant: Tensor `[batch, images]`, the value of a last coordinate of
            the rows of each image, or `None` for no such coordinate.
    """

    def __init__(
        self,
        images: tf.Tensor,
        window: Window,
        constant: tf.Tensor | None = None,
    ) -> None:
        self.images = images
        self.window = window
        self.constant = constant

    # -- Shapes ----------------------------------------------------------

    @property
    @override
    def dtype(self) -> tf.DType:
        return self.images.dtype

    @property
    @override
    def shared(self) -> tf.Tensor:
        return tf.convert_to_tensor(self._shared)

    @property
    def _shared(self) -> Size:
        return size_of(self.images, 1) * self._positions

    @property
    def _positions(self) -> Size:
        """Number of positions in one image."""
        total: Size = 1
        for axis in range(self.window.rank):
            size = size_of(self.images, axis + 2)
            total *= self.window.positions(size, axis)
        return total

    @property
    def _grouped(self) -> bool:
        return self.images.shape.rank == self.window.rank + 4

    @property
    def _lead(self) -> list[int]:
        return [self.images.shape[-2]] if self._grouped else []

    def _flat(self) -> tf.Tensor:
        """Returns the images `[N, *spatial, (groups,) channels]`."""
        sizes = range(2, self.images.shape.rank)
        shape = [size_of(self.images, axis) for axis in sizes]
        return tf.reshape(self.images, [-1, *shape])

    def _weighted(self, weights: tf.Tensor) -> tf.Tensor:
        """Returns images times weights of `[batch, images or 1]`."""
        ones = [1] * (self.images.shape.rank - 2)
        shape = [-1, size_of(weights, 1), *ones]
        return tf.reshape(weights, shape) * self.images

    @override
    def cast(self, dtype: tf.DType | str) -> Patches:
        constant = self.constant
        if constant is not None:
            constant = tf.cast(constant, dtype)
        return Patches(tf.cast(self.images, dtype), self.window, constant)

    @override
    def fold(self, batch: tf.Tensor) -> Patches:
        constant = self.constant
        if constant is not None:
            constant = tf.reshape(constant, [batch, -1])
        sizes = range(2, self.images.shape.rank)
        shape = [size_of(self.images, axis) for axis in sizes]
        images = tf.reshape(self.images, [batch, -1, *shape])
        return Patches(images, self.window, constant)

    @override
    def homogeneous(self) -> Patches:
        ones = tf.ones(tf.shape(self.images)[:2], self.dtype)
        return Patches(self.images, self.window, ones)

    @override
    def scale(self, factors: tf.Tensor) -> Patches:
        factors = tf.expand_dims(factors, 1)
        constant = self.constant
        if constant is not None:
            constant = factors * constant
        return Patches(self._weighted(factors), self.window, constant)

    @override
    def take(self, examples: tf.Tensor) -> Patches:
        constant = self.constant
        if constant is not None:
            constant = tf.gather(constant, examples)
        images = tf.gather(self.images, examples)
        return Patches(images, self.window, constant)

    # -- Sums over rows ---------------------------------------------------

    @override
    def second_moment(self) -> tf.Tensor:
        moment = second_moment(self._flat(), self.window)
        if self.constant is None:
            return moment
        sums = self._sums(tf.reduce_sum(self._weighted(self.constant), [0, 1]))
        corner = self._sum_of_constants(sums)
        return tf.concat(
            [
                tf.concat([moment, tf.linalg.matrix_transpose(sums)], axis=-1),
                tf.concat([sums, corner], axis=-1),
            ],
            axis=-2,
        )

    @override
    def squares(self) -> tf.Tensor:
        sums = self._sums(tf.reduce_sum(tf.square(self.images), [0, 1]))
        if self.constant is not None:
            sums = tf.concat([sums, self._sum_of_constants(sums)], axis=-1)
        return sums[..., 0, :]

    @override
    def mean(self) -> tf.Tensor:
        # The mean over images first: their windows are then summed once.
        images = tf.reduce_mean(self.images, axis=1)
        positions = tf.cast(self._positions, self.dtype)
        means = self._sums(images, examples=True) / positions
        if self.constant is not None:
            constant = tf.reduce_mean(self.constant, axis=1)[:, tf.newaxis]
            constant *= tf.ones_like(means[..., :1])
            means = tf.concat([means, constant], axis=-1)
        return means[..., tf.newaxis, :]

    def _sums(self, images: tf.Tensor, examples: bool = False) -> tf.Tensor:
        """Returns the windows summed over positions, `[(groups,) N, n]`.

        Args:
            images: Tensor `[*spatial, (groups,) channels]`; N is then one.
            examples: Whether they have an axis N before.
        """
        sums = self.window.sums(images if examples else images[tf.newaxis])
        if self._grouped:
            last = sums.shape.rank - 1
            sums = tf.transpose(sums, [last - 1, *range(last - 1), last])
        width = math.prod(self.window.kernel) * images.shape[-1]
        return tf.reshape(sums, [*self._lead, -1, width])

    def _sum_of_constants(self, like: tf.Tensor) -> tf.Tensor:
        """Returns the sum of their squares, shaped `[(groups,) 1, 1]`."""
        positions = tf.cast(self._positions, self.dtype)
        total = positions * tf.reduce_sum(tf.square(self.constant))
        return total * tf.ones_like(like[..., :1])

    # -- Products, one offset of the windows after the other --------------

    @override
    def matmul(self, matrix: tf.Tensor) -> tf.Tensor:
        channels, width = self.images.shape[-1], matrix.shape[-1]
        side = math.prod(self.window.kernel) * channels
        lead, kernel = self._lead, self.window.kernel
        weights = tf.reshape(
            matrix[..., :side, :], [*lead, *kernel, channels, width]
        )
        product = self._canonical(self._convolution(weights))
        if self.constant is None:
            return product
        last = matrix[..., side:, :]
        return product + self._constants()[..., tf.newaxis] * (
            last[..., tf.newaxis, :, :] if self._grouped else last
        )

    def _convolution(self, weights: tf.Tensor) -> tf.Tensor:
        """Returns the convolution with `[(groups,) *kernel, channels, m]`."""
        window = self.window
        plain = max(window.strides) == 1 or max(window.dilations) == 1
        if plain and not self._grouped:
            return tf.nn.convolution(
                self._flat(),
                weights,
                strides=window.strides,
                padding="VALID",
                dilations=window.dilations,
            )
        images, total = self._flat(), None
        for offset in window.offsets():
            index = (*offset, slice(None), slice(None))
            if self._grouped:
                index = (slice(None), *index)
            own, seen = weights[index], window.at(images, offset)
            equation = "...gc,gcm->...gm" if self._grouped else "...c,cm->...m"
            if seen.shape[-1] == 1:  # A product of numbers.
                part = seen * own[..., 0, :]
            else:
                part = tf.einsum(equation, seen, own)
            total = part if total is None else total + part
        return total

    @override
    def contract(self, cotangents: tf.Tensor) -> tf.Tensor:
        parts = [
            tf.matmul(seen, cotangents, transpose_a=True)
            for seen in self._by_offset()
        ]
        if self.constant is not None:
            constants = self._constants()[:, tf.newaxis]
            parts.append(tf.matmul(constants, cotangents))
        return parts[0] if len(parts) == 1 else tf.concat(parts, axis=-2)

    @override
    def to_dense(self) -> tf.Tensor:
        parts = list(self._by_offset())
        if self.constant is not None:
            ones = tf.ones_like(parts[0][..., :1])
            parts.append(self._constants()[..., tf.newaxis] * ones)
        return tf.concat(parts, axis=-1)

    def _by_offset(self) -> Iterator[tf.Tensor]:
        """Yields what each offset sees, `[(groups,) batch, shared, …]`."""
        images = self._flat()
        for offset in self.window.offsets():
            yield self._canonical(self.window.at(images, offset))

    def _constants(self) -> tf.Tensor:
        """Returns the last coordinates, `[batch, shared]`."""
        assert self.constant is not None
        repeated = self.constant[..., tf.newaxis]
        repeated = tf.tile(repeated, [1, 1, self._positions])
        return tf.reshape(repeated, self._by_example())

    def _by_example(self) -> list[Size]:
        """Returns the first axes `[batch, shared]`, one of them left open."""
        shared = self._shared if self.images.shape[1] else None
        if isinstance(shared, int):
            return [-1, shared]
        return [size_of(self.images, 0), -1]

    def _canonical(self, values: tf.Tensor) -> tf.Tensor:
        """Merges `[N, *positions, (groups,) m]` to the canonical form."""
        shape = [*self._by_example(), *self._lead, values.shape[-1]]
        merged = tf.reshape(values, shape)
        if self._grouped:
            merged = tf.transpose(merged, [2, 0, 1, 3])
        return merged
