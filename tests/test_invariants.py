"""Invariants that software for natural gradients should satisfy.

One test (or a few) per invariant, numbered as in the survey of the field that
the design rests on; the source of each is named above it. Those on
input-only, convolutional and dual (kernel) methods come
with these methods.
"""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from keras_natgrad.blocks import BlockShape, create
from keras_natgrad.curvature import OutputTerm, fisher_gram
from keras_natgrad.linalg import damped_inverse
from keras_natgrad.step import QuadraticStep, quadratic_coefficients
from tests.reference import fisher as reference
from tests.reference import heads as reference_heads
from tests.reference.bridge import (
    dense_layers,
    matrix_of,
    mlp,
    network_of,
    randomize,
)
from tests.reference.heads import Term

pytestmark = pytest.mark.usefixtures("float64")

HEADS = {
    "normal": kng.heads.Normal(scale=0.7),
    "bernoulli": kng.heads.Bernoulli(),
    "categorical": kng.heads.Categorical(),
}
ALL_HEADS = pytest.mark.parametrize("head", HEADS)
BATCH = 5


def inputs(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def mean_term(head, batch=BATCH, positions=1):
    coefficients = np.full((batch, positions), 1.0 / (batch * positions))
    return Term(head, coefficients, scale=0.7)


def dense_blocks(model, x, head):
    """Diagonal blocks of the reference's dense Fisher."""
    trace = network_of(model.layers).trace(x)
    batch, positions, _ = trace.outputs[0].shape
    term = mean_term(head, batch, positions)
    return [reference.block(trace, [term], i) for i in range(len(trace.inputs))]


def package_blocks(model, x, head, approximation="kronecker", **kwargs):
    operators = kng.fisher(model, x, HEADS[head], approximation, **kwargs)
    return [operator.to_dense().numpy() for operator in operators.values()]


def assert_blocks(found, expected, rtol=1e-9):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-12)


def differ(found, expected):
    return any(
        np.linalg.norm(a - b) > 1e-2 * np.linalg.norm(b)
        for a, b in zip(found, expected, strict=True)
    )


def record(model, x, head):
    with tf.GradientTape(persistent=True) as tape:
        outputs = model(x)
    c = tf.fill([len(x)], tf.constant(1.0 / len(x), outputs.dtype))
    return tape, OutputTerm(outputs, HEADS[head], c)


def values_of(model):
    return [v.value for v in model.trainable_variables]


def flat_weights(model):
    return np.concatenate([np.ravel(v) for v in model.trainable_variables])


def split(flat, model):
    """A flat vector as one tensor per variable."""
    shapes = [tuple(v.shape) for v in model.trainable_variables]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    return [
        tf.constant(part.reshape(shape))
        for part, shape in zip(np.split(flat, ends), shapes, strict=True)
    ]


def plain_kfac(**kwargs):
    """Undamped, memoryless natural gradient with fixed rate one."""
    options = dict(
        learning_rate=1.0,
        momentum=0.0,
        damping=0.0,
        fisher="exact",
        factor_decay=0.0,
        curvature_update_period=1,
        inverse_update_period=1,
        quadratic_model="exact",
        damping_split="layer",
        refresh_growth=None,
        block="kronecker",
    )
    return kng.KFAC(**{**options, **kwargs})


def adaptive_kfac(**kwargs):
    """Everything from the quadratic model."""
    damping = kng.LevenbergMarquardt(
        initial="auto",
        decay=0.75,
        period=1,
        relative=0.5,
        minimum=1e-6,
        maximum=1e6,
        inverse_ratio=0.5,
    )
    options = dict(learning_rate="auto", momentum="auto", damping=damping)
    return plain_kfac(**{**options, **kwargs})


def train(model, optimizer, loss, batches, **compile_options):
    optimizer.attach(model)
    options = dict(run_eagerly=True)
    model.compile(optimizer, loss=loss, **{**options, **compile_options})
    for batch in batches:
        model.train_on_batch(*batch)
    return model


# kfac-jax tests/test_estimator.py, test_explicit_exact_full.
@ALL_HEADS
def test_invariant_01_implicit_columns_are_the_dense_fisher(head):
    model, x = mlp([2, 3, 2]), inputs(BATCH, 2)
    tape, term = record(model, x, head)
    size = model.count_params()
    units = [split(row, model) for row in np.eye(size)]
    implicit = fisher_gram(tape, [term], values_of(model), units)
    dense = reference.dense(
        network_of(model.layers).trace(x), [mean_term(head)]
    )
    np.testing.assert_allclose(implicit, dense, rtol=1e-9, atol=1e-13)
    operator = kng.fisher(model, x, HEADS[head], combine=True)
    columns = operator.matmul(tf.eye(size, dtype=tf.float64))
    np.testing.assert_allclose(columns, operator.to_dense(), atol=1e-14)


