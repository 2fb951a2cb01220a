"""The private Keras API that the package relies on, function by function."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import keras_natgrad as kng
from keras_natgrad import _compat

layers = keras.layers


def test_flatten_layers_finds_inner_layers_once():
    shared = layers.Dense(3, name="shared")
    inner = keras.Sequential([keras.Input((3,)), shared], name="inner")
    attention = layers.MultiHeadAttention(1, 2, name="attention")
    x = keras.Input((4, 3))
    y = layers.TimeDistributed(inner)(attention(x, x))
    model = keras.Model(x, shared(y))
    found = _compat.flatten_layers(model)
    names = [layer.name for layer in found]
    assert {"inner", "attention", "query", "attention_output"} <= set(names)
    assert names.count("shared") == 1
    assert model not in found


def test_flatten_layers_of_a_subclassed_model():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.blocks = [layers.Dense(2), layers.Dense(2)]

    assert len(_compat.flatten_layers(Net())) == 2


def test_compiled_losses():
    x = keras.Input((2,))
    outputs = {"a": layers.Dense(1)(x), "b": [layers.Dense(3)(x)]}
    model = keras.Model(x, outputs)
    assert _compat.compiled_losses(model) == []
    model.compile(
        "sgd",
        loss={"a": "mse", "b": [keras.losses.Huber()]},
        loss_weights={"a": 2.0, "b": [None]},
    )
    assert _compat.compiled_losses(model) == []
    values = model(np.zeros((1, 2)))
    model.compute_loss(y=values, y_pred=values)
    first, second = _compat.compiled_losses(model)
    assert tuple(first.path) == ("a",) and tuple(second.path) == ("b", 0)
    assert first.loss.fn is keras.losses.mean_squared_error
    assert isinstance(second.loss, keras.losses.Huber)
    assert (first.weight, second.weight) == (2.0, None)


def test_like_losses():
    """By the names of output layers; `None` where there is no loss."""
    x = keras.Input((2,))
    first, second = (layers.Dense(1, name=name)(x) for name in ("b", "a"))
    model = keras.Model(x, [first, second])
    model.compile("sgd", loss=["mse", "mse"])
    outputs = model(np.zeros((1, 2)))
    targets = {"a": np.zeros((1, 1)), "b": np.ones((1, 1))}
    model.compute_loss(y=targets, y_pred=outputs)
    found = _compat.like_losses(model, outputs, targets)
    assert found[0][0] is outputs[0] and found[0][1] is outputs[1]
    assert found[1][0] is targets["b"] and found[1][1] is targets["a"]

    model.compile("sgd", loss=[None, "mse"])
    model.compute_loss(y=[targets["a"]], y_pred=outputs)
    _, found = _compat.like_losses(model, outputs, [targets["a"]])
    assert found[0] is None and found[1] is targets["a"]


def test_declared_losses():
    """Names, shapes and paths of the losses, before any is called."""
    x = keras.Input((2,))
    nested = {"a": layers.Dense(1)(x), "b": [layers.Dense(3)(x)]}
    model = keras.Model(x, nested)
    assert _compat.declared_losses(model) == []
    model.compile("sgd", loss={"a": "mse", "b": ["mae"]})
    assert _compat.declared_losses(model) == [
        (("a",), "mse", (None, 1)),
        (("b", 0), "mae", (None, 3)),
    ]
    model.compile("sgd", loss={"b": ["mae"]})
    assert _compat.declared_losses(model) == [(("b", 0), "mae", (None, 3))]
    both = [layers.Dense(1, name="u")(x), layers.Dense(2, name="v")(x)]
    model = keras.Model(x, both)
    for loss in (["mse", None], {"u": "mse"}):
        model.compile("sgd", loss=loss)
        assert _compat.declared_losses(model) == [((0,), "mse", (None, 1))]
    model.compile("sgd", loss="mse")
    assert _compat.declared_losses(model) == [
        ((0,), "mse", (None, 1)),
        ((1,), "mse", (None, 2)),
    ]


def test_declared_losses_of_one_output_and_of_an_unbuilt_model():
    model = keras.Sequential([layers.Dense(1)])
    model.compile("sgd", loss="mse")
    assert _compat.declared_losses(model) == [((), "mse", None)]
    model.build((None, 2))
    assert _compat.declared_losses(model) == [((), "mse", (None, 1))]


def test_loss_options():
    """`delta` is in no configuration and no attribute of the loss."""
    loss = keras.losses.Huber(delta=2.0)
    assert _compat.loss_options(loss) == {"delta": 2.0}
    assert _compat.loss_options(keras.losses.Hinge()) == {}


def test_compiled_losses_of_one_output():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    model.compile("sgd", loss="mse")
    model.compute_loss(y=np.zeros((1, 1)), y_pred=np.zeros((1, 1)))
    (entry,) = _compat.compiled_losses(model)
    assert tuple(entry.path) == ()
    assert entry.weight is None


def test_update_loss_tracker():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    model.compile("sgd", loss="mse")
    _compat.update_loss_tracker(model, tf.constant(3.0), tf.constant(1))
    _compat.update_loss_tracker(model, tf.constant(1.0), tf.constant(3))
    logs = model.get_metrics_result()
    assert float(logs["loss"]) == pytest.approx(1.5)


@pytest.mark.parametrize("has_training", [True, False])
def test_compute_loss(has_training):
    """With penalties, and with a `compute_loss` of an older signature."""

    class Old(keras.Sequential):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
            return super().compute_loss(x, y, y_pred, sample_weight)

    cls = keras.Sequential if has_training else Old
    model = cls(
        [
            keras.Input((2,)),
            layers.Dense(1, kernel_regularizer=keras.regularizers.L2(0.5)),
        ]
    )
    model.compile("sgd", loss="mse")
    x, y = np.ones((3, 2)), np.zeros((3, 1))
    y_pred = model(x)
    weight = np.array([1.0, 0.0, 2.0])
    loss = _compat.compute_loss(model, x, y, y_pred, weight)
    kernel = model.layers[0].kernel.numpy()
    expected = np.mean(weight * y_pred.numpy()[:, 0] ** 2)
    expected += 0.5 * np.sum(kernel**2)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_call_with_training():
    class Net(keras.Model):
        def call(self, x, training=None):
            assert training is True
            return x

    class Plain(keras.Model):
        def call(self, x):
            return x

    for model in (Net(), Plain()):
        assert float(_compat.call_with_training(model, tf.constant(2.0))) == 2


def test_kernel_variable():
    dense = layers.Dense(3)
    dense.build((None, 4))
    assert _compat.kernel_variable(dense) is dense.kernel
    dense.enable_lora(2)
    kernel = _compat.kernel_variable(dense)
    assert isinstance(kernel, keras.Variable)
    assert tuple(kernel.shape) == (4, 3)


def test_kernel_variable_of_a_layer_without_the_private_name():
    class Mine(layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(2, 2))

    layer = Mine()
    layer.build((None, 2))
    assert _compat.kernel_variable(layer) is layer.kernel


def test_layers_without_special_computation():
    dense, lora, quantized = (layers.Dense(4) for _ in range(3))
    for layer in (dense, lora, quantized):
        layer.build((None, 4))
    lora.enable_lora(2)
    quantized.quantize("int8")
    assert not _compat.special_computation(dense)
    assert not _compat.special_computation(layers.ReLU())
    assert _compat.special_computation(lora)
    assert _compat.special_computation(quantized)


def test_wrapped_optimizers():
    inner = kng.KFAC()
    outer = keras.optimizers.LossScaleOptimizer(inner)
    assert list(_compat.wrapped_optimizers(outer)) == [outer, inner]
    assert list(_compat.wrapped_optimizers(inner)) == [inner]
    assert list(_compat.wrapped_optimizers(None)) == []


def test_keras_mask():
    inputs = tf.constant([[[1.0], [0.0]]])
    outputs = layers.Masking()(inputs)
    np.testing.assert_array_equal(_compat.keras_mask(outputs), [[True, False]])
    assert _compat.keras_mask(inputs) is None


def variables_and_optimizer():
    variables = [keras.Variable(np.zeros(n, "float32")) for n in (1, 2, 3)]
    optimizer = keras.optimizers.SGD()
    optimizer.build(variables)
    return variables, optimizer


def test_variable_index():
    """Of Keras variables, and of the raw ones that a step receives."""
    variables, optimizer = variables_and_optimizer()
    for index, variable in enumerate(variables):
        assert _compat.variable_index(optimizer, variable) == index
        assert _compat.variable_index(optimizer, variable.value) == index


def test_optimizer_variables():
    variables, optimizer = variables_and_optimizer()
    found = _compat.optimizer_variables(optimizer)
    assert all(a is b for a, b in zip(found, variables, strict=True))
    found.clear()
    assert len(_compat.optimizer_variables(optimizer)) == 3


def test_all_reduce_gradients_of_one_replica():
    variables, optimizer = variables_and_optimizer()
    gradients = [tf.ones(n) for n in (1, 2, 3)]
    found = _compat.all_reduce_gradients(optimizer, gradients, variables)
    for a, b in zip(found, gradients, strict=True):
        np.testing.assert_array_equal(a, b)


def test_all_reduce_gradients_of_two_replicas(mirrored_strategy):
    with mirrored_strategy.scope():
        variable = keras.Variable(np.zeros(2, "float32"))
        optimizer = keras.optimizers.SGD()
        optimizer.build([variable])

    @tf.function
    def run():
        def replica():
            index = tf.distribute.get_replica_context().replica_id_in_sync_group
            gradient = tf.cast(index + 1, tf.float32) * tf.ones(2)
            return _compat.all_reduce_gradients(
                optimizer, [gradient], [variable.value]
            )[0]

        return mirrored_strategy.run(replica)

    for value in mirrored_strategy.experimental_local_results(run()):
        np.testing.assert_array_equal(value, [3.0, 3.0])


def test_add_summed_variable(mirrored_strategy):
    """The parts of two replicas start, are read and are saved as one sum."""
    with mirrored_strategy.scope():
        optimizer = keras.optimizers.SGD(name="mine")
        variable = _compat.add_summed_variable(
            optimizer, "total", (2,), "ones", "float64"
        )
        np.testing.assert_array_equal(variable.numpy(), [1.0, 1.0])
        parts = variable.value.values
        assert len(parts) == 2
        np.testing.assert_array_equal(parts[0].numpy(), [0.5, 0.5])
        variable.assign([4.0, 6.0])
        np.testing.assert_array_equal(parts[1].numpy(), [2.0, 3.0])
        np.testing.assert_array_equal(variable.numpy(), [4.0, 6.0])
    assert any(each is variable for each in optimizer.variables)
    assert variable.dtype == "float64" and variable.path == "mine/total"


def test_apply_weight_decay():
    variable = keras.Variable(np.ones(2, "float32"))
    optimizer = keras.optimizers.SGD(0.5, weight_decay=0.1)
    optimizer.build([variable])
    _compat.apply_weight_decay(optimizer, [variable])
    np.testing.assert_allclose(variable.numpy(), 0.95, rtol=1e-6)


def test_is_scratch_graph():
    seen = []

    class Spy(keras.layers.Layer):
        def call(self, x):
            seen.append(x)
            return x

    keras.ops.shape(Spy()(keras.Input((3,))))
    graphs = [x.graph for x in seen if hasattr(x, "graph")]
    assert graphs and all(_compat.is_scratch_graph(g) for g in graphs)
    assert not _compat.is_scratch_graph(tf.Graph())


def test_layer_graph():
    x = keras.Input((3,))
    first, second, third = (layers.Dense(2) for _ in range(3))
    hidden = first(x)
    model = keras.Model(x, [second(hidden), third(hidden)])
    graph = _compat.layer_graph(model)
    assert {id(layer) for layer in graph.consumers[id(first)]} == {
        id(second),
        id(third),
    }
    assert graph.outputs == {id(second), id(third)}
    chain = keras.Sequential([keras.Input((3,)), first, second])
    graph = _compat.layer_graph(chain)
    assert graph.consumers[id(first)] == [second]
    assert graph.outputs == {id(second)}


def test_layer_graph_of_a_subclassed_model():
    class Net(keras.Model):
        pass

    assert _compat.layer_graph(Net()) is None


def test_special_computation():
    layer = layers.Dense(3)
    layer.build((None, 4))
    assert _compat.special_computation(layer) == ""
    layer.enable_lora(2)
    assert _compat.special_computation(layer) == "LoRA enabled"
    layer.quantize("int8")
    expected = "quantised to int8 and LoRA enabled"
    assert _compat.special_computation(layer) == expected


def test_takes_argument():
    relu, dropout, lstm = layers.ReLU(), layers.Dropout(0.1), layers.LSTM(2)
    assert not _compat.takes_argument(relu, "training")
    assert _compat.takes_argument(dropout, "training")
    assert not _compat.takes_argument(dropout, "mask")
    assert _compat.takes_argument(lstm, "mask")


def test_layer_scale_class():
    """The class of the layers that the public ConvNeXt is built of."""
    model = keras.applications.ConvNeXtTiny(
        weights=None, include_top=False, input_shape=(32, 32, 3)
    )
    found = [
        layer
        for layer in model.layers
        if isinstance(layer, _compat.layer_scale_class())
    ]
    assert len(found) == 3 + 3 + 9 + 3
    assert all(layer.gamma.shape == (layer.projection_dim,) for layer in found)


def test_is_layer_class():
    for found in (layers.Dense, keras.Model, tf_keras.layers.Dense):
        assert _compat.is_layer_class(found)
    for other in (int, tf.Module, layers.Dense(1), tf_keras.losses.Loss):
        assert not _compat.is_layer_class(other)


def test_layer_graph_of_tf_keras():
    first, second = (tf_keras.layers.Dense(2) for _ in range(2))
    model = tf_keras.Sequential([tf_keras.Input((3,)), first, second])
    graph = _compat.layer_graph(model)
    assert graph.consumers[id(first)] == [second]
    assert graph.outputs == {id(second)}


def _with_a_schedule():
    optimizer = tf_keras.optimizers.SGD()
    schedule = tf_keras.optimizers.schedules.PiecewiseConstantDecay(
        [0], [2.0, 1.0]
    )
    _compat.set_rate(optimizer, schedule)
    return optimizer


def test_set_rate():
    optimizer = tf_keras.optimizers.SGD()
    _compat.set_rate(optimizer, 0.5)
    assert float(optimizer.learning_rate) == 0.5


def test_current_rate():
    optimizer = _with_a_schedule()
    assert float(_compat.current_rate(optimizer)) == 2.0
    optimizer.iterations.assign_add(1)
    assert float(_compat.current_rate(optimizer)) == 1.0


def test_serialized_rate():
    assert _compat.serialized_rate(tf_keras.optimizers.SGD(0.5)) == 0.5
    config = _compat.serialized_rate(_with_a_schedule())
    assert config["config"]["values"] == [2.0, 1.0]


def test_has_loss_weights():
    model = tf_keras.Sequential(
        [tf_keras.Input((3,)), tf_keras.layers.Dense(1)]
    )
    model.compile(loss="mse")
    assert not _compat.has_loss_weights(model)
    model.compile(loss="mse", loss_weights=0.5)
    assert _compat.has_loss_weights(model)
