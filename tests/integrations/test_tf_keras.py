"""The optimizer of tf_keras against that of Keras 3, and its contract."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import keras_natgrad as kng
from keras_natgrad.capture import LinearMap, ParameterLayout, register_layer
from keras_natgrad.integrations.tf_keras import KFAC

K2, K3 = tf_keras.layers, keras.layers


def dense(layers):
    return [
        layers.Dense(5, activation="tanh"),
        layers.Dropout(0.0),
        layers.Dense(3),
    ]


def convolutional(layers):
    return [
        layers.Conv2D(4, 3, strides=2, padding="same", activation="relu"),
        layers.LayerNormalization(),
        layers.Conv2D(4, 2, groups=2, use_bias=False),
        layers.Flatten(),
        layers.Dense(3),
    ]


def sequences(layers):
    return [
        layers.Embedding(7, 4),
        layers.Conv1D(4, 3, padding="causal", activation="tanh"),
        layers.EinsumDense("btn,nm->btm", (6, 5), bias_axes="m"),
        layers.Flatten(),
        layers.Dense(3),
    ]


def normalized(layers):
    return [
        layers.Dense(5, activation="tanh"),
        layers.BatchNormalization(),
        layers.Dense(3),
    ]


def vectors(count=24):
    return np.random.default_rng(0).normal(size=(count, 4)).astype("float32")


def images(count=24):
    shape = (count, 6, 6, 2)
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def tokens(count=24):
    return np.random.default_rng(0).integers(7, size=(count, 6))


def labels(count=24):
    return np.random.default_rng(1).integers(3, size=count)


CASES = {
    "dense": (dense, vectors),
    "convolutional": (convolutional, images),
    "sequences": (sequences, tokens),
    "normalized": (normalized, vectors),
}


def network(layers=dense, data=vectors):
    dtype = data(1).dtype
    return tf_keras.Sequential(
        [tf_keras.Input(data(1).shape[1:], dtype=dtype), *layers(K2)]
    )


def twins(layers, data):
    """The same network in both, with the same weights."""
    first = network(layers, data)
    x = data(1)
    second = keras.Sequential(
        [keras.Input(x.shape[1:], dtype=x.dtype.name), *layers(K3)]
    )
    # The order of the variables of a layer is the same in both.
    second.set_weights(first.get_weights())
    return first, second


def objective(package):
    return package.losses.SparseCategoricalCrossentropy(from_logits=True)


def compiled(**settings):
    model = network()
    optimizer = KFAC(**settings).attach(model)
    model.compile(optimizer, loss=objective(tf_keras))
    return model, optimizer


def weights(model):
    return np.concatenate([w.ravel() for w in model.get_weights()])


AUTOMATIC = {"damping": 0.1}
FIXED = {"learning_rate": 0.3, "momentum": 0.5, "damping": 0.1}


@pytest.mark.variants("dense-settings0")
@pytest.mark.parametrize(
    ("case", "settings"),
    [
        *((case, AUTOMATIC) for case in CASES),
        ("dense", FIXED),
        ("convolutional", {**FIXED, "global_clipnorm": 0.1}),
        ("dense", {**FIXED, "weight_decay": 0.1}),
    ],
)
def test_steps_equal_those_of_keras_3(case, settings):
    layers, data = CASES[case]
    first, second = twins(layers, data)
    start = weights(first)
    for model, package, kind in (
        (first, tf_keras, KFAC),
        (second, keras, kng.KFAC),
    ):
        optimizer = kind(**settings).attach(model)
        model.compile(optimizer, loss=objective(package))
        model.fit(data(), labels(), batch_size=8, shuffle=False, verbose=0)
    assert np.abs(weights(first) - start).max() > 1e-3
    np.testing.assert_allclose(weights(first), weights(second), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "activation"),
    [
        ("mse", None),
        ("binary_crossentropy", "sigmoid"),
        ("categorical_crossentropy", "softmax"),
        ("sparse_categorical_crossentropy", "softmax"),
    ],
)
def test_compiled_losses_have_the_heads_of_keras_3(loss, activation):
    first, second = twins(
        lambda layers: [layers.Dense(3, activation=activation)], vectors
    )
    targets = labels()
    if not loss.startswith("sparse"):
        targets = np.eye(3, dtype="float32")[targets]
    for model, kind in ((first, KFAC), (second, kng.KFAC)):
        model.compile(kind(**AUTOMATIC).attach(model), loss=loss)
        model.train_on_batch(vectors(), targets)
    np.testing.assert_allclose(weights(first), weights(second), atol=1e-5)


@pytest.mark.slow
def test_a_regularizer_is_curvature_as_in_keras_3():
    def layers(package):
        kind = tf_keras if package is K2 else keras
        return [package.Dense(3, kernel_regularizer=kind.regularizers.L2(0.5))]

    first, second = twins(layers, vectors)
    for model, package, kind in (
        (first, tf_keras, KFAC),
        (second, keras, kng.KFAC),
    ):
        optimizer = kind(**AUTOMATIC).attach(model)
        model.compile(optimizer, loss=objective(package))
        model.train_on_batch(vectors(), labels())
    np.testing.assert_allclose(weights(first), weights(second), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode", ["eager", "graph", pytest.param("xla", marks=pytest.mark.slow)]
)
def test_fit_learns_with_the_defaults(mode):
    model = network()
    model.compile(
        KFAC().attach(model),
        loss=objective(tf_keras),
        metrics=["accuracy"],
        run_eagerly=mode == "eager",
        jit_compile=mode == "xla",
    )
    x = vectors(200)
    y = np.argmax(x[:, :3], axis=-1)
    history = model.fit(x, y, batch_size=64, epochs=10, verbose=0)
    assert history.history["accuracy"][-1] > 0.9


@pytest.mark.slow
def test_eager_graph_and_xla_make_the_same_steps():
    found = []
    for options in ({"run_eagerly": True}, {}, {"jit_compile": True}):
        tf_keras.utils.set_random_seed(0)
        model = network()
        optimizer = KFAC(**AUTOMATIC).attach(model)
        model.compile(optimizer, loss=objective(tf_keras), **options)
        model.fit(vectors(20), labels(20), 8, shuffle=False, verbose=0)
        found.append(weights(model))
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)
    np.testing.assert_allclose(found[2], found[0], atol=1e-5)


class Custom(tf_keras.Model):
    """Python control flow on tensors, which autograph has to translate."""

    def __init__(self):
        super().__init__()
        self.hidden = K2.Dense(4)
        self.logits = K2.Dense(3)

    def call(self, inputs, training=None):
        hidden = self.hidden(inputs)
        scale = tf.constant(1.0)
        if tf.reduce_sum(inputs) > 1e9:
            scale = tf.constant(0.0)
        return self.logits(scale * tf.tanh(hidden))


@pytest.mark.slow
def test_a_subclassed_model_that_is_built_by_fit():
    model = Custom()
    optimizer = KFAC().attach(model)
    model.compile(optimizer, loss=objective(tf_keras))
    x = vectors(200)
    y = np.argmax(x[:, :3], axis=-1)
    history = model.fit(x, y, batch_size=64, epochs=10, verbose=0)
    losses = history.history["loss"]
    assert losses[-1] < 0.3 * losses[0]
    assert [entry.layer_class for entry in optimizer.adopted.plan.layers] == [
        "Dense",
        "Dense",
    ]


@pytest.mark.slow
def test_a_training_loop_needs_no_minimize():
    first, second = network(), network()
    second.set_weights(first.get_weights())
    head = kng.heads.Categorical()
    optimizer = KFAC(**AUTOMATIC).attach(first, head=head)

    @tf.function
    def train_step(x, y):
        with tf.GradientTape() as tape:
            loss = objective(tf_keras)(y, first(x, training=True))
        gradients = tape.gradient(loss, first.trainable_variables)
        pairs = zip(gradients, first.trainable_variables, strict=True)
        optimizer.apply_gradients(pairs)

    other = KFAC(**AUTOMATIC).attach(second)
    second.compile(other, loss=objective(tf_keras))
    for _ in range(2):
        train_step(vectors(), labels())
        second.train_on_batch(vectors(), labels())
    assert int(optimizer.iterations) == 2
    np.testing.assert_allclose(weights(first), weights(second), atol=1e-5)


@pytest.mark.slow
def test_the_learning_rate_of_tf_keras_counts():
    schedule = tf_keras.optimizers.schedules.PiecewiseConstantDecay(
        [0], [0.5, 0.0]
    )
    model, optimizer = compiled(learning_rate=schedule, damping=0.1)
    start = weights(model)
    model.train_on_batch(vectors(), labels())
    after = weights(model)
    assert np.abs(after - start).max() > 1e-3
    model.train_on_batch(vectors(), labels())
    # Momentum is automatic; a fixed one makes the second step.
    assert float(optimizer.learning_rate) == 0.0

    model, optimizer = compiled(
        learning_rate=schedule, damping=0.1, momentum=0.0
    )
    model.train_on_batch(vectors(), labels())
    after = weights(model)
    model.train_on_batch(vectors(), labels())
    np.testing.assert_array_equal(weights(model), after)


@pytest.mark.slow
def test_a_factor_of_the_automatic_learning_rate():
    model, optimizer = compiled(
        learning_rate=0.0, automatic=True, momentum=0.0, damping=0.1
    )
    start = weights(model)
    model.train_on_batch(vectors(), labels())
    np.testing.assert_array_equal(weights(model), start)
    optimizer.learning_rate = 1.0
    model.train_on_batch(vectors(), labels())
    assert np.abs(weights(model) - start).max() > 1e-3


# -- Saving ------------------------------------------------------------------


def train(model, steps):
    for _ in range(steps):
        model.train_on_batch(vectors(), labels())


@pytest.mark.slow
def test_a_checkpoint_resumes_exactly(tmp_path):
    model, optimizer = compiled()
    train(model, 3)
    saved = tf.train.Checkpoint(model=model, optimizer=optimizer)
    path = saved.save(tmp_path / "checkpoint")
    train(model, 3)

    again, other = compiled()
    restored = tf.train.Checkpoint(model=again, optimizer=other)
    restored.restore(path).assert_existing_objects_matched()
    assert int(other.iterations) == 3
    train(again, 3)
    np.testing.assert_array_equal(weights(again), weights(model))


@pytest.mark.slow
def test_a_checkpoint_is_restored_into_a_model_that_fit_builds(tmp_path):
    def make():
        model = Custom()
        optimizer = KFAC().attach(model)
        model.compile(optimizer, loss=objective(tf_keras))
        return model, tf.train.Checkpoint(model=model, optimizer=optimizer)

    model, saved = make()
    train(model, 3)
    path = saved.save(tmp_path / "checkpoint")
    train(model, 2)
    again, restored = make()
    status = restored.restore(path)
    train(again, 2)
    status.assert_existing_objects_matched()
    np.testing.assert_array_equal(weights(again), weights(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_a_saved_model_resumes_exactly(tmp_path, name):
    model, optimizer = compiled()
    train(model, 3)
    model.save(tmp_path / name)
    train(model, 3)

    again = tf_keras.models.load_model(tmp_path / name)
    assert isinstance(again.optimizer, KFAC)
    again.optimizer.attach(again)
    train(again, 3)
    np.testing.assert_array_equal(weights(again), weights(model))


@pytest.mark.slow
def test_a_saved_folder_has_the_model_and_the_plan(tmp_path):
    # As with every optimizer of tf_keras, its state is not in the folder.
    model, optimizer = compiled()
    train(model, 1)
    model.save(tmp_path / "folder")
    again = tf_keras.models.load_model(tmp_path / "folder")
    np.testing.assert_array_equal(weights(again), weights(model))
    assert again.optimizer.adopted.plan == optimizer.engine.plan
    again.optimizer.attach(again)
    before = weights(again)
    train(again, 1)
    assert np.abs(weights(again) - before).max() > 1e-3


@pytest.mark.slow
def test_export_while_attached(tmp_path):
    model, _ = compiled()
    train(model, 1)
    model.export(str(tmp_path / "export"))
    loaded = tf.saved_model.load(str(tmp_path / "export"))
    expected = model.predict(vectors(), verbose=0)
    np.testing.assert_allclose(loaded.serve(vectors()), expected, atol=1e-6)
    train(model, 1)


def test_config_rebuilds_the_optimizer():
    schedule = tf_keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    optimizer = KFAC(
        schedule,
        automatic=True,
        damping=kng.LevenbergMarquardt(),
        momentum=kng.Spring(0.9),
        clipnorm=1.0,
        name="mine",
    )
    config = tf_keras.optimizers.serialize(optimizer)
    again = tf_keras.optimizers.deserialize(config)
    assert again.get_config() == optimizer.get_config()
    assert again.adopted.engine.rule == optimizer.adopted.engine.rule


# -- What it leaves alone, and what it refuses -------------------------------


@pytest.mark.slow
def test_nothing_is_recorded_outside_training_and_nothing_stays():
    model, optimizer = compiled()
    train(model, 1)
    model.predict(vectors(), verbose=0)
    model.evaluate(vectors(), labels(), verbose=0)
    model(vectors())
    assert optimizer._recorder._last is None
    assert not any("call" in vars(layer) for layer in model.layers)
    optimizer.detach()
    assert "call" not in vars(model)
    with pytest.raises(ValueError, match="No forward pass"):
        train(network_of(model, optimizer), 1)


def network_of(model, optimizer):
    """Compiled anew, for a new training function."""
    model.compile(optimizer, loss=objective(tf_keras))
    return model


@pytest.mark.slow
def test_unsupported_layers_fall_back():
    model = tf_keras.Sequential(
        [
            tf_keras.Input((6, 2)),
            K2.LSTM(3),
            K2.Dense(3),
        ]
    )
    with pytest.warns(UserWarning, match="LSTM"):
        optimizer = KFAC().attach(model)
    model.compile(optimizer, loss=objective(tf_keras))
    x = np.random.default_rng(0).normal(size=(64, 6, 2)).astype("float32")
    y = (x[:, -1, 0] > 0).astype("int32")
    losses = model.fit(x, y, 64, epochs=10, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    assert [entry.layer_class for entry in optimizer.adopted.plan.layers] == [
        "Dense"
    ]
    lines = []
    optimizer.summary(lines.append)
    assert "LSTM" in lines[0] or "lstm" in lines[0]


class Scale(K2.Layer):
    def build(self, shape):
        self.w = self.add_weight("w", (shape[-1], 3))

    def call(self, inputs):
        return inputs @ self.w


@pytest.mark.slow
def test_a_layer_of_ones_own_can_be_registered():
    @register_layer(Scale)
    def describe(layer):
        n, m = layer.w.shape
        return LinearMap(
            variables=(layer.w,),
            layout=ParameterLayout.of_matrix(n, m, bias=False),
            inputs=lambda x: x[:, tf.newaxis],
            cotangents=lambda g: g[:, tf.newaxis],
        )

    own = tf_keras.Sequential([tf_keras.Input((4,)), Scale()])
    same = tf_keras.Sequential(
        [tf_keras.Input((4,)), K2.Dense(3, use_bias=False)]
    )
    same.set_weights(own.get_weights())
    for model in (own, same):
        optimizer = KFAC(**AUTOMATIC, block="kronecker").attach(model)
        model.compile(optimizer, loss=objective(tf_keras))
        train(model, 2)
    np.testing.assert_allclose(weights(own), weights(same), atol=1e-6)


def test_patterns_choose_layers_of_tf_keras():
    model = network()
    with pytest.warns(UserWarning, match="excluded"):
        optimizer = KFAC().attach(model, exclude=[model.layers[0].name])
    assert len(optimizer.adopted.plan.layers) == 1
    with pytest.warns(UserWarning, match="excluded"):
        optimizer = KFAC().attach(model, exclude=[K2.Dense])
    assert optimizer.adopted.plan.layers == ()


def test_an_optimizer_that_is_not_attached():
    model = network()
    model.compile(KFAC(), loss=objective(tf_keras))
    with pytest.raises(ValueError, match="not attached"):
        train(model, 1)


def test_two_forward_passes_for_one_step():
    class Twice(tf_keras.Sequential):
        def train_step(self, data):
            self(data[0], training=True)
            return super().train_step(data)

    model = Twice(network().layers)
    model.build((None, 4))
    model.compile(KFAC().attach(model), loss=objective(tf_keras))
    with pytest.raises(ValueError, match="several times"):
        train(model, 1)


def test_several_replicas_are_refused(mirrored_strategy):
    with mirrored_strategy.scope():
        model, _ = compiled()
    with pytest.raises(ValueError, match="2 replicas"):
        model.fit(vectors(), labels(), 8, verbose=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refresh_where": "host"}, "refresh_where"),
        ({"use_ema": True}, "use_ema"),
        ({"fisher": "empirical"}, "targets"),
        ({"damping": -1.0}, "damping"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        KFAC(**settings)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": lambda y, p: tf.reduce_mean(p, -1)},
        {"loss": "mse", "loss_weights": 0.5},
        {"loss": [objective(tf_keras)]},
        {"loss": tf_keras.losses.SparseCategoricalCrossentropy(ignore_class=0)},
        {"loss": tf_keras.losses.MeanSquaredError(reduction="none")},
    ],
    ids=["own", "weights", "several", "ignored", "none"],
)
def test_losses_without_a_head_are_refused(options):
    model = network()
    model.compile(KFAC().attach(model), **options)
    with pytest.raises(ValueError, match="head="):
        model.train_on_batch(vectors(), labels())


def test_models_of_keras_3_and_other_variables_are_refused():
    with pytest.raises(ValueError, match="tf_keras.Model"):
        KFAC().attach(keras.Sequential([K3.Dense(1)]))
    model, optimizer = compiled()
    model(vectors(), training=True)
    with pytest.raises(ValueError, match="other variables"):
        optimizer.apply_gradients([(tf.zeros([1]), tf.Variable([0.0]))])
    with pytest.raises(ValueError, match="does not have the layers"):
        optimizer.attach(network(convolutional, images))


def test_importing_the_package_leaves_the_other_tools_alone():
    code = (
        "import sys, keras_natgrad\n"
        "print([m for m in sys.modules if m.startswith("
        "('official', 'tf_keras', 'keras_natgrad.integrations'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
