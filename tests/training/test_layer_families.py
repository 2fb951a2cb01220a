"""Models of normalisation, embedding and attention layers in training."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from keras_natgrad.capture import registry
from keras_natgrad.capture.embedding import describe_embedding
from keras_natgrad.curvature import estimated_gram, fisher_gram
from keras_natgrad.curvature.cotangents import column_cotangents
from keras_natgrad.curvature.network_root import NetworkRoot
from keras_natgrad.curvature.root_columns import Columns
from tests.curvature.conftest import Recorded
from tests.training.networks import (
    FEATURES,
    assert_close,
    assert_equal,
    compiled,
    data,
    state,
    weights,
)

layers = keras.layers
TOKENS, LENGTH, WIDTH = 7, 4, 4
FIT = {"batch_size": 8, "shuffle": False, "verbose": 0}


def text(size=24, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, TOKENS, size=(size, LENGTH))
    ids[::3, -1] = 0
    return ids, ids[:, 0] % 3


def transformer():
    ids = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(TOKENS, WIDTH, mask_zero=True)(ids)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 2)(x, x))
    hidden = layers.PReLU(shared_axes=[1])(layers.Dense(5)(x))
    x = layers.RMSNormalization()(x + layers.Dense(WIDTH)(hidden))
    return keras.Model(ids, layers.Dense(3)(x[:, 0]))


def batch_normalised():
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.Dense(6),
            layers.BatchNormalization(),
            layers.Activation("tanh"),
            layers.Dense(4, use_bias=False),
            layers.GroupNormalization(2),
            layers.Activation("tanh"),
            layers.Dense(3),
        ]
    )


def language():
    """The embedding is tied to the output projection."""
    ids = keras.Input((LENGTH,), dtype="int32")
    tied = layers.ReversibleEmbedding(TOKENS, WIDTH, mask_zero=True)
    x = layers.LayerNormalization()(tied(ids))
    x = layers.Dense(WIDTH, "tanh")(x)
    return keras.Model(ids, tied(x, reverse=True))


def next_tokens(size=24, seed=0):
    ids, _ = text(size, seed)
    return ids, (ids + 1) % TOKENS


MODELS = {
    "transformer": (transformer, text),
    "batch": (batch_normalised, data),
    "language": (language, next_tokens),
}
OPTIMIZERS = {"kfac": kng.KFAC, "natural": kng.NaturalGradient}


@pytest.fixture(params=MODELS)
def task(request):
    make, load = MODELS[request.param]
    return make, *load()


def models(make, count):
    first = make()
    result = [first]
    for _ in range(count - 1):
        other = make()
        other.set_weights(first.get_weights())
        result.append(other)
    return result


@pytest.mark.variants("transformer")
def test_trains_without_a_fallback(task, recwarn):
    make, x, y = task
    model = compiled(make())
    losses = [float(model.train_on_batch(x, y)) for _ in range(6)]
    assert np.all(np.isfinite(losses)) and losses[-1] < 0.95 * losses[0]
    assert not [w for w in recwarn if "fallback" in str(w.message)]
    assert not model.optimizer.curvature.plan.fallback


@pytest.mark.slow
def test_eager_graph_and_xla_agree(task, float64):
    make, x, y = task
    modes = [
        {},
        {"run_eagerly": False},
        {"run_eagerly": False, "jit_compile": True},
    ]
    trained = [
        compiled(model, **mode)
        for model, mode in zip(models(make, 3), modes, strict=True)
    ]
    losses = [
        model.fit(x, y, epochs=4, batch_size=24, verbose=0).history["loss"]
        for model in trained
    ]
    for model, history in zip(trained[1:], losses[1:], strict=True):
        assert_close(weights(model), weights(trained[0]), 1e-6, 1e-8)
        np.testing.assert_allclose(history, losses[0], rtol=1e-6)
    assert np.all(np.isfinite(losses[0]))
    assert losses[0][-1] < losses[0][0]


@pytest.mark.slow
def test_last_batch_is_smaller(float64):
    """A graph that does not know the batch size equals eager steps."""
    x, y = next_tokens(20)
    trained = [
        compiled(model, run_eagerly=eager)
        for model, eager in zip(models(language, 2), (True, False), strict=True)
    ]
    for model in trained:
        model.fit(x, y, epochs=2, **FIT)
    assert_close(*map(weights, trained), 1e-9, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saved_and_resumed_bit_for_bit(task, name, tmp_path):
    make, x, y = task
    model = compiled(make(), OPTIMIZERS[name]())
    for _ in range(3):
        model.train_on_batch(x, y)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.optimizer.attach(loaded)
    loaded.run_eagerly = True
    for each in (model, loaded):
        for _ in range(2):
            each.train_on_batch(x, y)
    assert_equal(state(loaded), state(model))


@pytest.mark.slow
@pytest.mark.parametrize("block", ["full", "diagonal"])
def test_other_blocks(task, block):
    make, x, y = task
    model = compiled(make(), kng.KFAC(block=block, damping=0.1))
    losses = [float(model.train_on_batch(x, y)) for _ in range(6)]
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accumulation", "clipping"),
    [(None, {"clipnorm": 1.0}), (2, {"global_clipnorm": 1.0})],
)
def test_sparse_gradients(accumulation, clipping, float64, monkeypatch):
    """The gradient of an embedding comes as rows; it acts like a dense one."""
    x, y = text()

    class DenseGradient(layers.Embedding):
        """An embedding whose gradient is dense."""

        def call(self, ids):
            one_hot = keras.ops.one_hot(ids, TOKENS, dtype=self.compute_dtype)
            return one_hot @ self.embeddings

    monkeypatch.setattr(registry, "_LAYERS", dict(registry._LAYERS))
    kng.register_layer(DenseGradient)(describe_embedding)
    trained = []
    for embedding in (layers.Embedding, DenseGradient):
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                keras.Input((LENGTH,), dtype="int32"),
                embedding(TOKENS, WIDTH),
                layers.Flatten(),
                layers.Dense(3),
            ]
        )
        optimizer = kng.KFAC(
            gradient_accumulation_steps=accumulation, **clipping
        )
        model = compiled(model, optimizer, run_eagerly=False)
        model.fit(x, y, epochs=2, **FIT)
        trained.append(weights(model))
    assert_close(*trained, rtol=1e-8, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer", "language"])
def test_distributed(name, mirrored_strategy):
    make, load = MODELS[name]
    x, y = load(16)
    with mirrored_strategy.scope():
        model = compiled(make(), run_eagerly=False)
    losses = model.fit(x, y, epochs=2, batch_size=16, verbose=0).history["loss"]
    assert np.all(np.isfinite(losses))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision(task, policy):
    make, x, y = task
    keras.config.set_dtype_policy(policy)
    model = compiled(make(), run_eagerly=False)
    losses = [float(model.train_on_batch(x, y)) for _ in range(6)]
    assert np.all(np.isfinite(losses)) and losses[-1] < losses[0]


@pytest.mark.slow
def test_frozen_layers(task):
    make, x, y = task
    model = make()
    frozen = [
        layer
        for layer in model.layers
        if isinstance(layer, (layers.Embedding, layers.BatchNormalization))
    ]
    for layer in frozen:
        layer.trainable = False
    before = [v.numpy() for layer in frozen for v in layer.weights]
    compiled(model)
    losses = [float(model.train_on_batch(x, y)) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert before
    assert_equal([v.numpy() for layer in frozen for v in layer.weights], before)


def test_tied_weights_are_captured(capsys):
    model = compiled(language())
    model.optimizer.build(model.trainable_variables)
    model.optimizer.summary()
    table = capsys.readouterr().out
    row = f"diag {TOKENS} ⊗ {WIDTH}² + {TOKENS}²"
    assert "tied" in table and row in table
    assert "captured 100.0%" in table


@pytest.mark.slow
def test_tied_weights_with_a_chosen_block():
    x, y = next_tokens()
    for chosen in ("diagonal", "kronecker", "kfac", "ekfac", "full"):
        block = {"reversible*": chosen}
        model = compiled(language(), kng.KFAC(block=block, damping=0.1))
        losses = [float(model.train_on_batch(x, y)) for _ in range(6)]
        assert losses[-1] < losses[0]
        kinds = {e.block.kind for e in model.optimizer.curvature.entries}
        own = chosen if chosen in ("diagonal", "full") else "tied"
        assert own in kinds


@pytest.mark.slow
def test_tied_weights_refreshed_on_the_host(float64):
    x, y = next_tokens()
    trained = [
        compiled(model, kng.KFAC(refresh_where=where))
        for model, where in zip(
            models(language, 2), ("graph", "host"), strict=True
        )
    ]
    for model in trained:
        model.fit(x, y, epochs=4, **FIT)
    left, right = (model.optimizer.statistics for model in trained)
    assert left["refreshes"] == right["refreshes"] > 1
    assert_close(*map(weights, trained), 1e-9, 1e-12)


def test_tied_weights_that_are_excluded():
    x, y = next_tokens()
    model, optimizer = language(), kng.KFAC(damping=0.1)
    optimizer.attach(model, exclude=[layers.ReversibleEmbedding])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, run_eagerly=True)
    with pytest.warns(UserWarning, match="ReversibleEmbedding: excluded"):
        losses = [float(model.train_on_batch(x, y)) for _ in range(6)]
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("make", [kng.NaturalGradient, kng.PRONG, kng.RNGD])
def test_tied_weights_under_other_optimizers(make, recwarn):
    """They take the layer as they did: by its Jacobian, or a fallback."""
    x, y = next_tokens()
    model = compiled(language(), make())
    losses = [float(model.train_on_batch(x, y)) for _ in range(6)]
    assert losses[-1] < losses[0]
    plan = model.optimizer.attachment.plan
    assert any("ReversibleEmbedding" in reason for reason in plan.reasons)
    assert [e.layer_class for e in plan.layers].count("Dense") == 1


@pytest.mark.slow
def test_products_of_tied_weights(float64):
    """The estimate of `δᵀFδ`, over the columns of L, is the product."""
    model = language()
    rng = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(rng.normal(size=tuple(variable.shape)))
    x, _ = text(5)
    recorded = Recorded(model, tf.constant(x), ["categorical"])
    assert not recorded.captured.fallbacks
    curvature = recorded.curvature
    directions = [
        [tf.constant(rng.normal(size=v.shape)) for v in recorded.variables]
        for _ in range(2)
    ]
    exact = fisher_gram(
        recorded.tape,
        recorded.terms,
        [v.value for v in recorded.variables],
        directions,
    )
    matrices = [curvature.to_matrices(each) for each in directions]
    columns = recorded.terms[0].column_count()
    estimated = 0.0
    for column in range(int(columns)):
        # Positions of one example add up before the square, so that they are
        # sent one at a time.
        for position in range(LENGTH):
            sent = column_cotangents(
                recorded.terms, 0, tf.constant(column), tf.constant([0, 0])
            )
            mask = np.eye(LENGTH)[position][:, np.newaxis]
            backward = recorded.captured.backward([sent[0] * mask])
            estimated += estimated_gram(
                recorded.captured, backward, matrices, 100
            )
    np.testing.assert_allclose(estimated, exact, rtol=1e-9)


class Positions(keras.layers.Layer):
    def __init__(self, batch_axis):
        super().__init__()
        self.embedding = layers.Embedding(LENGTH, WIDTH, name="positions")
        self.batch_axis = batch_axis

    def call(self, x):
        steps = keras.ops.arange(LENGTH)
        return x + self.embedding(steps[None] if self.batch_axis else steps)


def with_positions(batch_axis):
    return keras.Sequential(
        [
            keras.Input((LENGTH,), dtype="int32"),
            layers.Embedding(TOKENS, WIDTH, name="tokens"),
            Positions(batch_axis),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


def test_embedding_of_positions():
    x, y = text()
    model = with_positions(batch_axis=False)
    with pytest.warns(UserWarning, match="without a batch axis"):
        model = compiled(model)
        losses = [float(model.train_on_batch(x, y)) for _ in range(6)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_positions_that_show_only_in_the_pass(run_eagerly):
    x, y = text()
    model = compiled(with_positions(batch_axis=True), run_eagerly=run_eagerly)
    with pytest.raises(ValueError, match=r"without the batch axis.*positions"):
        model.train_on_batch(x, y)


def test_factor_and_products_of_the_network(float64):
    """One-hot inputs and groups in A, its kernel and `δᵀFδ`."""
    model = keras.Sequential(
        [
            keras.Input((LENGTH,), dtype="int32"),
            layers.Embedding(TOKENS, 3),
            layers.LayerNormalization(),
            layers.Dense(2, "tanh"),
            layers.Flatten(),
            layers.PReLU(),
            layers.Dense(2),
        ]
    )
    rng = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(rng.normal(size=tuple(variable.shape)))
    x, _ = text(5)
    recorded = Recorded(model, tf.constant(x), ["categorical"])
    assert not recorded.captured.fallbacks
    columns = Columns(recorded.terms, "exact", tf.constant([0, 0]))
    factor = NetworkRoot(
        recorded.captured, columns, recorded.terms[0].outputs, 2**20
    )
    # The reference: the Jacobian of the tape, entry by entry.
    term = recorded.terms[0]
    rows = []
    for entry in recorded.curvature.entries:
        jacobians = [
            tf.convert_to_tensor(
                recorded.tape.jacobian(
                    term.outputs,
                    recorded.variables[index].value,
                    experimental_use_pfor=False,
                )
            ).numpy()
            for index in entry.variables
        ]
        lead = jacobians[0].shape[:2]
        matrices = [
            entry.layer.layout.to_matrix([j[b, k] for j in jacobians])
            for b in range(lead[0])
            for k in range(lead[1])
        ]
        rows.append(np.reshape(matrices, (*lead, -1)))
    jacobian = np.concatenate(rows, axis=-1)
    outputs = term.outputs.numpy()
    p = np.exp(outputs) / np.exp(outputs).sum(axis=-1, keepdims=True)
    fisher = np.einsum("bi,ij->bij", p, np.eye(2)) - p[:, :, None] * p[:, None]
    c = term.coefficients.numpy()
    dense = np.einsum("b,bkp,bkl,blq->pq", c, jacobian, fisher, jacobian)
    matrix = factor.matrix().numpy()
    np.testing.assert_allclose(matrix @ matrix.T, dense, atol=1e-10)
    np.testing.assert_allclose(factor.gram(), matrix.T @ matrix, atol=1e-10)
    # Two directions, by the exact and the estimated product.
    vectors = rng.normal(size=(2, dense.shape[0]))
    directions = [factor.unflatten(tf.constant(v)) for v in vectors]
    stacked = [recorded.curvature.join(each) for each in directions]
    expected = vectors @ dense @ vectors.T
    tensors = [factor.to_tensors(each) for each in directions]
    exact = fisher_gram(
        recorded.tape,
        recorded.terms,
        [v.value for v in recorded.variables],
        tensors,
    )
    np.testing.assert_allclose(exact, expected, rtol=1e-9)
    parts = []
    for column in range(2):
        unit = tf.one_hot([column] * 5, 2, dtype=tf.float64)
        backward = recorded.captured.backward([term.cotangent(unit)])
        parts.append(estimated_gram(recorded.captured, backward, stacked, 5))
    np.testing.assert_allclose(sum(parts), expected, rtol=1e-9)
    # The blocks on the diagonal of the same matrix.
    for kind in ("full", "diagonal"):
        blocks = Recorded(model, tf.constant(x), ["categorical"], block=kind)
        start = 0
        for block in blocks.update("exact"):
            own = dense[start : start + block.shape.size][
                :, start : start + block.shape.size
            ]
            start += block.shape.size
            size = block.shape.matrix_size
            group = np.arange(len(own)) // size
            keep = group[:, None] == group
            if kind == "diagonal":
                keep = np.eye(len(own), dtype=bool)
            np.testing.assert_allclose(block.to_dense(), own * keep, atol=1e-10)
