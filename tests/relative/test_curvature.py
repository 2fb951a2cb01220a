"""Relative metrics of the layers of a network against brute force."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad import heads
from keras_natgrad._compat import flatten_layers
from keras_natgrad.blocks import UnitwiseBlock
from keras_natgrad.capture import Taps, make_plan, match_layers
from keras_natgrad.curvature import CapturedPass, OutputTerm
from keras_natgrad.relative import (
    HorizonOptions,
    RelativeCurvature,
    ResponseOptions,
    find_sources,
    plan_metrics,
)
from keras_natgrad.relative.responses import find_response
from tests.reference import fisher, relative
from tests.reference.bridge import matrix_of, mlp, network_of, randomize
from tests.reference.heads import Term

pytestmark = pytest.mark.usefixtures("float64")

LARGE = 2**20
SIZES = (3, 4, 2, 3)
EXAMPLES = 5


def chain(activations, between=()):
    """Dense layers of `SIZES`, with other layers after the first."""
    model = keras.Sequential([keras.Input(SIZES[:1])])
    for index, activation in enumerate(activations):
        model.add(keras.layers.Dense(SIZES[1 + index], activation))
        for layer in between if index == 0 else ():
            model.add(layer)
    randomize(model)
    return model


def inputs(*shape):
    return np.random.default_rng(3).normal(size=shape or (EXAMPLES, SIZES[0]))


def metrics(model, x, horizon=1, max_elements=LARGE, coefficients=None, **kw):
    """The blocks of a model after one batch."""
    variables = model.trainable_variables
    plan = make_plan(model, variables)
    layers = [layer for layer, _ in match_layers(plan, model, variables)]
    sources = find_sources(model, layers, HorizonOptions(horizon, **kw))
    shapes = [tuple(v.shape) for v in variables]
    specs = plan_metrics(plan, sources, max_elements)
    curvature = RelativeCurvature(plan, shapes, specs, 0.0, False)

    def add_variable(name, shape, initializer):
        return keras.Variable(
            initializer, shape=shape, dtype="float64", name=name
        )

    curvature.build([f"v{i}" for i in range(len(shapes))], add_variable)
    with (
        Taps(flatten_layers(model)) as taps,
        tf.GradientTape(persistent=True) as tape,
    ):
        eta = model(x)
    if coefficients is None:
        coefficients = np.full(eta.shape[:-1], 1 / len(x))
    term = OutputTerm(eta, heads.Categorical(), tf.constant(coefficients))
    captured = CapturedPass(
        tape,
        [term],
        [taps.record(layer) for layer in layers],
        curvature.entries,
        [variable.value for variable in variables],
    )
    statistics = curvature.relative_statistics(
        captured, sources, taps, tf.constant([0, 0], tf.int32)
    )
    curvature.accumulate(statistics, 0.0)
    return [entry.block for entry in curvature.entries]


def hidden(model, x, count):
    """What enters the layer after `count` layers."""
    return keras.Sequential(model.layers[:count])(x).numpy() if count else x


def expected(model, x, activations, start, horizon):
    layers = model.layers[start : start + horizon]
    return relative.metric(
        [matrix_of(layer) for layer in layers],
        activations[start : start + horizon],
        hidden(model, x, start),
    )


TOPS = ["tanh", "sigmoid", "relu", "elu", "softmax", "linear"]


@pytest.mark.parametrize("activation", TOPS)
def test_a_layer_by_its_own_response(activation):
    activations = [activation, activation, "linear"]
    model, x = chain(activations), inputs()
    for start, block in enumerate(metrics(model, x)[:2]):
        np.testing.assert_allclose(
            block.to_dense(),
            expected(model, x, activations, start, 1),
            rtol=1e-9,
            atol=1e-12,
        )


@pytest.mark.variants(12)
@pytest.mark.parametrize("own", ["tanh", "sigmoid", "elu", "relu"])
@pytest.mark.parametrize("top", TOPS)
def test_a_layer_by_the_response_of_the_next(top, own):
    activations = [own, top, "linear"]
    model, x = chain(activations), inputs()
    first = metrics(model, x, horizon=2)[0]
    dense = expected(model, x, activations, 0, 2)
    np.testing.assert_allclose(first.to_dense(), dense, rtol=1e-9, atol=1e-12)
    # Above the bound the units keep their own blocks.
    first = metrics(model, x, horizon=2, max_elements=4 * 4**2)[0]
    assert isinstance(first, UnitwiseBlock)
    np.testing.assert_allclose(
        first.average("metric"),
        relative.unit_blocks(dense, 4, 4),
        rtol=1e-9,
        atol=1e-12,
    )


def categorical_block(model, x, parameter):
    network = network_of(model.layers)
    term = Term("categorical", np.full((len(x), 1), 1 / len(x)))
    return fisher.block(network.trace(x), [term], parameter)


@pytest.mark.parametrize(
    ("horizon", "layers"), [("full", [0, 1, 2]), (3, [0, 1, 2]), (2, [1, 2])]
)
def test_the_output_gives_the_exact_block(horizon, layers):
    """For all layers, or for those whose horizon reaches it."""
    model, x = chain(["tanh", "sigmoid", "linear"]), inputs()
    # With a horizon of 3 the first layer sees the last one's response, and
    # that is the output's.
    blocks = metrics(model, x, horizon)
    for index in layers:
        np.testing.assert_allclose(
            blocks[index].to_dense(),
            categorical_block(model, x, index),
            rtol=1e-9,
            atol=1e-12,
        )


def test_positions_respond_independently():
    activations = ["tanh", "relu", "linear"]
    x = inputs(EXAMPLES, 6, SIZES[0])
    model = keras.Sequential(
        [
            keras.Input((6, SIZES[0])),
            keras.layers.Dense(4, "tanh"),
            keras.layers.Dense(2, "relu"),
            keras.layers.Dense(3),
        ]
    )
    randomize(model)
    flat = x.reshape(-1, SIZES[0])
    coefficients = np.full((EXAMPLES, 6), 1 / (EXAMPLES * 6))
    for horizon in (1, 2):
        first = metrics(model, x, horizon, coefficients=coefficients)[0]
        np.testing.assert_allclose(
            first.to_dense(),
            6 * expected(model, flat, activations, 0, horizon),
            rtol=1e-9,
            atol=1e-12,
        )


def test_examples_count_by_their_weights():
    activations = ["tanh", "relu", "linear"]
    model, x = chain(activations), inputs()
    weights = np.array([1.0, 0.0, 2.0, 1.0, 0.0])
    repeated = np.repeat(x, weights.astype(int), axis=0)
    for horizon in (1, 2):
        first = metrics(model, x, horizon, coefficients=weights / EXAMPLES)[0]
        np.testing.assert_allclose(
            first.to_dense(),
            expected(model, repeated, activations, 0, horizon),
            rtol=1e-9,
            atol=1e-12,
        )


def test_ends_with_the_second_moment_of_the_inputs():
    model, x = chain(["tanh", "relu", "linear"]), inputs()
    blocks = metrics(model, x, ends="inputs")
    for start in (0, 2):
        extended = np.hstack([hidden(model, x, start), np.ones((EXAMPLES, 1))])
        moment = extended.T @ extended / EXAMPLES
        assert blocks[start].groups == 1
        np.testing.assert_allclose(blocks[start].average("metric")[0], moment)
    assert blocks[1].groups == 2


@pytest.mark.parametrize(
    ("bound", "groups"), [(64, 4), (63, 2), (32, 2), (16, 1), (1, 1)]
)
def test_units_share_a_metric_above_the_bound(bound, groups):
    """Four units with 4² elements each."""
    model, x = chain(["tanh", "relu", "linear"]), inputs()
    first = metrics(model, x, max_elements=bound)[0]
    units = relative.unit_blocks(
        expected(model, x, ["tanh"], 0, 1), 4, 4
    ).reshape(groups, -1, 4, 4)
    assert first.groups == groups
    np.testing.assert_allclose(
        first.average("metric"), units.mean(axis=1), rtol=1e-9, atol=1e-12
    )


# ---- Activations -----------------------------------------------------------

T = np.array([[-1.7, -0.2, 0.3, 2.1]])


def coefficient(activation, **options):
    response = find_response(activation, ResponseOptions(**options), "mine")
    return response.coefficient(tf.constant(T)).numpy()


@pytest.mark.parametrize(
    ("layer", "definition"),
    [
        (
            lambda: keras.layers.LeakyReLU(0.1),
            lambda t: relative.soft_relu(t, 0.1),
        ),
        (
            lambda: keras.layers.ReLU(negative_slope=0.3),
            lambda t: relative.soft_relu(t, 0.3),
        ),
        (lambda: keras.layers.ELU(0.5), lambda t: relative.elu(t, 0.5)),
        (
            lambda: keras.activations.leaky_relu,
            lambda t: relative.soft_relu(t, 0.2),
        ),
        (
            lambda: keras.layers.Activation("relu"),
            lambda t: relative.soft_relu(t),
        ),
    ],
)
def test_leaky_units(layer, definition):
    np.testing.assert_allclose(
        coefficient(layer()), relative.gaussian(definition)(T), rtol=1e-8
    )


def test_options_of_rectifiers():
    found = coefficient(keras.activations.relu, softness=0.5, noise_scale=2.0)
    definition = relative.gaussian(
        lambda t: relative.soft_relu(t, 0.0, 0.5), 2.0
    )
    np.testing.assert_allclose(found, definition(T), rtol=1e-8)


def test_parametric_rectifier_in_a_layer_of_its_own():
    slope = keras.layers.PReLU(alpha_initializer="ones")
    model, x = chain(["linear", "tanh", "linear"], [slope]), inputs()
    slopes = np.array([0.1, 0.2, 0.3, 0.4])
    slope.alpha.assign(slopes)
    first = metrics(model, x)[0]
    extended = np.hstack([x, np.ones((EXAMPLES, 1))])
    z = extended @ matrix_of(model.layers[0])
    for unit, own in enumerate(slopes):
        nu = relative.gaussian(lambda t, own=own: relative.soft_relu(t, own))
        metric = extended.T @ (nu(z[:, unit])[:, None] * extended) / EXAMPLES
        np.testing.assert_allclose(
            first.average("metric")[unit], metric, rtol=1e-8, atol=1e-12
        )


def test_other_activations_by_a_stated_distribution():
    def softplus(t):
        return np.log1p(np.exp(t))

    np.testing.assert_allclose(
        coefficient(keras.activations.softplus),
        relative.gaussian(softplus)(T),
        rtol=1e-8,
    )
    np.testing.assert_allclose(
        coefficient(keras.activations.softplus, noise_scale=2.0),
        relative.gaussian(softplus, 2.0)(T),
        rtol=1e-8,
    )
    counts = np.arange(200)[:, None, None]
    log_p = counts * T - np.exp(T) - np.cumsum(np.log(np.maximum(counts, 1)), 0)
    information = np.sum(np.exp(log_p) * (counts - np.exp(T)) ** 2, axis=0)
    np.testing.assert_allclose(
        coefficient(keras.activations.exponential, other_response="poisson"),
        information,
        rtol=1e-8,
    )

    def half(t):
        return 0.5 * (1 + t / (1 + abs(t)))

    np.testing.assert_allclose(
        coefficient(half, other_response="bernoulli"),
        [
            [
                slope**2 / (half(t) * (1 - half(t)))
                for t, slope in zip(
                    T[0], 0.5 / (1 + abs(T[0])) ** 2, strict=True
                )
            ]
        ],
        rtol=1e-8,
    )


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (keras.activations.log_softmax, "does not act on each unit alone"),
        (keras.activations.glu, "does not keep the shape"),
        (lambda t: tf.round(tf.stop_gradient(t)), "has no derivative"),
    ],
)
def test_activations_that_cannot_be_derived(activation, message):
    with pytest.raises(ValueError, match=f"'mine'.*({message})"):
        find_response(activation, ResponseOptions(), "mine")


def test_refused_activation():
    with pytest.raises(ValueError, match="'softplus'.*'mine'.*=None"):
        coefficient(keras.activations.softplus, other_response=None)


# ---- What cannot be followed -----------------------------------------------


@pytest.mark.parametrize(
    ("between", "message"),
    [
        ([keras.layers.BatchNormalization], "BatchNormalization"),
        ([lambda: keras.layers.EinsumDense("ab,bc->ac", 4)], "EinsumDense"),
    ],
)
def test_successor_that_is_no_dense_layer(between, message):
    model = chain(["tanh", "tanh", "linear"], [make() for make in between])
    name = model.layers[0].name
    with pytest.raises(ValueError, match=f"'{name}'.*{message}.*horizon=2"):
        metrics(model, inputs(), horizon=2)
    # A horizon of one does not look there.
    assert metrics(model, inputs())[0].groups == 4


def test_horizon_beyond_the_network():
    model = mlp([3, 4, 2])
    with pytest.raises(
        ValueError, match=f"'{model.layers[0].name}'.*horizon=3"
    ):
        metrics(model, inputs(), horizon=3)


def test_successor_used_twice_in_a_pass():
    x = keras.Input((3,))
    first, second = keras.layers.Dense(3, "tanh"), keras.layers.Dense(3, "tanh")
    left = second(first(x))
    model = keras.Model(x, keras.layers.Add()([left, second(x)]))
    second.trainable = False
    with pytest.raises(ValueError, match=f"{second.name!r} was used 2 times"):
        metrics(model, inputs(), horizon=2)
