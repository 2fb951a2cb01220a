import keras
import numpy as np
import pytest
from scipy.signal import correlate
from scipy.special import log_softmax

import keras_natgrad as kng
from benchmarks.resnet import build_resnet
from benchmarks.tasks import ResNet20


def tiny(seed=0, size=6):
    """A network of two stages of one block, with 3 and 5 channels."""
    return build_resnet(size, 4, seed, stages=(3, 5), blocks=1)


def shaken(model):
    """Replaces the weights that start at zero or one by random ones."""
    generator = np.random.default_rng(1)
    for variable in model.variables:
        if variable.name not in ("kernel", "seed_generator_state"):
            variable.assign(generator.uniform(0.5, 1.5, variable.shape))
    return model


def convolution(x, kernel, strides):
    """TensorFlow's "same": an odd zero goes after the image."""
    size, side = x.shape[1], len(kernel)
    zeros = (-(-size // strides) - 1) * strides + side - size
    ends = (zeros // 2, zeros - zeros // 2)
    x = np.pad(x, [(0, 0), ends, ends, (0, 0)])
    every = [
        sum(
            correlate(image[..., i], kernel[..., i, o], "valid")
            for i in range(kernel.shape[2])
        )
        for image in x
        for o in range(kernel.shape[3])
    ]
    z = np.reshape(every, (len(x), kernel.shape[3], *every[0].shape))
    return np.moveaxis(z, 1, -1)[:, ::strides, ::strides]


def forward(model, x):
    """The network of `tiny` in NumPy, by the model's own weights."""
    weights = iter(model.weights)

    def normalised(z):
        gamma, beta, mean, variance = (next(weights).numpy() for _ in range(4))
        return gamma * (z - mean) / np.sqrt(variance + 1e-3) + beta

    def convolved(x, strides=1):
        kernel = next(weights).numpy()
        return normalised(convolution(x, kernel, strides))

    def relu(z):
        return np.maximum(z, 0)

    x = relu(convolved(x))
    x = relu(x + convolved(relu(convolved(x))))
    y = convolved(relu(convolved(x, 2)))
    shortcut = np.zeros_like(y)
    shortcut[..., : x.shape[-1]] = x[:, ::2, ::2]
    x = relu(shortcut + y).mean((1, 2))
    kernel, bias = (weight.numpy() for weight in weights)
    return x @ kernel + bias


@pytest.mark.parametrize("size", [6, 7])
def test_outputs_are_those_of_numpy(float64, size):
    model = shaken(tiny(size=size))
    x = np.random.default_rng(0).normal(size=(3, size, size, 1))
    np.testing.assert_allclose(
        model(x, training=False), forward(model, x), rtol=1e-10, atol=1e-12
    )


def test_the_network_is_that_of_the_paper():
    model = build_resnet(28, 10, 0)
    convolutions = [
        layer.output.shape[1:]
        for layer in model.layers
        if isinstance(layer, keras.layers.Conv2D)
    ]
    assert convolutions == [
        *[(28, 28, 16)] * 7,
        *[(14, 14, 32)] * 6,
        *[(7, 7, 64)] * 6,
    ]
    # Of 3×3 kernels, of scales and shifts, of the output layer.
    pairs = [1 * 16, *[16 * 16] * 6, 16 * 32, *[32 * 32] * 5]
    pairs += [32 * 64, *[64 * 64] * 5]
    channels = 7 * 16 + 6 * 32 + 6 * 64
    assert sum(np.size(w) for w in model.trainable_weights) == (
        9 * sum(pairs) + 2 * channels + 65 * 10
    )


def test_weights_are_a_function_of_the_seed():
    once, again, other = (
        build_resnet(8, 10, seed).get_weights() for seed in (1, 1, 2)
    )
    for a, b in zip(once, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(once[0], other[0])
    last = [w for w in once if w.shape == (3, 3, 64, 64)][-1]
    # 36 864 draws: the deviation is known to 0.4 %.
    assert last.std() == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.02)


def cross_entropy(logits, y):
    return -log_softmax(logits, 1)[np.arange(len(y)), y].mean()


def test_statistics_are_those_of_the_training_images(float64, monkeypatch):
    generator = np.random.default_rng(0)
    x = generator.uniform(size=(9, 6, 6, 1))
    y = generator.integers(0, 4, 9)
    task = ResNet20((x[:5], y[:5]), (x[5:], y[5:]))
    model = shaken(tiny())
    weights = [weight.numpy() for weight in model.trainable_weights]
    first = task.evaluate(model)
    z = convolution(x[:5], weights[0], 1)
    layer = model.layers[2]
    np.testing.assert_allclose(layer.moving_mean, z.mean((0, 1, 2)), 1e-12)
    np.testing.assert_allclose(layer.moving_variance, z.var((0, 1, 2)), 1e-12)
    assert layer.momentum == 0.99
    assert first == pytest.approx(
        cross_entropy(forward(model, x[5:]), y[5:]), rel=1e-12
    )
    # The chunks of the evaluation, and the training before, do not matter.
    monkeypatch.setattr(ResNet20, "eval_batch", 3)
    assert task.evaluate(shaken(model)) == pytest.approx(first, rel=1e-12)
    for before, after in zip(weights, model.trainable_weights, strict=True):
        np.testing.assert_array_equal(before, after)


def test_kfac_captures_every_layer():
    model, lines = tiny(), []
    kng.KFAC().attach(model).summary(lines.append)
    assert "captured 100.0%" in lines[-1]


@pytest.mark.slow
def test_kfac_trains():
    generator = np.random.default_rng(0)
    y = generator.integers(0, 4, 64)
    x = generator.uniform(size=(64, 6, 6, 1)) + y[:, None, None, None]
    x = x.astype("f")
    task = ResNet20((x, y), (x, y), batch_size=64)
    model = tiny()
    model.compile(kng.KFAC().attach(model), task.loss())
    for _ in range(30):
        loss = model.train_on_batch(x, y)
    assert loss < 0.1 * np.log(4)
