"""The natural chain rule: what it guarantees, and where it breaks."""

import doctest

import numpy as np
import pytest
import tensorflow as tf

from examples import natural_chain

EXACT = dict(rtol=0, atol=1e-12)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def homogeneous(inputs):
    return np.hstack([inputs, np.ones_like(inputs[:, :1])])


def joint_jacobian(inputs, kernel, units):
    """Of vec(Z) in (vec W̄, vec H), both row-major; of W̄ without a kernel."""
    weights = np.kron(inputs, np.eye(units))
    if kernel is None:
        return weights
    return np.hstack([weights, np.kron(np.eye(len(inputs)), kernel.T)])


def flat(parts):
    return np.concatenate([np.ravel(p) for p in parts if p is not None])


# -- Single operations ---------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (3, 3), (2, 4, 7)])
def test_right_inverse_is_the_pseudo_inverse(rng, shape):
    jacobian, n = rng.normal(size=shape), rng.normal(size=shape[:-1])
    found = natural_chain.right_inverse(jacobian, n)
    expected = np.linalg.pinv(jacobian) @ n[..., np.newaxis]
    np.testing.assert_allclose(found, expected[..., 0], **EXACT)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (2, 4, 7)])
def test_damped_right_inverse_is_its_formula(rng, shape):
    jacobian, n = rng.normal(size=shape), rng.normal(size=shape[:-1])
    transposed = np.swapaxes(jacobian, -1, -2)
    bend = jacobian @ transposed + 0.3 * np.eye(shape[-2])
    expected = transposed @ np.linalg.solve(bend, n[..., np.newaxis])
    found = natural_chain.right_inverse(jacobian, n, damping=0.3)
    np.testing.assert_allclose(found, expected[..., 0], **EXACT)


@pytest.mark.parametrize("damping", [0.0, 1e-9, 1e-3, 1e3])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_right_inverse_keeps_small_directions_in_float32(rng, shape, damping):
    """Singular values 1, 1e-3 and 1e-5, against float64."""
    u = np.linalg.qr(rng.normal(size=(shape[0], 3)))[0]
    v = np.linalg.qr(rng.normal(size=(shape[1], 3)))[0]
    values = np.array([1.0, 1e-3, 1e-5])
    jacobian = np.float32((u * values) @ v.T)
    n = np.float32(u @ values)
    # float32 rounds the small directions of the matrix as well: from it.
    u, values, vt = np.linalg.svd(jacobian.astype(float), full_matrices=False)
    expected = vt.T @ (values / (values**2 + damping) * (u.T @ n))
    found = natural_chain.right_inverse(jacobian, n, damping)
    size = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=0.05 * size)


def test_right_inverse_of_sizes_whose_squares_are_no_numbers():
    jacobian = np.diag(np.float32([1e-23, 1e-24]))
    found = natural_chain.right_inverse(jacobian, np.float32([1e-23, 1e-23]))
    np.testing.assert_allclose(found, [1.0, 10.0], rtol=1e-5)
    found = natural_chain.right_inverse(
        np.diag(np.float32([1e25, 1e24])), np.float32([1e25, 1e25]), 1.0
    )
    np.testing.assert_allclose(found, [1.0, 10.0], rtol=1e-5)
    nothing = natural_chain.right_inverse(np.zeros([2, 3]), np.ones(2))
    np.testing.assert_array_equal(nothing, np.zeros(3))


def test_elementwise_of_sizes_whose_squares_are_no_numbers():
    slope = np.float32([1e-23, 1e20, 0.0, 1e-23])
    n = np.float32([1e-23, 1e20, 1.0, 0.0])
    found = natural_chain.elementwise(slope, n)
    np.testing.assert_allclose(found, [1.0, 1.0, 0.0, 0.0], rtol=1e-6)
    damped = natural_chain.elementwise(slope, n, damping=1.0)
    np.testing.assert_allclose(damped, [0.0, 1.0, 0.0, 0.0], rtol=1e-6)


