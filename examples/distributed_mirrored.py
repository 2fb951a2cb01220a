"""Title: K-FAC on several replicas, against one device.

Author: keras_natgrad authors
Description: Train a classifier of scikit-learn's bundled handwritten digits
    with K-FAC under `tf.distribute.MirroredStrategy`, then on one device, with
    the same batches, and compare the weights.
Accelerator: None, or several GPUs

Without GPUs the replicas are logical devices of one CPU: they show that the
results agree, not that several replicas are faster. With `--estimated` the
Fisher is the default one, whose random signs each replica draws for itself;
the runs then agree in distribution only.

    python examples/distributed_mirrored.py
    python examples/distributed_mirrored.py --replicas 4 --estimated
"""

from __future__ import annotations

import argparse

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import keras_natgrad as kng


def make_devices(count: int) -> list[str]:
    """Returns the names of GPUs, or of logical devices of the CPU."""
    gpus = tf.config.list_logical_devices("GPU")
    if len(gpus) >= count:
        return [device.name for device in gpus[:count]]
    return [f"CPU:{index}" for index in range(count)]


def split_cpu(count: int) -> None:
    """Divides the CPU; nothing else of TensorFlow may run before."""
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * count
    )


def load_data(examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images in [0, 1] and their labels."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))[:examples]
    return (x[order] / 16.0).astype("float32"), y[order]


def train(
    strategy: tf.distribute.Strategy, arguments: argparse.Namespace
) -> keras.Model:
    """Returns a trained model; batches are split over the replicas."""
    x, y = load_data(1536)
    keras.utils.set_random_seed(arguments.seed)
    kinds = {}
    if not arguments.estimated:
        # Without random numbers the replicas do just what one device does.
        kinds = dict(fisher="exact", quadratic_model="exact")
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((64,)),
                keras.layers.Dense(32, activation="tanh"),
                keras.layers.Dense(10),
            ]
        )
        optimizer = kng.KFAC(**kinds).attach(model)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, metrics=["accuracy"])
    history = model.fit(
        x,
        y,
        batch_size=256,
        epochs=arguments.epochs,
        shuffle=False,
        verbose=0,
    ).history
    replicas = strategy.num_replicas_in_sync
    print(
        f"{replicas} replica{'s' if replicas > 1 else ''}: "
        f"loss {history['loss'][-1]:.6f}, "
        f"accuracy {history['accuracy'][-1]:.3f}, "
        f"{optimizer.statistics['refreshes']} refreshes",
        flush=True,
    )
    return model


def main(arguments: argparse.Namespace) -> float:
    """Trains twice; returns the largest relative difference of the weights."""
    if not tf.config.list_physical_devices("GPU"):
        split_cpu(arguments.replicas)
    devices = make_devices(arguments.replicas)
    several = train(tf.distribute.MirroredStrategy(devices), arguments)
    one = train(tf.distribute.OneDeviceStrategy(devices[0]), arguments)
    differences = [
        np.abs(left - right).max() / np.abs(right).max()
        for left, right in zip(
            several.get_weights(), one.get_weights(), strict=True
        )
    ]
    largest = float(max(differences))
    print(f"Largest relative difference of the weights: {largest:.1e}")
    return largest


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--estimated", action="store_true", help="the default, random Fisher"
    )
    main(parser.parse_args())
