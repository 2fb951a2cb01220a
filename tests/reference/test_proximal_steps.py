"""Steps as minima of a loss plus a distance: what two texts derive.

B. Gebotys, "Natural Gradient Descent without the Tears", finds gradient descent
and the natural gradient as proximal steps; A. Kristiadi, "Natural Gradient
Descent", as steepest descent within a ball. The model is a logistic
regression, whose loss, divergence and Fisher are convex and known.
"""

import numpy as np
import pytest
import scipy.optimize
from scipy.special import expit

EXACT = dict(rtol=1e-10, atol=1e-12)
SIZES = (1e2, 1e3, 1e4)  # of λ


class Logistic:
    """Mean loss of 30 examples with two or more weights, and its metrics."""

    def __init__(self, size=3):
        rng = np.random.default_rng(0)
        self.x = rng.normal(size=(30, size)) * np.arange(1, size + 1)
        self.labels = rng.integers(2, size=30)
        self.start = 0.3 * rng.normal(size=size)

    def loss(self, w):
        z = self.x @ w
        return np.mean(np.logaddexp(0, z) - self.labels * z)

    def gradient(self, w):
        return self.x.T @ (expit(self.x @ w) - self.labels) / len(self.x)

    def fisher(self, w):
        """Also the Hessian of the loss and of the divergence in w."""
        p = expit(self.x @ w)
        return self.x.T @ ((p * (1 - p))[:, np.newaxis] * self.x) / len(p)

    def divergence(self, w, other):
        """Mean `KL(p_w ‖ p_other)`, from the logits: nothing cancels."""
        z, far = self.x @ w, self.x @ other
        terms = np.logaddexp(0, far) - np.logaddexp(0, z)
        return np.mean(terms + expit(z) * (z - far))

    def divergence_gradient(self, w, other):
        """With respect to `other`."""
        gap = expit(self.x @ other) - expit(self.x @ w)
        return self.x.T @ gap / len(gap)


@pytest.fixture
def problem():
    return Logistic()


def euclidean(problem, w, other):
    """ρ, its gradient and its Hessian in `other`."""
    gap = other - w
    return 0.5 * gap @ gap, gap, np.eye(len(w))


def divergence(problem, w, other):
    return (
        problem.divergence(w, other),
        problem.divergence_gradient(w, other),
        problem.fisher(other),
    )


DISTANCES = {"euclidean": euclidean, "divergence": divergence}


def proximal(problem, weight, distance):
    """The minimum of `L(w) + λ ρ(start, w)`, by trust-region Newton."""
    start = problem.start
    found = scipy.optimize.minimize(
        lambda w: problem.loss(w) + weight * distance(problem, start, w)[0],
        start,
        jac=lambda w: (
            problem.gradient(w) + weight * distance(problem, start, w)[1]
        ),
        hess=lambda w: (
            problem.fisher(w) + weight * distance(problem, start, w)[2]
        ),
        method="trust-exact",
        options={"gtol": 1e-11},
    )
    # Polished: the last digits of the gradient, not of the value.
    return scipy.optimize.root(
        lambda w: problem.gradient(w) / weight + distance(problem, start, w)[1],
        found.x,
        jac=lambda w: (
            problem.fisher(w) / weight + distance(problem, start, w)[2]
        ),
        tol=1e-15,
    ).x


def metrics(problem):
    rng = np.random.default_rng(1)
    root = rng.normal(size=(3, 3))
    return {
        "identity": np.eye(3),
        "any": root @ root.T + np.eye(3),
        "fisher": problem.fisher(problem.start),
    }


# -- Proximal steps ------------------------------------------------------


@pytest.mark.parametrize("weight", [0.3, 3.0])
def test_euclidean_proximal_step_is_implicit(problem, weight):
    """Gebotys: `w* = w − λ⁻¹ ∇L(w*)`, which is not gradient descent."""
    found = proximal(problem, weight, euclidean)
    start = problem.start
    implicit = start - problem.gradient(found) / weight
    np.testing.assert_allclose(found, implicit, **EXACT)
    explicit = start - problem.gradient(start) / weight
    moved = np.linalg.norm(found - start)
    assert np.linalg.norm(explicit - found) > 0.1 * moved


@pytest.mark.parametrize("metric", ["identity", "any", "fisher"])
def test_minimum_of_the_linear_loss_and_a_quadratic_distance(problem, metric):
    """Gebotys: `w* = w − λ⁻¹ G⁻¹ ∇L`, for G = I, any metric, and F.

    Away from a minimum the model exceeds its value there by exactly
    `½ λ eᵀGe`.
    """
    g, start = problem.gradient(problem.start), problem.start
    matrix, weight = metrics(problem)[metric], 0.7

    def model(w):
        gap = w - start
        return g @ w + 0.5 * weight * gap @ matrix @ gap

    best = start - np.linalg.solve(matrix, g) / weight
    for e in np.random.default_rng(2).normal(size=(5, 3)):
        excess = model(best + e) - model(best)
        np.testing.assert_allclose(excess, 0.5 * weight * e @ matrix @ e)