# kfac-jax tests/test_estimator.py, test_implicit_factor_products.
@ALL_HEADS
def test_invariant_02_factor_times_its_transpose_is_the_fisher(head):
    model, x = mlp([2, 3, 2]), inputs(BATCH, 2)
    tape, term = record(model, x, head)
    direction = np.random.default_rng(1).normal(size=model.count_params())
    network = network_of(model.layers)
    trace = network.trace(x)
    dense = reference.dense(trace, [mean_term(head)])
    jacobian = np.concatenate(
        [reference.flat_jacobian(trace, i) for i in range(2)], axis=-1
    )
    tangents = (jacobian @ direction)[:, 0]
    transposed = term.factor_transpose(tf.constant(tangents))
    product = tape.gradient(
        term.outputs,
        values_of(model),
        output_gradients=term.cotangent(transposed),
    )
    found = np.concatenate([np.ravel(part) for part in product])
    np.testing.assert_allclose(found, dense @ direction, rtol=1e-9)


# kfac-jax tests/test_estimator.py; the Rademacher half of invariant 2.
@ALL_HEADS
def test_invariant_02_random_signs_average_to_the_fisher(head):
    model, x = mlp([2, 2, 2]), inputs(2, 2)
    tape, term = record(model, x, head)
    total = 0.0
    patterns = list(itertools.product([-1.0, 1.0], repeat=4))
    for signs in patterns:
        u = term.cotangent(tf.reshape(tf.constant(signs, tf.float64), [2, 2]))
        parts = tape.gradient(term.outputs, values_of(model), u)
        flat = np.concatenate([np.ravel(part) for part in parts])
        total += np.outer(flat, flat) / len(patterns)
    dense = reference.dense(
        network_of(model.layers).trace(x), [mean_term(head, 2)]
    )
    np.testing.assert_allclose(total, dense, rtol=1e-9, atol=1e-13)


# kfac-tutorial hessian_*_loss.py: for natural parameters the Fisher is the
# Hessian of the negative log-likelihood, whatever the target.
@ALL_HEADS
def test_invariant_03_output_fisher_is_the_hessian(head):
    eta = tf.constant(inputs(3))
    targets = {"normal": inputs(3, seed=1), "bernoulli": [0.0, 1.0, 1.0]}
    y = tf.constant(targets.get(head, 1))
    with tf.GradientTape() as outer:
        outer.watch(eta)
        with tf.GradientTape() as inner:
            inner.watch(eta)
            loss = -HEADS[head].log_prob(eta[None], y[None])[0]
        gradient = inner.gradient(loss, eta)
    hessian = outer.jacobian(gradient, eta)
    if hessian is None:
        hessian = np.zeros((3, 3))
    np.testing.assert_allclose(
        hessian, HEADS[head].fisher(eta), rtol=1e-9, atol=1e-14
    )


# kfac-jax tests/test_estimator.py, test_block_diagonal_full.
@ALL_HEADS
def test_invariant_04_full_block_is_a_block_of_the_dense_fisher(head):
    model, x = mlp([3, 4, 3, 2]), inputs(BATCH, 3)
    dense = reference.dense(
        network_of(model.layers).trace(x), [mean_term(head)]
    )
    ends = np.cumsum([0, 16, 15, 8])
    expected = [
        dense[a:b, a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)
    ]
    assert_blocks(package_blocks(model, x, head, "full"), expected)


# kfac-jax tests/test_estimator.py, test_block_diagonal_full_to_hessian.
@pytest.mark.parametrize("head", ["normal", "categorical"])
def test_invariant_05_blocks_of_a_relu_network_are_hessian_blocks(head):
    model, x = mlp([3, 4, 3, 2], "relu"), inputs(BATCH, 3)
    y = inputs(BATCH, 2, seed=1) if head == "normal" else [0, 1, 1, 0, 1]
    found = package_blocks(model, x, head, "full")
    for layer, block in zip(model.layers, found, strict=True):
        parts = [layer.kernel.value, layer.bias.value]
        with tf.GradientTape(persistent=True) as outer:
            with tf.GradientTape() as inner:
                loss = -tf.reduce_mean(HEADS[head].log_prob(model(x), y))
            gradients = inner.gradient(loss, parts)
        rows = [
            [
                tf.reshape(
                    outer.jacobian(g, part, unconnected_gradients="zero"),
                    [tf.size(g), -1],
                )
                for part in parts
            ]
            for g in gradients
        ]
        hessian = np.block([[np.asarray(part) for part in row] for row in rows])
        np.testing.assert_allclose(hessian, block, rtol=1e-8, atol=1e-12)


# kfac-jax tests/test_estimator.py, test_diagonal.
@ALL_HEADS
@pytest.mark.parametrize("positions", [None, 3])
def test_invariant_06_diagonal_is_the_diagonal_of_the_full_block(
    head, positions
):
    model = mlp([3, 4, 2], positions=positions)
    x = inputs(BATCH, *model.input_shape[1:])
    diagonal = package_blocks(model, x, head, "diagonal")
    full = package_blocks(model, x, head, "full")
    assert_blocks(diagonal, [np.diag(np.diag(block)) for block in full])


# kfac-tutorial kfs/kfac_tests/mlp_batch_size_1.py; curvlinops
# test_kfac_one_datum.
@ALL_HEADS
@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu"])
def test_invariant_07_one_datum_is_exact(head, activation):
    model, x = mlp([3, 4, 3, 2], activation), inputs(1, 3)
    exact = dense_blocks(model, x, head)
    assert_blocks(package_blocks(model, x, head), exact)
    assert_blocks(package_blocks(model, x, head, "ekfac"), exact)


