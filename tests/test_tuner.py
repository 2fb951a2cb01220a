"""Keras Tuner: the search space, the swapped optimizer, real searches."""

import copy
import gc

import keras
import numpy as np
import pytest
from sklearn.datasets import load_digits

import keras_natgrad as kng

MISSING = "keras-tuner or tensorboard is missing: pip install .[tuner]"
keras_tuner = pytest.importorskip("keras_tuner", reason=MISSING)
pytest.importorskip("tensorboard", reason=MISSING)
NaturalGradientHyperModel = kng.tuner.NaturalGradientHyperModel
search_space = kng.tuner.search_space

NAMES = {
    *("kfac_block", "kfac_weight_sharing", "kfac_factor_decay"),
    *("kfac_curvature_update_period", "kfac_inverse_update_period"),
    *("kfac_damping", "kfac_momentum"),
}
EXAMPLES, BATCH, STEPS = 128, 64, 2  # Per epoch.


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    return (x[:EXAMPLES] / 16.0).astype("float32"), y[:EXAMPLES]


def cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def network(hp, built=True):
    """A small classifier of the digits."""
    inputs = [keras.Input((64,))] if built else []
    units = hp.Choice("units", [6, 8])
    return keras.Sequential(
        [
            *inputs,
            keras.layers.Dense(units, activation="tanh"),
            keras.layers.Dense(10),
        ]
    )


def build(hp, built=True, **arguments):
    model = network(hp, built)
    arguments = {"loss": cross_entropy(), "metrics": ["accuracy"], **arguments}
    model.compile("adam", run_eagerly=True, **arguments)
    return model


def build_without_input(hp):
    return build(hp, built=False)


class Recorder(keras.callbacks.Callback):
    """Notes the state at the start of every fit; may interrupt one.

    Tuners copy callbacks, so the list that all copies share is global.
    """

    def __init__(self, interrupted_fit=None, exception=KeyboardInterrupt):
        super().__init__()
        self.interrupted_fit = interrupted_fit
        self.exception = exception

    def on_train_begin(self, logs=None):
        fits.append(
            {
                "attached": self.model.optimizer.attached_model() is self.model,
                "iterations": int(self.model.optimizer.iterations),
                "state": state(self.model),
            }
        )

    def on_epoch_end(self, epoch, logs=None):
        if len(fits) == self.interrupted_fit:
            raise self.exception


fits = []