def test_product_of_sizes_whose_squares_are_no_numbers():
    a, b, n = np.float32([[1e20, 1e-23], [1.0, 1e-23], [1e20, 1e-23]])
    n_a, n_b = natural_chain.product(a, b, n)
    np.testing.assert_allclose(n_a, [1e-20, 0.5], rtol=1e-6)
    np.testing.assert_allclose(n_b, [1.0, 0.5], rtol=1e-6)


@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_product_rule(rng, damping):
    a, b, n = rng.normal(size=(3, 5))
    n_a, n_b = natural_chain.product(a, b, n, damping)
    bend = a**2 + b**2 + damping
    np.testing.assert_allclose(n_a, b * n / bend, rtol=1e-14)
    np.testing.assert_allclose(n_b, a * n / bend, rtol=1e-14)
    for i in range(5):
        both = natural_chain.right_inverse([[b[i], a[i]]], [n[i]], damping)
        np.testing.assert_allclose(both, [n_a[i], n_b[i]], rtol=1e-12)


def test_product_of_zeros_reaches_nothing():
    zeros, ones = np.zeros(2), np.ones(2)
    for part in natural_chain.product(zeros, zeros, ones):
        np.testing.assert_array_equal(part, zeros)


@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_elementwise_rule(rng, damping):
    slope, n = rng.normal(size=(2, 4))
    found = natural_chain.elementwise(slope, n, damping)
    expected = natural_chain.right_inverse(np.diag(slope), n, damping)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(
        found, slope * n / (slope**2 + damping), rtol=1e-14
    )


# -- Dense layers --------------------------------------------------------

SIZES = {
    "more inputs than examples": (4, 6, 3),
    "more examples than inputs": (9, 3, 2),
    "more outputs than inputs": (9, 2, 5),
    "one example": (1, 3, 2),
}


def layer(rng, sizes, repeated=False):
    examples, inputs, units = sizes
    h = rng.normal(size=(examples, inputs))
    if repeated:
        h[-1] = h[0]
    kernel = rng.normal(size=(inputs, units))
    return h, kernel, rng.normal(size=(examples, units))


