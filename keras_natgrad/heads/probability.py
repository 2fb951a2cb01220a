"""Lazy access to TensorFlow Probability."""

from typing import Any


def distributions() -> Any:
    """Returns `tensorflow_probability.distributions`, imported on first use.

    Only drawing targets and building distribution objects need TensorFlow
    Probability, so `import keras_natgrad` does not load it.

    Returns:
        The module `tensorflow_probability.distributions`.

    Raises:
        ImportError: If TensorFlow Probability or the `tf_keras` package it
            depends on is not installed.
    """
    return _load("distributions")


def bijectors() -> Any:
    """Returns `tensorflow_probability.bijectors`, imported on first use.

    Returns:
        The module `tensorflow_probability.bijectors`.

    Raises:
        ImportError: As `distributions()`.
    """
    return _load("bijectors")


def mathematics() -> Any:
    """Returns `tensorflow_probability.math`, imported on first use.

    Returns:
        The module `tensorflow_probability.math`.

    Raises:
        ImportError: As `distributions()`.
    """
    return _load("math")


def _load(module: str) -> Any:
    try:
        import tensorflow_probability as tfp

        # TFP loads its modules on first access and fails only then when
        # `tf_keras` is missing.
        return getattr(tfp, module)
    except ImportError as error:
        raise ImportError(
            "Output distributions need TensorFlow Probability and tf_keras. "
            "Install both with: pip install 'tensorflow-probability[tf]'"
        ) from error
