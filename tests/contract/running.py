"""Precision, and ways to run a training."""

import keras
import numpy as np
import tensorflow as tf

import keras_natgrad as kng
from tests.contract.common import FIT, agree, compiled, eager, learns
from tests.distribution.strategy import two_replicas
from tests.training.networks import (
    assert_equal,
    cross_entropy,
    data,
    mlp,
    state,
    weights,
)


def mixed_float16(make, folder):
    """`mixed_float16` with `LossScaleOptimizer`"""
    keras.config.set_dtype_policy("mixed_float16")
    model = mlp()
    keras.config.set_dtype_policy("float32")
    optimizer = make()
    model = compiled(optimizer, model)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    learns(model, epochs=5, share=0.7)
    for variable in optimizer.variables:
        assert variable.dtype != "float16"


def mixed_bfloat16(make, folder):
    """`mixed_bfloat16`"""
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = mlp()
    keras.config.set_dtype_policy("float32")
    learns(compiled(make(log_statistics=True), model), epochs=5, share=0.7)


def overflow(make, folder):
    """A step that overflows leaves weights and state as they were"""
    keras.config.set_dtype_policy("mixed_float16")
    model = mlp()
    keras.config.set_dtype_policy("float32")
    optimizer = make()
    wrapper = keras.optimizers.LossScaleOptimizer(optimizer)
    model = eager(wrapper, model)
    model.fit(*data(), **FIT)
    names = ("counters", "update_at", "statistics")
    kept = [v for v in optimizer.variables if not v.path.endswith(names)]
    before, steps = [v.numpy() for v in kept], int(optimizer.iterations)
    moved = weights(model)
    wrapper.dynamic_scale.assign(2.0**100)
    model.fit(*data(12), **FIT)
    assert_equal(weights(model), moved)
    assert_equal([v.numpy() for v in kept], before)
    assert int(optimizer.iterations) == steps
    wrapper.dynamic_scale.assign(2.0**10)
    learns(model)


def several_optimizers(make, folder):
    """`MultiOptimizer`: some variables here, the rest with Adam"""
    own = make()
    model = mlp()
    optimizer = keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(
            keras.optimizers.Adam(0.01), {".*kernel": own}
        )
    )
    own.attach(model)
    model.compile(optimizer, cross_entropy(), run_eagerly=True)
    learns(model)
    assert own.statistics["batches"] == 6
    model.save(folder / "multi.keras")
    loaded = keras.saving.load_model(folder / "multi.keras")
    assert_equal(state(loaded), state(model))


def graph(make, folder):
    """`fit` in a graph, as eagerly"""
    agree(make)


def xla(make, folder):
    """`jit_compile=True`"""
    agree(make, jit_compile=True)


def steps_per_execution(make, folder):
    """`steps_per_execution`"""
    model = agree(make, steps_per_execution=4)
    assert model.optimizer.statistics["batches"] == 6


def run_eagerly(make, folder):
    """`run_eagerly=True`"""
    learns(eager(make()), epochs=5)


def train_on_batch(make, folder):
    """`train_on_batch`"""
    x, y = data()
    model = compiled(make())
    losses = [float(model.train_on_batch(x, y)) for _ in range(8)]
    assert losses[-1] < losses[0]


def own_loop(make, folder):
    """A loop of one's own, with `CurvatureTape` and `apply`"""
    x, y = data()
    head = kng.heads.Categorical()
    model = mlp()
    optimizer = make().attach(model, head=head)
    variables = model.trainable_variables

    def objective():
        return tf.reduce_mean(-head.log_prob(model(x, training=True), y))

    def step():
        with kng.CurvatureTape(optimizer, objective) as tape:
            loss = objective()
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    losses = [float(step()) for _ in range(5)]
    traced = tf.function(step)
    losses += [float(traced()) for _ in range(5)]
    assert losses[4] < losses[0]
    assert losses[-1] < 0.7 * losses[0]


def mirrored_strategy(make, folder):
    """`MirroredStrategy`, two replicas"""
    with two_replicas().scope():
        learns(compiled(make()), epochs=5)


def bad_data(make, folder):
    """A batch with a NaN is skipped and counted"""
    x, y = data()
    bad = x.copy()
    bad[3] = np.nan
    for compile_it in (eager, compiled):
        model = compile_it(make())
        model.train_on_batch(x, y)
        before = weights(model)
        model.train_on_batch(bad, y)
        assert_equal(weights(model), before)
        assert model.optimizer.statistics["skipped"] == 1
        model.train_on_batch(x, y)
        assert all(np.all(np.isfinite(value)) for value in weights(model))


def partial_batches(make, folder):
    """A last batch that is smaller"""
    x, y = data(31)
    weight = np.linspace(0, 1, 31)
    learns(compiled(make()), 5, x, y, sample_weight=weight, batch_size=8)
