"""Expectations behind the Fisher, by quadrature.

The identities that B. Gebotys, "Natural Gradient Descent without the Tears",
and A. Kristiadi, "Natural Gradient Descent", derive the curvature of the
divergence from. A location μ and a log-scale s of three densities,
`log p = h(z) − s`, `z = (x − μ) e⁻ˢ`.
"""

from typing import NamedTuple

import numpy as np
import pytest
import scipy.integrate

STEP = 1e-4  # of central differences


class Base(NamedTuple):
    """h, its derivatives, and minus the logarithm of its integral."""

    h: object
    first: object
    second: object


BASES = {
    "normal": Base(
        lambda z: -0.5 * z**2 - 0.5 * np.log(2 * np.pi),
        lambda z: -z,
        lambda z: -np.ones_like(z),
    ),
    # Not an exponential family.
    "student": Base(
        lambda z: -3 * np.log1p(z**2 / 5) + np.log(8 / (3 * np.pi * 5**0.5)),
        lambda z: -6 * z / (5 + z**2),
        lambda z: -6 * (5 - z**2) / (5 + z**2) ** 2,
    ),
    # Not symmetric: its Fisher is not diagonal.
    "gumbel": Base(
        lambda z: -z - np.exp(-z),
        lambda z: -1 + np.exp(-z),
        lambda z: -np.exp(-z),
    ),
}
HERE, THERE = np.array([0.3, 0.2]), np.array([0.5, -0.1])


@pytest.fixture(params=BASES)
def base(request):
    return BASES[request.param]


def standard(x, theta):
    return (x - theta[0]) * np.exp(-theta[1])


def log_density(base, x, theta):
    return base.h(standard(x, theta)) - theta[1]


def score(base, x, theta):
    """`∇_θ log p(x | θ)`."""
    z = standard(x, theta)
    first = base.first(z)
    return np.array([-first * np.exp(-theta[1]), -1 - z * first])


def hessian(base, x, theta):
    """`∇²_θ log p(x | θ)`."""
    z, inverse = standard(x, theta), np.exp(-theta[1])
    first, second = base.first(z), base.second(z)
    mixed = (first + z * second) * inverse
    corner = z * first + z**2 * second
    return np.array([[second * inverse**2, mixed], [mixed, corner]])


def expectation(base, theta, function):
    """`E[function(x)]` under θ, to 1e-12."""

    def integrand(x):
        density = np.exp(log_density(base, x, theta))
        # Far out h overflows against a density of zero.
        with np.errstate(over="ignore", invalid="ignore"):
            return np.nan_to_num(density * function(x), posinf=0, neginf=0)

    with np.errstate(over="ignore"):
        value, _ = scipy.integrate.quad_vec(
            integrand, -np.inf, np.inf, epsabs=1e-13, epsrel=1e-13, limit=2000
        )
    return value


def fisher(base, theta):
    """`E[s sᵀ]`."""

    def outer(x):
        s = score(base, x, theta)
        return np.outer(s, s)

    return expectation(base, theta, outer)


def divergence(base, theta, other):
    """`KL(p_θ ‖ p_other)`, from its definition."""

    def ratio(x):
        return log_density(base, x, theta) - log_density(base, x, other)

    return expectation(base, theta, ratio)


def differences(function, point):
    """Central differences of a function, the derivative's axis last."""
    return np.stack(
        [
            (function(point + e) - function(point - e)) / (2 * STEP)
            for e in STEP * np.eye(2)
        ],
        axis=-1,
    )


def test_derivatives_of_the_densities(base):
    """Those that the quadratures below take."""
    x = 0.7
    np.testing.assert_allclose(
        score(base, x, HERE),
        differences(lambda t: log_density(base, x, t), HERE),
        rtol=1e-7,
    )
    np.testing.assert_allclose(
        hessian(base, x, HERE),
        differences(lambda t: score(base, x, t), HERE),
        rtol=1e-7,
    )
    one = expectation(base, HERE, lambda _: 1.0)
    np.testing.assert_allclose(one, 1.0, rtol=1e-12)


def test_expected_score_is_zero(base):
    """Both texts: `E[∇ log p] = 0`, under p itself only."""
    mean = expectation(base, HERE, lambda x: score(base, x, HERE))
    np.testing.assert_allclose(mean, 0, atol=1e-11)
    other = expectation(base, HERE, lambda x: score(base, x, THERE))
    assert np.linalg.norm(other) > 0.1


def test_expected_hessian_is_minus_the_fisher(base):
    """Both texts: `E[∇² log p] = −F`, under p itself only."""
    matrix = fisher(base, HERE)
    found = expectation(base, HERE, lambda x: hessian(base, x, HERE))
    np.testing.assert_allclose(found, -matrix, rtol=1e-10, atol=1e-11)
    other = expectation(base, HERE, lambda x: hessian(base, x, THERE))
    gap = np.linalg.norm(other + fisher(base, THERE))
    assert gap > 0.1 * np.linalg.norm(matrix)


def test_divergence_is_cross_entropy_less_entropy(base):
    """Both texts: `KL = E[log p] − E[log p′]`, zero for p′ = p only."""
    parts = [
        expectation(base, HERE, lambda x, t=t: log_density(base, x, t))
        for t in (HERE, THERE)
    ]
    found = divergence(base, HERE, THERE)
    np.testing.assert_allclose(found, parts[0] - parts[1], rtol=1e-10)
    assert found > 0.01
    assert divergence(base, HERE, HERE) == 0.0


def test_derivatives_of_the_divergence(base):
    """Both texts: `−E[∇ log p′]` and `−E[∇² log p′]`, at any θ′.

    The Hessian is F where θ′ = θ; elsewhere it is not the Fisher of θ′.
    """

    def slope(other):
        return -expectation(base, HERE, lambda x: score(base, x, other))

    def bend(other):
        return -expectation(base, HERE, lambda x: hessian(base, x, other))

    np.testing.assert_allclose(
        slope(THERE),
        differences(lambda t: divergence(base, HERE, t), THERE),
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        bend(THERE), differences(slope, THERE), rtol=1e-6, atol=1e-7
    )
    np.testing.assert_allclose(slope(HERE), 0, atol=1e-11)
    np.testing.assert_allclose(
        bend(HERE), fisher(base, HERE), rtol=1e-10, atol=1e-11
    )
    gap = bend(THERE) - fisher(base, THERE)
    assert np.linalg.norm(gap) > 0.1 * np.linalg.norm(bend(THERE))


def test_divergence_is_symmetric_in_the_limit_only(base):
    """Kristiadi: not a metric, but its asymmetry vanishes faster than it.

    The two directions differ by terms of order 3, the divergence is of order 2.
    """
    gaps, sizes = [], []
    for length in (0.02, 0.01):
        other = HERE + length * np.array([1.0, 0.7])
        both = divergence(base, HERE, other), divergence(base, other, HERE)
        gaps.append(abs(both[0] - both[1]))
        sizes.append(both[0])
    np.testing.assert_allclose(np.log2(gaps[0] / gaps[1]), 3, atol=0.05)
    np.testing.assert_allclose(np.log2(sizes[0] / sizes[1]), 2, atol=0.05)
    far = divergence(base, HERE, THERE), divergence(base, THERE, HERE)
    assert abs(far[0] - far[1]) > 0.05 * min(far)
