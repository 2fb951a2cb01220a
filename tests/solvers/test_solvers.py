"""Every solver against a dense NumPy solution."""

import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.solvers import ConjugateGradient, Dense, Kernel, System

SOLVERS = {
    "kernel": Kernel(),
    "dense": Dense(),
    "cg": ConjugateGradient(max_iterations=200, tolerance=0.0),
}
DAMPINGS = (1e-4, 1e-2, 1.0)


def vectors(columns):
    generator = np.random.default_rng(4)
    return (
        generator.normal(size=columns),
        generator.normal(size=8),
        generator.normal(size=8),
    )


def expected(matrix, u, damping, r=None, s=None):
    """φ from `(F + λI) φ = A u + r + λ s`, nearest to s where λ is zero."""
    s = np.zeros(8) if s is None else s
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    target = right @ (u - matrix.T @ s)
    kept = values > 1e-10 * values[0]
    if damping > 0:
        gains = values / (values**2 + damping)
    else:
        gains = np.where(kept, 1 / np.where(kept, values, 1), 0)
    direction = s + left @ (gains * target)
    if r is not None and damping > 0:
        fisher = matrix @ matrix.T + damping * np.eye(8)
        direction += np.linalg.solve(fisher, r)
    elif r is not None:
        direction += left @ (gains**2 * (left.T @ r))
    return direction


def system(u, damping, r=None, s=None):
    return System(
        tf.constant(u),
        tf.constant(damping, tf.float64),
        None if r is None else [tf.constant(r)],
        None if s is None else [tf.constant(s)],
    )


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("name", SOLVERS)
def test_damped(matrix_factor, matrix, name, damping, shifted):
    u, _, s = vectors(matrix.shape[1])
    s = s if shifted else None
    found = SOLVERS[name].solve(
        matrix_factor(matrix, u), system(u, damping, s=s)
    )
    np.testing.assert_allclose(
        found.direction[0], expected(matrix, u, damping, s=s), 1e-8, 1e-8
    )
    assert int(found.failures) == 0


@pytest.mark.parametrize("damping", [1e-10, 1e-8, 1e-6])
def test_residual_form_at_small_damping(matrix_factor, matrix, damping):
    """Its error is that of A times the part of u that A does not see."""
    u, _, s = vectors(matrix.shape[1])
    found = Kernel().solve(matrix_factor(matrix, u), system(u, damping, s=s))
    reference = expected(matrix, u, damping, s=s)
    norms = np.linalg.norm(matrix) * np.linalg.norm(u)
    tolerance = 1e-8 + 4 * np.finfo("float64").eps * norms / damping
    assert tolerance < 2e-3
    np.testing.assert_allclose(found.direction[0], reference, 0, tolerance)


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("name", SOLVERS)
def test_remainder(matrix_factor, matrix, name, damping):
    u, r, s = vectors(matrix.shape[1])
    found = SOLVERS[name].solve(
        matrix_factor(matrix, u), system(u, damping, r, s)
    )
    reference = expected(matrix, u, damping, r, s)
    # The Woodbury form of the remainder loses ε ‖K‖ / λ.
    tolerance = 1e-8 * np.abs(reference).max()
    np.testing.assert_allclose(found.direction[0], reference, 0, tolerance)


@pytest.mark.parametrize("name", ["kernel", "dense"])
def test_moore_penrose(matrix_factor, matrix, name):
    u, _, s = vectors(matrix.shape[1])
    found = SOLVERS[name].solve(
        matrix_factor(matrix, u), system(u, 0.0, s=s), exact=True
    )
    np.testing.assert_allclose(
        found.direction[0], expected(matrix, u, 0.0, s=s), 1e-8, 1e-8
    )


@pytest.mark.parametrize("name", ["kernel", "dense"])
def test_moore_penrose_of_a_remainder(matrix_factor, matrix, name):
    u, r, _ = vectors(matrix.shape[1])
    found = SOLVERS[name].solve(
        matrix_factor(matrix, u), system(u, 0.0, r), exact=True
    )
    np.testing.assert_allclose(
        found.direction[0], expected(matrix, u, 0.0, r), 1e-8, 1e-8
    )


def test_conjugate_gradient_without_damping(matrix_factor, matrix):
    """In the range of F, it converges to the Moore–Penrose solution."""
    u, _, _ = vectors(matrix.shape[1])
    solver = ConjugateGradient(max_iterations=200, tolerance=0.0)
    found = solver.solve(matrix_factor(matrix, u), system(u, 0.0))
    np.testing.assert_allclose(
        found.direction[0], expected(matrix, u, 0.0), 1e-6, 1e-6
    )


