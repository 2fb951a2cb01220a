"""The Moore–Penrose natural gradient: a published formula and its domain.

Cross Validated question 580509 writes `F = G F_η Gᵀ` with `G = Jᵀ`, `[P, NK]`,
and claims `F⁺ = (G⁺)ᵀ F_η⁻¹ G⁺`. All of this file is NumPy.
"""

import numpy as np
import pytest

EXACT = dict(rtol=0, atol=1e-12)
# Far above rounding and far below any eigenvalue that is not zero here.
CUTOFF = 1e-10


def pinv(matrix):
    return np.linalg.pinv(matrix, rcond=CUTOFF)


def covariance(rng, size):
    root = rng.normal(size=(size, size))
    return root @ root.T + np.eye(size)


def softmax_fisher(rng, size):
    """`diag p − p pᵀ`; its null space is a shift of all logits."""
    p = rng.dirichlet(np.ones(size))
    return p, np.diag(p) - np.outer(p, p)


def claimed(g, inverse):
    return pinv(g).T @ inverse @ pinv(g)


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def meets_penrose(matrix, inverse):
    """Whether all four conditions of a Moore–Penrose inverse hold."""
    left, right = inverse @ matrix, matrix @ inverse
    pairs = [
        (matrix @ left, matrix),
        (left @ inverse, inverse),
        (left, left.T),
        (right, right.T),
    ]
    return [np.allclose(a, b, rtol=0, atol=1e-8) for a, b in pairs]


@pytest.mark.parametrize("seed", range(3))
def test_claim_holds_on_its_domain(seed):
    """Full column rank of G and an invertible F_η."""
    rng = np.random.default_rng(seed)
    g, f = rng.normal(size=(20, 5)), covariance(rng, 5)
    found = claimed(g, np.linalg.inv(f))
    np.testing.assert_allclose(found, pinv(g @ f @ g.T), **EXACT)
    assert meets_penrose(g @ f @ g.T, found) == [True] * 4
    # The chain rule of the source, n = G (GᵀG)⁻¹ F_η⁻¹ g_η.
    g_eta = rng.normal(size=5)
    chain = g @ np.linalg.solve(g.T @ g, np.linalg.solve(f, g_eta))
    natural = pinv(g @ f @ g.T) @ g @ g_eta
    np.testing.assert_allclose(chain, natural, **EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_claim_fails_with_more_outputs_than_weights(seed):
    rng = np.random.default_rng(seed)
    g, f = rng.normal(size=(5, 20)), covariance(rng, 20)
    matrix, found = g @ f @ g.T, claimed(g, np.linalg.inv(f))
    assert relative(found, pinv(matrix)) > 0.5
    assert not all(meets_penrose(matrix, found))


@pytest.mark.parametrize("seed", range(3))
def test_claim_fails_with_redundant_outputs(seed):
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(20, 4)) @ rng.normal(size=(4, 5))
    f = covariance(rng, 5)
    matrix, found = g @ f @ g.T, claimed(g, np.linalg.inv(f))
    assert relative(found, pinv(matrix)) > 0.01
    assert not all(meets_penrose(matrix, found))


@pytest.mark.parametrize("seed", range(3))
def test_claim_fails_with_a_singular_output_fisher(seed):
    """`F_η⁻¹` does not exist, and `F_η⁺` in its place is wrong as well."""
    rng = np.random.default_rng(seed)
    _, f = softmax_fisher(rng, 5)
    assert np.linalg.matrix_rank(f) == 4
    g = rng.normal(size=(20, 5))
    found = claimed(g, pinv(f))
    assert relative(found, pinv(g @ f @ g.T)) > 0.1
    assert not all(meets_penrose(g @ f @ g.T, found))


# -- The form that is always valid ---------------------------------------

GRIDS = {
    "fewer outputs than weights": (3, 40, None),
    "as many": (4, 20, None),
    "more outputs than weights": (10, 12, None),
    "rank deficient": (4, 40, 7),
}


