"""Learning rate and momentum from the quadratic model."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from scipy import optimize

import keras_natgrad as kng
from keras_natgrad.step import (
    QuadraticStep,
    layer_coefficients,
    quadratic_coefficients,
)
from keras_natgrad.step.coefficients import (
    for_each_layer,
    model_change,
    of_all_layers,
    quadratic_form,
)

RATE, MOMENTUM = 0.7, 0.4
COMBINATIONS = list(itertools.product([True, False], [None, MOMENTUM]))


def random_model(seed):
    """A Gram matrix and slopes of two directions in five dimensions."""
    rng = np.random.default_rng(seed)
    basis = rng.normal(size=(2, 5))
    root = rng.normal(size=(5, 5))
    gram = basis @ (root @ root.T + 0.1 * np.eye(5)) @ basis.T
    # Slopes whose minimum has a positive momentum.
    return gram, -gram @ rng.uniform(0.2, 1.0, size=2)


def choose(gram, slopes, automatic, momentum, rate=RATE):
    return quadratic_coefficients(
        tf.constant(gram),
        tf.constant(slopes),
        QuadraticStep(automatic, momentum),
        tf.constant(rate, tf.float64),
    ).numpy()


def value(gram, slopes, c):
    return slopes @ c + 0.5 * c @ gram @ c


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("automatic", "momentum"), COMBINATIONS)
def test_is_the_minimum_on_a_grid(seed, automatic, momentum):
    gram, slopes = random_model(seed)
    found = choose(gram, slopes, automatic, momentum)
    steps = np.linspace(-0.5, 0.5, 21)
    rates = found[0] + steps if automatic else [RATE]
    momenta = found[1] + steps if momentum is None else [MOMENTUM]
    if not automatic:
        assert found[0] == RATE
    if momentum is not None:
        assert found[1] == MOMENTUM
    grid = [
        value(gram, slopes, np.array(pair))
        for pair in itertools.product(rates, momenta)
    ]
    assert value(gram, slopes, found) <= min(grid) + 1e-12


@pytest.mark.parametrize(("automatic", "momentum"), COMBINATIONS)
def test_model_is_stationary_in_free_coefficients(automatic, momentum):
    gram, slopes = random_model(5)
    found = choose(gram, slopes, automatic, momentum)
    derivative = slopes + gram @ found
    if automatic:
        np.testing.assert_allclose(derivative[0], 0.0, atol=1e-12)
    if momentum is None:
        np.testing.assert_allclose(derivative[1], 0.0, atol=1e-12)


@pytest.mark.parametrize(("automatic", "momentum"), COMBINATIONS)
def test_first_step_has_no_previous_update(automatic, momentum):
    gram, slopes = np.diag([2.0, 0.0]), np.array([-3.0, 0.0])
    found = choose(gram, slopes, automatic, momentum)
    assert found[0] == (1.5 if automatic else RATE)
    assert found[1] == (0.0 if momentum is None else MOMENTUM)


@pytest.mark.parametrize("factor", [1.0, -2.0, 1.0 + 1e-9])
def test_parallel_directions_use_the_first_only(factor):
    gram = 2.0 * np.array([[1.0, factor], [factor, factor**2]])
    slopes = -3.0 * np.array([1.0, factor])
    np.testing.assert_allclose(choose(gram, slopes, True, None), [1.5, 0.0])


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e10])
def test_scale_of_the_previous_update_does_not_matter(scale):
    """As long as the momentum stays below its bound."""
    gram, slopes = random_model(1)
    expected = choose(gram, slopes, True, None)
    assert 0 < expected[1] < 1
    change = np.diag([1.0, scale])
    found = choose(change @ gram @ change, change @ slopes, True, None)
    np.testing.assert_allclose(found, expected / [1.0, scale], rtol=1e-9)


def test_momentum_is_bounded_by_one():
    """The rate is then the best one beside a momentum of one."""
    gram = np.array([[2.0, 0.5], [0.5, 1.0]])
    slopes = -gram @ [0.5, 3.0]
    found = choose(gram, slopes, True, None)
    np.testing.assert_allclose(found, [-(slopes[0] + 0.5) / 2.0, 1.0])


def test_negative_momentum_is_left_out():
    """When both are free; the rate is then the best one alone."""
    gram = np.array([[2.0, 0.5], [0.5, 1.0]])
    slopes = -gram @ [0.5, -0.25]
    found = choose(gram, slopes, True, None)
    np.testing.assert_allclose(found, [-slopes[0] / 2.0, 0.0])


def test_zero_model_gives_zero():
    found = choose(np.zeros((2, 2)), np.zeros(2), True, None)
    np.testing.assert_array_equal(found, [0.0, 0.0])


@pytest.mark.parametrize("seed", range(3))
def test_model_change(seed):
    gram, slopes = random_model(seed)
    c = np.random.default_rng(seed).normal(size=2)
    found = model_change(*(tf.constant(v) for v in (gram, slopes, c)))
    np.testing.assert_allclose(found, value(gram, slopes, c), rtol=1e-12)


def test_best_change_is_half_the_slope():
    gram, slopes = random_model(0)
    c = choose(gram, slopes, True, None)
    found = model_change(*(tf.constant(v) for v in (gram, slopes, c)))
    np.testing.assert_allclose(found, 0.5 * slopes @ c, rtol=1e-10)
    assert found < 0


def test_quadratic_form():
    gram, c = random_model(0)
    found = quadratic_form(tf.constant(gram), tf.constant(c))
    np.testing.assert_allclose(found, c @ gram @ c, rtol=1e-12)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (kng.KFAC(), True),
        (kng.KFAC(momentum=0.0), True),
        (kng.KFAC(0.1), True),
        (kng.KFAC(0.1, 0.9), False),
    ],
)
def test_needs_model(rule, expected):
    assert rule.engine.rule.needs.model is expected


def layered(seed, layers=4):
    """A Gram matrix and slopes of the layers' parts and of a last update."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(layers + 1, layers + 3))
    gram = root @ root.T
    return gram, -gram @ rng.uniform(0.2, 1.0, size=layers + 1)


