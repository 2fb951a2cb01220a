"""kfac-jax on the autoencoder, as a child process of the benchmark.

Runs in an environment with `requirements-kfac-jax.txt` and without Keras;
`benchmarks.child` starts it and documents what it reads and writes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time

import haiku as hk
import jax
import jax.numpy as jnp
import kfac_jax

from benchmarks.data import batch_indices, glorot_uniform, load_mnist

L2 = 1e-5
WARM_UP_STEPS = 11  # Two damping and inverse periods: compiles every branch.

RECIPE = {
    "use_adaptive_learning_rate": True,
    "use_adaptive_momentum": True,
    "use_adaptive_damping": True,
    "initial_damping": 150.0,
    "min_damping": 1e-5,
    "max_damping": 1000.0,
    "damping_adaptation_interval": 5,
    "damping_adaptation_decay": 0.95,
    "inverse_update_period": 5,
    "curvature_ema": 0.95,
    "num_burnin_steps": 0,
    "l2_reg": L2,
}
"""The published settings of kfac-jax for the MNIST autoencoder."""


class Training:
    """The autoencoder and its optimizer.

    Args:
        data: Path of the MNIST file.
        sizes: Width of the input and of every layer.
        batch_size: Images per batch.
        seed: Seed of the weights, the batches and the optimizer's samples.
    """

    def __init__(
        self, data: str, sizes: list[int], batch_size: int, seed: int
    ) -> None:
        mnist = load_mnist(data)
        self.images = mnist["x_train"]
        self.evaluation_images = jnp.asarray(mnist["x_train"][:10000])
        self.batches = batch_indices(len(self.images), batch_size, seed)
        self.network = hk.without_apply_rng(
            hk.transform(lambda x: autoencoder(x, sizes))
        )
        self.weights = glorot_uniform(sizes, seed)
        self.seed = seed
        self.metric = jax.jit(
            lambda parameters: squared_error(
                self.network.apply(parameters, self.evaluation_images),
                self.evaluation_images,
            )
        )
        self.optimizer = kfac_jax.Optimizer(
            jax.value_and_grad(self.loss, has_aux=True),
            value_func_has_aux=True,
            value_func_has_state=False,
            value_func_has_rng=False,
            multi_device=False,
            **RECIPE,
        )
        self._warm_up(batch_size)
        self._reset(batch_size)

    def loss(self, parameters, batch):
        """Returns the regularised loss and the metric on the batch."""
        logits = self.network.apply(parameters, batch)
        kfac_jax.register_multi_bernoulli_predictive_distribution(logits, batch)
        entropy = (
            jnp.maximum(logits, 0)
            - logits * batch
            + jnp.log1p(jnp.exp(-jnp.abs(logits)))
        )
        penalty = 0.5 * sum(
            jnp.sum(jnp.square(p))
            for p in jax.tree_util.tree_leaves(parameters)
        )
        loss = jnp.mean(jnp.sum(entropy, 1)) + L2 * penalty
        return loss, {"metric": squared_error(logits, batch)}

    def advance(self, steps: int) -> float:
        """Trains for some steps and returns the seconds they took."""
        indices = [next(self.batches) for _ in range(steps)]
        return self._advance([jnp.asarray(self.images[i]) for i in indices])

    def evaluate(self) -> float:
        """Returns the squared error per evaluation image."""
        return float(self.metric(self.parameters))

    def _advance(self, batches) -> float:
        start = time.perf_counter()
        for batch in batches:
            self.key, key = jax.random.split(self.key)
            self.parameters, self.state, _ = self.optimizer.step(
                self.parameters,
                self.state,
                key,
                batch=batch,
                global_step_int=self.step,
            )
            self.step += 1
        jax.block_until_ready((self.parameters, self.state))
        return time.perf_counter() - start

    def _warm_up(self, batch_size: int) -> None:
        self._reset(batch_size)
        batch = jnp.asarray(self.images[:batch_size])
        self._advance([batch] * WARM_UP_STEPS)
        self.evaluate()

    def _reset(self, batch_size: int) -> None:
        images = jnp.asarray(self.images[:batch_size])
        self.key, init_key, key = jax.random.split(
            jax.random.PRNGKey(self.seed), 3
        )
        names = self.network.init(init_key, images[:1])
        self.parameters = {
            name: {"w": jnp.array(kernel), "b": jnp.array(bias)}
            for name, (kernel, bias) in zip(names, self.weights, strict=True)
        }
        self.state = self.optimizer.init(self.parameters, key, images)
        self.step = 0


def autoencoder(x, sizes: list[int]):
    """Applies the network: tanh, but a linear code and linear outputs."""
    linear = (sizes.index(min(sizes)), len(sizes) - 1)
    for i, units in enumerate(sizes[1:], start=1):
        x = hk.Linear(units)(x)
        x = x if i in linear else jnp.tanh(x)
    return x


def squared_error(logits, images):
    """Returns the squared error per image."""
    error = jnp.square(jax.nn.sigmoid(logits) - images)
    return jnp.mean(jnp.sum(error, axis=1))


def main() -> None:
    """Answers the requests on standard input until it ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--sizes", nargs="+", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(**content):
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    start = time.perf_counter()
    training = Training(
        options.data, options.sizes, options.batch_size, options.seed
    )
    answer(
        compile_seconds=time.perf_counter() - start,
        versions={"jax": jax.__version__, "kfac-jax": kfac_jax.__version__},
        options=RECIPE,
    )
    for line in sys.stdin:
        request = json.loads(line)
        if request["command"] == "advance":
            answer(seconds=training.advance(request["steps"]))
        else:
            metric = training.evaluate()
            answer(metric=metric if math.isfinite(metric) else None)


if __name__ == "__main__":
    main()
