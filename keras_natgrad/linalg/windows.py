"""Windows of images: slices, sums and sums of outer products."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import tensorflow as tf

#: A size that is known while tracing, or a scalar tensor.
Size: TypeAlias = int | tf.Tensor


@dataclass(frozen=True)
class Window:
    """Geometry of the windows that a convolution looks through.

    Windows lie inside the image; what a layer adds as padding is part of the
    image by then. The window at position p sees, at offset o along an axis,
    the coordinate `stride · p + dilation · o`.

    Attributes:
        kernel: Number of offsets along each axis.
        strides: Distance of neighbouring positions along each axis.
        dilations: Distance of neighbouring offsets along each axis.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    def extent(self, axis: int) -> int:
        """Returns how many coordinates one window spans along an axis."""
        return self.dilations[axis] * (self.kernel[axis] - 1) + 1

    def offsets(self) -> Iterator[tuple[int, ...]]:
        """Yields the offsets, row-major as in a kernel."""
        return itertools.product(*map(range, self.kernel))

    def positions(self, size: Size, axis: int) -> Size:
        """Returns the number of positions along an axis of that size."""
        return (size - self.extent(axis)) // self.strides[axis] + 1

    def along(self, axis: int, offset: int, size: Size) -> slice:
        """Returns the coordinates that an offset sees along an axis."""
        start = self.dilations[axis] * offset
        reach = (self.positions(size, axis) - 1) * self.strides[axis]
        return slice(start, start + reach + 1, self.strides[axis])

    def at(self, images: tf.Tensor, offset: Sequence[int]) -> tf.Tensor:
        """Returns what one offset of all windows sees.

        Args:
            images: Tensor `[N, *spatial, ...]`.
            offset: One offset per axis.

        Returns:
            Tensor `[N, *positions, ...]`.
        """
        index = [slice(None)]
        for axis, own in enumerate(offset):
            size = size_of(images, axis + 1)
            index.append(self.along(axis, own, size))
        return images[tuple(index)]

    def sums(self, images: tf.Tensor) -> tf.Tensor:
        """Returns the sums over positions, one axis after the other.

        Args:
            images: Tensor `[N, *spatial, ...]`.

        Returns:
            Tensor `[N, *kernel, ...]`.
        """
        for axis, count in enumerate(self.kernel):
            size = size_of(images, axis + 1)
            lead = (slice(None),) * (axis + 1)
            sums = []
            for offset in range(count):
                index = (*lead, self.along(axis, offset, size))
                sums.append(tf.reduce_sum(images[index], axis=axis + 1))
            images = tf.stack(sums, axis=axis + 1)
        return images

    def drop(self, axis: int) -> Window:
        """Returns the window along the other axes."""

        def others(values: tuple[int, ...]) -> tuple[int, ...]:
            return (*values[:axis], *values[axis + 1 :])

        return Window(
            others(self.kernel), others(self.strides), others(self.dilations)
        )


def size_of(tensor: tf.Tensor, axis: int) -> Size:
    """Returns the static size of an axis, where it is known."""
    static = tensor.shape[axis]
    return tf.shape(tensor)[axis] if static is None else static


def at_least(minimum: int, size: Size) -> Size:
    """Returns the larger of two sizes."""
    if isinstance(size, int):
        return max(minimum, size)
    return tf.maximum(minimum, size)


def padded(images: tf.Tensor, window: Window, padding: str) -> tf.Tensor:
    """Returns images with the zeros that a padding mode adds.

    With "same" there are `ceil(size / stride)` positions and as many zeros
    before as after, or one more after; with "causal" the last offset of a
    window is its position.

    Args:
        images: Tensor `[N, *spatial, channels]`.
        window: `Window`.
        padding: `"valid"`, `"same"` or `"causal"`.

    Raises:
        ValueError: If the padding mode is unknown.
    """
    if padding not in ("valid", "same", "causal"):
        raise ValueError(
            "`padding` must be 'valid', 'same' or 'causal'. "
            f"Received: padding={padding!r}"
        )
    if padding == "valid":
        return images
    amounts: list[tuple[Size, Size]] = [(0, 0)]
    for axis in range(window.rank):
        size, stride = size_of(images, axis + 1), window.strides[axis]
        if padding == "causal":
            amounts.append((window.extent(axis) - 1, 0))
            continue
        positions = (size + stride - 1) // stride
        total = (positions - 1) * stride + window.extent(axis) - size
        total = at_least(0, total)
        amounts.append((total // 2, total - total // 2))
    return tf.pad(images, [*amounts, (0, 0)])
