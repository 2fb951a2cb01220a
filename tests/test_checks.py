"""Numbers that users pass."""

import math

import numpy as np
import pytest

import keras_natgrad as kng
from keras_natgrad.checks import (
    check_fraction,
    check_integer,
    check_period,
    check_positive,
    check_seed,
    is_number,
)

NOT_NUMBERS = ["x", None, math.nan, math.inf, True, [1.0], 1j, np.ones(2)]


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_not_numbers(value):
    assert not is_number(value)
    for check in (check_positive, check_fraction, check_period, check_seed):
        arguments = (value,) if check is check_seed else ("name", value)
        with pytest.raises(ValueError, match="Received: "):
            check(*arguments)


@pytest.mark.parametrize("value", [0, -1.0])
def test_not_positive(value):
    with pytest.raises(ValueError, match="`name` must be a positive number"):
        check_positive("name", value)


@pytest.mark.parametrize("value", [1, 0.5, np.float64(2.0), np.float32(0.5)])
def test_positive(value):
    found = check_positive("name", value)
    assert type(found) is float and found == value


@pytest.mark.parametrize("value", [1, 1.0, -0.1])
def test_not_a_fraction(value):
    with pytest.raises(ValueError, match=r"`name` must be a float in \[0, 1\)"):
        check_fraction("name", value)


@pytest.mark.parametrize("value", [0, 0.5, np.float32(0.5), np.int64(0)])
def test_fraction(value):
    found = check_fraction("name", value)
    assert type(found) is float and found == value


@pytest.mark.parametrize("value", [1, 7, np.int32(7)])
def test_check_period(value):
    found = check_period("period", value)
    assert type(found) is int and found == value


@pytest.mark.parametrize("value", [0, -1, 1.5, 2.0, True, None, "5"])
def test_check_period_of_something_else(value):
    with pytest.raises(ValueError, match="`every` must be a positive") as error:
        check_period("every", value)
    assert f"Received: every={value!r}" in str(error.value)


@pytest.mark.parametrize("value", [0, 0.5])
def test_check_integer(value):
    assert check_integer("name", np.int64(1), 1) == 1
    with pytest.raises(ValueError, match="integer of at least 1"):
        check_integer("name", value, 1)


@pytest.mark.parametrize("value", [0.5, 2**31])
def test_check_seed(value):
    assert check_seed(np.int64(-3)) == -3
    with pytest.raises(ValueError, match="`seed` must be an integer"):
        check_seed(value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"damping": np.float32(0.5)},
        {"momentum": np.float64(0.5)},
        {"norm_constraint": np.float32(0.5)},
        {"inverse_update_period": np.int64(5)},
        {"factor_decay": np.float32(0.5)},
        {"seed": np.int32(5)},
    ],
)
def test_kfac_takes_scalars_of_numpy(arguments):
    optimizer = kng.KFAC(**arguments)
    ((name, value),) = arguments.items()
    found = optimizer.get_config()[name]
    assert type(found) in (int, float) and found == value


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kng.KFAC(kng.LineSearch), "an instance of LineSearch"),
        (lambda: kng.KFAC(refresh_growth="x"), "`refresh_growth` must be"),
        (lambda: kng.KFAC(seed=None), "`seed` must be an integer"),
        (lambda: kng.KFAC(damping=math.inf), "`damping` must be"),
        (lambda: kng.KFAC(norm_constraint=True), "`norm_constraint` must be"),
        (lambda: kng.NaturalGradient(momentum="auto"), "`momentum` must be"),
        (lambda: kng.NaturalGradient(momentum=kng.Spring), "must be"),
        (
            lambda: kng.NaturalGradient(max_elements=1.5),
            "`max_elements` must be",
        ),
        (lambda: kng.LevenbergMarquardt(decay="x"), "`decay` must be"),
        (lambda: kng.LevenbergMarquardt(minimum=None), "`minimum` must lie"),
        (lambda: kng.QuadraticModel(decay="x"), "`decay` must be"),
        (lambda: kng.LineSearch(largest="x"), "`largest` must be"),
        (lambda: kng.Spring("x"), "must be in"),
    ],
)
def test_arguments_that_are_no_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()
