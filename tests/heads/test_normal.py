import numpy as np
import pytest

from keras_natgrad.heads import Normal


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_scale_must_be_positive(scale):
    with pytest.raises(ValueError, match=f"positive.*scale={scale}"):
        Normal(scale=scale)


def test_any_number_of_units_is_valid():
    for units in (1, 2, None):
        assert Normal().validate((None, units)) is None


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 1)])
def test_trailing_axis_of_one_unit(shape):
    outputs, targets = np.zeros((4, 1)), np.arange(4.0)
    log_prob = Normal().log_prob(outputs, targets.reshape(shape))
    expected = -0.5 * targets**2 - 0.5 * np.log(2.0 * np.pi)
    np.testing.assert_allclose(log_prob, expected)


def test_targets_are_not_broadcast():
    message = r"shape \(4, 3\). Received: targets.shape=\(4, 1\)"
    with pytest.raises(ValueError, match=message):
        Normal().log_prob(np.zeros((4, 3)), np.zeros((4, 1)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_targets_must_be_finite(value):
    outputs, targets = np.zeros((2, 2)), np.array([[0.0, 1.0], [value, 0.0]])
    assert not bool(Normal().targets_in_support(outputs, targets))
    message = rf"finite numbers.*shape \(2, 2\) and dtype float64.*{value}"
    with pytest.raises(ValueError, match=message):
        Normal().validate_targets(outputs, targets)
