"""Patches of images as rows, without forming them."""

from __future__ import annotations

import math

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
        images: Tensor `[N, *spatial, (groups,) channels]`, with the zeros of
            the padding.
        window: `Window`.
        batch: Number of examples; several images of one example follow each
            other, and their positions are shared ones. N where it is `None`.
        constant: Tensor `[N]`, the value of a last coordinate of the rows of
            each image, or `None` for no such coordinate.
    """

    def __init__(
        self,
        images: tf.Tensor,
        window: Window,
        batch: Size | None = None,
        constant: tf.Tensor | None = None,
    ) -> None:
        self.images = images
        self.window = window
        self.batch = size_of(images, 0) if batch is None else batch
        self.constant = constant

    # -- Shapes ----------------------------------------------------------

    @property
    @override
    def dtype(self) -> tf.DType:
        return self.images.dtype

    @property
    @override
    def shared(self) -> tf.Tensor:
        return tf.convert_to_tensor(self._positions * self._images_per_example)

    @property
    def _positions(self) -> Size:
        """Number of positions in one image."""
        total: Size = 1
        for axis in range(self.window.rank):
            size = size_of(self.images, axis + 1)
            total *= self.window.positions(size, axis)
        return total

    @property
    def _images_per_example(self) -> Size:
        return size_of(self.images, 0) // self.batch

    @property
    def _grouped(self) -> bool:
        return self.images.shape.rank == self.window.rank + 3

    def _with(
        self, images: tf.Tensor, constant: tf.Tensor | None, batch: Size
    ) -> Patches:
        return Patches(images, self.window, batch, constant)

    @override
    def cast(self, dtype: tf.DType | str) -> Patches:
        constant = self.constant
        if constant is not None:
            constant = tf.cast(constant, dtype)
        return self._with(tf.cast(self.images, dtype), constant, self.batch)

    @override
    def fold(self, batch: tf.Tensor) -> Patches:
        return self._with(self.images, self.constant, batch)

    @override
    def homogeneous(self) -> Patches:
        ones = tf.ones([size_of(self.images, 0)], self.dtype)
        return self._with(self.images, ones, self.batch)

    @override
    def scale(self, factors: tf.Tensor) -> Patches:
        factors = tf.tile(factors[:, tf.newaxis], [1, self._images_per_example])
        flat = tf.reshape(factors, [-1])
        constant = self.constant
        if constant is not None:
            constant = flat * constant
        shape = [-1] + [1] * (self.images.shape.rank - 1)
        images = tf.reshape(flat, shape) * self.images
        return self._with(images, constant, self.batch)

    @override
    def take(self, examples: tf.Tensor) -> Patches:
        per_example = self._images_per_example
        first = per_example * examples[:, tf.newaxis]
        index = tf.reshape(first + tf.range(per_example), [-1])
        constant = self.constant
        if constant is not None:
            constant = tf.gather(constant, index)
        images = tf.gather(self.images, index)
        return self._with(images, constant, tf.size(examples))

    # -- Sums over rows ---------------------------------------------------

    @override
    def second_moment(self) -> tf.Tensor:
        moment = second_moment(self.images, self.window)
        if self.constant is None:
            return moment
        shape = [-1] + [1] * (self.images.shape.rank - 1)
        scaled = tf.reshape(self.constant, shape) * self.images
        sums = self._sums(tf.reduce_sum(scaled, axis=0, keepdims=True))
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
        squares = tf.reduce_sum(tf.square(self.images), axis=0, keepdims=True)
        sums = self._sums(squares)
        if self.constant is not None:
            sums = tf.concat([sums, self._sum_of_constants(sums)], axis=-1)
        return sums[..., 0, :]

    @override
    def mean(self) -> tf.Tensor:
        sums = self._sums(self.images) / tf.cast(self._positions, self.dtype)
        if self.constant is not None:
            ones = tf.ones_like(sums[..., :1])
            constant = self.constant[:, tf.newaxis] * ones
            sums = tf.concat([sums, constant], axis=-1)
        shape = [*sums.shape[:-2], self.batch, -1, sums.shape[-1]]
        return tf.reduce_mean(tf.reshape(sums, shape), axis=-2, keepdims=True)

    def _sums(self, images: tf.Tensor) -> tf.Tensor:
        """Returns the windows summed over positions, `[(groups,) N, n]`."""
        sums = self.window.sums(images)
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

    @property
    def _lead(self) -> list[int]:
        return [self.images.shape[-2]] if self._grouped else []

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
                self.images,
                weights,
                strides=window.strides,
                padding="VALID",
                dilations=window.dilations,
            )
        total = None
        for offset in window.offsets():
            index = (*offset, slice(None), slice(None))
            if self._grouped:
                index = (slice(None), *index)
            own, seen = weights[index], window.at(self.images, offset)
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
            tf.matmul(
                self._canonical(self.window.at(self.images, offset)),
                cotangents,
                transpose_a=True,
            )
            for offset in self.window.offsets()
        ]
        if self.constant is not None:
            constants = self._constants()[:, tf.newaxis]
            parts.append(tf.matmul(constants, cotangents))
        return parts[0] if len(parts) == 1 else tf.concat(parts, axis=-2)

    @override
    def to_dense(self) -> tf.Tensor:
        parts = [
            self._canonical(self.window.at(self.images, offset))
            for offset in self.window.offsets()
        ]
        if self.constant is not None:
            ones = tf.ones_like(parts[0][..., :1])
            parts.append(self._constants()[..., tf.newaxis] * ones)
        return tf.concat(parts, axis=-1)

    def _constants(self) -> tf.Tensor:
        """Returns the last coordinates, `[batch, shared]`."""
        assert self.constant is not None
        repeated = tf.tile(self.constant[:, tf.newaxis], [1, self._positions])
        return tf.reshape(repeated, [self.batch, -1])

    def _canonical(self, values: tf.Tensor) -> tf.Tensor:
        """Merges `[N, *positions, (groups,) m]` to the canonical form."""
        features = values.shape[-1]
        merged = tf.reshape(
            values, [self.batch, self.shared, *self._lead, features]
        )
        if self._grouped:
            merged = tf.transpose(merged, [2, 0, 1, 3])
        return merged
