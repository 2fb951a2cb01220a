"""What Keras users do with an optimizer, one function per feature.

A function takes `make`, which creates the optimizer from keyword arguments,
and the test's temporary folder; it asserts that the feature works. Its
docstring is the feature's row in the table of docs/keras_contract.md.
"""

import csv

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from tests.distribution.strategy import two_replicas
from tests.training.networks import (
    CLASSES,
    FEATURES,
    assert_close,
    assert_equal,
    cross_entropy,
    data,
    mlp,
    state,
    weights,
)

FIT = {"batch_size": 12, "shuffle": False, "verbose": 0}


def compiled(optimizer, model=None, **kwargs):
    """Attaches and compiles, in graph mode unless told otherwise."""
    model = mlp() if model is None else model
    for inner in (optimizer, getattr(optimizer, "inner_optimizer", None)):
        if hasattr(inner, "attach"):
            inner.attach(model)
    kwargs.setdefault("loss", cross_entropy())
    model.compile(optimizer, **kwargs)
    return model


def eager(optimizer, model=None, **kwargs):
    """The same without tracing, which takes longer than a few steps."""
    return compiled(optimizer, model, run_eagerly=True, **kwargs)


def learns(model, epochs=3, x=None, y=None, **kwargs):
    """Trains; asserts that the loss fell and the weights are finite."""
    if x is None:
        x, y = data()
    before = model.evaluate(x, y, verbose=0, return_dict=True)["loss"]
    history = model.fit(x, y, epochs=epochs, **{**FIT, **kwargs})
    assert all(np.all(np.isfinite(value)) for value in weights(model))
    after = model.evaluate(x, y, verbose=0, return_dict=True)["loss"]
    assert after < before
    return history.history


# ---- Arguments of the optimizer --------------------------------------------


def learning_rate_schedule(make, folder):
    """`LearningRateSchedule` as learning rate"""
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
        [3], [0.1, 0.0]
    )
    model = eager(make(learning_rate=schedule))
    learns(model)
    # From the fifth step on it is zero.
    assert model.optimizer.statistics["learning_rate"] == 0.0
    assert float(model.optimizer.learning_rate) == 0.0


def changed_learning_rate(make, folder):
    """`ReduceLROnPlateau`, `LearningRateScheduler`"""
    model = eager(make(learning_rate=0.1))
    halve = keras.callbacks.LearningRateScheduler(lambda _, rate: 0.5 * rate)
    plateau = keras.callbacks.ReduceLROnPlateau(
        "loss", factor=0.1, patience=0, min_delta=1e9
    )
    learns(model, epochs=3, callbacks=[halve, plateau])
    rate = float(model.optimizer.learning_rate.numpy())
    np.testing.assert_allclose(rate, 0.1 * 0.5**3 * 0.1**2, rtol=1e-5)


def weight_decay(make, folder):
    """`weight_decay`, `exclude_from_weight_decay`"""
    results = []
    for decay in (None, 0.5):
        optimizer = make(learning_rate=0.1, weight_decay=decay)
        model = eager(optimizer)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        start = weights(model)
        model.fit(*data(12), **FIT)
        results.append(weights(model))
    # Decoupled: w − w·wd·lr before the step, of which it is no part.
    for old, plain, decayed in zip(start, *results, strict=True):
        decay = 0.05 * old if old.ndim == 2 else 0.0 * old
        np.testing.assert_allclose(plain - decayed, decay, rtol=1e-3, atol=1e-6)


def clipping(make, folder):
    """`clipnorm`, `clipvalue`, `global_clipnorm`"""
    for name in ("clipnorm", "clipvalue", "global_clipnorm"):
        learns(eager(make(**{name: 0.05})))


def average_of_weights(make, folder):
    """`use_ema`, `ema_overwrite_frequency`, `SwapEMAWeights`"""
    model = eager(make(use_ema=True, ema_momentum=0.5))
    learns(model)
    model = eager(make(use_ema=True, ema_momentum=0.5))
    learns(model, callbacks=[keras.callbacks.SwapEMAWeights()])
    model = eager(
        make(use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2)
    )
    learns(model)


