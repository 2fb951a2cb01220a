"""Steps of NaturalGradient against NumPy, and what it refuses."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from tests.reference import fisher
from tests.reference.bridge import mlp as random_mlp
from tests.reference.bridge import network_of
from tests.reference.heads import Term
from tests.reference.unknown import Unknown
from tests.training.networks import assert_close, compiled, data, mlp, weights

CG = kng.solvers.ConjugateGradient(400, 0.0, warm_start=0.0)
MIXED = "mean and scale"


def problem(name):
    """Model, loss, inputs and targets."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(20, 3))
    real = generator.normal(size=(20, 2))
    if name == "normal":
        return random_mlp([3, 4, 2]), "mse", x, real
    if name == "categorical":
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        return random_mlp([3, 4, 3]), loss, x, generator.integers(0, 3, 20)
    head = kng.heads.Normal("softplus")
    loss = kng.losses.NegativeLogLikelihood(head)
    return random_mlp([3, 4, 2]), loss, x, real[:, :1]


def train(name, steps=20, **kwargs):
    model, loss, x, y = problem(name)
    optimizer = kng.NaturalGradient(**kwargs).attach(model)
    model.compile(optimizer, loss, run_eagerly=True)
    for _ in range(steps):
        model.train_on_batch(x, y)
    return weights(model)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("name", ["normal", "categorical", MIXED])
def test_primal_and_dual_agree_for_twenty_steps(name, momentum, float64):
    kwargs = {"learning_rate": 0.1, "damping": 0.01}
    if momentum:
        kwargs["momentum"] = kng.Spring(momentum)
    dual = train(name, solver="kernel", **kwargs)
    assert_close(train(name, solver="dense", **kwargs), dual, 1e-8, 1e-10)
    assert_close(train(name, solver=CG, **kwargs), dual, 1e-7, 1e-9)


@pytest.mark.variants("kernel")
@pytest.mark.parametrize("solver", ["kernel", "dense", CG])
def test_step_with_regularizer_equals_numpy(solver, float64):
    """`(F + λI)⁻¹ (∇ + c w)`: the penalty is no part of the residuals."""
    model, loss, x, y = problem("normal")
    penalty = 0.25  # Exact in float32, as Keras keeps it.
    for layer in model.layers:
        layer.kernel.regularizer = keras.regularizers.L2(0.5 * penalty)
    trace = network_of(model.layers).trace(x)
    term = Term("normal", np.full((20, 1), 1 / 20), scale=1.0)
    # mse is the mean over both units of the squared error.
    dense = fisher.dense(trace, [term])
    matrices = [np.vstack([k, b]) for k, b in pairs(model)]
    flat = np.concatenate([m.ravel() for m in matrices])
    errors = trace.outputs[0][:, 0] - y
    gradient = sum_of_gradients(trace, errors / 20)
    decay = np.concatenate(
        [np.vstack([penalty * k, 0 * b[None]]).ravel() for k, b in pairs(model)]
    )
    optimizer = kng.NaturalGradient(1.0, 0.05, solver).attach(model)
    model.compile(optimizer, loss, run_eagerly=True)
    model.train_on_batch(x, y)
    step = np.linalg.solve(dense + 0.05 * np.eye(len(flat)), gradient + decay)
    found = np.concatenate([np.vstack(p).ravel() for p in pairs(model)])
    np.testing.assert_allclose(found, flat - step, rtol=1e-7, atol=1e-9)


def pairs(model):
    values = [w.astype("float64") for w in weights(model)]
    return [(values[i], values[i + 1]) for i in range(0, len(values), 2)]


