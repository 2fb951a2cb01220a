"""`minimize_residuals` against NumPy, and what it refuses."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng

X = np.random.default_rng(0).normal(size=(12, 2))
EDGE = np.random.default_rng(1).normal(size=(5, 2))


def network():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(4, "tanh"),
            keras.layers.Dense(1),
        ]
    )
    return model


def residuals_of(model):
    """Residuals with a derivative of the network inside, and plain ones."""

    def interior(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = model(x)
        slope = tape.gradient(value, x)
        return slope[:, 0] + value[:, 0] - tf.sin(x[:, 1])

    def boundary(x):
        return model(x)[:, 0] - 1.0

    return interior, boundary


def flat_jacobian(function, variables):
    """By central differences, independent of any tape."""
    columns = []
    for variable in variables:
        value = variable.numpy()
        for index in np.ndindex(value.shape):
            sides = []
            for sign in (1, -1):
                moved = value.copy()
                moved[index] += sign * 1e-6
                variable.assign(moved)
                sides.append(np.asarray(function()))
            columns.append((sides[0] - sides[1]) / 2e-6)
            variable.assign(value)
    return np.stack(columns, axis=1)


@pytest.mark.variants("kernel-True", "dense-True")
@pytest.mark.parametrize("points", [True, False])
@pytest.mark.parametrize("solver", ["kernel", "dense"])
def test_step_equals_gauss_newton(solver, points, float64):
    model = network()
    interior, boundary = residuals_of(model)
    x, edge = tf.constant(X), tf.constant(EDGE)
    variables = model.trainable_variables

    def scaled():
        return np.concatenate(
            [
                interior(x) * np.sqrt(1 / 12),
                boundary(edge) * np.sqrt(3.0 / 5),
            ]
        )

    r, jacobian = scaled(), flat_jacobian(scaled, variables)
    before = np.concatenate([v.numpy().ravel() for v in variables])
    step = np.linalg.solve(
        jacobian.T @ jacobian + 0.01 * np.eye(17), jacobian.T @ r
    )
    optimizer = kng.NaturalGradient(1.0, 0.01, solver)
    if points:
        loss = optimizer.minimize_residuals(
            (interior, boundary), variables, (x, edge), (1.0, 3.0)
        )
    else:
        loss = optimizer.minimize_residuals(
            lambda: (interior(x), boundary(edge)), variables, None, (1.0, 3.0)
        )
    np.testing.assert_allclose(loss, 0.5 * np.sum(r**2), rtol=1e-12)
    after = np.concatenate([v.numpy().ravel() for v in variables])
    np.testing.assert_allclose(after, before - step, rtol=1e-5, atol=1e-7)


@pytest.mark.variants("auto-graph")
@pytest.mark.parametrize(
    "mode", ["graph", pytest.param("xla", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("solver", ["auto", "kernel", "cg"])
def test_modes_agree(solver, mode, float64):
    results = []
    for each in ("eager", mode):
        model = network()
        optimizer = kng.NaturalGradient(0.5, 0.1, solver)
        points = (tf.constant(X), tf.constant(EDGE))

        def step(model=model, optimizer=optimizer, points=points):
            return optimizer.minimize_residuals(
                residuals_of(model), model.trainable_variables, points
            )

        if each != "eager":
            optimizer.build(model.trainable_variables)
            step = tf.function(step, jit_compile=each == "xla")
        losses = [float(step()) for _ in range(5)]
        results.append(losses)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-7)
    assert results[0][-1] < 0.7 * results[0][0]


def test_several_residuals_per_point(float64):
    model = network()

    def pair(x):
        value = model(x)[:, 0]
        return tf.stack([value - x[:, 0], 2 * value], axis=1)

    def fused():
        return pair(tf.constant(X))

    results = []
    for arguments in ((pair, X), (fused, None)):
        model.set_weights(network().get_weights())
        optimizer = kng.NaturalGradient(1.0, 0.01, "dense")
        optimizer.minimize_residuals(
            arguments[0], model.trainable_variables, arguments[1]
        )
        results.append(np.concatenate([w.ravel() for w in model.get_weights()]))
    np.testing.assert_allclose(*results, rtol=1e-8)


def test_default_arguments_solve_a_fit(float64):
    model = network()
    optimizer = kng.NaturalGradient()
    x = tf.constant(X)

    @tf.function
    def step():
        return optimizer.minimize_residuals(
            lambda x: model(x)[:, 0] - tf.sin(x[:, 0]),
            model.trainable_variables,
            x,
        )

    losses = [float(step()) for _ in range(60)]
    assert losses[-1] < 1e-6 * losses[0]


def test_attached_model_gives_the_variables():
    model = network()
    optimizer = kng.NaturalGradient().attach(model)
    first = optimizer.minimize_residuals(lambda: model(X)[:, 0])
    second = optimizer.minimize_residuals(lambda: model(X)[:, 0])
    assert second < first


def test_residuals_that_are_not_finite_are_skipped():
    model = network()
    optimizer = kng.NaturalGradient()
    before = model.get_weights()
    optimizer.minimize_residuals(
        lambda: model(X)[:, 0] / tf.zeros([12]), model.trainable_variables
    )
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert optimizer.statistics["skipped"] == 1


@pytest.mark.parametrize(
    "residuals, points, weights, message",
    [
        (lambda m: lambda: tf.constant([1, 2]), None, None, "floating-point"),
        (lambda m: lambda: tf.ones([3]), None, None, "do not depend"),
        (lambda m: 3.0, None, None, "must be a function"),
        (lambda m: (m, m), None, None, "needs `points`"),
        (lambda m: (m, m), (X,), None, "one element per residual function"),
        (lambda m: m, X, (1.0, 2.0), "1 tensors"),
        (lambda m: m, X, (-1.0,), "non-negative"),
        (lambda m: lambda x: m(x)[:3, 0], X, None, r"\(3,\).*12 points"),
        (lambda m: lambda x: (m(x), m(x)), X, None, "return one tensor"),
    ],
)
def test_bad_input(residuals, points, weights, message):
    model = network()
    optimizer = kng.NaturalGradient()
    before = model.get_weights()
    with pytest.raises(ValueError, match=message):
        optimizer.minimize_residuals(
            residuals(model), model.trainable_variables, points, weights
        )
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_residuals_of_another_precision(float64):
    model = network()
    with pytest.raises(ValueError, match="float32.*float64"):
        kng.NaturalGradient().minimize_residuals(
            lambda: tf.cast(model(X)[:, 0], tf.float32),
            model.trainable_variables,
        )


def test_state_of_an_optimizer_that_was_never_attached(tmp_path):
    """It is created from the variables alone, as Keras does on loading."""
    model = network()
    optimizer = kng.NaturalGradient(0.1, momentum=kng.Spring(0.5))
    for _ in range(3):
        optimizer.minimize_residuals(
            lambda: model(X)[:, 0], model.trainable_variables
        )
    copy = kng.NaturalGradient.from_config(optimizer.get_config())
    copy.build(model.trainable_variables)
    assert [v.path for v in copy.variables] == [
        v.path for v in optimizer.variables
    ]


def test_neither_attached_nor_variables():
    with pytest.raises(ValueError, match="not attached"):
        kng.NaturalGradient().minimize_residuals(lambda: tf.ones([3]))
