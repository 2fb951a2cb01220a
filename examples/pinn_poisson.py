"""Title: A physics-informed network, natural gradient against first order.

Author: keras_natgrad authors
Description: Solve the Poisson equation −Δu = f with a tanh network, once with
    the exact natural gradient of all residuals, once with Adam and once with
    L-BFGS, each for the same number of seconds.
Accelerator: None, or a GPU for `--dimensions 5`

In two dimensions the solution is sin(πx)·sin(πy) on the unit square and the
points are drawn once; in others it is Σ cos(πx_i), and they are drawn anew at
every step. The loss is ½ mean r² inside plus ½ mean r² on the boundary, in
float64; what counts is the root mean square of the error on ten times as many
points. Every contender starts from the same weights. Adam runs with several
learning rates, each for as long as the others; the best one is shown. The
damping of the natural gradient is the best of three in two dimensions. L-BFGS
is SciPy's and needs points that stay: where the others draw theirs anew, it
keeps its first draw.

    python examples/pinn_poisson.py
    python examples/pinn_poisson.py --dimensions 5 --widths 64 64 48 48
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import keras
import matplotlib
import numpy as np
import scipy.optimize
import tensorflow as tf
from rich.console import Console
from rich.table import Table

import keras_natgrad as kng

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# Points inside, points on the boundary.
POINTS = {2: (900, 120)}
MANY_POINTS = (3000, 500)
COLORS = ("#1f6fb4", "#e08214", "#5aae61")


# ---- The problem -----------------------------------------------------------


def solution(x: tf.Tensor) -> tf.Tensor:
    """Returns the exact solution at points `[N, d]`."""
    if x.shape[-1] == 2:
        return tf.reduce_prod(tf.sin(math.pi * x), axis=-1)
    return tf.reduce_sum(tf.cos(math.pi * x), axis=-1)


def source(x: tf.Tensor) -> tf.Tensor:
    """Returns f = −Δu of the exact solution."""
    factor = 2.0 if x.shape[-1] == 2 else 1.0
    return factor * math.pi**2 * solution(x)


def laplacian(network: keras.Model, x: tf.Tensor) -> tf.Tensor:
    """Returns Δu, the sum of the exact second derivatives."""
    coordinates = tf.unstack(x, axis=-1)
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(coordinates)
        with tf.GradientTape() as inner:
            inner.watch(coordinates)
            u = network(tf.stack(coordinates, axis=-1))
        slopes = inner.gradient(u, coordinates)
    return tf.add_n(
        [
            outer.gradient(slope, coordinate)
            for slope, coordinate in zip(slopes, coordinates, strict=True)
        ]
    )


@dataclass
class Problem:
    """The equation on the unit cube, and the points on which it is asked for.

    Attributes:
        dimensions: d.
        interior: Number of points inside.
        boundary: Number of points on the boundary.
        seed: Seed of the points that stay.
    """

    dimensions: int
    interior: int
    boundary: int
    seed: int

    def __post_init__(self) -> None:
        self.generator = tf.random.Generator.from_seed(self.seed)
        self.test_points = self._draw_interior(10 * self.interior)
        self.fixed = self._draw() if self.dimensions == 2 else None

    def points(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns points inside and on the boundary, as they are due."""
        return self._draw() if self.fixed is None else self.fixed

    def hold(self) -> None:
        """Keeps the points of one draw from now on."""
        if self.fixed is None:
            self.fixed = self._draw()

    def _draw(self) -> tuple[tf.Tensor, tf.Tensor]:
        return self._draw_interior(self.interior), self._draw_boundary()

    def _draw_interior(self, count: int) -> tf.Tensor:
        shape = (count, self.dimensions)
        return self.generator.uniform(shape, dtype=tf.float64)

    def _draw_boundary(self) -> tf.Tensor:
        """One coordinate of each point is 0 or 1."""
        x = self._draw_interior(self.boundary)
        index, d = tf.range(self.boundary), self.dimensions
        on_face = tf.one_hot(index % d, d, True, False, dtype=tf.bool)
        side = tf.cast((index // d) % 2, x.dtype)
        return tf.where(on_face, side[:, tf.newaxis], x)

    def residuals(
        self, network: keras.Model
    ) -> tuple[Callable[[tf.Tensor], tf.Tensor], ...]:
        """Returns the residuals inside and on the boundary."""

        def interior(x: tf.Tensor) -> tf.Tensor:
            return laplacian(network, x) + source(x)

        def boundary(x: tf.Tensor) -> tf.Tensor:
            return network(x)[:, 0] - solution(x)

        return interior, boundary

    def loss(self, network: keras.Model) -> tf.Tensor:
        """Returns ½ mean r² inside plus ½ mean r² on the boundary."""
        pairs = zip(self.residuals(network), self.points(), strict=True)
        parts = [0.5 * tf.reduce_mean(tf.square(f(x))) for f, x in pairs]
        return tf.add_n(parts)

    def error(self, network: keras.Model) -> float:
        """Returns the root mean square of the error."""
        x = self.test_points
        square = tf.reduce_mean(tf.square(network(x)[:, 0] - solution(x)))
        return float(tf.sqrt(square))


def build_network(dimensions: int, widths: list[int], seed: int) -> keras.Model:
    """Returns the tanh network; the same seed gives the same weights."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((dimensions,)),
            *(layers.Dense(width, "tanh") for width in widths),
            layers.Dense(1),
        ]
    )


# ---- Contenders ------------------------------------------------------------


@dataclass
class Curve:
    """What was measured, one entry per measurement.

    Attributes:
        network: The network as it is at the end.
        budget: Seconds to train.
        name: What to call the contender.
        steps: Steps taken so far.
        seconds: Seconds trained so far.
        error: Root mean square of the error.
    """

    network: keras.Model
    budget: float
    name: str
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether the seconds are up."""
        return self.seconds[-1] >= self.budget

    def measure(self, problem: Problem, steps: int, seconds: float) -> None:
        """Measures if it is time to: often early on, then more rarely."""
        due = 0.0
        if self.seconds:
            due = max(1.12 * self.seconds[-1], 0.01 * self.budget)
        if seconds >= min(due, self.budget):
            self.steps.append(steps)
            self.seconds.append(seconds)
            self.error.append(problem.error(self.network))


def run_steps(
    curve: Curve,
    problem: Problem,
    step: Callable[[], tf.Tensor],
    optimizer: keras.optimizers.Optimizer,
) -> Curve:
    """Makes steps until the seconds are up."""
    # One step to trace and to compile, which is then undone.
    variables = [*curve.network.variables, *optimizer.variables]
    before = [variable.numpy() for variable in variables]
    step()
    for variable, value in zip(variables, before, strict=True):
        variable.assign(value)
    curve.measure(problem, 0, 0.0)
    count, seconds = 0, 0.0
    while not curve.over:
        started = time.perf_counter()
        float(step())  # Waits for an accelerator.
        seconds += time.perf_counter() - started
        count += 1
        curve.measure(problem, count, seconds)
    return curve


def train_natural_gradient(
    curve: Curve, problem: Problem, damping: float, jit_compile: bool
) -> Curve:
    """Trains with the exact natural gradient and a line search."""
    optimizer = kng.NaturalGradient(kng.LineSearch(), damping=damping)
    variables = curve.network.trainable_variables
    residuals = problem.residuals(curve.network)

    @tf.function(jit_compile=jit_compile)
    def step(points: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        return optimizer.minimize_residuals(residuals, variables, points)

    return run_steps(curve, problem, lambda: step(problem.points()), optimizer)


def train_adam(
    curve: Curve, problem: Problem, learning_rate: float, jit_compile: bool
) -> Curve:
    """Trains with Adam."""
    optimizer = keras.optimizers.Adam(learning_rate)
    variables = curve.network.trainable_variables
    optimizer.build(variables)

    @tf.function(jit_compile=jit_compile)
    def step() -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = problem.loss(curve.network)
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    return run_steps(curve, problem, step, optimizer)


def train_lbfgs(curve: Curve, problem: Problem, jit_compile: bool) -> Curve:
    """Trains with SciPy's L-BFGS, on gradients from TensorFlow.

    A line search compares losses, so the points have to stay.
    """
    problem.hold()
    variables = curve.network.trainable_variables
    sizes = [math.prod(variable.shape) for variable in variables]

    @tf.function(jit_compile=jit_compile)
    def evaluate(flat: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        place(flat)
        with tf.GradientTape() as tape:
            loss = problem.loss(curve.network)
        gradients = tape.gradient(loss, variables)
        return loss, tf.concat([tf.reshape(g, [-1]) for g in gradients], 0)

    def place(flat: tf.Tensor) -> None:
        parts = tf.split(flat, sizes)
        for variable, part in zip(variables, parts, strict=True):
            variable.assign(tf.reshape(part, variable.shape))

    curve.measure(problem, 0, 0.0)
    flat = np.concatenate([v.numpy().ravel() for v in variables])
    evaluate(tf.constant(flat))  # Traced before the clock starts.
    state = {"steps": 0, "seconds": 0.0, "started": time.perf_counter()}

    def after_step(flat: np.ndarray) -> None:
        state["seconds"] += time.perf_counter() - state["started"]
        state["steps"] += 1
        place(tf.constant(flat))
        curve.measure(problem, state["steps"], state["seconds"])
        if curve.over:
            raise StopIteration
        state["started"] = time.perf_counter()

    found = scipy.optimize.minimize(
        lambda flat: [part.numpy() for part in evaluate(tf.constant(flat))],
        flat,
        jac=True,
        method="L-BFGS-B",
        callback=after_step,
        # Nothing but the clock is to end it.
        options=dict(maxcor=50, maxiter=10**9, maxfun=10**9, ftol=0, gtol=0),
    )
    place(tf.constant(found.x))
    if not curve.over:
        # It found no better point in its last search.
        curve.budget = state["seconds"]
        curve.measure(problem, state["steps"], state["seconds"])
    return curve


# ---- Report ----------------------------------------------------------------


def peak_memory() -> str:
    """Returns the most memory that was in use, as text."""
    if tf.config.list_physical_devices("GPU"):
        peak = tf.config.experimental.get_memory_info("GPU:0")["peak"]
        return f"{peak / 2**20:,.0f} MiB of the GPU"
    try:
        import resource
    except ImportError:  # On Windows.
        return "not measured"
    # In KiB on Linux.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return f"{peak:,.0f} MiB of the process, TensorFlow included"


def print_table(curves: list[Curve], problem: Problem) -> None:
    """Prints one row per contender."""
    count = len(problem.test_points)
    title = f"Error on {count} points after equal seconds"
    table = Table("Optimizer", title=title)
    for column in ("RMS error", "Steps", "Seconds", "Steps/s"):
        table.add_column(column, justify="right")
    for curve in curves:
        table.add_row(
            curve.name,
            f"{curve.error[-1]:.2e}",
            f"{curve.steps[-1]:,}",
            f"{curve.seconds[-1]:.1f}",
            f"{curve.steps[-1] / curve.seconds[-1]:.3g}",
        )
    Console(width=90).print(table)
    print("Seconds exclude tracing, compilation and measuring.")


def plot(curves: list[Curve], dimensions: int, path: Path) -> None:
    """Draws the first network, its error and the errors over the seconds."""
    network = curves[0].network
    figure, axes = plt.subplots(
        1, 3, figsize=(14, 4.3), layout="constrained", width_ratios=(1, 1, 1.3)
    )
    ticks = np.linspace(0.0, 1.0, 101)
    # The first two coordinates; further ones lie in the middle.
    grid = np.full((ticks.size**2, dimensions), 0.5)
    grid[:, 0], grid[:, 1] = (g.ravel() for g in np.meshgrid(ticks, ticks))
    u = network.predict(grid, batch_size=4096, verbose=0)[:, 0]
    error = u - solution(tf.constant(grid)).numpy()
    limit = np.abs(error).max()
    diverging = dict(cmap="RdBu_r", vmin=-limit, vmax=limit)
    for axis, title, values, settings in (
        (axes[0], "Network", u, {}),
        (axes[1], "Error", error, diverging),
    ):
        values = values.reshape(ticks.size, -1)
        image = axis.pcolormesh(ticks, ticks, values, **settings)
        figure.colorbar(image, ax=axis, shrink=0.85)
        axis.set(title=title, xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    axis = axes[2]
    for curve, color in zip(curves, COLORS, strict=False):
        axis.plot(
            curve.seconds[1:], curve.error[1:], label=curve.name, color=color
        )
    axis.set(xscale="log", yscale="log", title="Error over seconds")
    axis.set(xlabel="Seconds of training", ylabel="RMS error")
    axis.grid(which="major", alpha=0.3, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---- All together ----------------------------------------------------------


def main(arguments: argparse.Namespace) -> list[Curve]:
    """Trains all contenders; prints the table and draws the figure."""
    keras.config.set_floatx("float64")
    dimensions, seconds = arguments.dimensions, arguments.seconds
    interior, boundary = POINTS.get(dimensions, MANY_POINTS)
    problem = Problem(dimensions, interior, boundary, arguments.seed)
    jit_compile = arguments.jit_compile

    def start(name: str) -> Curve:
        network = build_network(dimensions, arguments.widths, arguments.seed)
        return Curve(network, seconds, name)

    first = start("Natural gradient")
    print(
        f"Poisson equation in {dimensions} dimensions: "
        f"{first.network.count_params():,} parameters, {interior} + {boundary} "
        f"points, {seconds:g} seconds each",
        flush=True,
    )
    curves = [
        train_natural_gradient(first, problem, arguments.damping, jit_compile)
    ]
    print(f"Peak memory of the natural gradient: {peak_memory()}", flush=True)
    runs = [
        train_adam(start(f"Adam, rate {rate:g}"), problem, rate, jit_compile)
        for rate in arguments.adam_learning_rates
    ]
    if runs:
        curves.append(min(runs, key=lambda curve: curve.error[-1]))
    name = "L-BFGS" if problem.fixed else "L-BFGS, one draw of points"
    curves.append(train_lbfgs(start(name), problem, jit_compile))
    print_table(curves, problem)
    plot(curves, dimensions, arguments.output)
    print(f"Figure: {arguments.output}")
    return curves


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--dimensions", type=int, default=2, help="two or more")
    add("--widths", type=int, nargs="+", default=[64], help="hidden units")
    add("--seconds", type=float, default=7.0, help="for each run")
    add("--damping", type=float, default=1e-12)
    rates = [1e-3, 5e-3, 2e-2]
    add("--adam-learning-rates", type=float, nargs="*", default=rates)
    add(
        "--jit-compile",
        action=argparse.BooleanOptionalAction,
        default=bool(tf.config.list_physical_devices("GPU")),
        help="compile the steps with XLA; on CPUs they are slower for it",
    )
    add("--seed", type=int, default=0)
    add(
        "--output",
        type=Path,
        default=Path(__file__).parent / "output" / "pinn_poisson.png",
        help="the figure",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_arguments())