def loss_scale_factor(make, folder):
    """`loss_scale_factor`"""
    results = []
    for factor in (None, 1024.0):
        model = eager(make(loss_scale_factor=factor))
        learns(model)
        results.append(weights(model))
    # A power of two: nothing is rounded.
    assert_close(*results, 1e-6, 1e-7)


def gradient_accumulation(make, folder):
    """`gradient_accumulation_steps`"""
    model = compiled(make(gradient_accumulation_steps=2))
    learns(model, epochs=5)
    # Batches are counted all, steps every second one.
    assert model.optimizer.statistics["batches"] == 10
    assert int(model.optimizer.iterations) == 5


# ---- Precision -------------------------------------------------------------


def mixed_float16(make, folder):
    """`mixed_float16` with `LossScaleOptimizer`"""
    keras.config.set_dtype_policy("mixed_float16")
    model = mlp()
    keras.config.set_dtype_policy("float32")
    optimizer = make()
    model = compiled(optimizer, model)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    learns(model, epochs=5)
    for variable in optimizer.variables:
        assert variable.dtype != "float16"


def mixed_bfloat16(make, folder):
    """`mixed_bfloat16`"""
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = mlp()
    keras.config.set_dtype_policy("float32")
    learns(compiled(make(log_statistics=True), model), epochs=5)


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


# ---- Ways to run -----------------------------------------------------------


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


def xla(make, folder):
    """`jit_compile=True`"""
    learns(compiled(make(), jit_compile=True), epochs=5)


def steps_per_execution(make, folder):
    """`steps_per_execution`"""
    model = compiled(make(), steps_per_execution=4)
    learns(model, epochs=2)
    assert model.optimizer.statistics["batches"] == 4


def run_eagerly(make, folder):
    """`run_eagerly=True`"""
    learns(eager(make()), epochs=5)


def train_on_batch(make, folder):
    """`train_on_batch`"""
    x, y = data()
    model = compiled(make())
    losses = [float(model.train_on_batch(x, y)) for _ in range(6)]
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

    losses = []
    for _ in range(6):
        with kng.CurvatureTape(optimizer, objective) as tape:
            loss = objective()
        optimizer.apply(tape.gradient(loss, variables), variables)
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def mirrored_strategy(make, folder):
    """`MirroredStrategy`, two replicas"""
    with two_replicas().scope():
        learns(compiled(make()), epochs=5)


def partial_batches(make, folder):
    """A last batch that is smaller"""
    x, y = data(31)
    learns(compiled(make()), epochs=4, x=x, y=y)


# ---- Saving ----------------------------------------------------------------


def saved_model_file(make, folder):
    """`model.save("….keras")`, resumed bit for bit"""
    model = eager(make())
    model.fit(*data(), **FIT)
    model.save(folder / "model.keras")
    loaded = keras.saving.load_model(folder / "model.keras")
    loaded.optimizer.attach(loaded)
    loaded.run_eagerly = True
    for each in (model, loaded):
        each.fit(*data(), **FIT)
    assert_equal(state(loaded), state(model))


def weights_file(make, folder):
    """`save_weights` and `load_weights` with a built optimizer"""
    model = eager(make())
    model.fit(*data(), **FIT)
    model.save_weights(folder / "model.weights.h5")
    other = eager(make())
    other.optimizer.build(other.trainable_variables)
    other.load_weights(folder / "model.weights.h5")
    for each in (model, other):
        each.fit(*data(), **FIT)
    assert_equal(state(other), state(model))


def checkpoints(make, folder):
    """`ModelCheckpoint`, `EarlyStopping(restore_best_weights=True)`"""
    model = eager(make())
    path = folder / "{epoch}.keras"
    learns(
        model,
        callbacks=[
            keras.callbacks.ModelCheckpoint(path),
            keras.callbacks.EarlyStopping("loss", restore_best_weights=True),
        ],
    )
    loaded = keras.saving.load_model(folder / "3.keras")
    assert_equal(state(loaded), state(model))


def backup(make, folder):
    """`BackupAndRestore` after an interruption"""

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def run(*callbacks):
        model = eager(make())
        store = keras.callbacks.BackupAndRestore(folder / "backup")
        model.fit(*data(), epochs=4, callbacks=[store, *callbacks], **FIT)
        return model

    try:
        run(Interrupt())
    except KeyboardInterrupt:
        pass
    resumed = run()
    whole = eager(make())
    whole.fit(*data(), epochs=4, **FIT)
    assert_equal(state(resumed), state(whole))