# The same for a random estimate of the Fisher of one datum.
@pytest.mark.parametrize("kind", ["propagated", "sampled"])
@ALL_HEADS
def test_invariant_07_one_datum_is_exact_for_random_kinds(head, kind):
    model, x = mlp([3, 4, 2]), inputs(1, 3)
    assert_blocks(
        package_blocks(model, x, head, kind=kind, seed=3),
        package_blocks(model, x, head, "full", kind=kind, seed=3),
    )


# kfac-tutorial deep_linear_regression.py; kfac-jax test_kronecker_factored;
# curvlinops test_kfac_type2.
@pytest.mark.parametrize("bias", [True, False])
def test_invariant_08_deep_linear_least_squares_is_exact(bias):
    model, x = mlp([3, 4, 3, 2], "linear", bias), inputs(20, 3)
    expected = dense_blocks(model, x, "normal")
    assert_blocks(package_blocks(model, x, "normal"), expected)
    # Not so for other heads or activations.
    assert differ(
        package_blocks(model, x, "bernoulli"),
        dense_blocks(model, x, "bernoulli"),
    )
    model = mlp([3, 4, 3, 2], "tanh", bias)
    assert differ(
        package_blocks(model, x, "normal"), dense_blocks(model, x, "normal")
    )


# kfac-tutorial mixed_deep_linear_regression.py; curvlinops
# test_kfac_type2_weight_sharing; Eschenhagen et al. 2023.
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pool", [False, True], ids=["sequence", "pooled"])
def test_invariant_09_the_right_weight_sharing_is_exact(bias, pool):
    model = mlp([2, 3, 3, 2], "linear", bias, positions=4, pool=pool)
    x = inputs(6, 4, 2)
    right, wrong = ("reduce", "expand") if pool else ("expand", "reduce")
    expected = dense_blocks(model, x, "normal")
    exact = package_blocks(model, x, "normal", weight_sharing=right)
    other = package_blocks(model, x, "normal", weight_sharing=wrong)
    assert_blocks(exact, expected)
    assert differ(other[:1], expected[:1])


# nngeometry tests/test_torch_hooks_kfac.py, to_onexdataset.
@ALL_HEADS
def test_invariant_10_repeated_input_is_exact(head):
    model, x = mlp([3, 4, 2]), np.repeat(inputs(1, 3), 7, axis=0)
    assert_blocks(package_blocks(model, x, head), dense_blocks(model, x, head))


# The same at positions: expand is exact where all positions are equal.
def test_invariant_10_repeated_positions_are_exact():
    model = mlp([2, 3, 2], positions=4)
    x = np.repeat(inputs(1, 1, 2), 4, axis=1)
    expected = dense_blocks(model, x, "categorical")
    assert_blocks(package_blocks(model, x, "categorical"), expected)


def loss_of(name, reduction):
    if name == "mse":
        return keras.losses.MeanSquaredError(reduction=reduction)
    if name == "bernoulli":
        return keras.losses.BinaryCrossentropy(
            from_logits=True, reduction=reduction
        )
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction=reduction
    )


def batches_for(name, count=3, size=6, weighted=False):
    rng = np.random.default_rng(4)
    for _ in range(count):
        x = rng.normal(size=(size, 3))
        y = {
            "mse": rng.normal(size=(size, 2)),
            "bernoulli": rng.integers(0, 2, size=(size, 2)).astype(float),
            "categorical": rng.integers(0, 2, size=size),
        }[name]
        batch = (x, y)
        if weighted:
            w = rng.uniform(0.5, 2.0, size=size)
            # Of the same sum in every batch: it is part of the loss's scale.
            batch += (1.5 * size * w / w.sum(),)
        yield batch


# curvlinops test_expand_setting_scaling: the curvature scales like the loss.
@pytest.mark.variants("mse-False")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", ["mse", "bernoulli", "categorical"])
def test_invariant_11_reductions_scale_f_but_not_the_step(loss, weighted):
    """Over whole training steps with automatic damping and rate."""
    found = {}
    for reduction in (
        "sum_over_batch_size",
        "sum",
        "mean",
        "mean_with_sample_weight",
    ):
        model, optimizer = mlp([3, 4, 2]), adaptive_kfac()
        batches = list(batches_for(loss, weighted=weighted))
        train(model, optimizer, loss_of(loss, reduction), batches[:1])
        scale = float(optimizer.curvature.mean_eigenvalue())
        train(model, optimizer, loss_of(loss, reduction), batches[1:])
        found[reduction] = flat_weights(model), scale
    weights, scale = found["sum_over_batch_size"]
    for reduction, (other, _) in found.items():
        np.testing.assert_allclose(other, weights, rtol=1e-8, err_msg=reduction)
    np.testing.assert_allclose(found["sum"][1] / scale, 6.0, rtol=1e-11)
    np.testing.assert_allclose(found["mean"][1], scale, rtol=1e-11)
    if weighted:
        ratio = found["mean_with_sample_weight"][1] / scale
        np.testing.assert_allclose(ratio, 1.0 / 1.5, rtol=1e-11)


