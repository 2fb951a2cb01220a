import itertools

import numpy as np
import pytest

from benchmarks.data import ill_conditioned_data as draw
from benchmarks.tasks import TASKS, Autoencoder, IllConditioned, make_task


@pytest.fixture
def autoencoder():
    images = np.random.default_rng(0).uniform(size=(12, 784)).astype("f")
    return Autoencoder((images, images), (images[:5], images[:5]))


def first_batches(task, seed, count=3):
    return [x for x, _ in itertools.islice(task.batches(seed), count)]


def test_batches_are_a_function_of_the_seed():
    x, y = draw(500)
    task = IllConditioned((x, y), (x, y))
    once, again = first_batches(task, 1), first_batches(task, 1)
    np.testing.assert_array_equal(once, again)
    assert once[0].shape == (256, 20)
    assert not np.array_equal(once, first_batches(task, 2))


def test_weights_are_a_function_of_the_seed(autoencoder):
    once, again, other = (
        autoencoder.build_model(seed).get_weights() for seed in (1, 1, 2)
    )
    for a, b in zip(once, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(once[0], other[0])
    limit = np.sqrt(6 / (784 + 1000))
    assert 0.99 * limit < np.abs(once[0]).max() <= limit
    assert not np.any(once[1])


def test_autoencoder_metric_is_the_squared_error_per_image(autoencoder):
    model = autoencoder.build_model(0)
    x = np.asarray(autoencoder.evaluation[0])
    outputs = model.predict_on_batch(x).astype("float64")
    error = (1 / (1 + np.exp(-outputs)) - x) ** 2
    np.testing.assert_allclose(
        autoencoder.evaluate(model), error.sum(1).mean(), rtol=1e-5
    )
    assert model.count_params() == autoencoder.parameters == 2_837_314


def test_l2_penalty_belongs_to_the_summed_loss(autoencoder):
    penalised = Autoencoder(autoencoder.train, autoencoder.train, l2=1e-2)
    model = penalised.build_model(0)
    squares = sum(np.sum(w.astype("d") ** 2) for w in model.get_weights())
    assert float(sum(model.losses)) == pytest.approx(
        0.5e-2 * squares / 784, rel=1e-4
    )
    assert not autoencoder.build_model(0).losses


def test_ill_conditioned_covariance():
    x, y = draw(20000)
    eigenvalues = np.linalg.eigvalsh(np.cov(x.T.astype("d")))
    assert eigenvalues[-1] / eigenvalues[0] == pytest.approx(1e6, rel=0.1)
    spread = x.std(0)
    assert spread.max() / spread.min() < 10  # The rotation hides the axes.
    assert y.mean() == pytest.approx(0, abs=1e-5)
    assert y.std() == pytest.approx(1, abs=1e-5)


def test_small_tasks_start_above_their_target():
    for name in ("diabetes", "ill_conditioned"):
        task = make_task(name)
        assert isinstance(task, TASKS[name])
        assert task.evaluate(task.build_model(0)) > 2 * task.target


def test_unknown_task():
    with pytest.raises(ValueError, match="Received: name='no'"):
        make_task("no")


def test_mnist_tasks_read_the_file(tmp_path):
    generator = np.random.default_rng(0)
    arrays = {
        "x_train": generator.integers(0, 256, (20, 28, 28), "uint8"),
        "y_train": generator.integers(0, 10, 20, "uint8"),
        "x_test": generator.integers(0, 256, (6, 28, 28), "uint8"),
        "y_test": generator.integers(0, 10, 6, "uint8"),
    }
    path = tmp_path / "mnist.npz"
    np.savez(path, **arrays)
    task = make_task("autoencoder", path, batch_size=7)
    # The metric of an optimization benchmark is on training images.
    np.testing.assert_allclose(task.evaluation[0], task.train[0][:10000])
    x, y = next(task.batches(0))
    assert x.shape == (7, 784)
    assert 0 <= x.min() and x.max() <= 1
    np.testing.assert_array_equal(x, y)
    x, y = make_task("classifier", path).train
    np.testing.assert_array_equal(y, arrays["y_train"])
    assert x[3, 5] == pytest.approx(arrays["x_train"][3, 0, 5] / 255)
    task = make_task("resnet20", path)
    x, y = task.train
    np.testing.assert_array_equal(y, arrays["y_train"])
    np.testing.assert_allclose(
        x[3, ..., 0], arrays["x_train"][3] / 255, rtol=1e-6
    )
    held_out, y = task.evaluation
    np.testing.assert_array_equal(y, arrays["y_test"])
    np.testing.assert_allclose(
        held_out[..., 0], arrays["x_test"] / 255, rtol=1e-6
    )
    assert task.parameters == 269_434  # Without the moving statistics.
