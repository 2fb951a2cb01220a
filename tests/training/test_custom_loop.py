"""Training loops of one's own, with `CurvatureTape`."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from tests.training.networks import (
    assert_equal,
    compiled,
    cross_entropy,
    data,
    mlp,
    state,
)


def custom_loop(model, optimizer, in_graph):
    loss_fn = cross_entropy()

    def step(x, y):
        def objective():
            return loss_fn(y, model(x, training=True))

        with kng.CurvatureTape(optimizer, objective) as tape:
            loss = objective()
        variables = model.trainable_variables
        gradients = tape.gradient(loss, variables)
        optimizer.apply(gradients, variables)
        return loss

    return tf.function(step) if in_graph else step


@pytest.mark.slow
@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
def test_equals_fit(in_graph):
    x, y = data()
    reference = compiled(run_eagerly=not in_graph)
    reference.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0)
    model = mlp()
    optimizer = kng.KFAC().attach(model, head=kng.heads.Categorical())
    optimizer.build(model.trainable_variables)
    step = custom_loop(model, optimizer, in_graph)
    for _ in range(3):
        for start in range(0, 24, 8):
            rows = slice(start, start + 8)
            step(tf.constant(x[rows]), tf.constant(y[rows]))
    left = [v.numpy() for v in [*model.weights, *optimizer.variables]]
    assert_equal(left, state(reference))


def test_without_an_objective_the_damping_stays():
    x, y = data()
    model = mlp()
    optimizer = kng.KFAC().attach(model, head="categorical")
    dampings, losses = [], []
    for _ in range(8):
        with kng.CurvatureTape(optimizer) as tape:
            loss = cross_entropy()(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        dampings.append(optimizer.statistics["damping"])
        losses.append(float(loss))
    assert len(set(dampings)) == 1 and dampings[0] > 0
    assert losses[-1] < 0.6 * losses[0]


def test_apply_gradients_works_too():
    x, y = data()
    model = mlp()
    optimizer = kng.KFAC().attach(model, head="categorical")
    with kng.CurvatureTape(optimizer) as tape:
        loss = cross_entropy()(y, model(x, training=True))
    variables = model.trainable_variables
    gradients = tape.gradient(loss, variables)
    optimizer.apply_gradients(zip(gradients, variables, strict=True))
    assert optimizer.iterations == 1


def test_gradient_is_the_ordinary_one():
    x, y = data()
    model = mlp()
    optimizer = kng.KFAC().attach(model, head="categorical")
    with tf.GradientTape() as plain:
        loss = cross_entropy()(y, model(x, training=True))
    expected = plain.gradient(loss, model.trainable_variables)
    with kng.CurvatureTape(optimizer) as tape:
        loss = cross_entropy()(y, model(x, training=True))
    found = tape.gradient(loss, model.trainable_variables)
    assert_equal([g.numpy() for g in found], [g.numpy() for g in expected])


class OwnStep(keras.Sequential):
    """A model class with its own training step."""

    def train_step(self, data):
        x, y = data

        def objective():
            return self.compute_loss(x, y, self(x, training=True))

        with kng.CurvatureTape(self.optimizer, objective) as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred)
        variables = self.trainable_variables
        gradients = tape.gradient(loss, variables)
        self.optimizer.apply(gradients, variables)
        return {"own_loss": loss}


@pytest.mark.variants("True")
@pytest.mark.parametrize("run_eagerly", [True, False])
def test_model_class_with_its_own_step(run_eagerly):
    x, y = data()
    model = OwnStep(
        [keras.Input((4,)), *(layer for layer in mlp().layers)], name="own"
    )
    optimizer = kng.KFAC().attach(model, head=kng.heads.Categorical())
    assert model.train_step.__func__ is OwnStep.train_step
    model.compile(optimizer, loss=cross_entropy(), run_eagerly=run_eagerly)
    history = model.fit(x, y, batch_size=24, epochs=6, verbose=0).history
    assert set(history) == {"own_loss"}
    assert history["own_loss"][-1] < 0.6 * history["own_loss"][0]
    assert optimizer.statistics["batches"] == 6


def test_model_class_with_its_own_step_and_a_plain_tape():
    class Plain(keras.Sequential):
        def train_step(self, data):
            x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    x, y = data()
    model = compiled(Plain(mlp().layers))
    with pytest.raises(ValueError, match="CurvatureTape"):
        model.train_on_batch(x, y)


def test_layers_are_clean_after_the_tape():
    x, _ = data()
    model = mlp()
    optimizer = kng.KFAC().attach(model, head="categorical")
    before = [set(vars(layer)) for layer in model.layers]
    activations = [layer.activation for layer in model.layers]
    with pytest.raises(RuntimeError, match="stop"):
        with kng.CurvatureTape(optimizer):
            model(x)
            raise RuntimeError("stop")
    assert [set(vars(layer)) for layer in model.layers] == before
    assert [layer.activation for layer in model.layers] == activations
    assert "call" not in vars(model)


def test_predicting_inside_the_tape_leaves_no_trace_in_numbers():
    """Only the last call of the model is what the head reads."""
    x, y = data()
    model = mlp()
    optimizer = kng.KFAC().attach(model, head="categorical")
    with kng.CurvatureTape(optimizer) as tape:
        loss = cross_entropy()(y, model(x, training=True))
    assert tape.model_outputs.shape == (24, 3)
    assert np.isfinite(loss)


def test_autograph_converts_the_objective_and_not_the_package():
    """Python's `if` on tensors works in an objective, in a graph too."""
    x, y = data()
    model = mlp()
    optimizer = kng.KFAC().attach(model, head=kng.heads.Categorical())
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    seen = []

    @tf.function
    def step(x, y):
        def objective():
            seen.append(True)
            loss = loss_fn(y, model(x, training=True))
            if loss > 1e6:
                loss = 0.5 * loss
            return loss

        with kng.CurvatureTape(optimizer, objective) as tape:
            loss = objective()
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    losses = [float(step(tf.constant(x), tf.constant(y))) for _ in range(8)]
    assert losses[-1] < losses[0]
    # The call inside the tape, and the one for judging steps.
    assert len(seen) == 2 * step.experimental_get_tracing_count()
    assert optimizer.statistics["reduction_ratio"] != 0