def sum_of_gradients(trace, cotangents):
    return np.concatenate(
        [
            np.einsum(
                "nk,nka->a",
                cotangents,
                fisher.flat_jacobian(trace, index)[:, 0],
            )
            for index in range(len(trace.inputs))
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["kernel", "dense"])
def test_float32_is_close_to_float64(solver):
    """To a few digits: the rounding unit over the relative damping."""
    results = []
    for policy in ("float32", "float64"):
        keras.config.set_dtype_policy(policy)
        try:
            kwargs = {"learning_rate": 0.1, "damping": 0.01, "solver": solver}
            results.append(train("categorical", 3, **kwargs))
        finally:
            keras.config.set_dtype_policy("float32")
    single, double = results
    assert single[0].dtype == np.float32 and double[0].dtype == np.float64
    assert_close(single, double, 1e-4, 1e-5)


def test_norm_constraint(float64):
    """With the bound C, `δᵀFδ = C` on a batch that asks for more."""
    model, loss, x, y = problem("normal")
    dense = fisher.dense(
        network_of(model.layers).trace(x),
        [Term("normal", np.full((20, 1), 1 / 20), scale=1.0)],
    )
    before = np.concatenate([np.vstack(p).ravel() for p in pairs(model)])
    optimizer = kng.NaturalGradient(damping=1e-3, norm_constraint=1e-4)
    model.compile(optimizer.attach(model), loss, run_eagerly=True)
    model.train_on_batch(x, y)
    after = np.concatenate([np.vstack(p).ravel() for p in pairs(model)])
    step = after - before
    np.testing.assert_allclose(step @ dense @ step, 1e-4, rtol=1e-8)


@pytest.mark.slow
def test_line_search_takes_the_best_power_of_two(float64):
    losses = {}
    for power in range(8):
        model, loss, x, y = problem("normal")
        optimizer = kng.NaturalGradient(2.0**-power, 1e-4).attach(model)
        model.compile(optimizer, loss, run_eagerly=True)
        model.train_on_batch(x, y)
        losses[2.0**-power] = model.evaluate(x, y, verbose=0)
    model, loss, x, y = problem("normal")
    optimizer = kng.NaturalGradient(kng.LineSearch(), 1e-4).attach(model)
    model.compile(optimizer, loss, run_eagerly=True)
    model.train_on_batch(x, y)
    best = min(losses, key=losses.get)
    assert optimizer.statistics["learning_rate"] == best
    np.testing.assert_allclose(
        model.evaluate(x, y, verbose=0), losses[best], rtol=1e-10
    )


def test_a_step_that_raises_the_loss_is_taken_back(float64):
    model, loss, x, y = problem("categorical")
    rule = kng.LevenbergMarquardt(
        initial=1e-12, period=1, minimum=0.0, inverse_ratio=1.0
    )
    optimizer = kng.NaturalGradient(damping=rule).attach(model)
    model.compile(optimizer, loss)
    before = weights(model)
    model.train_on_batch(x, y)
    assert optimizer.statistics["retracted"] == 1
    assert_close(weights(model), before, 0, 0)
    assert optimizer.statistics["damping"] > 1e-12
    losses = [model.train_on_batch(x, y) for _ in range(60)]
    assert losses[-1] < 0.8 * losses[0]
    assert all(a >= b - 1e-9 for a, b in zip(losses, losses[1:], strict=False))


@pytest.mark.variants("spring")
@pytest.mark.parametrize(
    "kwargs",
    [
        {"solver": "kernel", "momentum": kng.Spring(0.7)},
        {"solver": "cg"},
    ],
    ids=["spring", "warm start"],
)
def test_a_step_taken_back_leaves_the_previous_direction(kwargs, float64):
    """The next step must not start from a direction that was no good."""
    model, loss, x, y = problem("categorical")
    rule = kng.LevenbergMarquardt(
        initial=1.0, period=1, minimum=0.0, inverse_ratio=1.0
    )
    optimizer = kng.NaturalGradient(damping=rule, **kwargs).attach(model)
    model.compile(optimizer, loss, run_eagerly=True)

    def previous():
        return [
            variable.numpy()
            for variable in optimizer.variables
            if variable.name.endswith("_direction")
        ]

    model.train_on_batch(x, y)
    kept = previous()
    assert optimizer.statistics["retracted"] == 0
    assert all(np.any(value) for value in kept)
    # Next to no damping: a step that is far too long.
    optimizer.state.damping.assign(1e-12)
    model.train_on_batch(x, y)
    assert optimizer.statistics["retracted"] == 1
    assert_close(previous(), kept, 0, 0)
    optimizer.state.damping.assign(1.0)
    model.train_on_batch(x, y)
    assert optimizer.statistics["retracted"] == 1
    moved = zip(previous(), kept, strict=True)
    assert all(np.any(new != old) for new, old in moved)


@pytest.mark.slow
def test_loss_times_a_thousand_is_the_same_run(float64):
    results = []
    for scale in (None, 1000.0):
        model, loss, x, y = problem("normal")
        optimizer = kng.NaturalGradient().attach(model)
        model.compile(optimizer, loss, loss_weights=scale, run_eagerly=True)
        for _ in range(10):
            model.train_on_batch(x, y)
        results.append(weights(model))
    assert_close(*results, 1e-6, 1e-9)


@pytest.mark.parametrize("kind", ["sampled", "empirical"])
def test_other_fishers_train(kind):
    x, y = data(64)
    model = compiled(optimizer=kng.NaturalGradient(fisher=kind))
    before = model.evaluate(x, y, verbose=0)
    for _ in range(15):
        model.train_on_batch(x, y)
    assert model.evaluate(x, y, verbose=0) < 0.6 * before


@pytest.mark.slow
def test_layers_that_are_not_captured_train():
    x, y = data(32)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5, "tanh"),
            Unknown(),
            keras.layers.Dense(3),
        ]
    )
    compiled(model, kng.NaturalGradient(solver="kernel"))
    losses = [model.train_on_batch(x, y) for _ in range(15)]
    assert losses[-1] < 0.5 * losses[0]


