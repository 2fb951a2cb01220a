import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad import heads
from keras_natgrad.losses import NegativeLogLikelihood

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("reduction", ["sum", "sum_over_batch_size", None])
def test_value(reduction):
    outputs, targets = RNG.normal(size=(2, 4, 3))
    loss = NegativeLogLikelihood(heads.Normal(scale=0.5), reduction)
    z = (targets - outputs) / 0.5
    each = np.sum(0.5 * z**2 + np.log(0.5 * np.sqrt(2.0 * np.pi)), axis=-1)
    expected = {"sum": np.sum(each), None: each}.get(reduction, np.mean(each))
    np.testing.assert_allclose(loss(targets, outputs), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("head", "reference", "factor"),
    [
        # A sum over units where Keras takes the mean.
        (heads.Bernoulli(), keras.losses.BinaryCrossentropy(True), 3.0),
        (
            heads.Categorical(),
            keras.losses.SparseCategoricalCrossentropy(True),
            1.0,
        ),
    ],
)
def test_value_is_that_of_the_keras_loss(head, reference, factor):
    outputs = RNG.normal(size=(4, 5, 3))
    targets = RNG.integers(0, 3, size=(4, 5))
    if isinstance(head, heads.Bernoulli):
        targets = np.eye(3)[targets]
    weight = RNG.uniform(size=(4, 5))
    mask = keras.ops.convert_to_tensor(RNG.uniform(size=(4, 5)) < 0.5)
    outputs = tf.constant(outputs, tf.float32)
    outputs._keras_mask = mask
    np.testing.assert_allclose(
        NegativeLogLikelihood(head)(targets, outputs, weight),
        factor * reference(targets, outputs, weight),
        rtol=1e-5,
    )


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
@pytest.mark.parametrize(
    ("head", "units"),
    [(heads.Normal(), 1), (heads.Bernoulli(), 1), (heads.Categorical(), 2)],
)
def test_targets_with_and_without_a_trailing_axis(head, units, shape):
    outputs = RNG.normal(size=(6, units)).astype("float32")
    targets = np.array([0, 1, 1, 0, 1, 0])
    loss = NegativeLogLikelihood(head, reduction=None)
    values = loss(targets.reshape(shape), outputs)
    assert values.shape == (6,)
    np.testing.assert_array_equal(values, loss(targets, outputs))


def test_float64():
    outputs, targets = RNG.normal(size=(2, 4, 3))
    loss = NegativeLogLikelihood("normal", dtype="float64")
    expected = 0.5 * np.mean(np.sum((targets - outputs) ** 2, axis=-1))
    expected += 1.5 * np.log(2.0 * np.pi)
    value = loss(targets, outputs)
    assert value.dtype == tf.float64
    np.testing.assert_allclose(value, expected, rtol=1e-14)


@pytest.mark.parametrize("dtype", [None, "float64"])
def test_configuration(dtype):
    loss = NegativeLogLikelihood(
        heads.Categorical(sparse=False), "sum", name="nll", dtype=dtype
    )
    config = keras.saving.serialize_keras_object(loss)
    restored = keras.saving.deserialize_keras_object(config)
    assert type(restored) is NegativeLogLikelihood
    assert restored.head == heads.Categorical(sparse=False)
    assert restored.get_config() == loss.get_config()
    assert (restored.reduction, restored.name) == ("sum", "nll")
    assert restored.dtype == (dtype or "float32")


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_saved_model_continues(tmp_path, jit_compile):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(
        keras.optimizers.Adam(0.1),
        loss=NegativeLogLikelihood(heads.Normal(scale=0.3)),
        jit_compile=jit_compile,
    )
    x, y = RNG.normal(size=(8, 3)), RNG.normal(size=(8, 2))
    first = model.train_on_batch(x, y)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.loss.head == heads.Normal(scale=0.3)
    second = model.train_on_batch(x, y)
    assert second < first
    assert loaded.train_on_batch(x, y) == second
    assert loaded.evaluate(x, y, verbose=0) == model.evaluate(x, y, verbose=0)


def test_eager_training_agrees_with_graph_training():
    x, y = RNG.normal(size=(8, 3)), RNG.integers(0, 4, size=8)
    losses = []
    for run_eagerly in (False, True):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])
        model.compile(
            "sgd",
            loss=NegativeLogLikelihood("categorical"),
            run_eagerly=run_eagerly,
        )
        losses.append([model.train_on_batch(x, y) for _ in range(2)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    assert losses[0][1] < losses[0][0]


def test_outputs_must_fit_the_head():
    loss = NegativeLogLikelihood(heads.Categorical())
    message = r"at least two.*Received: outputs_shape=\(4, 1\)"
    with pytest.raises(ValueError, match=message):
        loss(np.zeros(4), np.zeros((4, 1)))


def test_targets_must_fit_the_outputs():
    loss = NegativeLogLikelihood(heads.Normal())
    with pytest.raises(
        ValueError, match=r"targets.shape=\(4,\), outputs.shape"
    ):
        loss(np.zeros(4), np.zeros((4, 3)))


def test_head_must_be_a_head():
    with pytest.raises(ValueError, match="Received: identifier='gauss'"):
        NegativeLogLikelihood("gauss")
    with pytest.raises(ValueError, match="Received: reduction=average"):
        NegativeLogLikelihood("normal", reduction="average")
