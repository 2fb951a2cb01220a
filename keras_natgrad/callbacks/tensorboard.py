"""Records as summaries for TensorBoard."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf


class SummaryWriter:
    """Writes scalars and spectra to a folder for TensorBoard.

    Args:
        log_dir: The folder.

    Raises:
        ImportError: If TensorBoard is not installed. TensorFlow 2.21 no longer
            installs it, but needs it for summaries.
    """

    def __init__(self, log_dir: Any) -> None:
        try:
            importlib.import_module("tensorboard.summary.v2")
        except ImportError as error:
            raise ImportError(
                "`log_dir` needs TensorBoard: pip install "
                f"'keras_natgrad[tensorboard]'. Received: log_dir={log_dir!r}"
            ) from error
        self._writer = tf.summary.create_file_writer(str(log_dir))

    def write(
        self,
        scalars: Mapping[str, float],
        spectra: Mapping[str, np.ndarray],
        step: int,
    ) -> None:
        """Writes one record.

        Args:
            scalars: Numbers by name; those that are not finite are left out.
            spectra: Eigenvalues by layer, written as a histogram of the
                base-ten logarithms of the positive ones.
            step: The optimizer's iteration.
        """
        with self._writer.as_default(step=step):
            for name, value in scalars.items():
                if name != "step" and np.isfinite(value):
                    tf.summary.scalar(f"curvature/{name}", value)
            for name, values in spectra.items():
                logarithms = np.log10(values[values > 0])
                if logarithms.size:
                    tf.summary.histogram(f"spectrum/{name}", logarithms)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()
