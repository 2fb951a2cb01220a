"""Residual models against NumPy, and against steps made by hand."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from tests.reference.unknown import Unknown
from tests.training.networks import assert_close, assert_equal, state, weights

MODES = {
    "eager": {"run_eagerly": True},
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
}
WEIGHTS = (1.0, 3.0)

pytestmark = pytest.mark.usefixtures("float64")


@keras.saving.register_keras_serializable(package="tests")
def equation(network, x):
    """The residual of u' = u."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        u = network(x)
    return tape.gradient(u, x) - u


@keras.saving.register_keras_serializable(package="tests")
def start(network, x):
    """The residual of u(0) = 1."""
    return network(x) - 1.0


@keras.saving.register_keras_serializable(package="tests")
def fit_targets(network, points):
    x, y = points
    return network(x) - y


def make_network(units=6):
    return keras.Sequential(
        [
            keras.Input((1,)),
            keras.layers.Dense(
                units,
                "tanh",
                kernel_initializer=keras.initializers.GlorotNormal(seed=1),
            ),
            keras.layers.Dense(
                1, kernel_initializer=keras.initializers.GlorotNormal(seed=2)
            ),
        ]
    )


def make_points(count=11):
    return np.linspace(0.0, 1.0, count)[:, np.newaxis], np.zeros((1, 1))


def dataset(steps=1, points=None):
    return tf.data.Dataset.from_tensors(
        make_points() if points is None else points
    ).repeat(steps)


def make_model(optimizer=None, weighting=WEIGHTS, network=None, **mode):
    model = kng.ResidualModel(
        make_network() if network is None else network,
        (equation, start),
        weighting,
    )
    optimizer = kng.NaturalGradient() if optimizer is None else optimizer
    model.compile(optimizer, **(mode or MODES["eager"]))
    return model


def numpy_loss(values, weighting=WEIGHTS):
    """The loss from the weights of the network, derivatives by hand."""
    kernel, bias, top, offset = values

    def u(x):
        return np.tanh(x @ kernel + bias) @ top + offset

    def slope(x):
        hidden = np.tanh(x @ kernel + bias)
        return (kernel * (1.0 - hidden**2)) @ top

    x, x_start = make_points()
    residuals = (slope(x) - u(x), u(x_start) - 1.0)
    return sum(
        0.5 * weight * np.mean(r**2)
        for weight, r in zip(weighting, residuals, strict=True)
    )


def numpy_gradient(values):
    """Central differences of `numpy_loss`."""
    gradients = [np.zeros_like(value) for value in values]
    for value, gradient in zip(values, gradients, strict=True):
        for index in np.ndindex(value.shape):
            kept = value[index]
            for sign in (1.0, -1.0):
                value[index] = kept + sign * 1e-5
                gradient[index] += sign * numpy_loss(values) / 2e-5
            value[index] = kept
    return gradients


# ---- Training --------------------------------------------------------------


@pytest.mark.variants("graph")
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_fit_solves_the_equation(mode):
    model = make_model(**mode)
    before = numpy_loss(weights(model))
    history = model.fit(dataset(8), epochs=3, verbose=0).history
    assert numpy_loss(weights(model)) < 1e-4 * before
    assert list(history) == ["loss"]
    # u' = u, u(0) = 1.
    x = np.linspace(0.0, 1.0, 7)[:, np.newaxis]
    np.testing.assert_allclose(model.predict(x, verbose=0), np.exp(x), rtol=0.1)


@pytest.mark.variants("eager")
@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("eager", {}),
        ("graph", {}),
        ("xla", {}),
        ("graph", {"learning_rate": kng.LineSearch(), "damping": 1e-8}),
        ("graph", {"solver": "cg", "damping": 1e-3}),
    ],
    ids=["eager", "graph", "xla", "line search", "cg"],
)
def test_fit_equals_steps_made_by_hand(mode, settings):
    model = make_model(kng.NaturalGradient(**settings), **MODES[mode])
    model.fit(dataset(3), verbose=0)

    network = make_network()
    optimizer = kng.NaturalGradient(**settings)
    x, x_start = (tf.constant(points) for points in make_points())

    @tf.function
    def step():
        optimizer.minimize_residuals(
            (lambda p: equation(network, p), lambda p: start(network, p)),
            network.trainable_variables,
            (x, x_start),
            WEIGHTS,
        )

    for _ in range(3):
        step()
    assert_close(weights(model), weights(network), rtol=1e-5)
    assert int(model.optimizer.iterations) == 3


