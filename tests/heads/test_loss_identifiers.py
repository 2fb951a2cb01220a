"""Which losses have a head, and in which forms they may be given."""

import functools

import keras
import numpy as np
import pytest

from keras_natgrad import heads
from keras_natgrad.heads import LossWeight, from_loss, register_loss

MSE, BCE = heads.Normal(scale=0.5**0.5), heads.Bernoulli(from_logits=False)
CCE = heads.Categorical(from_logits=False, sparse=False)
SCCE = heads.Categorical(from_logits=False, sparse=True)


@pytest.mark.parametrize(
    ("loss", "head", "units"),
    [
        ("mse", MSE, "mean"),
        ("MSE", MSE, "mean"),
        ("mean_squared_error", MSE, "mean"),
        ("MeanSquaredError", MSE, "mean"),
        (keras.losses.mean_squared_error, MSE, "mean"),
        (keras.losses.MeanSquaredError, MSE, "mean"),
        (keras.losses.serialize(keras.losses.MeanSquaredError()), MSE, "mean"),
        ("bce", BCE, "mean"),
        ("BCE", BCE, "mean"),
        ("binary_crossentropy", BCE, "mean"),
        (keras.losses.BinaryCrossentropy(), BCE, "mean"),
        ("categorical_crossentropy", CCE, "sum"),
        ("CategoricalCrossentropy", CCE, "sum"),
        ("sparse_categorical_crossentropy", SCCE, "sum"),
        (keras.losses.sparse_categorical_crossentropy, SCCE, "sum"),
        ("mae", heads.Laplace(scale=1.0), "mean"),
        (keras.losses.MeanAbsoluteError(), heads.Laplace(scale=1.0), "mean"),
        ("poisson", heads.Poisson("identity"), "mean"),
        ("kl_divergence", CCE, "sum"),
    ],
)
def test_identifiers(loss, head, units):
    open_scale = head == heads.Laplace(scale=1.0)
    weight = LossWeight(units=units, open_scale=open_scale)
    assert from_loss(loss) == (head, weight)


def test_options_of_partial_functions():
    loss = functools.partial(
        keras.losses.binary_crossentropy, from_logits=True, label_smoothing=0.1
    )
    assert from_loss(loss)[0] == heads.Bernoulli(from_logits=True)
    loss = functools.partial(
        keras.losses.sparse_categorical_crossentropy, ignore_class=0
    )
    assert from_loss(loss)[1] == LossWeight(ignore_class=0)
    with pytest.raises(ValueError, match="No head is known"):
        from_loss(functools.partial(keras.losses.mean_squared_error, 0.0))


@pytest.mark.parametrize(
    "function",
    [
        keras.losses.binary_crossentropy,
        functools.partial(keras.losses.binary_crossentropy, from_logits=True),
    ],
)
def test_function_wrapped_by_compile(function):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", loss=function)
    model.train_on_batch(np.zeros((2, 2)), np.zeros((2, 1)))
    (entry,) = model._compile_loss._flat_losses
    assert from_loss(entry.loss) == from_loss(function)


def test_options_of_a_wrapper():
    wrapper = keras.losses.MeanSquaredError.__base__
    loss = wrapper(
        keras.losses.binary_crossentropy, reduction="sum", from_logits=True
    )
    expected = (heads.Bernoulli(), LossWeight("sum", units="mean"))
    assert from_loss(loss) == expected


@pytest.mark.parametrize("name", ["crossentropy", "CE"])
def test_crossentropy_is_chosen_by_the_outputs(name):
    assert from_loss(name, (None, 1))[0] == BCE
    assert from_loss(name, (None, 3))[0] == SCCE
    with pytest.raises(ValueError, match=r"Pass outputs_shape=.*=None"):
        from_loss(name)


