"""The second moment of all windows of images, without the windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_natgrad.linalg.shared import held_once
from keras_natgrad.linalg.windows import Size, Window, at_least, size_of

# Elements of a temporary, in which examples are taken a few at a time.
_ELEMENTS = 1 << 22


def second_moment(
    images: tf.Tensor, window: Window, elements: int = _ELEMENTS
) -> tf.Tensor:
    r"""Returns `Σ_n Σ_p a aᵀ` of the windows a, `[(groups,) n, n]`.

    Along one axis of stride one the product of the coordinates seen at
    offsets i and j depends on them only through the lag j − i: with `x_q` the
    line of the image at coordinate q, flattened over the windows of the other
    axes, and P positions,

        A_ij = Σ_{p<P} x_{p+i} x_{p+j}ᵀ = Σ_{q=i}^{i+P−1} x_q x_{q+(j−i)}ᵀ.

    For one lag these sums differ in a few lines at the borders, so that k
    matrix products replace k² (by symmetry half of them), and k^(r−1)
    coordinates per position are formed in place of k^r. Examples are taken a
    few at a time. Without such an axis the windows of a few examples are
    formed.

    Args:
        images: Tensor `[N, *spatial, (groups,) channels]`.
        window: `Window`.
        elements: Bound on the elements of a temporary.
    """
    name = f"second_moment {window!r} {elements}"
    return held_once(name, lambda own: _second_moment(own, window, elements))(
        images
    )


def _second_moment(
    images: tf.Tensor, window: Window, elements: int
) -> tf.Tensor:
    axis = _lag_axis(images, window)
    rest = window if axis is None else window.drop(axis)
    side = images.shape[-1] * math.prod(window.kernel)
    lead = list(images.shape[window.rank + 1 : -1])  # Groups, if any.
    per_example: Size = math.prod([*lead, images.shape[-1], *rest.kernel])
    for own in range(window.rank):
        size = size_of(images, own + 1)
        per_example *= size if own == axis else window.positions(size, own)

    def moment(part: tf.Tensor) -> tf.Tensor:
        lines = _lines(part, window, axis)
        if axis is None:
            return tf.matmul(lines, lines, transpose_a=True)
        return _by_lags(lines, window, axis)

    total = _sum_over_chunks(
        moment, images, per_example, elements, [*lead, side, side]
    )
    if axis:  # The offsets along the axis come first.
        total = _reordered(total, window, axis)
    return total


def _lag_axis(images: tf.Tensor, window: Window) -> int | None:
    """Returns an axis of stride one that is longer than two windows."""
    found = None
    for axis, count in enumerate(window.kernel):
        size = images.shape[axis + 1]
        if count == 1 or window.strides[axis] > 1 or size is None:
            continue
        if window.positions(size, axis) < window.extent(axis):
            continue
        if found is None or count > window.kernel[found]:
            found = axis
    return found


def _lines(images: tf.Tensor, window: Window, axis: int | None) -> tf.Tensor:
    """Returns the windows along all axes but one.

    Returns:
        Tensor `[(groups,) size, N · positions, n]`, the second axis being
        that of the image; `[(groups,) N · positions, n]` for no axis.
    """
    spatial = list(range(1, window.rank + 1))
    order = [0, *spatial, images.shape.rank - 1]
    rest, sizes = window, []
    if axis is not None:
        rest = window.drop(axis)
        order = [order.pop(axis + 1), *order]
        sizes.append(size_of(images, axis + 1))
    lead = []
    if images.shape.rank == window.rank + 3:
        order = [images.shape.rank - 2, *order]
        lead.append(images.shape[-2])
    moved = images
    if order != sorted(order):
        moved = tf.transpose(images, order)
    kept = [size_of(moved, i) for i in range(-rest.rank - 1, 0)]
    flat = tf.reshape(moved, [-1, *kept])
    seen = [rest.at(flat, offset) for offset in rest.offsets()]
    joined = seen[0] if len(seen) == 1 else tf.concat(seen, axis=-1)
    width = len(seen) * images.shape[-1]
    return tf.reshape(joined, [*lead, *sizes, -1, width])


def _by_lags(lines: tf.Tensor, window: Window, axis: int) -> tf.Tensor:
    """Returns the second moment, offsets along the axis first.

    Args:
        lines: Tensor `[(groups,) size, M, n]`.
        window: `Window`.
        axis: The axis of the lines.
    """
    count, dilation = window.kernel[axis], window.dilations[axis]
    size, width = lines.shape[-3], lines.shape[-1]
    lead = list(lines.shape[:-3])
    positions = window.positions(size, axis)
    blocks: list[list[Any]] = [[None] * count for _ in range(count)]
    for lag in range(count):
        shift = dilation * lag
        border = dilation * (count - 1 - lag)
        here = lines[..., : size - shift, :, :]
        there = lines[..., shift:, :, :]
        # Lines that all offsets see, those of the first and of the last.
        core = tf.matmul(
            tf.reshape(here[..., border:positions, :, :], [*lead, -1, width]),
            tf.reshape(there[..., border:positions, :, :], [*lead, -1, width]),
            transpose_a=True,
        )
        first, last = (
            tf.matmul(here[part], there[part], transpose_a=True)
            for part in (
                (..., slice(0, border), slice(None), slice(None)),
                (..., slice(positions, None), slice(None), slice(None)),
            )
        )
        for offset in range(count - lag):
            start = dilation * offset
            block = core + tf.reduce_sum(first[..., start:, :, :], axis=-3)
            block += tf.reduce_sum(last[..., :start, :, :], axis=-3)
            blocks[offset][offset + lag] = block
            if lag:
                blocks[offset + lag][offset] = tf.linalg.matrix_transpose(block)
    return tf.concat([tf.concat(row, axis=-1) for row in blocks], axis=-2)


def _reordered(moment: tf.Tensor, window: Window, axis: int) -> tf.Tensor:
    """Puts the offsets of an axis, which come first, in their place."""
    own = [*window.kernel]
    own.insert(0, own.pop(axis))
    side = moment.shape[-1]
    shape = [*own, side // math.prod(own)]
    order = [*range(1, axis + 1), 0, *range(axis + 1, len(shape))]
    lead = list(moment.shape[:-2])
    split = tf.reshape(moment, [*lead, *shape, *shape])
    permutation = [
        *range(len(lead)),
        *(len(lead) + i for i in order),
        *(len(lead) + len(shape) + i for i in order),
    ]
    return tf.reshape(tf.transpose(split, permutation), [*lead, side, side])


def _sum_over_chunks(
    function: Callable[[tf.Tensor], tf.Tensor],
    images: tf.Tensor,
    per_example: Size,
    elements: int,
    shape: list[int],
) -> tf.Tensor:
    """Returns `Σ function(some examples)`, with a bound on the temporaries."""
    length = at_least(1, elements // per_example)
    static = images.shape[0]
    if isinstance(length, int) and static is not None and static <= length:
        return function(images)

    def body(start: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        count = tf.shape(images)[0]
        own = tf.minimum(length, count)
        # The last chunk reaches back; what has been counted becomes zero.
        begin = tf.minimum(start, count - own)
        others = tf.shape(images)[1:]
        part = tf.slice(
            images,
            tf.concat([[begin], tf.zeros_like(others)], axis=0),
            tf.concat([[own], others], axis=0),
        )
        part = tf.ensure_shape(part, [None, *images.shape[1:]])
        new = tf.cast(begin + tf.range(own) >= start, images.dtype)
        part *= tf.reshape(new, [-1] + [1] * (images.shape.rank - 1))
        return start + own, total + function(part)

    _, total = tf.while_loop(
        lambda start, _: start < tf.shape(images)[0],
        body,
        (tf.constant(0), tf.zeros(shape, images.dtype)),
    )
    return total