# The sum of an unreduced loss is what Keras differentiates.
def test_invariant_11_unreduced_loss_is_its_sum():
    """With fixed damping and rate: Keras's loss is then no scalar."""
    found = []
    for reduction in ("sum", "none"):
        model = mlp([3, 4, 2])
        optimizer = plain_kfac(damping=0.5, learning_rate=0.5)
        loss = loss_of("mse", reduction)
        train(model, optimizer, loss, batches_for("mse", count=1))
        found.append(flat_weights(model))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-11)


# nngeometry, curvlinops, kfac-jax test_eigenvalues.
@pytest.mark.parametrize("options", [{}, {"max_factor_size": 3}])
def test_invariant_15_kronecker_algebra_equals_dense(options):
    block = create("kronecker", BlockShape(4, 3), **options)
    block.build(make_variable)
    a, g = inputs(6, 2, 4), inputs(6, 2, 3, seed=1)
    block.accumulate(
        block.input_statistics(a, np.ones(6))
        | block.cotangent_statistics(a, g),
        0.0,
    )
    operator, dense = block.operator(), block.to_dense().numpy()
    v = inputs(12, seed=2)
    np.testing.assert_allclose(operator.matvec(v), dense @ v, rtol=1e-11)
    np.testing.assert_allclose(
        tf.tensordot(v, operator.matvec(v), 1), v @ dense @ v, rtol=1e-11
    )
    np.testing.assert_allclose(operator.trace(), np.trace(dense), rtol=1e-11)
    np.testing.assert_allclose(operator.diag_part(), np.diag(dense))
    sign, logdet = np.linalg.slogdet(dense)
    assert sign > 0
    np.testing.assert_allclose(
        operator.log_abs_determinant(), logdet, rtol=1e-9
    )
    left, right = (op.to_dense().numpy() for op in operator.operators)
    np.testing.assert_allclose(
        np.sort(
            np.outer(
                np.linalg.eigvalsh(left), np.linalg.eigvalsh(right)
            ).ravel()
        ),
        np.linalg.eigvalsh(dense),
        rtol=1e-8,
        atol=1e-12,
    )
    np.testing.assert_allclose(
        np.linalg.norm(left) * np.linalg.norm(right), np.linalg.norm(dense)
    )
    solved = operator.solvevec(tf.constant(v))
    np.testing.assert_allclose(solved, np.linalg.solve(dense, v), rtol=1e-7)


def make_variable(name, shape, initializer):
    return keras.Variable(
        initializer, shape=shape, dtype="float64", trainable=False, name=name
    )


# nngeometry; curvlinops test_ekfac_closer_to_exact_than_kfac.
@ALL_HEADS
@pytest.mark.parametrize("positions", [None, 3])
def test_invariant_13_corrected_eigenvalues_are_nearer(head, positions):
    model = mlp([3, 4, 2], positions=positions)
    x = inputs(BATCH, *model.input_shape[1:])
    exact = dense_blocks(model, x, head)
    distances = [
        [np.linalg.norm(a - b) for a, b in zip(found, exact, strict=True)]
        for found in (
            package_blocks(model, x, head, name) for name in ("ekfac", "kfac")
        )
    ]
    for corrected, plain in zip(*distances, strict=True):
        assert corrected < plain + 1e-12
    # The last layer of a Normal is a Kronecker product already.
    assert distances[0][0] < 0.99 * distances[1][0]


# kfac-jax test_matmul; curvlinops test_KFAC_inverse_*_damped_matmat, with two
# consecutive products to catch damping in place.
@pytest.mark.parametrize("kind", ["kronecker", "ekfac", "full", "diagonal"])
def test_invariant_16_inverse_undoes_the_damped_block(kind):
    block = create(kind, BlockShape(4, 3))
    block.build(make_variable)
    a, g = inputs(30, 1, 4), inputs(30, 1, 3, seed=1)
    block.accumulate(
        block.input_statistics(a, np.ones(30))
        | block.cotangent_statistics(a, g),
        0.0,
    )
    damping = 0.1
    block.refresh(tf.constant(damping, tf.float64))
    dense = block.to_dense().numpy()
    if kind == "kronecker":
        left, right = (
            op.to_dense().numpy() for op in block.operator().operators
        )
        ratio = np.sqrt((np.trace(left) / 4) / (np.trace(right) / 3))
        damped = np.kron(
            left + ratio * np.sqrt(damping) * np.eye(4),
            right + np.sqrt(damping) / ratio * np.eye(3),
        )
    else:
        damped = dense + damping * np.eye(12)
    v = inputs(4, 3, seed=2)
    for _ in range(2):
        solved = block.precondition(tf.constant(v))
        np.testing.assert_allclose(
            damped @ np.ravel(solved), v.ravel(), rtol=1e-9
        )
    undamped = tf.constant(0.0, tf.float64)
    block.refresh(undamped)
    solved = block.precondition(tf.constant(v))
    np.testing.assert_allclose(dense @ np.ravel(solved), v.ravel(), rtol=1e-7)


