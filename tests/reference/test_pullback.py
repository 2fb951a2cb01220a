"""From the Fisher of the outputs to that of the weights.

B. Gebotys, "Natural Gradient Descent without the Tears", pulls the divergence
of the outputs back to the weights; Cross Validated question 580509 writes
`F_θ = G F_η Gᵀ`. A tanh network with one example's logits `z = tanh(x W₁) W₂`,
its Jacobian and its second derivatives in NumPy.
"""

import numpy as np
import pytest
import tensorflow as tf

from tests.reference import fisher, heads
from tests.reference.heads import Term
from tests.reference.network import Linear, Network

EXACT = dict(rtol=1e-10, atol=1e-12)
EXAMPLES, INPUTS, HIDDEN, CLASSES = 4, 4, 5, 3
SPLIT = INPUTS * HIDDEN
SIZE = SPLIT + HIDDEN * CLASSES


def outputs_of(w, x):
    """Logits `[N, K]`, also of complex weights."""
    first = w[:SPLIT].reshape(INPUTS, HIDDEN)
    return np.tanh(x @ first) @ w[SPLIT:].reshape(HIDDEN, CLASSES)


def log_softmax(z):
    shifted = z - z.real.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def jacobian(function, w):
    """By complex steps, exact to rounding; the axis of w last."""
    steps = 1e-30j * np.eye(len(w))
    return np.stack([function(w + e).imag / 1e-30 for e in steps], axis=-1)


def second_derivatives(w, x):
    """`∇²_w z`, `[N, K, P, P]`, from `z_k = Σ_j v_jk tanh(Σ_i x_i u_ij)`."""
    first = w[:SPLIT].reshape(INPUTS, HIDDEN)
    second = w[SPLIT:].reshape(HIDDEN, CLASSES)
    h = np.tanh(x @ first)
    slope, bend = 1 - h**2, -2 * h * (1 - h**2)
    found = np.zeros((len(x), CLASSES, SIZE, SIZE))
    for n, k, j in np.ndindex(len(x), CLASSES, HIDDEN):
        rows = np.arange(INPUTS) * HIDDEN + j
        outer = bend[n, j] * second[j, k] * np.outer(x[n], x[n])
        found[n, k][np.ix_(rows, rows)] = outer
        column = SPLIT + j * CLASSES + k
        found[n, k, rows, column] = slope[n, j] * x[n]
        found[n, k, column, rows] = slope[n, j] * x[n]
    return found


def softmax_fisher(p):
    return p[:, :, np.newaxis] * np.eye(p.shape[1]) - np.einsum(
        "nk,nl->nkl", p, p
    )


def divergence(w, other, x):
    """Mean `KL(r_w ‖ r_other)` over the examples."""
    logs = log_softmax(outputs_of(w, x)), log_softmax(outputs_of(other, x))
    return np.mean(np.sum(np.exp(logs[0]) * (logs[0] - logs[1]), axis=-1))


def tensor_outputs(w, x):
    first, second = tf.split(w, [SPLIT, SIZE - SPLIT])
    hidden = tf.tanh(x @ tf.reshape(first, [INPUTS, HIDDEN]))
    return hidden @ tf.reshape(second, [HIDDEN, CLASSES])


def hessian_of(function, w):
    """Value, gradient and Hessian in w by automatic differentiation."""
    w = tf.constant(w)
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(w)
        with tf.GradientTape() as inner:
            inner.watch(w)
            value = function(w)
        slope = inner.gradient(value, w)
    bend = outer.jacobian(slope, w, experimental_use_pfor=False)
    return value.numpy(), slope.numpy(), bend.numpy()


def pulled_back(w, x):
    """Value, gradient and Hessian of the mean `KL(r_w ‖ r_w′)` in w′."""
    fixed = tf.constant(log_softmax(outputs_of(w, x)))

    def function(other):
        log_q = tf.nn.log_softmax(tensor_outputs(other, x))
        terms = tf.reduce_sum(tf.exp(fixed) * (fixed - log_q), axis=-1)
        return tf.reduce_mean(terms)

    return lambda other: hessian_of(function, other)


@pytest.fixture
def problem():
    """Weights, other weights and inputs."""
    rng = np.random.default_rng(0)
    w = 0.6 * rng.normal(size=SIZE)
    other = w + 0.3 * rng.normal(size=SIZE)
    return w, other, rng.normal(size=(EXAMPLES, INPUTS))