@pytest.mark.parametrize("trained_inputs", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("repeated", [True, False])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_dense_is_the_joint_pseudo_inverse(
    rng, sizes, repeated, use_bias, trained_inputs
):
    h, kernel, n = layer(rng, sizes, repeated)
    kernel = kernel if trained_inputs else None
    extended = homogeneous(h) if use_bias else h
    jacobian = joint_jacobian(extended, kernel, n.shape[1])
    expected = np.linalg.pinv(jacobian, rcond=1e-10) @ n.ravel()
    found = natural_chain.dense(h, kernel, n, use_bias)
    assert (found.bias is None) == (not use_bias)
    assert (found.inputs is None) == (not trained_inputs)
    np.testing.assert_allclose(flat(found), expected, **EXACT)


@pytest.mark.parametrize("trained_inputs", [True, False])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_damped_dense_is_the_joint_formula(rng, sizes, trained_inputs):
    h, kernel, n = layer(rng, sizes)
    kernel = kernel if trained_inputs else None
    jacobian = joint_jacobian(homogeneous(h), kernel, n.shape[1])
    bend = jacobian @ jacobian.T + 0.3 * np.eye(n.size)
    expected = jacobian.T @ np.linalg.solve(bend, n.ravel())
    found = natural_chain.dense(h, kernel, n, damping=0.3)
    np.testing.assert_allclose(flat(found), expected, **EXACT)


def test_dense_fulfils_a_request_within_reach(rng):
    h, kernel, n = layer(rng, (4, 6, 3))
    found = natural_chain.dense(h, kernel, n)
    made = h @ found.kernel + found.bias + found.inputs @ kernel
    np.testing.assert_allclose(made, n, **EXACT)


def test_dense_in_float32(rng):
    arguments = layer(rng, (9, 3, 2))
    exact = flat(natural_chain.dense(*arguments))
    single = natural_chain.dense(*(x.astype("float32") for x in arguments))
    assert single.kernel.dtype == single.inputs.dtype == tf.float32
    assert np.linalg.norm(flat(single) - exact) < 1e-5 * np.linalg.norm(exact)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_graph_with_a_dynamic_batch(rng, jit_compile):
    """XLA's decompositions on CPUs are accurate to about 1e-7."""
    spec = [tf.TensorSpec(s, tf.float64) for s in ([None, 3], [3, 2])]
    rule = tf.function(
        natural_chain.dense,
        input_signature=[*spec, tf.TensorSpec([None, 2], tf.float64)],
        jit_compile=jit_compile,
    )
    tolerance = 1e-6 if jit_compile else 1e-12
    h, kernel, n = layer(rng, (5, 3, 2), repeated=True)
    expected = flat(natural_chain.dense(h, kernel, n))
    np.testing.assert_allclose(
        flat(rule(h, kernel, n)), expected, rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_rules_of_single_operations_compile(rng, damping):
    rows = tf.TensorSpec([None, 3], tf.float64)

    @tf.function(input_signature=[rows] * 3, jit_compile=True)
    def rules(a, b, n):
        first, second = natural_chain.product(a, b, n, damping)
        third = natural_chain.elementwise(a, n, damping)
        return (
            first,
            second,
            third,
            natural_chain.right_inverse(a, n[:, 0], damping),
        )

    a, b, n = rng.normal(size=(3, 2, 3))
    found = flat(rules(a, b, n))
    expected = flat(rules.python_function(a, b, n))
    tolerance = 1e-12 if damping else 1e-6
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


# -- Composition ---------------------------------------------------------


def composed_step(kernels, x, n, slope_of=lambda h: 1 - h**2, act=np.tanh):
    """Increments of every layer without bias, sent back op by op."""
    hidden = [x]
    for kernel in kernels[:-1]:
        hidden.append(act(hidden[-1] @ kernel))
    found = []
    for index in reversed(range(len(kernels))):
        kernel = kernels[index] if index else None
        change = natural_chain.dense(hidden[index], kernel, n, use_bias=False)
        found.append(change.kernel.numpy())
        if index:
            slope = slope_of(hidden[index])
            n = natural_chain.elementwise(slope, change.inputs).numpy()
    return flat(reversed(found))


def total_jacobian(kernels, x, slope_of=lambda h: 1 - h**2, act=np.tanh):
    """Of vec(η) in all kernels, by the chain rule in NumPy."""
    hidden = [x]
    for kernel in kernels[:-1]:
        hidden.append(act(hidden[-1] @ kernel))
    examples, units = len(x), kernels[-1].shape[1]
    back = np.broadcast_to(np.eye(units), (examples, units, units))
    parts = []
    for index in reversed(range(len(kernels))):
        part = np.einsum("in,ikm->iknm", hidden[index], back)
        parts.append(part.reshape(examples * units, -1))
        if index:
            back = back @ kernels[index].T
            back = back * slope_of(hidden[index])[:, np.newaxis]
    return np.hstack(parts[::-1])


def network(rng, sizes):
    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    return [rng.normal(size=pair) / np.sqrt(pair[0]) for pair in pairs]


@pytest.mark.parametrize("examples", [1, 4])
def test_composition_makes_the_requested_change(rng, examples):
    kernels = network(rng, (6, 5, 3))
    x, n = rng.normal(size=(examples, 6)), rng.normal(size=(examples, 3))
    step = composed_step(kernels, x, n)
    made = total_jacobian(kernels, x) @ step
    np.testing.assert_allclose(made, n.ravel(), **EXACT)


@pytest.mark.parametrize("examples", [1, 4])
def test_composition_is_not_the_pseudo_inverse(rng, examples):
    """A right inverse of J, but longer than the shortest."""
    kernels = network(rng, (6, 5, 3))
    x, n = rng.normal(size=(examples, 6)), rng.normal(size=(examples, 3))
    step = composed_step(kernels, x, n)
    shortest = np.linalg.pinv(total_jacobian(kernels, x)) @ n.ravel()
    assert np.linalg.norm(step) > 1.01 * np.linalg.norm(shortest)
    # The excess lies in the null space of J.
    np.testing.assert_allclose(shortest @ (step - shortest), 0, **EXACT)


@pytest.mark.parametrize(
    ("outer", "inner", "equal"),
    [
        ("wide", "orthogonal", True),
        ("square", "wide", True),
        ("wide", "square", False),
        ("wide", "wide", False),
    ],
)
def test_when_two_pseudo_inverses_compose(rng, outer, inner, equal):
    """`(J_o J_i)⁺ = J_i⁺ J_o⁺` where J_i J_iᵀ keeps the range of J_oᵀ."""
    j_o = rng.normal(size=(4, 4) if outer == "square" else (2, 4))
    j_i = rng.normal(size=(4, 4) if inner == "square" else (4, 7))
    if inner == "orthogonal":
        j_i = np.linalg.qr(j_i.T)[0].T
    n = rng.normal(size=len(j_o))
    between = natural_chain.right_inverse(j_o, n)
    step = natural_chain.right_inverse(j_i, between).numpy()
    shortest = np.linalg.pinv(j_o @ j_i) @ n
    np.testing.assert_allclose(j_o @ j_i @ step, n, **EXACT)
    image = j_i @ j_i.T @ j_o.T
    kept = np.linalg.pinv(j_o) @ j_o @ image
    assert np.allclose(kept, image, rtol=0, atol=1e-12) == equal
    if equal:
        np.testing.assert_allclose(step, shortest, **EXACT)
    else:
        assert np.linalg.norm(step - shortest) > 0.1 * np.linalg.norm(shortest)


# -- Where it breaks -----------------------------------------------------


def test_bottleneck_makes_the_nearest_change_only(rng):
    """Width 1 and 4 examples; the joint step comes nearer than the rule."""
    kernels = network(rng, (3, 1, 2))
    x, n = rng.normal(size=(4, 3)), rng.normal(size=(4, 2))
    hidden = np.tanh(x @ kernels[0])
    # The last layer alone: least squares, not the request.
    change = natural_chain.dense(hidden, kernels[1], n, use_bias=False)
    made = hidden @ change.kernel + change.inputs @ kernels[1]
    missing = np.ravel(made - n)
    assert np.linalg.norm(missing) > 0.1 * np.linalg.norm(n)
    jacobian = joint_jacobian(hidden, kernels[1], 2)
    np.testing.assert_allclose(jacobian.T @ missing, 0, **EXACT)
    # The network: not even least squares.
    jacobian = total_jacobian(kernels, x)
    step = composed_step(kernels, x, n)
    best = np.linalg.pinv(jacobian, rcond=1e-10) @ n.ravel()
    errors = [np.linalg.norm(jacobian @ s - n.ravel()) for s in (step, best)]
    assert errors[0] > 1.01 * errors[1]


def test_fan_out_asks_for_the_mean(rng):
    """For y = (x, x) summed requests move x twice as far."""
    requests = rng.normal(size=(2, 3))
    stacked = np.vstack([np.eye(3), np.eye(3)])
    joint = natural_chain.right_inverse(stacked, requests.ravel())
    np.testing.assert_allclose(joint, requests.mean(axis=0), **EXACT)
    alone = [natural_chain.right_inverse(np.eye(3), r) for r in requests]
    np.testing.assert_allclose(sum(alone), 2 * joint, **EXACT)


def test_dead_relu_leaves_its_share_undone(rng):
    """The live units could make the change, but are not asked to."""
    kernels = network(rng, (3, 6, 2))
    x, n = rng.normal(size=(1, 3)), rng.normal(size=(1, 2))
    relu = dict(act=lambda z: np.maximum(z, 0), slope_of=lambda h: np.sign(h))
    alive = x @ kernels[0] > 0
    assert 2 <= alive.sum() <= 4
    change = natural_chain.dense(
        np.maximum(x @ kernels[0], 0), kernels[1], n, use_bias=False
    )
    sent = natural_chain.elementwise(alive.astype(float), change.inputs)
    np.testing.assert_array_equal(sent.numpy()[~alive], 0)
    assert np.all(change.inputs.numpy()[~alive] != 0)
    jacobian = total_jacobian(kernels, x, **relu)
    made = jacobian @ composed_step(kernels, x, n, **relu)
    assert np.linalg.norm(made - n.ravel()) > 0.05 * np.linalg.norm(n)
    reached = jacobian @ np.linalg.pinv(jacobian) @ n.ravel()
    np.testing.assert_allclose(reached, n.ravel(), **EXACT)


def test_rules_of_single_examples_do_not_add_up(rng):
    """Shared weights: neither the sum nor the mean makes the change."""
    h, n = rng.normal(size=(4, 6)), rng.normal(size=(4, 3))
    alone = [
        natural_chain.dense(h[i : i + 1], None, n[i : i + 1], use_bias=False)
        for i in range(4)
    ]
    total = sum(change.kernel.numpy() for change in alone)
    for kernel in (total, total / 4):
        assert np.linalg.norm(h @ kernel - n) > 0.3 * np.linalg.norm(n)
    joint = natural_chain.dense(h, None, n, use_bias=False)
    np.testing.assert_allclose(h @ joint.kernel, n, **EXACT)


# -- Arguments -----------------------------------------------------------

MATRIX, VECTOR = np.ones((2, 3)), np.ones(2)

BAD = {
    "vector for a Jacobian": (
        lambda: natural_chain.right_inverse(VECTOR, VECTOR),
        r"Received: jacobian.shape=\(2,\), increment.shape=\(2,\)",
    ),
    "request of another length": (
        lambda: natural_chain.right_inverse(MATRIX, np.ones(3)),
        r"increment.shape=\(3,\)",
    ),
    "negative damping": (
        lambda: natural_chain.right_inverse(MATRIX, VECTOR, -0.1),
        "Received: damping=-0.1",
    ),
    "damping that is no number": (
        lambda: natural_chain.elementwise(VECTOR, VECTOR, float("nan")),
        "Received: damping=nan",
    ),
    "damping that is a text": (
        lambda: natural_chain.elementwise(VECTOR, VECTOR, "x"),
        "Received: damping='x'",
    ),
    "integers": (
        lambda: natural_chain.elementwise(np.ones(2, int), VECTOR),
        "Received: derivative.dtype='int64'",
    ),
    "mixed dtypes": (
        lambda: natural_chain.product(VECTOR, VECTOR.astype("f4"), VECTOR),
        "Received: b.dtype='float32'",
    ),
    "broadcast factor": (
        lambda: natural_chain.product(VECTOR, np.ones(1), VECTOR),
        r"Received: a.shape=\(2,\), b.shape=\(1,\)",
    ),
    "broadcast slope": (
        lambda: natural_chain.elementwise(np.ones(1), VECTOR),
        r"Received: derivative.shape=\(1,\)",
    ),
    "kernel that does not fit": (
        lambda: natural_chain.dense(MATRIX, MATRIX, MATRIX),
        r"kernel.shape=\(2, 3\)",
    ),
    "other number of examples": (
        lambda: natural_chain.dense(MATRIX, None, np.ones((3, 1))),
        r"kernel.shape=None, increment.shape=\(3, 1\)",
    ),
    "sequences": (
        lambda: natural_chain.dense(MATRIX[None], None, MATRIX),
        r"inputs.shape=\(1, 2, 3\)",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_example_prints_what_it_finds(capsys):
    error, length, shortest = natural_chain.main(examples=4, seed=0)
    assert error < 1e-12 and length > 1.01 * shortest
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        f"Length, op by op: {length:.4f}",
        f"Length of the shortest step: {shortest:.4f}",
    ]


def test_docstrings():
    found = doctest.testmod(natural_chain)
    assert found.attempted and not found.failed
