"""One process of a run on several workers; see `test_workers.py`.

    python -m tests.distribution.worker '{"index": 0, "workers": 2, ...}'

Writes the losses and the weights as JSON to `result`, and a checkpoint every
`save_every` steps.
"""

import json
import os
import signal
import sys
from pathlib import Path


def set_cluster(settings):
    """Tells TensorFlow of the cluster, where there is more than one worker."""
    if settings["workers"] == 1:
        return
    first = settings["port"]
    workers = [f"127.0.0.1:{first + i}" for i in range(settings["workers"])]
    task = {"type": "worker", "index": settings["index"]}
    os.environ["TF_CONFIG"] = json.dumps(
        {"cluster": {"worker": workers}, "task": task}
    )


def main(settings):
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    alone = settings["workers"] == 1
    # Before anything else of TensorFlow, as it demands.
    strategy = (
        tf.distribute.get_strategy()
        if alone
        else tf.distribute.MultiWorkerMirroredStrategy()
    )

    import keras
    import numpy as np

    import keras_natgrad as kng

    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 6)).astype("float32")
    y = (x @ rng.normal(size=(6, 3))).argmax(1)
    head = kng.heads.Categorical()
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(8, "tanh"),
                keras.layers.Dense(3),
            ]
        )
        optimizer = kng.KFAC(fisher="exact", quadratic_model="exact")
        optimizer.attach(model, head=head).build(model.trainable_variables)
    variables = model.trainable_variables
    replicas = strategy.num_replicas_in_sync

    def replica_step(x, y):
        def objective():
            values = -head.log_prob(model(x, training=True), y)
            return tf.reduce_mean(values) / replicas

        with kng.CurvatureTape(optimizer, objective) as tape:
            loss = objective()
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    @tf.function
    def step(x, y):
        losses = strategy.run(replica_step, (x, y))
        return strategy.reduce("SUM", losses, axis=None)

    done = tf.Variable(0)
    checkpoint = tf.train.Checkpoint(
        model=model, optimizer=optimizer, done=done
    )
    # All workers read the first one's; the others write where nobody reads.
    folder = Path(settings["folder"])
    own = folder / f"worker{settings['index']}"
    latest = tf.train.latest_checkpoint(str(folder / "worker0"))
    if latest is not None:
        checkpoint.restore(latest).assert_consumed()
    size = 32 // settings["workers"]
    losses = []
    while int(done) < settings["steps"]:
        start = (int(done) % 8) * 32 + settings["index"] * size
        batch = slice(start, start + size)
        losses.append(float(step(tf.constant(x[batch]), tf.constant(y[batch]))))
        done.assign_add(1)
        if int(done) == settings.get("die_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if int(done) % settings["save_every"] == 0:
            checkpoint.save(str(own / "checkpoint"))
    result = {
        "losses": losses,
        "weights": [variable.numpy().tolist() for variable in variables],
        "refreshes": optimizer.statistics["refreshes"],
    }
    Path(settings["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    os.environ["KERAS_BACKEND"] = "tensorflow"
    SETTINGS = json.loads(sys.argv[1])
    set_cluster(SETTINGS)
    main(SETTINGS)