def tensorflow_checkpoint(make, folder):
    """`tf.train.Checkpoint`"""
    model = eager(make())
    model.fit(*data(), **FIT)
    saved = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    path = saved.save(str(folder / "checkpoint"))
    other = eager(make())
    other.optimizer.build(other.trainable_variables)
    restored = tf.train.Checkpoint(model=other, optimizer=other.optimizer)
    restored.restore(path).assert_consumed()
    for each in (model, other):
        each.fit(*data(), **FIT)
    assert_equal(state(other), state(model))


def orbax(make, folder):
    """`OrbaxCheckpoint`, loaded and continued, where Orbax is installed"""
    pytest.importorskip("orbax.checkpoint", reason="needs orbax-checkpoint")
    # Not sequential: Keras finds what it saved by the paths of the variables,
    # which loading changes there, for its own optimizers too.
    inputs = keras.Input((FEATURES,))
    hidden = keras.layers.Dense(5, "tanh")(inputs)
    network = keras.Model(inputs, keras.layers.Dense(CLASSES)(hidden))
    model = eager(make(), network)
    store = keras.callbacks.OrbaxCheckpoint(
        str(folder / "orbax"), save_on_background=False
    )
    model.fit(*data(), epochs=2, callbacks=[store], **FIT)
    loaded = keras.saving.load_model(str(folder / "orbax"))
    loaded.optimizer.attach(loaded)
    loaded.run_eagerly = True
    for each in (model, loaded):
        each.fit(*data(), **FIT)
    assert_equal(state(loaded), state(model))


def state_tree(make, folder):
    """`get_state_tree`: every variable has its own path"""
    model = eager(make())
    model.fit(*data(), **FIT)
    tree = model.get_state_tree()
    paths = [variable.path for variable in model.optimizer.variables]
    assert len(set(paths)) == len(paths)
    assert tree["optimizer_variables"]


def export(make, folder):
    """`model.export` while the optimizer is attached"""
    x, y = data()
    model = eager(make())
    model.fit(x, y, **FIT)
    model.export(folder / "exported", verbose=False)
    loaded = tf.saved_model.load(str(folder / "exported"))
    served = loaded.serve(x)
    assert_close([served.numpy()], [model.predict(x, verbose=0)], 1e-5, 1e-6)


def clone(make, folder):
    """`clone_model`, with a new optimizer"""
    model = eager(make())
    model.fit(*data(), **FIT)
    copy = keras.models.clone_model(model)
    learns(eager(make(), copy))
    before = weights(copy)
    model.fit(*data(), **FIT)
    assert_equal(weights(copy), before)


def two_models(make, folder):
    """Two optimizers in one program, as in a GAN"""
    x, y = data()
    first, second = (keras.Sequential([mlp()]) for _ in range(2))
    left, right = make(), make()
    eager(left, first)
    eager(right, second)
    for _ in range(4):
        first.train_on_batch(x, y)
        second.train_on_batch(-x, y)
    assert first.optimizer is left and second.optimizer is right
    assert left.statistics["batches"] == right.statistics["batches"] == 4
    assert any(
        np.any(a != b)
        for a, b in zip(weights(first), weights(second), strict=True)
    )


# ---- Models ----------------------------------------------------------------


class _Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.first = keras.layers.Dense(5, "tanh")
        self.last = keras.layers.Dense(3)

    def call(self, inputs, training=False):
        return self.last(self.first(inputs))


def subclassed(make, folder):
    """Subclassed models, unbuilt when they are compiled"""
    x, y = data()
    model = _Subclassed()
    make_it = eager(make(), model)
    first = float(make_it.train_on_batch(x, y))
    for _ in range(5):
        last = float(make_it.train_on_batch(x, y))
    assert last < first


def frozen_layers(make, folder):
    """Layers with `trainable=False`"""
    model = mlp()
    model.layers[0].trainable = False
    before = model.layers[0].get_weights()
    learns(eager(make(), model))
    assert_equal(model.layers[0].get_weights(), before)


