import itertools

import numpy as np
import pytest
from scipy.special import erf, log_softmax, softmax

import keras_natgrad as kng
from benchmarks.tasks import Transformer, make_task
from benchmarks.transformer import (
    build_transformer,
    encode,
    help_text,
    windows,
)


def tiny(seed=0):
    """One block of width 8 with two heads: 5 tokens, 6 positions."""
    return build_transformer(5, 6, seed, width=8, blocks=1, heads=2)


def shaken(model):
    """Replaces the weights that start at zero or one by random ones."""
    generator = np.random.default_rng(1)
    for variable in model.trainable_variables:
        if variable.name not in ("kernel", "embeddings"):
            variable.assign(generator.uniform(0.5, 1.5, variable.shape))
    return model


def forward(model, tokens):
    """The network of `tiny` in NumPy, by the model's own weights."""
    weights = iter(variable.numpy() for variable in model.trainable_variables)

    def normalised(x):
        gamma, beta = next(weights), next(weights)
        centred = x - x.mean(-1, keepdims=True)
        variance = np.square(centred).mean(-1, keepdims=True)
        return gamma * centred / np.sqrt(variance + 1e-5) + beta

    def dense(x):
        return x @ next(weights) + next(weights)

    def attended(x):
        q, k, v = (
            np.einsum("btn,nhd->bthd", x, next(weights)) + next(weights)
            for _ in range(3)
        )
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
        future = np.triu(np.ones(scores.shape[-2:], bool), 1)
        share = softmax(np.where(future, -np.inf, scores), -1)
        z = np.einsum("bhqk,bkhd->bqhd", share, v)
        return np.einsum("bqhd,hdn->bqn", z, next(weights)) + next(weights)

    x = next(weights)[tokens] + next(weights)
    x = x + attended(normalised(x))
    hidden = dense(normalised(x))
    # TensorFlow keeps √½ in single precision.
    root = float(np.float32(np.sqrt(0.5)))
    x = x + dense(hidden * (1 + erf(hidden * root)) / 2)
    return dense(normalised(x))


TOKENS = np.random.default_rng(0).integers(0, 5, (3, 6))


def test_outputs_are_those_of_numpy(float64):
    model = shaken(tiny())
    np.testing.assert_allclose(
        model(TOKENS), forward(model, TOKENS), rtol=1e-10, atol=1e-12
    )


def test_a_character_sees_none_that_follow(float64):
    model = tiny()
    changed = TOKENS.copy()
    changed[:, 3] = (changed[:, 3] + 1) % 5
    difference = np.abs(model(TOKENS) - model(changed)).max((0, 2))
    assert np.all(difference[:3] == 0)
    assert np.all(difference[3:] > 1e-6)


def test_weights_are_a_function_of_the_seed():
    once, again, other = (
        build_transformer(9, 7, seed, 64, 2).get_weights() for seed in (1, 1, 2)
    )
    for a, b in zip(once, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(once[0], other[0])
    kernels = [w for w in once if w.shape == (64, 4, 16)]
    kernels += [w for w in once if w.shape == (4, 16, 64)]
    assert len(kernels) == 8
    for kernel in kernels:
        # 4 096 draws: the deviation is known to 1.1 %.
        assert kernel.std() == pytest.approx(1 / 8, rel=0.05)
    flat = [kernel.reshape(-1) for kernel in kernels]
    correlations = np.corrcoef(flat) - np.eye(8)
    assert np.abs(correlations).max() < 0.1


def test_windows_and_their_targets():
    codes, vocabulary = encode("hello world")
    assert vocabulary == " dehlorw"
    assert "".join(vocabulary[code] for code in codes) == "hello world"
    x, y = windows(codes, 4)
    assert x.shape == y.shape == (7, 4)
    np.testing.assert_array_equal(x[2], codes[2:6])
    np.testing.assert_array_equal(y[2], codes[3:7])


def test_the_last_tenth_is_held_out():
    text = "".join(chr(1000 + i) for i in range(5000))  # All different.
    task = Transformer(text)
    assert len(task.vocabulary) == 5000
    x, y = task.train
    assert (x.min(), y.max()) == (0, 4499)
    x, y = (np.asarray(part) for part in task.evaluation)
    assert (x.min(), y.max()) == (4500, 4999)
    assert x.shape == (256, 64)
    np.testing.assert_array_equal(y, x + 1)


def test_the_task_reads_the_help_texts():
    text = help_text()
    assert text.isprintable() is False and len(text) > 400_000
    task = make_task("transformer")
    x, y = next(task.batches(0))
    assert x.shape == y.shape == (32, 64)
    decoded = "".join(task.vocabulary[code] for code in x[0])
    assert decoded in text
    pair = [list(itertools.islice(task.batches(1), 2)) for _ in range(2)]
    np.testing.assert_array_equal(*pair)


def test_metric_is_the_cross_entropy_per_character(float64, monkeypatch):
    monkeypatch.setattr(Transformer, "context", 6)
    task = Transformer("abcde" * 40)
    model = shaken(tiny())
    x, y = (np.asarray(part) for part in task.evaluation)
    likelihood = log_softmax(forward(model, x), -1)
    expected = -np.take_along_axis(likelihood, y[..., None], -1).mean()
    assert task.evaluate(model) == pytest.approx(expected, rel=1e-10)


def test_no_l2_penalty():
    with pytest.raises(ValueError, match="name='transformer', l2=0.1"):
        make_task("transformer", l2=0.1)


def test_kfac_captures_every_layer():
    model, lines = tiny(), []
    kng.KFAC().attach(model).summary(lines.append)
    assert "captured 100.0%" in lines[-1]


@pytest.mark.slow
def test_kfac_trains(monkeypatch):
    monkeypatch.setattr(Transformer, "context", 6)
    task = Transformer("abcde" * 40)
    model = tiny()
    model.compile(kng.KFAC().attach(model), task.loss())
    for x, y in itertools.islice(task.batches(0), 30):
        model.train_on_batch(x, y)
    # The first character of a window decides all that follow.
    assert task.evaluate(model) < 0.1 * np.log(5)