def softmax_batch(rng, examples, weights, rank, classes=5):
    """The factor A, whitened residuals u, Fisher and gradient of a batch.

    Per example `L = diag √p − p √pᵀ`, for which `L Lᵀ = diag p − p pᵀ` and
    `L u = p − y` with `u = (p − y) / √p`.
    """
    columns, whitened = [], []
    fisher, gradient = 0.0, 0.0
    basis = None if rank is None else rng.normal(size=(weights, rank))
    for _ in range(examples):
        p, f = softmax_fisher(rng, classes)
        root = np.sqrt(p)
        factor = np.diag(root) - np.outer(p, root)
        np.testing.assert_allclose(factor @ factor.T, f, **EXACT)
        y = np.eye(classes)[rng.integers(classes)]
        u = (p - y) / root
        np.testing.assert_allclose(factor @ u, p - y, **EXACT)
        g = rng.normal(size=(weights, classes))
        if basis is not None:
            g = basis @ rng.normal(size=(rank, classes))
        columns.append(g @ factor / np.sqrt(examples))
        whitened.append(u)
        fisher = fisher + g @ f @ g.T / examples
        gradient = gradient + g @ (p - y) / examples
    return np.hstack(columns), np.hstack(whitened), fisher, gradient


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_whitened_form_is_the_pseudo_inverse(grid):
    """`F⁺ g = A (AᵀA)⁺ u / √N` for any rank and ratio."""
    rng = np.random.default_rng(0)
    a, u, fisher, gradient = softmax_batch(rng, *grid)
    found = a @ pinv(a.T @ a) @ u / np.sqrt(grid[0])
    expected = pinv(fisher) @ gradient
    assert relative(found, expected) < 1e-12


@pytest.mark.parametrize("damping", [1.0, 1e-3])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_damped_forms_agree(grid, damping):
    """Push-through, and Woodbury for a vector outside of A's range."""
    rng = np.random.default_rng(0)
    a, u, _, _ = softmax_batch(rng, *grid)
    big = a @ a.T + damping * np.eye(len(a))
    small = a.T @ a + damping * np.eye(len(u))
    left = np.linalg.solve(big, a @ u)
    assert relative(a @ np.linalg.solve(small, u), left) < 1e-10
    g = rng.normal(size=len(a))
    woodbury = (g - a @ np.linalg.solve(small, a.T @ g)) / damping
    assert relative(woodbury, np.linalg.solve(big, g)) < 1e-10


# -- Least squares and the shortest solution -----------------------------


def test_inverse_of_a_factor():
    """`G⁺ = (GᵀG)⁻¹ Gᵀ` for independent columns, `Gᵀ (GGᵀ)⁻¹` for rows.

    With independent rows `G⁺ G` is not the identity, so nothing cancels to
    the right of `F_η⁻¹`, as the source says itself.
    """
    rng = np.random.default_rng(0)
    tall, wide = rng.normal(size=(20, 5)), rng.normal(size=(5, 20))
    found = np.linalg.solve(tall.T @ tall, tall.T)
    np.testing.assert_allclose(found, pinv(tall), **EXACT)
    np.testing.assert_allclose(found @ tall, np.eye(5), **EXACT)
    found = np.linalg.solve(wide @ wide.T, wide).T
    np.testing.assert_allclose(found, pinv(wide), **EXACT)
    assert np.linalg.norm(found @ wide - np.eye(20)) > 3.0


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_first_order_condition_has_a_solution(grid):
    """`0 = g + Fδ / α` "doesn't necessarily have a solution": it has.

    The gradient of the likelihood lies in the range of F, for any rank; so
    `−α F⁺ g` minimises the model and does not only come near.
    """
    rng = np.random.default_rng(0)
    _, _, fisher, gradient = softmax_batch(rng, *grid)
    rate = 0.3
    step = -rate * pinv(fisher) @ gradient
    left = gradient + fisher @ step / rate
    assert np.linalg.norm(left) < 1e-12 * np.linalg.norm(gradient)


