"""What every head must satisfy, against exact NumPy expectations."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_natgrad import heads

from .reference import CASES, Case

all_heads = pytest.mark.parametrize(
    "case", CASES, ids=[case.name for case in CASES]
)


def assert_close(actual, expected, tolerance=1e-12):
    np.testing.assert_allclose(
        np.asarray(actual), expected, rtol=tolerance, atol=tolerance
    )


def factor(case: Case):
    """The dense factor `[2, 3, K, R]`, one product per column."""
    rank = case.head.factor_rank(case.outputs.shape[-1])
    columns = [
        case.head.fisher_factor_product(
            case.outputs, np.tile(column, (*case.outputs.shape[:-1], 1))
        )
        for column in np.eye(rank)
    ]
    return np.stack(columns, axis=-1)


def vectors(case: Case):
    return np.random.default_rng(1).normal(size=case.outputs.shape)


def matvec(matrix, vector):
    return np.einsum("...ij,...j->...i", matrix, vector)


@all_heads
def test_log_prob_is_that_of_the_distribution(case):
    targets = case.targets()
    expected = case.each(case.log_prob, targets)
    assert_close(case.head.log_prob(case.outputs, targets), expected)
    distribution = case.head.distribution(tf.constant(case.outputs))
    assert_close(distribution.log_prob(targets), expected)


@all_heads
def test_score_is_the_gradient_of_log_prob(case):
    targets = case.targets()
    expected = case.each(case.score, targets)
    assert_close(case.head.score(case.outputs, targets), expected)
    by_autodiff = heads.Head.score(case.head, case.outputs, targets)
    assert_close(by_autodiff, expected)


@all_heads
def test_fisher_is_the_expected_outer_product_of_scores(case):
    fisher = case.head.fisher(case.outputs)
    assert fisher.dtype == tf.float64
    assert_close(fisher, case.fisher())


@pytest.mark.parametrize(
    "case",
    # TensorFlow Probability knows no divergence of von Mises–Fisher vectors.
    [case for case in CASES if case.name != "von_mises_fisher"],
    ids=lambda c: c.name,
)
def test_fisher_is_the_hessian_of_the_kl_divergence(case):
    for eta, expected in zip(case.outputs[0], case.fisher()[0], strict=True):
        # Another tensor: the tapes must not watch the fixed distribution.
        fixed = case.head.distribution(tf.constant(eta))
        eta = tf.constant(eta)
        with tf.GradientTape(persistent=True) as outer:
            outer.watch(eta)
            with tf.GradientTape() as inner:
                inner.watch(eta)
                divergence = fixed.kl_divergence(case.head.distribution(eta))
            gradient = inner.gradient(divergence, eta)
        hessian = outer.jacobian(gradient, eta, experimental_use_pfor=False)
        assert_close(gradient, np.zeros_like(gradient))
        assert_close(hessian, expected)


@all_heads
def test_factor_times_its_transpose_is_the_fisher_matrix(case):
    dense = factor(case)
    assert_close(dense @ dense.swapaxes(-1, -2), case.fisher())


@all_heads
def test_transpose_product_is_the_adjoint_of_the_product(case):
    vector = vectors(case)
    expected = matvec(factor(case).swapaxes(-1, -2), vector)
    actual = case.head.fisher_factor_transpose_product(case.outputs, vector)
    assert_close(actual, expected)


@all_heads
def test_fisher_vector_product(case):
    vector = vectors(case)
    expected = matvec(case.fisher(), vector)
    head, outputs = case.head, case.outputs
    assert_close(head.fisher_vector_product(outputs, vector), expected)
    assert_close(
        head.fisher_factor_product(
            outputs, head.fisher_factor_transpose_product(outputs, vector)
        ),
        expected,
    )


@all_heads
def test_random_signs_propagate_the_fisher_matrix(case):
    # E[L ε εᵀ Lᵀ] = F, the mean over all sign patterns.
    rank = case.head.factor_rank(case.outputs.shape[-1])
    signs = list(itertools.product([-1.0, 1.0], repeat=rank))
    total = 0.0
    for epsilon in signs:
        epsilon = np.tile(epsilon, (*case.outputs.shape[:-1], 1))
        u = case.head.fisher_factor_product(case.outputs, epsilon).numpy()
        total = total + u[..., :, None] * u[..., None, :]
    assert_close(total / len(signs), case.fisher())


@all_heads
def test_natural_gradient_is_the_pseudo_inverse(case):
    gradient = vectors(case)
    inverse = np.linalg.pinv(case.fisher(), rcond=1e-10, hermitian=True)
    expected = matvec(inverse, gradient)
    actual = case.head.natural_gradient(case.outputs, gradient)
    assert_close(actual, expected, 1e-10)
    by_eigh = heads.Head.natural_gradient(case.head, case.outputs, gradient)
    assert_close(by_eigh, expected, 1e-10)


@all_heads
def test_leading_axes_of_a_vector_broadcast(case):
    eye = np.eye(case.head.factor_rank(case.outputs.shape[-1]))
    rows = case.head.fisher_factor_product(case.outputs[..., None, :], eye)
    expected = factor(case).swapaxes(-1, -2)
    assert_close(np.broadcast_to(rows, expected.shape), expected)


@all_heads
def test_samples_follow_the_distribution(case):
    # n = 4000 draws; a mean deviates by 5 standard errors once in 10⁶.
    n, eta = 4000, case.outputs[1, 2]
    draws = case.head.sample(np.tile(eta, (n, 1)), [3, 4]).numpy()
    again = case.head.sample(np.tile(eta, (n, 1)), [3, 4]).numpy()
    np.testing.assert_array_equal(draws, again)
    other = case.head.sample(np.tile(eta, (n, 1)), [3, 5]).numpy()
    assert (draws != other).any()
    support = case.support(eta)
    targets = np.array([target for target, _ in support], float)
    weights = np.array([weight for _, weight in support])
    for power in (1, 2):
        moment = np.tensordot(weights, targets**power, axes=1)
        # The fourth moment of a normal needs more nodes: bound it by 3 σ⁴.
        spread = np.tensordot(weights, targets ** (2 * power), axes=1)
        bound = 5.0 * np.sqrt(2.0 * spread / n)
        error = np.abs(np.mean(draws.astype(float) ** power, axis=0) - moment)
        assert np.all(error <= bound)


@all_heads
def test_sampled_scores_have_mean_zero(case):
    # n = 4000 draws; the standard error of a mean score is √(F_kk / n).
    n, eta = 4000, case.outputs[0, 1]
    outputs = np.tile(eta, (n, 1))
    draws = case.head.sample(outputs, tf.constant([5, 6], tf.int64))
    mean = np.mean(case.head.score(outputs, draws), axis=0)
    error = np.sqrt(np.diag(case.fisher()[0, 1]) / n)
    assert np.all(np.abs(mean) <= 5.0 * error)


@all_heads
def test_samples_lie_in_the_support(case):
    targets = case.head.sample(case.outputs, [0, 1])
    case.head.validate_targets(case.outputs, targets)
    assert bool(case.head.targets_in_support(case.outputs, targets))


def everything(head, outputs, targets):
    return {
        "possible": head.targets_in_support(outputs, targets),
        "log_prob": head.log_prob(outputs, targets),
        "score": head.score(outputs, targets),
        "autodiff": heads.Head.score(head, outputs, targets),
        "fisher": head.fisher(outputs),
        "natural_gradient": head.natural_gradient(outputs, outputs),
    }


@pytest.mark.variants(
    "normal-graph", "categorical_unnormalised-graph", "ordered_logistic-graph"
)
@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize(
    "case",
    [CASES[0], CASES[1], CASES[3], *CASES[6:]],
    ids=lambda c: c.name,
)
def test_eager_and_compiled_results_agree(case, jit_compile):
    head, outputs = case.head, case.outputs
    seed = tf.constant([7, 8])

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None, outputs.shape[-1]], tf.float64),
            tf.TensorSpec([None] * case.targets().ndim),
        ],
        jit_compile=jit_compile,
    )
    def compiled(outputs, targets):
        draws = [head.sample(outputs, seed) for _ in range(2)]
        return everything(head, outputs, targets), draws

    targets = case.targets().astype("float32")
    expected = everything(head, outputs, targets)
    actual, draws = compiled(outputs, targets)
    by_eigh = type(head).natural_gradient is heads.Head.natural_gradient
    for name, value in actual.items():
        # XLA's eigh iterates to 1e-8 or so, in float64 as well.
        by_xla = jit_compile and by_eigh and name == "natural_gradient"
        tolerance = 1e-7 if by_xla else 1e-12
        np.testing.assert_allclose(
            np.asarray(value, float),
            np.asarray(expected[name], float),
            rtol=tolerance,
            atol=tolerance,
            err_msg=name,
        )
    # TensorFlow's stateless generator differs between devices and compilers:
    # draws are reproducible within a compiled step, not across modes.
    np.testing.assert_array_equal(draws[0], draws[1])
    head.validate_targets(outputs, draws[0])
    if not jit_compile:
        np.testing.assert_array_equal(draws[0], head.sample(outputs, seed))


@pytest.mark.variants(12)
@all_heads
@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_half_precision_is_computed_in_float32(case, dtype):
    outputs = tf.cast(case.outputs, dtype)
    targets = case.targets()
    expected = everything(case.head, tf.cast(outputs, tf.float32), targets)
    actual = everything(case.head, outputs, targets)
    assert bool(actual.pop("possible"))
    for name, value in actual.items():
        assert value.dtype == tf.float32, name
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


EXTREMES = {
    "bernoulli_logits": [[50.0, -50.0, 0.0], [1e4, -1e4, 0.0]],
    "bernoulli_probabilities": [[0.0, 1.0, 0.5], [1e-30, 1.0, 0.0]],
    "categorical_logits": [[50.0, -50.0, 0.0], [1e4, -1e4, 0.0]],
    "categorical_simplex": [[1.0, 0.0, 0.0], [0.5, 0.5, 1e-30]],
    "ordered_logistic": [[50.0, -50.0, 0.0], [-1e4, 1e4, -20.0]],
    "von_mises_fisher": [[0.0, 0.0, 0.0], [1e3, -1e-30, 0.0]],
}


@pytest.mark.variants("bernoulli_logits")
@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name in EXTREMES],
    ids=lambda c: c.name,
)
def test_saturated_float32_outputs_give_finite_values(case):
    outputs = tf.constant(EXTREMES[case.name], tf.float32)
    # Eight targets are all but for the sphere.
    for target, _ in case.support(np.full(3, 1.0 / 3.0))[:8]:
        targets = tf.stack([target, target])
        results = everything(case.head, outputs, targets)
        results["step"] = case.head.natural_gradient(outputs, results["score"])
        results["factor"] = case.head.fisher_factor_product(
            outputs, tf.ones([2, case.head.factor_rank(3)])
        )
        for name, value in results.items():
            assert np.all(np.isfinite(np.asarray(value, float))), name
        np.testing.assert_allclose(
            results["score"], results["autodiff"], rtol=1e-5, atol=1e-6
        )


@all_heads
def test_head_survives_saving(case):
    restored = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(case.head)
    )
    assert restored == case.head
    assert repr(restored) == repr(case.head)


# Heads of any number of outputs.
ANY_SIZE = [
    case.head
    for case in CASES
    if case.name
    not in ("ordered_logistic_given", "multivariate_normal_diag", "joint")
]


@settings(max_examples=10, deadline=None)
@given(
    leading=st.lists(st.integers(1, 3), max_size=3),
    size=st.integers(2, 5),
    index=st.integers(0, len(ANY_SIZE) - 1),
)
def test_shapes(leading, size, index):
    head = ANY_SIZE[index]
    outputs = np.random.default_rng(2).uniform(0.1, 0.9, (*leading, size))
    targets = head.sample(outputs, [0, 0])
    assert head.log_prob(outputs, targets).shape == leading
    assert head.score(outputs, targets).shape == outputs.shape
    assert head.fisher(outputs).shape == (*outputs.shape, size)
    assert head.natural_gradient(outputs, outputs).shape == outputs.shape
    fisher = head.fisher(outputs).numpy()
    assert_close(
        head.fisher_vector_product(outputs, outputs), matvec(fisher, outputs)
    )
    head.validate(outputs.shape)
