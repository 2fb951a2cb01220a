"""Set-up of every test process and of every test."""

import os

# Before TensorFlow and Keras are imported for the first time.
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")
_IS_XDIST_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if _IS_XDIST_WORKER:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import keras
import pytest
import tensorflow as tf

SEED = 1234
LOGICAL_CPUS = 2


def _configure_tensorflow():
    """One thread per xdist worker; two logical CPUs to distribute over."""
    if _IS_XDIST_WORKER:
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * LOGICAL_CPUS,
    )


_configure_tensorflow()


@pytest.fixture(autouse=True)
def restored_keras_settings():
    """Put back the float type and the dtype policy that a test changes."""
    floatx = keras.config.floatx()
    policy = keras.config.dtype_policy()
    yield
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)


@pytest.fixture(autouse=True)
def fresh_keras_session(restored_keras_settings):
    """Start every test with the same seeds and layer names."""
    # A full garbage collection after each test would cost more than most of
    # the tests themselves.
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(SEED)
    yield
    keras.utils.clear_session(free_memory=False)


@pytest.fixture
def float64(restored_keras_settings):
    """Run a test in float64, for comparison with NumPy references."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")


@pytest.fixture
def mirrored_strategy():
    """Two replicas on the two logical CPUs."""
    from tests.distribution.strategy import two_replicas

    return two_replicas()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark the variants that the default run leaves out as slow.

    `@pytest.mark.variants(3)` keeps three at equal distances of those that are
    not slow already, `@pytest.mark.variants("xla", "one-eager")` those with
    these ids.
    """
    tests = {}
    for item in items:
        mark = item.get_closest_marker("variants")
        if mark is not None and item.get_closest_marker("slow") is None:
            tests.setdefault(item.nodeid.split("[")[0], []).append((item, mark))
    by_id = any("[" in argument for argument in config.args)
    for name, variants in tests.items():
        every = [item for item, _ in variants]
        wanted = variants[0][1].args
        if isinstance(wanted[0], int):
            count = wanted[0]
            kept = [every[i * len(every) // count] for i in range(count)]
        else:
            kept = [each for each in every if each.callspec.id in wanted]
            if len(kept) < len(wanted) and not by_id:
                raise pytest.UsageError(f"{name} has no {wanted}")
        for item in every:
            if item not in kept:
                item.add_marker(pytest.mark.slow)