def test_memory_beyond_the_bound_is_refused_before_it_is_taken():
    x, y = data()
    model = compiled(
        optimizer=kng.NaturalGradient(solver="kernel", max_elements=1000)
    )
    with pytest.raises(ValueError, match=r"72 columns.*max_elements=1,000"):
        model.train_on_batch(x, y)


@pytest.mark.slow
def test_auto_falls_back_to_conjugate_gradients():
    x, y = data()
    optimizer = kng.NaturalGradient(max_elements=1000)
    model = compiled(optimizer=optimizer)
    losses = [model.train_on_batch(x, y) for _ in range(10)]
    assert optimizer.chosen_solver.kind == "cg"
    assert losses[-1] < losses[0]


def test_summary_names_the_solver():
    x, y = data()
    model = compiled(optimizer=kng.NaturalGradient())
    lines = []
    model.optimizer.summary(lines.append)
    assert "chosen at the first step" in lines[0]
    model.train_on_batch(x, y)
    model.optimizer.summary(lines.append)
    assert "dense Fisher matrix" in lines[1]


def test_empirical_fisher_needs_targets():
    x, y = data()
    model = mlp()
    head = kng.heads.Categorical()
    optimizer = kng.NaturalGradient(fisher="empirical").attach(model, head)
    with kng.CurvatureTape(optimizer) as tape:
        loss = -tf.reduce_mean(head.log_prob(model(x), y))
    gradients = tape.gradient(loss, model.trainable_variables)
    with pytest.raises(ValueError, match="needs the targets"):
        optimizer.apply(gradients, model.trainable_variables)


@pytest.mark.parametrize(
    "kwargs, name",
    [
        ({"solver": "lu"}, "solver"),
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": True}, "momentum"),
        ({"fisher": "propagated"}, "fisher"),
        ({"damping": -1.0}, "damping"),
        ({"norm_constraint": 0.0}, "norm_constraint"),
        ({"max_elements": 0}, "max_elements"),
    ],
)
def test_bad_arguments(kwargs, name):
    with pytest.raises(ValueError, match=f"{name}="):
        kng.NaturalGradient(**kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "diagonal", "kronecker"])
def test_preconditioned_conjugate_gradients_reach_the_solution(kind, float64):
    solver = kng.solvers.ConjugateGradient(400, 0.0, 0.0, kind)
    kwargs = {"learning_rate": 0.1, "damping": 0.01}
    dual = train("categorical", 3, solver="kernel", **kwargs)
    found = train("categorical", 3, solver=solver, **kwargs)
    assert_close(found, dual, 1e-7, 1e-9)


@pytest.mark.slow
def test_kronecker_preconditioner_saves_iterations(float64):
    """On a badly scaled problem, few iterations already go further."""
    losses = {}
    for kind in ("none", "kronecker"):
        model, loss, x, y = problem("normal")
        solver = kng.solvers.ConjugateGradient(4, 0.0, 0.0, kind)
        optimizer = kng.NaturalGradient(0.5, 1e-3, solver).attach(model)
        model.compile(optimizer, loss)
        scaled = x * np.array([0.03, 1.0, 30.0])
        for _ in range(30):
            model.train_on_batch(scaled, y)
        losses[kind] = model.evaluate(scaled, y, verbose=0)
    assert losses["kronecker"] < 0.9 * losses["none"]


def test_residuals_have_no_preconditioner():
    model = mlp()
    solver = kng.solvers.ConjugateGradient(preconditioner="diagonal")
    optimizer = kng.NaturalGradient(solver=solver)
    with pytest.raises(ValueError, match="preconditioner='none'"):
        optimizer.minimize_residuals(
            lambda: model(np.ones([2, 4])), model.trainable_variables
        )
