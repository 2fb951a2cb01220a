"""A task of the TensorFlow Model Garden trains with K-FAC, end to end."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

official = pytest.importorskip(
    "official",
    reason="tf-models-official is not installed, see docs/model_garden.md",
)

from official.core import base_task, config_definitions, train_lib  # noqa: E402
from official.modeling import optimization  # noqa: E402

import keras_natgrad as kng  # noqa: E402
from keras_natgrad.integrations import model_garden  # noqa: E402
from keras_natgrad.integrations.tf_keras import KFAC  # noqa: E402

X = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
Y = np.argmax(X[:, :3], axis=-1).astype("int32")


def constant(rate=1.0):
    return {"type": "constant", "constant": {"learning_rate": rate}}


def optimization_config(rate=1.0, **kfac):
    return model_garden.OptimizationConfig(
        {
            "optimizer": {"type": "kfac", "kfac": kfac},
            "learning_rate": constant(rate),
        }
    )


def build(config):
    factory = optimization.OptimizerFactory(config)
    return factory.build_optimizer(factory.build_learning_rate())


@pytest.fixture(autouse=True)
def registered():
    model_garden.register()


@dataclasses.dataclass
class Config(config_definitions.TaskConfig):
    train_data: config_definitions.DataConfig = dataclasses.field(
        default_factory=config_definitions.DataConfig
    )
    validation_data: config_definitions.DataConfig = dataclasses.field(
        default_factory=config_definitions.DataConfig
    )


class Plain(base_task.Task):
    """An ordinary task of three classes; the batch is always the same."""

    def build_model(self):
        tf_keras.utils.set_random_seed(0)
        return tf_keras.Sequential(
            [
                tf_keras.Input((4,)),
                tf_keras.layers.Dense(5, activation="tanh"),
                tf_keras.layers.Dense(3),
            ]
        )

    def build_inputs(self, params, input_context=None):
        return tf.data.Dataset.from_tensors((X, Y)).repeat()

    def build_losses(self, labels, model_outputs, aux_losses=None):
        return tf.reduce_mean(
            tf_keras.losses.sparse_categorical_crossentropy(
                labels, model_outputs, from_logits=True
            )
        )


class Task(model_garden.KFACTask, Plain):
    def build_head(self):
        return kng.heads.Categorical()


def run(task, folder, steps, config=None):
    """Trains under the garden's trainer; continues what is in the folder."""
    experiment = config_definitions.ExperimentConfig(
        task=Config(),
        trainer=config_definitions.TrainerConfig(
            optimizer_config=config or optimization_config(),
            train_steps=steps,
            steps_per_loop=2,
            summary_interval=2,
            checkpoint_interval=2,
        ),
    )
    model, _ = train_lib.run_experiment(
        distribution_strategy=tf.distribute.get_strategy(),
        task=task(experiment.task),
        mode="train",
        params=experiment,
        model_dir=str(folder),
        save_summary=False,
    )
    return model


def weights(model):
    return np.concatenate([w.ravel() for w in model.get_weights()])


def loss_of(model):
    return float(Plain(Config()).build_losses(Y, model(X)))


def test_a_task_trains_under_the_garden_trainer(tmp_path):
    start = loss_of(Plain(Config()).build_model())
    model = run(Task, tmp_path, 40)
    assert loss_of(model) < 0.2 * start


def test_a_task_makes_the_steps_of_fit(tmp_path):
    settings = {"damping": 0.1, "momentum": 0.5}
    found = run(Task, tmp_path, 4, optimization_config(**settings))
    model = Plain(Config()).build_model()
    optimizer = KFAC(**settings).attach(model)
    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss)
    for _ in range(4):
        model.train_on_batch(X, Y)
    np.testing.assert_allclose(weights(found), weights(model), atol=1e-5)


def test_a_run_that_was_stopped_goes_on_exactly(tmp_path):
    whole = run(Task, tmp_path / "whole", 8)
    run(Task, tmp_path / "parts", 4)
    parts = run(Task, tmp_path / "parts", 8)
    np.testing.assert_array_equal(weights(parts), weights(whole))


def test_the_task_trains_with_other_optimizers(tmp_path):
    config = model_garden.OptimizationConfig(
        {"optimizer": {"type": "adam"}, "learning_rate": constant(0.1)}
    )
    start = loss_of(Plain(Config()).build_model())
    assert loss_of(run(Task, tmp_path, 12, config)) < start


def test_a_task_without_a_head(tmp_path):
    class Headless(model_garden.KFACTask, Plain):
        pass

    with pytest.raises(NotImplementedError, match="Headless"):
        run(Headless, tmp_path, 2)


def test_the_factory_builds_the_optimizer_of_a_configuration():
    optimizer = build(
        optimization_config(
            rate=0.5,
            automatic=False,
            damping=0.1,
            momentum=0.9,
            clipnorm=2.0,
            inverse_update_period=7,
        )
    )
    assert isinstance(optimizer, KFAC)
    config = optimizer.get_config()
    assert config["learning_rate"] == 0.5
    assert not config["automatic"]
    assert config["damping"] == 0.1
    assert config["momentum"] == 0.9
    assert config["clipnorm"] == 2.0
    assert config["inverse_update_period"] == 7


def test_the_defaults_of_a_configuration_are_those_of_the_optimizer():
    built, default = build(optimization_config()), KFAC(name="KFAC")
    assert built.get_config() == default.get_config()


def test_the_learning_rate_may_be_a_schedule():
    config = model_garden.OptimizationConfig(
        {
            "optimizer": {"type": "kfac"},
            "learning_rate": constant(),
            "warmup": {
                "type": "linear",
                "linear": {"warmup_steps": 4, "warmup_learning_rate": 0.0},
            },
        }
    )
    optimizer = build(config)
    schedule = tf_keras.optimizers.schedules.LearningRateSchedule
    assert isinstance(optimizer._learning_rate, schedule)
    assert optimizer.automatic


def test_registering_twice_is_harmless():
    model_garden.register()
    assert isinstance(build(optimization_config()), KFAC)


def test_loss_scaling_is_refused():
    model = Plain(Config()).build_model()
    wrapped = tf_keras.mixed_precision.LossScaleOptimizer(KFAC())
    with pytest.raises(ValueError, match="loss scaling"):
        Task(Config()).train_step((X, Y), model, wrapped)


def test_functions_of_gradients_are_refused():
    factory = optimization.OptimizerFactory(optimization_config())
    with pytest.raises(ValueError, match="gradient_transformers"):
        factory.build_optimizer(1.0, gradient_transformers=[lambda g: g])
