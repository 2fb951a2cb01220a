import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.heads import LossWeight

REDUCTIONS = [
    None,
    "none",
    "sum",
    "mean",
    "sum_over_batch_size",
    "mean_with_sample_weight",
]
# Batch of 4, 5 positions, 3 units: sizes that cannot be confused.
SHAPE = (4, 5, 3)
RNG = np.random.default_rng(0)
POSITIONS = RNG.uniform(0.5, 2.0, size=(4, 5))
EXAMPLES = RNG.uniform(0.5, 2.0, size=(4, 1))


def expected(reduction, sample_weight=None, mask=None):
    """The coefficients in NumPy, from the documentation of Keras losses."""
    weight = np.ones((4, 5))
    total = 20.0
    if mask is not None:
        weight = weight * mask
    if sample_weight is not None:
        weight = weight * sample_weight
    if reduction in (None, "none", "sum"):
        return weight
    if reduction == "mean_with_sample_weight":
        # Keras sums the weights before they are broadcast.
        if mask is not None:
            total = np.sum(weight)
        elif sample_weight is not None:
            total = np.sum(sample_weight)
    elif mask is not None:
        total = np.sum(mask)
    return weight / total


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("sample_weight", [None, POSITIONS, EXAMPLES])
@pytest.mark.parametrize("masked", [False, True])
def test_coefficients(reduction, sample_weight, masked):
    mask = RNG.uniform(size=(4, 5)) < 0.6 if masked else None
    coefficients = LossWeight(reduction).coefficients(
        np.zeros(SHAPE), sample_weight, mask
    )
    assert coefficients.dtype == tf.float64
    np.testing.assert_allclose(
        coefficients, expected(reduction, sample_weight, mask), rtol=1e-12
    )


def test_mean_over_units_divides_by_their_number():
    total = LossWeight("sum", units="sum").coefficients(np.zeros(SHAPE))
    mean = LossWeight("sum", units="mean").coefficients(np.zeros(SHAPE))
    np.testing.assert_array_equal(total, np.ones((4, 5)))
    np.testing.assert_allclose(mean, np.full((4, 5), 1.0 / 3.0))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_valid_gives_zero(reduction):
    coefficients = LossWeight(reduction).coefficients(
        np.zeros(SHAPE), mask=np.zeros((4, 5), bool)
    )
    np.testing.assert_array_equal(coefficients, np.zeros((4, 5)))


def test_the_mask_stays_off_the_tensors_of_the_caller():
    outputs = tf.zeros(SHAPE)
    LossWeight().coefficients(outputs, mask=tf.ones((4, 5), tf.bool))
    assert getattr(outputs, "_keras_mask", None) is None


@pytest.mark.parametrize("shape", [(4, 1), (4,), (1,), ()])
def test_ranks_of_weights_are_aligned_as_in_keras(shape):
    weight = RNG.uniform(0.5, 2.0, size=shape)
    coefficients = LossWeight().coefficients(np.zeros((4, 3)), weight)
    full = np.broadcast_to(weight.reshape(-1), 4)
    np.testing.assert_allclose(coefficients, full / 4.0)


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_compiled_with_dynamic_batch(jit_compile):
    weight = LossWeight("mean_with_sample_weight", units="mean")

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None, 3], tf.float64),
            tf.TensorSpec([None, None], tf.float64),
            tf.TensorSpec([None, None], tf.bool),
        ],
        jit_compile=jit_compile,
    )
    def compiled(outputs, sample_weight, mask):
        return weight.coefficients(outputs, sample_weight, mask)

    mask = RNG.uniform(size=(4, 5)) < 0.6
    np.testing.assert_allclose(
        compiled(np.zeros(SHAPE), POSITIONS, mask),
        expected("mean_with_sample_weight", POSITIONS, mask) / 3.0,
        rtol=1e-12,
    )


@pytest.mark.parametrize(
    ("reduction", "scale"), [("sum_over_batch_size", 0.5), ("sum", 1.0)]
)
def test_replicas_add_up_as_in_keras(mirrored_strategy, reduction, scale):
    weight = LossWeight(reduction)

    @tf.function
    def step():
        return mirrored_strategy.run(
            lambda: weight.coefficients(tf.zeros([4, 3]))
        )

    alone = weight.coefficients(tf.zeros([4, 3]))
    for replica in mirrored_strategy.experimental_local_results(step()):
        np.testing.assert_allclose(replica, scale * alone)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_coefficients_have_at_least_single_precision(dtype):
    outputs = tf.zeros([3000, 2], dtype)
    coefficients = LossWeight().coefficients(outputs, tf.ones([3000], dtype))
    assert coefficients.dtype == tf.float32
    np.testing.assert_allclose(coefficients, np.full(3000, 1 / 3000), rtol=1e-6)


def test_target_mask():
    outputs = tf.zeros([2, 2, 4])
    labels = np.array([[0, -1], [-1, 3]])
    weight = LossWeight(ignore_class=-1)
    valid = [[True, False], [False, True]]
    for targets in (labels, labels[..., None], labels.astype("float32")):
        mask = weight.target_mask(outputs, targets)
        np.testing.assert_array_equal(mask, valid)
    assert LossWeight().target_mask(outputs, labels) is None


def test_weight_is_an_immutable_value():
    assert LossWeight("sum") == LossWeight("sum")
    assert LossWeight("sum") != LossWeight("sum", units="mean")
    with pytest.raises(AttributeError):
        LossWeight().units = "mean"


def test_creating_weights_uses_up_no_names():
    LossWeight()
    assert keras.losses.Loss().name == "loss"


def test_errors():
    with pytest.raises(ValueError, match="Received: reduction=average"):
        LossWeight("average")
    with pytest.raises(ValueError, match="'mean', 'sum'.*units=max"):
        LossWeight(units="max")