def test_weights_default_to_ones():
    models = [make_model(weighting=w) for w in (None, (1.0, 1.0))]
    for model in models:
        model.fit(dataset(), verbose=0)
    assert_equal(*(weights(model) for model in models))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_an_optimizer_of_keras_follows_the_gradient(mode):
    model = make_model(keras.optimizers.SGD(0.1), **mode)
    before = weights(model)
    logs = model.train_on_batch(*make_points())
    np.testing.assert_allclose(logs, numpy_loss(before), rtol=1e-6)
    expected = [
        value - 0.1 * gradient
        for value, gradient in zip(before, numpy_gradient(before), strict=True)
    ]
    assert_close(weights(model), expected, rtol=1e-7, atol=1e-9)


def test_adam_lowers_the_loss():
    model = make_model(keras.optimizers.Adam(1e-2), jit_compile=False)
    before = numpy_loss(weights(model))
    model.fit(dataset(150), verbose=0)
    assert numpy_loss(weights(model)) < 0.1 * before


# ---- Data and logs ---------------------------------------------------------


def test_the_loss_is_that_before_the_step():
    model = make_model()
    expected = numpy_loss(weights(model))
    history = model.fit(dataset(), verbose=0).history
    # The metric is float64, as the float type of Keras is here.
    np.testing.assert_allclose(history["loss"], [expected], rtol=1e-12)


def test_evaluate_reports_the_loss_and_changes_nothing():
    model = make_model()
    model.fit(dataset(), verbose=0)
    before = state(model)
    loss = model.evaluate(dataset(), verbose=0)
    np.testing.assert_allclose(loss, numpy_loss(weights(model)), rtol=1e-12)
    assert_equal(state(model), before)
    history = model.fit(dataset(), validation_data=dataset(), verbose=0).history
    assert set(history) == {"loss", "val_loss"}


@pytest.mark.variants("False")
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_tensor_is_cut_into_batches(wrapped):
    """One function takes a tensor; `fit` cuts it as any other data."""
    x = make_points(10)[0]
    functions = (equation,) if wrapped else equation
    model = kng.ResidualModel(make_network(), functions)
    model.compile(kng.NaturalGradient(), jit_compile=False)
    model.fit(x, batch_size=4, shuffle=False, verbose=0)

    network = make_network()
    optimizer = kng.NaturalGradient()
    for part in (x[:4], x[4:8], x[8:]):
        optimizer.minimize_residuals(
            lambda p: equation(network, p),
            network.trainable_variables,
            tf.constant(part),
        )
    assert_close(weights(model), weights(network), rtol=1e-6)


@pytest.mark.slow
def test_one_function_gets_the_element_as_it_is():
    """Nonlinear least squares on inputs and targets."""
    x = make_points(20)[0]
    model = kng.ResidualModel(make_network(), fit_targets)
    model.compile(kng.NaturalGradient(), jit_compile=False)
    model.fit(x, np.sin(3.0 * x), batch_size=20, epochs=40, verbose=0)
    np.testing.assert_allclose(model(x), np.sin(3.0 * x), atol=0.05)


def test_statistics_are_logged_where_asked_for():
    model = make_model(kng.NaturalGradient(log_statistics=True, name="ng"))
    history = model.fit(dataset(), verbose=0).history
    assert history["ng_batches"] == [1]


def test_float64_points_stay_float64():
    """Also where the float type of Keras is float32."""
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    network = keras.Sequential(
        [
            keras.Input((1,), dtype="float64"),
            keras.layers.Dense(1, dtype="float64"),
        ]
    )
    seen = []

    def residual(network, x):
        seen.append(x.dtype)
        return network(x)

    model = kng.ResidualModel(network, residual)
    model.compile(kng.NaturalGradient(), run_eagerly=True)
    model.fit(tf.data.Dataset.from_tensors(make_points()[0]), verbose=0)
    assert set(seen) == {tf.float64}
    assert model(make_points()[0]).dtype == tf.float64