@pytest.mark.parametrize("distance", DISTANCES)
def test_larger_weight_of_the_distance_is_a_smaller_step(problem, distance):
    """Gebotys: "larger λ = less change", down to `−λ⁻¹ G⁻¹ ∇L`.

    The relative difference to that step falls as 1/λ.
    """
    rule, start = DISTANCES[distance], problem.start
    metric = np.eye(3) if rule is euclidean else problem.fisher(start)
    limit = -np.linalg.solve(metric, problem.gradient(start))
    changes = [proximal(problem, size, rule) - start for size in SIZES]
    lengths = np.linalg.norm(changes, axis=1)
    assert np.all(np.diff(lengths) < 0)
    scaled = np.array(SIZES)[:, np.newaxis] * changes
    errors = np.linalg.norm(scaled - limit, axis=1) / np.linalg.norm(limit)
    np.testing.assert_allclose(np.diff(np.log10(errors)), -1, atol=0.05)


def test_euclidean_distance_is_its_own_quadratic(problem):
    """Gebotys: ρ and ∇ρ vanish at w, ∇²ρ = I; the expansion has no remainder.

    The text gives `∇ρ = w_k − w_{k+1}`, the gradient with respect to w_k; with
    respect to the variable of the minimisation, w_{k+1}, it is the opposite.
    """
    w, other = np.random.default_rng(3).normal(size=(2, 3))
    value, slope, _ = euclidean(problem, w, w)
    assert value == 0.0 and not slope.any()
    numeric = scipy.optimize.approx_fprime(
        other, lambda v: 0.5 * np.sum((v - w) ** 2), 1e-7
    )
    np.testing.assert_allclose(numeric, other - w, rtol=1e-5)
    assert np.linalg.norm(numeric - (w - other)) > np.linalg.norm(w - other)


# -- Signs and factors ---------------------------------------------------


def test_sign_of_the_first_order_condition(problem):
    """Gebotys, last derivation: `0 = ∇L + λ (w − w*)ᵀ F` has the wrong sign.

    Its solution is `w + λ⁻¹ F⁻¹ ∇L`, which raises the loss; the result printed
    two lines below, `w − λ⁻¹ F⁻¹ ∇L`, is the minimum and does not solve it.
    """
    start, weight = problem.start, 20.0
    g, fisher = problem.gradient(start), problem.fisher(start)
    natural = np.linalg.solve(fisher, g) / weight

    def printed(w):
        return g + weight * fisher @ (start - w)

    np.testing.assert_allclose(printed(start + natural), 0, atol=1e-14)
    assert problem.loss(start + natural) > problem.loss(start)
    assert problem.loss(start - natural) < problem.loss(start)
    right = g + weight * fisher @ (start - natural - start)
    np.testing.assert_allclose(right, 0, atol=1e-14)
    np.testing.assert_allclose(printed(start - natural), 2 * g, **EXACT)


def test_sign_of_the_natural_gradient_update(problem):
    """Cross Validated 580509: `δ = α F⁻¹ g` does not minimise its model.

    `L + δᵀg + δᵀFδ / (2α)` has its minimum at `−α F⁻¹ g`, lower by
    `2α gᵀF⁻¹g`, and the condition `0 = g + Fδ/α` is the text's own.
    """
    start, rate = problem.start, 0.05
    g, fisher = problem.gradient(start), problem.fisher(start)
    step = rate * np.linalg.solve(fisher, g)

    def model(d):
        return problem.loss(start) + d @ g + 0.5 * d @ fisher @ d / rate

    np.testing.assert_allclose(g + fisher @ -step / rate, 0, atol=1e-14)
    np.testing.assert_allclose(g + fisher @ step / rate, 2 * g, **EXACT)
    np.testing.assert_allclose(model(step) - model(-step), 2 * step @ g)
    losses = [problem.loss(start + d) for d in (-step, 0 * step, step)]
    assert losses[0] < losses[1] < losses[2]


def test_half_of_the_quadratic_form_is_the_divergence(problem):
    """Cross Validated 580509 has `δᵀFδ` for the divergence: twice too much."""
    start = problem.start
    direction = np.random.default_rng(4).normal(size=3)
    fisher = problem.fisher(start)
    quotients = [
        problem.divergence(start, start + d) / (d @ fisher @ d)
        for d in (1e-2 * direction, 1e-3 * direction)
    ]
    np.testing.assert_allclose(quotients[0], 0.5, atol=5e-3)
    np.testing.assert_allclose(quotients[1], 0.5, atol=5e-4)