@pytest.mark.variants("full-fewer-kernel", "deficient-fewer-kernel")
@pytest.mark.parametrize("name", SOLVERS)
def test_compiled(matrix_factor, matrix, name):
    u, r, s = vectors(matrix.shape[1])
    factor = matrix_factor(matrix, u)

    def solve(damping):
        parts = System(tf.constant(u), damping, [tf.constant(r)])
        return SOLVERS[name].solve(factor, parts).direction[0]

    damping = tf.constant(0.1, tf.float64)
    compiled = tf.function(solve, jit_compile=True)(damping)
    np.testing.assert_allclose(compiled, solve(damping), 1e-9, 1e-9)


@pytest.mark.parametrize("damping", [1e-2, 1e-4, 1e-6, 1e-8])
def test_float32_residual_form_keeps_its_digits(matrix_factor, damping):
    generator = np.random.default_rng(0)
    left, _ = np.linalg.qr(generator.normal(size=(40, 10)))
    right, _ = np.linalg.qr(generator.normal(size=(10, 10)))
    # Eigenvalues of the kernel from 1 down to 1e-4.
    matrix = left * np.geomspace(1, 1e-2, 10) @ right.T
    u = generator.normal(size=10)
    exact = matrix @ np.linalg.solve(
        matrix.T @ matrix + damping * np.eye(10), u
    )
    single = matrix_factor(matrix.astype("float32"), u.astype("float32"))
    found = Kernel().solve(
        single, System(single.residual(), tf.constant(damping, tf.float32))
    )
    error = np.linalg.norm(found.direction[0] - exact) / np.linalg.norm(exact)
    assert error < 2e-3


class TestConjugateGradient:
    def test_stops_when_progress_is_small(self, matrix_factor):
        generator = np.random.default_rng(1)
        matrix = generator.normal(size=(100, 300)) / 17
        u = generator.normal(size=300)
        solver = ConjugateGradient(max_iterations=90, tolerance=5e-4)
        found = solver.solve(matrix_factor(matrix, u), system(u, 1.0))
        assert 10 < int(found.iterations) < 30

    def test_warm_start_saves_iterations(self, matrix_factor, matrix):
        u, _, _ = vectors(matrix.shape[1])
        factor = matrix_factor(matrix, u)
        solver = ConjugateGradient(200, 0.0, warm_start=1.0)
        cold = solver.solve(factor, system(u, 0.1))
        warm = solver.solve(factor, system(u, 0.1), start=cold.direction)
        assert int(warm.iterations) < int(cold.iterations)
        np.testing.assert_allclose(
            warm.direction[0], cold.direction[0], 1e-9, 1e-9
        )

    def test_preconditioner_keeps_the_solution(self, matrix_factor, matrix):
        u, _, _ = vectors(matrix.shape[1])
        factor = matrix_factor(matrix, u)
        diagonal = np.sum(matrix**2, axis=1) + 0.1
        solver = ConjugateGradient(200, 0.0)
        found = solver.solve(
            factor,
            system(u, 0.1),
            preconditioner=lambda direction: [direction[0] / diagonal],
        )
        np.testing.assert_allclose(
            found.direction[0], expected(matrix, u, 0.1), 1e-8, 1e-8
        )

    def test_keeps_the_last_good_iterate(self, matrix_factor):
        """A product that overflows ends the iteration and is counted."""
        generator = np.random.default_rng(2)
        matrix = generator.normal(size=(8, 20))

        class Failing(type(matrix_factor(matrix, np.ones(20)))):
            calls = 0

            def transpose_product(self, direction):
                self.calls += 1
                scale = np.inf if self.calls > 4 else 1.0
                return scale * super().transpose_product(direction)

        u = generator.normal(size=20)
        broken = Failing(matrix, u)
        # Eager, as the loop would otherwise be traced once.
        found = ConjugateGradient(20, 0.0).solve(broken, system(u, 0.1))
        assert int(found.failures) == 1
        assert int(found.iterations) == 3
        reference = ConjugateGradient(3, 0.0).solve(
            matrix_factor(matrix, u), system(u, 0.1)
        )
        np.testing.assert_allclose(
            found.direction[0], reference.direction[0], 1e-12
        )

    @pytest.mark.parametrize(
        "kwargs, name",
        [
            ({"max_iterations": 0}, "max_iterations"),
            ({"max_iterations": 2.5}, "max_iterations"),
            ({"tolerance": -1.0}, "tolerance"),
            ({"warm_start": 1.5}, "warm_start"),
            ({"preconditioner": "full"}, "preconditioner"),
        ],
    )
    def test_bad_arguments(self, kwargs, name):
        with pytest.raises(ValueError, match=name):
            ConjugateGradient(**kwargs)
