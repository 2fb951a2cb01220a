"""Title: K-FAC in a task of the TensorFlow Model Garden.

Author: keras_natgrad authors
Description: A small classifier of images, made up on the spot, under the
    garden's own trainer, with K-FAC chosen by the configuration. The task is
    an ordinary one, with one more base class and one more method.
Accelerator: None

The garden is not installed with this package, see docs/model_garden.md. Run
`python examples/model_garden_task.py`, with `--optimizer adam` for comparison.
"""

import argparse
import dataclasses
import tempfile

import numpy as np
import tensorflow as tf
import tf_keras
from official.core import base_task, config_definitions, train_lib

from keras_natgrad import heads
from keras_natgrad.integrations import model_garden

CLASSES = 4
SIZE = 12


@dataclasses.dataclass
class StripesConfig(config_definitions.TaskConfig):
    """Configuration of the task."""

    train_data: config_definitions.DataConfig = dataclasses.field(
        default_factory=lambda: config_definitions.DataConfig(
            global_batch_size=64, is_training=True
        )
    )
    validation_data: config_definitions.DataConfig = dataclasses.field(
        default_factory=lambda: config_definitions.DataConfig(
            global_batch_size=64, is_training=False
        )
    )


class StripesTask(model_garden.KFACTask, base_task.Task):
    """Tells the direction of stripes under noise."""

    def build_head(self):
        return heads.Categorical()

    def build_model(self):
        layers = tf_keras.layers
        return tf_keras.Sequential(
            [
                tf_keras.Input((SIZE, SIZE, 1)),
                layers.Conv2D(8, 5, strides=2, activation="relu"),
                layers.Conv2D(16, 3, activation="relu"),
                layers.GlobalAveragePooling2D(),
                layers.Dense(CLASSES),
            ]
        )

    def build_inputs(self, params, input_context=None):
        seed = 0 if params.is_training else 1
        x, y = stripes(1024 if params.is_training else 256, seed)
        data = tf.data.Dataset.from_tensor_slices((x, y))
        if params.is_training:
            data = data.shuffle(len(x), seed=seed).repeat()
        return data.batch(
            params.global_batch_size, drop_remainder=params.is_training
        )

    def build_losses(self, labels, model_outputs, aux_losses=None):
        losses = tf_keras.losses.sparse_categorical_crossentropy(
            labels, model_outputs, from_logits=True
        )
        return tf.reduce_mean(losses)

    def build_metrics(self, training=True):
        return [tf_keras.metrics.SparseCategoricalAccuracy("accuracy")]


def stripes(count, seed):
    """Returns noisy images of stripes, and which way each one's run."""
    random = np.random.default_rng(seed)
    y = random.integers(CLASSES, size=count)
    angle = np.pi * y / CLASSES
    phase = random.uniform(0, 2 * np.pi, size=count)
    row, column = np.mgrid[:SIZE, :SIZE]
    wave = np.sin(
        np.multiply.outer(np.cos(angle), row)
        + np.multiply.outer(np.sin(angle), column)
        + phase[:, np.newaxis, np.newaxis]
    )
    x = wave + random.normal(scale=1.0, size=wave.shape)
    return x[..., np.newaxis].astype("float32"), y.astype("int32")


def experiment(optimizer, steps):
    """Returns the configuration of the experiment."""
    rate = {"kfac": 1.0, "adam": 0.003}[optimizer]
    optimization = model_garden.OptimizationConfig(
        {
            "optimizer": {"type": optimizer},
            "learning_rate": {
                "type": "constant",
                "constant": {"learning_rate": rate},
            },
        }
    )
    return config_definitions.ExperimentConfig(
        task=StripesConfig(),
        trainer=config_definitions.TrainerConfig(
            optimizer_config=optimization,
            train_steps=steps,
            steps_per_loop=min(50, steps),
            summary_interval=steps,
            checkpoint_interval=steps,
            validation_interval=steps,
            validation_steps=-1,
        ),
    )


def train(optimizer, steps, folder):
    """Trains the task; returns the trainer's last logs and the model."""
    model_garden.register()
    config = experiment(optimizer, steps)
    strategy = tf.distribute.get_strategy()
    model, logs = train_lib.run_experiment(
        distribution_strategy=strategy,
        task=StripesTask(config.task),
        mode="train_and_eval",
        params=config,
        model_dir=folder,
        run_post_eval=True,
        save_summary=False,
    )
    return model, logs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", default="kfac", choices=["kfac", "adam"])
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    tf_keras.utils.set_random_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        _, logs = train(options.optimizer, options.steps, folder)
    for name, value in sorted(logs.items()):
        print(f"{name}: {float(value):.4f}")


if __name__ == "__main__":
    main()