def test_linear_model_of_the_loss(problem):
    """Cross Validated 580509, Gebotys: `L + δᵀg`; the remainder is of order 2.

    Slope between steps of 0.02 and 0.01, in log-log.
    """
    start = problem.start
    direction = np.random.default_rng(4).normal(size=3)
    g = problem.gradient(start)
    remainders = [
        problem.loss(start + d) - problem.loss(start) - d @ g
        for d in (0.02 * direction, 0.01 * direction)
    ]
    slope = np.log2(remainders[0] / remainders[1])
    np.testing.assert_allclose(slope, 2, atol=0.02)


# -- Damping -------------------------------------------------------------


def test_a_distance_of_the_weights_is_damping(problem):
    """Gebotys: the term `‖w_{k+1} − w_k‖²` makes the step a damped one.

    With weight c that is `(λF + 2cI)⁻¹ ∇L`, and the minimum of the model
    without the term inside a ball of that length: a trust region.
    """
    g, fisher = problem.gradient(problem.start), problem.fisher(problem.start)
    weight, c = 0.7, 0.2

    def model(d):
        return g @ d + 0.5 * weight * d @ fisher @ d

    step = -np.linalg.solve(weight * fisher + 2 * c * np.eye(3), g)
    for e in np.random.default_rng(5).normal(size=(5, 3)):
        far, near = step + e, step
        excess = model(far) + c * far @ far - model(near) - c * near @ near
        expected = 0.5 * weight * e @ fisher @ e + c * e @ e
        np.testing.assert_allclose(excess, expected)
    ball = scipy.optimize.minimize(
        model,
        np.zeros(3),
        jac=lambda d: g + weight * fisher @ d,
        constraints={
            "type": "ineq",
            "fun": lambda d: step @ step - d @ d,
            "jac": lambda d: -2 * d,
        },
        method="SLSQP",
        options={"ftol": 1e-15},
    )
    np.testing.assert_allclose(ball.x, step, rtol=0, atol=1e-6)


def test_minimum_of_an_expansion_may_lie_above_the_start():
    """Gebotys: from 2, the quadratic model of `√(1 + w²)` leads to −8.

    With damping the step is down.
    """
    w = 2.0
    slope, bend = w / np.sqrt(1 + w**2), (1 + w**2) ** -1.5
    np.testing.assert_allclose(w - slope / bend, -8.0, rtol=1e-14)
    losses = [
        np.sqrt(1 + point**2)
        for point in (w - slope / bend, w, w - slope / (bend + 1.0))
    ]
    assert losses[2] < losses[1] < losses[0]


# -- Steepest descent ----------------------------------------------------


def steepest(problem, length_of):
    """Angle of the step to the lowest loss among those of a given length.

    Args:
        problem: With two weights.
        length_of: Function of a unit vector that gives the step's length.
    """

    def loss(angle):
        unit = np.array([np.cos(angle), np.sin(angle)])
        return problem.loss(problem.start + length_of(unit) * unit)

    grid = np.linspace(-np.pi, np.pi, 200)
    near = grid[np.argmin([loss(angle) for angle in grid])]
    width = grid[1] - grid[0]
    return scipy.optimize.minimize_scalar(
        loss,
        bounds=(near - width, near + width),
        method="bounded",
        options={"xatol": 1e-9},
    ).x


def angle_between(angle, vector):
    gap = angle - np.arctan2(vector[1], vector[0])
    return abs((gap + np.pi) % (2 * np.pi) - np.pi)


def test_steepest_descent_in_parameters_is_the_gradient():
    """Kristiadi: `−∇L/‖∇L‖` among all small steps of one length."""
    problem = Logistic(2)
    g = problem.gradient(problem.start)
    errors = [
        angle_between(steepest(problem, lambda _, e=e: e), -g)
        for e in (2e-2, 1e-2)
    ]
    assert errors[0] < 0.05
    np.testing.assert_allclose(errors[0] / errors[1], 2, atol=0.1)


def test_steepest_descent_in_distributions_is_the_natural_gradient():
    """Kristiadi: `−F⁻¹ ∇L` among all steps of one small divergence."""
    problem = Logistic(2)
    start = problem.start
    g = problem.gradient(start)
    natural = -np.linalg.solve(problem.fisher(start), g)
    errors = []
    for bound in (4e-4, 1e-4):

        def length(unit, bound=bound):
            return scipy.optimize.brentq(
                lambda t: problem.divergence(start, start + t * unit) - bound,
                0.0,
                1.0,
                xtol=1e-15,
            )

        errors.append(angle_between(steepest(problem, length), natural))
    assert errors[0] < 0.05
    np.testing.assert_allclose(errors[0] / errors[1], 2, atol=0.1)
    # The gradient itself points elsewhere.
    assert angle_between(np.arctan2(-g[1], -g[0]), natural) > 0.2