def gauss_newton(w, x):
    """`(1/N) Σ J_iᵀ H_i J_i` with `H = diag q − q qᵀ` at w."""
    j = jacobian(lambda v: outputs_of(v, x), w)
    h = softmax_fisher(np.exp(log_softmax(outputs_of(w, x))))
    return np.einsum("nkp,nkl,nlq->pq", j, h, j) / len(x)


# -- The chain rule and the expectation ----------------------------------


def test_gradient_is_the_pulled_back_gradient(problem):
    """Cross Validated 580509: `g_θ = G g_η`, `G = Jᵀ`."""
    w, _, x = problem
    labels = np.eye(CLASSES)[[0, 2, 1, 1]]
    found = jacobian(lambda v: log_softmax(outputs_of(v, x)), w)
    g_theta = -np.einsum("nk,nkp->np", labels, found)
    g_eta = np.exp(log_softmax(outputs_of(w, x))) - labels
    j = jacobian(lambda v: outputs_of(v, x), w)
    np.testing.assert_allclose(
        np.einsum("nkp,nk->np", j, g_eta), g_theta, **EXACT
    )


def test_expected_outer_product_of_scores_is_the_pullback(problem):
    """Both texts: `F_θ = E[∇log d ∇log dᵀ] = G F_η Gᵀ`, all labels summed."""
    w, _, x = problem
    logs = log_softmax(outputs_of(w, x))
    scores = jacobian(lambda v: log_softmax(outputs_of(v, x)), w)
    expected = np.einsum("nk,nkp,nkq->pq", np.exp(logs), scores, scores)
    expected /= EXAMPLES
    np.testing.assert_allclose(gauss_newton(w, x), expected, **EXACT)
    matrices = [
        w[:SPLIT].reshape(INPUTS, HIDDEN),
        w[SPLIT:].reshape(HIDDEN, CLASSES),
    ]
    network = Network(matrices, [False, False], [Linear(0, "tanh"), Linear(1)])
    term = Term("categorical", np.full((EXAMPLES, 1), 1 / EXAMPLES))
    dense = fisher.dense(network.trace(x), [term])
    np.testing.assert_allclose(dense, expected, **EXACT)


@pytest.mark.parametrize(
    ("head", "examples", "rank"),
    [
        ("normal", 1, CLASSES),
        ("categorical", 1, CLASSES - 1),
        ("normal", 40, SIZE),
        # The shift of all logits, once per hidden unit, changes nothing.
        ("categorical", 40, SIZE - HIDDEN),
    ],
)
def test_rank_of_the_fisher(problem, head, examples, rank):
    """Cross Validated 580509: `F_θ` has rank dim η and is never full.

    That is one example with an invertible F_η; a batch reaches full rank.
    """
    w, _, _ = problem
    x = np.random.default_rng(1).normal(size=(examples, INPUTS))
    j = jacobian(lambda v: outputs_of(v, x), w)
    z = outputs_of(w, x)
    h = heads.fisher(Term(head, np.ones((examples, 1))), z)
    matrix = np.einsum("nkp,nkl,nlq->pq", j, h, j) / examples
    values = np.linalg.eigvalsh(matrix)
    assert np.sum(values > 1e-10 * values[-1]) == rank


def test_one_changed_backward_pass_is_the_pseudo_inverse(problem):
    """Cross Validated 580509, "naive implementation".

    For one example, `(GᵀG)⁻¹ F_η⁻¹ g_η` sent back in place of g_η gives
    `F_θ⁺ g_θ`.
    """
    w, _, x = problem
    rng = np.random.default_rng(2)
    root = rng.normal(size=(CLASSES, CLASSES))
    f_eta = root @ root.T + np.eye(CLASSES)
    g_eta = rng.normal(size=CLASSES)
    j = jacobian(lambda v: outputs_of(v, x[:1]), w)[0]
    sent = np.linalg.solve(j @ j.T, np.linalg.solve(f_eta, g_eta))
    weights = tf.constant(w)
    with tf.GradientTape() as tape:
        tape.watch(weights)
        outputs = tensor_outputs(weights, x[:1])
    found = tape.gradient(outputs, weights, tf.constant(sent[np.newaxis]))
    matrix = j.T @ f_eta @ j
    expected = np.linalg.pinv(matrix, rcond=1e-10) @ (j.T @ g_eta)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)


# -- The Hessian of a composition ----------------------------------------