def test_model_without_a_minimum():
    """A penalty on the weights leaves the range of F: no minimum is left.

    The source supposes that a semi-definite F will do in the least-squares
    case. `−α F⁺ g` is then stationary in the range only, and the model falls
    without bound along the rest of g.
    """
    rng = np.random.default_rng(0)
    _, _, fisher, gradient = softmax_batch(rng, 3, 40, None)
    g = gradient + 0.1 * rng.normal(size=40)
    step = -pinv(fisher) @ g
    outside = g + fisher @ step
    assert np.linalg.norm(outside) > 0.1
    np.testing.assert_allclose(fisher @ outside, 0, atol=1e-12)

    def model(d):
        return d @ g + 0.5 * d @ fisher @ d

    values = [model(step - t * outside) - model(step) for t in (1, 10, 1e3)]
    expected = -np.array([1, 10, 1e3]) * (outside @ outside)
    np.testing.assert_allclose(values, expected, rtol=1e-9)


def test_solutions_differ_where_the_outputs_do_not():
    """`−F⁺ g` is the shortest of many minima, "which may be irrelevant".

    All have the same model value and the same change of the outputs. The
    shortest one depends on the coordinates: in `θ = T φ` another is taken, by
    which the outputs change as well as before.
    """
    rng = np.random.default_rng(0)
    g, f = rng.normal(size=(20, 5)), covariance(rng, 5)
    fisher, gradient = g @ f @ g.T, g @ rng.normal(size=5)
    step = -pinv(fisher) @ gradient
    null = rng.normal(size=20)
    null -= g @ pinv(g) @ null
    other = step + null

    def model(d):
        return d @ gradient + 0.5 * d @ fisher @ d

    np.testing.assert_allclose(model(other), model(step), **EXACT)
    np.testing.assert_allclose(g.T @ other, g.T @ step, **EXACT)
    assert np.linalg.norm(other) > 1.5 * np.linalg.norm(step)
    t = rng.normal(size=(20, 20))
    moved = -t @ pinv(t.T @ fisher @ t) @ (t.T @ gradient)
    np.testing.assert_allclose(g.T @ moved, g.T @ step, rtol=0, atol=1e-9)
    assert np.linalg.norm(moved - step) > 0.5 * np.linalg.norm(step)


# -- float32 -------------------------------------------------------------

DAMPINGS = (1e-2, 1e-4, 1e-6, 1e-8)


def errors_in_float32(seed, damping):
    """Relative errors of the residual and of the Woodbury form."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(200, 30)) / np.sqrt(30)
    u = rng.normal(size=30)
    exact = a @ np.linalg.solve(a.T @ a + damping * np.eye(30), u)
    g, a, u = (x.astype("float32") for x in (a @ u, a, u))
    damping = np.float32(damping)
    kernel = a.T @ a + damping * np.eye(30, dtype="float32")
    residual = a @ np.linalg.solve(kernel, u)
    woodbury = (g - a @ np.linalg.solve(kernel, a.T @ g)) / damping
    assert residual.dtype == woodbury.dtype == np.float32
    return relative(residual, exact), relative(woodbury, exact)


def test_woodbury_loses_its_digits_in_float32():
    """`ε ‖K‖ / λ` is lost; with ‖K‖ = 12, all digits below λ = 1e-6.

    Geometric means over ten seeds: 1.8e-4, 1.8e-2, 1.8 and 1.8e2 for the
    Woodbury form, 3e-7 throughout for the residual form.
    """
    logs = np.log10(
        [[errors_in_float32(s, d) for d in DAMPINGS] for s in range(10)]
    )
    residual, woodbury = logs.mean(axis=0).T
    assert np.all(residual < -6)
    np.testing.assert_allclose(woodbury, [-4, -2, 0, 2], atol=0.5)
    np.testing.assert_allclose(np.diff(woodbury), 2, atol=0.25)
