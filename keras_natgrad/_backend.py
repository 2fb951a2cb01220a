"""The check that Keras runs on TensorFlow."""

import json
import os
import sys
from pathlib import Path

_REQUIRED = "tensorflow"


def require_tensorflow_backend() -> None:
    """Raise unless Keras uses, or is about to use, the TensorFlow backend.

    Importing Keras fails with an unrelated error if the package of its backend
    is missing. So this reads the settings that Keras would read, and asks Keras
    only if it is already loaded.

    Raises:
        ImportError: If the backend of Keras is not TensorFlow.
    """
    keras = sys.modules.get("keras")
    if keras is not None and hasattr(keras, "config"):
        backend = keras.config.backend()
    else:
        backend = configured_backend()
    if backend != _REQUIRED:
        raise ImportError(
            "keras_natgrad works with the TensorFlow backend of Keras only. "
            "Set the environment variable KERAS_BACKEND=tensorflow before "
            f"Keras is imported. Received: backend={backend}"
        )


def configured_backend() -> str:
    """Return the name of the backend that Keras will choose when imported.

    The order is that of Keras: the environment variable `KERAS_BACKEND`, then
    `keras.json` in the folder `KERAS_HOME` (by default `~/.keras`, or
    `/tmp/.keras` without a writable home), then TensorFlow.

    Returns:
        The backend's name, for example `"tensorflow"`.
    """
    from_environment = os.environ.get("KERAS_BACKEND")
    if from_environment:
        return from_environment
    try:
        settings = json.loads(_config_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return _REQUIRED
    if not isinstance(settings, dict):
        return _REQUIRED
    return str(settings.get("backend", _REQUIRED))


def _config_file() -> Path:
    folder = os.environ.get("KERAS_HOME")
    if folder is None:
        home = os.path.expanduser("~")
        folder = os.path.join(
            home if os.access(home, os.W_OK) else "/tmp", ".keras"
        )
    return Path(os.path.expanduser(folder)) / "keras.json"