def test_hessian_of_a_composition(problem):
    """Gebotys: `∇²ρ_pull = Jᵀ H J + Σ_a ∂ρ/∂z_a ∇² f_a`, at any w′.

    The first term alone is the Hessian only where `∂ρ/∂z` is zero.
    """
    w, other, x = problem
    _, slope, bend = pulled_back(w, x)(other)
    p, q = (np.exp(log_softmax(outputs_of(v, x))) for v in (w, other))
    j = jacobian(lambda v: outputs_of(v, x), other)
    np.testing.assert_allclose(
        slope, np.einsum("nkp,nk->p", j, q - p) / EXAMPLES, **EXACT
    )
    first = gauss_newton(other, x)
    second = np.einsum("nk,nkpq->pq", q - p, second_derivatives(other, x))
    second /= EXAMPLES
    np.testing.assert_allclose(bend, first + second, **EXACT)
    assert np.linalg.norm(second) > 0.1 * np.linalg.norm(first)


def test_pullback_at_the_same_weights(problem):
    """Gebotys: value and gradient are zero, and the Hessian is F."""
    w, _, x = problem
    value, slope, bend = pulled_back(w, x)(w)
    np.testing.assert_allclose(value, 0, atol=1e-15)
    np.testing.assert_allclose(slope, 0, atol=1e-15)
    np.testing.assert_allclose(bend, gauss_newton(w, x), **EXACT)


def test_pullback_is_quadratic_up_to_order_three(problem):
    """Gebotys: `ρ_pull ≈ ½ (w − w′)ᵀ F (w − w′)`; slope 3 in log-log."""
    w, other, x = problem
    matrix = gauss_newton(w, x)
    remainders = []
    for length in (0.02, 0.01):
        d = length * (other - w)
        exact = divergence(w, w + d, x)
        remainders.append(abs(exact - 0.5 * d @ matrix @ d))
    slope = np.log2(remainders[0] / remainders[1])
    np.testing.assert_allclose(slope, 3, atol=0.05)


def test_gradient_of_the_divergence_in_probabilities_is_not_zero(problem):
    """Gebotys takes `∇_z ρ = 0` with z "a probability distribution".

    In probabilities `∇_z′ KL(z ‖ z′) = −z / z′` is −1 everywhere at z′ = z.
    Only its pullback vanishes, as probabilities add up to 1; so does that of
    `H_z = diag 1/z`, the Fisher in z, agree with the one through the logits.
    In logits the statement holds as it stands.
    """
    w, _, x = problem
    z = outputs_of(w, x)
    p = np.exp(log_softmax(z))
    through = jacobian(lambda v: np.exp(log_softmax(outputs_of(v, x))), w)
    _, slope, bend = hessian_of(
        lambda q: tf.reduce_sum(p * (np.log(p) - tf.math.log(q))), p
    )
    np.testing.assert_allclose(slope, -1, **EXACT)
    np.testing.assert_allclose(
        np.einsum("nkp,nk->np", through, slope), 0, atol=1e-14
    )
    own = np.einsum("nknl->nkl", bend)
    # E[s sᵀ] with the score e_k / z_k of the label k.
    scores = np.eye(CLASSES) / p[:, :, np.newaxis]
    expected = np.einsum("nk,nki,nkj->nij", p, scores, scores)
    np.testing.assert_allclose(own, expected, **EXACT)
    matrix = np.einsum("nkp,nkl,nlq->pq", through, own, through) / EXAMPLES
    np.testing.assert_allclose(matrix, gauss_newton(w, x), **EXACT)
    _, slope, _ = hessian_of(
        lambda v: tf.reduce_sum(
            p * (np.log(p) - tf.nn.log_softmax(v, axis=-1))
        ),
        z,
    )
    np.testing.assert_allclose(slope, 0, atol=1e-14)


def test_fisher_is_not_the_hessian_of_the_loss(problem):
    """Kristiadi: F as "drop-in replacement" of the Hessian.

    The Hessian of the cross-entropy has `Σ_a (q − y)_a ∇² f_a` besides, and
    negative eigenvalues; F has none.
    """
    w, _, x = problem
    labels = np.eye(CLASSES)[[0, 2, 1, 1]]
    _, _, bend = hessian_of(
        lambda v: tf.reduce_mean(
            tf.nn.softmax_cross_entropy_with_logits(
                labels, tensor_outputs(v, x)
            )
        ),
        w,
    )
    q = np.exp(log_softmax(outputs_of(w, x)))
    second = np.einsum("nk,nkpq->pq", q - labels, second_derivatives(w, x))
    second /= EXAMPLES
    matrix = gauss_newton(w, x)
    np.testing.assert_allclose(bend, matrix + second, **EXACT)
    largest = np.linalg.eigvalsh(bend)[-1]
    assert np.linalg.eigvalsh(bend)[0] < -0.05 * largest
    assert np.linalg.eigvalsh(matrix)[0] > -1e-14 * largest