# ---- Saving ----------------------------------------------------------------


def test_a_loaded_model_continues(tmp_path):
    model = make_model(**MODES["graph"])
    model.fit(dataset(4), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.residuals == (equation, start)
    assert_equal(state(loaded), state(model))
    for each in (model, loaded):
        each.fit(dataset(4), verbose=0)
    assert_equal(state(loaded), state(model))


def test_weights_alone_are_saved(tmp_path):
    model = make_model()
    model.fit(dataset(), verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    other = make_model()
    other.load_weights(tmp_path / "model.weights.h5")
    assert_equal(weights(other), weights(model))


def test_functions_that_are_not_registered_are_refused(tmp_path):
    def mine(network, x):
        return network(x)

    model = kng.ResidualModel(make_network(), mine)
    with pytest.raises(ValueError, match="'mine' is not registered"):
        model.save(tmp_path / "model.keras")
    config = make_model().get_config()
    config["residuals"] = ["tests>equation", "tests>gone"]
    with pytest.raises(ValueError, match=r"not registered; .*'tests>gone'"):
        kng.ResidualModel.from_config(config)


# ---- Refusals --------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": equation}, "must be a keras.Model. Received: network="),
        (
            {"network": keras.Sequential([keras.layers.Dense(1)])},
            "must be built",
        ),
        ({"residuals": "mse"}, "must be a function .* residuals='mse'"),
        ({"residuals": ()}, r"must be a function .* residuals=\(\)"),
        ({"residuals": (equation, 3)}, "must be a function"),
        ({"weights": (1.0, -1.0)}, r"non-negative.*weights=\[1.0, -1.0\]"),
        ({"weights": (1.0, float("nan"))}, "non-negative"),
        ({"weights": (1.0,)}, r"one per residual .*\[1.0\] for 2 functions"),
    ],
)
def test_bad_arguments(arguments, message):
    defaults = {"network": None, "residuals": (equation, start)}
    arguments = {**defaults, **arguments}
    if arguments["network"] is None:
        arguments["network"] = make_network()
    with pytest.raises(ValueError, match=message):
        kng.ResidualModel(**arguments)


def test_data_of_another_number_of_tensors():
    model = make_model()
    with pytest.raises(ValueError, match="2 functions and 1 tensors"):
        model.fit(make_points()[0], verbose=0)
    with pytest.raises(ValueError, match="2 functions and 3 tensors"):
        model.fit(dataset(points=(*make_points(), np.ones((2, 1)))), verbose=0)


@pytest.mark.parametrize("extra", [{"loss": "mse"}, {"metrics": ["mae"]}])
def test_a_compiled_loss_is_refused(extra):
    model = make_model()
    model.compile(kng.NaturalGradient(), run_eagerly=True, **extra)
    with pytest.raises(ValueError, match="without loss and metrics"):
        model.fit(dataset(), verbose=0)


def test_a_regularizer_is_refused():
    network = keras.Sequential(
        [keras.Input((1,)), keras.layers.Dense(1, kernel_regularizer="l2")]
    )
    model = make_model(network=network)
    with pytest.raises(ValueError, match="residuals alone.* 1 added losses"):
        model.fit(dataset(), verbose=0)


@pytest.mark.parametrize(
    "make",
    [
        kng.KFAC,
        lambda: keras.optimizers.LossScaleOptimizer(kng.NaturalGradient()),
    ],
)
def test_other_optimizers_of_the_package_are_refused(make):
    optimizer = make()
    model = make_model(optimizer)
    name = type(optimizer).__name__
    with pytest.raises(ValueError, match=f"Received: optimizer={name}"):
        model.fit(dataset(), verbose=0)


def test_layers_that_are_not_captured_raise_no_warning(recwarn):
    network = keras.Sequential(
        [
            keras.Input((1,)),
            keras.layers.Dense(4, "tanh"),
            Unknown(),
            keras.layers.Dense(1),
        ]
    )
    make_model(network=network).fit(dataset(), verbose=0)
    assert not [w for w in recwarn if "fallback" in str(w.message)]
