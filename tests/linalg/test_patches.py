"""Patches against a loop over examples, positions and offsets in NumPy."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_natgrad.linalg import Patches, Window, padded
from keras_natgrad.linalg.window_moments import second_moment

FAST = settings(max_examples=12, deadline=None)


def loop(images, window, batch, constant=None):
    """The rows `[(groups,) batch, shared, n]`, one by one."""
    rank = len(window.kernel)
    if images.ndim == rank + 3:
        groups = [
            loop(images[..., g, :], window, batch, constant)
            for g in range(images.shape[-2])
        ]
        return np.stack(groups)
    counts = [
        len(range(0, size - dilation * (kernel - 1), stride))
        for size, kernel, stride, dilation in zip(
            images.shape[1:],
            window.kernel,
            window.strides,
            window.dilations,
            strict=False,
        )
    ]
    rows = []
    for number, image in enumerate(images):
        for position in itertools.product(*map(range, counts)):
            row = []
            for offset in itertools.product(*map(range, window.kernel)):
                at = tuple(
                    np.array(window.strides) * position
                    + np.array(window.dilations) * offset
                )
                row.extend(image[at])
            if constant is not None:
                row.append(constant[number])
            rows.append(row)
    return np.array(rows).reshape(batch, -1, len(rows[0]))


@st.composite
def cases(draw):
    """Patches, with the tensor that they stand for."""
    rank = draw(st.integers(1, 3))

    def axes(largest):
        return tuple(draw(st.integers(1, largest)) for _ in range(rank))

    window = Window(axes(3 if rank < 3 else 2), axes(2), axes(2))
    extra = [draw(st.integers(0, 5 if rank < 3 else 2)) for _ in range(rank)]
    sizes = [window.extent(axis) + extra[axis] for axis in range(rank)]
    groups = draw(st.sampled_from([[], [1], [3]]))
    batch, per_example = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    shape = [batch * per_example, *sizes, *groups, draw(st.integers(1, 2))]
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    images = rng.normal(size=shape)
    constant = rng.normal(size=shape[0]) if draw(st.booleans()) else None
    folded = images.reshape(batch, per_example, *shape[1:])
    ones = constant
    if constant is not None:
        ones = tf.constant(constant.reshape(batch, per_example))
    patches = Patches(tf.constant(folded), window, ones)
    return patches, loop(images, window, batch, constant), rng


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-11)


@FAST
@given(case=cases())
def test_tensor(case):
    patches, rows, _ = case
    np.testing.assert_array_equal(patches.to_dense(), rows)
    assert int(patches.shared) == rows.shape[-2]
    assert patches.dtype == tf.float64


@FAST
@given(case=cases())
def test_second_moment_and_squares(case):
    patches, rows, _ = case
    moment = np.einsum("...bsi,...bsj->...ij", rows, rows)
    assert_close(patches.second_moment(), moment)
    squares = np.sum(rows**2, axis=(-3, -2))
    assert_close(patches.squares(), squares)


@FAST
@given(case=cases(), elements=st.integers(1, 300))
def test_second_moment_of_a_few_examples_at_a_time(case, elements):
    patches, rows, _ = case
    moment = np.einsum("...bsi,...bsj->...ij", rows, rows)
    side = patches.images.shape[-1] * np.prod(patches.window.kernel)
    images = tf.reshape(patches.images, [-1, *patches.images.shape[2:]])
    found = second_moment(images, patches.window, elements)
    assert_close(found, moment[..., :side, :side])


@FAST
@given(case=cases())
def test_products(case):
    patches, rows, rng = case
    matrix = rng.normal(size=(*rows.shape[:-3], rows.shape[-1], 2))
    expected = np.einsum("...bsi,...im->...bsm", rows, matrix)
    assert_close(patches.matmul(tf.constant(matrix)), expected)
    cotangents = rng.normal(size=(*rows.shape[:-1], 2))
    expected = np.einsum("...bsi,...bsm->...bim", rows, cotangents)
    assert_close(patches.contract(tf.constant(cotangents)), expected)


@FAST
@given(case=cases())
def test_mean_scale_take(case):
    patches, rows, rng = case
    assert_close(patches.mean(), rows.mean(axis=-2, keepdims=True))
    factors = rng.normal(size=rows.shape[-3])
    assert_close(
        patches.scale(tf.constant(factors)).to_dense(),
        factors[:, None, None] * rows,
    )
    examples = rng.integers(rows.shape[-3], size=4)
    taken = patches.take(tf.constant(examples, tf.int32))
    assert_close(taken.to_dense(), rows[..., examples, :, :])
    assert_close(taken.mean(), patches.mean().numpy()[..., examples, :, :])


@FAST
@given(case=cases())
def test_cast_fold_homogeneous(case):
    patches, rows, _ = case
    assert patches.cast("float32").to_dense().dtype == tf.float32
    side = patches.images.shape[-1] * np.prod(patches.window.kernel)
    folded = patches.fold(tf.constant(1)).homogeneous().to_dense()
    one = rows[..., :side].reshape(*rows.shape[:-3], 1, -1, side)
    assert_close(folded[..., :-1], one)
    np.testing.assert_array_equal(folded[..., -1], np.ones(one.shape[:-1]))


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(
    ("strides", "dilations"),
    [((1, 1), (1, 1)), ((2, 3), (1, 1)), ((1,) * 2, (2, 1))],
)
def test_padding_is_that_of_tensorflow(padding, strides, dilations):
    images = np.random.default_rng(0).normal(size=(2, 7, 8, 3))
    window = Window((3, 2), strides, dilations)
    found = padded(tf.constant(images), window, padding)
    found = Patches(found[:, tf.newaxis], window)
    expected = tf.image.extract_patches(
        images,
        [1, 3, 2, 1],
        [1, *strides, 1],
        [1, *dilations, 1],
        padding.upper(),
    )
    np.testing.assert_array_equal(
        found.to_dense(), tf.reshape(expected, [2, -1, 18])
    )


def test_causal_padding_and_wrong_one():
    window = Window((3,), (1,), (2,))
    images = tf.reshape(tf.range(1.0, 6.0), [1, 5, 1])
    padded_images = padded(images, window, "causal")
    rows = Patches(padded_images[:, tf.newaxis], window).to_dense()
    np.testing.assert_array_equal(rows[0, :, -1], images[0, :, 0])
    np.testing.assert_array_equal(rows[0, 4], [1.0, 3.0, 5.0])
    with pytest.raises(ValueError, match="padding='full'"):
        padded(images, window, "full")


@pytest.mark.slow
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("spatial", [(6, 5), (None, None)])
def test_unknown_sizes_in_a_graph(jit_compile, spatial):
    """Chunks of examples and a folded batch, all of unknown length."""
    window = Window((3, 2), (1, 1), (1, 1))

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, *spatial, 2], tf.float64),
            tf.TensorSpec([None], tf.float64),
        ],
        jit_compile=jit_compile,
    )
    def traced(images, factors):
        patches = Patches(images[:, tf.newaxis], window)
        patches = patches.fold(tf.shape(factors)[0])
        patches = patches.homogeneous().scale(factors)
        matrix = tf.ones([13, 2], tf.float64)
        return (
            second_moment(images, window, 300),
            patches.second_moment(),
            patches.squares(),
            patches.mean(),
            patches.take(tf.constant([1, 0])).matmul(matrix),
        )

    rng = np.random.default_rng(0)
    for per_example in (1, 3):
        images = rng.normal(size=(2 * per_example, 6, 5, 2))
        factors = rng.normal(size=2)
        plain = loop(images, window, 1)[0]
        rows = loop(images, window, 2, np.ones(len(images)))
        rows = factors[:, None, None] * rows
        found = traced(images, factors)
        moment = np.einsum("bsi,bsj->ij", rows, rows)
        assert_close(found[0], plain.T @ plain)
        assert_close(found[1], moment)
        assert_close(found[2], np.diag(moment))
        assert_close(found[3], rows.mean(axis=1, keepdims=True))
        assert_close(found[4], rows[::-1] @ np.ones((13, 2)))