def mean_divergence(head, old, new):
    """Mean KL divergence of the heads' distributions, in closed form."""
    if head == "normal":
        values = 0.5 * np.sum((old - new) ** 2, -1) / 0.7**2
    elif head == "bernoulli":
        p, q = (1 / (1 + np.exp(-eta)) for eta in (old, new))
        values = np.sum(
            p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)), -1
        )
    else:
        p, q = reference_heads.softmax(old), reference_heads.softmax(new)
        values = np.sum(p * np.log(p / q), -1)
    return values.mean()


# nngeometry tests/test_metrics.py.
@ALL_HEADS
@pytest.mark.parametrize(("length", "tolerance"), [(1e-2, 2e-2), (1e-3, 2e-3)])
def test_invariant_17_divergence_quotient_tends_to_one(head, length, tolerance):
    model, x = mlp([3, 4, 2]), inputs(BATCH, 3)
    direction = inputs(model.count_params(), seed=1)
    direction *= length / np.linalg.norm(direction)
    parts = split(direction, model)
    tape, term = record(model, x, head)
    gram = fisher_gram(tape, [term], values_of(model), [parts])
    old = model(x).numpy()
    for variable, part in zip(model.trainable_variables, parts, strict=True):
        variable.assign_add(part)
    divergence = mean_divergence(head, old, model(x).numpy())
    quotient = divergence / (0.5 * float(gram[0, 0]))
    np.testing.assert_allclose(quotient, 1.0, atol=tolerance)