@pytest.fixture(autouse=True)
def no_fits():
    fits.clear()


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Keras Tuner collects garbage twice per model, mostly among modules."""
    gc.freeze()
    yield
    gc.unfreeze()


def state(model):
    variables = [*model.variables, *model.optimizer.variables]
    return [keras.ops.convert_to_numpy(v) for v in variables]


def assert_equal(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


def random_search(directory, hypermodel, **arguments):
    return keras_tuner.RandomSearch(
        hypermodel,
        keras_tuner.Objective("loss", "min"),
        **{"max_trials": 3, "seed": 1, "overwrite": False, **arguments},
        directory=directory,
    )


def hyperband(directory, hypermodel):
    """Two trials of one epoch, the best goes on; two more of two epochs."""
    return keras_tuner.Hyperband(
        hypermodel,
        keras_tuner.Objective("loss", "min"),
        max_epochs=2,
        factor=2,
        seed=1,
        overwrite=False,
        directory=directory,
    )


def search(tuner, digits, callback=None, **arguments):
    callbacks = [Recorder() if callback is None else callback]
    tuner.search(
        *digits,
        **{"batch_size": BATCH, "shuffle": False, "verbose": 0, **arguments},
        callbacks=callbacks,
    )


# -- The search space --------------------------------------------------------


def test_default_is_the_default_of_kfac():
    hp = keras_tuner.HyperParameters()
    assert search_space(hp).get_config() == kng.KFAC().get_config()
    assert set(hp.values) == NAMES


def test_all_values_are_those_of_an_optimizer():
    """Each value of each hyper-parameter makes an optimizer, and reaches it."""
    hp = keras_tuner.HyperParameters()
    search_space(hp)
    seen = 0
    choices = [each for each in hp.space if each.name in NAMES]
    for parameter in choices:
        for value in parameter.values:
            trial = hp.copy()
            trial.values[parameter.name] = value
            trial.ensure_active_values()
            config = search_space(trial).get_config()
            name = parameter.name.removeprefix("kfac_")
            if name not in ("damping", "momentum"):
                assert config[name] == value
            seen += 1
    assert seen == 4 + 2 + 5 + 4 + 4 + 2 + 3


@pytest.mark.parametrize(
    ("name", "mode", "value_name", "bounds"),
    [
        ("damping", "constant", "kfac_damping_constant", (1e-6, 1.0)),
        ("momentum", "fixed", "kfac_momentum_value", (0.5, 0.95)),
        ("momentum", "spring", "kfac_momentum_value", (0.5, 0.95)),
    ],
)
def test_conditional_values(name, mode, value_name, bounds):
    hp = keras_tuner.HyperParameters()
    hp.values[f"kfac_{name}"] = mode
    hp.values[value_name] = 0.625
    optimizer = search_space(hp)
    expected = kng.Spring(0.625) if mode == "spring" else 0.625
    assert optimizer.get_config() == kng.KFAC(**{name: expected}).get_config()
    (parameter,) = [each for each in hp.space if each.name == value_name]
    assert (parameter.min_value, parameter.max_value) == bounds
    assert hp.is_active(value_name)
    hp.values[f"kfac_{name}"] = "auto"
    assert not hp.is_active(value_name)


def test_what_is_given_is_not_searched():
    hp = keras_tuner.HyperParameters()
    optimizer = search_space(
        hp,
        prefix="fisher_",
        damping=1e-2,
        momentum=0.9,
        block="diagonal",
        learning_rate=hp.Float("rate", 1e-3, 1.0, default=0.25),
    )
    expected = kng.KFAC(0.25, momentum=0.9, damping=1e-2, block="diagonal")
    assert optimizer.get_config() == expected.get_config()
    assert set(hp.values) == {
        *("rate", "fisher_weight_sharing", "fisher_factor_decay"),
        *("fisher_curvature_update_period", "fisher_inverse_update_period"),
    }


def test_search_space_refuses():
    with pytest.raises(ValueError, match=r"HyperParameters .* hp=\{\}"):
        search_space({})
    with pytest.raises(ValueError, match="a string. Received: prefix=3"):
        search_space(keras_tuner.HyperParameters(), prefix=3)


# -- The swapped optimizer ---------------------------------------------------


def test_swap_keeps_what_the_model_was_compiled_with(digits):
    """Loss, metrics, weights and settings; evaluated, both agree."""
    x, y = digits

    def own_loss(y_true, y_pred):  # Not registered with Keras.
        return cross_entropy()(y_true, y_pred)

    arguments = {
        "loss": own_loss,
        "loss_weights": [0.5],
        "metrics": ["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(3)],
        "weighted_metrics": ["sparse_categorical_crossentropy"],
        "steps_per_execution": 2,
    }
    models = []

    def kept(hp):
        models.append(build(hp, **arguments))
        models.append(copy.copy(models[0].get_weights()))
        return models[0]

    reference = build(keras_tuner.HyperParameters(), **arguments)
    model = NaturalGradientHyperModel(kept).build(keras_tuner.HyperParameters())
    assert model is models[0]
    assert_equal(model.get_weights(), models[1])
    assert type(model.optimizer) is kng.KFAC
    assert model.optimizer.attached_model() is model
    assert model.optimizer.built
    assert model.run_eagerly and model.steps_per_execution == 2
    left, right = model.get_compile_config(), reference.get_compile_config()
    assert left.pop("optimizer")["class_name"] == "KFAC"
    assert right.pop("optimizer")["class_name"] == "Adam"
    assert left == right
    reference.set_weights(model.get_weights())
    left, right = (
        each.evaluate(x, y, verbose=0, return_dict=True)
        for each in (model, reference)
    )
    assert len(left) == 4
    assert left == right


def test_swap_of_losses_by_output(tmp_path):
    """A dictionary of losses stays, and is in the saved file."""

    def two_outputs(hp):
        x = keras.Input((3,))
        outputs = {
            "a": keras.layers.Dense(2, name="a")(x),
            "b": keras.layers.Dense(1, name="b")(x),
        }
        model = keras.Model(x, outputs)
        model.compile(
            "sgd",
            loss={"a": "mse", "b": "mae"},
            loss_weights={"a": 1.0, "b": 3.0},
            metrics={"b": ["mse"]},
        )
        return model

    model = NaturalGradientHyperModel(
        two_outputs, lambda hp: kng.KFAC(damping=hp.Float("d", 1.0, 2.0))
    ).build(keras_tuner.HyperParameters())
    expected = two_outputs(None).get_compile_config()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for name in ("loss", "loss_weights", "metrics"):
        assert model.get_compile_config()[name] == expected[name]
        assert loaded.get_compile_config()[name] == expected[name]
    assert loaded.optimizer.damping.constant == 1.0


def test_the_optimizer_may_be_another_or_wrapped():
    def choose(hp):
        name = hp.Choice("optimizer", ["kfac", "adam"])
        if name == "adam":
            return keras.optimizers.Adam()
        return keras.optimizers.LossScaleOptimizer(search_space(hp))

    hypermodel = NaturalGradientHyperModel(build, choose)
    hp = keras_tuner.HyperParameters()
    model = hypermodel.build(hp)
    inner = model.optimizer.inner_optimizer
    assert inner.attached_model() is model
    assert model.optimizer.built and inner.built
    hp.values["optimizer"] = "adam"
    model = hypermodel.build(hp)
    assert type(model.optimizer) is keras.optimizers.Adam
    assert model.optimizer.built


def test_head_and_exclude_reach_attach():
    head = kng.heads.Categorical()
    hypermodel = NaturalGradientHyperModel(build, head=head, exclude=["dense*"])
    with pytest.warns(UserWarning, match="dense"):
        model = hypermodel.build(keras_tuner.HyperParameters())
    assert model.optimizer.attached_head() is head


def test_a_hypermodel_keeps_its_fit_and_declarations(tmp_path, digits):
    class Own(keras_tuner.HyperModel):
        def declare_hyperparameters(self, hp):
            hp.Fixed("units", 6)

        def build(self, hp):
            return build(hp)

        def fit(self, hp, model, *args, **kwargs):
            epochs = hp.Choice("epochs", [2])
            return model.fit(*args, epochs=epochs, **kwargs)

    hypermodel = NaturalGradientHyperModel(Own(), name="own")
    assert hypermodel.name == "own"
    tuner = random_search(tmp_path, hypermodel, max_trials=1)
    search(tuner, digits)
    (best,) = tuner.get_best_hyperparameters()
    assert (best.get("units"), best.get("epochs")) == (6, 2)
    assert tuner.get_best_models()[0].optimizer.iterations == 2 * STEPS


class OwnCompile(keras.Sequential):
    def compile(self, **arguments):
        super().compile(**arguments)


def test_hypermodel_refuses():
    hp = keras_tuner.HyperParameters()
    with pytest.raises(ValueError, match="Received: build=3"):
        NaturalGradientHyperModel(3)
    with pytest.raises(ValueError, match="Received: optimizer=<keras_natgrad"):
        NaturalGradientHyperModel(build, kng.KFAC())
    with pytest.raises(ValueError, match="Keras optimizer. Received: 'adam'"):
        NaturalGradientHyperModel(build, lambda hp: "adam").build(hp)
    with pytest.raises(
        ValueError, match="compiled keras.Model. Received: <Seq"
    ):
        NaturalGradientHyperModel(network).build(hp)
    with pytest.raises(ValueError, match="keras.Model. Received: None"):
        NaturalGradientHyperModel(lambda hp: None).build(hp)

    def own_metric(y_true, y_pred):
        return keras.ops.mean(y_pred)

    with pytest.raises(ValueError, match="register_keras_.*own_metric"):
        NaturalGradientHyperModel(
            lambda hp: build(hp, metrics=[own_metric])
        ).build(hp)

    def own_compile(hp):
        model = OwnCompile([keras.layers.Dense(1)])
        model.compile(optimizer="adam", loss="mse")
        return model

    with pytest.raises(
        ValueError, match="overrides `compile`.*model=<OwnCompile"
    ):
        NaturalGradientHyperModel(own_compile).build(hp)


# -- Searches ----------------------------------------------------------------


@pytest.mark.variants("build")
@pytest.mark.parametrize("build", [build, build_without_input])
def test_best_model_trains_on_as_if_never_interrupted(tmp_path, digits, build):
    """Weights and curvature are those of the checkpoint, bit for bit."""
    trained = []

    class Kept(NaturalGradientHyperModel):
        def fit(self, hp, model, *args, **kwargs):
            trained.append(model)
            return super().fit(hp, model, *args, **kwargs)

    tuner = random_search(tmp_path, Kept(build), max_trials=1)
    search(tuner, digits, epochs=2)
    losses = trained[0].history.history["loss"]
    assert losses[1] < losses[0]  # So the checkpoint is that of the last epoch.

    (model,) = tuner.get_best_models()
    assert model.optimizer.iterations == 2 * STEPS
    assert model.optimizer.statistics["batches"] == 2 * STEPS
    assert_equal(state(model), state(trained[0]))
    for each in (model, trained[0]):
        each.fit(*digits, batch_size=BATCH, shuffle=False, verbose=0)
    assert_equal(state(model), state(trained[0]))


def test_random_search_resumes_after_an_interruption(tmp_path, digits):
    """The trial that was cut off runs again, those before it do not."""
    tuner = random_search(tmp_path, NaturalGradientHyperModel(build))
    assert {each.name for each in tuner.oracle.get_space().space} == {
        *("units", "kfac_damping_constant", "kfac_momentum_value", *NAMES)
    }
    with pytest.raises(KeyboardInterrupt):
        search(tuner, digits, Recorder(interrupted_fit=2))
    assert len(fits) == 2
    before = {
        key: trial.get_state()
        for key, trial in tuner.oracle.trials.items()
        if trial.status == "COMPLETED"
    }
    assert len(before) == 1

    resumed = random_search(tmp_path, NaturalGradientHyperModel(build))
    search(resumed, digits)
    assert len(fits) == 2 + 2
    assert all(fit["attached"] and fit["iterations"] == 0 for fit in fits)
    after = resumed.oracle.trials
    assert [trial.status for trial in after.values()] == ["COMPLETED"] * 3
    for key, trial in before.items():
        assert after[key].get_state() == trial
    # The best model trains on.
    (model,) = resumed.get_best_models()
    assert model.optimizer.iterations == STEPS
    before = model.evaluate(*digits, verbose=0)[0]
    model.fit(*digits, batch_size=BATCH, epochs=3, verbose=0)
    assert model.evaluate(*digits, verbose=0)[0] < before


def test_random_search_goes_on_after_a_failed_trial(tmp_path, digits):
    hypermodel = NaturalGradientHyperModel(build)
    tuner = random_search(tmp_path, hypermodel, max_retries_per_trial=1)
    search(tuner, digits, Recorder(1, RuntimeError))
    assert len(fits) == 4
    statuses = [trial.status for trial in tuner.oracle.trials.values()]
    assert statuses == ["COMPLETED"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("build", [build, build_without_input])
def test_hyperband_resumes_with_the_curvature(tmp_path, digits, build):
    """Its later rounds, also the one that was interrupted."""
    tuner = hyperband(tmp_path, NaturalGradientHyperModel(build))
    cut = 3  # The third trial is the second round of the better of two.
    with pytest.raises(KeyboardInterrupt):
        search(tuner, digits, Recorder(interrupted_fit=cut))
    assert [fit["iterations"] for fit in fits] == [0, 0, STEPS]

    resumed = hyperband(tmp_path, NaturalGradientHyperModel(build))
    search(resumed, digits)
    # The interrupted trial starts from the same checkpoint once more.
    assert_equal(fits[cut]["state"], fits[cut - 1]["state"])
    assert [fit["iterations"] for fit in fits[cut:]] == [STEPS, 0, 0]
    assert all(fit["attached"] for fit in fits)
    trials = resumed.oracle.trials.values()
    assert len(trials) == len(fits) - 1
    assert {trial.status for trial in trials} == {"COMPLETED"}
    later = [t for t in trials if "tuner/trial_id" in t.hyperparameters.values]
    # Its model has the steps of both rounds.
    (trial,) = later
    model = resumed.load_model(trial)
    assert model.optimizer.iterations == 2 * STEPS
    assert model.optimizer.statistics["batches"] == 2 * STEPS
    (model,) = resumed.get_best_models()
    model.fit(*digits, batch_size=BATCH, verbose=0)


@pytest.mark.slow
def test_attach_in_a_search_without_the_wrapper(tmp_path, digits):
    """Each trial has a copy of its own; one that was used copies as well."""

    def unattached(hp):
        model = network(hp)
        model.compile(search_space(hp), loss=cross_entropy(), run_eagerly=True)
        return model

    callback = kng.callbacks.Attach(head=kng.heads.Categorical())
    model = unattached(keras_tuner.HyperParameters())
    model.fit(*digits, verbose=0, callbacks=[callback])
    tuner = random_search(tmp_path, unattached, max_trials=2)
    tuner.search(*digits, verbose=0, callbacks=[callback, Recorder()])
    assert [fit["attached"] for fit in fits] == [True, True]
    assert [t.status for t in tuner.oracle.trials.values()] == ["COMPLETED"] * 2
    assert callback.model is model


def test_loss_scaling_resumes_with_its_scale(tmp_path, digits):
    """Keras wraps the optimizer; both have the state that was saved."""

    def build_half(hp):
        keras.config.set_dtype_policy("mixed_float16")
        return build(hp)

    trained = []

    class Kept(NaturalGradientHyperModel):
        def fit(self, hp, model, *args, **kwargs):
            trained.append(model)
            model.optimizer.dynamic_scale.assign(64.0)
            return super().fit(hp, model, *args, **kwargs)

    tuner = random_search(tmp_path, Kept(build_half), max_trials=1)
    tuner.search(*digits, batch_size=BATCH, verbose=0)
    (model,) = tuner.get_best_models()
    assert model.optimizer.inner_optimizer.statistics["batches"] == STEPS
    assert model.optimizer.dynamic_scale == 64.0
    assert_equal(state(model), state(trained[0]))


@pytest.mark.slow
def test_in_a_graph(tmp_path, digits):
    def build(hp):
        model = network(hp)
        model.compile("adam", loss=cross_entropy())
        return model

    tuner = random_search(
        tmp_path, NaturalGradientHyperModel(build), max_trials=1
    )
    search(tuner, digits)
    (model,) = tuner.get_best_models()
    assert model.optimizer.iterations == STEPS