def solve_layers(gram, slopes, momentum=None, samples=1e12):
    return layer_coefficients(
        tf.constant(gram),
        tf.constant(slopes),
        QuadraticStep(True, momentum),
        tf.constant(1.0, tf.float64),
        samples,
    ).numpy()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("momentum", [None, MOMENTUM, 0.0])
@pytest.mark.parametrize("samples", [2, 64, 1e12])
def test_layers_deviate_from_the_common_rate(seed, momentum, samples):
    gram, slopes = layered(seed)
    total = np.zeros((5, 2))
    total[:4, 0] = total[4, 1] = 1.0
    common = choose(total.T @ gram @ total, slopes @ total, True, momentum)
    found = solve_layers(gram, slopes, momentum, samples)
    assert found[-1] == common[1]
    weight = 1 + 2 * 4 / samples

    def objective(e):
        c = total @ common + np.append(e, 0.0)
        own = 0.5 * weight * np.diag(gram)[:4] @ e**2
        return value(gram, slopes, c) + own

    least = optimize.minimize(objective, np.zeros(4), tol=1e-14)
    np.testing.assert_allclose(found[:4] - common[0], least.x, atol=1e-6)
    assert value(gram, slopes, found) <= value(gram, slopes, total @ common)


def test_coupled_layers_take_shorter_steps_than_each_alone():
    """Two layers whose parts do the same share the way between them."""
    gram = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    found = solve_layers(gram, np.array([-1.0, -1.0, 0.0]))
    np.testing.assert_allclose(found, [0.5, 0.5, 0.0], atol=1e-12)


def test_no_layer_is_far_from_the_common_rate():
    """Three layers: a steep one, a flat one, and one coupled to the first.

    The third has little slope of its own: left alone it would go up its
    gradient, to make room for the first. The second would go thirty times as
    far.
    """
    gram = np.diag([1.0, 1e-2, 0.02, 0.0])
    gram[0, 2] = gram[2, 0] = 0.12
    slopes = np.array([-1.0, -1.0, -1e-3, 0.0])
    common = -slopes.sum() / gram.sum()
    own = gram[:3, :3] + np.diag(np.diag(gram)[:3])
    deviations = -np.linalg.solve(
        own, slopes[:3] + common * gram[:3, :3].sum(1)
    )
    assert common + deviations[1] > 3 * common
    assert common + deviations[2] < 0
    found = solve_layers(gram, slopes)
    np.testing.assert_allclose(found[1], 3 * common, rtol=1e-12)
    np.testing.assert_allclose(found[2], common / 3, rtol=1e-12)
    expected = max(common + deviations[0], common / 3)
    np.testing.assert_allclose(found[0], expected, rtol=1e-9)


def test_a_negative_common_rate_has_its_bounds_too():
    """The last update did too much: part of it is to be taken back."""
    gram = np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 2.0], [2.0, 2.0, 9.0]])
    slopes = np.array([-0.5, 0.1, -4.0])
    common = choose(
        np.array([[2.0, 4.0], [4.0, 9.0]]), np.array([-0.4, -4.0]), True, None
    )
    assert common[0] < 0
    found = solve_layers(gram, slopes)
    assert np.all(found[:2] <= common[0] / 3 + 1e-12)
    assert np.all(found[:2] >= common[0] * 3 - 1e-12)
    assert found[0] > found[1]


def test_products_with_all_layers():
    gram, slopes = layered(0)
    total = np.zeros((5, 2))
    total[:4, 0] = total[4, 1] = 1.0
    np.testing.assert_allclose(
        of_all_layers(tf.constant(gram)), total.T @ gram @ total, rtol=1e-12
    )
    np.testing.assert_allclose(
        of_all_layers(tf.constant(slopes)), slopes @ total, rtol=1e-12
    )
    np.testing.assert_array_equal(
        for_each_layer(tf.constant([0.5, 0.25]), 4), [0.5, 0.5, 0.5, 0.5, 0.25]
    )


def test_layers_without_a_part_and_the_first_step():
    """Rows of zero: no gradient in a layer, no last update."""
    gram, slopes = layered(1)
    for index in (1, 4):
        gram[index] = gram[:, index] = slopes[index] = 0.0
    found = solve_layers(gram, slopes)
    rest = [0, 2, 3, 4]
    less = solve_layers(gram[np.ix_(rest, rest)], slopes[rest])
    np.testing.assert_allclose(found[rest], less, rtol=1e-9)
    assert found[4] == 0.0
    assert np.all(solve_layers(0 * gram, 0 * slopes) == 0.0)


def test_scale_of_all_directions_does_not_matter():
    gram, slopes = layered(2)
    found = solve_layers(gram, slopes)
    np.testing.assert_allclose(
        solve_layers(9 * gram, 3 * slopes), found / 3, rtol=1e-12
    )


def test_what_is_not_finite_stays_so_and_raises_nothing():
    gram, slopes = layered(0)
    gram[0, 0] = np.nan
    assert not np.all(np.isfinite(solve_layers(gram, slopes)))