# GPflow test_natural_gradient.py: one step solves a conjugate model.
@pytest.mark.parametrize("block", ["full", "kronecker"])
@pytest.mark.parametrize("loss", ["mse", "likelihood"])
def test_invariant_18_one_step_solves_least_squares(block, loss):
    """For one linear layer the Kronecker product is exact as well."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 3)), rng.normal(size=(20, 2))
    model = mlp([3, 2])
    if loss == "likelihood":
        loss = kng.losses.NegativeLogLikelihood(HEADS["normal"])
    train(model, plain_kfac(block=block), loss, [(x, y)])
    extended = np.concatenate([x, np.ones((20, 1))], axis=1)
    solution = np.linalg.lstsq(extended, y, rcond=None)[0]
    np.testing.assert_allclose(
        matrix_of(model.layers[0]), solution, rtol=1e-8, atol=1e-10
    )


# The rate and momentum of the quadratic model find the same step.
def test_invariant_18_automatic_rate_of_an_exact_model_is_one():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 3)), rng.normal(size=(20, 2))
    model = mlp([3, 2])
    optimizer = plain_kfac(learning_rate="auto", momentum="auto")
    train(model, optimizer, "mse", [(x, y)])
    np.testing.assert_allclose(
        optimizer.statistics["learning_rate"], 1.0, rtol=1e-9
    )


def affine(size, seed):
    """A homogeneous matrix M of an invertible affine map, `x̄' = x̄ M`."""
    rng = np.random.default_rng(seed)
    matrix = np.zeros((size + 1, size + 1))
    matrix[:size, :size] = rng.normal(size=(size, size)) + 2.0 * np.eye(size)
    matrix[size, :size] = rng.normal(size=size)
    matrix[size, size] = 1.0
    return matrix


def set_matrix(layer, matrix):
    layer.kernel.assign(matrix[:-1])
    layer.bias.assign(matrix[-1])


# Martens & Grosse 2015, theorem 1 and its corollaries: undamped K-FAC does not
# depend on the coordinates of inputs and hidden units.
@pytest.mark.variants(6)
@pytest.mark.parametrize("where", ["input", "hidden", "output_of_hidden"])
@pytest.mark.parametrize("block", ["kronecker", "full"])
@pytest.mark.parametrize("loss", ["mse", "bernoulli"])
def test_invariant_19_affine_maps_do_not_change_the_function(
    where, block, loss
):
    x = inputs(40, 3, seed=1)
    y = inputs(40, 2, seed=2)
    if loss == "bernoulli":
        y = (y > 0).astype(float)
    outputs = []
    for transformed in (False, True):
        model = keras.Sequential(
            [
                keras.Input((3,)),
                keras.layers.Dense(3),
                keras.layers.Dense(3, activation="tanh"),
                keras.layers.Dense(2),
            ]
        )
        randomize(model)
        first, second, last = model.layers
        data = x
        if transformed and where == "input":
            change = affine(3, 5)
            extended = np.concatenate([x, np.ones((40, 1))], axis=1)
            data = (extended @ change)[:, :3]
            set_matrix(first, np.linalg.solve(change, matrix_of(first)))
        elif transformed:
            # The linear first layer's units in other coordinates.
            change = affine(3, 6)
            if where == "hidden":
                change[3, :3] = 0.0
            old = matrix_of(first)
            shifted = old @ change[:3, :3]
            shifted[-1] += change[3, :3]
            set_matrix(first, shifted)
            set_matrix(second, np.linalg.solve(change, matrix_of(second)))
        before = model(data).numpy()
        optimizer = plain_kfac(block=block, learning_rate=0.25)
        train(
            model, optimizer, loss_of(loss, "sum_over_batch_size"), [(data, y)]
        )
        assert optimizer.statistics["retries"] == 0
        outputs.append((before, model(data).numpy()))
    (before, after), (same, moved) = outputs
    np.testing.assert_allclose(same, before, rtol=1e-9, atol=1e-10)
    assert np.linalg.norm(after - before) > 1e-2
    np.testing.assert_allclose(moved, after, rtol=1e-5, atol=1e-7)


# Damping breaks it, so that the test above can fail.
def test_invariant_19_damping_depends_on_the_coordinates():
    x, y = inputs(40, 3, seed=1), inputs(40, 2, seed=2)
    change, outputs = affine(3, 5), []
    for transformed in (False, True):
        model, data = mlp([3, 3, 2]), x
        if transformed:
            extended = np.concatenate([x, np.ones((40, 1))], axis=1)
            data = (extended @ change)[:, :3]
            first = model.layers[0]
            set_matrix(first, np.linalg.solve(change, matrix_of(first)))
        train(model, plain_kfac(damping=0.5), "mse", [(data, y)])
        outputs.append(model(data).numpy())
    assert not np.allclose(outputs[0], outputs[1], rtol=1e-3)


# kfac-jax test_tracer *_diff_batch_size; NetKet issue 2229.
@ALL_HEADS
@pytest.mark.parametrize(
    "approximation", ["full", "diagonal", "kronecker", "ekfac"]
)
def test_invariant_21_order_of_the_batch_does_not_matter(head, approximation):
    model, x = mlp([3, 4, 2]), inputs(8, 3)
    order = np.random.default_rng(3).permutation(8)
    assert_blocks(
        package_blocks(model, x[order], head, approximation),
        package_blocks(model, x, head, approximation),
        rtol=1e-10,
    )


# Means over chunks are the mean over the batch; for the factors, each.
@ALL_HEADS
def test_invariant_21_chunks_average_to_the_batch(head):
    model, x = mlp([3, 4, 2]), inputs(8, 3)
    for approximation in ("full", "diagonal"):
        chunks = [
            package_blocks(model, part, head, approximation)
            for part in np.split(x, 4)
        ]
        assert_blocks(
            [np.mean(parts, axis=0) for parts in zip(*chunks, strict=True)],
            package_blocks(model, x, head, approximation),
        )

    def factors(part):
        operators = kng.fisher(model, part, HEADS[head]).values()
        return [f.to_dense() for op in operators for f in op.operators]

    chunks = [factors(part) for part in np.split(x, 4)]
    assert_blocks(
        [np.mean(parts, axis=0) for parts in zip(*chunks, strict=True)],
        factors(x),
    )


# tensorflow/kfac optimizer_test.py, testUpdateClipCoeff.
@pytest.mark.parametrize("momentum", [0.0, 0.5, "auto"])
@pytest.mark.parametrize("rate", [1.0, "auto"])
def test_invariant_23_clipped_update_has_exactly_the_bound(rate, momentum):
    bound = 0.005
    options = dict(
        learning_rate=rate, momentum=momentum, damping=0.01, factor_decay=0.5
    )
    model = mlp([3, 4, 2])
    optimizer = plain_kfac(norm_constraint=bound, **options)
    optimizer.attach(model)
    model.compile(
        optimizer, loss=loss_of("categorical", "mean"), run_eagerly=True
    )
    for x, y in batches_for("categorical"):
        trace = network_of(model.layers).trace(x)
        dense = reference.dense(trace, [mean_term("categorical", 6)])
        old = flat_weights(model)
        model.train_on_batch(x, y)
        update = flat_weights(model) - old
        np.testing.assert_allclose(update @ dense @ update, bound, rtol=1e-6)


# Inside the region the update is untouched.
@pytest.mark.parametrize("rate", [0.1, "auto"])
def test_invariant_23_update_inside_the_bound_is_untouched(rate):
    weights = []
    for bound in (None, 1e6):
        model = mlp([3, 4, 2])
        optimizer = plain_kfac(
            learning_rate=rate, damping=0.1, norm_constraint=bound
        )
        train(model, optimizer, "mse", batches_for("mse"))
        weights.append(flat_weights(model))
    np.testing.assert_array_equal(weights[0], weights[1])


# netket test_qgt_solvers.py, test_nan_fallback_*.
@pytest.mark.parametrize("compiled", [False, True])
def test_invariant_24_failed_cholesky_is_flagged(compiled):
    inverse = tf.function(damped_inverse, jit_compile=compiled)
    damping = tf.constant(0.1, tf.float64)
    good = inverse(tf.eye(3, dtype=tf.float64), damping)
    assert bool(good.succeeded) and int(good.retries) == 0
    broken = inverse(tf.fill([3, 3], tf.constant(np.nan, tf.float64)), damping)
    assert not bool(broken.succeeded)
    assert np.all(np.isfinite(broken.inverse))
    rescued = inverse(-tf.eye(3, dtype=tf.float64), damping)
    assert bool(rescued.succeeded) and int(rescued.retries) > 0


# The optimizer goes on with its last good inverse and counts.
@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_invariant_24_training_goes_on_after_a_failed_refresh(compiled):
    model = mlp([3, 4, 2])
    optimizer = plain_kfac(damping=0.5, curvature_update_period=2)
    optimizer.attach(model)
    model.compile(
        optimizer, loss="mse", run_eagerly=False, jit_compile=compiled
    )
    batches = list(batches_for("mse"))
    model.train_on_batch(*batches[0])
    assert optimizer.statistics["failures"] == 0
    average = next(v for v in optimizer.variables if "input_factor" in v.name)
    average.assign(np.full(average.shape, np.nan))
    model.train_on_batch(*batches[1])
    assert optimizer.statistics["failures"] > 0
    assert np.all(np.isfinite(flat_weights(model)))


def snapshot(model):
    """All that curvature must not touch."""
    return (
        [v.numpy() for v in model.weights],
        [v.trainable for v in model.weights],
        [layer.trainable for layer in model.layers],
        [set(vars(layer)) for layer in [model, *model.layers]],
        [getattr(layer, "activation", None) for layer in model.layers],
        model.get_config(),
    )


def assert_untouched(before, after):
    for old, new in zip(before[0], after[0], strict=True):
        np.testing.assert_array_equal(old, new)
    assert before[1:] == after[1:]


# curvlinops maybe_exclude_or_shuffle_parameters, and its purity checks.
@pytest.mark.parametrize(
    "approximation", ["full", "diagonal", "kronecker", "ekfac"]
)
def test_invariant_25_fisher_changes_nothing(approximation):
    model, x = mlp([3, 4, 2]), inputs(BATCH, 3)
    model.layers[0].trainable = False
    before = snapshot(model)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(x) ** 2)
    gradients = tape.gradient(loss, model.trainable_variables)
    with tf.GradientTape() as tape:
        kng.fisher(model, x, HEADS["bernoulli"], approximation)
        loss = tf.reduce_sum(model(x) ** 2)
    again = tape.gradient(loss, model.trainable_variables)
    for a, b in zip(again, gradients, strict=True):
        np.testing.assert_array_equal(a, b)
    assert_untouched(before, snapshot(model))


# Observing a batch changes no weight; only the step does.
def test_invariant_25_observation_changes_no_weight():
    model, x = mlp([3, 4, 2]), inputs(BATCH, 3)
    optimizer = plain_kfac(damping=0.1).attach(model, HEADS["normal"])
    before = snapshot(model)
    with kng.CurvatureTape(optimizer) as tape:
        loss = tf.reduce_mean(model(x) ** 2)
    tape.gradient(loss, model.trainable_variables)
    assert_untouched(before, snapshot(model))


# The order in which variables are given does not matter.
@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_invariant_25_order_and_subset_of_variables(frozen):
    x, y = next(batches_for("mse"))
    weights = []
    for order in (1, -1):
        model = mlp([3, 4, 3, 2])
        if frozen is not None:
            model.layers[frozen].trainable = False
        fixed = [v.numpy() for v in model.non_trainable_variables]
        optimizer = adaptive_kfac().attach(
            model, kng.heads.Normal(scale=0.5**0.5)
        )
        variables = model.trainable_variables[::order]

        def objective(model=model):
            return tf.reduce_mean(tf.reduce_sum((model(x) - y) ** 2, axis=-1))

        for _ in range(2):
            with kng.CurvatureTape(optimizer, objective) as tape:
                loss = objective()
            optimizer.apply(tape.gradient(loss, variables), variables)
        weights.append(flat_weights(model))
        for old, new in zip(fixed, model.non_trainable_variables, strict=True):
            np.testing.assert_array_equal(old, new)
    np.testing.assert_allclose(weights[0], weights[1], rtol=1e-9)


# Config round trip: the rebuilt optimizer takes the same steps.
def test_invariant_25_config_round_trip():
    weights = []
    for rebuilt in (False, True):
        optimizer = adaptive_kfac(norm_constraint=0.5, weight_decay=0.01)
        if rebuilt:
            optimizer = kng.KFAC.from_config(optimizer.get_config())
        model = train(mlp([3, 4, 2]), optimizer, "mse", batches_for("mse"))
        weights.append(flat_weights(model))
    np.testing.assert_array_equal(weights[0], weights[1])


# Untested elsewhere (26): running averages are weighted means.
def test_invariant_26_debiased_average_is_the_weighted_mean():
    decay = 0.75
    model = mlp([3, 4, 2])
    optimizer = plain_kfac(learning_rate=0.0, damping=1.0, factor_decay=decay)
    batches = list(batches_for("mse", count=4))
    train(model, optimizer, "mse", batches)
    weights = decay ** np.arange(4)[::-1]
    weights /= weights.sum()
    network = network_of(model.layers)
    traces = [network.trace(x) for x, _ in batches]
    for index, entry in enumerate(optimizer.curvature.entries):
        second_moments = [
            np.einsum("nsa,nsb->ab", t.inputs[index], t.inputs[index]) / 6
            for t in traces
        ]
        expected = np.tensordot(weights, second_moments, 1)
        left = entry.block.average("input_factor")
        np.testing.assert_allclose(left, expected, rtol=1e-11)


# Untested elsewhere (26): the Levenberg-Marquardt rule.
@pytest.mark.parametrize(
    ("ratio", "factor"),
    [(0.1, 4 / 3), (0.25, 1.0), (0.75, 1.0), (0.8, 0.75), (np.nan, 4 / 3)],
)
def test_invariant_26_levenberg_marquardt_table(ratio, factor):
    rule = kng.LevenbergMarquardt(
        decay=0.75, period=1, relative=1.0, minimum=0.0, maximum=1e9
    )
    damping = tf.constant(2.0, tf.float64)
    one = tf.ones_like(damping)
    adapted = rule.adapt(damping, ratio * one, one, damping)
    np.testing.assert_allclose(adapted, 2.0 * factor, rtol=1e-14)


# Untested elsewhere (26): the rate of the exact quadratic model is the best on
# a grid. The model is computed from the dense Fisher.
def test_invariant_26_automatic_coefficients_win_on_a_grid():
    damping = 0.5
    model = mlp([3, 4, 2])
    optimizer = plain_kfac(
        learning_rate="auto", momentum="auto", damping=damping
    )
    batches = list(batches_for("categorical"))
    train(model, optimizer, loss_of("categorical", "mean"), batches[:2])
    x, y = batches[2]
    trace = network_of(model.layers).trace(x)
    term = Term(
        "categorical", np.full((6, 1), 1 / 6), np.eye(2)[y][:, np.newaxis]
    )
    gradient = np.concatenate(
        [reference.gradient(trace, [term], i).ravel() for i in range(2)]
    )
    dense = reference.dense(trace, [term])
    metric = dense + damping * np.eye(len(dense))
    old = flat_weights(model)
    previous = np.concatenate(
        [
            np.ravel(v)
            for v in optimizer.variables
            if v.name.endswith("velocity")
        ]
    )
    model.train_on_batch(x, y)
    update = flat_weights(model) - old
    rate = optimizer.statistics["learning_rate"]
    momentum = optimizer.statistics["momentum"]
    direction = (update - momentum * previous) / rate

    def change(a, m):
        step = a * direction + m * previous
        return gradient @ step + 0.5 * step @ metric @ step

    best = change(rate, momentum)
    np.testing.assert_allclose(
        optimizer.statistics["model_change"], best, rtol=1e-8
    )
    offsets = np.linspace(-0.5, 0.5, 11)
    grid = [
        change(rate + a, momentum + m)
        for a, m in itertools.product(offsets, offsets)
    ]
    assert best <= min(grid) + 1e-12
    assert best < 0


# The same on a two-dimensional model by itself.
def test_invariant_26_quadratic_coefficients_are_the_minimum():
    gram = np.array([[2.0, 0.5], [0.5, 1.0]])
    slopes = np.array([-1.0, -0.75])
    found = quadratic_coefficients(
        tf.constant(gram),
        tf.constant(slopes),
        QuadraticStep(True, None),
        tf.constant(1.0, tf.float64),
    )
    np.testing.assert_allclose(found, -np.linalg.solve(gram, slopes))


def steps_in(mode, fisher, dtype, block="kronecker"):
    """Weights after each of a few whole steps."""
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    model = mlp([3, 4, 2])
    optimizer = adaptive_kfac(
        fisher=fisher, factor_decay=0.75, inverse_update_period=2, block=block
    ).attach(model)
    model.compile(
        optimizer,
        loss=loss_of("categorical", "sum_over_batch_size"),
        run_eagerly=mode == "eager",
        jit_compile=mode == "xla",
    )
    weights = []
    for x, y in batches_for("categorical", count=4, size=32):
        model.train_on_batch(x.astype(dtype), y)
        weights.append(flat_weights(model))
    assert optimizer.statistics["skipped"] == 0
    return np.stack(weights)


# Untested elsewhere (26): compiled steps are eager steps.
@pytest.mark.parametrize(
    ("fisher", "dtype", "rtol"),
    [
        ("propagated", "float32", 1e-6),
        pytest.param("exact", "float64", 1e-11, marks=pytest.mark.slow),
        pytest.param("exact", "float32", 1e-6, marks=pytest.mark.slow),
        pytest.param("propagated", "float64", 1e-11, marks=pytest.mark.slow),
    ],
)
def test_invariant_26_eager_equals_graph_equals_xla(fisher, dtype, rtol):
    eager = steps_in("eager", fisher, dtype)
    for mode in ("graph", "xla"):
        other = steps_in(mode, fisher, dtype)
        error = np.linalg.norm(other - eager, axis=1)
        assert np.all(error <= rtol * np.linalg.norm(eager, axis=1)), mode


# Untested elsewhere (26): a period of one is a refresh at every step.
def test_invariant_26_period_of_one_refreshes_at_every_step():
    counts = {}
    for period in (1, 2, 3):
        optimizer = adaptive_kfac(
            inverse_update_period=period, curvature_update_period=period
        )
        train(mlp([3, 4, 2]), optimizer, "mse", batches_for("mse", count=5))
        statistics = optimizer.statistics
        counts[period] = (
            statistics["refreshes"],
            statistics["curvature_updates"],
        )
    assert counts == {1: (5, 5), 2: (3, 3), 3: (2, 2)}


def test_reference_network_has_the_layers_of_the_model():
    """What the tests above rest on."""
    model, x = mlp([3, 4, 2]), inputs(BATCH, 3)
    network = network_of(model.layers)
    assert len(dense_layers(model)) == len(network.matrices)
    np.testing.assert_allclose(network(x)[0][:, 0], model(x), rtol=1e-13)