def shared_layers(make, folder):
    """A layer that is called twice"""
    shared = keras.layers.Dense(FEATURES, "tanh")
    inputs = keras.Input((FEATURES,))
    outputs = keras.layers.Dense(3)(shared(shared(inputs)))
    learns(eager(make(), keras.Model(inputs, outputs)))


def embeddings(make, folder):
    """Embeddings, whose gradients come as rows"""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 7, (24, 2))
    y = x[:, 0] % 3
    model = keras.Sequential(
        [
            keras.Input((2,), dtype="int32"),
            keras.layers.Embedding(7, 3),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )
    learns(eager(make(), model), epochs=5, x=x, y=y)


def weighted_examples(make, folder):
    """`sample_weight`, `class_weight`"""
    x, y = data()
    model = eager(make())
    learns(model, class_weight={0: 1.0, 1: 0.5, 2: 2.0})
    # Examples without weight are not there, in loss or Fisher. The default
    # K-FAC draws random numbers for them too.
    draws = isinstance(model.optimizer, kng.KFAC)
    exact = {"fisher": "exact", "quadratic_model": "exact"} if draws else {}
    half = np.arange(24) < 12
    left, right = eager(make(**exact)), eager(make(**exact))
    whole = {**FIT, "batch_size": 24, "epochs": 3}
    left.fit(x, y, sample_weight=half, **whole)
    right.fit(x[:12], y[:12], sample_weight=np.full(12, 0.5), **whole)
    assert_close(weights(left), weights(right), 1e-4, 1e-5)


def regularizers(make, folder):
    """Regularizers, constraints and `add_loss`"""
    model = mlp(kernel_regularizer="l2", bias_constraint="non_neg")
    learns(eager(make(), model))
    assert np.all(model.layers[0].bias.numpy() >= 0)


def reductions(make, folder):
    """Losses with `reduction="sum"`"""
    model = eager(make(), loss=cross_entropy(reduction="sum"))
    learns(model)


def low_rank(make, folder):
    """LoRA: `layer.enable_lora`"""
    model = mlp()
    model.layers[0].enable_lora(2)
    before = model.layers[0]._kernel.numpy()
    learns(eager(make(), model))
    np.testing.assert_array_equal(model.layers[0]._kernel.numpy(), before)


# ---- Logs ------------------------------------------------------------------


def logs(make, folder):
    """`CSVLogger`, `TerminateOnNaN`; statistics in the logs"""
    model = eager(make(log_statistics=True))
    learns(
        model,
        callbacks=[
            keras.callbacks.CSVLogger(folder / "log.csv"),
            keras.callbacks.TerminateOnNaN(),
        ],
    )
    with open(folder / "log.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    name = model.optimizer.name
    assert float(rows[-1][f"{name}_batches"]) == 6.0


def tensorboard(make, folder):
    """`TensorBoard`"""
    callback = keras.callbacks.TensorBoard(folder / "logs", histogram_freq=1)
    learns(eager(make()), callbacks=[callback])
    assert list((folder / "logs" / "train").glob("events.out.tfevents.*"))


def summary(make, folder):
    """`model.summary` counts the optimizer's variables"""
    model = eager(make())
    model.fit(*data(), **FIT)
    lines = []
    model.summary(print_fn=lambda line, **_: lines.append(line))
    assert "Optimizer params" in "\n".join(lines)


FEATURES_IN_ORDER = {
    "Arguments": (
        learning_rate_schedule,
        changed_learning_rate,
        weight_decay,
        clipping,
        average_of_weights,
        loss_scale_factor,
        gradient_accumulation,
    ),
    "Precision": (mixed_float16, mixed_bfloat16, overflow),
    "Running": (
        several_optimizers,
        xla,
        steps_per_execution,
        run_eagerly,
        train_on_batch,
        own_loop,
        partial_batches,
        mirrored_strategy,
    ),
    "Saving": (
        saved_model_file,
        weights_file,
        checkpoints,
        backup,
        tensorflow_checkpoint,
        orbax,
        state_tree,
        export,
        clone,
        two_models,
    ),
    "Models": (
        subclassed,
        frozen_layers,
        shared_layers,
        embeddings,
        weighted_examples,
        regularizers,
        reductions,
        low_rank,
    ),
    "Logs": (logs, tensorboard, summary),
}
