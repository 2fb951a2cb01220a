"""Title: Distances between Gaussians, and the steps that follow them.

Author: keras_natgrad authors
Description: Two pairs of Gaussians are equally far apart in their parameters
    but not as distributions. The natural gradient measures its steps by the
    latter. Fitting a mean and a scale, gradient descent needs a rate that is
    stable for the narrow final distribution, and is slow from a wide start.
Accelerator: None
"""

from __future__ import annotations

import argparse
from pathlib import Path

import keras
import matplotlib
import numpy as np
import tensorflow_probability as tfp

import keras_natgrad as kng

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

tfd = tfp.distributions
COLORS = {"Natural gradient": "#1f6f8b", "SGD": "#c8553d"}
MEANS = (-2.0, 2.0)
VARIANCES = (2.0, 0.5)
START = (0.0, np.log(4.0))  # mean and logarithm of the scale
MEAN, SCALE = 3.0, 0.2  # of the data
# The largest stable rate of SGD at the solution is 2 SCALE².
RATES = {"Natural gradient": 0.5, "SGD": 1.5 * SCALE**2}


def distances(variance: float) -> tuple[float, float, float]:
    """Returns the Euclidean and Fisher distance and the divergence.

    At one variance the Fisher distance of two means is `|Δμ| / σ`.
    """
    first, second = (tfd.Normal(mean, variance**0.5) for mean in MEANS)
    euclidean = MEANS[1] - MEANS[0]
    divergence = float(tfd.kl_divergence(first, second))
    return euclidean, euclidean / variance**0.5, divergence


def fit(name: str, targets: np.ndarray, steps: int) -> np.ndarray:
    """Returns mean and log-scale after every step, `[steps + 1, 2]`."""
    model = keras.Sequential(
        [keras.Input((1,)), keras.layers.Dense(2, use_bias=False)]
    )
    kernel = model.layers[0].kernel
    kernel.assign([START])
    if name == "SGD":
        optimizer = keras.optimizers.SGD(RATES[name])
    else:
        optimizer = kng.NaturalGradient(RATES[name], damping=0.0)
        optimizer.attach(model)
    head = kng.heads.Normal(scale="exp")
    model.compile(optimizer, kng.losses.NegativeLogLikelihood(head))
    ones = np.ones_like(targets)
    path = [START]
    for _ in range(steps):
        model.train_on_batch(ones, targets)
        path.append(tuple(kernel.numpy()[0]))
    return np.array(path)


def divergence_to_fit(path: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns `KL(best ‖ p)` along a path, `[steps + 1]`."""
    best = tfd.Normal(targets.mean(), targets.std())
    mean, log_scale = path.T.astype("float32")
    predicted = tfd.Normal(mean, np.exp(log_scale))
    return tfd.kl_divergence(best, predicted).numpy()


def plot(paths: dict, targets: np.ndarray, output: Path) -> None:
    """Draws both pairs of Gaussians, and both paths over the loss."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4))
    grid = np.linspace(-6, 6, 400)
    for panel, variance in zip(axes, VARIANCES, strict=False):
        for mean in MEANS:
            density = tfd.Normal(mean, variance**0.5).prob(grid)
            panel.plot(grid, density, color="0.3")
            panel.fill_between(grid, density, color="0.3", alpha=0.15)
        panel.plot(MEANS, (0, 0), color=COLORS["SGD"], linewidth=3)
        euclidean, fisher, divergence = distances(variance)
        panel.set(
            title=f"variance {variance}",
            xlabel=f"Euclidean {euclidean:.1f}, Fisher {fisher:.1f}, "
            f"KL {divergence:.0f}",
            ylim=(-0.02, 0.6),
        )
    draw_paths(axes[2], paths, targets)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)


def draw_paths(panel, paths: dict, targets: np.ndarray) -> None:
    """Draws paths over the contours of the mean negative log-likelihood."""
    means, logs = np.meshgrid(np.linspace(-1, 5, 120), np.linspace(-2.2, 2, 90))
    squares = targets.var() + (targets.mean() - means) ** 2
    loss = logs + 0.5 * squares / np.exp(2 * logs)
    levels = loss.min() + np.geomspace(0.02, 40, 14)
    panel.contour(
        means,
        logs,
        loss,
        levels,
        colors="0.8",
        linestyles="solid",
        linewidths=0.8,
    )
    for name, path in paths.items():
        panel.plot(*path.T, "o-", color=COLORS[name], label=name, markersize=3)
    panel.set(xlabel="mean", ylabel="log scale", title="Paths of a fit")
    panel.legend(frameon=False)


def main(steps: int, seed: int, output: Path) -> dict[str, np.ndarray]:
    """Prints distances and divergences; returns the paths."""
    print(f"{'variance':>8}{'Euclidean':>12}{'Fisher':>9}{'KL':>9}")
    for variance in VARIANCES:
        euclidean, fisher, divergence = distances(variance)
        print(f"{variance:8}{euclidean:12.2f}{fisher:9.2f}{divergence:9.2f}")
    draws = np.random.default_rng(seed).normal(MEAN, SCALE, (500, 1))
    targets = draws.astype("float32")
    paths = {name: fit(name, targets, steps) for name in COLORS}
    print(f"Divergence from the best fit after {steps} steps")
    for name, path in paths.items():
        last = divergence_to_fit(path, targets)[-1]
        print(f"{name:18}{last:.2e}")
    plot(paths, targets, output)
    print(f"Figure: {output}")
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "output" / "kl_distance.png",
    )
    main(**vars(parser.parse_args()))