class HalfSquaredError(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return 0.5 * keras.ops.sum((y_true - y_pred) ** 2, axis=-1)


class OtherMeanSquaredError(keras.losses.MeanSquaredError):
    def call(self, y_true, y_pred):
        return 2.0 * super().call(y_true, y_pred)


def half_squared_error(y_true, y_pred):
    return HalfSquaredError().call(y_true, y_pred)


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        ("mape", "'mape'"),
        ("nonsense", "'nonsense'"),
        (keras.losses.Dice(), "Dice"),
        (keras.losses.hinge, "hinge"),
        (HalfSquaredError(name="half"), r"HalfSquaredError\(name='half'\)"),
        (OtherMeanSquaredError(), "OtherMeanSquaredError"),
        (lambda y, p: 0.0, "<lambda>"),
        (None, "None"),
        (["mse", "mse"], r"\['mse', 'mse'\]"),
        ({"a": "mse"}, "{'a': 'mse'}"),
    ],
)
def test_unknown_losses(loss, name):
    message = (
        rf"No head is known for the loss {name}.*Pass "
        r"head=keras_natgrad.heads.<Head>\(...\) to attach\(\), or use "
        r"loss=keras_natgrad.losses.NegativeLogLikelihood\(head\)."
    )
    with pytest.raises(ValueError, match=message):
        from_loss(loss)


def test_wrapped_lambda_is_unknown_and_not_serialised(recwarn):
    wrapper = keras.losses.MeanSquaredError.__base__
    with pytest.raises(ValueError, match="No head is known"):
        from_loss(wrapper(lambda y_true, y_pred: 0.0))
    assert not recwarn.list


@pytest.mark.parametrize("axis", [1, -2])
def test_other_axes_are_an_error(axis):
    loss = keras.losses.CategoricalCrossentropy(axis=axis)
    message = rf"over the last axis.*axis={axis}, outputs_shape=\(4, 3, 5\)"
    with pytest.raises(ValueError, match=message):
        from_loss(loss, (4, 3, 5))
    with pytest.raises(ValueError, match="outputs_shape=None"):
        from_loss(loss)


def test_last_axis_may_be_counted_from_the_front():
    loss = keras.losses.CategoricalCrossentropy(axis=1)
    assert from_loss(loss, (None, 3))[0] == CCE


def test_outputs_must_fit_the_head():
    with pytest.raises(ValueError, match="at least two"):
        from_loss("categorical_crossentropy", (None, 1))


@pytest.fixture
def registry(monkeypatch):
    """Forget at the end of a test what it registered."""
    from keras_natgrad.heads import losses

    monkeypatch.setattr(losses, "_CONVERTERS", dict(losses._CONVERTERS))


@pytest.mark.parametrize("reduction", ["sum", None])
def test_registered_class(registry, reduction):
    def convert(loss):
        assert isinstance(loss, HalfSquaredError)
        return heads.Normal(), LossWeight(units="sum")

    assert register_loss(HalfSquaredError, convert) is convert
    loss = HalfSquaredError(reduction=reduction)
    assert from_loss(loss) == (heads.Normal(), LossWeight(reduction))
    assert from_loss(HalfSquaredError)[1] == LossWeight()


def test_registered_function(registry):
    def convert(loss):
        assert loss is half_squared_error
        return heads.Normal(), LossWeight()

    register_loss(half_squared_error, convert)
    assert from_loss(half_squared_error) == (heads.Normal(), LossWeight())
    wrapper = keras.losses.MeanSquaredError.__base__
    wrapped = wrapper(half_squared_error, reduction="sum")
    assert from_loss(wrapped) == (heads.Normal(), LossWeight("sum"))
    with pytest.raises(ValueError, match="No head is known"):
        from_loss(wrapper(half_squared_error, option=1))
    with pytest.raises(ValueError, match="No head is known"):
        from_loss(functools.partial(half_squared_error, y_true=0.0))


@pytest.mark.parametrize("loss", ["mse", keras.losses.MeanSquaredError()])
def test_only_classes_and_functions_are_registered(loss):
    message = "not an instance or a name. Received: loss_class_or_function="
    with pytest.raises(ValueError, match=message):
        register_loss(loss, lambda loss: (heads.Normal(), LossWeight()))
