"""EinsumDense equations in canonical form."""

import keras
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from keras_natgrad.capture import linear_maps
from keras_natgrad.capture.einsum_dense import parse_equation

from .conftest import check_both

pytestmark = pytest.mark.usefixtures("float64")

SIZES = dict(zip("abcdefxy", [4, 3, 2, 5, 3, 2, 3, 2], strict=True))

# Equation, output shape, bias axes, rows and columns of the matrix (the
# kernel's, plus one row where the bias is part of it).
CASES = [
    ("ab,bc->ac", (2,), None, 3, 2),
    ("ab,bc->ac", (2,), "c", 4, 2),
    ("abc,cd->abd", (None, 5), None, 2, 5),
    ("abc,cd->abd", (None, 5), "d", 3, 5),
    ("abc,cde->abde", (None, 5, 3), None, 2, 15),
    ("abc,cde->abde", (None, 5, 3), "de", 3, 15),
    ("abc,cde->abde", (None, 5, 3), "ed", 3, 15),
    ("abc,cde->abde", (None, 5, 3), "e", 2, 15),
    ("abc,cd->abd", (3, 5), "bd", 2, 5),
    ("abcd,cde->abe", (None, 3), None, 10, 3),
    ("abcd,cde->abe", (None, 3), "e", 11, 3),
    ("abcd,dce->abe", (None, 3), "e", 11, 3),
    ("abc,bcd->ad", (5,), "d", 7, 5),
    ("abc,bd->acd", (None, 5), "d", 4, 5),
    ("abc,cd->adb", (5, None), "d", 3, 5),
    ("abc,ced->adbe", (5, None, 3), "de", 3, 15),
    ("abc,cd->ad", (5,), "d", 3, 5),
    ("...x,xy->...y", (2,), None, 3, 2),
    ("...x,xy->...y", (2,), "y", 4, 2),
]


def shape_of(equation):
    labels = equation.split(",")[0].replace("...", "af")
    return tuple(SIZES[label] for label in labels)


def built(layer, shape):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape)
    layer(x)
    for variable in layer.weights:
        variable.assign(rng.normal(size=tuple(variable.shape)))
    return x


@pytest.mark.parametrize(
    ("equation", "output_shape", "bias_axes", "rows", "columns"), CASES
)
def test_equations(equation, output_shape, bias_axes, rows, columns):
    layer = keras.layers.EinsumDense(
        equation,
        output_shape=output_shape,
        activation="tanh",
        bias_axes=bias_axes,
    )
    x = built(layer, shape_of(equation))
    (spec,) = linear_maps(layer)
    assert (spec.layout.rows, spec.layout.columns) == (rows, columns)
    check_both(layer, [layer], x)


@pytest.mark.parametrize("bias_axes", ["e", "bd", "bde"])
def test_bias_that_is_no_homogeneous_coordinate_falls_back(bias_axes):
    layer = keras.layers.EinsumDense(
        "abc,cde->abde", output_shape=(3, 5, 3), bias_axes=bias_axes
    )
    built(layer, (4, 3, 2))
    (spec,) = linear_maps(layer)
    assert [v.path for v in spec.variables] == [layer.kernel.path]
    assert spec.layout.bias_shape is None


@pytest.mark.parametrize(
    ("equation", "output_shape"),
    [
        ("abc,abd->adc", (5, 2)),  # the kernel has the batch axis
        ("ab,bcd->ac", (2,)),  # the kernel is summed by itself
        ("abc,acd->abd", (3, 5)),  # a matrix per example
        ("ab...,bc->ac...", (2, 2)),  # trailing ellipsis
    ],
)
def test_other_equations_are_not_captured(equation, output_shape):
    layer = keras.layers.EinsumDense(equation, output_shape=output_shape)
    shape = (4, 3) if equation == "ab,bcd->ac" else (4, 3, 2)
    if equation == "ab,bcd->ac":
        assert not parse_equation(equation).is_linear_map
        return
    built(layer, shape)
    assert linear_maps(layer) == ()


# Equation, output shape, bias axes; groups, rows and columns.
GROUPED = [
    ("abc,bcd->abd", (3, 5), None, 3, 2, 5),  # a matrix per position
    ("abc,bcd->abd", (3, 5), "bd", 3, 3, 5),
    ("abc,bcd->abd", (3, 5), "d", 3, 2, 5),  # common to the groups
    ("abc,bcd->adb", (5, 3), None, 3, 2, 5),
    ("abc,bcd->adb", (5, 3), "db", 3, 2, 5),  # in another order
    ("abc,c->abc", (3, 2), None, 2, 1, 1),  # elementwise
    ("abc,c->abc", (3, 2), "c", 2, 2, 1),
    ("abc,bc->abc", (3, 2), "bc", 6, 2, 1),
    ("abc,cb->acb", (2, 3), None, 6, 1, 1),
    ("abc,cd->abcd", (3, 2, 5), "cd", 2, 2, 5),
    ("abcd,bde->acbe", (2, 3, 3), None, 3, 5, 3),
    ("...x,x->...x", (3,), "x", 3, 2, 1),
]


@pytest.mark.parametrize(
    ("equation", "output_shape", "bias_axes", "groups", "rows", "columns"),
    GROUPED,
)
def test_groups(equation, output_shape, bias_axes, groups, rows, columns):
    """A label in input, kernel and output: one matrix for each."""
    layer = keras.layers.EinsumDense(
        equation,
        output_shape=output_shape,
        activation="tanh",
        bias_axes=bias_axes,
    )
    x = built(layer, shape_of(equation))
    (spec,) = linear_maps(layer)
    layout = spec.layout
    assert (layout.groups, layout.rows, layout.columns) == (
        groups,
        rows,
        columns,
    )
    assert (spec.block == "full") == (rows * columns <= 2)
    check_both(layer, [layer], x)


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 3),
    sizes=st.lists(st.integers(1, 3), min_size=4, max_size=4),
    order=st.permutations("de"),
    bias=st.booleans(),
)
def test_random_shapes_and_output_orders(batch, sizes, order, bias):
    b, c, d, e = sizes
    sides = {"d": d, "e": e}
    outputs = "".join(order)
    # Keras 3.15 adds a bias of shape [k, 1] along the wrong axis.
    assume(not bias or sides[outputs[-1]] > 1 or sides[outputs[0]] == 1)
    layer = keras.layers.EinsumDense(
        f"abc,cde->ab{outputs}",
        output_shape=(b, *(sides[label] for label in order)),
        bias_axes=outputs if bias else None,
        dtype="float64",
    )
    check_both(layer, [layer], built(layer, (batch, b, c)))
